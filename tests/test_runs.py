"What a run stores can be read back, and checkpoint, history and notes agree, whatever ends it"
import argparse, enum, io, pytest, warnings
from contextlib import redirect_stdout
from datetime import timedelta
from fastai.vision.all import *
from self_supervised.checkpoints import timm_call
from self_supervised.cli import dino_train, run_command
from self_supervised.lab import methods
from self_supervised.monitors import Monitor, set_metrics
from self_supervised.runs import RunNotes, read_messages, read_notes
from self_supervised.vision.core import method_learner
from self_supervised.vision.continued import *
from self_supervised.vision.dino import *
from helpers import *

BS,N = 16,48                                                     # three batches an epoch

def small(seed=0, n=N, **kwargs):
    "A learner whose epoch takes a fraction of a second"
    set_seed(seed)
    dls = digits_dls(16, BS, holdout=None, device='cpu')
    for a in 'xy': setattr(dls.train_ds, a, getattr(dls.train_ds, a)[:n])
    dls.train.n = n
    kwargs = dict(dict(arch='convnet_mini', out_dim=16), **kwargs)
    return dino_learner(dls, kwargs.pop('arch'), get_digits_aug_pipelines((2,0)), **kwargs)

def kept(folder): return torch.load(Path(folder)/'checkpoint.pth', weights_only=True)

def fit(learn, n, folder=None, *cbs, resume=False, **kwargs):
    own = [RunCheckpoint(folder, resume, **kwargs), History(folder/'history.csv', resume), RunNotes(folder, resume)] if folder else []
    with quiet(learn), redirect_stdout(io.StringIO()): learn.fit_dino(n, cbs=own+list(cbs))
    return learn

# what is stored

@pytest.mark.parametrize('options', [dict(norm_layer=partial(nn.LayerNorm, eps=1e-4)), dict(act_layer=nn.ReLU)], ids=['partial','class'])
def test_layers_given_to_timm_are_read_back(tmp_path, options):
    enc   = create_encoder('vit_mini_patch4_16', **options)
    learn = fit(small(arch=enc), 1, tmp_path)
    x,learn.model = torch.rand(2,3,16,16),learn.model.eval()
    want  = encoder_of(learn)(x)
    export_encoder(learn, tmp_path/'e.safetensors', verbose=False)
    import functools, timm
    for enc in (load_encoder(tmp_path/'checkpoint.pth'), load_encoder(tmp_path/'e.safetensors'), eval(timm_call(tmp_path/'e.safetensors').split('; ')[-1]).eval()): torch.testing.assert_close(enc(x), want)
    fit(small(1, arch=create_encoder('vit_mini_patch4_16', **options)), 2, tmp_path, resume=True)
    assert kept(tmp_path)['epoch']==2

class OwnNorm(nn.LayerNorm): pass

def test_a_layer_without_a_name_leaves_the_encoder_to_its_module(tmp_path):
    def make():
        with pytest.warns(UserWarning, match=r"options\['norm_layer'\] is .*OwnNorm, which cannot be read back.*load_encoder\(file, encoder\)"): return create_encoder('vit_mini_patch4_16', norm_layer=OwnNorm)
    learn = fit(small(arch=make()), 1, tmp_path)
    export_encoder(learn, tmp_path/'e.safetensors', verbose=False)
    for f in ('checkpoint.pth','e.safetensors'):
        with pytest.raises(ValueError, match='pass the module as encoder='): load_encoder(tmp_path/f)
        for a,b in zip(load_encoder(tmp_path/f, make()).parameters(), encoder_of(learn).parameters()): assert torch.equal(a, b)
    fit(small(1, arch=make()), 2, tmp_path, resume=True)
    assert kept(tmp_path)['epoch']==2

class Kind(enum.Enum): a = 'x'
def _function(): pass
ODD = dict(f=_function, c=nn.ReLU, lam=lambda x: x, p=partial(nn.LayerNorm, eps=1e-6), a=np.arange(3), e=Kind.a, t=timedelta(hours=2), s=slice(1e-3,1e-2), ns=argparse.Namespace(b=1), path=Path('x'), n=np.float32(.5), x=tensor([1.]), tup=(1,2))

