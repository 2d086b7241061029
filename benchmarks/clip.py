"""Clipping of each parameter's gradient by its own norm

    python -m benchmarks.clip --arch vit_small_patch16_224
"""
import torch
from self_supervised.vision.dino import clip_per_param, create_dino_model
from . import plain
from .race import main, race, rows_of, same

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    out_dim:int=65536, # Prototypes
    max_norm:float=3., # Largest norm
    rounds:int=15, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    ps   = [p for p in create_dino_model(arch, out_dim).to(device).student.parameters() if p.requires_grad]
    size = [2*max_norm if i%10==0 else .5*max_norm for i in range(len(ps))]                 # every tenth is too long
    was  = [(g:=torch.randn_like(p))*(s/g.norm()) for p,s in zip(ps, size)]
    def fresh():
        for p,g in zip(ps, was):
            if p.grad is None: p.grad = g.clone()
            else: p.grad.copy_(g)
    fs,grads = dict(ours=lambda: clip_per_param(ps, max_norm), plain=lambda: plain.clip(ps, max_norm)),{}
    for k,f in fs.items():
        fresh()
        f()
        grads[k] = [p.grad.clone() for p in ps]
    diff = {k: same("clipped gradients", grads['ours'], g, 1e-5) for k,g in grads.items()}
    return rows_of(f"{sum(p.numel() for p in ps)/1e6:.3g}M parameters, every tenth over the norm", race(fs, rounds, device, setup=fresh), differs=diff)

rows.gpu = dict(arch='vit_small_patch16_224')

if __name__=='__main__': main(rows, __doc__)
