"Save, kill, resume: the same run to the last bit"
import pytest, signal, subprocess, sys, time
from fastai.vision.all import *
from safetensors import SafetensorError
from self_supervised.cli import dino_train, run_command
from self_supervised.vision.dino import *
from self_supervised.vision.parts import *
from self_supervised.vision.continued import *
import processes
from helpers import *

TRAIN = 'self_supervised.cli:main'

class StopAfter(Callback):
    order = 200
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch==self.last: raise KeyboardInterrupt

@pytest.mark.parametrize('precision,shuffle', [('fp32',True),pytest.param('fp16',True,marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, precision, shuffle):
    def make(seed): return digits_learner(seed, n_train=192, arch='vit_mini_patch4_16', precision=precision, drop_path_rate=.2)
    fit = dict(lr=1e-2, warmup_epochs=1)
    whole = make(0)
    with quiet(whole): whole.fit_dino(4, cbs=RunCheckpoint(tmp_path/'a'), **fit)
    killed = make(0)
    with quiet(killed), pytest.raises(KeyboardInterrupt): killed.fit_dino(4, cbs=[RunCheckpoint(tmp_path/'b'), StopAfter(1)], **fit)
    other = make(7)                                              # another process: other weights, other random numbers
    with quiet(other): other.fit_dino(4, cbs=RunCheckpoint(tmp_path/'b', resume=True), **fit)
    for (k,a),b in zip(whole.model.state_dict().items(), other.model.state_dict().values()): assert torch.equal(a, b), k
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True) for o in 'ab')
    assert str(a['opt'])==str(b['opt']) and a['epoch']==b['epoch']==4
    assert whole.recorder.values[-1]==other.recorder.values[-1]

def test_a_continued_run_is_resumed_with_the_head_still_alone(tmp_path):
    def make(seed): return digits_learner(seed, n_train=128)
    def fit(learn, *cbs): learn.continue_pretrain(4, 2, cbs=list(cbs))
    whole = make(0)
    with quiet(whole): fit(whole, RunCheckpoint(tmp_path/'a'))
    killed = make(0)
    before = state(killed.model)
    with quiet(killed), pytest.raises(KeyboardInterrupt): fit(killed, RunCheckpoint(tmp_path/'b'), StopAfter(0))
    assert not [k for k in changed(killed.model, before) if k.startswith('student.0.') and k.endswith(('weight','bias'))]
    other = make(7)
    with quiet(other): fit(other, RunCheckpoint(tmp_path/'b', resume=True))
    for (k,a),b in zip(whole.model.state_dict().items(), other.model.state_dict().values()): assert torch.equal(a, b), k

def test_parts_are_resumed_within_a_step(tmp_path):
    "Masks, mask token, patch head and its centre go on, from the middle of an accumulated step"
    def fit(seed, name, *cbs, resume=False):
        learn = digits_learner(seed, n_train=192, arch='vit_mini_patch4_16', parts=[KoLeo(), IBOT(head=32)], cbs=GradientAccumulation(128))
        with quiet(learn): learn.fit_dino(2, warmup_epochs=1, cbs=[RunCheckpoint(tmp_path/name, resume=resume), *cbs])
        return learn
    whole = fit(0, 'a')
    with pytest.raises(KeyboardInterrupt): fit(0, 'b', StopAfter(0))
    other = fit(7, 'b', resume=True)                             # after 3 batches, with steps of 2
    for (k,a),b in zip(whole.model.state_dict().items(), other.model.state_dict().values()): assert torch.equal(a, b), k

