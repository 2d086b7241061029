"Save, kill, resume: the same run to the last bit"
import pytest, signal, subprocess, sys, time
from fastai.vision.all import *
from self_supervised.vision.dino import *
from helpers import *

class StopAfter(Callback):
    order = 200
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch==self.last: raise KeyboardInterrupt

@pytest.mark.parametrize('precision,shuffle', [('fp32',True),('fp16',True)])
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

def test_a_killed_process_goes_on(tmp_path):
    "The command line, killed without warning while it trains, ends where a run at one go ends"
    cmd = [sys.executable, '-c', 'from self_supervised.cli import main; main()', '--epochs', '4', '--local-crops-number', '1', '--batch-size-per-gpu', '256', '--seed', '3']
    subprocess.run(cmd+['--out', tmp_path/'whole'], check=True, capture_output=True)
    p = subprocess.Popen(cmd+['--out', tmp_path/'cut'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        time.sleep(.1)
        if (tmp_path/'cut'/'history.csv').exists() and len((tmp_path/'cut'/'history.csv').read_text().splitlines())>=3: break
    p.send_signal(signal.SIGKILL)
    p.wait()
    subprocess.run(cmd+['--out', tmp_path/'cut', '--resume'], check=True, capture_output=True)
    a,b = (torch.load(tmp_path/o/'checkpoint.pth', weights_only=True)['model'] for o in ('whole','cut'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())
    ha,hb = (pd.read_csv(tmp_path/o/'history.csv').drop(columns='time') for o in ('whole','cut'))
    pd.testing.assert_frame_equal(ha, hb)
