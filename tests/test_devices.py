"Pure functions on tensors of a GPU: none makes a tensor on the CPU beside them"
import numpy as np, pytest, torch, warnings
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.objectives import *
from self_supervised.evaluation.retrieval import average_precision, retrieval_scores
from self_supervised.evaluation.copydetection import *
from self_supervised.evaluation.linear import *
from self_supervised.evaluation.lowshot import *
from self_supervised.evaluation.knn import *
from self_supervised.evaluation.segmentation import *
from self_supervised.evaluation.video import *
from emulated import *
from helpers import *

def r(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def probs(*shape): return r(*shape).softmax(-1)
y  = torch.arange(24)%3
ft = r(24,6)+F.one_hot(y, 6)*3
mask = torch.tensor([[True,True,False,False],[False,True,False,True]])
nan  = torch.full((4,3), torch.nan)
gnd  = [dict(easy=[1,2], hard=[3], junk=[4]), dict(easy=[5], hard=[6], junk=[])]
attn,labels = r(2,4,4).softmax(-1),torch.zeros(8,8, dtype=torch.long)
one = labels.clone(); one[2:5,2:5] = 1
onehot = F.one_hot(torch.arange(9)%2).float().T.view(2,3,3)

calls = dict(
    dino_loss=(dino_loss, r(12,5), r(8,5), r(1,5)), linear_pair_loss=(linear_pair_loss, r(12,4), r(5,4), probs(8,5)), teacher_entropy=(teacher_entropy, r(8,5), r(1,5)),
    kl=(kl, r(12,5), r(8,5), r(1,5)), update_center=(update_center, r(1,5), r(5)), sinkhorn_knopp=(sinkhorn_knopp, r(8,5)), mse_pair_loss=(mse_pair_loss, r(12,5), probs(8,5)),
    byol_loss=(byol_loss, r(12,5), r(8,5)), moco_loss=(moco_loss, r(12,5), r(8,5), r(9,5)), simclr_loss=(simclr_loss, r(8,5)), barlow_loss=(barlow_loss, r(8,5)),
    distill_loss=(distill_loss, r(12,5), r(8,5)), coding_rate=(coding_rate, r(12,5)), simdino_loss=(simdino_loss, r(12,5), r(8,5)), lejepa_loss=(lejepa_loss, r(8,5), r(7,5)),
    koleo=(koleo, r(8,5)), ibot_loss=(ibot_loss, r(4,5), probs(4,5), mask), rankme=(rankme, r(20,5)), rankme_of_nan=(rankme, nan), alpha_req=(alpha_req, r(20,5)),
    alpha_req_of_nan=(alpha_req, nan), alpha_req_of_one=(alpha_req, torch.ones(4,3)),
    average_precision=(average_precision, torch.tensor([0,3,5]), 4), retrieval_scores=(retrieval_scores, r(2,6), r(9,6), gnd), gem=(gem, r(2,3,3,4)), whiten=(lambda f: Whiten(f)(f), r(30,4)),
    copy_scores=(copy_scores, r(3,6), r(9,6), [1,4,8]), knn_classifier=(knn_classifier, ft, y, ft+.1, 5), accuracy_of=(accuracy_of, r(24,3), y),
    logistic_classifier=(lambda f,y: logistic_classifier(f, y).score(np.asarray(ft), np.asarray(y.cpu())), ft, y), lowshot_scores=(lowshot_scores, ft, y, ft, y, .5, 2),
    draw_labels=(draw_labels, y, 2), sweep_features=(lambda *a: sweep_features(*a, lrs=(.1,1.), epochs=2, bs=8)[0].iloc[:,1:].to_numpy(float), ft, y, ft, y), group_split=(group_split, y, [i//2 for i in range(24)]),
    mass_mask=(mass_mask, attn), jaccard=(jaccard, attn>.2, attn>.3), head_jaccards=(head_jaccards, attn, one), head_jaccards_of_none=(head_jaccards, attn, labels),
    propagate=(propagate, r(3,3,3,4), onehot), masks_from_maps=(masks_from_maps, onehot[None], (2,2)), mask_j=(mask_j, one>0, one.roll(1)>0), mask_f=(mask_f, one>0, one.roll(1)>0), video_scores=(lambda *a: video_scores(*a), one.repeat(6,1,1), one.roll(1).repeat(6,1,1)))

@pytest.mark.parametrize('name', calls)
def test_a_pure_function_on_a_gpu(name):
    f,*args = calls[name]
    want = f(*[o.clone() if isinstance(o, Tensor) else o for o in args])
    with gpu(): got = f(*[on_gpu(o) if isinstance(o, Tensor) else o for o in args])
    for a,b in zip(*(o if isinstance(o, tuple) else (o,) for o in (want,got))):
        if isinstance(b, OnGPU): a,b = a.numpy(),here(b).detach().numpy()
        if isinstance(a, dict): a,b = ([str(v) for v in o.values()] for o in (a,b))
        np.testing.assert_equal(a, b) if isinstance(a, list) else np.testing.assert_allclose(a, b, rtol=1e-5)
    floats = isinstance(want, Tensor) and any(isinstance(o, Tensor) and o.is_floating_point() for o in args) and name not in ('copy_scores','masks_from_maps')
    if floats: assert isinstance(got, OnGPU), "a result on the CPU"

def test_the_tensor_refuses_what_a_gpu_refuses():
    a,b = on_gpu(r(3)),r(3)
    with gpu() as waits:
        for wrong in (lambda: a+b, lambda: b@a, lambda: torch.cat([a,b]), lambda: b[on_gpu(torch.tensor([0]))], lambda: a+torch.arange(3), lambda: torch.where(a>0, a, b)):
            with pytest.raises(RuntimeError, match='device|CPU'): wrong()
        with pytest.raises(TypeError): a.numpy()
        assert isinstance(torch.arange(3, device=a.device)+a, OnGPU) and isinstance(a[torch.tensor([0])], OnGPU) and not isinstance(a.cpu()+b, OnGPU) and isinstance(b.to(a)+a, OnGPU)
        assert not waits.by('nowhere') and waits.by()==3         # a CPU index, and two copies
        assert not isinstance(to_detach(a), OnGPU) and waits.by()==4

def test_what_waits_for_a_gpu_is_counted():
    x,i,m = r(4,3),torch.tensor([0,2]),torch.tensor([True,False,True,True])
    def waits(f):
        with gpu() as w: f(on_gpu(x), on_gpu(i), on_gpu(m))
        return w.by()
    for f in (lambda x,i,m: x.sum().item(), lambda x,i,m: x[m], lambda x,i,m: x[[0,2]], lambda x,i,m: m.nonzero(), lambda x,i,m: x.tolist(), lambda x,i,m: bool(m.any()), lambda x,i,m: x.cpu(),
              lambda x,i,m: torch.tensor([1.], device='cuda'), lambda x,i,m: torch.ones(3).to('cuda'), lambda x,i,m: x[0].copy_(torch.ones(3)), lambda x,i,m: i.repeat_interleave(i),
              lambda x,i,m: x.new_tensor([1.]), lambda x,i,m: x.masked_select(m[:,None]), lambda x,i,m: torch.linalg.cholesky(x.T@x), lambda x,i,m: x.to('cpu', torch.float64)): assert waits(f)==1
    for f in (lambda x,i,m: x[i], lambda x,i,m: x.sum(), lambda x,i,m: torch.where(m[:,None], x, 0.), lambda x,i,m: torch.zeros(3, device='cuda'), lambda x,i,m: torch.arange(3, device=x.device)+x[0],
              lambda x,i,m: torch.ones(3).pin_memory().to('cuda', non_blocking=True), lambda x,i,m: i.repeat_interleave(i, output_size=2), lambda x,i,m: x.new_full((), 2.), lambda x,i,m: x[0].fill_(1.),
              lambda x,i,m: torch.linalg.cholesky_ex(x.T@x), lambda x,i,m: x.to(torch.float64)): assert waits(f)==0

def test_a_module_on_the_gpu_keeps_its_parameters():
    "Those of an optimizer, as `nn.Module.to` does, and comes back"
    with gpu():
        m   = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4))
        opt,w = torch.optim.AdamW(m.parameters(), .1),m[0].weight
        m.to('cuda')
        assert m[0].weight is w and isinstance(w, nn.Parameter) and (w.device.type,m[1].running_mean.device.type)==('cuda','cuda')
        m(on_gpu(r(5,3))).square().sum().backward()
        before = here(w).clone()
        opt.step()
        assert w.grad.device.type=='cuda' and not torch.equal(here(w), before) and isinstance(deepcopy(m)[0].weight, OnGPU)
        with pytest.raises(RuntimeError, match='same device'): m(r(5,3))
        assert type(m.cpu()[0].weight) is nn.Parameter

def few(n=48, m=24, bs=24):
    "Some digits, with labels, on a device"
    dls = digits_dls(bs=bs)
    for ds,k in ((dls.train_ds,n),(dls.valid_ds,m)):
        for a in 'xy': setattr(ds, a, getattr(ds, a)[:k])
    dls.train.n,dls.valid.n = n,m
    return dls

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    d = tmp_path_factory.mktemp('images')
    for i in range(3):
        Image.fromarray((255*here(r(24,24,3,seed=i)).sigmoid()).byte().numpy()).save(d/f'{i}.png')
        Image.fromarray(np.pad(np.full((8,12), 1, np.uint8), ((4,12),(4,8)))).save(d/f'{i}_mask.png')
    return [d/f'{i}.png' for i in range(3)],[d/f'{i}_mask.png' for i in range(3)]

protocols = dict(                                                # of an encoder, digits, files of images and of masks, and a function that moves to the device
    features      = lambda e,d,f,m,to: extract_features(e, d.valid),
    blocks        = lambda e,d,f,m,to: extract_features(e, d.valid, n_blocks=2, avgpool=True, stats=([.5]*3,[.2]*3)),
    patches       = lambda e,d,f,m,to: extract_features(e, d.valid, tokens='patch', dtype=torch.float64),
    knn           = lambda e,d,f,m,to: knn_accuracy(e, d, k=5),
    linear        = lambda e,d,f,m,to: linear_accuracy(e, d),
    lowshot       = lambda e,d,f,m,to: lowshot_accuracy(e, d, draws=1),
    probe         = lambda e,d,f,m,to: (set_seed(0), linear_probe(e, d, epochs=1, lrs=(.1,)))[1],
    crops         = lambda e,d,f,m,to: (set_seed(0), linear_probe(e, d, epochs=1, lrs=(.1,), augment=probe_view(16)))[1],
    unlabelled    = lambda e,d,f,m,to: rank_table({'a':e}, d.valid),
    attention     = lambda e,d,f,m,to: (attention_maps(e, to(r(2,3,16,16))), attention_maps(e, to(r(2,3,16,16)), query=(1,2), block=0)),
    segmentation  = lambda e,d,f,m,to: attention_segmentation(e, list(zip(f, m)), size=16),
    video         = lambda e,d,f,m,to: segment_video(e, f, m[0], size=16),
    copydetection = lambda e,d,f,m,to: copy_detection(e, f, distractors=f[:1], attacks=dict(blur=ATTACKS['blur']), size=16),
    retrieval     = lambda e,d,f,m,to: retrieval_features(e, f, size=16))

def _numbers(o):
    if isinstance(o, (tuple,list)): return [n for v in o for n in _numbers(v)]
    if isinstance(o, dict): return _numbers(list(o.values()))
    if isinstance(o, pd.DataFrame): return [o.select_dtypes('number').to_numpy(float)]
    return [here(o).detach().numpy() if isinstance(o, Tensor) else o] if isinstance(o, (Tensor,float,int,np.ndarray)) else []

@pytest.mark.parametrize('name', protocols)
def test_a_protocol_on_a_gpu_gives_what_a_cpu_gives(name, images):
    def run(device):
        torch.manual_seed(0)
        enc = create_encoder('vit_mini_patch4_16').to(device)
        return _numbers(protocols[name](enc, few().to(device), *images, lambda x: x.to(device)))
    want = run('cpu')
    with gpu(): got = run('cuda')
    assert len(want)==len(got)>0
    for a,b in zip(want, got): np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)

