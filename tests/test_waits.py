"""What a training step waits for on a GPU, in an emulation of one: for nothing but the loss that is shown, and for what the table names.
A wait is counted where the CPU needs a value of the GPU, or copies to it from memory that is not pinned."""
import pytest, warnings
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.lab import methods
from emulated import *
from helpers import *

def learner(name, device='cuda', vit=False, views=None, n=40, bs=8, cbs=(), **kwargs):
    "A learner of a method on tiny images, with fixed views unless others are given"
    torch.manual_seed(0)
    dls  = row_dls(n, bs, n_valid=bs, shape=(3,16,16) if vit or views else (3,2,2)).to(device)
    arch = 'vit_mini_patch4_16' if vit or views else nn.Sequential(nn.Flatten(), nn.Linear(12,8), nn.BatchNorm1d(8), nn.GELU())
    kind = Distill if name=='distill' else methods[name]
    if name=='distill': kwargs['teacher'] = nn.Sequential(nn.Flatten(), nn.Linear(12,5))
    opts = dict(queue=16) if name in ('moco','swav') else {}
    opts = opts | (dict(queue_from=0) if name=='swav' else dict(out_dim=5) if name=='distill' else {})
    own  = dict(stats=([0.]*3,[1.]*3)) if not views else {}
    torch.manual_seed(0)
    return method_learner(kind, dls, arch, views or FixedViews(), cbs=[RankMeMonitor()]*0+L(cbs), **{'precision':'fp32'}|own|opts|kwargs)

class Step(Callback):
    "Keep what all batches but the first waited for"
    order = 10_000
    def __init__(self, waits): self.waits,self.n = waits,0
    def after_batch(self):
        if self.training and self.train_iter==1: self.first = Waits(self.waits)
        if self.training: self.n,self.last = self.n+1,Waits(self.waits)
    @property
    def seen(self): return Waits(self.last-self.first)

PARTS = dict(                                                    # of the code, by what is in the stack
    input  = lambda w: w.by('to_device'),
    views  = lambda w: w.by('augmentations.py'),
    loss   = lambda w: w.by('callbacks.py'),
    scaler = lambda w: w.by('grad_scaler.py'))

def waits_of(every=4, **kwargs):
    "Number of waits by part in 8 steps after the first"
    with gpu() as w:
        learn = learner(**kwargs, n=72)
        learn.recorder.every = every
        with quiet(learn): learn.pretrain(1, cbs=(step := Step(w)))
        assert math.isfinite(learn.recorder.values[-1][0]) and step.n==9 and all(o.device.type=='cpu' for o in learn.recorder.losses)
    found = {k:f(step.seen) for k,f in PARTS.items()}
    return found | dict(other=step.seen.by()-sum(found.values())), step.seen

def parts(): return [KoLeo(),IBOT()]
SETTINGS = {**{name: dict(name=name) for name in [*methods,'distill']},
    'dino, chunked_loss':       dict(name='dino', chunked_loss=True),
    'dino, sinkhorn':           dict(name='dino', target='sinkhorn'),
    'dino, mse':                dict(name='dino', loss='mse'),
    'dino, predictor':          dict(name='dino', predictor=True),
    'dino, previous_iter':      dict(name='dino', teacher='previous_iter'),
    'dino, accumulation':       dict(name='dino', cbs=GradientAccumulation(16)),
    'dino, KoLeo and IBOT':     dict(name='dino', vit=True, parts=parts),
    'dino, IBOT(head=32)':      dict(name='dino', vit=True, parts=lambda: [IBOT(head=32)], chunked_loss=True),
    'dino, bf16':               dict(name='dino', vit=True, precision='bf16'),
    'dino, fp16':               dict(name='dino', vit=True, precision='fp16'),
    'dino, checkpointing':      dict(name='dino', vit=True, grad_checkpointing=True),
}
def made(setting): return {k:v() if k=='parts' else v for k,v in SETTINGS[setting].items()}

@pytest.mark.parametrize('setting', SETTINGS)
def test_a_step_waits_for_nothing_but_the_loss_that_is_shown(setting):
    "The input is one tensor per batch; fp16 asks whether the gradients overflowed"
    found,seen = waits_of(**made(setting))
    assert found==dict(input=8, views=0, loss=2, scaler=8*(setting=='dino, fp16'), other=0), str(seen)

def test_views_wait():
    "Of DINO's recipe, with rotation"
    found,seen = waits_of(name='dino', views=get_digits_aug_pipelines((2,1)))
    assert found['views']<=8*6 and found['other']==0, str(seen)   # mean and std of two sizes, angles of two sizes
