"What takes minutes: the figures of the demonstration, every family of backbones, and random input of all kinds"
import io, pytest, warnings
from fastai.vision.all import *
from PIL import Image
from self_supervised.all import *
from self_supervised.cli import dino_train, run_command
from helpers import *

pytestmark = pytest.mark.slow

def demo(*args):
    with warnings.catch_warnings(action='ignore'): assert run_command(dino_train, [*map(str, args)])==0

def table_of(out):
    t = pd.read_csv(out/'table.csv', index_col=0).drop(columns='role')
    return t.map(lambda o: float(str(o).split(' ')[0]))

def test_the_demonstration_reaches_its_figures(tmp_path):
    demo('--out', tmp_path)
    assert {o.name for o in tmp_path.ls()} >= {'checkpoint.pth','encoder.safetensors','history.csv','history.png','views.png','neighbours.png','table.csv'}
    row = table_of(tmp_path).loc['DINO, teacher']
    assert row['20-NN']>=92 and row['linear']>=95.5 and row['1 label/class']>=62, row

def test_a_tiny_vit_climbs(tmp_path):
    demo('--arch', 'vit_mini_patch4_16', '--epochs', '60', '--out', tmp_path)
    t = table_of(tmp_path)
    assert t.loc['DINO, teacher','20-NN']>=85>70>t.loc['the same network, untrained','20-NN'] and (tmp_path/'attention.png').exists()

def test_going_on_is_better_than_the_start_and_than_from_scratch(tmp_path):
    def of(*classes):
        def part(ds):
            keep = torch.isin(ds.y, tensor(classes))
            return DigitsDataset(ds.x[keep], ds.y[keep])
        dls = digits_dls()
        return DataLoaders(*[dl.new(part(dl.dataset)) for dl in dls], device=dls.device)
    low,high,views = of(*range(5)),of(*range(5,10)),get_digits_aug_pipelines()
    def fitted(dls, arch, fit):
        learn = dino_learner(dls, arch, views)
        with quiet(learn): fit(learn)
        return learn
    scores = []
    for seed in range(2):
        set_seed(seed)
        file = export_encoder(fitted(low, 'convnet_mini', lambda l: l.fit_dino(20)), tmp_path/f'{seed}.safetensors', verbose=False)
        row  = [load_encoder(file)]
        for arch,fit in (('convnet_mini', lambda l: l.fit_dino(20)), (load_encoder(file), lambda l: l.continue_pretrain(20, lr=2e-2))):
            set_seed(seed+10)
            row.append(fitted(high, arch, fit))
        scores.append([(knn_accuracy(m, high), lowshot_accuracy(m, high, 1, 20)[0]) for m in row])
    start,scratch,continued = np.array(scores).mean(0)
    assert (continued>=start).all() and continued[1]>=start[1]+.08 and (continued>=scratch).all(), (start, scratch, continued)

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','deit_tiny_patch16_224','deit_tiny_distilled_patch16_224','vit_small_r26_s32_224','convnext_atto','swin_tiny_patch4_window7_224','resnet18',
                                  'efficientnet_b0','xcit_nano_12_p16_224','mobilenetv3_small_100','regnety_002','densenet121','pvt_v2_b0','vgg11'])
def test_every_family_takes_views_of_two_sizes(arch):
    m = create_dino_model(arch, 32, hidden_dim=16, bottleneck_dim=8)
    x = [torch.randn(2,3,224,224)]*2+[torch.randn(2,3,96,96)]
    out = m.student(x)
    assert out.shape==(6,32)
    out.mean().backward()
    with torch.no_grad(): assert m.eval().teacher(x[:2]).isfinite().all()

@pytest.mark.parametrize('arch', ['beit_base_patch16_224','cait_xxs24_224','mixer_s16_224','hiera_tiny_224'])
def test_models_of_one_size_say_so(arch):
    enc = create_encoder(arch)
    with pytest.raises(ValueError, match='crop_sizes=\\(224,224\\)'): check_sizes(enc, (224,96))
    check_sizes(enc, (224,224))

