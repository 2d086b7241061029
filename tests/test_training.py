"A learner with DINO through everything that fastai lets one do with a learner"
import numpy as np, pytest, warnings
from fastai.vision.all import *
from fastai.callback.fp16 import MixedPrecision
from self_supervised.vision.dino import *
from self_supervised.vision.core import *
from self_supervised.features import *
from self_supervised.callbacks import *
import processes
from helpers import *

def learner(n=16, bs=4, cbs=None, opt_func=Adam, shuffle=False, path=None, model=None, **kwargs):
    return Learner(row_dls(n, bs, shuffle=shuffle), model or mlp_model(), loss_func=noop, opt_func=opt_func, path=path,
                   cbs=L(DINO(FixedViews(), **merge(dict(freeze_last_layer=0), kwargs)))+L(cbs))

@pytest.mark.usefixtures('double')
def test_accumulated_batches_equal_one_large_batch():
    states = []
    for bs,acc in ((8,None),(4,8),(2,8)):
        learn = learner(16, bs, GradientAccumulation(acc) if acc else None, tmom_start=.9, tmom_end=.9, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), clip=None)
        with quiet(learn): learn.fit(2, .1)
        states.append(state(learn.model))
        assert learn.dino.accumulated=={}
    for s in states[1:]:
        for k,v in s.items(): np.testing.assert_allclose(v, states[0][k], rtol=1e-10, atol=1e-12, err_msg=k)

def test_fit_dino_scales_lr_by_the_accumulated_batch():
    learn = learner(16, 4, GradientAccumulation(8))
    with quiet(learn): learn.fit_dino(1, lr=.256, warmup_epochs=0)
    assert learn.recorder.hps['lr'][0]==pytest.approx(.256*8/256)

class SkipAll(Callback):
    order = MixedPrecision.order
    def before_step(self): raise CancelStepException()

def test_a_skipped_step_moves_nothing():
    learn = learner()
    before = state(learn.model)
    with quiet(learn): learn.fit(1, cbs=SkipAll())
    assert changed(learn.model, before)==[]

class SkipSome(SkipAll):
    def before_step(self):
        if self.train_iter==1: raise CancelStepException()

def test_a_step_after_a_skipped_one_is_a_step_again():
    learn = learner(tmom_start=.5)
    with quiet(learn): learn.fit(1, cbs=SkipSome())
    assert not learn.dino.skipped and learn.dino.accumulated=={}
    assert torch.equal(learn.model.C!=0, torch.ones_like(learn.model.C, dtype=torch.bool))

@pytest.mark.parametrize('precision', ['bf16','fp16'])
def test_mixed_precision_on_a_cpu(precision):
    learn = digits_learner(n_train=128, precision=precision)
    with quiet(learn): learn.fit_dino(2)
    assert np.isfinite(learn.recorder.values[-1][0]) and not torch.is_autocast_enabled('cpu')
    assert learn.model.C.dtype==torch.float32 and changed(learn.model, state(digits_learner(n_train=128).model))

def test_an_overflow_in_fp16_skips_the_step():
    learn = digits_learner(n_train=128, cbs=[], precision='fp32')
    learn.add_cb(AnyMixedPrecision('fp16', init_scale=2.**60, growth_interval=10**6))
    before = state(learn.model)
    class Two(Callback):
        order = 98
        def after_batch(self):
            if self.train_iter==1: raise CancelFitException()
    with quiet(learn): learn.fit_dino(1, cbs=Two())
    moved = [k for k in changed(learn.model, before) if 'running' not in k and 'num_batches' not in k]          # batch statistics follow the forward
    assert moved==[]

def test_validation_moves_nothing():
    learn = learner()
    with quiet(learn): learn.fit(1)
    before,rng = state(learn.model),random.getstate()
    with quiet(learn): res = learn.validate()
    assert changed(learn.model, before)==[] and len(res)>=1 and np.isfinite(res[0])
    assert learn.loss_func is noop

