"Views are kornia pipelines: the same seed gives the same views however they are computed, and each augmentation works alone"
import multiprocessing, pickle, pytest
import kornia, kornia.augmentation as K, torchvision.transforms.v2 as T2
from concurrent.futures import ProcessPoolExecutor
from fastai.vision.all import *
from self_supervised.augmentations import *
from self_supervised.vision.dino import dino_learner
from self_supervised.data import digits_dls
from helpers import *

def smooth(n=6, c=3, h=40, w=36, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (kornia.filters.gaussian_blur2d(torch.rand(n,c,h,w, generator=g), 5, (1.5,1.5))*255).byte()

def elastic(p=.5): return K.RandomElasticTransform(kernel_size=(9,9), sigma=(3.,3.), alpha=(1.2,1.2), p=p)
extra = {'erasing': lambda: K.RandomErasing(p=.5), 'elastic': elastic, 'noise': lambda: K.RandomGaussianNoise(std=.05, p=.5),
         'planckian': lambda: K.RandomPlanckianJitter(p=.5), 'container': lambda: K.ImageSequential(K.RandomBoxBlur(p=.5), K.RandomGamma((.5,1.5), p=.5)),
         'function': lambda: lambda x: x*torch.rand(len(x),1,1,1), 'filter': lambda: kornia.filters.MedianBlur((3,3))}

def seeded(f, *args, seed=3, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)

def equal(a, b, tol=1e-5):
    assert len(a)==len(b)
    for x,y in zip(a, b): torch.testing.assert_close(x, y, rtol=0, atol=tol)

@pytest.mark.parametrize('names', [[], *[[o] for o in extra], list(extra)], ids=lambda o: '+'.join(o) or 'none')
@pytest.mark.parametrize('size', [(32,16), (80,72)])             # all crops at once, and one image after the other
def test_views_are_the_same_together_and_one_by_one_and_can_be_repeated(names, size):
    x = smooth(4, h=100, w=90)
    pipes = get_dino_aug_pipelines((2,2), size, rot90=True, rotate_deg=10., solarize_p=.5, xtra_tfms=[extra[o]() for o in names])
    together = seeded(pipes.views, x)
    assert [v.shape for v in together]==[(4,3,s,s) for s in (size[0],size[0],size[1],size[1])] and {v.dtype for v in together}=={torch.float32}
    equal(seeded(lambda: [p(x) for p in pipes]), together)
    if 'function' not in names: equal([p(x, params=p._params) for p in pipes], together)
    for a,b in zip(seeded(pipes.views, x/255), together):        # the crop of floats is not rounded to 8 bits
        if not names: assert (a-b).abs().mean()<.02

@pytest.mark.parametrize('name', list(extra))
def test_each_image_has_its_own_randomness(name):
    x = smooth(1).expand(8,-1,-1,-1)
    t = extra[name]()
    for m in t.modules() if isinstance(t, nn.Module) else ():
        if hasattr(m, 'p'): m.p = 1.
    view = View(24, 1., 1., ratio=(.9,.9), flip_p=0, jitter_p=0, gray_p=0, blur_p=0, xtra_tfms=[t])
    assert len(view(x).flatten(1).unique(dim=0))==(1 if name=='filter' else 8)

def test_a_view_with_foreign_modules_is_the_sequence_of_its_modules():
    "What kornia's own container makes of the same modules and parameters"
    x = smooth(5)/255
    view = View(24, .3, 1., blur_p=.5, solarize_p=.5, rotate_deg=5., xtra_tfms=[extra[o]() for o in ('erasing','elastic','noise','planckian','container')])
    y,plain = view(x),K.ImageSequential(*view)
    equal([view.transform_inputs(x, view._params)], [y])
    equal([plain(x, params=[o._replace(name=n) for o,(n,_) in zip(view._params, plain.named_children())])], [y])

def test_views_with_a_mask_in_a_container_of_kornia():
    x = smooth(4)/255
    view = View(24, .5, 1., jitter_p=0, gray_p=0, blur_p=0, rot90=True, rotate_deg=10., stats=([0.]*3,[1.]*3))
    img,mask = K.AugmentationSequential(view, data_keys=['input','mask'])(x, (x[:,:1]>.5).float())
    assert mask.shape==(4,1,24,24) and set(mask.unique().tolist())<={0.,1.}
    assert ((img[:,:1]>.5)==(mask>.5)).float().mean()>.9

ours = {'crop': lambda **k: RandomResizedCropFlip(20, (.3,.6), **k), 'rot90': RandomRot90, 'rotation': lambda **k: RandomRotationReflect(20., **k),
        'jitter': ColorJitterPerImage, 'blur': RandomGaussianBlurPerImage, 'solarise': RandomSolarizeHalf}
geometric = 'crop','rot90','rotation'

@pytest.mark.parametrize('name', list(ours))
@pytest.mark.parametrize('container', [lambda m: m, K.ImageSequential, lambda m: K.AugmentationSequential(m, data_keys=['input'])], ids=['alone','ImageSequential','AugmentationSequential'])
def test_each_augmentation_works_alone_and_in_containers(name, container):
    m,x = ours[name](),smooth(12, h=36)/255
    start = x.clone()
    y = container(m)(x)
    assert torch.equal(x, start) and y.dtype==x.dtype and y.shape==((12,3,20,20) if name=='crop' else x.shape)
    assert torch.equal(m(x, params=m._params), y)
    same = ours[name](same_on_batch=True)(x[:1].expand(6,-1,-1,-1))
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-6)
    one = ours[name](keepdim=True)
    assert container(one)(x[0]).shape==y.shape[1:] and container(ours[name]())(x[0]).shape==(1,*y.shape[1:])
    if name!='crop':
        assert torch.equal(container(ours[name](p=0.))(x), x)
        changed = (container(ours[name](p=1.))(x)!=x).flatten(1).any(1)
        assert changed.sum()>=(4 if name=='rot90' else 12)
    assert seeded(container(m), x[:0]).shape==(0,*y.shape[1:])
    for dtype in (torch.half, torch.float64): assert m(x.to(dtype)).dtype==dtype
    if not isinstance(m, (RandomResizedCropFlip,)): assert m.to(torch.float64).forward_parameters(x.shape)['batch_prob'].dtype==torch.float32

