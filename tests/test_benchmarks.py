"The benchmarks run, and compare the same arithmetic; how fast anything is is not tested"
import importlib, inspect, json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
import processes
from fastcore.test import test_close, test_eq
from self_supervised.vision.dino import create_dino_model
from benchmarks import files, importing, memory, parts, peers, plain, race, scaling, step
from benchmarks.__main__ import found

vit   = dict(arch='vit_mini_patch4_16')
views = dict(size=16, small=8, n_small=2)
tiny  = dict(
    loss=dict(bs=2, out_dim=16, n_crops=4), ema=dict(vit, out_dim=16), clip=dict(vit, out_dim=16), optimizer=dict(vit, out_dim=16),
    knn=dict(n_train=200, n_test=50, dim=8, n_classes=4, k=5),
    views=dict(bs=2, size=32, global_size=16, local_size=8, n_local=1),
    step=dict(vit, **views, bs=2, out_dim=16, hidden_dim=8, product=32, steps=2, variants='tf32'),
    parts=dict(vit, **views, bs=2, side=24, out_dim=16, hidden_dim=8), features=dict(vit, n_images=5, bs=2, size=16),
    compiling=dict(vit, **views, bs=2, out_dim=16, backend='eager', only='loss'),
    epoch=dict(vit, **views, n_images=4, bs=2, side=24, out_dim=64, num_workers=0), opening=dict(vit, **views, n_images=4, bs=2, side=24),
    scaling=dict(vit, size=16, small=8, batches='2', crops='0,1', out_dims='16', images='4', bs=2, n_small=1, out_dim=16, hidden_dim=8, file_sizes='16,8'))

def numbers(rows):
    for r in rows:
        for k,v in r.items():
            if isinstance(v, dict): yield from ((k,o) for o in v.values())
            elif isinstance(v, (int,float)): yield k,v

def test_all_are_found(): assert {*tiny,'files','memory','importing'}<=set(found()), list(found())

@pytest.mark.parametrize('name', tiny)
def test_runs(name):
    rows = importlib.import_module(f'benchmarks.{name}').rows(rounds=2, **tiny[name])
    other = {'views':'torchvision v2, all cores', 'parts':'ours, views', 'compiling':'ours, compiled', 'opening':'prepared'}.get(name, 'plain')
    assert {'ours',other}<={r['who'] for r in rows}
    for k,v in numbers(rows): assert np.isfinite(v) and (v>0 or k=='differs'), (k,v)
    for r in race.markdown(rows).splitlines(): test_eq(r.count('|'), race.markdown(rows).splitlines()[0].count('|'))

def net():
    torch.manual_seed(0)
    return create_dino_model('vit_mini_patch4_16', 32, 0., hidden_dim=16)

def test_plain_is_the_library(double):
    m,(a,b) = net(),(step.make_views(4, 3, (16,8)) for _ in 'ab')
    ours,ref = step.Ours(net(), a, lr=1e-2, wd=.1),plain.Step(m, lr=1e-2, wd=.1)
    for views in (a,b,a):                                        # not the same twice running, so that an old centre or teacher shows
        ours.learn.dino.aug_pipelines.made = views
        ours()
        test_close(ours.loss, ref(views).item(), 1e-10)
    mine = ours.learn.model
    test_close(mine.C, ref.center, 1e-10)
    for who in ('student','teacher'):
        for p,q in zip(getattr(mine, who).parameters(), getattr(ref, who).parameters(), strict=True): test_close(p, q, 1e-10)
    assert (mine.teacher[1].last_layer.weight_v-m.teacher[1].last_layer.weight_v).abs().max()>1e-6           # something has moved

def test_drop_path_of_plain():
    b = plain.Block(8, 2, 16, .5)
    out = b.drop_path(torch.ones(4000,1,1)).flatten()
    test_eq(set(out.tolist()), {0.,2.})
    test_close(out.mean(), 1., .1)
    assert (b.eval().drop_path(torch.ones(9,1,1))==1).all()

@pytest.mark.parametrize('who', ['ours','ours, chunked_loss and grad_checkpointing','plain'])
def test_memory(who):
    kw = dict(vit, **views, bs=2, out_dim=16, hidden_dim=8, precision='fp32', device='cpu')
    assert memory.peak(lambda: memory.run_step(who, **kw), 'cpu')>=0
    if ',' not in who: assert memory.peak(lambda: memory.run_loss(who, **kw), 'cpu')>=0