def test_validate_without_validation_images_and_no_warnings_of_our_own():
    learn = digits_learner(n_train=128, precision='bf16')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.validate()
        learn.fit_dino(1)
        learn.validate()
        learn.get_preds(dl=learn.dls.train)
        learn.summary()
    assert [str(o.message) for o in w if 'shadowing' in str(o.message) or 'requires_grad' in str(o.message)]==[]

def test_a_preview_before_fit_changes_nothing():
    def run(preview):
        learn = digits_learner(n_train=128)
        if preview:
            learn.dino.show(2)
            learn.dino.show(2)
        with quiet(learn): learn.fit_dino(1)
        return state(learn.model)
    a,b = run(False),run(True)
    assert all(torch.equal(v, b[k]) for k,v in a.items())
    plt.close('all')

def test_lr_find_restores_everything(tmp_path):
    learn = digits_learner(n_train=256, path=tmp_path)
    before = state(learn.model)
    with quiet(learn): learn.lr_find(num_it=12, show_plot=False)
    assert changed(learn.model, before)==[] and isinstance(learn.loss_func, FeatureLoss)
    with quiet(learn): learn.fit_dino(1)
    assert changed(learn.model, before)

def test_show_training_loop_and_summary(capsys):
    learn = digits_learner(n_train=128)
    learn.show_training_loop()
    out = capsys.readouterr().out
    assert 'DINO' in out and 'CollapseMonitor' in out
    assert 'MiniConvNet' in str(learn.summary()) or 'Conv2d' in str(learn.summary())
    before = state(learn.model)
    preds,_ = learn.get_preds(dl=learn.dls.train)
    assert preds.shape==(128,128) and changed(learn.model, before)==[]

def test_a_second_fit_keeps_teacher_and_centre_and_restarts_schedules():
    learn = learner()
    with quiet(learn): learn.fit_dino(2, lr=.1, warmup_epochs=0)
    mid,opt = state(learn.model),learn.opt
    class First(Callback):
        def before_batch(self):
            if self.train_iter==0: self.start = state(self.model)
    with quiet(learn): learn.fit_dino(2, lr=.1, warmup_epochs=0, cbs=(f:=First()))
    assert all(torch.equal(v, mid[k]) for k,v in f.start.items())
    assert learn.opt is opt and learn.recorder.hps['lr'][0]==pytest.approx(.1*4/256)

class Interrupt(Callback):
    order = 11
    def after_pred(self):
        if self.training and self.train_iter==2: raise KeyboardInterrupt

@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_ctrl_c_and_fit_again(precision):
    learn = digits_learner(n_train=256, precision=precision)
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.fit_dino(1, cbs=Interrupt())
    assert isinstance(learn.loss_func, FeatureLoss) and not torch.is_autocast_enabled('cpu')
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())             # without fit_dino nothing puts the loss back ...
        learn.fit(1)                                                                     # ... and the next fit still knows which it was
    assert isinstance(learn.loss_func, FeatureLoss) and np.isfinite(learn.recorder.values[-1][0])

def test_ctrl_c_leaves_nothing_behind(tmp_path):
    learn = digits_learner(n_train=256, path=tmp_path)
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit_dino(1, cbs=[Interrupt(), History(tmp_path/'h.csv'), RunCheckpoint(tmp_path)])
    learn.export('x.pkl')                                                                # no open file in the learner
    with quiet(learn), pytest.raises(KeyboardInterrupt):
        with learn.added_cbs(Interrupt()): learn.lr_find(num_it=6, show_plot=False)
    learn.fit_dino(1)
    assert 'rankme' in learn.recorder.metric_names and np.isfinite(learn.recorder.values[-1][-1])

def test_a_precision_chosen_later_replaces_the_first():
    learn = digits_learner(n_train=128, precision='bf16')
    later = AnyMixedPrecision('fp16')
    learn.add_cb(later)
    with quiet(learn): learn.fit_dino(1)
    assert learn.mixed_precision is later and len(learn._grab_cbs(MixedPrecision))==1
    class Cancel(Callback):
        order = 11
        def after_pred(self):
            if self.training: raise CancelFitException()
    with quiet(learn): learn.fit_dino(1, cbs=Cancel())
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('y', [lambda n: torch.rand(n,3), lambda n: (torch.rand(n,5)>.5).long(), lambda n: torch.rand(n)])
def test_labels_of_other_kinds_do_no_harm(y):
    dls = digits_dls()
    for ds in (dls.train_ds,dls.valid_ds):
        ds.x,ds.y = ds.x[:128],y(128)
    for dl in dls: dl.n = 128
    learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,0)))
    with quiet(learn): learn.fit_dino(1)
    assert 'knn' not in learn.recorder.metric_names

