"""Peak memory of the loss and of a full step, each implementation in a process of its own

    python -m benchmarks.memory --bs 64 --device cuda

MB above what the process held with its libraries loaded; on a CPU of the process, with the system's own allocator settings, on a
GPU of its tensors. Inputs and weights are in it. Two arguments of `dino_learner` save some: `chunked_loss` never holds the logits of all views,
`grad_checkpointing` computes the encoder's activations again.
"""
import json, os, resource, subprocess, sys
from pathlib import Path
import torch
from self_supervised.vision.dino import create_dino_model
from . import loss, plain
from .peers import LightlyStep, lightly
from .race import STEADY, main, on_gpu, peak_gb, rows_of
from .step import Ours, Plain, make_views

def _status(key):
    "From /proc, because the `ru_maxrss` of a process starts at its parent's"
    file = Path('/proc/self/status')
    if not file.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform=='darwin' else 1e3)
    return int(next(l for l in file.read_text().splitlines() if l.startswith(key)).split()[1])*1024/1e6

def peak(f, device)->float:
    "MB that `f` adds at most"
    if on_gpu(device): return 1e3*peak_gb(f, device)
    before = _status('VmRSS')
    f()
    return _status('VmHWM')-before

def run_loss(who, bs, n_small, out_dim, device, **_):
    s,t,c = loss.inputs(bs, out_dim, 2+n_small, device)
    f = loss.contestants(s, t, c, 2+n_small)[who]
    for _ in range(2): f()

def run_step(who, bs, n_small, out_dim, device, arch, size, small, hidden_dim, precision):
    model,views = create_dino_model(arch, out_dim, 0., hidden_dim=hidden_dim).to(device),make_views(bs, n_small, (size,small), device)
    makers = dict(plain=plain.Step, lightly=LightlyStep)
    f = Plain(makers[who], model, views, precision) if who in makers else Ours(model, views, precision, **{k: k in who for k in ('chunked_loss','grad_checkpointing')})
    del model                                                    # the others made their own networks
    for _ in range(2): f()

def rows(
    bs:int=16, # Images
    n_small:int=8, # Number of local crops, in addition to two global crops
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder, a vision transformer
    size:int=224, # Size of the global crops, in pixels
    small:int=96, # Size of the local crops
    out_dim:int=65536, # Prototypes
    hidden_dim:int=2048, # Width of the head
    precision:str='fp32', # Or bf16
    rounds:int=1, # Processes of each implementation
    device:str='cpu' # Where
):
    kw,rs = dict(locals()),[]
    kw.pop('rounds')
    env = {k:v for k,v in os.environ.items() if k not in STEADY}
    # a process that ends without memory is left out of the table
    peers = ['plain']+['lightly']*bool(lightly())
    for what,whos in (('loss', ['ours',*peers]),('step', ['ours','ours, chunked_loss','ours, chunked_loss and grad_checkpointing',*peers])):
        def mb(who):
            run = subprocess.run([sys.executable, '-m', 'benchmarks.memory', '--one', json.dumps([what, who, kw])], env=env, stdout=subprocess.PIPE, text=True, check=True)
            return float(run.stdout.splitlines()[-1])
        mbs = {who: ms for who in whos if all(ms := [mb(who) for _ in range(rounds)])}
        at  = f"{what}, {bs} images, 2x{size}+{n_small}x{small}, K={out_dim}, " + (f"{arch}, {precision}" if what=='step' else 'fp32')
        rs += [{k:v for k,v in r.items() if k!='seconds'} | dict(MB=r['seconds']['median']) for r in rows_of(at, mbs)]
    return rs

rows.gpu = dict(arch='vit_small_patch16_224', bs=256, precision='bf16')

if __name__=='__main__':
    if sys.argv[1:2]==['--one']:
        what,who,kw = json.loads(sys.argv[2])
        lightly()                                                # loaded for all, before anything is measured
        torch.zeros(1, device=kw['device'])
        try: print(peak(lambda: dict(loss=run_loss, step=run_step)[what](who, **kw), kw['device']))
        except torch.OutOfMemoryError as e:
            print(f"{what} of {who} is left out: {str(e).split('. ')[0]}", file=sys.stderr)
            print(0.)
    else: main(rows, __doc__, steady=False)