def test_random_crops_are_interpolations():
    rng = np.random.RandomState(0)
    for _ in range(300):
        h,w,n,c,s = rng.randint(1,90),rng.randint(1,90),rng.randint(1,4),rng.randint(1,5),rng.randint(1,70)
        x = torch.rand(n,c,h,w)
        bx = random_boxes(2*n, h, w, (.05,1.), (rng.uniform(.2,1), rng.uniform(1,5)))
        assert (bx[:,:2]>=0).all() and (bx[:,2:]>=1).all() and (bx[:,0]+bx[:,2]<=h).all() and (bx[:,1]+bx[:,3]<=w).all()
        got = crop_resize(x, bx, s)
        for i,(t,l,bh,bw) in enumerate(bx.int().tolist()):
            want = F.interpolate(x[i%n:i%n+1,:,t:t+bh,l:l+bw], (s,s), mode='bicubic', antialias=True)[0].clamp(0,1)
            assert (got[i]-want).abs().max()<1e-4, (h,w,s,(t,l,bh,bw))

def test_random_options_give_finite_views():
    rng = np.random.RandomState(1)
    for _ in range(60):
        c = rng.choice([1,3,4])
        kw = dict(flip_p=rng.rand(), jitter_p=rng.rand(), blur_p=rng.rand(), solarize_p=rng.rand(), rotate_deg=rng.choice([0.,15.]), rot90=bool(rng.rand()<.5), brightness=rng.rand(), contrast=rng.rand())
        if c==3: kw |= dict(gray_p=rng.rand(), hue=rng.rand()*.5, saturation=rng.rand())
        else: kw |= dict(n_in=int(c), stats=([.4]*c,[.2]*c))
        lo = rng.uniform(.01,.5)
        pipes = get_dino_aug_pipelines((2,rng.randint(0,4)), (int(rng.randint(2,40)),int(rng.randint(2,20))), (lo,lo), (1.,rng.uniform(lo,1)), **kw)
        x = torch.randint(0, 256, (rng.randint(1,5),c,rng.randint(4,60),rng.randint(4,60)), dtype=torch.uint8)
        s = random_state()
        views = pipes.views(x)
        set_random_state(s)
        for v,p,q in zip(views, pipes, [p(x) for p in pipes]):
            assert v.shape==(len(x),c,p.size,p.size) and v.isfinite().all() and (v-q).abs().max()<1e-4

def test_random_losses_are_the_plain_ones():
    rng = np.random.RandomState(2)
    for _ in range(300):
        n_crops,bs,K = rng.randint(2,9),rng.randint(1,6),rng.randint(1,12)
        ids = rng.permutation(n_crops)[:rng.randint(1,n_crops+1)].tolist()
        s,t,c = torch.randn(n_crops*bs,K).double()*3,torch.randn(len(ids)*bs,K).double()*3,torch.randn(1,K).double()
        tps,tpt = rng.uniform(.05,1),rng.uniform(.02,1)
        q,lp = torch.softmax((t-c)/tpt,-1).chunk(len(ids)),torch.log_softmax(s/tps,-1).chunk(n_crops)
        pairs = [-(q[i]*lp[v]).sum(-1).mean() for i in range(len(ids)) for v in range(n_crops) if v!=ids[i]]
        torch.testing.assert_close(dino_loss(s,t,c,tps,tpt,ids), sum(pairs)/len(pairs), rtol=1e-10, atol=1e-12)
        h = teacher_entropy(t,c,tpt)
        assert -1e-9<=h<=math.log(K)+1e-9 and kl(s,t,c,tps=tps,tpt=tpt,large_crop_ids=ids)>=-1e-9

