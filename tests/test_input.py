"From files to the device: images that are opened once, in memory or shrunk in a folder, train as files do"
import contextlib, json, pytest, signal, warnings
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import run_command
from self_supervised.cli.prepare import dino_prepare
import processes
from helpers import *
from test_distributed import launch
from test_images import bytes_of_good, good_files, mixed_folder, write

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

def tree(d): return {p.relative_to(d): p.read_bytes() for p in d.rglob('*') if p.is_file()}

@pytest.mark.parametrize('sig', [signal.SIGKILL,pytest.param(signal.SIGINT,marks=pytest.mark.slow),pytest.param(signal.SIGTERM,marks=pytest.mark.slow)])
def test_dino_prepare_goes_on_where_it_was_stopped(sig, tmp_path, capfd):
    d,out,whole = tmp_path/'d',tmp_path/'out',tmp_path/'whole'
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (30,40,3), dtype=np.uint8)).resize((1500,1125))
    for i in range(40):
        (d/f'{i%3}').mkdir(parents=True, exist_ok=True)
        photo.rotate(i).save(d/f'{i%3}'/f'{i}.png', compress_level=0)
    (d/'bad.jpg').write_bytes(b'')
    p = processes.Forked(processes.command, 'self_supervised.cli.prepare:prepare_main', d, out, '--size', 32, '--num-workers', 2)
    while len(list(out.rglob('*.png')))<4 and p.poll() is None: time.sleep(.01)
    p.send_signal(sig)
    _,err = p.communicate(timeout=60)
    done = {f: f.stat().st_mtime_ns for f in out.rglob('[0-9]*.png')}
    assert p.returncode==(-9 if sig==signal.SIGKILL else 130) and 4<=len(done)<40, (p.returncode,err,len(done))
    if sig!=signal.SIGKILL: assert 'the same command continues' in err and len(err.strip().splitlines())==1, err
    for f in done: assert Image.open(f).convert('RGB').size==(43,32)                # each of them whole
    time.sleep(.5)
    still = len(list(out.rglob('[0-9]*.png')))
    (out/'.x.png.1.tmp').write_bytes(b'half')
    assert run_command(dino_prepare, [str(d), str(out), '--size', '32'])==0
    said = capfd.readouterr().out
    assert '40 images' in said and '1 unreadable' in said
    assert {f: f.stat().st_mtime_ns for f in done}==done and still<=len(done)+4      # nobody went on without the command
    prepare_images(d, whole, 32, num_workers=0, progress=False)
    assert tree(out)==tree(whole) and [o['path'] for o in map(json.loads, (out/'bad_files.jsonl').open())]==[str(d/'bad.jpg')]

def test_dino_prepare_takes_what_a_folder_may_hold(tmp_path):
    "Names in any script and of any length, every kind of file; what is bad is listed, and the copy trains"
    bad,out = mixed_folder(tmp_path/'d'),tmp_path/'out'
    write(tmp_path/'d', '例'*83+'.png', bytes_of_good['grey.png']())
    for n in (0,2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            r = prepare_images(tmp_path/'d', out/f'{n}', 16, num_workers=n, progress=False)
        assert r['n_bad']==len(bad) and r['n']==10+len(bytes_of_good)+1
        rows = [json.loads(l) for l in (out/f'{n}'/'bad_files.jsonl').open()]
        assert sorted(o['path'] for o in rows)==sorted(map(str, bad)) and {o['done'] for o in rows}=={'left out'}
    assert {k for k in tree(out/'0')}=={k for k in tree(out/'2')}
    files = {f.relative_to(tmp_path/'d') for f in find_images(tmp_path/'d')}-{f.relative_to(tmp_path/'d') for f in bad}
    assert {k for k in tree(out/'0') if k.suffix!='.jsonl' and k.name!='prepare.json'}=={f if f.suffix.lower() in ('.png','.jpg') else f.with_name(f.name+'.png') for f in files}
    dls = unlabelled_dls(out/'0', 16, 4, num_workers=0, path=tmp_path/'run')
    for x, in dls.train: assert x.shape==(4,3,16,16)
    assert len(dls.train_ds)==r['n'] and not (tmp_path/'run'/'bad_files.jsonl').exists()

def test_dino_prepare_tries_bad_files_again(tmp_path):
    good_files(tmp_path/'d', 3)
    write(tmp_path/'d', 'late.png', b'half')
    assert prepare_images(tmp_path/'d', tmp_path/'out', 16, progress=False)['n_bad']==1
    write(tmp_path/'d', 'late.png', bytes_of_good['grey.png']())
    r = prepare_images(tmp_path/'d', tmp_path/'out', 16, progress=False)
    assert (r['n'],r['n_bad'])==(4,0) and not (tmp_path/'out'/'bad_files.jsonl').exists()
