"""Importing, in processor time, each implementation in a process of its own

    python -m benchmarks.importing --rounds 7

The import alone, without Python's own start; with files that the system has read before. Other work on the machine hardly changes processor time.
`self_supervised.all` stands on fastai, timm and kornia: the third implementation shows what is ours.
"""
import subprocess, sys
from .race import main, race, rows_of

statements = {'ours': 'from self_supervised.all import *',
              'fastai': 'from fastai.vision.all import *',
              'fastai, timm and kornia': 'from fastai.vision.all import *; import timm, kornia.augmentation'}

def seconds(
    statement:str # What is imported
)->float:
    "What a fresh process takes for it"
    code = f'import time; start = time.process_time(); {statement}; print(time.process_time()-start)'
    return float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])

def rows(
    rounds:int=7, # Processes of each implementation
    device:str='cpu' # Where the other benchmarks run; an import uses none
):
    return rows_of('import', race({k: lambda s=s: seconds(s) for k,s in statements.items()}, rounds))

rows.cpu_only = True

if __name__=='__main__': main(rows, __doc__, steady=False)