@pytest.mark.slow
def test_memory_in_processes():
    rows = memory.rows(**vit, **views, bs=2, out_dim=16, hidden_dim=8)
    for k,v in numbers(rows): assert np.isfinite(v) and v>0, (k,v)

def test_memory_of_many_files():
    n = 300_000
    main,worker = ((a-b)/n for a,b in zip(files.measure('ours', n, 16), files.measure('ours', 1000, 16)))
    assert main<100 and worker<20, (main,worker)                 # bytes a file; a list of Paths has hundreds in both

@pytest.mark.slow
def test_memory_of_many_files_in_processes():
    rows = {r['who']: r for r in files.rows(500_000)}            # fixed memory of a worker counts less with more files
    assert rows['ours']['bytes/file']<100 and rows['ours']['bytes/file and worker']<10, rows['ours']
    assert rows['plain']['bytes/file']>200 and rows['fastai']['bytes/file and worker']>100

def test_importing(monkeypatch):
    monkeypatch.setattr(importing, 'statements', {'ours':'import json', 'fastai':'sum(range(10**7))'})
    ours,fastai = importing.rows(rounds=1)
    assert 0<ours['seconds']['median']<fastai['seconds']['median'] and fastai['ratio']['median']>1
    with pytest.raises(subprocess.CalledProcessError): importing.seconds('import no_such_module')

def test_profile(capsys):
    rows = step.rows(profile=True, precision='bf16', rounds=1, **tiny['step'])
    assert 'aten::addmm' in capsys.readouterr().out and {'ours','plain','bare timm'}<={r['who'] for r in rows}

def test_without_lightly(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'lightly', None)
    peers.lightly.cache_clear()
    rows = importlib.import_module('benchmarks.loss').rows(rounds=1, **tiny['loss'])
    peers.lightly.cache_clear()
    test_eq([r['who'] for r in rows], ['ours','plain'])
    assert "pip install -e '.[bench]'" in capsys.readouterr().err

def test_different_results_are_not_compared():
    test_eq(race.same('ones', [1.,torch.ones(2)], [1.,torch.ones(2)], 1e-6), 0)
    with pytest.raises(ValueError, match='cannot be compared'): race.same('losses', 1., 1.1, 1e-3)
    with pytest.raises(ValueError, match='cannot be compared'): race.same('losses', float('nan'), 1., 1e-3)

def test_rounds_alternate_and_ratios_are_of_one_round():
    calls = []
    secs = race.race({k: lambda k=k: calls.append(k) or t for k,t in dict(ours=1.,plain=3.).items()}, rounds=2)
    test_eq(calls, ['ours','plain','plain','ours','ours','plain'])
    rows = race.rows_of('x', dict(ours=[1.,2.,4.], plain=[2.,6.,4.]))
    test_eq(rows[1]['ratio'], dict(median=2., min=1., max=3.))

def test_growth_is_of_one_round():
    rows = scaling.grown({('a','ours'):[1.,2.,4.], ('a','plain'):[2.,2.,2.], ('b','ours'):[4.,8.,16.], ('b','plain'):[2.,4.,8.]}, dict(a=('one',1), b=('two',2)))
    test_eq([(r['what'],r['who'],r['ms/image'],r['growth']['median']) for r in rows], [('one','ours',2e3,1.),('one','plain',2e3,1.),('two','ours',4e3,2.),('two','plain',2e3,1.)])
    test_eq(rows[3]['growth'], dict(median=1., min=.5, max=2.))
    assert '1.00 (0.50 to 2.00)' in race.markdown(rows)

@pytest.mark.slow
def test_command_line(tmp_path):
    args = ['benchmarks.loss', '--out', str(tmp_path), '--out-dim', '16']
    subprocess.run([sys.executable, '-m', *args, '--bs=1', '--rounds=1'], check=True, capture_output=True)
    for more in (['--bs','2','--rounds','1'],['--bs','1','--rounds','2']): processes.run(processes.module, *args, *more, **race.STEADY)   # which need no second start
    res = json.loads((tmp_path/'results.json').read_text())
    test_eq(list(res), ['loss on cpu, bs=1, out_dim=16','loss on cpu, bs=2, out_dim=16'])           # the third took the place of the first
    test_eq([v['command'] for v in res.values()], ['python -m benchmarks.loss --bs 1 --out-dim 16 --rounds 2','python -m benchmarks.loss --bs 2 --out-dim 16 --rounds 1'])
    test_eq((tmp_path/'results.md').read_text(), race.page(res))
    for v in res.values(): assert race.markdown(v['rows']) in race.page(res)

