"Commands take the image size of an encoder from its run; settings that do not fit raise an error of one sentence"
import json
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import dino_train, run_command
from self_supervised.cli.core import size_of_run
from self_supervised.cli.evaluate import dino_attention, dino_eval
from helpers import row_dls

@pytest.mark.parametrize('notes,size', [
    (dict(view_settings=dict(crop_sizes=[96,40]), views=[64,64]), 96), (dict(view_settings=None, views=[32,32,16]), 32),
    (dict(views=[None]), None), (dict(views='large'), None), (dict(method='DINO'), None), ([1], None)])
def test_size_of_the_notes(tmp_path, notes, size):
    (tmp_path/'run.json').write_text(json.dumps(notes))
    assert run_size(tmp_path)==size and run_size(tmp_path/'run.json')==size

def test_size_of_a_checkpoint(tmp_path):
    assert run_size(tmp_path) is None and run_size(tmp_path/'missing') is None and run_size('vit_small') is None
    torch.save(dict(view_settings=dict(crop_sizes=(48,24))), tmp_path/'checkpoint.pth')
    assert run_size(tmp_path)==run_size(tmp_path/'checkpoint.pth')==48
    (tmp_path/'checkpoint.pth').write_bytes(b'PK')
    assert run_size(tmp_path) is None

def test_larger_protocols_keep_their_ratio(tmp_path):
    vit,net = create_encoder('vit_mini_patch4_16'),create_encoder('convnet_mini')
    for crop,usual,encoder,size in ((224,480,vit,480),(16,224,vit,16),(16,320,vit,24),(16,320,net,23),(16,480,vit,36)):
        (tmp_path/'run.json').write_text(json.dumps(dict(views=[crop])))
        assert size_of_run(tmp_path, encoder, usual)==size
    assert size_of_run('vit_small', vit) is None

def test_commands_use_the_size_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('run').mkdir()
    export_encoder(create_encoder('vit_mini_patch4_16'), 'run/encoder.safetensors', verbose=False)
    Path('run/run.json').write_text(json.dumps(dict(views=[24,24,12])))
    for c in 'ab':
        Path('images',c).mkdir(parents=True)
        for i in range(6): Image.new('RGB', (40,40), (40*i,90,200 if c=='a' else 20)).save(f'images/{c}/{i}.png')
    evaluate = [o for o in 'knn --encoder run pixels --data images --k 1 --no-progress --out knn.json'.split()]
    assert run_command(dino_eval, evaluate)==0
    res = json.loads(Path('knn.json').read_text())
    assert res['sizes']==dict(run=24, pixels=224) and res['settings']['size'] is None
    assert run_command(dino_eval, [*evaluate, '--size', '16'])==0
    assert json.loads(Path('knn.json').read_text())['sizes']==dict(run=16, pixels=16)
    sizes = []
    monkeypatch.setattr('self_supervised.cli.evaluate._frame', lambda f, n_in, size: sizes.append(size) or Image.open(f).resize((16,16)))
    for args in ([],['--size','0'],['--encoder','vit_mini_patch4_16']):
        assert run_command(dino_attention, ['images/a/0.png','--encoder','run',*args])==0
    assert sizes==[52,0,480]

def test_crops_that_do_not_fit_patches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(dino_train, ['--arch','vit_mini_patch4_16','--global-crops-size','30','--epochs','1','--num-workers','0'])==2
    err = capsys.readouterr().err
    assert 'crops of 30x30 pixels' in err and 'patches of 4x4' in err and 'multiples of the patch size' in err and len(err)<200

@pytest.mark.parametrize('option', ['tf32','grad_checkpointing'])
def test_flags_are_booleans(option):
    with pytest.raises(ValueError, match=f"{option}='yes': pass True or False"):
        dino_learner(row_dls(), 'convnet_mini', **{option:'yes'})

def test_copies_and_repetitions_of_pipelines():
    pipes = get_dino_aug_pipelines((1,1), (16,8))
    for p in (pipes.copy(), pipes*2, 2*pipes, pipes+pipes, pipes[:1], copy(pipes)):
        assert type(p) is AugPipelines and len(p.stats)==2
    assert len(pipes*2)==4 and len(pipes.views(torch.rand(2,3,16,16)))==2
