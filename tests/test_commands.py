"Every command of the README once, as a user types it: with its defaults, the progress bar included"
import re
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import dino_train, run_command
from self_supervised.cli.evaluate import dino_attention, dino_eval
from self_supervised.cli.explore import dino_embed, dino_explore
from self_supervised.cli.ablate import dino_ablate
from self_supervised.cli.prepare import dino_prepare
from self_supervised.cli.report import dino_report

SMALL = '--batch-size 8 --num-workers 0'                           # the image size is that of the run
COMMANDS = [                                                     # in an order in which one uses what another wrote; sizes alone are added
    (dino_train,     'dino_train --path IMAGES --labels LABELLED --epochs 1 --out runs/mine --arch vit_mini_patch4_16 --size 16 --batch-size-per-gpu 8 --num-workers 0'),
    (dino_eval,      f'dino_eval knn --encoder runs/mine --data LABELLED {SMALL}'),
    (dino_eval,      f'dino_eval linear --encoder runs/mine pixels --data LABELLED --epochs 2 {SMALL}'),
    (dino_eval,      f'dino_eval lowshot --encoder runs/mine --data LABELLED {SMALL}'),
    (dino_eval,      f'dino_eval finetune --encoder runs/mine --data LABELLED --epochs 1 {SMALL}'),
    (dino_eval,      f'dino_eval unlabelled --encoder runs/mine --data IMAGES {SMALL}'),
    (dino_attention, 'dino_attention IMAGES/0.png --encoder runs/mine'),
    (dino_prepare,   'dino_prepare IMAGES small --size 16 --num-workers 0'),
    (dino_embed,     f'dino_embed IMAGES --encoder runs/mine {SMALL}'),
    (dino_explore,   f'dino_explore IMAGES --encoder runs/mine {SMALL}'),
    (dino_report,    'dino_report runs/mine'),
    (dino_ablate,    'dino_ablate --variants DINO --seeds 0 --epochs 1'),
]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d,rng = tmp_path_factory.mktemp('commands'),np.random.RandomState(0)
    (d/'IMAGES').mkdir()
    for i in range(16): Image.fromarray(rng.randint(0, 255, (20,20,3), dtype=np.uint8)).save(d/'IMAGES'/f'{i}.png')
    for split in ('train','test'):
        for c in 'ab':
            (d/'LABELLED'/split/c).mkdir(parents=True)
            for i in range(12): Image.fromarray(rng.randint(0, 255, (20,20,3), dtype=np.uint8)).save(d/'LABELLED'/split/c/f'{i}.png')
    return d

@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: ' '.join(c[1].split()[:2]) if isinstance(c, tuple) else None)
def test_command(folder, monkeypatch, capsys, command):
    func,line = command
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = run_command(func, line.split()[1:])
    assert code==0, capsys.readouterr().err
    plt.close('all')

def test_no_command_of_the_readme_is_forgotten():
    text  = (Path(__file__).resolve().parent.parent/'README.md').read_text(encoding='utf-8')
    lines = re.findall(r'^ {4}(dino_\w+ .*)$', text, re.M)
    assert lines and {f.__name__ for f,_ in COMMANDS}=={o for o in re.findall(r'`(dino_\w+)', text) if o not in ('dino_loss','dino_learner')}
    for line in lines: assert any(c.startswith(line.split(' --')[0]) for _,c in COMMANDS), line
