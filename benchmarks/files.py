"""Memory of a list of image files, in the main process and in each worker

    python -m benchmarks.files --n 1000000

Bytes for each file above what a list of 1,000 takes: in the main process after the first batch, with the order of an epoch; in a worker what is its own, and no longer shared with the main
process, once it has gone through its part of the files and Python has collected garbage. Each implementation is in a process of its own; its worker is a fork that does to the names what a
worker does, and opens no file. Compared with a list of `Path`s with PyTorch's DataLoader, and with fastai's. Linux alone tells a process what is its own.
"""
import gc, itertools, json, multiprocessing, subprocess, sys
from pathlib import Path
import torch
from fastai.vision.all import Datasets, L, TfmdDL
from self_supervised.data import unlabelled_dls
from .memory import _status
from .race import main, rows_of

def names(n): return ((f'/data/imagenet/train/n{i//1300:08}', f'n{i//1300:08}_{i}.JPEG') for i in range(n))        # folder and name, as a folder is read

def blank(fn): return torch.zeros(3, 8, 8)

def ours(n):
    dl = unlabelled_dls(names(n), 8, 2, num_workers=0, open_fn=blank, device='cpu').train
    def worker():
        dl.wif()
        for i in dl.sample(): dl.dataset.items[i]
    return dl,worker

def fastai(n):
    dl = TfmdDL(Datasets(L(Path(*o) for o in names(n)), [[blank]], do_setup=False), 2, shuffle=True, drop_last=True, num_workers=0, device='cpu')
    def worker():
        for i in dl.sample(): dl.dataset.items[i]
    return dl,worker

def plain(n):
    files = [Path(*o) for o in names(n)]
    class Files(torch.utils.data.Dataset):
        def __len__(self): return n
        def __getitem__(self, i): return blank(files[i])
    dl = torch.utils.data.DataLoader(Files(), 2, shuffle=True, drop_last=True)
    def worker():
        for i in itertools.islice(dl.sampler, 0, None, dl.num_workers): files[i]
    return dl,worker

contestants = dict(ours=ours, plain=plain, fastai=fastai)

def _own():
    "Bytes of this process that it shares with no other"
    return sum(int(l.split()[1])*1024 for l in Path('/proc/self/smaps_rollup').read_text().splitlines() if l.startswith('Private_'))

def measure(
    who:str, # An implementation
    n:int, # Files
    workers:int # Workers that share them
)->tuple: # Bytes in the main process, and in a worker
    "What a list of `n` files takes"
    gc.collect()
    before = _status('VmRSS')
    dl,worker = contestants[who](n)
    batches = iter(dl)
    next(batches)
    here = 1e6*(_status('VmRSS')-before)
    def child(out):
        torch.set_num_threads(1)                                 # as in a worker: the threads of the main process are not here
        dl.__dict__['num_workers'] = workers
        worker()
        gc.collect()
        out.send(_own())
    a,b = multiprocessing.Pipe()
    p   = multiprocessing.get_context('fork').Process(target=child, args=(b,))
    p.start()
    b.close()                                                    # else a child that failed is waited for
    there = a.recv()
    p.join()
    return here,there

def rows(
    n:int=1_000_000, # Files
    workers:int=16, # Workers that share them
    rounds:int=1, # Processes of each implementation
    device:str='cpu' # Where the other benchmarks run; names use none
):
    def once(who, n):
        run = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'benchmarks.files', '--one', json.dumps([who, n, workers])], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])
    got  = {who: [[(a-b)/n for a,b in zip(once(who, n), once(who, 1000))] for _ in range(rounds)] for who in contestants}
    mean = lambda who, j: sum(o[j] for o in got[who])/rounds
    rs   = rows_of(f'{n} files, {workers} workers', {who: [o[0] for o in os_] for who,os_ in got.items()},
                   **{'bytes/file': {w: mean(w,0) for w in got}, 'bytes/file and worker': {w: mean(w,1) for w in got},
                      'GB in all': {w: n*(mean(w,0)+workers*mean(w,1))/1e9 for w in got}})
    return [{k:v for k,v in r.items() if k!='seconds'} for r in rs]

rows.cpu_only = True

if __name__=='__main__':
    if sys.argv[1:2]==['--one']: print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else: main(rows, __doc__, steady=False)
