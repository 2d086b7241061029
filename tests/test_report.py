"The HTML report: complete and offline, in a wide and a narrow browser, for incomplete runs and for any names"
import json, math, shlex, subprocess, sys, warnings
from fastai.vision.all import *
import pytest
from self_supervised.cli import dino_train, run_command
from self_supervised.cli.report import dino_report
from self_supervised.report import *
from self_supervised.runs import *
from helpers import *
from test_docs import browser, browser_path, STICKS_OUT, WIDE, PHONE

EVIL = '<script>alert("x")</script>'

def run_of(folder, *cbs, n_epoch=2, arch='convnet_mini', resume=False, **kwargs):
    "A short run with the callbacks of a notebook"
    learn = digits_learner(0, n_train=128, arch=arch, out_dim=64)
    with quiet(learn): learn.fit_dino(n_epoch, cbs=[RunCheckpoint(folder, resume=resume), History(folder/'history.csv', resume=resume), RunNotes(folder, resume=resume, **kwargs), *cbs])
    return learn

class StopAfter(Callback):
    order = 200
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch==self.last: raise KeyboardInterrupt

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Class folders of digits: some images of few classes"
    d = tmp_path_factory.mktemp('digits')
    ds = digits_dls().train_ds
    for i in range(160):
        f = d/('train' if i<110 else 'test')/str(int(ds.y[i])%4)/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        PILImage.create((ds.x[i].permute(1,2,0).numpy()*255).astype(np.uint8)).save(f)
    (d/'train'/'0'/'<img src=x onerror=alert(1)>.png').write_text('no image')
    return d

def train(out, *args): return run_command(dino_train, [str(o) for o in ('--out',out,'--size','16','--batch-size-per-gpu','32','--local-crops-number','1','--out-dim','32','--num-workers','0',*args)])

@pytest.fixture(scope='module')
def runs(tmp_path_factory, folder):
    "A run with labels, one without, one that was stopped and resumed, and one of evil names"
    d = tmp_path_factory.mktemp('runs')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        labels = d/'labels'
        shutil.copytree(folder, labels)
        next(labels.rglob('<img*')).unlink()
        assert train(d/'labelled', '--path', folder/'train', '--labels', labels, '--arch', 'convnet_mini', '--epochs', 2, '--lr', '2e-3')==0
        assert train(d/'unlabelled', '--path', labels/'test', '--arch', 'vit_mini_patch4_16', '--epochs', 1)==0
        with pytest.raises(KeyboardInterrupt): run_of(d/'resumed', StopAfter(0), n_epoch=3)
        run_of(d/'resumed', n_epoch=3, resume=True)
        evil = d/f'{EVIL[:8]}alert(1)'
        run_of(evil, n_epoch=1, settings={EVIL: EVIL, 'path': f'/data/{EVIL}'}, command=f'train {EVIL}')
        with open(evil/'messages.jsonl', 'a') as f: f.write(json.dumps(dict(epoch=0, text=f'epoch 0: {EVIL}'))+'\n')
    return d

def look(browser, file, size):
    "What is wrong with a page as it is drawn without a network, and what it says"
    ctx = browser.new_context(viewport=size, offline=True)
    page,wrong = ctx.new_page(),[]
    page.on('console',       lambda m: wrong.append(m.text))
    page.on('pageerror',     lambda e: wrong.append(str(e)))
    page.on('dialog',        lambda d: (wrong.append(f'dialog: {d.message}'), d.dismiss()))
    page.on('request',       lambda r: wrong.append(f'asks for {r.url}') if r.url!=Path(file).as_uri() and not r.url.startswith('data:') else None)
    page.goto(Path(file).as_uri())
    page.wait_for_load_state('load')
    wrong += page.evaluate(STICKS_OUT.replace('article *', 'body *'))
    wrong += page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).map(i => 'no picture: ' + i.alt)")
    if page.evaluate('document.documentElement.scrollWidth > innerWidth'): wrong.append('the page scrolls sideways')
    wrong += ['a script'] if page.evaluate('document.scripts.length') else []
    text,n = page.inner_text('body'),page.evaluate('document.images.length')
    ctx.close()
    return wrong,text,n

@pytest.mark.parametrize('size', [WIDE,PHONE], ids=['wide','phone'])
@pytest.mark.parametrize('name,n,says', [
    ('labelled',   5, ['All 2 epochs completed','20-NN','raw pixels','the same network, untrained','DINO, teacher','DINO, student','1 image files could not be read','<img src=x onerror=alert(1)>.png','dino_train','timm.create_model','torch']),
    ('unlabelled', 4, ['The only epoch completed','Without labels, on','RankMe','vit_mini_patch4_16']),
    ('resumed',    2, ['All 3 epochs completed','stopped and resumed','unknown','The run directory contains no figures','There is no evaluation of this run'])])