@pytest.mark.parametrize('name', geometric)
def test_masks_boxes_and_points_follow_the_image(name):
    x = torch.zeros(8,3,36,36); x[:,:,10:20,22:30] = 1
    points = torch.tensor([[[25.5,14.5]]]).repeat(8,1,1)
    m = ours[name]()
    if name=='crop': m.scale = (.7,1.)
    seq = K.AugmentationSequential(m, data_keys=['input','mask','keypoints'])
    img,mask,points = seq(x, x[:,:1], points)
    at = torch.arange(float(img.shape[-1]))
    for w,q in zip(mask[:,0], points[:,0]):
        if mask.shape[-1]==36 or w[0].sum()+w[-1].sum()+w[:,0].sum()+w[:,-1].sum()==0:
            torch.testing.assert_close(torch.stack([(w.sum(0)*at).sum(), (w.sum(1)*at).sum()])/w.sum(), q, rtol=0, atol=.7)
    assert ((img[:,:1]>.5)==(mask>.5)).float().mean()>.95 and set(mask.unique().tolist())=={0.,1.}
    again = seq(x, x[:,:1], torch.tensor([[[25.5,14.5]]]).repeat(8,1,1), params=seq._params)
    for a,b in zip(again, (img,mask,points)): assert torch.equal(a, b)

