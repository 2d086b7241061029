"""The paper's views beside other pipelines on the same images, interleaved in one process.

    python benchmarks/views.py                    # 16 images of 256x256 bytes, 2 views of 224 and 8 of 96 pixels
    python benchmarks/views.py --device cuda --bs 256
    python benchmarks/views.py --floats           # ours from floats in [0,1]

Prints for each other pipeline the ratio of its time to ours, above 1 where ours is faster: median, smallest and largest round. Ours and kornia take the batch
on the device; Pillow and torchvision take one image after the other on the CPU, as in one process of a DataLoader, and their batch then goes to the device.
For timings without page faults run it with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296: the same for all.
"""
import random, time
import kornia.augmentation as K, numpy as np, torch
from PIL import Image, ImageFilter, ImageOps
from fastcore.script import call_parse
from fastcore.basics import store_attr
from torchvision import transforms as T
from torchvision.transforms import v2
from self_supervised.augmentations import get_dino_aug_pipelines

mean,std = (.485,.456,.406),(.229,.224,.225)

class Maybe:
    "`f` with probability `p`"
    def __init__(self, f, p): store_attr()
    def __call__(self, x): return self.f(x) if random.random()<self.p else x

def _blur(im): return im.filter(ImageFilter.GaussianBlur(random.uniform(.1,2.)))

def _torchvision(T, size, scale, first, blur, sol, last):
    return T.Compose([*first, T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
                      T.RandomApply([T.ColorJitter(.4,.4,.2,.1)], .8), T.RandomGrayscale(.2), blur, sol, *last, T.Normalize(mean, std)])

def pillow_view(size, scale, blur_p, sol_p):
    return _torchvision(T, size, scale, [], Maybe(_blur, blur_p), Maybe(ImageOps.solarize, sol_p), [T.ToTensor()])

def torchvision_view(size, scale, blur_p, sol_p):
    return _torchvision(v2, size, scale, [], v2.RandomApply([v2.GaussianBlur(13, (.1,2.))], blur_p), v2.RandomSolarize(128, sol_p), [v2.ToDtype(torch.float32, scale=True)])

def kornia_view(size, scale, blur_p, sol_p):
    return K.AugmentationSequential(
        K.RandomResizedCrop((size,size), scale, resample='bicubic'), K.RandomHorizontalFlip(), K.ColorJitter(.4,.4,.2,.1, p=.8), K.RandomGrayscale(p=.2),
        K.RandomGaussianBlur((13,13), (.1,2.), p=blur_p), K.RandomSolarize(0., 0., p=sol_p), K.Normalize(torch.tensor(mean), torch.tensor(std)), data_keys=['input'])

def measure(
    bs:int=16, # Images in a batch
    size:int=256, # Their side, in pixels
    sizes:tuple=(224,96), # Sides of the global and the local views
    n_local:int=8, # Local views; there are two global ones
    device:str='cpu', # Where the views are wanted
    rounds:int=7, # Rounds
    floats:bool=False # Ours from floats in [0,1] instead of bytes?
)->list: # Rows (name of the other, median, smallest and largest ratio of its time to ours)
    "How much faster the views are made than by others"
    rng  = np.random.RandomState(0)
    imgs = [Image.fromarray(np.uint8(255*rng.rand(size//4,size//4,3))).resize((size,size), Image.BICUBIC) for _ in range(bs)]
    xb   = torch.stack([torch.from_numpy(np.array(o)).permute(2,0,1) for o in imgs])
    args = [(sizes[0],(.4,1.),1.,0.), (sizes[0],(.4,1.),.1,.2), *[(sizes[1],(.05,.4),.5,0.)]*n_local]
    def each(make, items):
        tfms = [make(*o) for o in args]
        def views(): return [torch.stack(v).to(device) for v in zip(*[[t(o) for t in tfms] for o in items])]
        return views
    pipes,kornias = get_dino_aug_pipelines((2,n_local), sizes),[kornia_view(*o).to(device) for o in args]
    x = xb/255 if floats else xb
    runs = {'ours': lambda: pipes.views(x.to(device)), 'Pillow, an image at a time': each(pillow_view, imgs), 'torchvision v2, an image at a time': each(torchvision_view, list(xb)),
            'kornia': lambda: [t(xb.to(device)/255) for t in kornias]}
    def took(f):
        start = time.perf_counter()
        out = f()
        if device!='cpu': torch.cuda.synchronize()
        assert [v.shape[-1] for v in out]==[o[0] for o in args]
        return time.perf_counter()-start
    with torch.no_grad():
        for f in runs.values(): took(f)
        times = [{k: took(runs[k]) for k in list(runs)[::1 if r%2 else -1]} for r in range(rounds)]
    rows = [(k, *(f([t[k]/t['ours'] for t in times]) for f in (np.median,min,max))) for k in runs if k!='ours']
    return rows

@call_parse
def main(
    bs:int=16, # Images in a batch
    size:int=256, # Their side, in pixels
    global_size:int=224, # Side of the two global views, in pixels
    local_size:int=96, # Side of the local views, in pixels
    n_local:int=8, # Local views
    device:str='cpu', # Where the views are wanted, such as cuda
    rounds:int=7, # Rounds
    threads:int=None, # Threads of PyTorch; default: as it has them
    floats:bool=False # Ours from floats in [0,1] instead of bytes?
):
    if threads: torch.set_num_threads(threads)
    print(f"2x{global_size} + {n_local}x{local_size} from {bs} images of {size}x{size} on {device}, {torch.get_num_threads()} threads, {rounds} rounds")
    for name,mid,lo,hi in measure(bs, size, (global_size,local_size), n_local, device, rounds, floats): print(f"{name:36} ratio {mid:.2f} ({lo:.2f} to {hi:.2f})")
