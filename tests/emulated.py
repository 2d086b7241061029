"""A GPU that is emulated on the CPU: its tensors compute on the CPU and say that they are on `cuda:0`. Within `with gpu() as waits:`
mixed devices raise an error as CUDA does, and `waits` counts what would wait for the GPU, by operation and place in the code.
Random numbers are those of the CPU. What it cannot do: times, `torch.compile`, subclasses such as `TensorImage`, which become plain
tensors there, `empty_like(x, device='cpu')`, and tensors that a backward pass in Python makes on the CPU."""
import collections, contextlib, os, sys, torch
from torch import nn
from types import SimpleNamespace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device('cuda:0')

class OnGPU(torch.Tensor):
    "A tensor that is on the GPU; `here` holds its values"
    @staticmethod
    def __new__(cls, here):
        opts = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device='cpu')   # autograd asks no GPU
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, **opts)
    def __init__(self, here): self.here = here
    device  = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu  = property(lambda self: False)
    def get_device(self): return 0
    def __repr__(self): return f'OnGPU({self.here})'
    def __deepcopy__(self, memo):
        if id(self) not in memo: memo[id(self)] = _like(self, OnGPU(self.here.detach().clone()))
        return memo[id(self)]
    def __reduce_ex__(self, protocol): return torch.Tensor.cpu(self).__reduce_ex__(protocol)
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

def _like(old, new): return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
def _there(o): return OnGPU(o) if isinstance(o, torch.Tensor) and not isinstance(o, OnGPU) else o
def here(o):
    "The values of a tensor of the GPU, as a tensor of the CPU; does not count as waiting"
    return o.here if isinstance(o, OnGPU) else o
def on_gpu(*tensors):
    "Tensors, or modules with theirs, on the GPU"
    out = [o.to(GPU) if isinstance(o, nn.Module) else _there(o) for o in tensors]
    return out if len(out)>1 else out[0]

class Waits(collections.Counter):
    "What waited for the GPU: (operation, innermost functions of the project and of its libraries) to a number"
    def __str__(self): return '\n'.join(f'{n:4d} {op:24s} {where}' for (op,where),n in sorted(self.items(), key=lambda o: -o[1])) or 'none'
    def by(self,
        *parts # Names of files or functions
    ):
        "Their number where one of the `parts` was in the stack; without parts, all"
        return sum(n for (_,where),n in self.items() if not parts or any(p in where.split() for p in parts))

_waits,_copying_back,_in_backward = Waits(),False,False
_sources  = ('self_supervised','fastai','timm','kornia','torch/amp','torch/optim')
_waiting  = {'_local_scalar_dense','nonzero','masked_select','_unique2','unique_dim','unique_consecutive','equal','is_nonzero','bincount',
             '_linalg_check_errors','linalg_eig','_linalg_eigh','_linalg_svd','linalg_lstsq'}
_indexing = {'index','index_put','index_put_','_index_put_impl_'}

def _places():
    f,found = sys._getframe(),[]
    while f:
        if any(f'/{o}/' in f.f_code.co_filename for o in _sources): found += [os.path.basename(f.f_code.co_filename),f.f_code.co_name]
        f = f.f_back
    return ' '.join(found)
def _wait(what): _waits[what,_places()] += 1

def _name(func): return func._schema.name.split('::')[1]
def _is_gpu(d): return d is not None and torch.device(d).type=='cuda'
def _mixed(name, tensors):
    raise RuntimeError(f"Expected all tensors to be on the same device: {name} with CPU tensors {[tuple(o.shape) for o in tensors]}, "
                       f"in {' < '.join(_places().split()[:6])}")

def _check(name, func, args, kwargs, near):
    "Raise an error where CUDA does, and count what waits, in an operation on tensors of the GPU"
    if name in _indexing:
        idxs = [o for o in args[1] if o is not None]
        if not isinstance(args[0], OnGPU):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(not isinstance(o, OnGPU) for o in idxs): _wait('copy of an index')
        if any(o.dtype in (torch.bool,torch.uint8) for o in idxs): _wait('boolean index')
        if name!='index' and not isinstance(args[2], OnGPU) and args[2].ndim: _mixed(name, [args[2]])
    elif bad := [o for o in near if o.ndim]: _mixed(name, bad)
    elif name=='repeat_interleave' and func._overloadname=='Tensor' and kwargs.get('output_size') is None: _wait(name)
    elif name in _waiting: _wait(name)

