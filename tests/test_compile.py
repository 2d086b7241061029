"What is compiled computes the same; modes, CUDA graphs and TF32 as far as a CPU shows them"
import contextlib, pytest, torch
from fastai.vision.all import *
from self_supervised.all import *
from helpers import *

def fitted(monkeypatch=None, epochs=1, n_train=64, arch='convnet_mini', **kwargs):
    if monkeypatch is not None:                                  # without Inductor, whose code takes a compiler minutes
        compile_ = torch.compile
        monkeypatch.setattr(torch, 'compile', lambda *a, **k: compile_(*a, backend='eager', **{o:v for o,v in k.items() if o!='mode'}))
    learn = digits_learner(0, n_train=n_train, arch=arch, drop_path_rate=0., **({'cbs':[]}|kwargs))
    with quiet(learn): learn.fit_dino(epochs)
    return learn

def test_a_compiled_learner_learns_the_same_without_inductor(monkeypatch):
    a,b = fitted(),fitted(monkeypatch, compile=True)
    assert all(n[0]._compiled_call_impl is not None for n in (b.model.student,b.model.teacher)) and a.model.state_dict().keys()==b.model.state_dict().keys()
    assert np.allclose(a.recorder.values[0][:3], b.recorder.values[0][:3], rtol=1e-4)
    for (k,v),w in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.allclose(v, w, atol=1e-4), k

def test_modes_of_compile(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, mode=None: modes.append((type(self).__name__,mode)))
    for how in (True,'reduce-overhead','max-autotune'):
        learn = digits_learner(0, n_train=128, compile=how)
        assert any(isinstance(o, GraphMemory) for o in learn.cbs)==(how is not True)
    assert modes==[('MultiCropWrapper',m) for m in ('default','reduce-overhead','max-autotune') for _ in range(2)]
    with pytest.raises(ValueError, match="compile='fast': pass True, False, or one of 'default', 'reduce-overhead'"): digits_learner(0, n_train=128, compile='fast')

def test_graphs_may_reuse_their_memory_in_each_batch(monkeypatch):
    steps,feats = [],[]
    monkeypatch.setattr(nn.Module, 'compile', lambda self, mode=None: None)
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: steps.append(1))
    class Feats(Callback):
        order = MultiView.order-.05
        def before_batch(self): assert len(steps)==self.train_iter+1                     # before the crops and the teacher
        def after_step(self): feats.append(self.learn.global_feats)
        def after_batch(self): feats.append(self.dino.monitored_feats(self.dino.batch))
    learn = digits_learner(0, n_train=128, compile='reduce-overhead', cbs=[Feats()])
    with quiet(learn): learn.fit_dino(1)
    assert len(steps)==len(learn.dls.train)
    a,b = feats[:2]
    assert torch.equal(a, b) and a.data_ptr()!=b.data_ptr()      # monitors see a copy
    learn = digits_learner(0, n_train=128, compile='reduce-overhead', cbs=[GradientAccumulation(64)])
    with quiet(learn), pytest.raises(ValueError, match='leave GradientAccumulation out'): learn.fit_dino(1)

def test_tf32_is_on_during_a_fit_on_a_gpu_only(monkeypatch):
    was,seen = torch.get_float32_matmul_precision(),[]
    class Seen(Callback):
        order = TF32.order+.1
        stop = False
        def after_batch(self):
            seen.append(torch.get_float32_matmul_precision())
            if self.stop: raise KeyboardInterrupt
    learn = digits_learner(0, n_train=128, tf32=True, cbs=[watch := Seen()])
    with quiet(learn): learn.fit_dino(1)
    assert set(seen)=={was}                                      # a CPU has none
    class Gpu: type = 'cuda'
    real = TF32.before_fit
    def on_a_gpu(self):
        with monkeypatch.context() as m:
            m.setattr(Tensor, 'device', Gpu())
            real(self)
    monkeypatch.setattr(TF32, 'before_fit', on_a_gpu)
    for watch.stop in (False,True):
        seen.clear()
        with quiet(learn), contextlib.suppress(KeyboardInterrupt): learn.fit_dino(1)
        assert set(seen)=={'high'} and torch.get_float32_matmul_precision()==was
    assert not any(isinstance(o, TF32) for o in digits_learner(0, n_train=128).cbs)

def rounded(x, bits):
    "float32 with so many bits of mantissa, to the nearest"
    drop = 23-bits
    i = x.view(torch.int32)
    return ((i+(1<<(drop-1)))&-(1<<drop)).view(torch.float32)

def test_tf32_keeps_the_targets_where_bfloat16_does_not():
    set_seed(0)
    t,w = (F.normalize(torch.randn(n, 256), dim=-1) for n in (64,4096))
    def targets(bits): return teacher_probs(rounded(t, bits)@rounded(w, bits).T, torch.zeros(1,4096), .04)
    tf32,bf16 = ((targets(b)/teacher_probs(t@w.T, torch.zeros(1,4096), .04)-1).abs().mean().item() for b in (10,7))
    assert 2e-4<tf32<6e-4 and 2e-3<bf16<5e-3, (tf32,bf16)
    assert (rounded(t, 7)-t.bfloat16().float()).abs().max()<2e-9     # ties are rounded otherwise
