"""A step of AdamW, compared with torch's default and fastai's own Adam (whose betas and eps are others, so its weights are not compared)

    python -m benchmarks.optimizer --arch vit_small_patch16_224
"""
from copy import deepcopy
import torch
from fastai.optimizer import Adam
from self_supervised.schedules import dino_splitter
from self_supervised.vision.dino import create_dino_model, dino_opt
from . import plain
from .race import main, race, rows_of, same

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    out_dim:int=65536, # Prototypes
    rounds:int=15, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    m = create_dino_model(arch, out_dim).to(device).student
    for p in m.parameters():
        if p.requires_grad: p.grad = torch.randn_like(p)*1e-3
    def ours(m):
        opt = dino_opt(dino_splitter(m), lr=1e-4)
        opt.set_hyper('wd', [0.,.04])
        return opt
    make = {'ours': ours, 'plain': lambda m: plain.adamw(m, 1e-4, .04), "fastai's Adam": lambda m: Adam(dino_splitter(m), lr=1e-4)}
    nets = {k: deepcopy(m) for k in make}
    for net in nets.values():
        for p,q in zip(net.parameters(), m.parameters()): p.grad = None if q.grad is None else q.grad.clone()
    opts = {k: f(nets[k]) for k,f in make.items()}
    for o in opts.values(): o.step()
    diff = {k: same("parameters", list(nets['ours'].parameters()), list(nets[k].parameters()), 1e-5) for k in ('ours','plain')}
    n    = sum(p.numel() for p in m.parameters() if p.requires_grad)
    return rows_of(f"{n/1e6:.3g}M parameters", race({k:o.step for k,o in opts.items()}, rounds, device), differs=diff)

rows.gpu = dict(arch='vit_small_patch16_224')

if __name__=='__main__': main(rows, __doc__)