def test_a_killed_process_goes_on(tmp_path, folder):
    "The command line, killed without warning while it trains, ends where a run at one go ends"
    args = ('--path', folder, '--arch', 'convnet_mini', '--size', 16, '--epochs', 6, '--local-crops-number', 1, '--num-workers', 0, '--seed', 3, '--no-report')
    processes.run(processes.command, TRAIN, *args, '--out', tmp_path/'whole')
    p = processes.Forked(processes.command, TRAIN, *args, '--out', tmp_path/'cut')
    for _ in range(3000):
        time.sleep(.02)
        if (tmp_path/'cut'/'history.csv').exists() and len((tmp_path/'cut'/'history.csv').read_text().splitlines())>=3: break
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL
    processes.run(processes.command, TRAIN, *args, '--out', tmp_path/'cut', '--resume')
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('whole','cut'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())
    ha,hb = (pd.read_csv(tmp_path/o/'history.csv').drop(columns='time') for o in ('whole','cut'))
    pd.testing.assert_frame_equal(ha, hb)

def _options(*args): return ['--local-crops-number', '1', '--batch-size-per-gpu', '256', '--seed', '3', *map(str, args)]
def _command(*args): return [sys.executable, '-W', 'ignore', '-c', 'from self_supervised.cli import main; main()', *_options(*args)]

def _whole(*args):
    "A run at one go, and its seconds"
    start = time.time()
    processes.run(processes.command, TRAIN, *_options(*args))
    return time.time()-start

def _cut_and_resume(tmp_path, whole, delay, *args, times=1):
    "A run that is killed `times` times, each after a moment of its own, against the weights and history of one at one go"
    for i in range(times):
        p = _forked(('--out', tmp_path, *args, *(['--resume'] if i else [])))
        time.sleep(delay())
        p.kill()
        p.wait()
    _whole('--out', tmp_path, '--resume', *args)
    a,b = (torch.load(o/'checkpoint.pth', weights_only=True) for o in (whole,tmp_path))
    assert all(torch.equal(v, b['model'][k]) for k,v in a['model'].items()) and str(a['opt'])==str(b['opt'])
    ha,hb = (pd.read_csv(o/'history.csv').drop(columns='time') for o in (whole,tmp_path))
    pd.testing.assert_frame_equal(ha, hb)
    assert not list(tmp_path.glob('.*.tmp'))

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return digits_path(tmp_path_factory.mktemp('digits'))/'test'

@pytest.mark.slow
def test_killed_twice_with_workers_that_open_files(tmp_path, folder):
    "Files, two workers: the order of the images and what each view draws go on as well"
    args = ('--path', folder, '--arch', 'convnet_mini', '--size', '16', '--epochs', '6', '--num-workers', '2')
    took = _whole('--out', tmp_path/'whole', *args)
    rng = random.Random(0)
    _cut_and_resume(tmp_path/'cut', tmp_path/'whole', lambda: rng.uniform(.2*took,.5*took), *args, times=2)

@pytest.mark.slow
@pytest.mark.parametrize('workers', [0,2])
def test_killed_at_thirty_moments(tmp_path, folder, workers):
    "15 moments with each number of workers, from the start to the end, checkpoints being written among them"
    args = ('--path', folder, '--arch', 'convnet_mini', '--size', '16', '--epochs', '8', '--num-workers', workers, '--no-report')
    took = _whole('--out', tmp_path/'whole', *args)
    rng = random.Random(workers)
    for i in range(3): _cut_and_resume(tmp_path/str(i), tmp_path/'whole', lambda: rng.uniform(.05*took,.6*took), *args, times=5)

def _new(args):    return subprocess.Popen(_command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
def _forked(args): return processes.Forked(processes.command, TRAIN, *_options(*args))

@pytest.mark.parametrize('sig,code,start', [(signal.SIGTERM,130,_new),(signal.SIGINT,130,_forked)])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, sig, code, start):
    p = start(('--out', tmp_path, '--epochs', '500', '--arch', 'convnet_mini', '--no-report'))
    for _ in range(600):
        time.sleep(.1)
        if (tmp_path/'checkpoint.pth').exists(): break
    p.send_signal(sig)
    err = p.communicate(timeout=60)[1]
    assert p.returncode==code and '--resume' in err and 'Traceback' not in err, err
    assert torch.load(tmp_path/'checkpoint.pth', weights_only=True)['epoch']>=1

