"The package: builds without a warning, holds what it should, works where no extra is installed, leaves nothing; its texts agree on the version"
import json, os, re, shutil, subprocess, sys, tarfile, venv, zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
cfg  = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg  = cfg['DEFAULT']
env  = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONDONTWRITEBYTECODE')}

extras  = {k.removesuffix('_requirements'): [Requirement(o) for o in v.split()] for k,v in cfg.items() if k.endswith('_requirements')}
scripts = dict(o.split('=') for o in cfg['console_scripts'].split())
left    = {'.git','.ci','.gitignore','.venv','build','dist','runs','_site','.pytest_cache','.ipynb_checkpoints','__pycache__'}        # for the repository alone, or made here

def files(d): return sorted(p.relative_to(d).as_posix() for p in Path(d).rglob('*') if p.is_file())
def run(*cmd, **kwargs):
    r = subprocess.run([str(o) for o in cmd], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert r.returncode==0, r.stdout
    return r.stdout

def sources():
    "Files of the project: those that git knows; of an unpacked sdist, all"
    git = shutil.which('git') and (root/'.git').exists() and subprocess.run(['git','ls-files','-z'], cwd=root, capture_output=True, text=True).stdout
    return [f for f in (git.split('\0') if git else files(root)) if (root/f).is_file() and Path(f).parts[0] not in left and not any(p in ('__pycache__','.ipynb_checkpoints') or p.endswith('.egg-info') for p in Path(f).parts)]

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    d = tmp_path_factory.mktemp('source')
    for f in sources():
        (d/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, d/f)
    return d

@pytest.fixture(scope='module')
def built(source, tmp_path_factory):
    "Folder, and all that was said"
    pytest.importorskip('build', reason="the package is built with `pip install -e '.[dev]'`")
    d = tmp_path_factory.mktemp('dist')
    return d, run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', d, source, cwd=d)

@pytest.fixture(scope='module')
def wheel(built): return next(built[0].glob('*.whl'))

@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z: return message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))))

def test_builds_without_a_warning(built):
    out = built[1]
    assert 'Successfully built' in out
    assert [l for l in out.splitlines() if re.search(r'\bwarning\b|deprecat|no files found', l, re.I)]==[]

def test_sdist_holds_what_builds_tests_and_documents(built):
    with tarfile.open(next(built[0].glob('*.tar.gz'))) as t: has = {n.partition('/')[2] for n in t.getnames()}
    wanted = set(sources())
    assert wanted-has==set(), 'MANIFEST.in names what goes along'
    assert {h for h in has-wanted if '.egg-info' not in h and not any(w.startswith(h+'/') for w in wanted)}-{''}<={'PKG-INFO','setup.cfg'}

def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z: has = {n for n in z.namelist() if '.dist-info/' not in n}
    assert has=={f for f in sources() if f.startswith('self_supervised/')}
    assert 'self_supervised/py.typed' in has and wheel.name.endswith('-py3-none-any.whl')

def test_metadata(metadata):
    assert (metadata['Name'],metadata['Version'])==(cfg['lib_name'],cfg['version'])
    assert metadata['License-Expression']=='Apache-2.0' and metadata['License-File']=='LICENSE' and metadata['License'] is None
    assert metadata['Description-Content-Type']=='text/markdown' and metadata.get_payload().startswith('<!-- written from')
    assert metadata['Requires-Python']=='>=3.11'
    assert {'Typing :: Typed', *(f'Programming Language :: Python :: {v}' for v in cfg['pythons'].split())}<=set(metadata.get_all('Classifier'))
    needs = [Requirement(o) for o in metadata.get_all('Requires-Dist')]
    assert {r.name for r in needs if not r.marker}=={'fastai','torch','timm','kornia','matplotlib'}
    assert set(metadata.get_all('Provides-Extra'))==set(extras)
    assert {r.name for r in needs if r.marker and r.marker.evaluate({'extra':'onnx'})}=={'onnx','onnxscript'}

def test_extras_know_each_other():
    own = {e: {x for r in rs if r.name==cfg['lib_name'] for x in r.extras} for e,rs in extras.items()}
    assert own['all']==set(extras)-{'all','dev','docs','bench'} and {'all','docs'}<=own['dev']
    page = (root/'nbs'/'guides'/'01_installation.ipynb').read_text(encoding='utf-8')
    assert [e for e in extras if f'<th>{e}</th>' not in page]==[]

def test_every_extra_that_is_asked_for_is_there():
    "`need_extra` names extras that settings.ini has, and packages of theirs"
    for f in (root/'self_supervised').rglob('*.py'):
        for args in re.findall(r'\bneed_extra\(([^)\n]*)\)', f.read_text(encoding='utf-8')):
            if ':' in args: continue                             # its definition
            extra,*packages = re.findall(r"'([\w.-]+)'", args.partition(',')[2])
            assert set(packages or [extra])<={r.name.replace('-','_') for r in extras[extra]}, f'{f.name}: {args}'

