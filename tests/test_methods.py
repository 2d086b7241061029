"Every method on the one base: any backbone, saved and resumed, several processes as one"
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import dino_train, run_command
from self_supervised.lab import methods
from helpers import *
from test_distributed import launch
from test_resume import StopAfter

def learner(name, arch='convnet_mini', n_train=128, seed=0, n_local=1, **kwargs):
    set_seed(seed)
    dls = digits_dls()
    dls.train.n,dls.valid.n = n_train,64
    kw = dict(queue=64, queue_from=0) if name=='swav' else {}
    learn = method_learner(methods[name], dls, arch, get_digits_aug_pipelines((2,n_local)), **kw|kwargs)
    learn.remove_cbs(learn.cbs.filter(lambda o: isinstance(o, KNNMonitor)))
    return learn

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('arch', ['convnet_mini','vit_mini_patch4_16'])
def test_trains_any_backbone_and_comes_back(name, arch, tmp_path):
    learn = learner(name, arch)
    before,path = state(learn.model),tmp_path/'e.safetensors'
    with quiet(learn): learn.pretrain(1)
    assert math.isfinite(learn.recorder.values[-1][0]) and getattr(learn, name) is first(learn.cbs, lambda o: isinstance(o, methods[name]))
    assert any(k.startswith('student.0') for k in changed(learn.model, before))
    assert bool([k for k in changed(learn.model, before) if k.startswith('teacher.0')])==hasattr(learn.model, 'teacher')
    export_encoder(learn, path)
    x = torch.rand(2,3,16,16)
    torch.testing.assert_close(load_encoder(path).eval()(x), encoder_of(learn).eval()(x))
    learn.save(tmp_path/'whole')
    other = learner(name, arch, seed=1).load(tmp_path/'whole')
    assert not changed(other.model, state(learn.model))
    with quiet(other): other.pretrain(1)

@pytest.mark.parametrize('name', ['byol','moco','swav','lejepa'])
def test_a_resumed_run_of_any_method_equals_the_uninterrupted_one(name, tmp_path):
    def make(seed=0): return learner(name, n_train=3*64, seed=seed, cbs=GradientAccumulation(128))         # a step spans two epochs
    with quiet(whole := make()): whole.pretrain(2)
    with quiet(cut := make()), pytest.raises(KeyboardInterrupt): cut.pretrain(2, cbs=[RunCheckpoint(tmp_path), StopAfter(0)])
    with quiet(again := make(5)): again.pretrain(2, cbs=RunCheckpoint(tmp_path, resume=True))
    assert not changed(again.model, state(whole.model))

def test_a_step_of_two_batches_is_one_of_their_sum_for_a_teacher():
    "The teacher and the queue move once a real step"
    learn = learner('moco', cbs=GradientAccumulation(128))
    with quiet(learn): learn.pretrain(1)
    assert int(learn.model.queue.seen)==2*128 and learn.moco.accumulated=={}

PROCESSES = """
from self_supervised.lab import methods
from self_supervised.heads import mlp
for name,kind in methods.items():
    torch.manual_seed(3)
    enc   = MultiCropWrapper(nn.Sequential(nn.Flatten(), nn.Linear(12,6), nn.GELU()))
    head  = DINOHead(6, 7, hidden_dim=8, bottleneck_dim=5) if name in ('swav','dino') else mlp([6,8,5], use_bn=False)
    model = dict(dino=lambda: DINOModel(nn.Sequential(enc, head)), byol=lambda: TeacherStudentModel(nn.Sequential(enc, head), predictor=mlp([5,8,5], use_bn=False)), moco=lambda: MoCoModel(nn.Sequential(enc, head), Queue(16,5)),
                 swav=lambda: SwAVModel(nn.Sequential(enc, head), [Queue(8,5), Queue(8,5)]), simdino=lambda: TeacherStudentModel(nn.Sequential(enc, head))).get(name, lambda: StudentModel(nn.Sequential(enc, head)))()
    dls   = row_dls(26, {bs}, n_valid=4)
    learn = Learner(dls, model.double(), loss_func=noop, cbs=kind(FixedViews(), **({{'target':'sinkhorn'}} if name=='dino' else {{'queue_from':0}} if name=='swav' else {{}})))
    before = state(learn.model)
    set_seed(7)
    with learn.no_bar(), learn.no_logging():
        if {n}>1:
            with learn.distrib_ctx(cpu=True, sync_bn=False): learn.pretrain(2, .05, warmup_epochs=0)
        else: learn.pretrain(2, .05, warmup_epochs=0)
    torch.save(dict(model=state(learn.model), moved=changed(learn.model, before)), out/f'{{name}}.{n}.{{rank}}')
"""

