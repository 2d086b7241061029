"""What `torch.compile` does for the encoder, the loss, the optimizer and the moving average

    python -m benchmarks.compiling --device cuda

A time that is below ours is a part that compiling makes faster. Compiling itself takes minutes and is not timed. A part that cannot be compiled is named and left out.
"""
import sys
from copy import deepcopy
import torch
from self_supervised.objectives import pair_loss, teacher_probs
from self_supervised.vision.core import ema_update
from self_supervised.vision.dino import create_dino_model
from .race import main, race, rows_of, same
from .step import make_views

def both(ours, theirs, compiled): return dict(ours=ours, **{f'ours, {compiled}': theirs})

def of_encoder(model, views, loss, backend):
    nets = {k: deepcopy(model.student[0]) for k in ('ours','compiled')}
    nets['compiled'].compile(backend=backend)
    def step(net):
        def run():
            net.zero_grad()
            out = net(views)
            out.sum().backward()
            return out.detach()
        return run
    return both(step(nets['ours']), step(nets['compiled']), 'compiled')

def of_loss(model, views, loss, backend):
    student,teacher = loss
    def one(s, t): return pair_loss(s, teacher_probs(t, t.mean(0, keepdim=True), .04), .1, (0,1))
    def step(f):
        def run():
            student.grad = None
            res = f(student, teacher)
            res.backward()
            return res.detach()
        return run
    return both(step(one), step(torch.compile(one, backend=backend)), 'compiled')

def of_optimizer(model, views, loss, backend):
    sets = [[p.detach().clone().requires_grad_() for p in model.student.parameters()] for _ in range(2)]
    for ps in zip(*sets):
        g = torch.randn_like(ps[0])*1e-3
        for p in ps: p.grad = g
    fused,plain = (torch.optim.AdamW(ps, lr=1e-4, fused=f) for ps,f in zip(sets, (True,None)))
    step = torch.compile(plain.step, backend=backend)
    def run(step, ps):
        def run():
            step()
            return [p.detach() for p in ps]
        return run
    return both(run(fused.step, sets[0]), run(step, sets[1]), 'compiled')

def of_average(model, views, loss, backend):
    nets = [deepcopy(model.teacher) for _ in range(2)]
    def update(net): ema_update(net, model.student, .99)
    fast = torch.compile(update, backend=backend)
    def run(f, net):
        def run():
            f(net)
            return list(net.parameters())
        return run
    return both(run(update, nets[0]), run(fast, nets[1]), 'compiled')

parts = dict(encoder=of_encoder, loss=of_loss, optimizer=of_optimizer, average=of_average)

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    bs:int=2, # Images
    n_small:int=8, # Number of local crops, in addition to two global crops
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    out_dim:int=16384, # Prototypes
    backend:str='inductor', # Of torch.compile
    only:str='encoder,loss,optimizer,average', # Parts, with commas between them
    rounds:int=5, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    model = create_dino_model(arch, out_dim, 0.).to(device)
    views = make_views(bs, n_small, (size,small), device)
    loss  = torch.randn(len(views)*bs, out_dim, device=device, requires_grad=True),torch.randn(2*bs, out_dim, device=device)
    rs    = []
    for name in only.split(','):
        cs = parts[name](model, views, loss, backend)
        try: res = [f() for _ in range(2) for f in cs.values()][-2:]
        except Exception as e:
            print(f"{name} cannot be compiled: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
            continue
        diff = same(f"results of {name}", *res, 1e-3)
        rs  += rows_of(f"{name}: {arch}, {bs} images, 2x{size}+{n_small}x{small}, K={out_dim}, {backend}", race(cs, rounds, device, least=0), differs={'ours, compiled': diff})
    return rs

rows.gpu = dict(arch='vit_small_patch16_224', bs=64, out_dim=65536)

if __name__=='__main__': main(rows, __doc__)