def test_extraction_waits_once_per_batch():
    "For its features: labels and the range of the images arrive before them"
    with gpu() as waits:
        enc = create_encoder('vit_mini_patch4_16').to('cuda')
        set_encoder_stats(enc, *imagenet_stats)
        batches = [(on_gpu(r(4,3,16,16).sigmoid()), on_gpu(torch.arange(4))) for _ in range(5)]
        before  = waits.by()
        feats,y = extract_features(enc, batches)
        assert waits.by()-before==5 and feats.shape==(20,64) and not isinstance(feats, OnGPU) and y.tolist()==[0,1,2,3]*5
        batches[3] = batches[3][0]*5,batches[3][1]
        with pytest.raises(ValueError, match='images from 0.* to [34].*because the model normalises'): extract_features(enc, batches)

def test_a_run_on_a_gpu_with_all_that_looks_at_it(tmp_path):
    "Monitors, checkpoint, history, notes, validation, predictions, and a table with its bar; resumed; and images that are kept on the GPU"
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        def make(dls=None): return dino_learner(dls or few().to('cuda'), 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=16)
        learn = make()
        learn.add_cb(KNNMonitor(few().to('cuda'), k=5))
        cbs = [RunCheckpoint(tmp_path),History(tmp_path/'history.csv'),RunNotes(tmp_path)]
        with learn.no_logging(): learn.fit_dino(1, cbs=cbs)
        assert all(map(math.isfinite, learn.recorder.values[-1])) and all(o.device.type=='cpu' for o in learn.recorder.losses)
        learn.recorder.plot_loss(); learn.dino.show(2); learn.validate()
        assert len(learn.get_preds()[0])==24
        saved = torch.load(tmp_path/'checkpoint.pth', weights_only=True)
        assert type(saved['model']['student.0.encoder.0.0.weight']) is Tensor
        with quiet(again := make()): again.fit_dino(2, cbs=RunCheckpoint(tmp_path, resume=True))
        export_encoder(again, tmp_path/'e.safetensors')
        dls = unlabelled_dls(digits_path(tmp_path/'digits')/'test'/'0', 16, 16, num_workers=0, path=tmp_path, device='cuda', cache=True)
        with quiet(cached := make(dls)): cached.fit_dino(1)
        assert isinstance(dls.train_ds.x, OnGPU) and math.isfinite(cached.recorder.values[-1][0])

def test_a_probe_waits_for_no_step():
    "Batches of features are copied from pinned memory"
    def waits(epochs):
        with gpu() as w: sweep_features(ft, y, ft, y, lrs=(.1,), epochs=epochs, bs=8, device=torch.device('cuda'))
        return w.by()
    assert waits(1)==waits(3)>0