def test_processes_train_every_method_as_one(tmp_path):
    for n,bs in ((2,2),(1,4)): launch(tmp_path, n, PROCESSES.format(n=n, bs=bs))
    for name in methods:
        one,a,b = (torch.load(tmp_path/f'{name}.{o}') for o in ('1.0','2.0','2.1'))
        assert one['moved']
        for k,v in a['model'].items():
            assert torch.equal(v, b['model'][k]), (name,k)       # the same in both processes
            if not k.startswith('queue'): torch.testing.assert_close(v, one['model'][k], rtol=1e-6, atol=1e-9, msg=lambda m: f'{name} {k}: {m}')

@pytest.fixture(scope='module')
def zeros(tmp_path_factory): return digits_path(tmp_path_factory.mktemp('digits'))/'test'/'0'

@pytest.mark.parametrize('name', methods)
def test_the_command_trains_with_every_method(name, tmp_path, capsys, monkeypatch, zeros):
    if name not in ('dino','lejepa'): monkeypatch.setattr('self_supervised.cli.train.run_pictures', noop)      # most of the time of a small run
    args = ['--path', str(zeros), '--method', name, '--arch', 'convnet_mini', '--size', '16', '--epochs', '1', '--batch-size-per-gpu', '16', '--num-workers', '0', '--local-crops-number', '1']
    for n_in in (3,1):
        out,report = tmp_path/f'{n_in}',[] if (name,n_in) in (('dino',1),('lejepa',3)) else ['--no-report']          # of one and of two networks
        assert run_command(dino_train, args+['--n-in', str(n_in), '--out', str(out), *report])==0, capsys.readouterr().err
        a,b = (load_encoder(out/o).eval()(torch.ones(1,n_in,16,16)) for o in ('encoder.safetensors','checkpoint.pth'))
        torch.testing.assert_close(a, b)
    if name!='dino':
        assert run_command(dino_train, args+['--teacher-temp', '.04', '--out', str(tmp_path/'no')])==2
        assert '--teacher-temp' in capsys.readouterr().err

def test_a_model_that_lacks_what_the_method_needs_is_said():
    dls,pipes = digits_dls(),get_digits_aug_pipelines((2,0))
    for make,model,lacks in ((byol_learner, create_simdino_model('convnet_mini', 8), 'predictor'), (moco_learner, create_byol_model('convnet_mini', 8), 'queue'), (swav_learner, create_lejepa_model('convnet_mini', 8), 'queues')):
        with pytest.raises(ValueError, match=f'no {lacks}'): make(dls, model, pipes).pretrain(1)
    with pytest.raises(ValueError, match='n_large=3'): swav_learner(dls, 'convnet_mini', get_digits_aug_pipelines((3,0)), large_crop_ids=(0,1,2), queue=16).pretrain(1)
    with pytest.raises(ValueError, match='count from 0'): DINO(pipes, large_crop_ids=(0,-1))

def test_settings_follow_what_a_loss_sees_and_what_a_step_sees():
    learn = learner('lejepa', cbs=GradientAccumulation(256))
    with quiet(learn): learn.pretrain(2)
    assert learn.lejepa.lam==.05                                 # of 64 images, not of 256
    learn = learner('moco', tmom_start=.999)
    with quiet(learn): learn.pretrain(1)
    assert learn.moco.tmom==.999
    learn = learner('lejepa')
    with quiet(learn):
        learn.continue_pretrain(2)
        learn.pretrain(1)
    assert [h['wd'] for h in learn.opt.hypers]==[0.,5e-4]*4      # a convnet; biases and norms are not decayed

@pytest.mark.parametrize('name', [*methods, 'distill'])
def test_errors_name_a_function_that_exists(name):
    import self_supervised.all as everything
    from self_supervised.vision.core import learner_name
    method = methods.get(name, everything.Distill)
    assert callable(getattr(everything, learner_name(method))) and learner_name(method).endswith('_learner')
