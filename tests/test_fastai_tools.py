"fastai's callbacks and Learner methods on our learners: each cell of the table in 29_callbacks works, with the right numbers, or says why not"
import contextlib, csv, io
import pytest
from contextlib import nullcontext
from fastcore.nbio import read_nb
from fastai.vision.all import *
from fastai.callback.all import *
from fastai.callback.fp16 import ModelToHalf
from fastai.callback.channelslast import *
from self_supervised.all import *
import processes
from helpers import FixedViews, mlp_model, quiet, row_dls, state, changed

def small_dls(tmp_path, n_valid):
    dls = digits_dls(16, bs=16, device='cpu')
    for dl,n in ((dls.train,48),(dls.valid,n_valid)):
        for a in 'xy': setattr(dl.dataset, a, getattr(dl.dataset, a)[:n])
        dl.n = n
    dls.path = tmp_path
    return dls

def pretraining(tmp_path, valid=False, **kwargs):
    set_seed(0)
    learn = dino_learner(small_dls(tmp_path, 16 if valid else 0), 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=16, hidden_dim=16, bottleneck_dim=8, **kwargs)
    learn.remove_cbs(learn.cbs.filter(lambda c: c.name=='knn_monitor'))
    return learn

def tuning(tmp_path):
    set_seed(0)
    return finetune_learner(small_dls(tmp_path, 16), create_encoder('convnet_mini'))

makers = {'without': pretraining, 'with': partial(pretraining, valid=True), 'fine-tuning': tuning}

@contextlib.contextmanager
def silent():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

# What the tools are to do: functions of a learner and a folder
def calls(name, *args): return lambda l,_: getattr(l, name)(*args)
def fit(l, n=1, **kwargs):
    l.fit_dino(n, **kwargs) if hasattr(l, 'dino') else l.fit_one_cycle(n, **kwargs)
    assert np.isfinite([float(o) for o in l.recorder.losses]).all()
def with_cb(make, check=None, n=1):
    def f(l, path):
        fit(l, n, cbs=(cb := make()))
        if check: check(l, cb)
    return f

class Watch(Callback):
    "The weights at the end of each epoch, and the gradients' norm and the steps"
    order = 99
    def before_fit(self): self.weights,self.norms,self.modes,self.steps = [],[],[],0
    def before_step(self):
        self.steps += 1
        self.norms.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item())
        self.modes.append({n:m.training for n,m in self.model.named_modules() if isinstance(m, nn.BatchNorm1d)})
    def after_epoch(self): self.weights.append(state(self.model))


def values(l, col): return [v[list(l.recorder.metric_names[1:]).index(col)] for v in l.recorder.values]

def saved_best(l, path):
    fit(l, 3, cbs=[w := Watch(), cb := SaveModelCallback()])
    losses = values(l, cb.monitor)
    assert cb.monitor==('valid_loss' if len(l.dls.valid) else 'train_loss') and cb.best==min(losses)
    assert changed(l.model, w.weights[losses.index(min(losses))])==[] and (path/'models/model.pth').exists()

def stopped(l, path):
    fit(l, 5, cbs=EarlyStoppingCallback(min_delta=1e9))
    assert len(l.recorder.values)==2

def lower_lr(l, path):
    l.fit(4, 1e-3, cbs=ReduceLROnPlateau(min_delta=1e9))
    assert l.recorder.lrs[::3]==pytest.approx([1e-3,1e-3,1e-4,1e-5]) and l.opt.hypers[-1]['lr']==pytest.approx(1e-6)

def drawn(l, path):
    fit(l, 2)
    ax = l.recorder.plot_loss(skip_start=0, ax=plt.subplots()[1])
    lines = {o.get_label():o.get_ydata() for o in ax.lines}
    assert list(lines['train'])==pytest.approx([float(o) for o in l.recorder.losses])
    assert ('valid' in lines)==(len(l.dls.valid)>0)
    if 'valid' in lines: assert list(lines['valid'])==values(l, 'valid_loss')

def graph(l, path):
    seen = []
    class Bar(Callback):
        order = ProgressCallback.order+1
        def before_fit(self): self.progress.mbar.update_graph = lambda graphs, *_: seen.append(graphs)
    fit(l, 2, cbs=[Bar(), ShowGraphCallback()])
    (_,train),(_,valid) = seen[-1]
    assert len(train)==6 and [float(o) for o in valid]==(values(l, 'valid_loss') if len(l.dls.valid) else [])

def found_lr(l, path):
    before = state(l.model)
    lr = l.lr_find(num_it=8, show_plot=False, stop_div=False, suggest_funcs=minimum)
    assert changed(l.model, before)==[] and 0<lr.minimum<10

def tracked_lr_find(l, path):
    l.add_cb(SaveModelCallback('rankme' if 'rank_me_monitor' in vars(l) else 'accuracy'))
    found_lr(l, path)
    l.get_preds(0)
    assert not (path/'models/model.pth').exists()

