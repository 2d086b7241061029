"What stands in examples/ runs as it stands there"
import ast, importlib, json, os, re, runpy, subprocess, sys, tomllib
from pathlib import Path
import pytest, torch
import processes
from self_supervised.checkpoints import load_encoder
from self_supervised.data import digits_path

root     = Path(__file__).resolve().parent.parent
examples = root/'examples'

def epochs_of(run): return torch.load(run/'checkpoint.pth', weights_only=True)['epoch']

def test_the_script_trains_and_resumes(tmp_path):
    "It ends in `learn.fit`, and leaves a run like any other"
    script = examples/'script.py'
    assert script.read_text().rstrip().splitlines()[-1].lstrip().startswith('learn.fit(')
    out,err = processes.run(processes.script, script, '--epochs', '1', '--out', 'run', cwd=tmp_path)
    assert 'knn' in out, err[-3000:]
    assert epochs_of(tmp_path/'run')==1
    runpy.run_path(str(script))['main'](out=tmp_path/'run', epochs=2, resume=True)
    assert epochs_of(tmp_path/'run')==2
    assert load_encoder(tmp_path/'run'/'checkpoint.pth')(torch.rand(2,3,16,16)).shape==(2,128)

def test_the_script_takes_a_folder(tmp_path):
    main = runpy.run_path(str(examples/'script.py'))['main']
    main(digits_path(tmp_path/'images')/'test'/'0', 'vit_mini_patch4_16', size=16, bs=32, epochs=1, out=tmp_path/'run')
    assert load_encoder(tmp_path/'run'/'checkpoint.pth')(torch.rand(2,3,16,16)).shape==(2,64)

def test_another_project_borrows_a_piece(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(examples/'other_project')
    pretrain,loop = importlib.import_module('leaves.pretrain'),importlib.import_module('leaves.loop')
    images = digits_path(tmp_path/'images')/'test'
    torch.manual_seed(0)
    learn  = pretrain.pretrain(images, tmp_path/'callback.pth')
    assert len(learn.recorder.values)==2 and learn.model.C.abs().max()>0
    losses = loop.train(images, tmp_path/'loop.pth')
    assert sum(losses[-5:])<sum(losses[:5]), losses
    for f in ('callback.pth','loop.pth'): pretrain.LeafNet().load_state_dict(torch.load(tmp_path/f, weights_only=True))
    needs = tomllib.loads((examples/'other_project'/'pyproject.toml').read_text())['project']['dependencies']
    assert needs==[tomllib.loads((root/'pyproject.toml').read_text())['project']['name']]

def source(f):
    "The code of a script or a notebook"
    return f.read_text() if f.suffix=='.py' else '\n'.join(''.join(c['source']) for c in json.loads(f.read_text())['cells'] if c['cell_type']=='code')

def test_examples_import_public_names_only():
    files = [*examples.rglob('*.py'), *examples.rglob('*.ipynb')]
    assert len(files)>=5
    borrowed = set()
    for f in files:
        for n in ast.walk(ast.parse(source(f))):
            if isinstance(n, ast.Import): assert not any(a.name.startswith('self_supervised') for a in n.names), f
            if not isinstance(n, ast.ImportFrom) or not n.module or n.module.split('.')[0]!='self_supervised': continue
            mod,names = importlib.import_module(n.module),{a.name for a in n.names if a.name!='*'}
            assert names<=set(getattr(mod, '__all__', names)), f'{f.name}: {n.module} does not make {names} public'
            borrowed |= names
    assert {'DINO','dino_loss'}<=borrowed

@pytest.mark.slow
def test_the_notebook_of_an_own_method_runs():
    nb,bin_ = examples/'own_method.ipynb',Path(sys.executable).parent
    out,err = processes.run(processes.script, bin_/'nbdev-test', nb.relative_to(root), cwd=root)
    assert 'Success' in out, err[-3000:]

def test_the_notebook_of_an_own_method(tmp_path):
    "It is committed clean, with its picture and tables"
    nb,bin_ = examples/'own_method.ipynb',Path(sys.executable).parent
    outs = [o for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code' for o in c['outputs']]
    assert any('image/png' in o.get('data', {}) for o in outs)
    assert not re.search(rf'Warning: |{re.escape(str(root))}', json.dumps(outs))
    for f in (nb, root/'pyproject.toml'): (tmp_path/f.name).write_bytes(f.read_bytes())
    subprocess.run([bin_/'nbdev-clean', '--fname', tmp_path/nb.name], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path/nb.name).read_bytes()==nb.read_bytes()