def test_unfinished_accumulation_does_not_leak_into_the_next_fit():
    learn = learner(12, 4, GradientAccumulation(8), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), tmom_start=1.)
    with quiet(learn): learn.fit(1, 0.)                                                  # 3 batches: one is left over
    seen = []
    class Look(Callback):
        def before_batch(self): seen.append(all(p.grad is None or not p.grad.any() for p in self.model.parameters()))
    with quiet(learn): learn.fit(1, 0., cbs=Look())
    assert seen[0]

def test_start_epoch_gives_the_schedules_of_the_whole_run():
    whole = learner()
    with quiet(whole): whole.fit_dino(4, lr=.1, warmup_epochs=1)
    part = learner()
    with quiet(part): part.fit_dino(4, lr=.1, warmup_epochs=1, start_epoch=2)
    np.testing.assert_allclose(part.recorder.hps['lr'], whole.recorder.hps['lr'][8:], rtol=1e-7)

def test_frozen_and_shared_parameters():
    model = mlp_model()
    student = deepcopy(model.student)
    student[1].mlp[0].weight.requires_grad_(False)
    student.tied = student[1].mlp[2].weight                                              # a parameter with two names
    learn = learner(model=DINOModel(student))
    frozen = student[1].mlp[0].weight.clone()
    with quiet(learn): learn.fit_dino(2, lr=10., warmup_epochs=0)
    m = learn.model
    assert torch.equal(m.student[1].mlp[0].weight, frozen) and torch.equal(m.teacher[1].mlp[0].weight, frozen)
    assert not m.student[1].mlp[0].weight.requires_grad and m.teacher.tied is m.teacher[1].mlp[2].weight
    assert not torch.equal(m.teacher[1].mlp[2].weight, model.teacher[1].mlp[2].weight)

def test_save_and_load(tmp_path):
    learn = learner(path=tmp_path)
    with quiet(learn): learn.fit_dino(1, lr=1., warmup_epochs=0)
    learn.save('x')
    other = learner(path=tmp_path, model=mlp_model(seed=1), opt_func=learn.opt_func)
    other.splitter = learn.splitter
    other.load('x')
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in other.model.state_dict().items())
    assert torch.equal(learn.model.C, other.model.C) and learn.model.C.any()

def test_export_and_load_learner(tmp_path):
    learn = digits_learner(n_train=128, path=tmp_path)
    with quiet(learn): learn.fit_dino(1)
    learn.export('x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(tmp_path/'x.pkl')
    x = torch.rand(4,3,16,16)
    for who in ('teacher','student'): assert torch.equal(extract_features(other, [x], who=who)[0], extract_features(learn, [x], who=who)[0])
    other.dls = digits_dls(holdout=None)
    with quiet(other): other.fit_dino(1)                                                 # and it can be trained on
    assert np.isfinite(other.recorder.values[-1][0])

def test_an_unlabelled_folder_from_end_to_end(tmp_path):
    dls = unlabelled_dls(digits_path(tmp_path/'d')/'test', size=16, bs=64, num_workers=0, seed=1, path=tmp_path)
    learn = dino_learner(dls, 'vit_mini_patch4_16', get_digits_aug_pipelines())
    with quiet(learn): learn.fit_dino(1)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','teacher_entropy','kl','rankme','time']
    assert None not in learn.recorder.values[-1]
    learn.export('x.pkl')
    assert (tmp_path/'x.pkl').stat().st_size<5e6

def test_labels_in_the_dataloaders_change_nothing():
    def run(labelled):
        set_seed(3)
        dls = digits_dls(holdout=None)
        if not labelled: dls = DataLoaders(DataLoader(Rows(dls.train_ds.x), bs=64, shuffle=True, drop_last=True), DataLoader(Rows(dls.train_ds.x[:0]), bs=64), device=dls.device)
        torch.manual_seed(0)
        learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,0)))
        for dl in dls: dl.rng = random.Random(0)
        with quiet(learn): learn.fit_dino(1)
        return state(learn.model)
    a,b = run(True),run(False)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_plain_callables_as_pipelines_and_a_user_metric():
    learn = learner()
    learn.metrics = [lambda pred,*y: pred.mean()]
    with quiet(learn): learn.fit(1)
    assert len(learn.recorder.values[-1])==2+3