def validated(l, path):
    before,res = state(l.model),l.validate()
    assert changed(l.model, before)==[] and len(res)==(0 if not len(l.dls.valid) else len(l.metrics)+1) and None not in res

def predicted(l, path):
    before,dl = state(l.model),l.dls.train.new(bs=16, shuffle=False, get_idxs=lambda: range(16))
    (a,_),(b,_) = l.get_preds(dl=dl),l.get_preds(dl=dl)
    assert len(a)==16 and torch.equal(a, b) and changed(l.model, before)==[]
    if hasattr(l, 'dino'): assert torch.allclose(a, extract_features(l, dl)[0], atol=1e-5)

def image(path, c, i):
    fn = path/'images'/('train' if i<16 else 'test')/c/f'{i}.png'
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16,16,3), dtype=np.uint8)).save(fn)
    return fn
def folder(path): return [image(path, 'ab'[i%2], i) for i in range(24)]

def from_files(l, path, labelled):
    "The learner again, on files"
    files,make = folder(path),partial(labelled_dls if labelled else unlabelled_dls, path/'images', 16, 8, num_workers=0, device='cpu')
    if not hasattr(l, 'dino'): return finetune_learner(labelled_dls(path/'images', 16, 8, num_workers=0, device='cpu'), create_encoder('convnet_mini'), path=path),files
    return dino_learner(make(), 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=16, hidden_dim=16, bottleneck_dim=8, path=path),files

def predict(l, path, labelled=False):
    l,files = from_files(l, path, labelled)
    with l.no_bar(): res = l.predict(files[0])
    if hasattr(l, 'dino'): assert res[-1].shape==(128,)
    else: assert res[0] in 'ab' and res[-1].sum()==pytest.approx(1, abs=1e-5)

def results(l, path, labelled=False):
    l,_ = from_files(l, path, labelled)
    with l.no_bar(): l.show_results(0)

def losses(l, path): assert len(l.get_preds(0, with_loss=True)[-1])==48
def tta(l, path):    torch.testing.assert_close(l.tta(0, n=2)[0], l.get_preds(0)[0], rtol=1e-4, atol=1e-5)         # no random transforms: the same

def interpreted(l, path):
    if hasattr(l, 'dino'): return Interpretation.from_learner(l)
    assert ClassificationInterpretation.from_learner(l).confusion_matrix().sum()==16

def frozen(l, path):
    l.freeze()
    before = state(encoder_of(l))
    l.fit(1, .1)
    assert not [n for n in changed(encoder_of(l), before) if 'conv' in n and n.endswith('weight')]
    l.unfreeze()
    l.fit(1, .1)
    assert [n for n in changed(encoder_of(l), before) if n.endswith('weight')]

def start_epoch(l, path):
    l.fit(3, 1e-3, start_epoch=1)
    assert [len(v)>0 for v in l.recorder.values]==[False,True,True]

def saved(l, path):
    fit(l)
    l.save('x')
    before = state(l.model)
    fit(l)
    l.load('x')
    assert changed(l.model, before)==[]

def exported(l, path):
    fit(l)
    l.export('x.pkl')
    other = load_learner(path/'x.pkl')
    assert changed(other.model, state(l.model))==[] and type(other.recorder) is type(l.recorder)

def summed_up(l, path):
    before = state(l.model)
    l.show_training_loop()
    assert 'Conv2d' in str(l.summary()) and changed(l.model, before)==[]

def precisions(l, path):
    for to in ('to_fp16','to_fp32','to_bf16','to_fp32'):
        getattr(l, to)()
        fit(l)

def channels_last(l, path):
    l.to_channelslast(use_amp=False)
    fit(l)
    l.to_contiguous()

def quiet_fit(l, path):
    with l.no_bar(), l.no_logging(), l.no_mbar(), l.added_cbs(c := GradientClip()): fit(l)
    with l.removed_cbs(l.cbs.filter(lambda c: c.name=='rank_me_monitor')): fit(l)
    assert hasattr(l, 'progress') and c not in l.cbs

def accumulated(l, path):
    l.fit(4, 1e-3, cbs=[w := Watch(), GradientAccumulation(32)])
    assert w.steps==6                                           # of 12 batches

def clipped(l, path):
    l.fit(1, 1e-3, cbs=[w := Watch(), GradientClip(1e-3)])
    assert 0<max(w.norms)<1.01e-3

def bn_frozen(l, path):
    enc = encoder_of(l, 'student')
    enc.requires_grad_(False)
    before = state(enc)
    l.fit(1, 1e-3, cbs=BnFreeze())
    assert changed(enc, before)==[]                              # running statistics included

