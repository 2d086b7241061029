"The project holds together: notebooks and library agree, rooms look one way, README and metadata are in step"
import ast, builtins, dis, importlib, json, pkgutil, re, shutil, subprocess, sys, tomllib, types
from configparser import ConfigParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
bin_ = Path(sys.executable).parent
nbs  = sorted((root/'nbs').rglob('[0-9]*.ipynb'))

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks and the library, exported and cleaned anew in another place"
    d = tmp_path_factory.mktemp('copy')
    for o in ('nbs','self_supervised'): shutil.copytree(root/o, d/o, ignore=shutil.ignore_patterns('__pycache__'))
    for o in ('pyproject.toml','settings.ini','setup.py','README.md'): shutil.copy(root/o, d/o)
    for cmd in ('nbdev-export','nbdev-clean'): subprocess.run([bin_/cmd], cwd=d, check=True, capture_output=True)
    return d

def tree(d, pattern): return {p.relative_to(d): p.read_bytes() for p in sorted(d.rglob(pattern)) if '__pycache__' not in p.parts}

def test_export_changes_nothing(copy):
    a,b = tree(root/'self_supervised','*.py'),tree(copy/'self_supervised','*.py')
    assert a.keys()==b.keys()
    assert [str(k) for k in a if a[k]!=b[k]]==[]

def test_notebooks_are_clean(copy):
    a,b = tree(root/'nbs','*.ipynb'),tree(copy/'nbs','*.ipynb')
    assert [str(k) for k in a if a[k]!=b[k]]==[]

def test_notebooks_keep_only_what_a_reader_wants():
    for p in nbs:
        for c in json.loads(p.read_text())['cells']:
            out = json.dumps(c.get('outputs', []), ensure_ascii=False)
            if re.search(r'^#\|\s*hide', ''.join(c['source']), re.M): assert out=='[]', p.name
            assert not re.search(rf'Warning: |{re.escape(str(root))}|\u2588|/tmp/|/var/folders/', out), p.name

def room(nb):
    "The module that a notebook is the source of; None of a page that only shows"
    m = re.search(r'default_exp ([\w.]+)', nb.read_text())
    return m and m.group(1)

rooms = [p for p in nbs if room(p)]

def test_rooms_import_rooms_of_lower_numbers_only():
    order = {room(p): int(re.match(r'\d+', p.name).group()) for p in rooms}
    assert len(order)==len(rooms)>20
    for mod,n in order.items():
        for node in ast.walk(ast.parse((root/'self_supervised'/(mod.replace('.','/')+'.py')).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            if getattr(node, 'level', 0): names = ['.'.join(['self_supervised']+mod.split('.')[:-node.level]+[node.module])]
            for name in names:
                if name.split('.')[0]!='self_supervised': continue
                assert order[name.removeprefix('self_supervised.')]<n, f'{mod} imports {name}'

def test_every_notebook_is_a_page():
    "A title for readers and one sentence; the site adds the name of the module"
    titles = {}
    for p in nbs:
        m = re.match(r'# (\S.*)\n\n> \S', ''.join(json.loads(p.read_text())['cells'][0]['source']))
        assert m, p.name
        titles[p.relative_to(root).as_posix()] = m[1]
    assert [(p,t) for p,t in titles.items() if list(titles.values()).count(t)>1]==[]

def test_imports_stand_in_cells_of_their_own():
    "nbdev-docs runs every cell that imports, and of the others only the exported ones"
    for p in [root/'nbs'/'index.ipynb', *nbs]:
        for c in json.loads(p.read_text())['cells']:
            src = ''.join(c['source'])
            if c['cell_type']!='code' or re.search(r'^#\| *(export|eval: *false)', src, re.M): continue
            body = ast.parse(src).body
            mixed = any(isinstance(n, (ast.Import,ast.ImportFrom)) for o in body for n in ast.walk(o)) and not all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in body)
            assert not mixed, f'{p.name}: {src[:80]}'

def test_readme_is_the_index_notebook():
    assert subprocess.run([sys.executable, root/'tools'/'readme.py', '--check']).returncode==0

def test_pictures_of_the_readme_are_there():
    links = re.findall(r'\]\(((?!http)[^)#]+)', (root/'README.md').read_text())
    assert links and [l for l in links if not (root/l).exists()]==[]

def test_all_has_every_public_name():
    everything = importlib.import_module('self_supervised.all')
    for p in rooms:
        if room(p).startswith('cli'): continue
        for name in importlib.import_module(f'self_supervised.{room(p)}').__all__: assert hasattr(everything, name), name

def test_metadata_stands_once():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    assert project['name']==cfg['DEFAULT']['lib_name']=='self-supervised-dino'
    assert {'version','dependencies','scripts','requires-python'}<=set(project['dynamic'])

def code_objects(code):
    yield code
    for o in code.co_consts:
        if isinstance(o, types.CodeType): yield from code_objects(o)

def unresolved(module):
    "Global names that the functions of a module load, and that neither the module nor Python has"
    top = compile(Path(module.__file__).read_text(encoding='utf-8'), module.__file__, 'exec')
    names = {i.argval for c in code_objects(top) if c is not top for i in dis.get_instructions(c) if i.opname=='LOAD_GLOBAL'}
    return sorted(n for n in names if not hasattr(module, n) and not hasattr(builtins, n))

def test_every_global_name_is_found():
    "A notebook's kernel has names that an exported module may lack"
    package = importlib.import_module('self_supervised')
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, 'self_supervised.') if not m.ispkg]
    assert len(modules)>40
    assert {m: names for m in modules if (names := unresolved(importlib.import_module(m)))}=={}

