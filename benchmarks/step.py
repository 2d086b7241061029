"""A full training step, from views that are made already to the moved teacher

    python -m benchmarks.step
    python -m benchmarks.step --device cuda --profile       # ViT-S/16, 256 images, bf16

Ours runs through `learn.fit_dino`. 'bare timm' is the mark: its encoder on the same tokens, those of all views forward and backward and
those of the teacher's views forward, without head, loss and optimizer. 'share' is the part of the machine's rate in a large matrix
product of the same type, measured in the same rounds, that an implementation reaches: operations of the plain step, counted, over its time.
Implementations start from the same weights, and must give the same losses in two rounds before they are timed.
"""
import statistics, time
from copy import deepcopy
import torch
from fastai.vision.all import Callback, DataLoader, DataLoaders
from torch.utils.flop_counter import FlopCounterMode
from self_supervised.vision.dino import create_dino_model, dino_learner
from . import plain
from .peers import LightlyStep, lightly
from .race import fitting, main, on_gpu, peak_gb, race, rows_of, same, sync

class Ready(list):
    "Pipelines that hand out views made beforehand"
    def __init__(self, made):
        super().__init__([None]*len(made))
        self.made = made
    def views(self, x): return self.made

class Clock(Callback):
    "Seconds from the first batch to the end of the last, `learn.clock.took`"
    order = -100
    def before_train(self): self.start = None
    def before_batch(self):
        if self.start is None: self.start = self.now()
    def after_train(self): self.took = self.now()-self.start
    def now(self):
        sync(self.dls.device)
        return time.perf_counter()

class Ours:
    "Some steps of `learn.fit_dino`, with the constants of `plain.Step`; returns the seconds of all, and leaves their mean loss"
    def __init__(self, model, views, precision='fp32', lr=1e-4, wd=.04, steps=1, **kwargs):
        bs   = len(views[0])
        rows = [(torch.zeros(3,8,8),)]*(steps*bs)                # stand for images; the views are made already
        dls  = DataLoaders(DataLoader(rows, bs=bs, drop_last=True, num_workers=0), DataLoader([], bs=bs, num_workers=0), device=views[0].device)
        self.learn = dino_learner(dls, model, Ready(views), precision=precision, cbs=Clock(), tmom_start=.996, tmom_end=.996, freeze_last_layer=0,
                                  tpt_start=.04, tpt_end=.04, tpt_warmup_pct=0., clip=3., **kwargs)
        self.fit = dict(lr=lr, lr_min=lr, wd=wd, warmup_epochs=0, scale_lr=False)
    def __call__(self):
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit_dino(1, **self.fit)
        self.loss = self.learn.view_stats['loss']
        return self.learn.clock.took

class Plain:
    "The same by `make`, `plain.Step` or `peers.LightlyStep`"
    def __init__(self, make, model, views, precision='fp32', steps=1): self.step,self.views,self.steps = make(model, precision),views,steps
    def __call__(self): self.loss = torch.stack([self.step(self.views) for _ in range(self.steps)]).mean().item()

class BareTimm:
    "The encoder alone, on the tokens of these steps"
    def __init__(self, model, views, precision='fp32', steps=1):
        self.net,self.precision,self.steps = deepcopy(model.student[0].encoder),precision,steps
        self.large,self.small = torch.cat(views[:2]),[torch.cat(views[2:])] if views[2:] else []
    def __call__(self):
        for _ in range(self.steps):
            self.net.zero_grad()
            with torch.autocast(self.large.device.type, torch.bfloat16, enabled=self.precision=='bf16'):
                with torch.no_grad(): self.net(self.large)
                loss = sum(self.net(x).float().sum() for x in [self.large]+self.small)
            loss.backward()

def setting(variant): return dict(tf32=True) if variant=='tf32' else dict(compile=True if variant=='compile' else variant)

def make_views(bs, n_small=8, sizes=(224,96), device='cpu'):
    return [torch.randn(bs, 3, s, s, device=device) for s in [sizes[0]]*2+[sizes[1]]*n_small]

