"Processes for tests, forked from one server for each test worker, which has imported the library: a process starts without its imports"
import multiprocessing, os, runpy, signal, subprocess, sys, tempfile, warnings

HAS_SERVER = 'forkserver' in multiprocessing.get_all_start_methods()              # not on Windows
FORKS = multiprocessing.get_context('forkserver' if HAS_SERVER else 'spawn')
if HAS_SERVER: FORKS.set_forkserver_preload(['self_supervised.all','self_supervised.cli.train','fastai.distributed'])

def code(src):
    "Run `src` as a program"
    exec(compile(src, '<test>', 'exec'), {'__name__': '__main__'})

def script(path, *args):
    "Run the Python file `path` as `python path args` does"
    sys.argv = [str(path), *map(str, args)]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(str(path), run_name='__main__')

def module(name, *args):
    "Run the module `name` as `python -m name args` does"
    sys.argv = [name, *map(str, args)]
    runpy.run_module(name, run_name='__main__', alter_sys=True)

def command(entry, *args):
    "Run `module:function`, the entry point of a command"
    mod,name = entry.split(':')
    sys.argv = [name, *map(str, args)]
    sys.exit(getattr(__import__(mod, fromlist=[name]), name)())

def _enter(f, args, env, cwd, files):
    for fd,name in zip((1,2), files): os.dup2(os.open(name, os.O_WRONLY|os.O_APPEND), fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # background jobs of a shell ignore it
    os.environ.update(env)
    os.chdir(cwd)
    warnings.simplefilter('ignore')
    import torch
    torch.set_num_threads(1)
    f(*args)

class Forked:
    "`f(*args)` in a process of its own, with the methods of `subprocess.Popen`"
    def __init__(self, f, *args, cwd='.', **env):
        self.files = [tempfile.NamedTemporaryFile('r', encoding='utf-8') for _ in 'oe']
        self.p = FORKS.Process(target=_enter, args=(f, args, env, os.path.abspath(cwd), [o.name for o in self.files]))
        self.p.start()
    @property
    def returncode(self): return self.p.exitcode
    def poll(self): return self.p.exitcode
    def send_signal(self, sig): os.kill(self.p.pid, sig)
    def kill(self): self.p.kill()
    def wait(self, timeout=240):
        self.p.join(timeout)
        if self.p.exitcode is None:
            self.p.kill()
            self.p.join()
            raise subprocess.TimeoutExpired(self.p.name, timeout)
        return self.p.exitcode
    def communicate(self, timeout=240):
        self.wait(timeout)
        return tuple(o.read() for o in self.files)

def run(f, *args, check=True, **kwargs):
    "What `f(*args)` printed and complained of in a process of its own, which has to succeed"
    p = Forked(f, *args, **kwargs)
    out,err = p.communicate()
    assert not check or p.returncode==0, err[-3000:]
    return out,err
