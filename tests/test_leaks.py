"What a run leaves behind: nothing"
import gc, os, re
import psutil
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from helpers import *

class Watch(Callback):
    "Memory of the process and tensors alive, at some steps"
    order = 90
    def __init__(self, at): self.at,self.seen = at,[]
    def after_batch(self):
        if not self.training or self.train_iter not in self.at: return
        gc.collect()
        self.seen.append((psutil.Process().memory_info().rss/2**20, sum(isinstance(o, Tensor) for o in gc.get_objects())))

@pytest.mark.parametrize('steps', [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_steps_hold_memory_flat(steps):
    at = steps//4,steps//2,steps-1
    learn = Learner(row_dls(4*steps, 4, n_valid=0), mlp_model(), loss_func=noop, cbs=[DINO(FixedViews()), RankMeMonitor(64), CollapseMonitor(), Watch(at)])
    with quiet(learn): learn.fit_dino(1, .01)
    (mb,n),_,(mb2,n2) = learn.watch.seen
    assert mb2-mb<(8 if steps<1000 else 12) and n2-n<at[2]-at[0]+20, learn.watch.seen             # fastai's recorder keeps the loss of each step, a number in a tensor

def left(learn):
    "All that a fit could leave behind"
    m = get_model(learn.model)
    hooks = sum(len(getattr(o, h)) for o in m.modules() for h in ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks'))
    return dict(loss=learn.loss_func, cbs=[type(c).__name__ for c in learn.cbs], hooks=hooks, frozen=[n for n,p in m.named_parameters() if not p.requires_grad], model=type(learn.model).__name__,
                loaders=[type(d).__name__ for d in learn.dls.loaders], logger=learn.logger, dtype=torch.get_default_dtype(), autocast=torch.is_autocast_enabled('cpu'), figures=plt.get_fignums(),
                files=sorted(f.path for f in psutil.Process().open_files() if f.path.endswith(('.pth','.csv','.tmp'))), grad=torch.is_grad_enabled(), threads=torch.get_num_threads())

class Interrupt(Callback):
    order = 60
    def __init__(self, event): self.at = event
    def __call__(self, name):
        if name==self.at and (name!='after_batch' or self.iter==2): raise KeyboardInterrupt

@pytest.mark.parametrize('precision,event', [*(('fp32',o) for o in (None,'after_pred','after_loss','before_step','after_batch','after_train','after_epoch')),
                                             *(('bf16',o) for o in (None,'after_loss','before_step'))])
def test_fits_leave_nothing_behind(tmp_path, event, precision):
    "One after the other, interrupted or not, as in a notebook whose cells run again"
    learn = digits_learner(0, n_train=192, path=tmp_path, precision=precision)
    before = left(learn)
    for _ in range(2):
        try:
            with quiet(learn): learn.fit_dino(1, cbs=[RunCheckpoint(tmp_path/'run'), History(tmp_path/'h.csv')] + ([Interrupt(event)] if event else []))
        except KeyboardInterrupt: assert event
        gc.collect()
        after = left(learn)
        if event: after['files'] = before['files']               # the history of a fit that was cut stays open until the next one
        assert after | dict(logger=None, cbs=None) == before | dict(logger=None, cbs=None), {k:(before[k],v) for k,v in after.items() if before[k]!=v}
    for c in list(learn.cbs): 
        if isinstance(c, (Interrupt,RunCheckpoint,History)): learn.remove_cb(c)                  # fastai leaves the callbacks of an interrupted fit
    with quiet(learn): learn.fit_dino(1)
    assert left(learn)['loss'] is before['loss']

def test_what_looks_at_a_model_leaves_it_as_it_was(tmp_path):
    learn = digits_learner(0, n_train=128, arch='vit_mini_patch4_16', path=tmp_path)
    x,was,modes = learn.dls.train_ds.x[:4],state(learn.model),[m.training for m in learn.model.modules()]
    plt.close('all')                                             # of other tests
    before,rng = left(learn),str(random_state(learn.dls))
    show_attention(learn, x); show_heads(learn, x); show_patch_pca(learn, x); learn.dino.show(); plt.close('all')
    attention_video(learn, x, tmp_path/'a.gif'); attention_maps(learn, x); extract_features(learn, [x]); export_encoder(learn, tmp_path/'e.safetensors', verbose=False)
    assert str(random_state(learn.dls))==rng
    extract_features(learn, learn.dls.train); knn_accuracy(learn, digits_dls())          # PyTorch's and fastai's loaders draw a seed when they start
    assert left(learn)==before and changed(learn.model, was)==[] and [m.training for m in learn.model.modules()]==modes

ALLOWED = {'vision/core.py': "asks the GPU whether it has bfloat16, which only CUDA's can lack", 'data.py': "pins memory for GPUs, and asks how much of theirs is free",
           'checkpoints.py': "random numbers of GPUs, where there are some", 'encoders.py': 'names of devices in advice',
           'features.py': 'copies from and to a GPU without waiting', 'monitors.py': 'lets a GPU skip steps itself until the loss is read', 'runs.py': 'notes which GPU there is, and how much of its memory was used'}

def test_the_code_asks_for_no_cuda():
    "The same path serves CPU, CUDA and MPS"
    root = Path(__file__).parent.parent/'self_supervised'
    for f in root.rglob('*.py'):
        if f.name=='_modidx.py': continue
        src = re.sub(r'#.*', '', f.read_text())
        assert not re.search(r'\.cuda\(|\.to\(["\']cuda|device\(["\']cuda|device=["\']cuda|nccl["\']', src), f
        if 'cuda' in src: assert str(f.relative_to(root)) in ALLOWED, f