def test_random_files_are_read_or_named(tmp_path):
    rng,good = np.random.RandomState(3),0
    for i in range(120):
        mode,fmt = [('RGB','JPEG'),('RGB','PNG'),('L','PNG'),('LA','PNG'),('RGBA','PNG'),('P','PNG'),('1','PNG'),('I;16','PNG'),('CMYK','JPEG'),('RGB','WEBP'),('RGB','BMP'),('P','GIF'),('L','TIFF')][rng.randint(13)]
        h,w = rng.randint(1,60,2)
        a = rng.randint(0,256,(h,w,3),dtype=np.uint8)
        im = Image.fromarray((a[...,0].astype(np.uint16)*200)) if mode=='I;16' else Image.fromarray(a).convert('RGBA' if mode=='LA' else mode)
        if mode=='LA': im = im.convert('LA')
        b = io.BytesIO(); im.save(b, fmt)
        b = b.getvalue()
        if rng.rand()<.3: b = b[:rng.randint(0,len(b))]
        (tmp_path/f'{i:03d}.{fmt.lower()}').write_bytes(b)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        dls = unlabelled_dls(tmp_path, size=24, bs=20, num_workers=2, seed=0, path=tmp_path)
        for _ in range(2):
            for x, in dls.train: assert x.shape==(20,3,24,24) and x.dtype==torch.uint8
    named = [str(o.message) for o in w if 'could not read' in str(o.message)]
    assert len(named)==len(set(named))>5

def test_random_arguments_never_give_a_traceback(tmp_path, capfd):
    rng = np.random.RandomState(4)
    opts = ['--path','--out','--arch','--epochs','--batch-size-per-gpu','--size','--lr','--optimizer','--precision','--local-crops-number','--global-crops-scale','--teacher-temp','--clip-grad',
            '--labels','--n-in','--patch-size','--out-dim','--nonsense','--resume']
    vals = ['-1','0','abc','1e9','nan','', str(tmp_path), '.5','3']
    for _ in range(150):
        args = ['--out', str(tmp_path/'x'), '--path', str(tmp_path)]                     # no images there: nothing starts
        for _ in range(rng.randint(1,4)): args += [opts[rng.randint(len(opts))]] + [vals[rng.randint(len(vals))] for _ in range(rng.randint(0,2))]
        if '--path' in args[4:]: continue
        assert run_command(dino_train, args)==2, args
        out,err = capfd.readouterr()
        assert len(err.strip().splitlines())==1 and err.startswith('dino_train: '), (args, err)

def test_views_of_a_device_compile(monkeypatch):
    import self_supervised.augmentations as A
    monkeypatch.setattr(A, '_per_image', lambda x: False)
    monkeypatch.setattr(A, '_compute_dtype', lambda x: torch.float32)
    view,x = A.View(48, .2, 1., solarize_p=.3),torch.randint(0, 256, (16,3,64,56), dtype=torch.uint8)
    compiled = torch.compile(view, dynamic=True)
    with torch.no_grad():
        for _ in range(3):
            want = view(x)
            torch.testing.assert_close(compiled(x, params=view._params), want, rtol=0, atol=1e-4)
        d = merge(*[o.data for o in view._params])
        for f,args in ((A.crop_matmul,(x,A.crop_boxes(d),48,d['flip'])), (A.blur_matmul,(torch.rand(16,3,48,48),d['sigma'],6)), (A.adjust_hue_,(torch.rand(16,3,48,48),torch.rand(16,1,1,1)-.5))):
            got,want = (g(*[a.clone() if torch.is_tensor(a) else a for a in args]) for g in (torch.compile(f, fullgraph=True),f))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

@pytest.mark.parametrize('arch', ['vit_mini_patch4_16','convnet_mini'])
def test_a_compiled_learner_learns_the_same(arch, tmp_path):
    def trained(**kwargs):
        learn = digits_learner(0, n_train=128, arch=arch, drop_path_rate=0., cbs=[], **kwargs)
        with quiet(learn): learn.fit_dino(2)
        return learn
    a,b = trained(),trained(compile=True)
    assert b.model.student[0]._compiled_call_impl is not None and a.model.state_dict().keys()==b.model.state_dict().keys()
    for x,y in zip(a.recorder.values, b.recorder.values): assert np.allclose(x[:3], y[:3], rtol=1e-3), (x,y)
    export_encoder(b, tmp_path/'e.safetensors', verbose=False)
    x = torch.rand(2,3,16,16)
    with torch.no_grad(): assert torch.allclose(load_encoder(tmp_path/'e.safetensors')(x), encoder_of(b).eval()(x), atol=1e-5)
    if arch[:3]=='vit': assert attention_maps(encoder_of(b), x).shape==(2,4,4,4)
    b.export(tmp_path/'learn.pkl')