def test_a_page_in_a_browser(browser, runs, name, n, says, size):
    file = runs/name/'report.html'
    if not file.exists(): write_report(runs/name)
    wrong,text,images = look(browser, file, size)
    assert wrong==[] and images>=n, (wrong,images)
    for o in says: assert o in text, o

def test_names_are_shown_as_text(browser, runs):
    evil = runs/f'{EVIL[:8]}alert(1)'
    wrong,text,_ = look(browser, write_report(evil), PHONE)
    assert wrong==[]
    assert text.startswith(evil.name) and text.count(EVIL)>=4    # a name and a value of a setting, the command, the monitor's words

def test_several_on_one_page(browser, runs, tmp_path):
    evil,out = runs/f'{EVIL[:8]}alert(1)',tmp_path/'both.html'
    assert run_command(dino_report, [*map(str, (runs/'labelled',runs/'unlabelled',evil)), '--out', str(out)])==0
    for size in (WIDE,PHONE):
        wrong,text,images = look(browser, out, size)
        assert wrong==[] and images>=10
        for o in ('3 runs compared',evil.name,'Differences','network','different losses','Without labels','20-NN'): assert o in text, o

def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    (tmp_path/'bad.html').write_text('<img src="none.png"><div style="width:2000px">wide</div><script>console.log("oh"); alert("me")</script>')
    found = ' '.join(map(str, look(browser, tmp_path/'bad.html', PHONE)[0]))
    for o in ('asks for','oh','dialog: me','no picture','scrolls sideways','a script'): assert o in found, o