def test_runs_of_other_sizes_stand_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(race, 'machine', lambda device: device)
    def run(name, ratio, **told):
        rows = importlib.import_module(f'benchmarks.{name}').rows
        args = {k:told.get(k, p.default) for k,p in inspect.signature(rows).parameters.items()}
        made = race.rows_of(str(told), dict(ours=[1.], plain=[ratio]))
        race.save(name, 'A title', made, args['device'], race.chosen(rows, args), tmp_path)
    def sized(**told): run('step', 4., device='cuda', **{**importlib.import_module('benchmarks.step').rows.gpu, **told})
    for precision in ('fp32,bf16','fp32','bf16'): run('step', 2., precision=precision)
    run('step', 3., precision='bf16', steps=10, rounds=1, profile=True)                                # the same, measured otherwise
    sized(), sized(bs=64)
    run('views', .5, floats=True)
    res = json.loads((tmp_path/'results.json').read_text())
    test_eq(list(res), ['step on cpu','step on cpu, precision=fp32','step on cpu, precision=bf16','step on cuda','step on cuda, bs=64','views on cpu, floats=True'])
    test_eq(res['step on cpu, precision=bf16']['command'], 'python -m benchmarks.step --precision bf16 --steps 10 --profile --rounds 1')
    test_eq(res['views on cpu, floats=True']['command'], 'python -m benchmarks.views --floats')
    test_eq([res[f'step on cuda{o}']['command'] for o in ('',', bs=64')], [f'python -m benchmarks.step {o}--device cuda' for o in ('','--bs 64 ')])
    heads = [l.split(':')[0][3:] for l in (tmp_path/'results.md').read_text().splitlines() if l.startswith('## ')]
    test_eq(heads, ['views on cpu, floats=True','step on cpu','step on cpu, precision=fp32','step on cpu, precision=bf16','step on cuda','step on cuda, bs=64'])    # the slowest of ours first

@pytest.mark.slow
def test_all_in_one_command(tmp_path):
    cmd = [sys.executable, '-m', 'benchmarks', '--out', str(tmp_path)]
    subprocess.run([*cmd, 'ema', 'loss', '--bs=2', '--out-dim', '16', '--arch', 'vit_mini_patch4_16', '--rounds', '1'], check=True, capture_output=True)
    test_eq(list(json.loads((tmp_path/'results.json').read_text())), ['ema on cpu, arch=vit_mini_patch4_16, out_dim=16','loss on cpu, bs=2, out_dim=16'])    # to each what it has

@pytest.mark.parametrize('wrong,said', [(['emma'],'no benchmark named emma'), (['ema','--bs','2'],'ema has no --bs'), (['--sise','2'],'--sise')])
def test_all_in_one_command_says_what_is_wrong(monkeypatch, capsys, wrong, said):
    monkeypatch.setattr(sys, 'argv', ['benchmarks',*wrong])
    with pytest.raises(SystemExit) as e: importlib.import_module('benchmarks.__main__').main()
    assert e.value.code and said in capsys.readouterr().err

def test_the_tables_are_the_figures():
    here = Path(race.__file__).parent
    test_eq((here/'results.md').read_text(), race.page(json.loads((here/'results.json').read_text())))

def test_sizes_for_a_gpu():
    for n,f in found().items():
        takes = inspect.signature(f).parameters
        assert 'device' in takes and set(getattr(f, 'gpu', {}))<=set(takes)-{'device'}, n
        test_eq(race.chosen(f, {**race.sizes(f, 'cuda'), 'device':'cuda'}), dict(device='cuda'))
    step_rows = found()['step']
    test_eq([race.sizes(step_rows, d)['bs'] for d in ('cpu','cuda','cuda:1')], [8,256,256])
    assert race.sizes(step_rows, 'cuda') | dict(arch='vit_small_patch16_224', precision='bf16', n_small=8, size=224, small=96, out_dim=65536) == race.sizes(step_rows, 'cuda')

