"A tensor that says it is on a GPU and computes on the CPU: refuses what a GPU would, so that functions are tried without one"
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device('cuda:0')

class OnGPU(torch.Tensor):
    device  = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu  = property(lambda self: False)
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return _call(func, args, kwargs or {})

def plain(o): return o.as_subclass(torch.Tensor) if isinstance(o, OnGPU) else o
def _there(o): return torch.Tensor.as_subclass(o, OnGPU) if isinstance(o, torch.Tensor) and not isinstance(o, OnGPU) else o
def on_gpu(*tensors):
    "The tensors, or modules with theirs, as if they were on a GPU"
    with torch._C.DisableTorchFunction(): out = [_there(o) for o in tensors]
    return out if len(out)>1 else out[0]

def _is_gpu(d): return isinstance(d, (str,torch.device)) and torch.device(d).type=='cuda'

def _call(func, args, kwargs):
    name,flat = getattr(func, '__name__', ''),tree_flatten((args, kwargs))[0]
    ts  = [o for o in flat if isinstance(o, torch.Tensor)]
    far = any(isinstance(o, OnGPU) for o in ts)
    moves = [d for d in flat if isinstance(d, torch.device) or isinstance(d, str) and d.split(':')[0] in ('cpu','cuda')] if name in ('to','cpu','cuda') or 'device' in kwargs else []
    run = lambda f,a,k: f(*a, **k)
    with torch._C.DisableTorchFunction():
        if name in ('to','cpu','cuda'):
            if name=='cpu' or moves and not _is_gpu(moves[0]): goes = False
            elif name=='cuda' or moves: goes = True
            else: goes = isinstance(args[1], OnGPU) if len(args)>1 and isinstance(args[1], torch.Tensor) else isinstance(args[0], OnGPU)
            cpu = lambda o: torch.device('cpu') if _is_gpu(o) else plain(o) if isinstance(o, torch.Tensor) else o
            out = cpu(args[0]) if name=='cuda' else func(*map(cpu, args), **{k:cpu(v) for k,v in kwargs.items()})
            return _there(out) if goes else out
        if moves: far = _is_gpu(moves[0])                        # a new tensor
        elif far and name not in ('__getitem__','__setitem__','copy_'):
            bad = [tuple(o.shape) for o in ts if not isinstance(o, OnGPU) and o.ndim]
            if bad: raise RuntimeError(f"Expected all tensors to be on the same device: {name} with CPU tensors {bad}")
        if name=='__getitem__' and not isinstance(args[0], OnGPU) and far: raise RuntimeError("indices should be on the CPU")
        if name=='__getitem__': far = isinstance(args[0], OnGPU)
        if name in ('numpy','__array__') and far: raise TypeError("can't convert cuda:0 device type tensor to numpy")
        un = lambda o: plain(o) if isinstance(o, torch.Tensor) else torch.device('cpu') if moves and _is_gpu(o) else o
        out = func(*tree_map(un, args), **tree_map(un, kwargs))
        return tree_map(_there, out) if far and name not in ('item','tolist') else out

class gpu_there(TorchFunctionMode):
    "Makes new tensors where they are asked for, `with gpu_there():`"
    def __torch_function__(self, func, types, args=(), kwargs=None): return _call(func, args, kwargs or {})
