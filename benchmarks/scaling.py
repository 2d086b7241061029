"""How the time of an image grows with the batch, the local views, the prototypes and the data set

    python -m benchmarks.scaling --batches 64,128,256 --bs 128 --device cuda --arch vit_small_patch16_224

One of the four varies while the others stay; 'ms/image' is the median. The step is that of `step`; for the data set it is an epoch
from files, with finding them and building the network.
"""
import tempfile
from copy import deepcopy
import torch
from self_supervised.vision.dino import create_dino_model
from . import plain
from .epoch import contestants, write_images
from .race import main, race, rows_of
from .step import Ours, Plain, make_views

def rows(
    batches:str='2,4,8', # Images in a batch
    crops:str='0,2,4,8', # Local views
    out_dims:str='1024,8192,65536', # Prototypes
    images:str='32,64,128', # Files of the data set
    bs:int=4, # The batch that stays
    n_small:int=4, # The local views that stay
    out_dim:int=8192, # The prototypes that stay
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder, a vision transformer
    size:int=224, # Side of the global views, in pixels
    small:int=96, # Side of the local views
    hidden_dim:int=2048, # Width of the head
    file_arch:str='vit_mini_patch4_16', # The encoder for the files, so small that they take the time
    file_sizes:str='32,16', # Sides of its views
    precision:str='fp32', # Or bf16
    rounds:int=3, # Rounds
    device:str='cpu' # Where
):
    ints,rs = lambda s: [int(o) for o in s.split(',')],[]
    for axis,values in dict(batch=ints(batches), crops=ints(crops), K=ints(out_dims)).items():
        for v in values:
            now = dict(batch=bs, crops=n_small, K=out_dim) | {axis: v}
            torch.manual_seed(0)
            model,views = create_dino_model(arch, now['K'], 0., hidden_dim=hidden_dim).to(device),make_views(now['batch'], now['crops'], (size,small), device)
            secs = race(dict(ours=Ours(deepcopy(model), views, precision), plain=Plain(plain.Step, model, views, precision)), rounds, device, least=0)
            at   = f"{axis} {v}: {arch}, batch {now['batch']}, 2x{size}+{now['crops']}x{small}, K={now['K']}, {precision}"
            rs  += rows_of(at, secs, **{'ms/image': lambda s: 1e3*s/now['batch']})
    for n in ints(images):
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, n, 375)
            epoch = lambda who: lambda: contestants(folder, file_arch, bs, 2, ints(file_sizes), 256, 0, precision, device)[0][who]()
            secs  = race(dict(ours=epoch('ours'), plain=epoch('plain')), rounds, device, least=0)
            rs   += rows_of(f"{n} files: {file_arch}, batch {bs}, {precision}", secs, **{'ms/image': lambda s: 1e3*s/n})
    return rs

if __name__=='__main__': main(rows, __doc__)