def _run(func, args, kwargs):
    "Run an operation on the CPU; its result is on the GPU where that of CUDA would be"
    name = _name(func)
    ts   = [o for o in tree_leaves((args,kwargs)) if isinstance(o, torch.Tensor)]
    far,near = ([o for o in ts if isinstance(o, OnGPU)==g] for g in (True,False))
    goes = bool(far) or _in_backward and not ts                  # C++ makes zeros for the backward pass on the CPU
    if _is_gpu(kwargs.get('device')): goes,kwargs = True,kwargs|dict(device=torch.device('cpu'))
    elif name=='_to_copy' and _copying_back: goes = False
    kwargs = {k:v for k,v in kwargs.items() if k!='pin_memory'}
    if name in ('_to_copy','copy_'):
        to,of = (isinstance(args[0], OnGPU),isinstance(args[1], OnGPU)) if name=='copy_' else (goes,bool(far))
        later = kwargs.get('non_blocking') or name=='copy_' and len(args)>2 and args[2]
        scalar = name=='copy_' and not of and not args[1].ndim   # goes with the call
        if to!=of and not later and not scalar: _wait('copy to the GPU' if to else 'copy to the CPU')
        goes = to
    elif name=='_pin_memory': return args[0]
    elif far and name not in ('detach','alias','lift_fresh','set_'): _check(name, func, args, kwargs, near)
    out = func(*tree_map(here, args), **tree_map(here, kwargs))
    if not goes: return out
    returns = func._schema.returns
    def writes(o): return o.alias_info is not None and o.alias_info.is_write
    if returns and not isinstance(out, list) and all(map(writes, returns)):                # in place
        given   = {a.name:v for a,v in zip(func._schema.arguments, args)} | kwargs
        written = [given[a.name] for a in func._schema.arguments if writes(a)]
        return written[0] if len(returns)==1 else tuple(written)
    return tree_map(_there, out)

class _Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE     # before autograd's own
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

@contextlib.contextmanager
def _during(name, value=True):
    was,globals()[name] = globals()[name],value
    try: yield
    finally: globals()[name] = was

@contextlib.contextmanager
def _patched(*patches):
    "Replace attributes, given as (object, name, new value), for a while"
    olds = [(o,k,getattr(o, k)) for o,k,_ in patches]
    for o,k,v in patches: setattr(o, k, v)
    try: yield
    finally:
        for o,k,v in olds: setattr(o, k, v)

class _Stream:
    "A stream or an event of a GPU that is always done"
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def record_event(self, *args): return _Stream()
    def wait_event(self, *args): pass
    def wait_stream(self, *args): pass
    def record(self, *args): pass
    def query(self): return True

def _attention(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None): return (q*q.shape[-1]**-.5@k.mT).softmax(-1)@v

