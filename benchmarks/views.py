"""The views of a batch, 2 global and 8 local ones

Ours, kornia's own classes and DALI take the batch on the device; Pillow and torchvision take one image after the other on the CPU, as one process of a DataLoader does, and their views then go to the device.
'torchvision v2, all cores' is a DataLoader with a process for each core, from the first of its batches to the last.

    python -m benchmarks.views --device cuda --bs 256
"""
import os, sys, time
import kornia.augmentation as K, numpy as np, torch
from PIL import Image
from torchvision.transforms import v2
from self_supervised.augmentations import crop_resize, get_dino_aug_pipelines, random_boxes
from self_supervised.data import to_unit
from . import plain
from .peers import dali, dali_views
from .race import main, on_gpu, race, rows_of, same

stats = torch.tensor((.485,.456,.406)),torch.tensor((.229,.224,.225))

def torchvision_view(size, scale, blur_p, sol_p):
    return v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(.4,.4,.2,.1)], .8), v2.RandomGrayscale(.2),
                       v2.RandomApply([v2.GaussianBlur(13, (.1,2.))], blur_p), v2.RandomSolarize(128, sol_p), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*stats)])

def kornia_view(size, scale, blur_p, sol_p):
    return K.AugmentationSequential(K.RandomResizedCrop((size,size), scale, resample='bicubic'), K.RandomHorizontalFlip(), K.ColorJitter(.4,.4,.2,.1, p=.8), K.RandomGrayscale(p=.2),
                                    K.RandomGaussianBlur((13,13), (.1,2.), p=blur_p), K.RandomSolarize(0., 0., p=sol_p), K.Normalize(*stats), data_keys=['input'])

def photographs(n, size):
    rng = np.random.RandomState(0)
    return [Image.fromarray(np.uint8(255*rng.rand(size//4,size//4,3))).resize((size,size), Image.BICUBIC) for _ in range(n)]

def levels(images, size, n=8):
    "Root mean square error of `n` crops per image against Pillow's, in levels of 8 bits"
    x = torch.stack([torch.from_numpy(np.array(o)).permute(2,0,1) for o in images])
    boxes = random_boxes(n*len(x), *x.shape[2:], (.05,.4))
    got = 255*to_unit(crop_resize(x, boxes, size)).permute(0,2,3,1).double()
    pil = [im.crop((l,t,l+w,t+h)).resize((size,size), Image.BICUBIC) for im,(t,l,h,w) in zip(list(images)*n, boxes.int().tolist())]
    return (got-torch.from_numpy(np.stack(pil)).double()).pow(2).mean().sqrt().item()

class Views(torch.utils.data.Dataset):
    def __init__(self, x, makers, n): self.x,self.makers,self.n = x,makers,n
    def __len__(self): return self.n
    def __getitem__(self, i): return [t(self.x[i%len(self.x)]) for t in self.makers]

class AllCores:
    "Seconds for as many images as `x` has, by a DataLoader with a process for each core"
    def __init__(self, x, makers, device, cores=0):
        self.device,self.bs,cores,part = device,len(x),cores or os.cpu_count(),max(1, len(x)//16)
        self.part,n = part,part*(1+4*cores)
        self.dl = torch.utils.data.DataLoader(Views(x, makers, n), part, num_workers=cores, persistent_workers=True, pin_memory=on_gpu(device))
    def __call__(self):
        for i,b in enumerate(self.dl):
            if i==0: start = time.perf_counter()
            b = [v.to(self.device, non_blocking=True) for v in b]
        if on_gpu(self.device): torch.cuda.synchronize(self.device)
        return (time.perf_counter()-start)/i/self.part*self.bs

def contestants(images, sizes, n_local, device, floats=False):
    x    = torch.stack([torch.from_numpy(np.array(o)).permute(2,0,1) for o in images])
    args = [(sizes[0],(.4,1.),1.,0.), (sizes[0],(.4,1.),.1,.2), *[(sizes[1],(.05,.4),.5,0.)]*n_local]
    pipes,pil = get_dino_aug_pipelines((2,n_local), sizes),plain.PILViews(n_local, sizes)
    tv,ko = ([f(*o) for o in args] for f in (torchvision_view,kornia_view))
    for o in ko: o.to(device)
    ours = x/255 if floats else x
    def each(make, items): return [torch.stack(v).to(device) for v in zip(*[make(o) for o in items])]
    cs = {'ours': lambda: pipes.views(ours.to(device)), 'Pillow, an image at a time': lambda: each(pil, images),
          'torchvision v2, an image at a time': lambda: each(lambda o: [t(o) for t in tv], x), 'kornia': lambda: [t(x.to(device)/255) for t in ko]}
    if on_gpu(device) and dali(): cs['DALI'] = dali_views(np.stack([np.asarray(o) for o in images]), args, stats, device)
    return cs,AllCores(x, tv, device)

def rows(
    bs:int=16, # Images in a batch
    size:int=256, # Their side, in pixels
    global_size:int=224, # Size of the two global crops, in pixels
    local_size:int=96, # Size of the local crops, in pixels
    n_local:int=8, # Local views
    floats:bool=False, # Start from floats in [0,1] instead of bytes
    rounds:int=7, # Rounds
    device:str='cpu' # Where the views are wanted
):
    images = photographs(bs, size)
    cs,cores = contestants(images, (global_size,local_size), n_local, device, floats)
    for k,f in cs.items(): same(f"crop sizes of {k}", [v.shape[-1] for v in cs['ours']()], [v.shape[-1] for v in f()], 0)
    err = levels(images, local_size)
    assert err<.7, f"our crops are {err:.2f} levels from Pillow's"
    with torch.no_grad(): secs = race(cs|{'torchvision v2, all cores': cores}, rounds, device)
    return rows_of(f"{bs} images of {size} pixels, 2x{global_size} + {n_local}x{local_size}", secs, **{'levels from Pillow': {'ours':err}})

rows.gpu = dict(bs=256)

if __name__=='__main__': main(rows, __doc__)
