"Mixed precision and what goes with it: activation checkpointing, the attention kernel, students of any kind"
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from helpers import quiet

class TwoBatches(Callback):
    def after_batch(self):
        if self.iter==1: raise CancelFitException()

@pytest.mark.parametrize('precision', ['fp32','fp16','bf16'])
def test_activation_checkpointing_in_every_precision(precision):
    set_seed(0)
    dls = digits_dls(16, bs=16, holdout=None, device='cpu')
    learn = dino_learner(dls, 'vit_mini_patch4_16', get_digits_aug_pipelines((2,1)), precision=precision, grad_checkpointing=True, out_dim=32)
    before = [p.detach().clone() for p in learn.model.student.parameters()]
    with quiet(learn): learn.fit_dino(1, cbs=TwoBatches())
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.student.parameters()))

def test_the_attention_kernel_is_chosen_for_a_fit_and_put_back():
    "PyTorch's fused attention is slower on a CPU in bfloat16; a flag that changes within a forward breaks activation checkpointing"
    seen = []
    class Look(Callback):
        def after_pred(self): seen.append({m.fused_attn for m in self.model.modules() if hasattr(m, 'fused_attn')})
    for precision,want in (('bf16',{False}),('fp32',{True})):
        seen.clear()
        learn = dino_learner(digits_dls(16, bs=16, holdout=None, device='cpu'), 'vit_mini_patch4_16', get_digits_aug_pipelines((2,1)), precision=precision, out_dim=32)
        with quiet(learn): learn.fit_dino(1, cbs=[TwoBatches(),Look()])
        assert seen==[want]*2
        assert {m.fused_attn for m in learn.model.modules() if hasattr(m, 'fused_attn')}=={True}
