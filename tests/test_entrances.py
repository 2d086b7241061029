"What enters training: the range of the values, loaders of other kinds, new files, statistics of views that do not say them"
import contextlib, pickle, pytest, warnings
import kornia.augmentation as K
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.features import model_norm
from helpers import *

TD  = torch.utils.data.DataLoader
bad = dict(floats=lambda x: x*255, standardised=lambda x: (x-.5)/.2, int16=lambda x: (x*255).short())
good = dict(uint8=lambda x: (x*255).round().byte(), uint16=lambda x: (x*65535).round().to(torch.uint16), bool=lambda x: x>.5, half=lambda x: x.half())
said = dict(floats='images from 0[.].* to 25[45].* divide them', standardised='images from -2[.].* remove what normalises them', int16='images of torch.int16, whose range is not known')

def images(n=16, size=16, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

class Items(torch.utils.data.Dataset):
    def __init__(self, f, n=16): self.f,self.n = f,n
    def __len__(self): return self.n
    def __getitem__(self, i): return self.f(i)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([(o,) for o in images()])

class Counted(Stream):
    def __len__(self): return 16

def dls_of(x): return DataLoaders(DataLoader(Rows(x), bs=4, shuffle=True, drop_last=True), DataLoader(Rows(x[:0]), bs=4), device='cpu')
def views(): return get_digits_aug_pipelines((2,1))
small = dict(out_dim=8, hidden_dim=8)
learners = dict(dino=partial(dino_learner, out_dim=8), byol=partial(byol_learner, **small), moco=partial(moco_learner, out_dim=8, hidden_dim=8, queue=8), swav=partial(swav_learner, out_dim=8), simclr=partial(simclr_learner, **small),
                barlow=partial(barlow_learner, **small), lejepa=partial(lejepa_learner, **small), simdino=partial(simdino_learner, **small), distill=partial(distill_learner, teacher='convnet_mini'))

def encoder(): return create_encoder('convnet_mini')

@pytest.mark.parametrize('name', learners)
def test_every_method_looks_at_the_first_batch(name):
    kw = dict(learners[name].keywords)
    if name=='distill': kw['teacher'] = encoder()
    make = learners[name].func
    for what,f in bad.items():
        with pytest.raises(ValueError, match=said[what]): make(dls_of(f(images())), arch='convnet_mini', aug_pipelines=views(), **kw)             # before anything is built
    learn = make(dls_of(images()), arch='convnet_mini', aug_pipelines=views(), **kw)
    before = state(learn.model)
    for what,f in bad.items():
        learn.dls = dls_of(f(images()))
        with quiet(learn), pytest.raises(ValueError, match=said[what]): learn.pretrain(1)
    assert changed(learn.model, before)==[]

def test_bytes_16_bits_and_booleans_train_as_their_floats_do():
    x = (images()*255).round()/255
    def loss(x):
        set_seed(0)
        learn = dino_learner(dls_of(x), 'convnet_mini', views(), out_dim=8)
        with quiet(learn): learn.fit_dino(1)
        return learn.recorder.values[-1][0]
    want = loss(x)
    for f in (good['uint8'],good['uint16']): assert abs(loss(f(x))-want)<1e-4
    assert abs(loss(good['bool'](x))-loss((x>.5).float()))<1e-4

def test_the_range_is_looked_at_once_a_fit(monkeypatch):
    import self_supervised.vision.core as core
    learn,seen = dino_learner(dls_of(images()), 'convnet_mini', views(), out_dim=8),[]
    monkeypatch.setattr(core, 'check_unit', lambda x: seen.append(len(x)))
    for _ in range(2):
        with quiet(learn): learn.fit_dino(2)
    assert seen==[4,4]

def test_other_entrances_look_at_the_range_as_well():
    for what,f in bad.items():
        x = f(images())
        for g in (lambda: channel_stats([(x,)]), lambda: show_views(x, views()), lambda: extract_features(_with_stats(encoder()), [x]), lambda: views().views(x) if what=='int16' else check_unit(x),
                  lambda: finetune_learner(DataLoaders(TD(list(zip(x, [0,1]*8)), 4), TD(list(zip(x, [0,1]*8)), 4)), _with_stats(encoder()), n_out=2)):
            with pytest.raises(ValueError, match=said[what]): g()
    learn = dino_learner(dls_of(images()), 'convnet_mini', views(), out_dim=8)
    learn.dls = dls_of(images()*255)
    with pytest.raises(ValueError, match=said['floats']): learn.dino.show(2)
    plt.close('all')

def _with_stats(enc):
    enc.mean,enc.std = torch.full((3,), .5),torch.full((3,), .2)
    return enc

def test_finetuning_shows_the_encoder_the_same_whatever_the_type():
    x,y,seen = (images()*255).round()/255,[0,1]*8,[]
    enc = _with_stats(encoder())
    for f in (noop,good['uint8'],good['uint16']):
        d = TD(list(zip(f(x), y)), 4)
        learn = finetune_learner(DataLoaders(d, d, device='cpu'), enc, n_out=2)
        learn.model[0].register_forward_pre_hook(lambda m,a: seen.append(a[0]))
        with quiet(learn): learn.validate()
    assert len(seen)==12
    for i in range(4): test_close(seen[i], seen[i+4], 1e-5); test_close(seen[i], seen[i+8], 1e-4)
    test_close(seen[0], model_norm(enc)(x[:4]), 1e-5)

kinds = {'image': lambda x: x, '(image,)': lambda x: (x,), '(image, label, name)': lambda x: (x, 1, 'a.png'), '(index, image)': lambda x: (7, x), 'pixel_values': lambda x: dict(pixel_values=x, label=1),
         'img': lambda x: dict(img=x), 'any key': lambda x: dict(jpg=x, cls=3), '({image}, label)': lambda x: (dict(image=x), 1)}

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('lib', ['torch','fastai','TfmdDL'])
def test_loaders_of_other_kinds_train_and_are_evaluated(lib, kind):
    x  = images()
    ds = Items(lambda i: kinds[kind](x[i]))
    def dl(): return TD(ds, 8) if lib=='torch' else (DataLoader if lib=='fastai' else TfmdDL)(ds, bs=8, num_workers=0, device='cpu')
    given = [DataLoaders(dl(), device='cpu'), dl(), [dl(),dl()]] if kind=='image' else []
    for given in (*given, DataLoaders(dl(), dl(), device='cpu')):
        learn = dino_learner(given, 'convnet_mini', views(), out_dim=8)
        with quiet(learn): learn.fit_dino(1)
        assert math.isfinite(learn.recorder.values[-1][0]) and learn.recorder.values[-1]
    want = extract_features(learn, [x])[0]
    assert torch.allclose(extract_features(learn, dl())[0], want, atol=1e-5) and torch.allclose(extract_features(learn, learn.dls.train)[0], want, atol=1e-5)
    assert torch.allclose(torch.tensor(channel_stats(dl())[0]), x.double().mean((0,2,3)).float(), atol=1e-4)
    model = dino_learner(dls_of(x), 'convnet_mini', views(), out_dim=8).model
    plain = Learner(DataLoaders(dl(), dl(), device='cpu'), model, loss_func=noop, cbs=DINO(views()))                           # nobody has looked at the loaders before
    with quiet(plain): plain.fit(1)

def test_torch_loaders_are_left_as_they_are():
    ds,x = Items(lambda i: dict(image=images()[i], label=i%2)),images()
    dl = TD(ds, 8)
    learn = dino_learner(DataLoaders(dl, dl, device='cpu'), 'convnet_mini', views(), out_dim=8)
    with quiet(learn): learn.fit_dino(1)
    assert isinstance(first(dl), dict) and 'knn' in learn.recorder.metric_names                                                # its labels were seen
    pickle.dumps(first(learn.dls.loaders).collate_fn)

def test_loaders_that_cannot_be_taken_are_said():
    x = images()
    two = lambda ds: DataLoaders(TD(ds, 8), TD(ds, 8), device='cpu')
    for dls,text in ((two(Stream()),'of a Stream has no length'), (two(Items(lambda i: dict(a=i, name='b'))),r"a batch is a dict of a: a tensor \(8,\), name: a list of a str"),
                     (two(Items(lambda i: dict(image=x[i], img=x[i]))),'or a dict with one of the keys'), (two(Items(lambda i: x[i,0])),r'batches of shape \(8, 16, 16\), where images \(bs,C,H,W\)'),
                     (two(Items(lambda i: x[i], n=0)),'has no batch')):
        with pytest.raises(ValueError, match=text): dino_learner(dls, 'convnet_mini', views(), out_dim=8)
    for dls,text in ((two(Stream()),'a __len__'), (two(Items(lambda i: x[i,0])),r'shape \(8, 16, 16\)')):
        learn = Learner(dls, dino_learner(dls_of(x), 'convnet_mini', views(), out_dim=8).model, loss_func=noop, cbs=DINO(views()))
        with quiet(learn), pytest.raises(ValueError, match=text): learn.fit(1)
    learn = dino_learner(two(Counted()), 'convnet_mini', views(), out_dim=8)
    with quiet(learn): learn.fit_dino(1)
    assert len(extract_features(learn, TD(Stream(), 8))[0])==16
    for dls in (TD(Stream(), 8), DataLoaders(TD(Stream(), 8)), DataLoader(Rows(x), bs=4)):
        with pytest.raises(ValueError, match='of one loader, where two are expected'): knn_accuracy(learn, dls)
    with pytest.raises(ValueError, match='pass dls.train or dls.valid'): extract_features(learn, learn.dls)

def folder(path, n=12):
    rng = np.random.RandomState(0)
    for i in range(n): Image.fromarray(rng.randint(0, 255, (32,40,3), dtype=np.uint8)).save(path/f'{i}.png')
    return path

@pytest.mark.parametrize('cache', [False,True])
def test_new_files_through_a_trained_learner(tmp_path, cache):
    d = folder(tmp_path)
    for valid_pct in (0,.25):
        learn = dino_learner(unlabelled_dls(d, 32, 4, valid_pct, num_workers=0, path=d, device='cpu', cache=cache), 'convnet_mini', get_dino_aug_pipelines((2,1), crop_sizes=(16,8)), out_dim=8)
        files = [d/'3.png',str(d/'5.png'),d/'1.png']
        want  = extract_features(learn, [torch.stack([_middle(f) for f in files])])[0]
        dl    = learn.dls.test_dl(files)
        for got in (extract_features(learn, dl)[0], learn.get_preds(dl=dl)[0], torch.stack([learn.predict(f)[0] for f in files])): test_close(got, want, 1e-4)
        assert len(learn.dls.test_dl(files, bs=2))==2 and next(iter(learn.dls.test_dl(L(files), bs=2)))[0].shape==(2,3,32,32)
        assert len(learn.dls.test_dl(find_images(d)))==3
    (d/'bad.png').write_bytes(b'')
    with pytest.raises(ValueError, match='bad.png cannot be read'): learn.predict(d/'bad.png')
    with pytest.raises(ValueError, match='bad.png cannot be read'): extract_features(learn, learn.dls.test_dl([d/'1.png',d/'bad.png']))

def _middle(f):
    c = SquareCrop(32)
    return ToTensor()(c(PILImage.create(f), split_idx=1)).as_subclass(Tensor)

def test_predictions_are_features_and_leave_the_learner_as_it_was():
    learn = digits_learner(n_train=64, holdout='valid', out_dim=8, precision='bf16')
    with quiet(learn): learn.fit_dino(1)
    before = state(learn.model)
    x = learn.dls.valid_ds.x[:3]
    feats,y = learn.get_preds(dl=learn.dls.valid.new(n=3, get_idxs=lambda: range(3)))
    test_close(feats, extract_features(learn, [x])[0], 1e-5)
    assert changed(learn.model, before)==[] and len(y)==3 and not torch.is_autocast_enabled('cpu') and 'DINOHead' in repr(learn.model) and 'Linear' in str(learn.summary())

plain_views = lambda size: [lambda x: F.interpolate(x, (size,size))]*3

def test_views_that_do_not_say_what_they_normalise_with_are_named_once():
    learn = dino_learner(dls_of(images()), 'convnet_mini', plain_views(16), out_dim=8)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in range(2):
            with quiet(learn): learn.fit_dino(1)
    told = [str(o.message) for o in w if 'what they normalise' in str(o.message)]
    assert len(told)==1 and 'DINO(..., stats=' in told[0] and '0.485' in told[0]
    for stats,by in ((([.5]*3,[.25]*3),'argument'), (([0]*3,[1]*3),'argument'), (([.5]*3,[.25]*3),'set_stats')):
        given = dino_learner(dls_of(images()), 'convnet_mini', plain_views(16), out_dim=8, **(dict(stats=stats) if by=='argument' else {}))
        if by=='set_stats': given.model.set_stats(*stats)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='.*what they normalise')
            with quiet(given): given.fit_dino(1)
        x = images(4)
        want = extract_features(encoder_of(given), [(x-stats[0][0])/stats[1][0]], stats=([0]*3,[1]*3))[0]
        test_close(extract_features(given, [x])[0], want, 1e-5)