def test_settings_of_any_kind_are_stored_and_compared(tmp_path):
    fit(small(), 1, tmp_path, args=ODD)
    args = kept(tmp_path)['args']
    assert (args['c'],args['p'],args['a'],args['e'],args['t'],args['ns'],args['tup'])==('torch.nn.ReLU','partial(torch.nn.LayerNorm, eps=1e-06)',[0,1,2],'x','2:00:00',dict(b=1),[1,2])
    fit(small(), 2, tmp_path, resume=True, args=ODD)
    assert kept(tmp_path)['epoch']==2
    with pytest.raises(ValueError, match='contains a run with other settings'): fit(small(), 3, tmp_path, resume=True, args=dict(ODD, a=np.arange(4)))
    assert RunCheckpoint(tmp_path, args=argparse.Namespace(lr=slice(1,2))).run_args==dict(lr='slice(1, 2, None)')
    for bad in (object(), nn.ReLU(), b'x', [dict(a=1j)]):
        with pytest.raises(ValueError, match=r"args\['k'\].* is a .*, which cannot be read back from a file: pass numbers"): RunCheckpoint(tmp_path, args=dict(k=bad))

def test_a_model_that_could_not_be_read_back_is_refused_before_it_trains(tmp_path):
    class Extra(nn.Identity):
        def get_extra_state(self): return object()
    learn = small()
    learn.model.extra = Extra()
    seen = []
    class Seen(Callback):
        def before_batch(self): seen.append(1)
    with pytest.raises(ValueError, match=r"checkpoint\['model'\]\['extra._extra_state'\] is a object"): fit(learn, 1, tmp_path, Seen())
    assert not seen

def test_notes_take_settings_of_any_kind(tmp_path):
    with quiet(learn := small()): learn.fit_dino(1, cbs=RunNotes(tmp_path, settings=dict(ODD, odd=nn.ReLU(), nan=math.nan)))
    got = read_notes(tmp_path)['settings']
    assert got['odd']=='ReLU()' and got['nan'] is None and got['lam'].endswith('<lambda>') and 'NaN' not in (tmp_path/'run.json').read_text()

# accumulation

@pytest.mark.parametrize('name', methods)
def test_accumulation_longer_than_the_run_is_refused(name):
    dls = digits_dls(16, BS, holdout=None, device='cpu')
    for a in 'xy': setattr(dls.train_ds, a, getattr(dls.train_ds, a)[:N])
    dls.train.n = N
    learn  = method_learner(methods[name], dls, 'convnet_mini', get_digits_aug_pipelines((2,0)), cbs=GradientAccumulation(7*BS))
    before = state(learn.model)
    for f in (learn.pretrain, learn.fit, learn.continue_pretrain):
        with quiet(learn), pytest.raises(ValueError, match=r'a step is taken after 7 batches, but the run has 6 \(3 per epoch\).*GradientAccumulation\(96\)'): f(2)
    assert changed(learn.model, before)==[]
    if name=='dino':
        with quiet(learn): learn.pretrain(3)                     # nine batches: one step
        assert changed(learn.model, before)

def test_a_command_that_cannot_learn_says_so_before_it_overwrites(tmp_path, capsys):
    args = ['--path', str(digits_path(tmp_path/'digits')/'test'), '--arch', 'convnet_mini', '--size', '16', '--num-workers', '0', '--out', str(tmp_path), '--local-crops-number', '0',
            '--batch-size-per-gpu', '256', '--out-dim', '16', '--no-report', '--epochs', '1']
    assert run_command(dino_train, args)==0
    assert run_command(dino_train, args+['--overwrite','--grad-accumulation','100'])==2
    assert 'a step is taken after 100 batches, but the run has 2 (2 per epoch)' in capsys.readouterr().err and kept(tmp_path)['epoch']==1
    assert run_command(dino_train, args[:-1]+['2','--resume','--more-epochs','hold'])==0 and (kept(tmp_path)['epoch'],kept(tmp_path)['planned'])==(2,1)
    assert run_command(dino_train, args+['--overwrite','--more-epochs','never'])==2 and '--more-epochs never: pass one of replan, hold' in capsys.readouterr().err

