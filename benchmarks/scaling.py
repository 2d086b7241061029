"""How the time of an image grows with the batch, the local views, the prototypes and the data set

    python -m benchmarks.scaling --batches 64,128,256 --bs 128 --device cuda --arch vit_small_patch16_224

One of the four varies while the others stay. All sizes take turns in every round, so that 'growth', the time of an image over that at the
first of the values, is of neighbours too; 'ms/image' is the median. The step is that of `step`; for the data set it is an epoch from files,
with finding them and building the network.
"""
import tempfile
from copy import deepcopy
from pathlib import Path
import torch
from self_supervised.vision.dino import create_dino_model
from . import plain
from .epoch import contestants, write_images
from .race import main, race, rows_of, spread
from .step import Ours, Plain, make_views

def rows(
    batches:str='4,8,16', # Images in a batch
    crops:str='0,4,8', # Local views
    out_dims:str='4096,16384,65536', # Prototypes
    images:str='16,64,128', # Files of the data set
    bs:int=4, # The batch that stays
    n_small:int=4, # The local views that stay
    out_dim:int=16384, # The prototypes that stay
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder, a vision transformer
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    hidden_dim:int=2048, # Width of the head
    file_arch:str='vit_mini_patch4_16', # The encoder for the files, so small that they take the time
    file_sizes:str='32,16', # Sides of its views
    precision:str='fp32', # Or bf16
    rounds:int=3, # Rounds
    device:str='cpu' # Where
):
    ints  = lambda s: [int(o) for o in s.split(',')]
    fixed = dict(batch=bs, crops=n_small, K=out_dim)
    runs  = {axis: [fixed|{axis:v} for v in ints(vs)] for axis,vs in dict(batch=batches, crops=crops, K=out_dims).items()}
    name  = lambda r: f"{arch}, batch {r['batch']}, 2x{size}+{r['crops']}x{small}, K={r['K']}, {precision}"
    cs    = {}
    for at,r in {name(r):r for rs in runs.values() for r in rs}.items():
        torch.manual_seed(0)
        model,views = create_dino_model(arch, r['K'], 0., hidden_dim=hidden_dim).to(device),make_views(r['batch'], r['crops'], (size,small), device)
        cs |= {(at,'ours'): Ours(deepcopy(model), views, precision), (at,'plain'): Plain(plain.Step, model, views, precision)}
    secs  = race(cs, rounds, device, least=0)
    out   = []
    for axis,rs in runs.items(): out += grown(secs, {name(r): (f"{axis} {r[axis]}: {name(r)}", r['batch']) for r in rs})
    with tempfile.TemporaryDirectory() as tmp:
        def epoch(n, who): return lambda: contestants(Path(tmp)/str(n), file_arch, bs, 2, ints(file_sizes), 256, 0, precision, device)[0][who]()
        for n in ints(images):
            (Path(tmp)/str(n)).mkdir()
            write_images(Path(tmp)/str(n), n, 375)
        secs = race({(n,who): epoch(n, who) for n in ints(images) for who in ('ours','plain')}, rounds, device, least=0)
    return out + grown(secs, {n: (f"{n} files: {file_arch}, batch {bs}, {precision}", n) for n in ints(images)})

def grown(
    secs:dict, # What `race` gave, by run and implementation
    runs:dict # Of each run its name in the table, and its images
)->list: # As `rows_of` gives them
    "Time of an image, and how it grows from the first run on"
    per_image = lambda run,who: [s/runs[run][1] for s in secs[run,who]]
    rs,start  = [],next(iter(runs))
    for run,(what,n) in runs.items():
        growth = {who: spread([a/b for a,b in zip(per_image(run,who), per_image(start,who))]) for who in ('ours','plain')}
        rs += rows_of(what, {who: secs[run,who] for who in growth}, **{'ms/image': lambda s: 1e3*s/n, 'growth': growth})
    return rs

rows.gpu = dict(arch='vit_small_patch16_224', batches='64,128,256', images='1024,2048', bs=64, precision='bf16')

if __name__=='__main__': main(rows, __doc__)
