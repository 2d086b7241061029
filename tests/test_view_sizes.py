"Crop sizes, crop areas and blur follow the size of the images: the paper's at 224 pixels, and everything uses the same rules"
import io, inspect, pytest, warnings
from contextlib import redirect_stdout
from fastai.vision.all import *
from self_supervised import augmentations
from self_supervised.augmentations import describe_views, view_defaults
from self_supervised.cli import dino_train, run_command, train as cli_train
from self_supervised.lab import methods, _data, _learner
from self_supervised.runs import RunNotes, read_notes
from self_supervised.vision.core import method_learner
from self_supervised.vision.dino import *
from helpers import *

KEYS = 'min_scales','max_scales','blur_sigma'
def usual(f): return {k: inspect.signature(f).parameters[k].default for k in KEYS}
def same(pipes, make, d, **kwargs): assert repr(pipes)==repr(make(**d, **kwargs)) and len(pipes)

@pytest.mark.parametrize('name', methods)
def test_from_224_pixels_on_the_values_are_those_of_the_method(name):
    views = methods[name].views
    for size in (224,256,512):
        assert view_defaults(size, views)==dict(crop_sizes=(224,96), **usual(views))
        for patch in (8,16,32,(16,16)): assert view_defaults(size, views, patch)['crop_sizes']==(224,96)
    assert view_defaults(256, views, 14)==dict(crop_sizes=(224,98), **usual(views))

def test_the_papers_values():
    assert view_defaults(224)==dict(crop_sizes=(224,96), min_scales=(.4,.05), max_scales=(1.,.4), blur_sigma=(.1,2.))

@pytest.mark.parametrize('name', methods)
def test_rules_are_monotone_in_the_size_of_the_images(name):
    rows = [view_defaults(n, methods[name].views) for n in range(8,300)]
    column = lambda k,i: np.array([r[k][i] for r in rows])
    for i in (0,1):
        assert (np.diff(column('crop_sizes',i))>=0).all() and (np.diff(column('blur_sigma',i))>=0).all()
        assert (np.diff(column('min_scales',i))<=0).all() and (np.diff(column('max_scales',i))<=1e-12).all()
        assert (column('min_scales',i)<column('max_scales',i)).all() and (column('max_scales',i)<=1).all()
    assert (column('crop_sizes',1)<=column('crop_sizes',0)).all() and (column('blur_sigma',0)<column('blur_sigma',1)).all()
    width = np.sqrt(column('min_scales',1))*np.arange(8,300)     # of the smallest local crop, in pixels of the image
    assert ((width>=17.99) | (column('min_scales',1)>=.3)).all()

def test_crops_consist_of_whole_patches():
    for size in range(16,260):
        for patch in (2,4,7,14,16):
            assert all(o%patch==0 and o for o in view_defaults(size, patch=patch)['crop_sizes'])
    assert view_defaults(100, patch=(8,12))['crop_sizes'][0]%24==0
    with pytest.raises(ValueError, match='images of 12 pixels are smaller than a patch of 16'): view_defaults(12, patch=16)

def test_given_crop_sizes_are_kept_and_blur_follows_them():
    assert view_defaults(32, crop_sizes=(224,96))==view_defaults(32) | dict(crop_sizes=(224,96), blur_sigma=(.1,2.))
    assert view_defaults(256, crop_sizes=(112,None))==view_defaults(256) | dict(crop_sizes=(112,96), blur_sigma=(.1,1.))

def test_a_function_receives_only_the_arguments_that_it_takes():
    def views(num_crops=(2,0), crop_sizes=(32,16), n_in=3, stats=None): return get_dino_aug_pipelines(num_crops, crop_sizes)
    assert view_defaults(32, views)==dict(crop_sizes=(32,16))
    assert view_defaults(32, lambda **kw: None)==view_defaults(32)

class Images(Rows):
    def __init__(self, n, h, w): self.x = torch.randint(0, 255, (n,3,h,w), dtype=torch.uint8)

def images_dls(h, w, n=4): return DataLoaders(*[DataLoader(Images(n, h, w), bs=n) for _ in range(2)], device='cpu')

@pytest.mark.parametrize('name', methods)
def test_every_learner_uses_the_rules(name):
    m = methods[name]
    for h,w in ((32,32),(40,64)):                                # the short side counts
        learn = method_learner(m, images_dls(h, w), 'convnet_mini')
        cb = getattr(learn, name)
        same(cb.aug_pipelines, m.views, view_defaults(min(h,w), m.views))
        assert cb.view_settings==view_defaults(min(h,w), m.views)
    own = get_dino_aug_pipelines((2,1), (16,8))
    cb  = getattr(method_learner(m, images_dls(32, 32), 'convnet_mini', own), name)
    assert cb.aug_pipelines is own and cb.view_settings is None

