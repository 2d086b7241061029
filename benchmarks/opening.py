"""An epoch of image files of your own: what decoding costs, and what each way to avoid it gains

    python -m benchmarks.opening --images PHOTOS --size 224 --n-images 256

'ours' opens the files and decodes a JPEG at a fraction of its size where that is enough (Pillow's `draft`). 'decoded in full' does not. 'prepared' reads the copies of `dino_prepare`, and 'cached' has
all images in memory, so its epoch is one without files. The share of the files in an epoch is what the cached one saves. Workers are started before the clock.
"""
import shutil, tempfile
from functools import partial
from pathlib import Path
import torch
from self_supervised.data import find_images, open_rgb, unlabelled_dls
from self_supervised.prepare import prepare_images
from self_supervised.vision.dino import dino_learner, get_dino_aug_pipelines
from .epoch import write_images
from .race import main, race, rows_of

def in_full(fn): return open_rgb(fn)

def copies(images, folder, n, side):
    "Copies of `n` files, evenly from the whole folder; generated ones without a folder"
    folder.mkdir()
    if images is None: return write_images(folder, n, side)
    files = find_images(images)
    if len(files)<n: raise ValueError(f"{images} has {len(files)} images: pass --n-images {len(files)} or fewer")
    for i in range(n):
        f = files[i*len(files)//n]
        shutil.copy(f, folder/f'{i:06}{f.suffix}')

def drain(dl):
    for _ in dl: pass

def rows(
    images:str=None, # Folder of images, searched recursively; default: generated JPEG files
    n_images:int=32, # Number of them to read
    side:int=750, # Shorter side of generated images, in pixels
    size:int=224, # Size that they are resized to
    small:int=96, # Size of the local crops
    n_small:int=4, # Number of local crops, in addition to two global crops
    arch:str='convnet_mini', # timm's name of the encoder; '' measures opening alone
    bs:int=16, # Images in a batch
    num_workers:str='0', # Numbers of worker processes, such as 0,1,2
    rounds:int=3, # Rounds
    device:str='cpu' # Where
):
    rs = []
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copies(images, d/'files', n_images, side)
        prepare_images(d/'files', d/'prepared', size, num_workers=0, progress=False)
        for w in map(int, num_workers.split(',')):
            make = partial(unlabelled_dls, size=size, bs=bs, num_workers=w, device=device, path=d)
            dls  = {'ours': make(d/'files'), 'decoded in full': make(d/'files', open_fn=in_full), 'prepared': make(d/'prepared'), 'cached': make(d/'files', cache=True)}
            n    = n_images//bs*bs
            def epoch(k):
                torch.manual_seed(0)
                learn = dino_learner(dls[k], arch, get_dino_aug_pipelines((2,n_small), crop_sizes=(size,small)), precision='fp32')
                def run():
                    with learn.no_bar(), learn.no_logging(): learn.fit_dino(1)
                return run
            at   = f"{n} files to {size} pixels, {w} workers"
            read = race({k: partial(drain, o.train) for k,o in dls.items()}, rounds, device, least=0)
            rs  += rows_of(f"opening {at}", read, **{'images/s': lambda s: n/s})
            for o in dls.values(): o.train.stop_workers()
            if not arch: continue
            secs = race({k: epoch(k) for k in ('ours','prepared','cached')}, rounds, device, least=0)
            rs  += rows_of(f"epoch of {at}, {arch}, 2x{size}+{n_small}x{small}", secs, **{'images/s': lambda s: n/s})
    return rs

rows.gpu = dict(n_images=2048, arch='vit_small_patch16_224', bs=256, num_workers='8,16')

if __name__=='__main__': main(rows, __doc__)
