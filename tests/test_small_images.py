"Backbones for small images, and the method by the number of images: in learners, in the command, and after resuming"
import io, math
from contextlib import redirect_stdout
import pytest, torch
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import train as cli_train
from self_supervised.cli.core import run_command
from self_supervised.cli.train import dino_train
from helpers import quiet, row_dls

def stem(enc): return tuple(enc.conv1.weight.shape[-2:]),enc.conv1.stride,type(enc.maxpool)
small,usual = ((3,3),(1,1),nn.Identity),((7,7),(2,2),nn.MaxPool2d)
tiny = dict(channels=(8,8,8,8), layers=(1,1,1,1))

def learner(size, make=dino_learner, arch='resnet18', **kwargs):
    with redirect_stdout(io.StringIO()) as said:
        learn = make(row_dls(8, shape=(3,size,size)), arch, out_dim=8, hidden_dim=8, **(tiny if arch=='resnet18' else {}), **kwargs)
    return learn,said.getvalue()

@pytest.mark.parametrize('make', [dino_learner, lejepa_learner, simclr_learner])
def test_learners_adapt_the_backbone_below_64_pixels_and_say_so(make):
    learn,said = learner(32, make)
    assert stem(encoder_of(learn))==small and said.count('\n')==1 and 'the first convolution is 3x3' in said
    with quiet(learn): learn.pretrain(1)
    assert math.isfinite(learn.recorder.values[-1][0])

def test_larger_images_and_false_keep_the_backbone():
    for size,kw in ((64,{}), (32,dict(small_images=False))):
        learn,said = learner(size, **kw)
        assert stem(encoder_of(learn))==usual and not said
    assert stem(encoder_of(learner(64, small_images=True)[0]))==small

def test_transformers_get_patches_for_the_size():
    enc = encoder_of(learner(32, arch='vit_tiny_patch16_224', depth=1)[0])
    assert patch_size(enc)==(4,4) and enc.pos_embed.shape[1]==1+8*8
    assert patch_size(encoder_of(learner(32, arch='vit_tiny_patch16_224', depth=1, patch_size=8)[0]))==(8,8)

def test_an_existing_network_cannot_be_adapted():
    with pytest.raises(TypeError, match='small_images.*exists already'): learner(32, arch=create_encoder('resnet18', **tiny), small_images=True)

# the command

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('images')
    for i in range(4): PILImage.create(np.random.RandomState(i).randint(0, 255, (32,32,3), dtype=np.uint8)).save(d/f'{i}.png')
    return d

def command(folder, out, *args):
    args = ['--path', str(folder), '--out', str(out), '--size', '32', '--batch-size-per-gpu', '4', '--num-workers', '0', '--out-dim', '8', '--no-report', *args]
    with redirect_stdout(io.StringIO()) as said: assert run_command(dino_train, args)==0
    return torch.load(out/'checkpoint.pth', weights_only=True),said.getvalue()

@pytest.fixture()
def no_figures(monkeypatch):
    for f in ('_announce','_save_results','_summary'): monkeypatch.setattr(cli_train, f, noop)

def test_a_resumed_run_keeps_its_first_layer_and_its_head(folder, tmp_path, monkeypatch, no_figures):
    args  = '--arch','resnet10t'
    state = command(folder, tmp_path, '--epochs', '1', *args)[0]
    assert state['encoder']['small_stem'] and command(folder, tmp_path, '--epochs', '2', '--resume', *args)[0]['epoch']>state['epoch']
    old = command(folder, tmp_path/'old', '--epochs', '1', '--small-images', 'false', *args)[0]   # as of version 0.1, where the options did not exist
    assert 'small_stem' not in old['encoder']
    monkeypatch.setitem(defaults_by_size[5_000], 'hidden_dim', 32)
    del old['args']['small_images']
    torch.save(old, tmp_path/'old'/'checkpoint.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                          # the schedules are planned again
        new = command(folder, tmp_path/'old', '--epochs', '2', '--resume', *args)[0]
    assert 'small_stem' not in new['encoder'] and new['model']['student.1.mlp.0.weight'].shape==old['model']['student.1.mlp.0.weight'].shape

def test_the_command_chooses_the_method_and_says_which(folder, tmp_path, no_figures):
    state,said = command(folder, tmp_path, '--epochs', '1', '--method', 'auto', '--arch', 'convnet_mini')
    assert not any(k.startswith('teacher') for k in state['model']) and 'LeJEPA for 4 images: ahead of DINO' in said
    assert command(folder, tmp_path, '--epochs', '2', '--method', 'auto', '--arch', 'convnet_mini', '--resume')[0]['epoch']>state['epoch']
