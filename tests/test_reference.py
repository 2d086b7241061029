"Student, teacher, centre and all schedules, step by step, against the reference's formulas written out plainly"
import numpy as np, pytest
from fastai.vision.all import *
from self_supervised.vision.dino import *
from self_supervised.schedules import *
from helpers import *

pytestmark = pytest.mark.usefixtures('double')
EPOCHS,N,BS = 3,16,4

class Watch(Callback):
    "What the run did at each step"
    order = 99
    def before_fit(self): self.log = []
    def after_step(self):
        h = self.opt.hypers
        self.log.append(dict(loss=self.learn.loss.item(), lr=h[0]['lr'], lr_last=h[-1]['lr'], wd=[o['wd'] for o in h], tmom=self.dino.tmom, tpt=self.dino.tpt,
                             model=state(self.learn.model)))

def softmax(x): e = np.exp(x-x.max(-1, keepdims=True)); return e/e.sum(-1, keepdims=True)

def plain_cosine(base, final, n, warmup=0):
    i = np.arange(n-warmup)
    return np.concatenate([np.linspace(0, base, warmup), final+.5*(base-final)*(1+np.cos(np.pi*i/len(i)))])

def plain_run(model, x, lr, lr_min, warmup, wd, tmom, tpts, clip, freeze, tps=.1, cmom=.9):
    "DINO with AdamW in plain loops; gradients by autograd, everything else by hand"
    S = {k:v.clone().requires_grad_(k!='1.last_layer.weight_g') for k,v in model.student.state_dict().items()}
    T,C = {k:v.detach().clone() for k,v in S.items()},torch.zeros(1,7,dtype=torch.float64)
    m1,m2 = ({k:torch.zeros_like(v) for k,v in S.items()} for _ in range(2))
    steps = {k:0 for k in S}
    def forward(P, v):
        h = v.flatten(1)@P['0.encoder.1.weight'].T + P['0.encoder.1.bias']
        g = lambda o: o*.5*(1+torch.erf(o/2**.5))
        h = g(h)
        for i in (0,2,4):
            h = h@P[f'1.mlp.{i}.weight'].T + P[f'1.mlp.{i}.bias']
            if i<4: h = g(h)
        h = h/h.norm(dim=1, keepdim=True)
        v = P['1.last_layer.weight_v']
        return h@(P['1.last_layer.weight_g']*v/v.norm(dim=1, keepdim=True)).T
    total = EPOCHS*N//BS
    lrs,wds,moms = plain_cosine(lr, lr_min, total, warmup),plain_cosine(*wd, total),plain_cosine(*tmom, total)
    log,it = [],0
    for epoch in range(EPOCHS):
        for b in range(N//BS):
            xb = x[b*BS:(b+1)*BS]
            views = [p(xb) for p in FixedViews()]
            with torch.no_grad(): t = [forward(T, v) for v in views[:2]]
            s = [forward(S, v) for v in views]
            loss,n = 0.,0
            for i in range(2):
                q = torch.softmax((t[i]-C)/tpts[epoch], -1)
                for v in range(3):
                    if v==i: continue
                    loss,n = loss - (q*torch.log_softmax(s[v]/tps,-1)).sum(-1).mean(),n+1
            loss = loss/n
            for p in S.values(): p.grad = None
            loss.backward()
            C = cmom*C + (1-cmom)*torch.cat(t).mean(0, keepdim=True)
            for k,p in S.items():
                if p.grad is None: continue
                g = p.grad*min(1., clip/(p.grad.norm().item()+1e-6)) if clip else p.grad
                if epoch<freeze and 'last_layer' in k: continue
                decay = 0. if k.endswith('.bias') or p.ndim==1 else wds[it]
                steps[k] += 1
                with torch.no_grad():
                    p *= 1-lrs[it]*decay
                    m1[k] = .9*m1[k]+.1*g
                    m2[k] = .999*m2[k]+.001*g*g
                    p -= lrs[it]*(m1[k]/(1-.9**steps[k]))/((m2[k]/(1-.999**steps[k])).sqrt()+1e-8)
            with torch.no_grad(): T = {k: moms[it]*T[k]+(1-moms[it])*S[k] for k in T}
            log.append(dict(loss=loss.item(), lr=lrs[it], wd=wds[it], tmom=moms[it], tpt=tpts[epoch], S={k:v.detach().clone() for k,v in S.items()}, T=T, C=C))
            it += 1
    return log

def both_runs(warmup_epochs, clip=.02, freeze=1, norm_last_layer=True):
    model,dls = mlp_model(norm_last_layer=norm_last_layer),row_dls(N, BS)
    learn = Learner(dls, model, loss_func=noop, cbs=[DINO(FixedViews(), tmom_start=.9, tpt_start=.04, tpt_end=.07, tpt_warmup_pct=2/3, clip=clip, freeze_last_layer=freeze), Watch()])
    x = torch.stack([dls.train_ds[i][0] for i in range(N)])
    plain = plain_run(model, x, .02, 1e-4, int(warmup_epochs*N/BS), (.04,.4), (.9,1.), [.04,.07,.07], clip, freeze) if norm_last_layer else None
    with quiet(learn): learn.fit_dino(EPOCHS, lr=.02, lr_min=1e-4, warmup_epochs=warmup_epochs, scale_lr=False)
    return learn,learn.watch.log,plain

def compare(ours, plain, rtol, atol):
    assert len(ours)==len(plain)==EPOCHS*N//BS
    for a,b in zip(ours, plain):
        for k in ('loss','lr','tmom','tpt'): np.testing.assert_allclose(float(a[k]), b[k], rtol=rtol, atol=atol, err_msg=k)
        np.testing.assert_allclose(a['wd'], [0.,b['wd']], rtol=1e-12)
        for k,v in b['S'].items(): np.testing.assert_allclose(a['model'][f'student.{k}'], v, rtol=rtol, atol=atol, err_msg=k)
        for k,v in b['T'].items(): np.testing.assert_allclose(a['model'][f'teacher.{k}'], v, rtol=rtol, atol=atol, err_msg=k)
        np.testing.assert_allclose(a['model']['C'], b['C'], rtol=rtol, atol=atol)

def test_equal_to_the_formulas():
    _,ours,plain = both_runs(0)
    compare(ours, plain, 1e-10, 1e-12)

def test_equal_to_the_formulas_with_warmup():
    _,ours,plain = both_runs(1)
    compare(ours, plain, 1e-5, 1e-7)

def test_without_clip_and_freeze():
    _,ours,plain = both_runs(0, clip=None, freeze=0)
    compare(ours, plain, 1e-10, 1e-12)

def test_the_last_layer_is_frozen_for_its_epochs_exactly():
    learn,log,_ = both_runs(0, freeze=2)
    first = learn.watch.log[0]['model']['student.1.last_layer.weight_v']
    moved = [not torch.equal(o['model']['student.1.last_layer.weight_v'], first) for o in log]
    assert moved==[False]*8+[True]*4

def test_weight_g_is_decayed_when_it_is_learned():
    model = mlp_model(norm_last_layer=False)
    no_decay,decay = dino_splitter(model)
    assert any(p is model.student[1].last_layer.weight_g for p in decay)
    assert not any(p is q for p in no_decay+decay for q in model.teacher.parameters())

@pytest.mark.parametrize('mom', [0.,1.])
def test_teacher_momentum_of_zero_and_one(mom):
    model = mlp_model()
    learn = Learner(row_dls(), model, loss_func=noop, cbs=DINO(FixedViews(), tmom_start=mom, tmom_end=mom, freeze_last_layer=0))
    before = state(model)
    with quiet(learn): learn.fit_dino(1, lr=.1, warmup_epochs=0)
    for (k,t),s in zip(model.teacher.state_dict().items(), model.student.state_dict().values()):
        assert torch.equal(t, s if mom==0 else before[f'teacher.{k}']), k
    assert changed(model.student, {k[8:]:v for k,v in before.items() if k.startswith('student.')})

def test_no_gradient_reaches_the_teacher():
    model = mlp_model()
    learn = Learner(row_dls(), model, loss_func=noop, cbs=DINO(FixedViews()))
    seen = []
    class Look(Callback):
        order = 5
        def after_backward(self): seen.append([p.grad for p in self.model.teacher.parameters()])
    with quiet(learn): learn.fit(1, cbs=Look())
    assert seen and all(g is None for gs in seen for g in gs)