def one_batch(l, cb): assert len(l.recorder.losses)==1
def columns(l, cb):
    with open(l.path/'history.csv') as f: assert next(csv.reader(f))==list(l.recorder.metric_names)
def fetched(l, cb): assert len(cb.preds[0])==len(l.dls.valid.dataset)
def collected(l, cb): assert len(cb.data)>=3
def hooked(l, cb): assert len(cb.stats)==3

def tensorboard(l, path):
    from fastai.callback.tensorboard import TensorBoardCallback
    fit(l, cbs=TensorBoardCallback(path/'tb'))

no_labels,groups,no_loss = 'pretraining has none','would freeze biases and norms','a single image has none'
tools = {                                                        # tool: what it is to do, and what a 'no' says
    'fit': (calls('fit', 1, 1e-3), None), 'fit_one_cycle': (calls('fit_one_cycle', 1, slice(1e-4,1e-3)), None), 'fit_flat_cos': (calls('fit_flat_cos', 1, 1e-3), None), 'fit_sgdr': (calls('fit_sgdr', 1, 1, 1e-3), None),
    'fit_dino(lr=slice(...))': (calls('fit_dino', 1, slice(1e-4,1e-3)), None), 'fine_tune': (calls('fine_tune', 1), groups), 'freeze, unfreeze': (frozen, groups),
    'fit(start_epoch=...)': (start_epoch, None), 'lr_find': (found_lr, None), 'lr_find, get_preds with a tracker': (tracked_lr_find, None), 'validate': (validated, None),
    'get_preds': (predicted, None), 'predict': (predict, None), 'predict with labelled images': (partial(predict, labelled=True), 'are features, not classes'),
    'get_preds(with_loss=True)': (losses, no_loss), 'tta': (tta, None), 'show_results': (results, 'images without labels have no results'), 'Interpretation': (interpreted, no_loss),
    'summary, show_training_loop': (summed_up, None), 'save, load': (saved, None), 'export, load_learner': (exported, None), 'no_bar, no_logging, added_cbs, removed_cbs': (quiet_fit, None),
    'recorder.plot_loss': (drawn, None), 'recorder.plot_sched': (lambda l,_: (l.fit_one_cycle(1), l.recorder.plot_sched()), None),
    'to_fp16, to_bf16, to_fp32': (precisions, None), 'to_channelslast, to_contiguous': (channels_last, None), 'to_parallel': (lambda l,_: (l.to_parallel(), l.fit(1)), 'use learn.distrib_ctx'),
    'ModelToHalf': (with_cb(ModelToHalf), "pass precision='fp16' or 'bf16'"), 'SaveModelCallback()': (saved_best, None), 'EarlyStoppingCallback()': (stopped, None), 'ReduceLROnPlateau()': (lower_lr, 'changes nothing here'),
    'a tracker with an unknown column': (with_cb(partial(TrackerCallback, 'f1')), "TrackerCallback monitors 'f1', and the table has no such column: pass monitor= one of train_loss, "),
    'TerminateOnNaNCallback': (with_cb(TerminateOnNaNCallback), None), 'ShowGraphCallback': (graph, None), 'CSVLogger': (with_cb(CSVLogger, columns), None),
    'GradientAccumulation': (accumulated, None), 'GradientClip': (clipped, None), 'BnFreeze': (bn_frozen, 'running statistics that nothing updates'), 'ShortEpochCallback': (with_cb(partial(ShortEpochCallback, .01), one_batch), None),
    'MixUp': (with_cb(MixUp), no_labels), 'CutMix': (with_cb(CutMix), no_labels), 'MCDropoutCallback': (lambda l,_: l.get_preds(0, cbs=MCDropoutCallback()), None),
    'FetchPredsCallback': (with_cb(FetchPredsCallback, fetched), 'pass ds_idx=0, or a dl'), 'CollectDataCallback': (with_cb(CollectDataCallback, collected), None),
    'HookCallback, ActivationStats': (with_cb(ActivationStats, hooked), None), 'TensorBoardCallback()': (tensorboard, 'pass trace_model=False, log_preds=False and projector=False')}

def table():
    page = read_nb(Path(__file__).parent.parent/'nbs/api/29_callbacks.ipynb')
    md   = first(c.source for c in page.cells if '| fastai |' in c.source)
    rows = [[o.strip() for o in r.strip('|').split(' | ')] for r in md.splitlines() if r.startswith('| `')]
    return {r[0].replace('`',''): dict(zip(makers, [o.strip('| ') for o in r[1:]])) for r in rows}

def test_the_table_has_each_tool(): assert list(table())==list(tools)

@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('tool', tools)
def test_a_cell_of_the_table(tool, kind, tmp_path):
    (f,why),cell = tools[tool],table()[tool].get(kind, '')
    if not cell: return                                          # the tool is not one for a classifier
    assert cell.startswith(('yes','no'))
    learn = makers[kind](tmp_path)
    try:
        with silent(), nullcontext() if cell.startswith('yes') else pytest.raises(ValueError, match=re.escape(why)): f(learn, tmp_path)
    finally: plt.close('all')