def test_a_view_is_edited_as_a_list():
    x,v = smooth(),View(24, .4, 1.)
    kinds = lambda: [type(m).__name__ for m in v]
    assert kinds()==['RandomResizedCropFlip','ColorJitterPerImage','RandomGrayscale','RandomGaussianBlurPerImage','Normalize']
    v.insert(1, K.RandomErasing(p=1.)); v[2] = extra['noise'](); del v[3]; v.append(K.RandomInvert()); v.extend([noop])
    assert kinds()==['RandomResizedCropFlip','RandomErasing','RandomGaussianNoise','RandomGaussianBlurPerImage','Normalize','RandomInvert','Lambda']
    assert isinstance(v.pop(), nn.Module) and len(v)==6 and v(x).shape==(6,3,24,24) and v.gray_p==0 and v.jitter_p==0 and v.blur_p==.5
    del v[1:4]
    assert kinds()==['RandomResizedCropFlip','Normalize','RandomInvert'] and type(v[0:2]) is View
    v[0] = K.CenterCrop((20,20))
    assert v(x).shape==(6,3,20,20) and not hasattr(v, 'size')
    t = K.RandomErasing(p=1.)
    v.extend([t, t])
    assert len(v)==5 and len(v._params or [])==0 and v(x).shape==(6,3,20,20) and len(v._params)==5
    with pytest.raises(TypeError, match='pass an augmentation of kornia'): v.append(3)
    with pytest.raises(AttributeError, match='belongs to a module'): v.blur_p = .3
    with pytest.raises(AttributeError, match='no RandomResizedCrop'): v.size

def test_settings_of_the_modules_hold_from_the_next_batch_on():
    v,x = View(24, .4, 1.),smooth(64)
    v[1].p,v[1].brightness,v[0].scale,v[0].flip_p = 1.,0.,(1.,1.),0.
    v(x)
    crop,jitter = v._params[0].data,v._params[1].data
    assert not crop['flip'].any() and (crop_boxes(crop)[:,2:].prod(1)>.8*40*36).all() and (jitter['factors'][:,0]==1).all() and (jitter['batch_prob']==1).all()
    assert (v.brightness,v.min_scale,v.flip_p,v.jitter_p)==(0.,1.,0.,1.) and 'brightness=0, ' in str(v)

def test_extra_transforms_belong_to_kinds_of_views():
    a,b = K.RandomErasing(p=.3),noop
    def kinds(**kw): return [[type(m).__name__ for m in p][1:-1] for p in get_dino_aug_pipelines((2,2), (24,16), jitter_p=0, gray_p=0, blur_p=0, solarize_p=0, **kw)]
    assert kinds(xtra_tfms=[a,b])==[['RandomErasing','Lambda']]*4 and kinds(xtra_tfms=a)==[['RandomErasing']]*4 and kinds()==[[]]*4
    assert kinds(xtra_tfms=[[],[a],[b]])==[[],['RandomErasing'],['Lambda'],['Lambda']] and kinds(xtra_tfms=[[a],[],[],[b]])==[['RandomErasing'],[],[],['Lambda']]
    pipes = get_dino_aug_pipelines(xtra_tfms=[a])
    pipes[0][-2].p = .9
    assert pipes[1][-2].p==a.p==.3 and pipes[1][-2].flags is not a.flags
    with pytest.raises(ValueError, match='first global, second global, local'): get_dino_aug_pipelines(xtra_tfms=[[a],[b]])
    with pytest.raises(ValueError, match=r'stats=\(mean, std\)'): get_dino_aug_pipelines(xtra_tfms=[K.Normalize(torch.zeros(3), torch.ones(3))])
    with pytest.raises(TypeError, match='pass an augmentation'): get_dino_aug_pipelines(xtra_tfms=['blur'])

@pytest.mark.parametrize('f,says', [(lambda x: x[:,:1], 'images of the same shape'), (lambda x: x[:1], 'images of the same shape'), (lambda x: x[...,1:], 'images of the same shape'),
                                    (lambda x: x*255, 'returned values from'), (lambda x: x*float('nan'), 'from nan to nan'), (lambda x: (x*255).byte(), 'a tensor of torch.uint8'), (lambda x: None, 'a NoneType')])
def test_wrong_results_of_a_transform_raise_an_error(f, says):
    with pytest.raises((ValueError,TypeError), match=says): get_dino_aug_pipelines((1,1), (24,16), xtra_tfms=[f]).views(smooth())

def test_a_transform_that_returns_its_argument_does_not_change_it():
    kept = []
    def keep(x): kept.append((x, x.clone())); return x
    view = View(24, 1., 1.)
    view.insert(1, keep); view.insert(0, keep)
    x = smooth()/255
    start = x.clone()
    view(x)
    assert torch.equal(x, start) and len(kept)==2
    for now,before in kept: assert torch.equal(now, before)

