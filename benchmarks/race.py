"""Implementations side by side: interleaved rounds, medians with spread, one table and one JSON file

Every module with a function `rows` is a benchmark: its arguments are the command line's, and it returns what `rows_of` makes.
"""
import gc, inspect, json, math, os, platform, re, statistics, subprocess, sys, time
from pathlib import Path
import torch, timm
from fastcore.script import anno_parser

# Without these, memory goes back to the system with each tensor and every use of it is a page fault: timings double, and not equally
STEADY = dict(MALLOC_MMAP_THRESHOLD_='4294967296', MALLOC_TRIM_THRESHOLD_='4294967296')
# On a GPU, implementations of other sizes share the memory that the first ones left
os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')

def steady_memory():
    "Start the program again with an allocator that keeps its memory; glibc reads these settings only at the start"
    if platform.libc_ver()[0]=='glibc' and not STEADY.keys()<=os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **STEADY})

def on_gpu(device): return str(device).startswith('cuda')

def sync(device):
    if on_gpu(device): torch.cuda.synchronize(device)

def peak_gb(
    f, # A function
    device:str # GPU
)->float:
    "GB of tensors on the GPU at most while `f` runs, with weights and inputs of all implementations"
    torch.cuda.reset_peak_memory_stats(device)
    f()
    return torch.cuda.max_memory_allocated(device)/1e9

def fitting(
    implementations:dict, # Name to function; 'ours' first
    device:str # Where they run
)->dict: # Those that ran once
    "Leave out what is out of the GPU's memory, with a printed line"
    fits = {}
    for k,f in implementations.items():
        try: f()
        except torch.OutOfMemoryError as e:
            print(f"{k} is left out: {str(e).split('. ')[0]}", file=sys.stderr)
            gc.collect()
            torch.cuda.empty_cache()
        else: fits[k] = f
    return fits

def race(
    implementations:dict, # Name to function; one that returns a float has timed itself, in seconds
    rounds:int=5, # Rounds, after one to warm up
    device:str='cpu', # Waited for at both ends
    setup=None, # Called before each call, outside the timing
    least:float=.05 # Seconds that an implementation runs in a round: quick ones are called often
)->dict: # Name to seconds a call, one number a round
    "Time all implementations in every round, in alternating order, so that what else the machine does hits all"
    def once(f):
        if setup: setup()
        sync(device)
        start = time.perf_counter()
        own = f()
        sync(device)
        return own if isinstance(own, float) else time.perf_counter()-start
    n = {k: max(1, min(200, round(least/max(once(f),1e-6)))) for k,f in implementations.items()}
    secs = {k:[] for k in implementations}
    for r in range(rounds):
        for k,f in list(implementations.items())[::1 if r%2 else -1]:
            if on_gpu(device): once(f)                           # its memory and its clock rate, after another implementation
            secs[k].append(statistics.fmean(once(f) for _ in range(n[k])))
    return secs

def spread(xs): return dict(median=statistics.median(xs), min=min(xs), max=max(xs))

def rows_of(
    what:str, # What was measured
    secs:dict, # What `race` gave; 'ours' among them, or `base`
    base:str='ours', # Whose time the ratios are over
    **more # Columns: name to a function of an implementation's median seconds, or a dict from implementations to values
)->list: # A dict for each implementation
    "Medians with spread; the ratio is taken in each round, so that both of its times are neighbours"
    row = lambda k,xs: dict(what=what, who=k, seconds=spread(xs), ratio=spread([x/o for x,o in zip(xs, secs[base])]))
    return [row(k,xs) | {c: f.get(k) if isinstance(f, dict) else f(statistics.median(xs)) for c,f in more.items()} for k,xs in secs.items()]

def same(
    what:str, # What is compared, for the message
    a, # Ours: a tensor, or a list of numbers or tensors
    b, # Theirs
    tol:float # Largest difference allowed, relative to the largest element
)->float: # Largest difference found, relative to the largest element
    "Refuse to compare the speed of different results"
    if isinstance(a, (list,tuple)): return max(same(what, o, p, tol) for o,p in zip(a, b, strict=True))
    a,b = (torch.as_tensor(o).detach().double().cpu() for o in (a,b))
    diff = ((a-b).abs().max()/b.abs().max().clamp(min=1e-30)).item()
    if not diff<=tol: raise ValueError(f"{what} differ by {diff:.1e} of the largest, more than {tol:.0e}: their times cannot be compared")
    return diff

def driver():
    "Version of the GPU's driver"
    try: return subprocess.run(['nvidia-smi','--query-gpu=driver_version','--format=csv,noheader'], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]
    except (OSError,subprocess.CalledProcessError,IndexError): return 'of unknown version'

