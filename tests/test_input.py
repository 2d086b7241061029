"From files to the device: images that are opened once, in memory or shrunk in a folder, train as files do"
import contextlib, gc, json, pytest, signal, warnings
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

@pytest.fixture(scope='module')
def digits(tmp_path_factory): return digits_path(tmp_path_factory.mktemp('digits'))

class Stop(Callback):
    order = 200
    def after_epoch(self):
        if self.epoch==1: raise KeyboardInterrupt

def test_a_run_from_memory_resumes_to_the_last_bit(tmp_path, digits):
    for name,seed,resume,cbs in (('whole',0,False,[]), ('cut',0,False,[Stop()]), ('cut',5,True,[])):
        with quiet(learner(digits, tmp_path, seed)) as learn, contextlib.suppress(KeyboardInterrupt): learn.fit_dino(3, cbs=[RunCheckpoint(tmp_path/name, resume=resume), *cbs])
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('whole','cut'))
    for k,v in a.items(): assert torch.equal(v, b[k]), k

def test_square_images_train_the_same_from_memory_as_from_files(tmp_path, digits):
    values = []
    for cache in (False,True):
        dls = unlabelled_dls(digits/'test', 16, 64, seed=1, num_workers=0, path=tmp_path, device='cpu', cache=cache)
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
    for i in range(24):
        (d/f'{i%3}').mkdir(parents=True, exist_ok=True)
        photo.rotate(i).save(d/f'{i%3}'/f'{i}.png', compress_level=0)
    (d/'bad.jpg').write_bytes(b'')
    p = processes.Forked(processes.command, 'self_supervised.cli.prepare:prepare_main', d, out, '--size', 32, '--num-workers', 2)
    while len(list(out.rglob('*.png')))<4 and p.poll() is None: time.sleep(.01)
    p.send_signal(sig)
    _,err = p.communicate(timeout=60)
    done = {f: f.stat().st_mtime_ns for f in out.rglob('[0-9]*.png')}
    assert p.returncode==(-9 if sig==signal.SIGKILL else 130) and 4<=len(done)<24, (p.returncode,err,len(done))
    if sig!=signal.SIGKILL: assert 'the same command continues' in err and len(err.strip().splitlines())==1, err
    for f in done: assert Image.open(f).convert('RGB').size==(43,32)                # each of them whole
    time.sleep(.5)
    still = len(list(out.rglob('[0-9]*.png')))
    (out/'.x.png.1.tmp').write_bytes(b'half')
    assert run_command(dino_prepare, [str(d), str(out), '--size', '32'])==0
    said = capfd.readouterr().out
    assert '24 images' in said and '1 unreadable' in said
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

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    d = tmp_path_factory.mktemp('images')
    for i in range(80): Image.fromarray(np.random.RandomState(i).randint(0, 256, (16,20,3), dtype=np.uint8)).save(d/f'{i}.png')
    return d

def image_loader(d, n=2, **kwargs):
    set_seed(3)
    return unlabelled_dls(d, 16, 16, seed=1, num_workers=n, path=d, device='cpu', **kwargs)

def test_workers_that_stay_give_what_new_workers_give(images):
    kept,new = image_loader(images),image_loader(images, keep_workers=False)
    def batches(dls, f):
        out = []
        f(dls.train, out)
        return [o.as_subclass(Tensor) for o in out]+[torch.rand(2),torch.tensor([random.random(),np.random.rand()])]
    def whole(dl, out):  out += [x for x, in dl]
    def cut(dl, out):    out += [x for (x,),_ in zip(dl, range(2))]
    def inside(dl, out):
        for x, in dl: out += [x,*[y for (y,),_ in zip(dl, range(2))]]
    pids = []
    for f in (whole,cut,inside,whole):
        set_seed(len(pids))
        a = batches(kept, f)
        set_seed(len(pids))
        for x,y in zip(a, batches(new, f), strict=True): assert torch.equal(x, y), f
        pids.append({w.pid for w in kept.train.workers[0]._workers})
    assert all(o==pids[0] and len(o)==2 for o in pids) and new.train.workers is None
    kept.train.dataset.open_fn = lambda f: Image.new('RGB', (16,16), 'white')           # workers cannot see this: they are started anew
    assert all((x==255).all() for x, in kept.train) and {w.pid for w in kept.train.workers[0]._workers}.isdisjoint(pids[0])
    again = pickle.loads(pickle.dumps(new.train))
    assert len(list(again))==len(new.train)
    stop_workers(kept)
    assert kept.train.workers is None and len(list(kept.train))==len(kept.train)
    stop_workers(kept)

