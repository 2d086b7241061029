"The commands: their options are in groups with help that can be read alone, and a command imports only what it needs"
import argparse, importlib, inspect, re
from pathlib import Path
import pytest
import self_supervised.cli as cli
from self_supervised.cli import command_parser, run_command
from test_language import PATTERNS, prose

COMMANDS = [getattr(cli, n) for n in cli.__all__ if n.startswith('dino_')]

def actions(func): return {a.dest:a for a in command_parser(func)._actions if a.help!=argparse.SUPPRESS and a.dest not in ('help','version')}
def no_phrase(text): return [p.pattern for p,_ in PATTERNS if p.search(prose(text))]

def test_there_are_eight_commands():
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['='])
    cfg.read(Path(__file__).resolve().parent.parent/'settings.ini')
    scripts = dict(o.split('=') for o in cfg['DEFAULT']['console_scripts'].split())
    assert sorted(scripts)==sorted(f.__name__ for f in COMMANDS) and len(scripts)==8
    for name,place in scripts.items():
        mod,_,main = place.partition(':')
        assert inspect.isfunction(getattr(importlib.import_module(mod), main)) and mod==getattr(cli, name).__module__

@pytest.mark.parametrize('func', COMMANDS, ids=lambda f: f.__name__)
def test_every_option_is_in_one_group_and_its_help_can_be_read_alone(func):
    named = [n for names in func.groups.values() for n in names.split()]
    assert sorted(named)==sorted(inspect.signature(func).parameters) and len(named)==len(set(named))
    for name,a in actions(func).items():
        assert re.match(r'[A-Z]\w', a.help) and not re.search(r'\.\.\.|\?( |$)|\.$|default: (None|False)', a.help), (name,a.help)
        assert no_phrase(a.help)==[], (name,a.help)
        assert len(re.sub(r' \(default: .*?\)', '', a.help))<=190, (name,len(a.help))
    assert len({a.help for a in actions(func).values()})==len(actions(func))

@pytest.mark.parametrize('func', COMMANDS, ids=lambda f: f.__name__)
def test_help_begins_with_what_the_command_does_and_an_example(func, capsys):
    with pytest.raises(SystemExit) as e: run_command(func, ['--help'])
    text = capsys.readouterr().out
    assert not e.value.code and text.startswith(f'usage: {func.__name__}')
    head = re.split(r'\n(?:options|[A-Z][\w, ]+):\n(?= {2}-)', text)[0]
    assert ' '.join(func.__doc__.split()) in ' '.join(head.split()) and f'Example:\n  {func.example}' in head
    titles = re.findall(r'^(\w[\w, ]*):$', text, re.M)
    assert [t for t in titles if t not in ('Example','options')]==list(func.groups)
    assert no_phrase(func.__doc__)==[]
    command_parser(func).parse_args(func.example.split()[1:])   # the example is valid

def test_a_group_shows_its_options(capsys):
    with pytest.raises(SystemExit): run_command(cli.dino_train, ['--help'])
    crops = re.search(r'^Crops:\n(.*?)\n\n', capsys.readouterr().out, re.S|re.M)[1]
    assert re.findall(r'^  (--[\w-]+)', crops, re.M)==[f"--{o.replace('_','-')}" for o in cli.dino_train.groups['Crops'].split()]

def test_all_names_are_there():
    space = {}
    exec('from self_supervised.cli import *', space)
    assert set(cli.__all__)<=space.keys() and set(cli.__all__)<=set(dir(cli))
    with pytest.raises(AttributeError, match='no_such_name'): cli.no_such_name