def test_a_run_ends_in_time_and_goes_on(tmp_path):
    out,_ = processes.run(processes.command, TRAIN, *_options('--out', tmp_path, '--epochs', '500', '--max-hours', 3/3600, '--no-report'))
    n = len(pd.read_csv(tmp_path/'history.csv'))
    assert 'the same command with --resume continues' in out and 1<=n<500 and not (tmp_path/'encoder.safetensors').exists()
    processes.run(processes.command, TRAIN, *_options('--out', tmp_path, '--epochs', n+1, '--resume', '--no-report'))
    assert len(pd.read_csv(tmp_path/'history.csv'))==n+1 and (tmp_path/'encoder.safetensors').exists()

def _quick(folder, *args):
    return ['--path', str(folder), '--arch', 'convnet_mini', '--size', '16', '--num-workers', '0', '--local-crops-number', '1', '--batch-size-per-gpu', '256', '--out-dim', '16', '--no-report', *map(str, args)]

def test_resuming_a_run_that_is_not_there_is_said(tmp_path, capsys, folder):
    "Else a misspelt --out looks like a run that is resumed"
    assert run_command(dino_train, _quick(folder, '--out', tmp_path/'misspelt', '--epochs', 1, '--resume', '--max-hours', 1e-6))==0
    assert 'misspelt contains no checkpoint to resume from: training starts at epoch 0' in capsys.readouterr().out

def test_what_was_overwritten_is_not_resumed(tmp_path, capsys, folder):
    "A run that is started anew and stopped in its first epoch does not go on from the old one"
    old = _quick(folder, '--out', tmp_path, '--saveckp-freq', 1, '--epochs')
    assert run_command(dino_train, old+['2','--max-hours','1'])==0
    assert len(list(tmp_path.glob('checkpoint*.pth')))==4
    learn_fit,Learner.fit = Learner.fit,lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt())
    try: assert run_command(dino_train, old+['2','--overwrite'])==130
    finally: Learner.fit = learn_fit
    assert list(tmp_path.glob('checkpoint*.pth'))==[]
    assert run_command(dino_train, old+['2','--overwrite','--arch','nonsense'])==2

def test_a_disk_that_fills_up_while_the_encoder_is_written_is_a_sentence(tmp_path, capsys, monkeypatch, folder):
    def full(*args): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr('self_supervised.checkpoints.save_file', full)
    assert run_command(dino_train, _quick(folder, '--out', tmp_path, '--epochs', 1))==2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith('dino_train: ') and 'encoder.safetensors could not be written' in err and 'free disk space' in err

@pytest.mark.parametrize('precision', ['fp32',pytest.param('fp16',marks=pytest.mark.slow)])
def test_a_step_that_spans_two_epochs_is_resumed(tmp_path, precision):
    "Five batches an epoch and two a step: gradients, their count and the sum for the centre go on too"
    def make(): return digits_learner(0, n_train=5*64, precision=precision, cbs=[GradientAccumulation(128)])
    whole = make()
    with quiet(whole): whole.fit_dino(3, cbs=RunCheckpoint(tmp_path/'a'))
    killed = make()
    with quiet(killed), pytest.raises(KeyboardInterrupt): killed.fit_dino(3, cbs=[RunCheckpoint(tmp_path/'b'), StopAfter(0)])
    assert torch.load(tmp_path/'b'/'checkpoint.pth', weights_only=True)['unfinished']['count']==64
    other = digits_learner(7, n_train=5*64, precision=precision, cbs=[GradientAccumulation(128)])
    with quiet(other): other.fit_dino(3, cbs=RunCheckpoint(tmp_path/'b', resume=True))
    for (k,a),b in zip(whole.model.state_dict().items(), other.model.state_dict().values()): assert torch.equal(a, b), k
