"""The teacher follows the student

    python -m benchmarks.ema --arch vit_small_patch16_224
"""
from copy import deepcopy
from self_supervised.vision.core import ema_update
from self_supervised.vision.dino import create_dino_model
from . import plain
from .peers import lightly
from .race import main, race, rows_of, same

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    out_dim:int=65536, # Prototypes
    mom:float=.996, # Momentum
    rounds:int=15, # Rounds
    device:str='cpu' # Where
):
    m = create_dino_model(arch, out_dim).to(device)
    for p in m.teacher.parameters(): p.mul_(.9)                  # else there is nowhere to go
    fs = dict(ours=lambda s,t: ema_update(t, s, mom), plain=lambda s,t: plain.ema(s, t, mom))
    if lib := lightly(): fs['lightly'] = lambda s,t: lib.models.utils.update_momentum(s, t, mom)
    teachers = {k: deepcopy(m.teacher) for k in fs}
    for k,f in fs.items(): f(m.student, teachers[k])
    diff  = {k: same(f"teachers of {k} and ours", list(teachers['ours'].parameters()), list(t.parameters()), 1e-5) for k,t in teachers.items()}
    secs  = race({k: lambda f=f: f(m.student, m.teacher) for k,f in fs.items()}, rounds, device)
    return rows_of(f"{sum(p.numel() for p in m.student.parameters())/1e6:.3g}M parameters", secs, differs=diff)

rows.gpu = dict(arch='vit_small_patch16_224')

if __name__=='__main__': main(rows, __doc__)
