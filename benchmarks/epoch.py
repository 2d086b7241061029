"""An epoch from image files: open, cut the views, train

    python -m benchmarks.epoch --device cuda      # 2,048 files, ViT-S/16, one process for each core

Compared with the paper's loop over torch's DataLoader, with torchvision's transforms on Pillow images in its workers. 'opening' is the
loader alone: in this library without the views, which are made in the step, of the other with them. Epochs are random by nature: of their
results only the loss, still near ln K, is looked at. An epoch includes the start of the workers, which this library otherwise needs once in each fit.
"""
import math, os, sys, tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np, torch
from PIL import Image
from self_supervised.data import unlabelled_dls, why_not_decoded
from self_supervised.vision.dino import create_dino_model, dino_learner, get_dino_aug_pipelines
from . import plain
from .race import main, on_gpu, race, rows_of

def write_images(folder, n, side, seed=0):
    "JPEG files of coloured clouds, 4:3, about as large as photographs of that size"
    rng = np.random.default_rng(seed)
    for i in range(n):
        im = Image.fromarray(rng.integers(0, 256, (12,16,3), dtype=np.uint8)).resize((side*4//3,side), Image.BICUBIC)
        im = np.asarray(im)+rng.normal(0, 8, (side,side*4//3,3))
        Image.fromarray(im.clip(0,255).astype(np.uint8)).save(Path(folder)/f'{i:06}.jpg', quality=90)

class Files(torch.utils.data.Dataset):
    def __init__(self, folder, views): self.files,self.views = sorted(Path(folder).glob('*.jpg')),views
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.views(Image.open(self.files[i]).convert('RGB'))

def contestants(folder, arch, bs, n_small, sizes, out_dim, num_workers, precision, device):
    "Each an epoch, and what it opens alone; they leave the mean loss in `loss`, by name"
    model,loss = create_dino_model(arch, out_dim, 0.).to(device),{}
    ways = {'ours': {}}
    if on_gpu(device):
        if why := why_not_decoded(device): print(f"Without decoding on the GPU: {why}", file=sys.stderr)
        else: ways['ours, decoded on the GPU'] = dict(decode_on_device=True)
    dls  = {k: unlabelled_dls(folder, size=256, bs=bs, num_workers=num_workers, device=device, keep_workers=False, **kw) for k,kw in ways.items()}
    dl   = torch.utils.data.DataLoader(Files(folder, plain.PILViews(n_small, sizes)), bs, shuffle=True, drop_last=True, num_workers=num_workers,
                                       pin_memory=on_gpu(device))
    step = plain.Step(model, precision)
    def ours(k):
        learn = dino_learner(dls[k], deepcopy(model), get_dino_aug_pipelines((2,n_small), crop_sizes=sizes), precision=precision, freeze_last_layer=0)
        def run():
            with learn.no_bar(), learn.no_logging(): learn.fit_dino(1, lr=1e-4, warmup_epochs=0)
            loss[k] = learn.view_stats['loss']
        return run
    def theirs(): loss['plain'] = torch.stack([step([v.to(device, non_blocking=True) for v in views]) for views in dl]).mean().item()
    def drain(dl):
        for b in dl: pass
    epoch   = {k: ours(k) for k in dls} | dict(plain=theirs)
    opening = {k: partial(drain, o.train) for k,o in dls.items()} | dict(plain=partial(drain, dl))
    return epoch,opening,loss

def rows(
    n_images:int=32, # Files, written to a temporary folder
    side:int=375, # Their shorter side, in pixels
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder, a vision transformer
    bs:int=8, # Images in a batch
    n_small:int=8, # Number of local crops, in addition to two global crops
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    out_dim:int=1024, # Prototypes
    num_workers:int=2, # Processes that open files; -1: one for each core
    precision:str='fp32', # Or bf16
    rounds:int=3, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    if num_workers<0: num_workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, n_images, side)
        epoch,opening,loss = contestants(folder, arch, bs, n_small, (size,small), out_dim, num_workers, precision, device)
        n  = n_images//bs*bs
        rs = []
        for what,cs in (('epoch',epoch),('opening',opening)):
            at  = f"{what} of {n} files, {arch}, batch {bs}, 2x{size}+{n_small}x{small}, {precision}, {num_workers} workers"
            rs += rows_of(at, race(cs, rounds, device, least=0), **{'images/s': lambda s: n/s})
        for k,v in loss.items():
            if not .5<v/math.log(out_dim)<1.5: raise ValueError(f"the loss of {k} is {v:.3f} where ln K is {math.log(out_dim):.3f}: it did not train on such images")
        return rs

rows.gpu = dict(n_images=2048, arch='vit_small_patch16_224', bs=256, out_dim=65536, num_workers=-1, precision='bf16')

if __name__=='__main__': main(rows, __doc__)
