"From files to the device: images that are opened once train as files do, resume, and are shared between processes"
import contextlib, json, warnings
from fastai.vision.all import *
from self_supervised.all import *
from helpers import *
from test_distributed import launch

def learner(d, out, seed=0, **kwargs):
    set_seed(seed)
    dls = unlabelled_dls(d/'test', 16, 64, valid_pct=.2, seed=1, num_workers=0, path=out, device='cpu', cache=True, **kwargs)
    return dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32)

class Stop(Callback):
    order = 200
    def after_epoch(self):
        if self.epoch==1: raise KeyboardInterrupt

def test_a_run_from_memory_resumes_to_the_last_bit(tmp_path):
    d = digits_path(tmp_path/'digits')
    for name,seed,resume,cbs in (('whole',0,False,[]), ('cut',0,False,[Stop()]), ('cut',5,True,[])):
        with quiet(learner(d, tmp_path, seed)) as learn, contextlib.suppress(KeyboardInterrupt): learn.fit_dino(3, cbs=[RunCheckpoint(tmp_path/name, resume=resume), *cbs])
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('whole','cut'))
    for k,v in a.items(): assert torch.equal(v, b[k]), k

def test_square_images_train_the_same_from_memory_as_from_files(tmp_path):
    d = digits_path(tmp_path/'digits')
    values = []
    for cache in (False,True):
        dls = unlabelled_dls(d/'test', 16, 64, seed=1, num_workers=0, path=tmp_path, device='cpu', cache=cache)
        set_seed(0)
        model = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32)
        class Seeded(Callback):
            order = -10
            def before_batch(self): set_seed(self.train_iter)                                      # files draw a square from random's numbers, memory does not
        with quiet(model): model.fit_dino(2, cbs=Seeded())
        values.append(model.recorder.values)
    assert values[0]==values[1] and len(values[0])==2

SHARED = """
torch.set_default_dtype(torch.float32)
dls   = unlabelled_dls(out/'digits'/'test', 16, 32, valid_pct=.2, seed=1, num_workers=2, path=out, device='cpu', cache=True)
set_seed(rank)
learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32, path=out)
seen  = []
class Rows(Callback):
    order = -20
    def before_batch(self): seen.append((type(self.dls.train).__name__, self.xb[0].clone()))
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_dino(1, cbs=Rows())
names,xs = zip(*seen[:6])
torch.save((names, torch.cat(xs)), out/f'{rank}.pt')
"""

def test_two_processes_share_the_batches_of_images_in_memory(tmp_path):
    d = digits_path(tmp_path/'digits')
    launch(tmp_path, 2, SHARED)
    (n0,a),(n1,b) = (torch.load(tmp_path/f'{r}.pt', weights_only=False) for r in (0,1))
    assert {*n0,*n1}=={'JointDL'} and len(a)==len(b)==6*32
    dls  = unlabelled_dls(d/'test', 16, 64, valid_pct=.2, seed=1, num_workers=0, path=tmp_path, device='cpu', cache=True)
    want = torch.cat([x for x, in dls.train]).as_subclass(Tensor)
    both = torch.cat([torch.cat([p,q]) for p,q in zip(a.as_subclass(Tensor).split(32), b.as_subclass(Tensor).split(32))])
    assert torch.equal(both, want[:len(both)])

def test_workers_that_open_images_for_memory_name_bad_files(tmp_path):
    d = digits_path(tmp_path/'digits')
    for i in range(3): (d/'test'/f'bad{i}.png').write_bytes(b'')
    for n in (0,2):
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            dls = unlabelled_dls(d/'test', 16, 64, num_workers=n, path=tmp_path/f'run{n}', cache=True)
            for _ in dls.train: pass
        assert len([o for o in w if 'could not read' in str(o.message)])==3
        assert sorted(Path(json.loads(l)['path']).name for l in (tmp_path/f'run{n}'/'bad_files.jsonl').open())==['bad0.png','bad1.png','bad2.png']
        assert dls.train_ds.x.flatten(1).any(1).all()
