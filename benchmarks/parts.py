"""Where the time of a step goes: views, teacher, student, loss, backward pass, clipping, optimizer, moving average

    python -m benchmarks.parts --device cuda

On a GPU the times are between events in its queue, so that nothing waits for them; the rest is what the queue waited for the CPU, monitors and
the scheduler. Images are in memory on the device. The ratio is the share of the whole step.
"""
import time
import torch
from fastai.vision.all import Callback
from self_supervised.data import CachedDL, CachedImages, image_dls
from self_supervised.vision import core
from self_supervised.vision.dino import create_dino_model, dino_learner, get_dino_aug_pipelines
from .race import main, on_gpu, peak_gb, rows_of

class Spans:
    "Times of named parts, in seconds: `took`, name to one number for each call"
    def __init__(self, device): self.gpu,self.spans,self.started = on_gpu(device),{},{}
    def now(self):
        if not self.gpu: return time.perf_counter()
        e = torch.cuda.Event(enable_timing=True)
        e.record()
        return e
    def start(self, name): self.started[name] = self.now()
    def stop(self, name):
        if name in self.started: self.spans.setdefault(name, []).append((self.started.pop(name), self.now()))
    def of(self, name, f):
        def timed(*args, **kwargs):
            self.start(name)
            res = f(*args, **kwargs)
            self.stop(name)
            return res
        return timed
    @property
    def took(self):
        if self.gpu: torch.cuda.synchronize()
        return {k: [a.elapsed_time(b)/1e3 if self.gpu else b-a for a,b in ps] for k,ps in self.spans.items()}

class WholeStep(Callback):
    order = -1000
    def __init__(self, spans): self.spans = spans
    def before_batch(self): self.spans.start('whole step')
class EndOfStep(Callback):
    order = 1000
    def __init__(self, spans): self.spans = spans
    def after_batch(self): self.spans.stop('whole step')

def timed_fit(learn, device, **kwargs):
    "Times of the parts in an epoch of `learn`"
    spans,dino,old = Spans(device),learn.dino,(core.clip_per_param,core.ema_update)
    wrapped = dict(views=(dino,'make_views'), teacher=(dino,'teacher_forward'), loss=(dino,'objective'), backward=(learn,'_backward'), optimizer=(learn,'_step'))
    for name,(o,f) in wrapped.items(): setattr(o, f, spans.of(name, getattr(o, f)))
    core.clip_per_param,core.ema_update = spans.of('clipping', old[0]),spans.of('moving average', old[1])
    hooks = [learn.model.register_forward_pre_hook(lambda *_: spans.start('student')), learn.model.register_forward_hook(lambda *_: spans.stop('student'))]
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_dino(1, cbs=[WholeStep(spans),EndOfStep(spans)], **kwargs)
    finally:
        core.clip_per_param,core.ema_update = old
        for o,f in wrapped.values(): delattr(o, f)
        for h in hooks: h.remove()
    return spans.took

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    bs:int=8, # Images
    side:int=256, # Their side, in pixels
    n_small:int=8, # Number of local crops, in addition to two global crops
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    out_dim:int=65536, # Prototypes
    hidden_dim:int=2048, # Width of the head
    precision:str='fp32', # Or bf16
    steps:int=2, # Steps that are measured, after as many to warm up
    rounds:int=1, # Fits
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    x   = torch.randint(0, 256, (steps*bs,3,side,side), dtype=torch.uint8, device=device)
    dls = image_dls(CachedDL(CachedImages(x, list(range(len(x)))), bs, shuffle=True, drop_last=True, num_workers=0, device=torch.device(device)))
    learn = dino_learner(dls, create_dino_model(arch, out_dim, 0., hidden_dim=hidden_dim).to(device), get_dino_aug_pipelines((2,n_small), crop_sizes=(size,small)),
                         precision=precision, freeze_last_layer=0)
    kw = dict(lr=1e-4, warmup_epochs=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_dino(1, **kw)
    gb = peak_gb(lambda: learn.fit_dino(1, **kw), device) if on_gpu(device) else None
    secs = {}
    for _ in range(rounds):
        for k,xs in timed_fit(learn, device, **kw).items(): secs.setdefault(k, []).extend(xs)
    whole = secs.pop('whole step')
    secs['rest'] = [w-sum(o) for w,o in zip(whole, zip(*secs.values(), strict=True))]
    more = {'peak GB': {'ours': gb}} if gb else {}
    return rows_of(f"{arch}, {bs} images, 2x{size}+{n_small}x{small}, K={out_dim}, {precision}", {'ours': whole} | {f'ours, {k}':xs for k,xs in secs.items()},
                   **{'images/s': {'ours': bs/sorted(whole)[len(whole)//2]}}, **more)

rows.gpu = dict(arch='vit_small_patch16_224', bs=256, precision='bf16', steps=10, rounds=2)

if __name__=='__main__': main(rows, __doc__)