# what ends a run

class EndAfter(Callback):
    "Ends the fit in `after_epoch`"
    def __init__(self, order, epoch=1, exc=CancelFitException): self.order,self.last,self.exc = order,epoch,exc
    def after_epoch(self):
        if self.epoch==self.last: raise self.exc()

class Rising(Callback):
    "A loss that rises"
    order = 55
    def after_epoch(self): self.recorder.values[-1][0] = float(self.epoch)

def agree(learn, folder, n):
    ck,h,s = kept(folder),pd.read_csv(folder/'history.csv'),read_notes(folder)['sessions']
    assert [len(learn.recorder.values),len(h),ck['epoch'],sum(o['epochs'] for o in s)]==[n]*4
    assert list(h.epoch)==list(range(n)) and h.train_loss.notna().all()
    assert all(torch.equal(v, ck['model'][k]) for k,v in learn.model.state_dict().items())
    return s

@pytest.mark.parametrize('cb', [lambda: EndAfter(0), lambda: EndAfter(49), lambda: EndAfter(55), lambda: EndAfter(100), lambda: EndAfter(101), lambda: EndAfter(200)], ids=['first','49','55','100','101','last'])
def test_whoever_ends_a_fit_after_an_epoch_the_files_agree(tmp_path, cb):
    learn = fit(small(), 4, tmp_path, cb())
    assert agree(learn, tmp_path, 2)[0]['end']=='cancelled'
    agree(fit(small(1), 3, tmp_path, resume=True), tmp_path, 3)

def test_early_stopping_and_its_patience_after_a_resume(tmp_path):
    def stop(): return [Rising(), EarlyStoppingCallback('train_loss', patience=3), SaveModelCallback('train_loss', fname='best')]
    learn = small(path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, 9, tmp_path, *stop(), EndAfter(150, exc=KeyboardInterrupt))
    assert kept(tmp_path)['callbacks']['early_stopping']==dict(best=0., wait=1)
    best,other = (tmp_path/'models'/'best.pth').read_bytes(),small(1, path=tmp_path)
    fit(other, 9, tmp_path, *stop()[:2], resume=True)            # two more epochs without an improvement, not three
    agree(other, tmp_path, 4)
    assert [v[0] for v in other.recorder.values]==[0.,1.,2.,3.]
    third = small(2, path=tmp_path)
    fit(third, 5, tmp_path, Rising(), SaveModelCallback('train_loss', fname='best'), resume=True)
    assert (tmp_path/'models'/'best.pth').read_bytes()!=best     # a tracker that is new to the run has nothing to remember
    assert not any(c.run is False for c in third.cbs)

def test_an_epoch_that_was_cut_short_is_an_epoch(tmp_path):
    learn = fit(small(), 2, tmp_path, ShortEpochCallback(.3))
    h = pd.read_csv(tmp_path/'history.csv')
    assert kept(tmp_path)['epoch']==2 and list(h.epoch)==[0,1] and h.train_loss.isna().all() and h.time.notna().all() and read_notes(tmp_path)['sessions'][0]['epochs']==2

def test_a_fit_that_ends_within_an_epoch_leaves_the_one_before(tmp_path):
    class Nan(Callback):
        order = -20
        def after_batch(self):
            if self.epoch==1 and self.iter==1: self.learn.loss = tensor(math.nan)
    learn = fit(small(), 3, tmp_path, Nan(), TerminateOnNaNCallback())
    assert kept(tmp_path)['epoch']==1==len(pd.read_csv(tmp_path/'history.csv'))==read_notes(tmp_path)['sessions'][0]['epochs']