def test_the_command_does_it_again(runs, tmp_path):
    "What the page says is what was given, and it makes the same weights"
    given = shlex.split(read_notes(runs/'labelled')['sessions'][0]['command'])
    assert given[given.index('--lr')+1]=='0.002' and '--labels' in given and '--resume' not in given
    words = shlex.split(read_notes(runs/'unlabelled')['sessions'][0]['command'])
    assert words[0]=='dino_train'
    words[words.index('--out')+1] = str(tmp_path/'again')
    assert run_command(dino_train, words[1:]+['--no-report'])==0
    assert not (tmp_path/'again'/'report.html').exists() and not (tmp_path/'again'/'unlabelled.csv').exists()
    a,b = (torch.load(o/'checkpoint.pth', weights_only=True)['model'] for o in (runs/'unlabelled',tmp_path/'again'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_a_run_that_collapses_or_dies_says_so(tmp_path, folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = digits_learner(0, n_train=128, out_dim=32, tpt_start=1., tpt_end=1.)
        with quiet(learn): learn.fit_dino(3, cbs=[RunCheckpoint(tmp_path/'flat'), History(tmp_path/'flat'/'history.csv'), RunNotes(tmp_path/'flat')])
        assert train(tmp_path/'nan', '--path', folder/'test', '--arch', 'convnet_mini', '--lr', '1e30', '--clip-grad', '0', '--epochs', '6')==1
    text = write_report(tmp_path/'flat').read_text()
    assert 'Collapsed: uniform collapse' in text and 'lower teacher temperature' in text and len(read_messages(tmp_path/'flat'))==1
    text = (tmp_path/'nan'/'report.html').read_text()
    assert 'the loss became NaN or infinite' in text and 'Try bf16 or fp32' in text and read_notes(tmp_path/'nan')['sessions'][-1]['end']=='nan'

def test_a_run_that_is_told_to_stop_leaves_its_page(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(RunCheckpoint, 'after_epoch', lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert train(tmp_path/'cut', '--path', folder/'test', '--arch', 'convnet_mini', '--epochs', '2')==130
    text = (tmp_path/'cut'/'report.html').read_text()
    assert '1 of 2 epochs completed: it was interrupted' in text

def test_large_sets_are_drawn_from(tmp_path):
    learn = digits_learner(0, n_train=64, out_dim=32)
    with quiet(learn): learn.fit_dino(1)
    few = run_table(learn, tmp_path, digits_dls(), n_max=100)
    assert list(few.index)==['raw pixels','the same network, untrained','DINO, teacher','DINO, student']
    assert {k:read_notes(tmp_path)['measured'][k] for k in ('learn_from','test','of')}==dict(learn_from=100, test=100, of=[1257,540])

def test_the_template_comes_with_the_package(tmp_path):
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '-d', tmp_path], cwd=root, check=True, capture_output=True)
    assert (tmp_path/'self_supervised'/'templates'/'report.jinja').read_bytes()==(root/'self_supervised'/'templates'/'report.jinja').read_bytes()

# run directories of version 0.1: the end of a run as a sentence, messages without a sign, tables without roles
OLD_ENDS  = {None: None, 'finished': 'finished', 'time_limit': 'its time was up', 'interrupted': 'it was stopped by hand', 'out_of_memory': 'memory was full', 'stopped_by_monitor': 'a monitor stopped it',
             'cancelled': 'it was cancelled', 'failed': 'no space left on device: make room, and resume'}
OLD_TEXTS = dict(nan="epoch 1, batch 0: The loss is not a number, and training stops here, before this step; the last checkpoint is good. Try bf16 or fp32 instead of fp16, a lower lr, or a smaller clip.",
                 uniform="epoch 1: loss 4.1, teacher entropy 4.1, ln K 4.1. The teacher gives every image the same flat answer: the entropy of its targets is ln K (uniform collapse). Try a lower teacher temperature.",
                 point="epoch 1: loss 0.1, teacher entropy 0.1, ln K 4.1. The teacher gives every image the same single prototype: the entropy of its targets is near 0 (collapse to one dimension). Check.",
                 stuck="epoch 1: loss 4.2, teacher entropy 2.0, ln K 4.1. The loss stands at ln K or above: the student has learned nothing yet, though the teacher tells images apart.",
                 failed="epoch 1: knn_monitor failed (no space): its column is left out of this epoch, and training goes on")

def synthetic_run(folder, old, end='finished', sign=None, loss=3., entropy=2.5, rows=('raw pixels','the same network, untrained','DINO, teacher','DINO, student')):
    "A run directory of two epochs of three, or of all three if it finished"
    folder.mkdir(parents=True)
    machine = dict(device='cpu', cpu='a CPU', cores=1, memory=None, gpu=None, gpu_memory=None, system='Linux')
    n = 3 if end=='finished' else 2
    session = dict(started=0., command=None, first_epoch=0, epochs=n, images=8*n, seconds=1., end=OLD_ENDS[end] if old else end, processes=1, machine=machine, versions={})
    if end=='failed' and not old: session['error'] = OLD_ENDS['failed']
    (folder/'run.json').write_text(json.dumps(dict(started=0., n_epoch=3, method='DINO', images=8, ln_k=math.log(64), settings=dict(lr=1e-3), sessions=[session])))
    message = dict(epoch=1, text=OLD_TEXTS[sign]) if sign else {}
    (folder/'messages.jsonl').write_text(json.dumps(message if old else message | dict(sign=sign))+'\n' if sign else '')
    pd.DataFrame(dict(epoch=range(n), train_loss=loss, teacher_entropy=entropy, kl=.5, time='00:01')).to_csv(folder/'history.csv', index=False)
    t = pd.DataFrame({'20-NN': [90.,85.,80.,95.][:len(rows)]}, index=pd.Index(rows, name='features'))
    roles = ['baseline','untrained'] + (['teacher','student'] if len(rows)==4 else ['trained'])
    (t if old else t.assign(role=roles)).to_csv(folder/'table.csv')
    return folder

@pytest.mark.parametrize('case', [dict(), *(dict(end=o) for o in OLD_ENDS), *(dict(sign=o) for o in OLD_TEXTS), dict(end='stopped_by_monitor', sign='nan'), dict(sign='point', loss=.1, entropy=.05),
                                  dict(sign='uniform', loss=4.15, entropy=4.15), dict(sign='stuck', loss=4.2), dict(rows=('raw pixels','the same network, untrained','LeJEPA'))],
                         ids=lambda c: '-'.join(map(str, c.values())) or 'healthy')
def test_old_run_directories_have_the_same_verdict(tmp_path, case, monkeypatch):
    monkeypatch.setattr('self_supervised.report._light_and_dark', lambda draw, *args: '')         # the curves are of history.csv, which did not change
    pages = []
    for old in (True,False):
        d = synthetic_run(tmp_path/str(old)/'run', old, **case)
        pages.append(write_report(d).read_text().replace(str(d), 'RUN'))
        assert [o['sign'] for o in read_messages(d)]==([case['sign']] if 'sign' in case else [])
        assert [s['end'] for s in read_notes(d)['sessions']]==[case.get('end', 'finished')]
    assert pages[0]==pages[1]
    assert 'Raw pixels are at least as accurate' in pages[0] or len(case.get('rows', ()))==3

def test_notes_of_an_old_run_are_rewritten_with_keys(tmp_path):
    d = synthetic_run(tmp_path/'run', True, end='failed')
    note_run(d, images=9)
    session, = json.loads((d/'run.json').read_text())['sessions']
    assert session['end']=='failed' and session['error']==OLD_ENDS['failed']