def _patches():
    "What PyTorch decides in C++ by the device of a tensor, and in Python because there is no GPU"
    T,copy,amp = torch.Tensor,torch.ops.aten._to_copy,torch.amp.autocast_mode.autocast
    to,cpu,numpy,array,tolist,backward = T.to,T.cpu,T.numpy,T.__array__,T.tolist,T.backward
    start,enabled,dtype_of = amp.__init__,torch.is_autocast_enabled,torch.get_autocast_dtype
    def back(x, dtype=None, later=False):
        with _during('_copying_back'): return copy(x, dtype=dtype or x.dtype, non_blocking=later)
    def new_to(self, *args, **kwargs):
        if args and isinstance(args[0], T): args = args[0].device,args[0].dtype,*args[1:]
        def given(name, *kinds): return kwargs.get(name, next((o for o in args if isinstance(o, kinds)), None))
        dev,dtype,later = given('device', str, torch.device),given('dtype', torch.dtype),bool(given('non_blocking', bool))
        if not isinstance(self, OnGPU) and not _is_gpu(dev): return to(self, *args, **kwargs)
        if not isinstance(self, OnGPU): return copy(self, dtype=dtype or self.dtype, device=GPU, non_blocking=later)
        if dev is not None and not _is_gpu(dev): return back(self, dtype, later)
        x = self if dtype in (None,self.dtype) else copy(self, dtype=dtype)
        return x.contiguous(memory_format=kwargs['memory_format']) if kwargs.get('memory_format') else x
    def new_backward(self, *args, **kwargs):
        with _during('_in_backward', isinstance(self, OnGPU)): return backward(self, *args, **kwargs)
    def refused(f):
        def new(self, *args, **kwargs):
            if isinstance(self, OnGPU): raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            return f(self, *args, **kwargs)
        return new
    def plain(f): return lambda x,cls: x if isinstance(x, OnGPU) or cls is OnGPU else f(x, cls)    # fastai casts copies back
    load = torch.load
    def new_load(f, map_location=None, **kwargs):
        to_gpu = isinstance(map_location, (str,torch.device)) and _is_gpu(map_location)
        return tree_map(_there, load(f, 'cpu', **kwargs)) if to_gpu else load(f, map_location, **kwargs)
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    def new_group(tensors, *args):
        on_gpu = lambda ts: any(isinstance(o, OnGPU) for o in ts[0])
        return {(GPU if on_gpu(v[0]) else d,t):v for (d,t),v in group(tensors, *args).items()}
    def kind(device): return 'cpu' if device=='cuda' else device
    def new_start(self, device_type, *args, **kwargs): start(self, kind(device_type), *args, **kwargs)
    return [
        (T, 'to', new_to), (T, 'cpu', lambda self,*a,**k: back(self) if isinstance(self, OnGPU) else cpu(self, *a, **k)),
        (T, 'cuda', lambda self,*a,**k: new_to(self, GPU)), (T, 'backward', new_backward),
        (T, 'new_tensor', lambda self,x,dtype=None,device=None: torch.tensor(x, dtype=dtype or self.dtype, device=device or self.device)),
        (torch.__future__, 'get_swap_module_params_on_conversion', lambda: True),
        (T, 'numpy', refused(numpy)), (T, '__array__', refused(array)),
        (T, 'tolist', lambda self: tolist(back(self) if isinstance(self, OnGPU) else self)),
        *((o, 'as_subclass', plain(o.as_subclass)) for o in (T,torch)),          # the second is fastai's
        (nn.functional, 'scaled_dot_product_attention', _attention), (amp, '__init__', new_start),
        (torch, 'is_autocast_enabled', lambda d='cuda': enabled(kind(d))), (torch, 'get_autocast_dtype', lambda d: dtype_of(kind(d))),
        (torch.optim.Optimizer, '_group_tensors_by_device_and_dtype', staticmethod(new_group)),
        *((torch.cuda, o, _Stream) for o in ('Stream','stream','current_stream','Event')), (T, 'record_stream', lambda *args: None),
        (torch, 'load', new_load), (torch.cuda, 'get_device_properties', lambda *args: SimpleNamespace(name='emulated', total_memory=2**30)),
        (torch.cuda, 'mem_get_info', lambda *args: (2**30,2**30)), (torch.cuda, 'max_memory_allocated', lambda *args: 0),
        (torch.cuda, '_lazy_init', lambda: None), (torch.cuda, 'is_bf16_supported', lambda *a,**k: True),
        (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)]

@contextlib.contextmanager
def gpu():
    "Emulate a GPU in a block, and count what waits for it"
    import fastai.torch_core                                     # defines torch.as_subclass
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)                    # torch.tensor(..., device=GPU) copies from the CPU
    with _patched(*_patches()), _during('_waits', Waits()), _Mode():
        try: yield _waits
        finally: torch._C._set_only_lift_cpu_tensors(False)
