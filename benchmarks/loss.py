"""The loss of all pairs of views, forward and backward

    python -m benchmarks.loss --bs 64 --out-dim 65536 --device cuda
"""
import torch
from self_supervised.objectives import dino_loss
from . import plain
from .peers import lightly
from .race import main, race, rows_of, same

def contestants(student, teacher, center, n_crops):
    "Each a function that returns the loss and leaves a gradient in `student`"
    def by(f):
        def run():
            student.grad = None
            loss = f()
            loss.backward()
            return loss.detach()
        return run
    cs = dict(ours=by(lambda: dino_loss(student, teacher, center)), plain=by(lambda: plain.pair_loss(student, teacher, center, n_crops)))
    if lib := lightly():
        theirs = lib.loss.DINOLoss(student.shape[1], warmup_teacher_temp_epochs=0).to(student.device, student.dtype)
        theirs.update_center = lambda t: None                    # the others do not move it here either
        theirs.center.copy_(center[None])
        cs['lightly'] = by(lambda: theirs(teacher.chunk(2), student.chunk(n_crops)))
    return cs

def inputs(bs, out_dim, n_crops, device='cpu'):
    torch.manual_seed(0)
    s,t,c = (torch.randn(n, out_dim, device=device)*.3 for n in (n_crops*bs,2*bs,1))
    return s.requires_grad_(),t,c*.1

def rows(
    bs:int=16, # Images
    out_dim:int=65536, # Prototypes
    n_crops:int=10, # Views, two of them global
    rounds:int=15, # Rounds
    device:str='cpu' # Where
):
    s,t,c = inputs(bs, out_dim, n_crops, device)
    cs = contestants(s, t, c, n_crops)
    res  = {k: (f(), s.grad) for k,f in cs.items()}
    diff = {k: same(f"loss and gradient of {k} and ours", res['ours'], v, 1e-4) for k,v in res.items()}
    return rows_of(f"{bs} images, {n_crops} views, K={out_dim}", race(cs, rounds, device), differs=diff)

rows.gpu = dict(bs=256)

if __name__=='__main__': main(rows, __doc__)
