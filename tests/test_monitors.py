"Runs that are made to collapse are told so; loggers see every figure"
import json, math, pytest, warnings
from fastai.vision.all import *
from self_supervised.callbacks import *
from self_supervised.vision.dino import *
from helpers import *

def messages(n_epoch, lr=None, n_train=640, **kwargs):
    learn = digits_learner(0, n_train=n_train, **kwargs)
    with quiet(learn), warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.fit_dino(n_epoch, lr=lr)
    found = learn.collapse_monitor.messages
    texts = list(map(str, found))
    assert texts==[str(o.message) for o in w if str(o.message) in texts]                 # each is a warning, once
    return found,learn

def test_no_sharpening_goes_uniform():
    said,learn = messages(3, n_train=256, tpt_start=1., tpt_end=1.)
    message, = said
    assert (message.sign,message.epoch)==('uniform',1) and 'lower teacher temperature' in message.text and f'ln K {math.log(256):.4f}' in message.text
    assert learn.view_stats['entropy']>.99*learn.view_stats['ln_k']

def test_no_centering_goes_to_one_dimension():
    said,learn = messages(8, lr=2e-2, cmom=1.)
    message, = said
    assert message.sign=='point' and 'centre' in message.text
    assert not learn.model.C.any()

def test_a_loss_that_does_not_move():
    said,learn = messages(3, lr=1e-9, n_train=256)
    message, = said
    assert message.sign=='stuck' and 'higher lr' in message.text

def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    learn = digits_learner(0, n_train=128, path=tmp_path)
    class Poison(Callback):
        order = 5
        def before_batch(self):
            if self.epoch==1: self.learn.xb = (self.xb[0]*math.nan,)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_dino(4, cbs=[Poison(), RunCheckpoint(tmp_path)])
    message, = learn.collapse_monitor.messages
    assert message.sign=='nan' and message.epoch==1 and 'Images [0, 1, 2' in message.text and 'nonfinite.pth' in message.text and learn.epoch==1
    rep = torch.load(tmp_path/'nonfinite.pth', weights_only=True)
    assert rep['epoch']==1 and rep['batch']==0 and rep['temperatures']['tpt']>0 and all(math.isfinite(v) for v in rep['parameter_norms'].values()) and len(rep['views'])==4
    kept = torch.load(tmp_path/'checkpoint.pth', weights_only=True)
    assert kept['epoch']==1 and all(v.isfinite().all() for v in kept['model'].values())
    assert isinstance(learn.loss_func, FeatureLoss)

def test_a_good_run_hears_nothing():
    assert messages(3, n_train=320)[0]==[]

NUMBERS = ['train_loss','teacher_entropy','kl','rankme','knn']

def logged(tmp_path, cb):
    learn = digits_learner(0, n_train=256, path=tmp_path)
    learn.add_cb(KNNMonitor(digits_dls()))
    with learn.no_bar(), learn.no_logging(): learn.fit_dino(2, cbs=cb)
    return learn

def test_csv_logger(tmp_path):
    learn = digits_learner(0, n_train=256, path=tmp_path)
    learn.add_cb(KNNMonitor(digits_dls()))
    learn.fit_dino(2, cbs=CSVLogger())
    df = pd.read_csv(tmp_path/'history.csv')
    assert list(df.columns)==['epoch']+NUMBERS+['time'] and len(df)==2 and df[NUMBERS].notna().all().all()
    assert (df.kl-(df.kl.abs())).abs().max()<1e-9 and df.knn.between(.5,1).all()

def test_tensorboard(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logged(tmp_path, TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False))
    acc = EventAccumulator(str(tmp_path/'tb'))
    acc.Reload()
    tags = acc.Tags()['scalars']
    assert set(NUMBERS)<=set(tags) and {'lr_0','lr_1','wd_0','wd_1'}<=set(tags)
    assert [e.value for e in acc.Scalars('wd_0')]==[0.]*8 and all(e.value==pytest.approx(.04) for e in acc.Scalars('wd_1'))

def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    wandb = pytest.importorskip('wandb')
    from fastai.callback import wandb as fastai_wandb
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setattr(fastai_wandb, '_format_config', lambda c: {k:str(v) for k,v in c.items()})       # fails on plain numbers in fastai 2.8.12 with fastcore 2.2
    run,seen = wandb.init(dir=tmp_path, project='x'),[]
    monkeypatch.setattr(wandb, 'log', lambda d,*a,**k: seen.append(d))
    logged(tmp_path, WandbCallback(log_preds=False))
    run.finish()
    assert set(NUMBERS)<=set().union(*seen)