def test_workers_stay_for_a_fit_and_end_with_it_also_when_it_fails(images):
    import psutil
    class Pids(Callback):
        order = 60
        def __init__(self, stop=None): self.seen,self.stop = [],stop
        def after_epoch(self): self.seen.append([w.pid for w in self.dls.train.workers[0]._workers])
        def after_batch(self):
            if (self.epoch,self.iter)==self.stop: raise KeyboardInterrupt
    for stop in (None,(1,2)):
        watch = Pids(stop)
        learn = dino_learner(image_loader(images), 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32, cbs=watch)
        with quiet(learn), contextlib.suppress(KeyboardInterrupt): learn.fit_dino(2)
        assert len(watch.seen)==2-bool(stop) and watch.seen[0]==watch.seen[-1] and learn.dls.train.workers is None
        assert not any(psutil.pid_exists(p) and psutil.Process(p).status()!='zombie' for p in watch.seen[0])

def test_a_run_with_workers_that_stay_resumes_to_the_last_bit(tmp_path, images):
    class Cut(Callback):
        order = 200
        def after_batch(self):
            if (self.epoch,self.iter)==(1,1): raise KeyboardInterrupt
    runs = ('new',0,False,[],dict(keep_workers=False)),('kept',0,False,[],{}),('cut',0,False,[Cut()],{}),('cut',5,True,[],{})
    for name,seed,resume,cbs,kw in runs:
        dls = image_loader(images, **kw)
        set_seed(seed)
        learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32)
        with quiet(learn), contextlib.suppress(KeyboardInterrupt): learn.fit_dino(2, cbs=[RunCheckpoint(tmp_path/name, resume=resume), *cbs])
    a,*others = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('new','kept','cut'))
    for b in others:
        for k,v in a.items(): assert torch.equal(v, b[k]), k

class FakeCuda:
    "Streams whose copies are done when another stream waits for them, and memory whose users are noted"
    def __init__(self, monkeypatch):
        import self_supervised.data as D
        self.log,self.pending,self.at = [],[],'main'
        monkeypatch.setattr(D, '_side_stream', lambda device: self)
        monkeypatch.setattr(D, 'to_device', self.to_device)
        monkeypatch.setattr(torch.cuda, 'stream', self.stream)
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: self)
        monkeypatch.setattr(Tensor, 'record_stream', lambda x, stream: self.log.append(('used',id(x),self.at)))
    @contextlib.contextmanager
    def stream(self, s):
        self.at = 'side'
        yield
        self.at = 'main'
    def to_device(self, b, device, non_blocking=False):
        assert non_blocking and self.at=='side'
        new = tuple(torch.full_like(o, -1) for o in b)
        self.log.append(('copy',int(b[0][0,0])))
        self.pending.append(lambda: [n.copy_(o) for n,o in zip(new, b)])
        return new
    def record_event(self): return len(self.pending)
    def wait_event(self, n):
        assert self.at=='main'
        for f in self.pending[:n]: f()

def test_batches_are_copied_ahead_and_waited_for(monkeypatch):
    fake,read = FakeCuda(monkeypatch),[]
    def loader():
        for i in range(4):
            read.append(i)
            yield torch.full((2,3), i),torch.tensor([i])
    for n in (0,1):
        fake.log.clear(), read.clear()
        for i,(x,y) in enumerate(copied_ahead(loader(), torch.device('cuda'), n)):
            assert (x==i).all() and y.item()==i and read[-1]==min(i+n,3)                # the copy was waited for; the next one is on its way
            assert [o[1] for o in fake.log if o[0]=='copy']==read
            assert [o for o in fake.log if o[0]=='used'][-2:]==[('used',id(x),'main'),('used',id(y),'main')]
        assert i==3

