"A place that cannot be written to is named before the work, by every function and command that writes when it is done"
import json, pytest, timm
from contextlib import nullcontext
from fastai.vision.all import *
from unittest import mock
import self_supervised.cli.evaluate, self_supervised.cli.explore
from self_supervised.all import *
from self_supervised.cli import dino_train
from self_supervised.cli.evaluate import dino_eval, dino_attention
from self_supervised.cli.explore import dino_embed, dino_explore
from self_supervised.cli.prepare import dino_prepare
from self_supervised.cli.report import dino_report
from self_supervised.cli.ablate import dino_ablate
from self_supervised.evaluation.copydetection import make_copies
from self_supervised.evaluation.video import video_accuracy
from self_supervised.lab import ablate
from self_supervised.plots import *
from helpers import *

@pytest.fixture
def images(tmp_path):
    (tmp_path/'images').mkdir()
    for i in range(4): Image.new('RGB', (16,16), (200,10,30)).save(tmp_path/'images'/f'{i}.png')
    return tmp_path/'images'

writers = dict(
    dino_train=lambda ims,out: dino_train(out=str(out)),
    dino_eval=lambda ims,out: dino_eval('knn', 'vit_mini_patch4_16', out=str(out/'a.json')), masks_out=lambda ims,out: dino_eval('video', 'vit_mini_patch4_16', str(ims), str(ims/'a.json'), masks_out=str(out)),
    dino_attention=lambda ims,out: dino_attention(str(ims/'0.png'), 'vit_mini_patch4_16', str(out/'a.png')), attention_frames=lambda ims,out: dino_attention(str(ims), 'vit_mini_patch4_16', str(out/'a.gif')),
    dino_embed=lambda ims,out: dino_embed(str(ims), 'vit_mini_patch4_16', str(out/'a.csv')), dino_explore=lambda ims,out: dino_explore(str(ims), 'vit_mini_patch4_16', out=str(out/'a.html')),
    dino_report=lambda ims,out: dino_report([str(ims)], str(out/'a.html')), dino_prepare=lambda ims,out: dino_prepare(str(ims), str(out)), dino_ablate=lambda ims,out: dino_ablate(str(out), ['DINO']),
    attention_video=lambda ims,out: attention_video(create_encoder('vit_mini_patch4_16'), ims.ls(), out/'a.gif'), make_copies=lambda ims,out: make_copies(ims, out=out),
    video_accuracy=lambda ims,out: video_accuracy(None, ims, out), extract_features=lambda ims,out: extract_features(create_encoder('vit_mini_patch4_16'), [torch.rand(2,3,16,16)], file=out/'a.npy'),
    to_onnx=lambda ims,out: to_onnx(create_encoder('vit_mini_patch4_16'), out/'a.onnx'), export_encoder=lambda ims,out: export_encoder(create_encoder('vit_mini_patch4_16'), out/'a.safetensors'),
    run=lambda ims,out: digits_learner(0, 64).fit_dino(1, cbs=RunCheckpoint(out)), history=lambda ims,out: digits_learner(0, 64).fit_dino(1, cbs=History(out/'a.csv')))

@pytest.mark.parametrize('name', writers)
def test_nothing_is_done_where_nothing_can_be_written(name, images):
    (images.parent/'file').write_text('')
    used = mock.Mock(side_effect=AssertionError('an image was encoded'))
    with nullcontext() if name=='export_encoder' else mock.patch.object(timm.models.VisionTransformer, 'forward', used), mock.patch.object(MiniConvNet, 'forward', used) if name not in ('run','history') else nullcontext():
        with pytest.raises(OSError, match='could not be written|cannot be written|not a folder|is a file'): writers[name](images, images.parent/'file'/'in')
    assert (images.parent/'file').is_file() and len(images.parent.ls())==2

def test_identical_images_have_a_page(images, tmp_path):
    with pytest.warns(UserWarning, match='have the same features'): dino_explore(str(images), 'vit_mini_patch4_16', out=str(tmp_path/'a.html'), size=16, no_progress=True)
    page = (tmp_path/'a.html').read_text()
    assert 'All images have the same features' in page and '1 group of images' in page and '0.png' in page
    with pytest.warns(UserWarning, match='have the same features'): show_tsne(torch.ones(9,4), torch.arange(9)%2)         # scikit-learn would crash the process

def test_what_stands_for_an_image_is_in_the_result(tmp_path, capsys):
    dino_eval('knn', 'vit_mini_patch4_16', out=str(tmp_path/'a.json'), no_progress=True)
    assert json.loads((tmp_path/'a.json').read_text())['features']=={'vit_mini_patch4_16':'class token'}