@pytest.mark.parametrize('size,patch', [(32,4),(30,4),(32,16)])
def test_crops_of_a_small_transformer(size, patch):
    enc   = create_encoder('vit_mini_patch4_16', patch_size=patch, img_size=size//patch*patch, dynamic_img_size=True)
    learn = dino_learner(images_dls(size, size), enc, out_dim=16)
    same(learn.dino.aug_pipelines, get_dino_aug_pipelines, view_defaults(size, patch=patch))
    with quiet(learn): learn.fit_dino(1)
    assert math.isfinite(learn.recorder.values[-1][0])

def test_an_ablation_uses_the_rules(tmp_path):
    for i in range(8):
        d = tmp_path/['train','test'][i//4]/str(i%2)
        d.mkdir(parents=True, exist_ok=True)
        PILImage.create(np.full((8,8,3), 30*i, dtype=np.uint8)).save(d/f'{i}.png')
    dls,pipes,_ = _data(tmp_path, 4, 'test', 224)
    learn,_ = _learner(DINO, dls, 'convnet_mini', pipes, dict(num_crops=(2,1), out_dim=16))
    same(learn.dino.aug_pipelines, get_dino_aug_pipelines, view_defaults(224), num_crops=(2,1))

# the command, and runs that are resumed

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Images of 32 pixels"
    d = tmp_path_factory.mktemp('images')
    for i in range(4): PILImage.create(np.random.RandomState(i).randint(0, 255, (32,32,3), dtype=np.uint8)).save(d/f'{i}.png')
    return d

@pytest.fixture()
def no_figures(monkeypatch):
    for f in ('_announce','_save_results','_summary'): monkeypatch.setattr(cli_train, f, noop)

def command(folder, out, epochs, *args):
    args = ['--path', str(folder), '--out', str(out), '--epochs', str(epochs), '--arch', 'convnet_mini', '--size', '32', '--batch-size-per-gpu', '4',
            '--num-workers', '0', '--out-dim', '8', '--no-report', *args]
    with redirect_stdout(io.StringIO()): assert run_command(dino_train, args)==0
    return settings(out)

def settings(out): return {k: tuple(v) for k,v in read_notes(out)['view_settings'].items()}
def kept(out): return torch.load(out/'checkpoint.pth', weights_only=True)

def test_the_command_uses_the_rules_and_options_win(folder, tmp_path, no_figures):
    assert command(folder, tmp_path/'a', 1, '--method', 'lejepa')==view_defaults(32, methods['lejepa'].views)
    d = command(folder, tmp_path/'b', 1, '--local-crops-scale', '.1', '.2', '--global-crops-size', '64')
    assert d==view_defaults(32, crop_sizes=(64,None)) | dict(min_scales=(.4,.1), max_scales=(1.,.2))
    assert d==kept(tmp_path/'b')['view_settings'] and d['crop_sizes']==(64,16)

def test_a_resumed_run_keeps_its_views(folder, tmp_path, monkeypatch, no_figures):
    d = command(folder, tmp_path, 1)
    assert d==view_defaults(32)
    monkeypatch.setattr(augmentations, '_least_blur', 1.)        # rules of a later version
    assert view_defaults(32)!=d
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*crops of other')
        assert command(folder, tmp_path, 2, '--resume')==d
    # a run of version 0.1 had the areas and the blur for 224 pixels
    state = kept(tmp_path)
    del state['view_settings'],state['augmentations']
    torch.save(state, tmp_path/'checkpoint.pth')
    old = dict(crop_sizes=(32,16), **usual(get_dino_aug_pipelines))
    for n in (3,4): assert command(folder, tmp_path, n, '--resume')==old
    assert command(folder, tmp_path, 1, '--overwrite')==view_defaults(32)

def fit(learn, n, folder, resume=False):
    with quiet(learn): learn.fit_dino(n, cbs=RunCheckpoint(folder, resume))

def test_a_learner_that_continues_a_run_with_other_views_warns(tmp_path):
    def make(*pipes): return dino_learner(images_dls(32, 32), 'convnet_mini', *pipes, out_dim=8)
    fit(make(), 1, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*crops of other')
        fit(make(), 2, tmp_path, True)
        state = kept(tmp_path)
        del state['view_settings'],state['augmentations']
        torch.save(state, tmp_path/'checkpoint.pth')
        fit(make(get_dino_aug_pipelines(crop_sizes=(32,16))), 3, tmp_path, True)       # the pipelines of the user
    torch.save(state, tmp_path/'checkpoint.pth')
    advice = r"crops of other min_scales, max_scales, blur_sigma.*aug_pipelines=get_dino_aug_pipelines\(crop_sizes=\(32, 16\), min_scales=\(0.4, 0.05\)"
    with pytest.warns(UserWarning, match=advice): fit(make(), 3, tmp_path, True)

def test_own_views_are_noted_and_other_views_of_a_resumed_run_warn(tmp_path):
    import kornia.augmentation as K
    def darker(x): return x*.5
    dls = images_dls(32, 32)
    def views(*tfms): return get_digits_aug_pipelines((2,1), xtra_tfms=tfms)
    def said(n, pipes, resume=True):
        learn = dino_learner(dls, 'convnet_mini', pipes, out_dim=32)
        with quiet(learn), warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            learn.fit_dino(n, cbs=[RunCheckpoint(tmp_path, resume=resume), RunNotes(tmp_path, resume=resume)])
        return ' '.join(str(o.message) for o in w if 'was saved with' in str(o.message))
    ours = views(K.RandomErasing(p=.5), darker)
    assert said(1, ours, False)=='' and said(2, views(K.RandomErasing(p=.5), darker))==''
    noted = read_notes(tmp_path)['augmentations']
    assert noted==describe_views(ours) and [len(o) for o in noted]==[len(v) for v in ours]
    assert noted[0][-3].startswith('RandomErasing(') and noted[0][-2].endswith('darker')
    assert 'other augmentations in view 0: RandomResizedCropFlip(size=16' in said(3, views())
    assert '3 views and not 6' in said(4, None)

def test_one_view_is_not_a_list_of_views():
    with pytest.raises(ValueError, match='aug_pipelines is one View: pass a list of views'): DINO(View(16, .4, 1.))
    with pytest.raises(ValueError, match='images of 6 pixels are smaller than the smallest crop of 8: pass larger images$'): view_defaults(6)