def test_trackers_wait_for_complete_epochs(tmp_path):
    learn = pretraining(tmp_path, True, cbs=SaveModelCallback('train_loss'))
    with quiet(learn), silent(): learn.validate()
    assert not (tmp_path/'models/model.pth').exists()            # a validation loss is not a training loss
    with quiet(learn), silent(): learn.fit_dino(4, start_epoch=2, cbs=[w := Watch(), EarlyStoppingCallback('train_loss', patience=9)])
    best = min((2,3), key=lambda i: learn.recorder.values[i][0])
    assert [len(v)>0 for v in learn.recorder.values]==[False,False,True,True] and changed(learn.model, w.weights[best])==[]

def test_a_validation_loss_is_that_of_the_views(tmp_path):
    learn = Learner(row_dls(8, 4, n_valid=6), mlp_model(), loss_func=noop, path=tmp_path, cbs=DINO(FixedViews()))
    with quiet(learn): res = learn.validate()
    want,m = [],learn.model.eval()
    for x in learn.dls.valid_ds.x.split(4):
        views = [p(x) for p in FixedViews()]
        with torch.no_grad(): want.append((dino_loss(m.student(views), m.teacher(views[:2]), m.C).item(), len(x)))
    assert res[0]==pytest.approx(sum(l*n for l,n in want)/6, rel=1e-5)

def test_images_that_come_later_are_validated(tmp_path):
    learn = pretraining(tmp_path)
    with quiet(learn), silent(): learn.fit_dino(1)
    assert 'valid_loss' not in learn.recorder.metric_names
    learn.dls = small_dls(tmp_path, 16)
    with quiet(learn), silent(): learn.fit_dino(1)
    assert 'valid_loss' in learn.recorder.metric_names

@pytest.mark.parametrize('name', ['simclr','barlowtwins','lejepa'])
def test_a_projector_without_weights_in_its_last_norm_refuses_bn_freeze(name, tmp_path):
    from self_supervised.lab import methods
    learn = method_learner(methods[name], small_dls(tmp_path, 0), 'convnet_mini', get_digits_aug_pipelines((2,0)), out_dim=16, hidden_dim=16)
    with quiet(learn), silent(), pytest.raises(ValueError, match='BnFreeze reads the weights') if any(isinstance(m, bn_types) and m.weight is None for m in learn.model.modules()) else nullcontext(): learn.fit(1, 1e-3, cbs=BnFreeze())

def test_our_recorder_leaves_other_learners_alone(tmp_path):
    with quiet(pretraining(tmp_path)) as l, silent(): l.fit_dino(1)
    assert type(tuning(tmp_path).recorder) is Recorder and Recorder.plot_loss.__module__==ShowGraphCallback.after_epoch.__module__.replace('callback.progress','learner')=='fastai.learner'

def test_a_plateau_lowers_the_learning_rate_of_an_optimizer_of_fastai(tmp_path):
    learn = pretraining(tmp_path)
    learn.opt_func = Adam
    with silent(), learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3, cbs=ReduceLROnPlateau(patience=1, min_delta=100.))
    assert learn.opt.hypers[-1]['lr']<1e-3

def test_trackers_say_what_they_watch(tmp_path):
    learn = pretraining(tmp_path)
    with pytest.warns(UserWarning, match='EarlyStoppingCallback monitors train_loss: there are no validation images'), contextlib.redirect_stdout(io.StringIO()), learn.no_bar(), learn.no_logging():
        learn.fit_dino(1, cbs=EarlyStoppingCallback())

@pytest.mark.parametrize('lr,want', [(slice(1e-4,1e-3),1e-3), (slice(1e-3),1e-3), (np.array([1e-4,1e-3]),1e-3), (1e-3,1e-3)])
def test_learning_rates_as_fastai_takes_them(tmp_path, lr, want):
    learn = pretraining(tmp_path)
    with silent(), learn.no_bar(), learn.no_logging(): learn.fit_dino(1, lr, scale_lr=False, warmup_epochs=0)
    assert np.isclose(max(learn.recorder.lrs), want)

@pytest.mark.skipif(os.name!='posix' or os.geteuid()!=0, reason='needs to become another user')
def test_a_folder_that_cannot_be_written_is_no_place_for_a_learner(tmp_path):
    "An unprivileged user with read-only images trains, saves and finds a learning rate"
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
    out,err = processes.run(processes.code, code, cwd=work, PYTHONDONTWRITEBYTECODE='1', MPLCONFIGDIR=str(work), XDG_CACHE_HOME=str(work))
    assert out.strip().endswith('fine'), err[-2000:]
