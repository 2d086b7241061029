"The batch that fits: the trial step is the method's own, whatever the method, its terms and its precision"
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from helpers import changed, state
from self_supervised import memory

learners = dict(dino=dino_learner, byol=byol_learner, moco=moco_learner, swav=swav_learner, simclr=simclr_learner, barlow=barlow_learner, lejepa=lejepa_learner, simdino=simdino_learner)

def dls_of(bs=16): return digits_dls(16, bs=bs, holdout=None, device='cpu')

@pytest.mark.parametrize('name,kwargs', [*((n,{}) for n in learners), ('dino',dict(arch='vit_mini_patch4_16', parts=[IBOT(),KoLeo()])), ('dino',dict(precision='bf16')), ('dino',dict(precision='fp16'))])
def test_a_trial_step_leaves_nothing(name, kwargs):
    kwargs = dict(arch='convnet_mini')|kwargs
    learn = learners[name](dls_of(), kwargs.pop('arch'), get_digits_aug_pipelines((2,1)), **kwargs)
    before,random_before = state(learn.model),torch.get_rng_state()
    assert step_fits(learn, peek(learn.dls, 1)[0], 8)
    assert changed(learn.model, before)==[] and torch.equal(torch.get_rng_state(), random_before)
    assert all(c.learn is learn for c in learn.cbs) and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

@pytest.mark.parametrize('name', learners)
def test_a_batch_that_does_not_fit_is_halved_and_accumulated(monkeypatch, name):
    "Memory that ends above 4 images, within the method's own loss"
    make = learners[name]
    method = first(c for c in make(dls_of(), 'convnet_mini', get_digits_aug_pipelines((2,1))).cbs if hasattr(c, 'make_views')).__class__
    views = method.make_views
    def full(self, x):
        if len(x)>4: raise torch.OutOfMemoryError('out of memory')
        return views(self, x)
    monkeypatch.setattr(method, 'make_views', full)
    learn = make(dls_of(), 'convnet_mini', get_digits_aug_pipelines((2,1)), bs='auto')
    assert learn.dls.train.bs==4 and first(c for c in learn.cbs if isinstance(c, GradientAccumulation)).n_acc==16
    with pytest.raises(ValueError, match="pass 'auto'"): make(dls_of(), 'convnet_mini', bs='half')

def test_memory_of_the_patch_logits_is_counted():
    plain,ibot = (create_dino_model('vit_mini_patch4_16', 64, parts=p) for p in ((),[IBOT(mask_p=.5, mask_ratio=(.1,.5))]))
    a,b = (step_memory(m, [16,16,8], 32)['logits'] for m in (plain,ibot))
    masked = 2*32*16*.5*.3                                       # global crops, images, patches, share of the crops, of their patches
    assert np.isclose(b-a, 7*64*masked*4/1e9, rtol=.01)
    assert 'logits' in memory_advice(ibot, [16,16,8], 32)
