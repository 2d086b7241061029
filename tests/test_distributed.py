"Several processes on one machine, against one process with the joint batch"
import socket, sys
import pytest
from fastai.vision.all import *
from self_supervised.vision.dino import *
import processes
from processes import Forked
from helpers import *

TRAIN = """
import sys; sys.path.insert(0, {tests!r})
from helpers import *
from fastai.distributed import *
from self_supervised.all import *
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
rank,out = int(os.environ['RANK']),Path({out!r})
{body}
"""

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def start(n, f, *args, check=True):
    "`f(*args)` in n processes with the variables that torchrun sets: the processes, and what each printed"
    env = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    ps  = [Forked(f, *args, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)]
    outs = [p.communicate(timeout=240) for p in ps]
    if check: assert [p.returncode for p in ps]==[0]*n, outs[0][1][-3000:]+outs[-1][1][-3000:]
    return ps,outs

def launch(tmp_path, n, body, check=True):
    "Run `body`, which leaves files in `out`, in n processes with the variables that torchrun sets"
    return start(n, processes.code, TRAIN.format(tests=str(Path(__file__).parent), out=str(tmp_path), body=body), check=check)

FIT = """
dls   = row_dls(26, {bs}, shuffle=True, n_valid=4)
learn = Learner(dls, mlp_model(seed=rank), loss_func=noop, cbs=[DINO(FixedViews(), freeze_last_layer=1)] + ([GradientAccumulation({acc}*{bs})] if {acc}>1 else []))
dls.train.rng = random.Random(rank)                              # each would shuffle in its own way
fit   = partial(learn.fit_dino, 3, .05, warmup_epochs=1)
with learn.no_bar(), learn.no_logging():
    if {n}>1:
        with learn.distrib_ctx(cpu=True, sync_bn=False): fit()
    else: fit()
torch.save(dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), values=learn.recorder.values, lrs=learn.recorder.lrs, loss=learn.loss_func is noop, dl=type(learn.dls.train).__name__), out/f'{n}.{{rank}}')
"""

@pytest.mark.parametrize('n,acc', [pytest.param(2,1,marks=pytest.mark.slow),(2,2),(3,1),pytest.param(3,2,marks=pytest.mark.slow)])
def test_processes_train_as_one_with_the_joint_batch(tmp_path, n, acc):
    launch(tmp_path, n, FIT.format(n=n, bs=2, acc=acc))
    launch(tmp_path, 1, FIT.format(n=1, bs=2*n, acc=acc))
    one,ranks = torch.load(tmp_path/'1.0', weights_only=False),[torch.load(tmp_path/f'{n}.{r}', weights_only=False) for r in range(n)]
    for r in ranks:
        for k,v in ranks[0]['model'].items(): assert torch.equal(r['model'][k], v), k          # the same in all processes, to the last bit
    for k,v in one['model'].items(): torch.testing.assert_close(ranks[0]['model'][k], v, rtol=1e-6, atol=1e-9)
    assert max((one['model'][k]-v).abs().max() for k,v in mlp_model(seed=0).double().state_dict().items() if k.startswith('student'))>1e-3      # it moved
    torch.testing.assert_close(torch.tensor(ranks[0]['lrs']), torch.tensor(one['lrs']))
    for a,b in zip(ranks[0]['values'], one['values']): np.testing.assert_allclose([v for v in a if v is not None][:1]+list(a[-2:]), [v for v in b if v is not None][:1]+list(b[-2:]), rtol=1e-5)
    assert ranks[0]['dl']=='DataLoader' and ranks[0]['loss'] and one['loss']                      # all is put back

MONITORED = """
torch.set_default_dtype(torch.float32)
set_seed(0)
learn = digits_learner(0, n_train=256, path=out, holdout='test')
set_seed(rank)
learn.knn_monitor.every = 1
with learn.no_bar():
    with learn.distrib_ctx(cpu=True, sync_bn=False):
        learn.fit_dino(2, cbs=[RunCheckpoint(out/'run'), History(out/'run'/'history.csv')])
        f,y = shared_features(learn, learn.dls.valid)
        g,_ = extract_features(learn, learn.dls.valid)
        assert torch.allclose(f, g, atol=1e-5) and torch.equal(y, learn.dls.valid_ds.y)
torch.save((learn.recorder.values, learn.model.state_dict()), out/f'values.{rank}')
"""

def test_monitors_speak_for_all_and_only_one_writes(tmp_path):
    launch(tmp_path, 2, MONITORED)
    (a,ma),(b,mb) = (torch.load(tmp_path/f'values.{r}', weights_only=False) for r in (0,1))
    names = pd.read_csv(tmp_path/'run'/'history.csv')
    assert len(names)==2 and sorted(f.name for f in (tmp_path/'run').ls(file_exts=None))==['checkpoint-1.pth','checkpoint.pth','history.csv']
    np.testing.assert_allclose([[v for v in r if v is not None] for r in a], [[v for v in r if v is not None] for r in b], rtol=1e-5)
    assert all(torch.equal(v, mb[k]) for k,v in ma.items() if k.startswith('teacher') and 'running' not in k)
    assert len(torch.load(tmp_path/'run'/'checkpoint.pth', weights_only=True)['random'])==2

