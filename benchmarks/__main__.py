"All benchmarks, each in a process of its own: `python -m benchmarks`, or `python -m benchmarks loss ema` for some"
import argparse, importlib, pkgutil, subprocess, sys
from pathlib import Path
import benchmarks

def names():
    "Modules that have rows to give"
    found = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name!='__main__']
    return [n for n in found if hasattr(importlib.import_module(f'benchmarks.{n}'), 'rows')]

def main():
    known = names()
    p = argparse.ArgumentParser(prog='python -m benchmarks', description="Each has sizes of its own: python -m benchmarks.NAME --help")
    p.add_argument('names', nargs='*', help=f"Which of {', '.join(known)}; default: all")
    p.add_argument('--device', default='cpu', help='Where')
    p.add_argument('--rounds', help="Rounds; default: each benchmark's own")
    p.add_argument('--out', default=str(Path(__file__).parent), help='Folder of results.md and results.json')
    args = p.parse_args()
    unknown = ', '.join(sorted(set(args.names)-set(known)))
    if unknown: p.error(f"no benchmark named {unknown}: choose from {', '.join(known)}")
    opts   = ['--device', args.device, '--out', args.out] + (['--rounds', args.rounds] if args.rounds else [])
    failed = [n for n in args.names or known if subprocess.run([sys.executable, '-m', f'benchmarks.{n}', *opts]).returncode]
    if failed: sys.exit(f"these failed, see above: {', '.join(failed)}")
    print(f"{args.out}/results.md and results.json are written")

if __name__=='__main__': main()