def test_statistics_are_found_in_kornias_and_torchvisions_and_fastais_normalize():
    m,s = [.5,.4,.3],[.2,.3,.4]
    class Compose:
        def __init__(self, *ts): self.transforms = list(ts)
    class TV:                                                    # torchvision's has these attributes and this name
        def __init__(self): self.mean,self.std = m,s
    TV.__name__ = 'Normalize'
    norm = K.Normalize(mean=torch.tensor(m), std=torch.tensor(s))
    for p in (norm, K.AugmentationSequential(K.RandomHorizontalFlip(), norm), nn.Sequential(nn.Sequential(norm)), Compose(noop, TV()), Pipeline([Normalize.from_stats(m, s, cuda=False)])):
        got = stats_of([noop,p])
        test_close(got[0], tensor(m), 1e-6); test_close(got[1], tensor(s), 1e-6)
    assert stats_of([noop,K.RandomHorizontalFlip(),nn.Identity()]) is None
    dino = DINO([norm]*3)
    assert tuple(dino.known_stats[0].tolist())==tuple(tensor(m).tolist())
    with pytest.raises(ValueError, match='leave stats out'): DINO([norm]*3, stats=([0]*3,[1]*3))
    DINO([norm]*3, stats=(m,s))

def test_statistics_of_other_channels_are_an_argument_of_the_learner():
    x = torch.rand(16, 5, 16, 16)
    learn = dino_learner(dls_of(x), 'convnet_mini', out_dim=8, stats=([.5]*5,[.25]*5))
    with quiet(learn): learn.fit_dino(1)
    assert learn.model.mean.tolist()==[.5]*5 and learn.dino.aug_pipelines.stats[1].tolist()==[.25]*5