def test_history_keeps_its_columns_in_step(tmp_path):
    "A resumed run has other columns than before: each number stays under its name"
    learn = small()
    set_metrics(learn, seven=lambda: 7.)
    fit(learn, 1, tmp_path)
    other = small()
    set_metrics(other, eight=lambda: 8.)
    fit(other, 2, tmp_path, resume=True)
    h = pd.read_csv(tmp_path/'history.csv')
    assert 'seven' not in h and math.isnan(h.eight[0]) and h.eight[1]==8. and h.rankme.between(1, 128).all()

# monitors that fail

class Fails(Monitor):
    column = 'fails'
    def __init__(self, event, e=ValueError('no such image')): self.event,self.e = event,e
    def after_train(self):
        self.number = 1.
        if self.event=='train' and self.epoch==1: raise self.e
    def after_batch(self):
        if self.event=='batch' and self.epoch==1: raise self.e

@pytest.mark.parametrize('event,e,cause', [('train',ValueError('no such image'),'(no such image)'), ('batch',AssertionError(),'(AssertionError)')], ids=['train','batch'])
def test_a_monitor_that_fails_does_not_cost_the_epoch(tmp_path, event, e, cause):
    learn = small(cbs=Fails(event, e))
    with pytest.warns(UserWarning, match='epoch 1: fails failed .*its column is NaN, training continues'): fit(learn, 3, tmp_path)
    h = pd.read_csv(tmp_path/'history.csv')
    assert kept(tmp_path)['epoch']==3 and list(h.fails.notna())==[True,False,True]
    said = [o for o in read_messages(tmp_path) if o['sign']=='failed']
    assert [o['epoch'] for o in said]==[1] and cause in said[0]['text'] and read_notes(tmp_path)['sessions'][0]['end']=='finished'

def test_a_column_that_fails_does_not_cost_the_epoch(tmp_path):
    learn = small()
    set_metrics(learn, mine=lambda: 1/0)
    with pytest.warns(UserWarning, match="the column 'mine' could not be computed .division by zero"): fit(learn, 2, tmp_path)
    assert kept(tmp_path)['epoch']==2 and pd.read_csv(tmp_path/'history.csv').mine.isna().all()

def test_labelled_images_that_cannot_be_opened_any_more(tmp_path):
    files = digits_path(tmp_path/'digits')
    dls   = ImageDataLoaders.from_folder(files, train='train', valid='test', item_tfms=Resize(16), bs=64, num_workers=0, device='cpu')
    def gone(): shutil.rmtree(files/'test')
    class Gone(Callback):
        def before_train(self):
            if self.epoch==1: gone()
    learn = small(cbs=[KNNMonitor(dls, k=5), Gone()])
    with pytest.warns(UserWarning, match='epoch 1: knn_monitor failed'): fit(learn, 2, tmp_path/'run')
    assert kept(tmp_path/'run')['epoch']==2 and pd.read_csv(tmp_path/'run'/'history.csv').knn.notna().tolist()==[True,False]

