"fastai's own callbacks and methods of a Learner, on learners that pretrain (with and without validation images) and that fine-tune: each works, or says why not"
import contextlib, io
import pytest
from fastai.vision.all import *
from fastai.callback.all import *
from self_supervised.all import *
from helpers import FixedViews, digits_learner, quiet, state, changed

def pretraining(tmp_path, valid):
    set_seed(0)
    dls = digits_dls(16, bs=16, device='cpu')
    for dl,n in ((dls.train,48),(dls.valid,16 if valid else 0)):
        for a in 'xy': setattr(dl.dataset, a, getattr(dl.dataset, a)[:n])
        dl.n = n
    dls.path = tmp_path
    learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=16, hidden_dim=16, bottleneck_dim=8)
    learn.remove_cbs(learn.cbs.filter(lambda c: c.name=='knn_monitor'))
    return learn

def tuning(tmp_path):
    set_seed(0)
    dls = digits_dls(16, bs=16, device='cpu')
    for dl,n in ((dls.train,48),(dls.valid,16)):
        for a in 'xy': setattr(dl.dataset, a, getattr(dl.dataset, a)[:n])
        dl.n = n
    dls.path = tmp_path
    return finetune_learner(dls, create_encoder('convnet_mini'))

makers = {'pretraining': partial(pretraining, valid=False), 'pretraining, with validation images': partial(pretraining, valid=True), 'fine-tuning': tuning}

@contextlib.contextmanager
def silent():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def fit(learn, *cbs, n=2):
    with silent(), learn.no_logging(): learn.fit_dino(n, cbs=list(cbs)) if hasattr(learn, 'dino') else learn.fit_one_cycle(n, cbs=list(cbs))
    assert np.isfinite([float(o) for o in learn.recorder.losses]).all()

NO_LABELS = 'pretraining has none'
callbacks = {                                                    # how it is made, and what is said where it does not work when pretraining
    'SaveModelCallback':        (SaveModelCallback, None),
    'EarlyStoppingCallback':    (EarlyStoppingCallback, None),
    'ReduceLROnPlateau':        (ReduceLROnPlateau, 'changes nothing here'),
    'TrackerCallback':          (TrackerCallback, None),
    'TerminateOnNaNCallback':   (TerminateOnNaNCallback, None),
    'GradientAccumulation':     (partial(GradientAccumulation, 32), None),
    'GradientClip':             (GradientClip, None),
    'BnFreeze':                 (BnFreeze, 'running statistics that nothing updates'),
    'ShortEpochCallback':       (partial(ShortEpochCallback, .5), None),
    'ShowGraphCallback':        (ShowGraphCallback, None),
    'CSVLogger':                (CSVLogger, None),
    'MixUp':                    (MixUp, NO_LABELS),
    'CutMix':                   (CutMix, NO_LABELS),
    'LabelSmoothing by MixUp':  (partial(MixUp, .2), NO_LABELS),
    'CollectDataCallback':      (CollectDataCallback, None),
    'FetchPredsCallback':       (FetchPredsCallback, None),
    'ActivationStats':          (partial(ActivationStats, modules=[]), None),
    'ChannelsLast':             (ChannelsLast, None),
    'MixedPrecision':           (MixedPrecision, None),
    'ParamScheduler':           (partial(ParamScheduler, dict(lr=SchedCos(1e-3, 1e-4))), None),
    'MCDropoutCallback':        (MCDropoutCallback, None),
}

@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('name', callbacks)
def test_callbacks(tmp_path, kind, name):
    (make,why),learn = callbacks[name],makers[kind](tmp_path)
    if why and kind!='fine-tuning':
        with pytest.raises(ValueError, match=why): fit(learn, make())
        return
    cb = make()
    fit(learn, cb)
    if name!='EarlyStoppingCallback': assert len(learn.recorder.values)==2
    if isinstance(cb, TrackerCallback):
        col = cb.monitor
        assert col==('train_loss' if kind=='pretraining' else 'valid_loss')
        values = [v[list(learn.recorder.metric_names[1:]).index(col)] for v in learn.recorder.values]
        assert cb.best==min(values)
    if name=='SaveModelCallback': assert (tmp_path/'models'/'model.pth').exists()

def test_a_plateau_lowers_the_learning_rate_of_an_optimizer_of_fastai(tmp_path):
    learn = pretraining(tmp_path, False)
    learn.opt_func = Adam
    with silent(), learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3, cbs=ReduceLROnPlateau(patience=1, min_delta=100.))
    assert learn.opt.hypers[-1]['lr']<1e-3

def test_trackers_say_what_they_watch(tmp_path):
    learn = pretraining(tmp_path, False)
    with pytest.warns(UserWarning, match='EarlyStoppingCallback watches train_loss: there are no validation images'), contextlib.redirect_stdout(io.StringIO()), learn.no_bar(), learn.no_logging():
        learn.fit_dino(1, cbs=EarlyStoppingCallback())

def test_a_graph_without_validation_images_has_one_curve(tmp_path):
    seen = []
    class Graph(ShowGraphCallback):
        def after_epoch(self):
            self.progress.mbar.update_graph = lambda graphs, *args: seen.append(graphs)
            super().after_epoch()
    for valid in (False,True):
        learn = pretraining(tmp_path, valid)
        with silent(): learn.fit_dino(2, cbs=Graph())
        (_,train),(_,curve) = seen[-1]
        assert len(train)==6 and len(curve)==(2 if valid else 0)
        if valid: assert [float(o) for o in curve]==[v[1] for v in learn.recorder.values] and learn.recorder.metric_names[2]=='valid_loss'
        ax = learn.recorder.plot_loss(skip_start=0, ax=plt.subplots()[1])
        assert [l.get_label() for l in ax.lines]==['train']+['valid']*valid
        plt.close('all')