def test_subclasses_run_their_own_methods():
    class Twice(RandomGaussianBlurPerImage):
        def change(self, x, d, flags, transform=None): return super().change(super().change(x, d, flags), d, flags)
    class Black(RandomSolarizeHalf):
        def apply_transform(self, input, params, flags, transform=None): return input*0
    class Halved(View):
        def forward(self, x, **kwargs): return super().forward(x, **kwargs)/2
    x,off = smooth(),dict(jitter_p=0, gray_p=0, stats=([0.]*3,[1.]*3), flip_p=0, ratio=(.9,.9))
    a,b = View(30, 1., 1., blur_p=1., **off),View(30, 1., 1., blur_p=1., **off)
    b[1] = Twice(p=1.)
    assert seeded(b, x).std()<seeded(a, x).std()
    b[1] = Black(p=1.)
    assert (b(x)==0).all()
    equal([seeded(AugPipelines([a, Halved(30, 1., 1., blur_p=0., **off)]).views, x)[1].amax()], [View(30, 1., 1., blur_p=0., **off)(x).amax()/2], 1e-2)

@pytest.mark.parametrize('c', [1,2,4,6])
def test_views_of_other_channels(c):
    x = smooth(3, c)
    pipes = get_dino_aug_pipelines((2,1), (24,16), n_in=c, stats=([.4]*c,[.2]*c), rot90=True, xtra_tfms=[K.RandomErasing(p=.5), extra['noise']()])
    assert [v.shape for v in pipes.views(x)]==[(3,c,24,24)]*2+[(3,c,16,16)] and 'Grayscale' not in str(pipes[0])
    with pytest.raises(ValueError, match='n_in=5'): pipes.views(smooth(3, 5))

def test_a_single_image_and_an_empty_batch():
    view,x = View(24, .4, 1.),smooth()
    assert view(x[0]).shape==(1,3,24,24) and view(x[:0]).shape==(0,3,24,24)
    view.keepdim = True
    assert view(x[0]).shape==(3,24,24) and view(x).shape==(6,3,24,24)

def in_worker(blob, x):
    view = pickle.loads(blob)
    torch.manual_seed(1)
    return view(x)

def test_views_are_copied_and_pickled():
    view,x = get_dino_aug_pipelines((2,1), (24,16), rot90=True, rotate_deg=5., xtra_tfms=[o() for k,o in extra.items() if k!='function'])[1],smooth()
    want = seeded(view, x, seed=1)
    for other in (deepcopy(view), pickle.loads(pickle.dumps(view))): assert torch.equal(seeded(other, x, seed=1), want) and str(other)==str(view)
    other[1].p = 0.
    assert view[1].p!=0