def test_a_loader_of_a_gpu_copies_ahead_only_with_workers(images, monkeypatch):
    import self_supervised.data as D
    asked = []
    monkeypatch.setattr(D, 'copied_ahead', lambda batches, device, n: asked.append((device.type,n)) or batches)
    for n,copy in ((0,True),(2,True),(2,False)):
        want = [x for x, in image_loader(images, n, copy_ahead=False).train]
        dls  = image_loader(images, n, copy_ahead=copy)
        if copy: dls.train._device = torch.device('cuda')        # there is none: `copied_ahead` is replaced
        assert all(torch.equal(x, y) for (x,),y in zip(dls.train, want, strict=True))
        stop_workers(dls)
    assert asked==[('cuda',0),('cuda',1)]
    assert FilesDL(NoImages(), 2, device='cuda').pin_memory and not FilesDL(NoImages(), 2, device='cpu').pin_memory

def jpegs(d, n=9):
    d.mkdir()
    rng = np.random.RandomState(0)
    for i in range(n):
        im,ex = Image.fromarray(rng.randint(0, 256, (5,6,3), dtype=np.uint8)).resize((60+i,40), Image.BICUBIC),Image.Exif()
        ex[0x0112] = i
        im.save(d/f'{i}.jpg', quality=95, exif=ex, progressive=i%2==0)
    im.convert('L').save(d/'grey.jpg'); im.convert('CMYK').save(d/'cmyk.jpg'); im.save(d/'a.png')
    (d/'cut.jpg').write_bytes((d/'8.jpg').read_bytes()[:-200])
    return d

@pytest.mark.parametrize('workers', [0,2])
def test_jpegs_are_decoded_where_the_batch_is(workers, tmp_path, monkeypatch):
    "torchvision's decoder on the CPU takes the place of nvJPEG"
    import self_supervised.data as D
    monkeypatch.setattr(D, 'why_not_decoded', lambda device: None)
    d = jpegs(tmp_path/'d')
    got,want = [],[]
    for out,kw in ((got,dict(decode_on_device=True)),(want,{})):
        set_seed(0)
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            dls = unlabelled_dls(d, 32, 13, seed=0, num_workers=workers, path=tmp_path, device='cpu', **kw)
            for _ in range(2): out += [x for x, in dls.train]+[torch.tensor([random.random()])]
        assert sum('cut.jpg' in str(o.message) for o in w)==1
        stop_workers(dls)
    for a,b in zip(got, want):
        assert a.shape==b.shape and a.dtype==b.dtype and type(a) is type(b)
        if a.ndim==1: assert torch.equal(a, b)                   # the same random numbers, so the same crops
        else: assert (a.float()-b.float()).abs().mean()<1.5 and (a.float()-b.float()).abs().max()<40
    x, = first(dls.test_dl([d/'3.jpg',d/'a.png']))
    assert x.shape==(2,3,32,32)
    with pytest.raises(ValueError, match='leave it out for grey'): unlabelled_dls(d, 32, 4, open_fn=open_gray, decode_on_device=True)

