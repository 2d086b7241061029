"All benchmarks, each in a process of its own: `python -m benchmarks`, or `python -m benchmarks loss ema` for some"
import argparse, importlib, pkgutil, subprocess, sys
from pathlib import Path
import benchmarks

names = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name!='__main__' and hasattr(importlib.import_module(f'benchmarks.{m.name}'), 'rows')]
p = argparse.ArgumentParser(prog='python -m benchmarks', description=f"Benchmarks: {', '.join(names)}. Each takes its own sizes: python -m benchmarks.NAME --help")
p.add_argument('names', nargs='*', default=names, help='Which; default: all')
p.add_argument('--device', default='cpu')
p.add_argument('--rounds', help="Default: each benchmark's own")
p.add_argument('--out', default=str(Path(__file__).parent), help='Folder of results.md and results.json')
args = p.parse_args()
if set(args.names)-set(names): p.error(f"no benchmark named {', '.join(sorted(set(args.names)-set(names)))}: choose from {', '.join(names)}")

def run(name): return subprocess.run([sys.executable, '-m', f'benchmarks.{name}', '--device', args.device, '--out', args.out, *(['--rounds', args.rounds] if args.rounds else [])]).returncode

failed = [n for n in args.names if run(n)]
print(f"{args.out}/results.md and results.json are written" + (f"; these failed, see above: {', '.join(failed)}" if failed else ''))
sys.exit(bool(failed))
