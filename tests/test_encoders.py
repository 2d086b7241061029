"What stands for an image, and what is switched on a backbone, across modules"
import numpy as np, pytest, warnings
from fastai.vision.all import *
from fastai.callback.fp16 import MixedPrecision
from self_supervised.all import *
from self_supervised.features import encode
from helpers import *

small = dict(depth=2, embed_dim=48, num_heads=3, patch_size=4)

def tiny(arch, img_size=16, **kwargs):
    "A network of a published kind, two blocks deep"
    enc = create_encoder(arch, **merge(small, dict(img_size=img_size), kwargs)).eval()
    torch.manual_seed(0)
    for p in enc.parameters(): p.data += .1*torch.randn_like(p)
    return enc

families = ('vit_small_patch16_224','vit_small_patch16_dinov3','eva02_tiny_patch14_224','beit_base_patch16_224','deit_tiny_distilled_patch16_224','vit_small_patch14_reg4_dinov2')
named    = ('class token','mean of patches','mean of patches','mean of patches','class and distillation token','class token')

@pytest.mark.parametrize('arch,feature', list(zip(families, named)))
def test_one_feature_stands_for_an_image(arch, feature):
    "k-NN, the linear probe, copy detection, training and timm itself read the same"
    enc,x = tiny(arch),torch.rand(4,3,16,16)
    assert image_feature(enc)==feature
    with torch.no_grad():
        want = enc(x)
        test_close(encode(enc, x), want, 1e-5)
        test_close(encode(enc, x, n_blocks=2)[:,48:], want, 1e-5)
        test_close(MultiCropWrapper(enc)(x), want, 1e-5)
        test_close(features_and_tokens(enc, x)[0], want, 1e-5)
        test_close(features_and_tokens(enc, x)[1], vit_tokens(enc, x)[1].flatten(1,2), 1e-5)
        test_close(copy_features(enc, TfmdDL(list(x), bs=2), l2=False, stats=([0.]*3,[1.]*3))[:,:48], want, 1e-4)
        test_close(vit_tokens(enc, x)[1].std(-1).mean(), 1., .5)                           # behind a norm

def test_the_table_of_the_probe_says_what_it_stands_on():
    dls = digits_dls(bs=128)
    for arch,feature in list(zip(families, named))[:2]:
        enc = tiny(arch)
        one,two = (linear_probe(enc, dls, n_blocks=n, lrs=.1, epochs=1)[0] for n in (1,(1,2)))
        assert set(two.feature)=={feature} and one.feature[0]==feature
        f1,f2 = (extract_features(enc, dls[1], n_blocks=n)[0] for n in (1,2))
        test_close(f2[:,48:], f1, 1e-5)
    with pytest.raises(ValueError, match="mean of its patches already"): linear_probe(tiny(families[1]), dls, avgpool=(False,True), lrs=.1, epochs=1)

class TwoBatches(Callback):
    def after_batch(self):
        if self.iter==1: raise CancelFitException()

def trained(arch, precision, parts, **kwargs):
    learn = digits_learner(0, 24, arch, precision=precision, drop_path_rate=0., parts=parts, **kwargs)
    learn.dls.train.bs = 12
    with quiet(learn): learn.fit_dino(1, cbs=TwoBatches())
    return learn

@pytest.mark.parametrize('parts', [None, 'ibot'])
@pytest.mark.parametrize('precision', ['fp32','fp16','bf16'])
def test_activations_that_are_computed_again_are_the_same(precision, parts):
    "On a CPU in bfloat16 attention is written out: in the forward and, with gradient checkpointing, in the backward"
    a,b = (trained('vit_mini_patch4_16', precision, [IBOT(), KoLeo()] if parts else [], grad_checkpointing=o) for o in (False,True))
    for (n,p),q in zip(a.model.named_parameters(), b.model.parameters()): test_close(p.detach(), q.detach(), 1e-6)

class Stop(Callback):
    def after_pred(self): raise KeyboardInterrupt()

def test_attention_is_chosen_for_a_fit():
    class Look(Callback):
        def before_batch(self): seen.append(fused(self.model))
    fused = lambda m: [o.attn.fused_attn for net in (m.student,m.teacher) for o in encoder_of(net).blocks]
    learn,seen = digits_learner(0, 64, 'vit_mini_patch4_16', precision='bf16'),[]
    with quiet(learn):
        learn.fit_dino(1, cbs=Look())
        assert seen and not any(sum(seen, [])) and all(fused(learn.model))
        with pytest.raises(KeyboardInterrupt): learn.fit_dino(1, cbs=Stop())
        assert all(fused(learn.model))
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())                    # nothing of a callback runs after it
        learn.fit(1)                                                                       # the next fit puts it right
        assert all(fused(learn.model))