@pytest.mark.slow
def test_views_in_a_spawned_worker():
    view,x = get_dino_aug_pipelines((2,1), (24,16), xtra_tfms=[elastic(), extra['noise']()])[1],smooth()
    want = seeded(view, x, seed=1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        torch.testing.assert_close(pool.submit(in_worker, pickle.dumps(view), x).result(), want, rtol=0, atol=1e-5)

def test_a_learner_trains_on_extra_transforms_and_notes_its_views(tmp_path):
    from self_supervised.runs import describe_run
    pipes = get_digits_aug_pipelines((2,1), xtra_tfms=[K.RandomErasing(p=.3), lambda x: x.sqrt()])
    set_seed(0)
    dls = digits_dls(bs=64)
    for a in 'xy': setattr(dls.train_ds, a, getattr(dls.train_ds, a)[:128])
    dls.train.n = 128
    learn = dino_learner(dls, 'convnet_mini', pipes)
    with quiet(learn): learn.fit_dino(1)
    assert learn.recorder.values[-1] and describe_run(learn)['views']==[16,16,8]
    assert learn.dino.aug_pipelines is pipes and torch.equal(stats_of(pipes)[0], pipes[0].mean)

def test_what_views_refuse_and_what_to_do():
    x,noise = torch.rand(4,3,32,32),K.RandomGaussianNoise(p=1.)
    def views(*tfms, **kw): return get_dino_aug_pipelines((2,1), (16,8), xtra_tfms=tfms, **kw)
    normalised = T2.Compose([T2.Normalize([.5]*3, [.5]*3)])
    for t in (Normalize.from_stats(*imagenet_stats, cuda=False), normalised, nn.Sequential(K.Normalize(torch.zeros(3), torch.ones(3))), View(8, .5, 1.)):
        with pytest.raises(ValueError, match='views end with one'): views(t)
    for t in (K.RandomErasing, nn.Identity, None, 'RandomErasing'):
        with pytest.raises(TypeError, match='pass an augmentation of kornia'): views(t)
    with pytest.raises(ValueError, match='^RandomGaussianNoise returned values .* lower its strength'): views(noise).views(x)
    for kw,what in ((dict(num_crops=6),'num_crops=6: pass two'), (dict(crop_sizes=(9,)),'crop_sizes'), (dict(blur_prob=[1]),'no option blur_prob'),
                    (dict(blur_sigma=(0.,0.)),'sigma'), (dict(blur_sigma=2.),'sigma'), (dict(ratio=1.),'ratio'), (dict(gray_p=2),'gray_p=2'),
                    (dict(flip_p=-1),'flip_p'), (dict(blur_p=3),'p=3'), (dict(max_scales=(2.,1.)),'scale'), (dict(crop_sizes=((8,9),8)),'square')):
        with pytest.raises((ValueError,TypeError), match=what): get_dino_aug_pipelines(**kw)
    v = views()[0]
    for wrong in (x[0,0], x[None], x.numpy(), [x]):
        with pytest.raises(TypeError, match=r'pass a batch of images, a tensor \(bs,C,H,W\)'): v(wrong)
    v(x)
    for y,params in ((x[:2],v._params), (x[...,:30],v._params)):
        with pytest.raises(ValueError, match='as many images of the same size'): v(y, params=params)
    for params in ([], v._params[:2], [3]):
        with pytest.raises(ValueError, match='_params of a call of the same view'): v(x, params=params)
    with pytest.raises(ValueError, match='sigma'): v[3].sigma = (2.,1.)
    assert v[3].sigma==(.1,2.)                                   # unchanged

def test_transforms_of_fastai_run_in_views():
    x = torch.rand(6,3,32,32)
    off = dict(flip_p=0., jitter_p=0., gray_p=0., blur_p=0., ratio=(1,1))
    v = View(32, 1., 1., xtra_tfms=[Flip(p=1.),*aug_transforms(do_flip=False, max_rotate=0., max_zoom=1., max_warp=0., p_lighting=1.)], **off)
    assert [type(m.func.tfm).__name__ for m in v[1:3]]==['Flip','Brightness'] and 'Brightness' in str(v)
    y = v[:-1](x)
    assert type(y) is Tensor and (y.flip(-1)-x).abs().mean()<.3 and not torch.equal(y.flip(-1), x)
    assert len({round(o.item(), 4) for o in (y.flip(-1)/x).flatten(1).median(1)[0]})>1                  # per image
    v[-1] = Normalize.from_stats([.5]*3, [.25]*3, cuda=False)
    assert all(torch.equal(a, torch.full((3,), b)) for a,b in zip(stats_of([v]), (.5,.25))) and v(x).min()<-1

def test_parts_of_a_view_and_sums_are_views():
    x,v = torch.rand(2,3,32,32),View(16, .5, 1., xtra_tfms=(o for o in [K.RandomInvert(p=1.)]))
    n = len(v)
    assert isinstance(v[-2], K.RandomInvert) and type(v[:-1]) is View and v[:-1](x).min()>=0
    w = v+[K.RandomErasing()]
    assert type(w) is View and len(w)==n+1 and len(v)==n
    w += [nn.Identity()]
    assert type(w) is View and len(w)==n+2 and w(x).shape==(2,3,16,16)
    v[0].size = 8
    assert v.size==8 and v(x).shape==(2,3,8,8)
    assert 'partial(' in str(View(8, .5, 1., xtra_tfms=partial(torch.flip, dims=(-1,))))
