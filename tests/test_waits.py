"""What a training step waits for on a GPU, in an emulation of one: for nothing but the loss that is shown, and for what the table names.
A wait is counted where the CPU needs a value of the GPU, or copies to it and waits for that."""
import json, pytest, re, warnings
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
    return method_learner(kind, dls, arch, views or FixedViews(), cbs=cbs, **{'precision':'fp32'}|own|opts|kwargs)

class Step(Callback):
    "Keep what all batches but the first waited for"
    order = 10_000
    def __init__(self, waits): self.waits,self.n = waits,0
    def after_batch(self):
        if self.training and self.train_iter==1: self.first = Waits(self.waits)
        if self.training: self.n,self.last = self.n+1,Waits(self.waits)
    @property
    def seen(self): return Waits(self.last-self.first)

def _table():
    "Waits per step by part, as the page on profiling shows them"
    cells = json.loads((Path(__file__).parents[1]/'nbs'/'api'/'46_profiling.ipynb').read_text())['cells']
    rows  = re.findall(r'^\| ([^|]+) \| ([^|]+) \|', ''.join(''.join(o['source']) for o in cells), re.M)
    return {k.split(',')[0]:v for k,v in rows}
TABLE = _table()

PARTS = dict(                                                    # by what is in the stack
    batch  = lambda w: w.by('to_device'),
    views  = lambda w: w.by('augmentations.py'),
    loss   = lambda w: w.by('callbacks.py'),
    scaler = lambda w: w.by('grad_scaler.py'))
N = 5                                                            # steps after the first

def waits_of(every=3, **kwargs):
    "Number of waits by part in `N` steps after the first"
    with gpu() as w:
        learn = learner(**kwargs, n=(N+1)*8)
        assert TABLE['loss']==f'1 per {ViewRecorder.every} steps'
        learn.recorder.every = every
        with quiet(learn): learn.pretrain(1, cbs=(step := Step(w)))
        assert math.isfinite(learn.recorder.values[-1][0]) and step.n==N+1
        assert all(o.device.type=='cpu' for o in learn.recorder.losses)
    found = {k:f(step.seen) for k,f in PARTS.items()}
    return found | dict(other=step.seen.by()-sum(found.values())), step.seen

SETTINGS = {**{name: dict(name=name) for name in [*methods,'distill']},
    'dino, chunked_loss':       dict(name='dino', chunked_loss=True),
    'dino, sinkhorn':           dict(name='dino', target='sinkhorn'),
    'dino, mse':                dict(name='dino', loss='mse'),
    'dino, predictor':          dict(name='dino', predictor=True),
    'dino, previous_iter':      dict(name='dino', teacher='previous_iter'),
    'dino, accumulation':       dict(name='dino', cbs=lambda: GradientAccumulation(16)),
    'dino, KoLeo and IBOT':     dict(name='dino', vit=True, parts=lambda: [KoLeo(),IBOT()]),
    'dino, IBOT(head=32)':      dict(name='dino', vit=True, parts=lambda: [IBOT(head=32)], chunked_loss=True),
    'dino, bf16':               dict(name='dino', vit=True, precision='bf16'),
    'dino, fp16':               dict(name='dino', vit=True, precision='fp16'),
    'dino, checkpointing':      dict(name='dino', vit=True, grad_checkpointing=True),
}
def made(setting): return {k:v() if k in ('parts','cbs') else v for k,v in SETTINGS[setting].items()}

@pytest.mark.parametrize('setting', [pytest.param(o, marks=[pytest.mark.slow]*('checkpointing' in o)) for o in SETTINGS])
def test_a_step_waits_for_nothing_but_the_loss_that_is_shown(setting):
    "Read in the batches 0, 3 and 5"
    found,seen = waits_of(**made(setting))
    scaler = int(TABLE['gradient scaler'][0])*('fp16' in setting)
    assert found==dict(batch=N*int(TABLE['batch']), views=0, loss=2, scaler=N*scaler, other=N*int(TABLE['networks'])), str(seen)

def test_views_wait_as_the_table_says():
    found,seen = waits_of(name='dino', views=get_dino_aug_pipelines((2,1), (16,8)))
    assert found['views']==N*int(TABLE['views']) and found['other']==0, str(seen)

class Poison(Callback):
    "Make the images of a batch NaN, and keep what the model was before it"
    order = 1
    def __init__(self, batch): self.batch = batch
    def before_batch(self):
        if not self.training or self.iter!=self.batch or self.epoch<1: return
        self.before = {k:here(v).clone() for k,v in self.learn.model.state_dict().items()}
        self.learn.xb = (self.xb[0]*math.nan,)

@pytest.mark.parametrize('setting', ['dino','moco','swav','dino, KoLeo and IBOT',pytest.param('dino, fp16',marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_changes_nothing_until_it_is_read(setting, tmp_path):
    "Student, teacher, centres, queues and moments stay as they were before batch 2, although batch 4 is the first that is read"
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(**made(setting), n=48)
        learn.path,learn.recorder.every = tmp_path,4
        with quiet(learn): learn.pretrain(3, cbs=[bad := Poison(2),RunCheckpoint(tmp_path)])
        after = {k:here(v) for k,v in learn.model.state_dict().items()}
    assert (learn.epoch,learn.iter,bad.before is not None)==(1,4,True)
    by_forward = ('running_mean','running_var','num_batches_tracked')
    for k,v in after.items():
        if not k.endswith(by_forward): assert torch.equal(v, bad.before[k]), k
    message, = learn.collapse_monitor.messages
    assert message.sign=='nan' and message.text.startswith('epoch 1, batch 2: The loss is NaN or infinite.') and 'recorder.every = 1' in message.text
    saved = torch.load(tmp_path/'nonfinite.pth', weights_only=True)
    assert saved['batch']==2 and saved['views']==[] and all(map(math.isfinite, saved['parameter_norms'].values()))
    assert torch.load(tmp_path/'checkpoint.pth', weights_only=True)['epoch']==1
    assert learn.opt.opt.found_inf is None and learn.nonfinite is None

def test_a_loss_that_is_read_in_each_batch_saves_the_batch(tmp_path):
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner('dino', n=48)
        learn.path,learn.recorder.every = tmp_path,1
        with quiet(learn): learn.pretrain(3, cbs=Poison(2))
    text = learn.collapse_monitor.messages[0].text
    assert text.startswith('epoch 1, batch 2') and 'Images [0, 1, 2' in text and len(torch.load(tmp_path/'nonfinite.pth', weights_only=True)['views'])==3

def test_other_optimizers_are_asked_in_each_step(tmp_path):
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner('dino', n=48, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, lr=.1))
        learn.path = tmp_path
        with quiet(learn): learn.pretrain(3, cbs=Poison(2))
    assert (learn.epoch,learn.iter)==(1,2) and 'Images [0, 1, 2' in learn.collapse_monitor.messages[0].text

@pytest.mark.parametrize('setting', ['dino','byol','moco','lejepa','simdino','dino, KoLeo and IBOT','dino, accumulation'])
def test_the_losses_are_those_of_a_cpu(setting):
    def losses(device):
        learn = learner(**made(setting), n=32, device=device)
        torch.manual_seed(1)
        with quiet(learn): learn.pretrain(1)
        return torch.stack(list(learn.recorder.losses))
    with gpu(): far = losses('cuda')
    torch.testing.assert_close(far, losses('cpu'), rtol=1e-5, atol=1e-6)