@pytest.mark.usefixtures('double')
def test_the_metrics_are_what_they_say():
    learn = learner()
    sums = []
    class Look(Callback):
        order = 13
        def after_loss(self):
            if self.training:
                t = self.dino.batch.teacher_out
                sums.append((self.loss.item(), teacher_entropy(t, self.model.C, self.dino.tpt).item()))
    with quiet(learn): learn.fit(1, cbs=Look())
    s = learn.view_stats
    loss,ent = np.mean(sums, 0)
    np.testing.assert_allclose([s['loss'],s['entropy'],s['kl'],s['ln_k']], [loss,ent,loss-ent,math.log(7)], rtol=1e-10)

def test_features_do_not_depend_on_normalize():
    learn = digits_learner(n_train=128)
    with quiet(learn): learn.fit_dino(1)
    feats = []
    for stats in (None, imagenet_stats, ([.2]*3,[.3]*3)):
        dls = digits_dls(device='cpu')
        if stats: dls.add_tfms([Normalize.from_stats(*stats, cuda=False)], 'after_batch')
        feats.append(extract_features(learn, dls.valid)[0])
    for f in feats[1:]: torch.testing.assert_close(f, feats[0], rtol=1e-4, atol=1e-5)

def test_the_readme_of_the_design_runs():
    "The example that must run as it stands, with smaller networks"
    x_large,x_small = [torch.randn(2,3,224,224)]*2,[torch.randn(2,3,96,96)]*4
    enc = MultiCropWrapper(deit_tiny(patch_size=32, drop_path_rate=0.1))
    student = nn.Sequential(enc, DINOHead(enc.encoder.embed_dim, 2**10, norm_last_layer=True))
    enc = MultiCropWrapper(deit_tiny(patch_size=32))
    teacher = nn.Sequential(enc, DINOHead(enc.encoder.embed_dim, 2**10, norm_last_layer=True))
    model = DINOModel(student, teacher)
    assert isinstance(model.student[1], DINOHead)
    assert model.student(x_large+x_small).shape==(12,1024)

TWO = """
from helpers import *
import torch.distributed as dist
rank = int(os.environ['RANK'])
dist.init_process_group('gloo', init_method='file://{store}', rank=rank, world_size=2)
learn = Learner(row_dls(8, 4, seed=rank), mlp_model(), loss_func=noop, cbs=DINO(FixedViews(), tmom_start=1.))
with quiet(learn): learn.fit(1, 0.)
torch.save(learn.model.C, '{store}.%d' % rank)
"""

def test_the_centre_is_that_of_all_processes(tmp_path):
    ps = [processes.Forked(processes.code, TWO.format(store=tmp_path/'store'), RANK=str(r), WORLD_SIZE='2') for r in (0,1)]
    assert [p.wait(120) for p in ps]==[0,0]
    c0,c1 = (torch.load(f'{tmp_path}/store.{r}') for r in (0,1))
    model,C = mlp_model(),torch.zeros(1,7)
    for b in range(2):
        x = [row_dls(8, 4, seed=r).train_ds.x[4*b:4*b+4] for r in (0,1)]
        out = torch.cat([model.teacher([p(o) for p in FixedViews()[:2]]) for o in x])
        C = .9*C + .1*out.mean(0, keepdim=True)
    assert torch.equal(c0, c1)
    torch.testing.assert_close(c0, C)