def find_lr(learn):
    before = state(learn.model)
    learn.lr_find(num_it=8, show_plot=False)
    assert changed(learn.model, before)==[]

def saved(learn):
    fit(learn, n=1)
    learn.save('a')
    before = state(learn.model)
    fit(learn, n=1)
    learn.load('a')
    assert changed(learn.model, before)==[]

def exported(learn):
    learn.export('a.pkl')
    assert changed(load_learner(learn.path/'a.pkl').model, state(learn.model))==[]

def predictions(learn, dl):
    preds,_ = learn.get_preds(dl=dl)
    assert len(preds)==16
    if hasattr(learn, 'dino'): assert torch.allclose(preds, extract_features(learn, dl)[0], atol=1e-5)

def plots(learn):
    fit(learn, n=1)
    learn.recorder.plot_loss(skip_start=0); learn.recorder.plot_sched()
    plt.close('all')

NEEDS_LABELS = 'needs labels'
methods_of_learners = {
    'fit':                 lambda l: l.fit(1, 1e-3),
    'fit_one_cycle':       lambda l: l.fit_one_cycle(1, slice(1e-4,1e-3)),
    'fit_flat_cos':        lambda l: l.fit_flat_cos(1, 1e-3),
    'fit_sgdr':            lambda l: l.fit_sgdr(1, 1, 1e-3),
    'fine_tune':           lambda l: l.fine_tune(1, freeze_epochs=1),
    'lr_find':             find_lr,
    'validate':            lambda l: l.validate(),
    'get_preds':           lambda l: predictions(l, l.dls.valid if len(l.dls.valid) else l.dls.train.new(bs=16, shuffle=False, get_idxs=lambda: range(16))),
    'summary':             lambda l: l.summary(),
    'save and load':       saved,
    'export':              exported,
    'freeze and unfreeze': lambda l: (l.freeze(), l.unfreeze(), fit(l, n=1)),
    'to_fp16 and to_fp32': lambda l: (l.to_fp16(), l.to_fp32(), fit(l, n=1)),
    'added_cbs':           lambda l: _added(l),
    'one_batch':           lambda l: l.dls.one_batch(),
    'recorder':            plots,
}

def _added(learn):
    with learn.added_cbs(TerminateOnNaNCallback()): fit(learn, n=1)
    with learn.removed_cbs(learn.cbs.filter(lambda c: c.name=='rank_me_monitor')): fit(learn, n=1)

@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('name', methods_of_learners)
def test_methods(tmp_path, kind, name):
    learn = makers[kind](tmp_path)
    if name=='fine_tune' and kind!='fine-tuning':
        with pytest.raises(ValueError, match='would freeze biases and norms'), silent(), learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
        learn.unfreeze()
        return fit(learn, n=1)
    with silent(), learn.no_bar(), learn.no_logging(): methods_of_learners[name](learn)
    fit(learn, n=1)                                              # and it trains afterwards

def test_interpretation_and_results_of_a_tuned_network(tmp_path):
    learn = tuning(tmp_path)
    fit(learn, n=1)
    with silent(), learn.no_bar():
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==16
        assert len(learn.tta(n=2)[0])==16

@pytest.mark.parametrize('lr,want', [(slice(1e-4,1e-3),1e-3), (slice(1e-3),1e-3), (np.array([1e-4,1e-3]),1e-3), (1e-3,1e-3)])
def test_learning_rates_as_fastai_takes_them(tmp_path, lr, want):
    learn = pretraining(tmp_path, False)
    with silent(), learn.no_bar(), learn.no_logging(): learn.fit_dino(1, lr, scale_lr=False, warmup_epochs=0)
    assert np.isclose(max(learn.recorder.lrs), want)

@pytest.mark.skipif(os.name!='posix' or os.geteuid()!=0, reason='needs to become another user')
def test_a_folder_that_cannot_be_written_is_no_place_for_a_learner(tmp_path):
    "An unprivileged user with read-only images trains, saves and finds a learning rate"
    import subprocess
    for split in ('train','test'):
        for c in '01':
            (tmp_path/'images'/split/c).mkdir(parents=True)
            for i in range(8): Image.fromarray(np.full((16,16,3), 20*i, np.uint8)).save(tmp_path/'images'/split/c/f'{i}.png')
    work = tmp_path/'work'
    work.mkdir()
    os.chmod(work, 0o777)
    for p in [tmp_path, *tmp_path.parents]:
        if str(p).startswith(('/tmp/','/private/')): os.chmod(p, os.stat(p).st_mode|0o055)
    code = f"""
import os, warnings; warnings.simplefilter('ignore')
from self_supervised.all import *
import torch._dynamo, torch._inductor                           # Python itself may be another user's
os.setgid(65534); os.setuid(65534)
images = {str(tmp_path/'images')!r}
assert not os.access(images, os.W_OK)
a = dino_learner(unlabelled_dls(images, 16, 8, num_workers=0, device='cpu'), 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=16)
b = finetune_learner(labelled_dls(images, 16, 8, num_workers=0, device='cpu'), create_encoder('convnet_mini'))
for l in (a,b):
    with l.no_bar(), l.no_logging():
        l.lr_find(num_it=5, show_plot=False, suggest_funcs=()); l.fit(1, 1e-3); l.save('x'); l.load('x'); l.export('x.pkl')
print('fine')
"""
    r = subprocess.run([sys.executable, '-c', code], cwd=work, capture_output=True, text=True, env=os.environ|dict(PYTHONDONTWRITEBYTECODE='1', MPLCONFIGDIR=str(work), XDG_CACHE_HOME=str(work)))
    assert r.stdout.strip().endswith('fine'), r.stderr[-2000:]