def machine(device='cpu'):
    "What the numbers were measured on"
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').exists() else None
    gpu = f"{torch.cuda.get_device_name(device)} with driver {driver()} and CUDA {torch.version.cuda}, " if on_gpu(device) else ''
    kept = f"{' and '.join(STEADY)} of 4 GiB" if STEADY.keys()<=os.environ.keys() else "the system's allocator settings"
    n    = torch.get_num_threads()
    return f"{gpu}{cpu[1] if cpu else platform.processor()}, {n} thread{'s'*(n!=1)}; torch {torch.__version__}, timm {timm.__version__}; {kept} for all implementations"

def _n(v): return f'{v:.0f}' if v>=1000 else f'{v:.3g}'
def _ms(s): return f"{_n(1e3*s['median'])} ({_n(1e3*s['min'])} to {_n(1e3*s['max'])})"
def _x(s):  return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"
def _cell(v): return '' if v is None else _x(v) if isinstance(v, dict) else _n(v) if isinstance(v, float) else str(v)
def _cells(r, timed, extra):
    return [r['what'], r['who']] + [_ms(r['seconds']) if 'seconds' in r else '']*timed + [_x(r['ratio']) if 'ratio' in r else ''] + [_cell(r.get(k)) for k in extra]

def markdown(rows)->str:
    "Rows as a table; a column for whatever any of them has"
    extra = list(dict.fromkeys(k for r in rows for k in r if k not in ('what','who','seconds','ratio')))
    timed = any('seconds' in r for r in rows)
    head  = ['what','who'] + ['ms (smallest to largest)']*timed + ['its / ours'] + extra
    return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---']*len(head), *(_cells(r, timed, extra) for r in rows)])

# How a run is measured, and not what
MANNER = 'device','rounds','steps','profile'

def sizes(
    rows, # The function of a benchmark; `rows.gpu` holds its sizes on a GPU
    device:str # Where it runs
)->dict: # Argument to value
    "Default sizes of a benchmark on a device"
    usual = {k:p.default for k,p in inspect.signature(rows).parameters.items()}
    return usual | (getattr(rows, 'gpu', {}) if on_gpu(device) else {})

def chosen(
    rows, # The function of a benchmark
    args:dict # Its arguments
)->dict: # Those that differ from its defaults on that device
    "What tells a run from the others of its benchmark"
    usual = sizes(rows, args['device']) | dict(device=inspect.signature(rows).parameters['device'].default)
    return {k:args[k] for k in usual if args[k]!=usual[k]}

def key(name, device, chosen): return ', '.join([f'{name} on {device}', *(f'{k}={v}' for k,v in chosen.items() if k not in MANNER)])
def command(name, chosen):
    return ' '.join([f'python -m benchmarks.{name}', *(f"--{k.replace('_','-')}{'' if v is True else f' {v}'}" for k,v in chosen.items())])

def page(
    res:dict # What results.json holds
)->str: # What results.md is
    "All tables, the closest races first"
    closest = lambda v: min((r['ratio']['median'] for r in v['rows'] if 'ratio' in r and not r['who'].startswith('ours')), default=math.inf)
    intro = "# Benchmarks\n\nRounds are interleaved; times are medians; a ratio is its time (or memory) over ours, so above 1 ours is better.\nComparisons in which another implementation is closest to ours, or faster, come first.\n"
    parts = [f"## {k}: {v['title']}\n\n`{v['command']}`; {v['machine']}.\n\n{markdown(v['rows'])}\n" for k,v in sorted(res.items(), key=lambda kv: (closest(kv[1]),kv[0]))]
    return '\n'.join([intro, *parts])

def save(name, doc, rows, device, chosen, out):
    "Put a run into results.json, in place of the last one of the same sizes, and write results.md from all"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    file = out/'results.json'
    res  = json.loads(file.read_text()) if file.exists() else {}
    res[key(name, device, chosen)] = dict(title=doc.strip().splitlines()[0], machine=machine(device), command=command(name, chosen), rows=rows)
    file.write_text(json.dumps(res, indent=1))
    (out/'results.md').write_text(page(res))

def main(
    rows, # The function of a benchmark
    doc:str, # Its docstring, whose first line is the title of the table
    steady:bool=True # Keep freed memory for reuse
):
    "The command line of a benchmark"
    name = Path(sys.modules['__main__'].__file__).stem
    p = anno_parser(rows, prog=f'python -m benchmarks.{name}')
    p.add_argument('--out', default=str(Path(__file__).parent), help='Folder of results.md and results.json')
    args = p.parse_args()
    p.set_defaults(**{k:v for k,v in sizes(rows, args.device).items() if k!='device'})
    args = vars(p.parse_args())
    if steady: steady_memory()
    rs  = rows(**{k: args[k] for k in inspect.signature(rows).parameters})
    print(f"{doc.strip().splitlines()[0]}\n{machine(args['device'])}\n\n{markdown(rs)}", flush=True)
    save(name, doc, rs, args['device'], chosen(rows, args), args['out'])