# What runs in an environment of its own, where each optional package is hidden
ALONE = """
import builtins, importlib.metadata as md, json, sys
hidden,tried,real = set(sys.argv[1].split()),set(),builtins.__import__
for m in hidden: sys.modules[m] = None                           # as if it were not installed
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    if not level and name.split('.')[0] in hidden: tried.add(name.split('.')[0])
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = watched
import self_supervised.cli as cli
lazy = 'torch' not in sys.modules
from fastai.vision.all import *
theirs,theirs_tried = set(sys.modules),set(tried)
cli.dino_report
needless = [m for m in ('self_supervised.cli.train','self_supervised.vision.dino','self_supervised.lab') if m in sys.modules]
from self_supervised.all import *
res = dict(lazy=lazy, needless=needless, file=sys.modules['self_supervised'].__file__, modules=sorted(set(sys.modules)-theirs), tried=sorted(tried-theirs_tried))
entry = {e.name:e for e in md.distribution('self-supervised-dino').entry_points if e.group=='console_scripts'}
res['commands'] = {n: [e.value, callable(e.load())] for n,e in entry.items()}
def sentence(f):
    try: f()
    except MissingExtra as e: return str(e)
enc = create_encoder('vit_mini_patch4_16')
res['sentences'] = [sentence(f) for f in (lambda: to_onnx(enc, 'x.onnx'), lambda: lora_encoder('vit_mini_patch4_16'), lambda: dino_learner(digits_dls(), enc).distrib_ctx())]
print(json.dumps(res))
"""

@pytest.fixture(scope='module')
def place(wheel, tmp_path_factory):
    "An environment with the wheel in it, which finds all other packages where these tests have them; and its files before that"
    d = tmp_path_factory.mktemp('env')
    venv.create(d, with_pip=False, symlinks=os.name!='nt')
    python = d/('Scripts/python.exe' if os.name=='nt' else 'bin/python')
    lib    = Path(run(python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=d).strip())
    (lib/'others.pth').write_text('\n'.join(p for p in sys.path if Path(p).name in ('site-packages','dist-packages')))
    before = files(d)
    run(sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python', python, 'install', '--no-deps', '--no-index', wheel, cwd=d)
    return d,python,before

@pytest.fixture(scope='module')
def alone(place):
    hidden = {r.name.replace('-','_') for rs in extras.values() for r in rs} - {cfg['lib_name'].replace('-','_'),'setuptools'} | {'jupyter'}
    d,python,_ = place
    return json.loads(run(python, '-W', 'ignore', '-c', ALONE, ' '.join(sorted(hidden)), cwd=d).splitlines()[-1])

def test_works_where_no_extra_is_installed(place, alone):
    assert Path(alone['file']).is_relative_to(place[0])
    assert alone['sentences']==["to_onnx needs onnx and onnxscript: pip install 'self-supervised-dino[onnx]'", "lora_encoder needs peft: pip install 'self-supervised-dino[peft]'",
                                "learn.distrib_ctx needs accelerate: pip install 'self-supervised-dino[dist]'"]

def test_import_is_light(alone):
    "`import self_supervised.all` brings nothing that takes long and that only some functions need"
    assert alone['tried']==['accelerate']                        # by fastai.distributed, which has the loader that ours is made of
    heavy = 'torch._dynamo','torch._inductor','sklearn.manifold','sklearn.linear_model','sklearn.datasets','scipy.stats','IPython'
    assert [m for m in alone['modules'] if m.startswith(heavy)]==[]

def test_commands_are_imported_when_they_are_used(alone): assert alone['lazy'] and alone['needless']==[]

def test_commands_resolve(place, alone):
    assert alone['commands']=={n: [v,True] for n,v in scripts.items()}
    for n in scripts: assert list(place[1].parent.glob(n+'*')), n

def test_uninstalling_leaves_nothing(place, alone):
    d,python,before = place
    assert len(files(d))>len(before)+40
    run(sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python', python, 'uninstall', '--yes', cfg['lib_name'], cwd=d)
    assert files(d)==before and not list(d.rglob('self_supervised*'))

def test_changelog_and_citation_follow_the_version():
    entries = re.findall(r'^## \[(.+?)\] - (\d{4}-\d\d-\d\d)$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert entries[0]==(cff['version'],str(cff['date-released'])) and cff['version']==cfg['version']
    assert cff['cff-version']=='1.2.0' and cff['license']==cfg['license'] and cff['authors']==[{'name':cfg['author']}] and {'message','title'}<=set(cff)
    assert [r['url'] for r in cff['references']]==['https://arxiv.org/abs/2104.14294']

def test_workflow_is_make_test():
    jobs = yaml.safe_load((root/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8'))['jobs']
    assert [s['run'] for s in jobs['test']['steps'] if 'run' in s]==['make test']
    assert jobs['test']['strategy']['matrix']['python']==cfg['pythons'].split()
    assert [s['run'] for s in jobs['docs']['steps'] if 'run' in s]==['make docs']
    if (root/'.ci'/'run').exists(): assert (root/'.ci'/'run').read_text().splitlines()[-1]=='make test'
