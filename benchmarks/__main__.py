"""All benchmarks, each in a process of its own

    python -m benchmarks                          # on the CPU
    python -m benchmarks --device cuda            # on a GPU, in the sizes for one
    python -m benchmarks loss ema --bs 4          # some, in sizes of your own
"""
import argparse, importlib, inspect, pkgutil, subprocess, sys
from pathlib import Path
import benchmarks
from benchmarks.race import command, on_gpu

def found():
    "Modules that have rows to give, and the function of each"
    ms = {m.name: importlib.import_module(f'benchmarks.{m.name}') for m in pkgutil.iter_modules(benchmarks.__path__) if m.name!='__main__'}
    return {n: m.rows for n,m in ms.items() if hasattr(m, 'rows')}

def main():
    rows    = found()
    known   = {n: inspect.signature(f).parameters for n,f in rows.items()}
    options = {k:o for ps in known.values() for k,o in ps.items()}
    p = argparse.ArgumentParser(prog='python -m benchmarks', description="Options go to the benchmarks that have them; what they mean says python -m benchmarks.NAME --help")
    p.add_argument('names', nargs='*', help=f"Which of {', '.join(known)}; default: all, on a GPU all that use it")
    p.add_argument('--out', default=str(Path(__file__).parent), help='Folder of results.md and results.json')
    for k,o in options.items():
        p.add_argument(f"--{k.replace('_','-')}", default=argparse.SUPPRESS, **(dict(action='store_true') if o.annotation is bool else dict(type=o.annotation)))
    given = vars(p.parse_args())
    names,out = given.pop('names'),given.pop('out')
    unknown = ', '.join(sorted(set(names)-set(known)))
    if unknown: p.error(f"no benchmark named {unknown}: choose from {', '.join(known)}")
    names  = names or [n for n in known if not (on_gpu(given.get('device', 'cpu')) and getattr(rows[n], 'cpu_only', False))]
    unused = [k for k in given if not any(k in known[n] for n in names)]
    if unused: p.error(f"{' and '.join(names)} has no --{unused[0].replace('_','-')}: see python -m benchmarks.{names[0]} --help")
    def run(n): return subprocess.run([sys.executable, *command(n, {k:v for k,v in given.items() if k in known[n]}).split()[1:], '--out', out]).returncode
    failed = [n for n in names if run(n)]
    if failed: sys.exit(f"these failed, see above: {', '.join(failed)}")
    print(f"{out}/results.md and results.json are written")

if __name__=='__main__': main()