def test_one_command_for_a_gpu(monkeypatch, tmp_path, capsys):
    main,ran = importlib.import_module('benchmarks.__main__'),[]
    monkeypatch.setattr(main.subprocess, 'run', lambda cmd: ran.append(cmd[1:]) or subprocess.CompletedProcess(cmd, 0))
    monkeypatch.setattr(sys, 'argv', ['benchmarks','--device','cuda','--out',str(tmp_path)])
    main.main()
    names = [c[1].split('.')[1] for c in ran]
    assert {'step','views','epoch','memory','parts','features','compiling','scaling','loss'}<=set(names) and not {'files','importing'}&set(names)
    assert all(c[2:4]==['--device','cuda'] for c in ran)

class Gpu:
    "Events and queues of a GPU that only note what is asked of them"
    def __init__(self, monkeypatch):
        self.log,self.clock = [],iter(range(1000))
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda *a: self.log.append('wait'))
        monkeypatch.setattr(torch.cuda, 'Event', lambda enable_timing: self.event())
        monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda d: self.log.append('reset'))
        monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda d: 3e9)
        monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: self.log.append('empty'))
    def event(self):
        class Event:
            def record(e): e.at = next(self.clock)
            def elapsed_time(e, o): return o.at-e.at
        return Event()

def test_timing_on_a_gpu_waits_at_both_ends(monkeypatch):
    gpu = Gpu(monkeypatch)
    secs = race.race(dict(ours=lambda: gpu.log.append('run')), rounds=2, device='cuda', least=0)
    test_eq(gpu.log, ['wait','run','wait']*5)                    # to warm up, and in each round once untimed and once timed
    assert len(secs['ours'])==2
    gpu.log.clear()
    test_eq(race.peak_gb(lambda: gpu.log.append('run'), 'cuda'), 3.)
    test_eq(gpu.log, ['reset','run'])

def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
    gpu = Gpu(monkeypatch)
    def large(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 3 GiB.')
    test_eq(list(race.fitting(dict(ours=lambda: 1, plain=large), 'cuda')), ['ours'])
    assert 'plain is left out: CUDA out of memory' in capsys.readouterr().err and gpu.log==['empty']

def test_parts_are_timed_in_the_queue_of_a_gpu(monkeypatch):
    gpu   = Gpu(monkeypatch)
    spans = parts.Spans('cuda')
    spans.start('whole step'); spans.of('views', lambda: 1)(); spans.stop('whole step'); spans.stop('never begun')
    test_eq(gpu.log, [])                                         # nothing waits while it is measured
    test_eq(spans.took, {'views':[.001], 'whole step':[.003]})

def test_parts_leave_the_learner_as_it_was():
    from self_supervised.vision import core
    before = core.clip_per_param,core.ema_update
    rows = {r['who']: r['ratio']['median'] for r in importlib.import_module('benchmarks.parts').rows(steps=1, **tiny['parts'])}
    assert abs(sum(v for k,v in rows.items() if k!='ours')-1)<1e-6 and before==(core.clip_per_param,core.ema_update)
    assert set(rows)=={'ours',*(f'ours, {k}' for k in ('views','teacher','student','loss','backward','clipping','optimizer','moving average','rest'))}

def test_the_machine_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: 'A GPU')
    monkeypatch.setattr(race, 'driver', lambda: '580.1')
    assert race.machine('cuda').startswith('A GPU with driver 580.1 and CUDA ') and torch.__version__ in race.machine('cuda')

def test_peers_that_are_not_installed_are_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'nvidia.dali', None)
    peers.dali.cache_clear()
    assert peers.dali() is None and 'Without DALI' in capsys.readouterr().err
    peers.dali.cache_clear()

def test_opening_reads_a_folder_of_the_user(tmp_path):
    from benchmarks import epoch, opening
    epoch.write_images(tmp_path, 5, 24)
    rs = opening.rows(str(tmp_path), 4, size=16, small=8, n_small=1, arch='vit_mini_patch4_16', bs=2, rounds=1)
    assert [r['who'] for r in rs]==['ours','decoded in full','prepared','cached','ours','prepared','cached']
    with pytest.raises(ValueError, match='has 5 images: pass --n-images 5'): opening.rows(str(tmp_path), 9)