def test_what_the_decoder_refuses(tmp_path, monkeypatch):
    import self_supervised.data as D
    files = [read_jpeg(f) for f in sorted(jpegs(tmp_path/'d').glob('[0-4].jpg'))]
    decode,calls = decode_jpegs,[]
    def refuses(fs, device):
        calls.append(len(fs))
        if any(len(f)==len(files[1].data) or len(f)==99 for f in fs): raise RuntimeError('nvJPEG: unsupported')
        return decode(fs, device)
    monkeypatch.setattr(D, 'decode_jpegs', refuses)
    files[3].data = torch.zeros(99, dtype=torch.uint8)
    tfm = DecodeJpegs(32, 'cpu')
    with pytest.warns(UserWarning, match='could not read .*3.jpg.*replaced'): x = tfm(JpegBatch(files))
    assert calls==[5]+[1]*5 and x.shape==(5,3,32,32) and torch.equal(x[3], x[0 if 3%4==0 else [0,1,2,4][3%4]])
    want = SquareCrop(32)(PILImage(open_rgb(tmp_path/'d'/'1.jpg')), split_idx=1)                        # by Pillow
    assert (x[1].float()-image2tensor(want).float()).abs().mean()<1.5
    with warnings.catch_warnings(record=True) as w: tfm(JpegBatch(files))
    assert not w                                                 # named once
    with pytest.raises(ValueError, match='none of the 1 JPEG files'): DecodeJpegs(32, 'cpu')(JpegBatch(files[3:4]))

def test_without_a_gpu_jpegs_are_decoded_in_the_workers(tmp_path):
    d = jpegs(tmp_path/'d')
    with pytest.warns(UserWarning, match='in the workers instead of on the device: the device is cpu'):
        dls = unlabelled_dls(d, 32, 4, num_workers=0, path=tmp_path, device='cpu', decode_on_device=True)
    assert type(dls.train) is ReadableDL
    assert 'torchvision cannot decode' in why_not_decoded(torch.device('cuda'))           # there is none
    with pytest.warns(UserWarning, match='cache=True'): unlabelled_dls(d, 32, 4, num_workers=0, path=tmp_path, device='cpu', decode_on_device=True, cache=True)

def test_workers_of_a_rank_stay_too(images, monkeypatch):
    monkeypatch.setattr(JointDL, '_broadcast', lambda self, t, rank: np.asarray(t))                    # what rank 0 sends is the same here
    kept,new = (JointDL(image_loader(images, keep_workers=k).train, rank=1, world_size=2) for k in (True,False))
    pids = []
    for seed in range(2):
        both = []
        for dl in (kept,new):
            set_seed(seed)
            both.append([x.as_subclass(Tensor) for x, in dl]+[torch.rand(2)])
        for x,y in zip(*both, strict=True): assert torch.equal(x, y)
        assert len(both[0])==3                          # 80 images, 2 ranks, 16 images per batch
        pids.append([w.pid for w in kept.workers[0]._workers])
    assert pids[0]==pids[1] and new.workers is None
    kept.stop_workers()

def test_workers_that_stay_follow_changes_of_transforms(images):
    dls = image_loader(images, 1)
    dl,crop = dls.train,first(dls.train.after_item.fs, risinstance(SquareCrop))
    assert first(dl)[0].shape[-1]==16 and dl.workers
    def pid(): return dl.workers[0]._workers[0].pid
    old = pid()
    list(dl)
    assert pid()==old
    crop.size = 8,8                                              # progressive resizing, for example
    assert first(dl)[0].shape[-1]==8 and pid()!=old
    dl.after_item.fs.append(Transform(lambda x: x*0))
    assert first(dl)[0].max()==0
    stop_workers(dls)

def test_a_new_worker_does_not_collect_other_loaders(images, tmp_path, monkeypatch):
    "Python may collect garbage in a forked process at any time; here it does so at once"
    forked,failed = dict(collect=True),tmp_path/'failed'
    monkeypatch.setattr(sys, 'unraisablehook', lambda o: failed.write_text(str(o.exc_value)))
    os.register_at_fork(after_in_child=lambda: forked['collect'] and gc.isenabled() and gc.collect())
    other = image_loader(images, 1)
    first(other.train)
    threshold = gc.get_threshold()
    gc.set_threshold(1_000_000)                                  # the main process does not
    try:
        other.train.myself = other.train
        del other
        dls = image_loader(images, 1)
        assert len(list(dls.train))==5 and gc.isenabled()
        stop_workers(dls)
    finally:
        gc.set_threshold(*threshold)
        forked['collect'] = False
        gc.collect()
    assert not failed.exists()