class Whole(nn.Module):
    "A student that is no nn.Sequential"
    def __init__(self):
        super().__init__()
        self.encoder,self.last = encoder(),nn.Linear(128, 8)
    def forward(self, x): return self.last(torch.cat([self.encoder(o) for o in x]) if isinstance(x, list) else self.encoder(x))

@pytest.mark.parametrize('cb', [AnyMixedPrecision('bf16'), MixedPrecision('bf16')])
def test_mixed_precision_with_a_student_that_is_no_sequential(cb):
    learn = Learner(dls_of(images()), StudentModel(Whole()), loss_func=noop, cbs=[LeJEPA(views()), cb])
    with quiet(learn): learn.fit(1)
    assert math.isfinite(learn.recorder.values[-1][0]) and learn.global_feats is None
    model = DINOModel(Whole())
    model.parts = nn.ModuleList([KoLeo()])
    with pytest.raises(ValueError, match='koleo needs a student nn.Sequential'), quiet(Learner(dls_of(images()), model, loss_func=noop, cbs=DINO(views()))) as l: l.fit(1)

def test_an_empty_batch_gives_empty_views():
    for x in (images()[:0], good['uint8'](images())[:0], torch.rand(0, 3, 128, 128)):
        assert [tuple(v.shape) for v in get_dino_aug_pipelines((2,2), crop_sizes=(16,8)).views(x)]==[(0,3,16,16)]*2+[(0,3,8,8)]*2