def count_flops(f):
    with FlopCounterMode(display=False) as c: f()
    return c.get_total_flops()

def print_profile(f, device, n=25):
    cuda = on_gpu(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]+[torch.profiler.ProfilerActivity.CUDA]*cuda) as p: f()
    print(p.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=n, max_name_column_width=60))

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder, a vision transformer
    bs:int=8, # Images
    n_small:int=8, # Number of local crops, in addition to two global crops
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    out_dim:int=65536, # Prototypes
    hidden_dim:int=2048, # Width of the head
    precision:str='fp32,bf16', # Both, or one of them
    steps:int=1, # Steps in a round
    variants:str='', # Also ours with these settings: tf32, compile, reduce-overhead (with commas between them)
    product:int=0, # Size of the square matrices of the product; 0: 2048 on a CPU, 8192 on a GPU
    profile:bool=False, # Also print what ours spends its time on
    rounds:int=5, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    model,views = create_dino_model(arch, out_dim, 0., hidden_dim=hidden_dim).to(device),make_views(bs, n_small, (size,small), device)
    types,n = precision.split(','),product or (8192 if on_gpu(device) else 2048)
    cs,differs = {},{}
    for t in types:
        a,b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if t=='bf16' else torch.float32) for _ in 'ab')
        new = dict(ours=Ours(deepcopy(model), views, t, steps=steps), plain=Plain(plain.Step, model, views, t, steps))
        for v in filter(None, variants.split(',')): new[f'ours, {v}'] = Ours(deepcopy(model), views, t, steps=steps, **setting(v))
        if lightly(): new['lightly'] = Plain(LightlyStep, model, views, t, steps)
        for _ in range(2):                                       # the second sees what the first did to weights, teacher and centre
            new = fitting(new, device)
            for k,f in new.items():                              # lightly moves its teacher before the step and clips all gradients together
                tol = 2e-2 if t=='bf16' or k in ('lightly','ours, tf32') else 1e-4
                differs[t,k] = max(differs.get((t,k), 0.), same(f"losses of {k} and ours in {t}", new['ours'].loss, f.loss, tol))
        new |= fitting({'bare timm': BareTimm(model, views, t, steps)}, device)
        cs  |= {(t,k):f for k,f in new.items()} | {(t,'product'): lambda a=a,b=b: a@b}
    flops = bs*count_flops(lambda: plain.Step(model)([v[:1] for v in views]))           # of one image: all are alike, and on a GPU a float32 batch need not fit
    if profile: print_profile(cs[types[-1],'ours'], device)
    secs = race(cs, rounds, device, least=0)
    gb   = {k: peak_gb(f, device) for k,f in cs.items()} if on_gpu(device) else {}
    rate = {t: 2*n**3/statistics.median(secs[t,'product']) for t in types}
    secs = {k: [x/steps for x in xs] for k,xs in secs.items() if k[1]!='product'}
    what,rs = f"{arch}, {bs} images, 2x{size}+{n_small}x{small}, K={out_dim}",[]
    for t in types:
        mine = {k:xs for (u,k),xs in secs.items() if u==t}
        more = {'peak GB': {k:g for (u,k),g in gb.items() if u==t}} if gb else {}
        rs  += rows_of(f"{what}, {t}", mine, differs={k:d for (u,k),d in differs.items() if u==t},
                       **{'images/s': lambda s: bs/s, 'share': {k: flops/statistics.median(xs)/rate[t] for k,xs in mine.items() if k!='bare timm'}}, **more)
    if len(types)>1: rs += rows_of(f"{what}, ours in bf16, plain in fp32", {'ours': secs['bf16','ours'], 'plain': secs['fp32','plain']})[1:]
    return rs

rows.gpu = dict(arch='vit_small_patch16_224', bs=256, precision='bf16', steps=10, variants='tf32,compile,reduce-overhead')

if __name__=='__main__': main(rows, __doc__)