RESUMED = """
torch.set_default_dtype(torch.float32)
class Stop(Callback):
    order = 200
    def after_epoch(self):
        if self.epoch==1 and {stop}: raise KeyboardInterrupt
learn = digits_learner(0, n_train=256, path=out)
set_seed(rank+{seed})
try:
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_dino(3, cbs=[RunCheckpoint(out/'{name}', resume={resume}), Stop()])
except KeyboardInterrupt: pass
"""

def test_a_run_of_two_processes_resumes_to_the_last_bit(tmp_path):
    launch(tmp_path, 2, RESUMED.format(stop=False, seed=0, name='whole', resume=False))
    launch(tmp_path, 2, RESUMED.format(stop=True, seed=0, name='cut', resume=False))
    launch(tmp_path, 2, RESUMED.format(stop=False, seed=5, name='cut', resume=True))
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('whole','cut'))
    for k,v in a.items(): assert torch.equal(v, b[k]), k

NAN = """
learn = Learner(row_dls(16, 2), mlp_model(), loss_func=noop, cbs=[DINO(FixedViews()), CollapseMonitor()], path=out)
if rank==1: learn.dls.train_ds.x[6] = math.nan
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_dino(2, .05, warmup_epochs=1)
assert len(learn.recorder.values)==0 and len(learn.collapse_monitor.messages)==1, learn.collapse_monitor.messages
assert all(p.isfinite().all() for p in learn.model.parameters())
"""

def test_all_stop_where_one_loses_its_loss(tmp_path):
    launch(tmp_path, 2, NAN)
    rep = torch.load(tmp_path/'nonfinite_1.pth', weights_only=True)
    assert not (tmp_path/'nonfinite.pth').exists() and rep['epoch']==0 and rep['temperatures']['tps']==.1 and len(rep['views'])==3

def _torchrun(*args):
    run = ['--nproc-per-node', '2', '--master-port', str(free_port()), str(Path(sys.executable).parent/'dino_train')]
    return processes.run(processes.module, 'torch.distributed.run', *run, *args)[0]

def _two_ranks(*args): return ''.join(out for out,_ in start(2, processes.command, 'self_supervised.cli:main', *args)[1])

@pytest.mark.parametrize('launcher', [_two_ranks,pytest.param(_torchrun, marks=pytest.mark.slow)])
def test_the_command_runs_under_torchrun(tmp_path, launcher):
    "Two processes, a resumption, one set of files; what always runs has the variables of torchrun without its start"
    args = ['--local-crops-number', '1', '--batch-size-per-gpu', '64', '--out', str(tmp_path), '--epochs']
    def check(out, n):
        assert 'batches of 64 on each of 2 ranks' in out and out.count('encoder: ')==1
        assert len(pd.read_csv(tmp_path/'history.csv'))==n
    check(launcher(*args, 1, '--no-report'), 1)
    check(_two_ranks(*args, 2, '--resume'), 2)
    assert len(torch.load(tmp_path/'checkpoint.pth', weights_only=True)['random'])==2 and (tmp_path/'encoder.safetensors').exists() and (tmp_path/'table.csv').exists()

PARTS = """
torch.set_default_dtype(torch.float32)
class Centres(Callback):
    order = 99
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append(self.learn.dino.parts[1].C.clone())
learn = digits_learner(0, n_train=256, arch='vit_mini_patch4_16', path=out, parts=[KoLeo(), IBOT(head=32)], cbs=[GradientAccumulation(128), (c:=Centres())])
learn.remove_cbs(learn.cbs.filter(lambda o: o.name=='knn_monitor'))
set_seed(rank)
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_dino(2)
torch.save((learn.model.state_dict(), torch.stack(c.seen), learn.recorder.values), out/f'parts.{rank}')
"""

def test_parts_stay_in_step(tmp_path):
    "Masks differ between processes, weights and centres do not; the patches' centre moves once a real step"
    launch(tmp_path, 2, PARTS)
    (a,ca,va),(b,cb,vb) = (torch.load(tmp_path/f'parts.{r}', weights_only=False) for r in (0,1))
    moved = [k for k,v in a.items() if 'running' not in k and not torch.equal(v, b[k])]
    assert moved==[] and torch.equal(ca, cb) and a['parts.1.mask_token'].abs().max()>0
    assert [torch.equal(x, y) for x,y in zip(ca, ca[1:])]==[False,True,False]
    np.testing.assert_allclose([v for v in va[-1][:1]+va[-1][2:-1]], [v for v in vb[-1][:1]+vb[-1][2:-1]], rtol=1e-5)