class OwnStats(nn.Module):
    "An encoder that normalises its images itself"
    def __init__(self, kind):
        super().__init__()
        self.body = create_encoder('convnet_mini')
        m,s = torch.full((3,1,1), .4),torch.full((3,1,1), .3)
        if kind=='attributes': self.mean,self.std = .4,.3
        elif kind=='parameters': self.mean,self.std = nn.Parameter(m),nn.Parameter(s)
        else: self.register_buffer('mean', m, kind=='persistent'); self.register_buffer('std', s, kind=='persistent')
    def forward(self, x): return self.body((x-self.mean)/self.std)

@pytest.mark.parametrize('kind', ['attributes','parameters','persistent','not persistent'])
def test_the_statistics_of_an_encoder_that_normalises_stay_its_own(kind, tmp_path):
    learn = dino_learner(dls_of(images()), OwnStats(kind), views(), out_dim=8, bottleneck_dim=4, hidden_dim=8)
    with quiet(learn): learn.fit_dino(1)
    enc = encoder_of(learn).eval()
    assert torch.allclose(torch.as_tensor(enc.mean), torch.tensor(.4), atol=.01) and norm_stats(learn)[0].tolist()==pytest.approx(list(imagenet_stats[0]))
    export_encoder(learn, tmp_path/'e.safetensors', verbose=False)
    other = load_encoder(tmp_path/'e.safetensors', OwnStats(kind))
    with torch.no_grad(): test_close(other(images(2)), enc(images(2)), 1e-5)
    assert norm_stats(other)[0].tolist()==pytest.approx(list(imagenet_stats[0]), abs=1e-4)

def test_learning_rates_of_a_list_and_one_epoch_of_continued_pretraining():
    learn = dino_learner(dls_of(images()), 'convnet_mini', views(), out_dim=8)
    with quiet(learn): learn.fit_dino(1, lr=[1e-4,1e-3], scale_lr=False, warmup_epochs=0)
    assert max(learn.recorder.lrs)==pytest.approx(1e-3)
    with pytest.raises(ValueError, match='pass a smaller head_epochs'): learn.continue_pretrain(1)