def test_features_fail_in_all_processes_or_in_none(monkeypatch):
    "A process that cannot open an image must not leave the others waiting"
    from self_supervised import distributed
    dl = digits_dls(16, BS, device='cpu').valid
    monkeypatch.setattr(distributed, 'n_processes', lambda: 2)
    monkeypatch.setattr(distributed.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(distributed, 'gather_objects', lambda o: [o,'OSError: no such image'])
    with pytest.raises(RuntimeError, match='on rank 1 .OSError: no such image') as e: distributed.shared_features(create_encoder('convnet_mini'), dl)
    assert e.value.in_all_processes

# more epochs than planned

def lrs(learn): return np.array(learn.recorder.lrs)

def test_more_epochs_than_planned_are_said_and_may_hold(tmp_path):
    fit(small(), 3, tmp_path/'a')
    for o in 'bcd': shutil.copytree(tmp_path/'a', tmp_path/o)
    with pytest.warns(UserWarning, match=r"planned for 3 epochs, this run has 6: the schedule is computed again, and the learning rate changes from [\d.e-]+ to [\d.e-]+; .*RunCheckpoint\(more_epochs='hold'\) or --more-epochs hold"):
        anew = fit(small(), 6, tmp_path/'b', resume=True)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*computed again')
        held = fit(small(), 6, tmp_path/'c', resume=True, more_epochs='hold')
        assert kept(tmp_path/'c')['planned']==3 and kept(tmp_path/'b')['planned']==6
        more = fit(small(), 7, tmp_path/'c', resume=True, more_epochs='hold')
        fit(small(), 3, tmp_path/'d', resume=True)               # nothing is left to do
    end = dino_defaults(N, BS, 3).lr_min
    assert np.allclose(lrs(held), end, rtol=1e-5) and np.allclose(lrs(more), end, rtol=1e-5) and lrs(anew)[0]>30*end and np.isclose(lrs(anew)[-1], lrs(anew).min())

def test_a_run_that_is_held_within_its_plan_keeps_to_it(tmp_path):
    "Warm-up and cosine of the epochs that were planned, then their end"
    whole = fit(small(), 4)
    with pytest.raises(KeyboardInterrupt): fit(small(), 4, tmp_path, EndAfter(150, exc=KeyboardInterrupt))
    held = fit(small(), 6, tmp_path, resume=True, more_epochs='hold')
    assert np.allclose(lrs(held)[:6], lrs(whole)[6:], rtol=1e-5) and np.allclose(lrs(held)[6:], dino_defaults(N, BS, 4).lr_min, rtol=1e-5)

@pytest.mark.parametrize('key', ['sign_epochs','seen'])          # of the counter in the checkpoint; 'seen' in version 0.1
def test_signs_of_collapse_are_counted_on_after_a_resume(tmp_path, key):
    def make(seed): return small(seed, tpt_start=1., tpt_end=1.)
    learn = make(0)
    learn.collapse_monitor.patience = 3
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, tmp_path, EndAfter(150, exc=KeyboardInterrupt))
    assert kept(tmp_path)['callbacks']['collapse_monitor']['sign_epochs']=={'uniform':2} and not learn.collapse_monitor.messages
    state = kept(tmp_path)
    state['callbacks']['collapse_monitor'] = {key: state['callbacks']['collapse_monitor']['sign_epochs']}
    torch.save(state, tmp_path/'checkpoint.pth')
    other = make(1)
    other.collapse_monitor.patience = 3
    with pytest.warns(UserWarning, match='Uniform collapse.*Crops without common content'): fit(other, 4, tmp_path, resume=True)
    assert other.collapse_monitor.messages[0].epoch==2

# the table of a run

def test_columns_of_the_console_keep_apart(monkeypatch):
    from fastai.callback import progress
    from fastprogress import fastprogress
    monkeypatch.setattr(progress, 'master_bar', fastprogress.ConsoleMasterBar); monkeypatch.setattr(progress, 'progress_bar', fastprogress.ConsoleProgressBar)
    rows = []
    monkeypatch.setattr(fastprogress, 'WRITER_FN', lambda s, **kw: rows.append(s) if 'end' not in kw else None)
    learn = small()
    set_metrics(learn, big=lambda: 216.570129, tiny=lambda: 1e-7, none=lambda: math.nan, huge=lambda: -1234567890.123)
    with redirect_stdout(io.StringIO()): learn.fit_dino(1)
    head,row = rows
    names = learn.recorder.metric_names
    cells = {n: row[head.index(n):][:max(8,len(n))] for n in names}
    assert (cells['big'],cells['none'].strip(),cells['tiny'],cells['huge'].strip())==('216.5701','','0.000000','-1.2e+09')
    assert all(row[head.index(n)-1]==' ' for n in names[1:]) and len(learn.recorder.values[0])==len(names)-2 and learn.recorder.values[0][1]==216.570129