def test_an_unresolved_name_is_found(tmp_path):
    file = tmp_path/'mod.py'
    file.write_text('import os\ndef f():\n    def g(): return missing(os, len)\n    return g')
    assert unresolved(types.SimpleNamespace(__file__=str(file), os=1))==['missing']

# Lines

# Files of the library that are still to be shortened: their lines have at most 140 characters
LONG = ['evaluation/video.py','explore.py']

def long_lines(lines, most): return [l for l in lines if len(l)>most]

def own_lines(src):
    "The lines of a module but `__all__`, which nbdev writes"
    return re.sub(r'^__all__ = \[.*?\]$', '', src, flags=re.M|re.S).splitlines()

def library_lines():
    files = [p for p in sorted((root/'self_supervised').rglob('*.py')) if p.name!='_modidx.py']
    return {p.relative_to(root/'self_supervised').as_posix(): own_lines(p.read_text(encoding='utf-8')) for p in files}

def test_library_lines_have_at_most_120_characters():
    found = library_lines()
    assert len(found)>30 and {f:o for f,lines in found.items() if (o := long_lines(lines, 140 if f in LONG else 120))}=={}

def test_files_with_longer_lines_have_some():
    "A file that was shortened leaves the list"
    found = library_lines()
    assert [f for f in LONG if not long_lines(found[f], 120)]==[]

def shown(cell):
    "Lines of code and of text output of a cell that its page shows, also of code in Markdown; exported cells are folded"
    src = ''.join(cell['source'])
    if cell['cell_type']=='markdown':
        fenced = re.findall(r'^```\w*\n(.*?)^```$', src, re.M|re.S)
        return [l for o in [*fenced, *re.findall(r'^ {4}(.*)$', src, re.M)] for l in o.splitlines()]
    if cell['cell_type']!='code' or re.search(r'^#\|\s*(hide|default_exp|export\w*)\b', src, re.M): return []
    code  = [] if re.search(r'^#\|\s*echo:\s*false', src, re.M) else [l for l in src.splitlines() if not l.startswith('#|')]
    texts = [''.join(o.get('text', '')) for o in cell['outputs']]
    datas = [o.get('data', {}) for o in cell['outputs']]
    texts += [''.join(d['text/plain']) for d in datas if 'text/plain' in d and not {'text/html','image/png','image/svg+xml'}&set(d)]
    return code + '\n'.join(texts).splitlines()

def test_shown_code_and_output_have_at_most_88_characters():
    pages = [*nbs, *sorted((root/'examples').glob('*.ipynb'))]
    found = {p.relative_to(root).as_posix(): long_lines([l for c in json.loads(p.read_text())['cells'] for l in shown(c)], 88) for p in pages}
    assert len(found)>60 and {f:o for f,o in found.items() if o}=={}

def test_long_lines_are_found():
    code = dict(cell_type='code', source=['#| echo: false\n','x = 1'], outputs=[dict(text=['ab\n','cde'])])
    assert shown(code)==['ab','cde'] and long_lines(shown(code), 2)==['cde']
    assert shown(dict(cell_type='markdown', source=['a\n\n','    b\n\n','```python\n','c\n','```']))==['c','b']
    assert shown(code | dict(source=['x = 1']))==['x = 1','ab','cde'] and shown(code | dict(source=['#| export\n','x = 1']))==[]

# Pictures

def without_alt(cells):
    "Sources of the cells that saved a picture and have no `#| fig-alt`"
    pictures = [c for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    return [s[-60:] for s in (''.join(c['source']) for c in pictures) if not re.search(r'^#\|\s*fig-alt:\s*\w.{15}', s, re.M)]

def test_every_saved_picture_has_an_alt_text():
    pages = [*nbs, *sorted((root/'examples').glob('*.ipynb'))]
    assert {p.name: o for p in pages if (o := without_alt(json.loads(p.read_text())['cells']))}=={}

def test_a_missing_alt_text_is_found():
    cell = dict(source=['plot()'], outputs=[dict(data={'image/png':''})])
    assert without_alt([cell])==['plot()'] and without_alt([cell | dict(outputs=[])])==[]
    assert without_alt([cell | dict(source=['#| fig-alt: Accuracy of three networks\n','plot()'])])==[]
