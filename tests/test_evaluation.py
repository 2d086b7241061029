"Every protocol from the command line, on small data sets in the layouts that were published"
import contextlib, io, json, pickle
import pytest
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.cli import run_command
from self_supervised.cli.evaluate import dino_attention, dino_eval
from helpers import digits_learner, quiet

def evaluate(tmp_path, *args, code=0):
    "The table of `dino_eval`, or what it says"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        got = run_command(dino_eval, [*map(str, args), '--device', 'cpu', '--out', str(tmp_path/'eval.json')])
    assert got==code, err.getvalue()
    if code:
        assert err.getvalue().count('\n')==1
        return err.getvalue()
    res = json.loads((tmp_path/'eval.json').read_text())
    assert str(tmp_path/'eval.json') in out.getvalue() and res['encoder']==[args[2]]
    return pd.DataFrame(res['table'])

def noise(seed, h=32, w=48): return np.random.RandomState(seed).randint(0, 255, (h,w,3), dtype=np.uint8)

def save(a, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(file)

def tree(root):
    "Names of the files below a folder"
    return sorted(f.relative_to(root).as_posix() for f in root.rglob('*') if f.is_file())

@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('encoder')/'encoder.safetensors'
    export_encoder(create_encoder('vit_mini_patch4_16'), file, verbose=False)
    return str(file)

@pytest.mark.parametrize('name', ['roxford5k','rparis6k'])
def test_retrieval(tmp_path, vit, name):
    "Copies of the queries are easy, mirrored ones hard, others junk"
    for i in range(4):
        for suffix,a in (('q',noise(i)), ('easy',noise(i)), ('hard',noise(i)[:,::-1].copy()), ('junk',noise(100+i))): save(a, tmp_path/name/'jpg'/f'{suffix}_{i}.jpg')
    im  = [f'{s}_{i}' for i in range(4) for s in ('easy','hard','junk')]
    gnd = [dict(bbx=[0,0,48,32], easy=np.array([3*i]), hard=np.array([3*i+1]), junk=np.array([3*i+2])) for i in range(4)]
    (tmp_path/name/f'gnd_{name}.pkl').write_bytes(pickle.dumps(dict(imlist=im, qimlist=[f'q_{i}' for i in range(4)], gnd=gnd)))
    args = ('retrieval', '--encoder', vit, '--data', tmp_path, '--benchmark', name)
    t = evaluate(tmp_path, *args).set_index(name)
    assert list(t.index)==['easy','medium','hard'] and t.loc['easy','mAP']==100 and t.loc['easy','mP@1']==100 and t.queries.tolist()==[4,4,4]
    evaluate(tmp_path, *args, '--multiscale', '--crop-queries')
    gnd[0].update(easy=np.array([99]))
    (tmp_path/name/f'gnd_{name}.pkl').write_bytes(pickle.dumps(dict(imlist=im, qimlist=[f'q_{i}' for i in range(4)], gnd=gnd)))
    assert 'the database has 12' in evaluate(tmp_path, *args, code=2)
    class Evil:
        def __reduce__(self): return os.system, ('true',)
    (tmp_path/name/f'gnd_{name}.pkl').write_bytes(pickle.dumps(Evil()))
    assert 'system' in evaluate(tmp_path, *args, code=2)

def test_copydetection(tmp_path, vit):
    days = tmp_path/'copydays'
    for i in range(5):
        save(noise(i), days/'original'/f'20{i}000.jpg')
        save(noise(i)[4:,4:].copy(), days/'strong'/f'20{i}001.jpg')
        save(noise(i)[2:].copy(), days/'crops'/'10'/f'20{i}000.jpg')
        save(noise(50+i), tmp_path/'others'/f'{i}.jpg')
    t = evaluate(tmp_path, 'copydetection', '--encoder', vit, '--data', days, '--distractors', tmp_path/'others', '--size', 32).set_index('block')
    assert list(t.index)==['original','strong','crops/10'] and t.loc['original','mAP']==100 and t.queries.tolist()==[5,5,5]
    t = evaluate(tmp_path, 'copydetection', '--encoder', vit, '--data', tmp_path/'others', '--size', 32).set_index('attack')
    assert t.loc['jpeg 75','mAP']>60 and np.isclose(t.mAP['mean'], t.mAP[:-1].mean(), atol=.01)
    save(noise(9), days/'strong'/'209901.jpg')
    assert '209901.jpg' in evaluate(tmp_path, 'copydetection', '--encoder', vit, '--data', days, code=2)

def test_video(tmp_path, vit):
    "A square that moves by a patch a frame"
    davis = tmp_path/'DAVIS'
    for t in range(4):
        m = np.zeros((32,48), np.uint8)
        m[8:16,4+4*t:16+4*t] = 1
        a = noise(0)//4
        a[8:16,4+4*t:16+4*t] = 160+noise(7)[:8,:12]//4
        save(a, davis/'JPEGImages'/'480p'/'square'/f'{t:05}.jpg')
        write_mask(tensor(m), davis/'Annotations'/'480p'/'square'/f'{t:05}.png')
    (davis/'ImageSets'/'2017').mkdir(parents=True)
    (davis/'ImageSets'/'2017'/'val.txt').write_text('square\n')
    args = ('video', '--encoder', vit, '--data', davis, '--size', 32)
    t = evaluate(tmp_path, *args, '--masks-out', tmp_path/'masks').set_index('object')
    assert list(t.index)==['square_1','mean'] and t.loc['mean','J']>20
    assert tree(tmp_path/'masks')==[f'square/{i:05}.png' for i in range(4)]
    same = video_scores(torch.stack([read_mask(f) for f in (tmp_path/'masks'/'square').ls().sorted()]), torch.stack([read_mask(f) for f in (davis/'Annotations'/'480p'/'square').ls().sorted()]))
    assert np.isclose(100*same['J&F'][1], t.loc['mean','J&F'], atol=.01)
    write_mask(torch.ones(8,8), davis/'Annotations'/'480p'/'square'/'00002.png')
    assert '00002.png has 8x8 pixels' in evaluate(tmp_path, *args, code=2)

def test_segmentation(tmp_path, vit):
    voc = tmp_path/'VOC2012'
    for i in range(3):
        m = np.zeros((32,48), np.uint8)
        m[4:20,8:24],m[3] = 1+i,255
        save(noise(i), voc/'JPEGImages'/f'2007_{i:06}.jpg')
        write_mask(tensor(m), voc/'SegmentationClass'/f'2007_{i:06}.png')
    (voc/'ImageSets'/'Segmentation').mkdir(parents=True)
    (voc/'ImageSets'/'Segmentation'/'val.txt').write_text('\n'.join(f'2007_{i:06}' for i in range(3)))
    args = ('segmentation', '--encoder', vit, '--data', voc, '--size', 32)
    t = evaluate(tmp_path, *args).set_index('mask').Jaccard
    assert np.isclose(t['whole image (no model)'], 100*256/(31*48), atol=.06)
    everywhere = evaluate(tmp_path, *args, '--keep', 1).set_index('mask').Jaccard
    assert (everywhere==t['whole image (no model)']).all()
    pairs = evaluate(tmp_path, *args[:3], '--data', voc/'JPEGImages', '--masks', voc/'SegmentationClass', '--size', 32).set_index('mask').Jaccard
    assert (pairs==t).all()
    write_mask(torch.ones(8,8), voc/'SegmentationClass'/'2007_000001.png')
    assert '8x8 pixels' in evaluate(tmp_path, *args, code=2)

def test_classes(tmp_path, vit):
    "Red, green and blue images: everything finds them, in ImageNet's layout and in class folders alone"
    for layout in ('train','val',''):
        for c,name in enumerate(('red','green','blue')):
            for i in range(12):
                a = noise(c*100+i)//2
                a[...,c] += 120
                save(a, tmp_path/('two' if layout else 'one')/layout/name/f'{i}.jpg')
    for data in ('two','one'):
        common = ('--encoder', 'pixels', '--data', tmp_path/data, '--size', 32)
        t = evaluate(tmp_path, 'knn', *common, '--k', 1, 5)
        assert (t['top-1']==100).all() and t.k.tolist()==[1,5]
        t = evaluate(tmp_path, 'linear', *common, '--epochs', 20, '--batch-size', 16)
        assert t['test top-1'][0]==100 and t['test top-5'].min()==100
        assert evaluate(tmp_path, 'lowshot', *common, '--labels', 2)['mean'][0]>90
        assert len(evaluate(tmp_path, 'unlabelled', *common))==1
    t = evaluate(tmp_path, 'finetune', '--encoder', vit, '--data', tmp_path/'two', '--size', 16, '--batch-size', 4, '--epochs', 3, '--lr', .01)
    assert t['top-1'].iloc[-1]>60 and len(t)==3
    assert 'class folders' in evaluate(tmp_path, 'knn', '--encoder', 'pixels', '--data', tmp_path/'two'/'val'/'red', code=2)
    assert 'pass per_class<=' in evaluate(tmp_path, 'lowshot', *common, '--labels', 100, code=2)

def test_same_features_by_every_way(tmp_path):
    "Learner, DINOModel, checkpoint, exported file and encoder say the same; the teacher unless the student is asked for"
    set_seed(0)
    learn = dino_learner(digits_dls(), 'convnet_mini', get_digits_aug_pipelines((2,0)))
    learn.dls.train.n,learn.dls.valid.n = 256,64
    with learn.no_bar(), learn.no_logging(): learn.fit_dino(1, cbs=RunCheckpoint(tmp_path))
    export_encoder(learn, tmp_path/'encoder.safetensors', verbose=False)
    dl = digits_dls().valid
    f  = extract_features(learn, dl)[0]
    for m in (learn.model, load_encoder(tmp_path/'encoder.safetensors'), load_encoder(tmp_path/'checkpoint.pth'), open_encoder(tmp_path)):
        assert torch.allclose(extract_features(m, dl)[0], f, atol=1e-5)
    s = extract_features(learn, dl, who='student')[0]
    assert not torch.allclose(s, f, atol=1e-3) and torch.allclose(extract_features(load_encoder(tmp_path/'checkpoint.pth', who='student'), dl)[0], s, atol=1e-5)
    torchs = torch.utils.data.DataLoader(dl.dataset, batch_size=50)
    assert torch.allclose(extract_features(learn, torchs)[0], f, atol=1e-5)

def test_attention_command(tmp_path, vit):
    save(noise(0, 50, 70), tmp_path/'image.jpg')
    assert run_command(dino_attention, [str(tmp_path/'image.jpg'), '--encoder', vit, '--size', '48', '--query', '2', '3', '--out', str(tmp_path/'new'/'a.png')])==0
    assert Image.open(tmp_path/'new'/'a.png').width>600

@pytest.mark.slow
def test_knn_fuzz():
    "Random sizes, classes, neighbours and chunks against a loop over images"
    rng = random.Random(0)
    for i in range(200):
        n,m,d,c = rng.randint(1,80),rng.randint(1,30),rng.randint(2,20),rng.randint(1,9)
        g = torch.Generator().manual_seed(i)
        tr,te,y = torch.randn(n,d,generator=g).double(),torch.randn(m,d,generator=g).double(),torch.randint(0,c,(n,),generator=g)
        k,T = rng.randint(1,n),rng.choice([.05,.07,.5])
        ref = torch.zeros(m,c).double()
        for a,f in enumerate(te):
            sims = [(float(F.cosine_similarity(f, o, dim=0)),int(o_y)) for o,o_y in zip(tr,y)]
            for s,o_y in sorted(sims, reverse=True)[:k]: ref[a,o_y] += math.exp(s/T)
        got = knn_classifier(tr, y, te, k, T, n_classes=c, chunk=rng.randint(1,40))
        assert torch.allclose(got, ref, rtol=1e-6), (i,n,m,d,c,k,T)

@pytest.mark.slow
def test_retrieval_fuzz():
    "Average precision against the official procedure, step by step"
    rng = np.random.RandomState(0)
    for _ in range(200):
        n = rng.randint(2, 60)
        q,db = torch.from_numpy(rng.randn(3,5)),torch.from_numpy(rng.randn(n,5))
        kinds = rng.randint(0, 4, (3,n))
        gnd = [dict(easy=np.flatnonzero(k==0), hard=np.flatnonzero(k==1), junk=np.flatnonzero(k==2)) for k in kinds]
        if not any(len(g['easy'])+len(g['hard']) for g in gnd): continue
        got = retrieval_scores(q, db, gnd)
        for level,(ok,out) in dict(easy=([0],[1,2]), medium=([0,1],[2]), hard=([1],[0,2])).items():
            aps = []
            for f,k in zip(q, kinds):
                order = sorted(range(n), key=lambda j: -float(F.cosine_similarity(f, db[j], dim=0)))
                order = [j for j in order if k[j] not in out]
                pos   = [r for r,j in enumerate(order) if k[j] in ok]
                if not pos: continue
                ap = 0.
                for j,r in enumerate(pos): ap += ((j/r if r else 1.)+(j+1)/(r+1))/2/len(pos)
                aps.append(ap)
            assert (not aps and np.isnan(got[level]['mAP'])) or np.isclose(got[level]['mAP'], np.mean(aps))

def test_an_encoder_that_is_older_than_the_run_is_not_taken(tmp_path):
    "A run that was started anew or resumed, and stopped, has not exported its encoder yet"
    learn = digits_learner(n_train=64)
    with quiet(learn): learn.fit_dino(1, cbs=RunCheckpoint(tmp_path))
    export_encoder(create_encoder('convnet_mini'), tmp_path/'encoder.safetensors', verbose=False)
    same = lambda: all(torch.equal(a, b) for a,b in zip(open_encoder(tmp_path).parameters(), encoder_of(learn).parameters()))
    assert not same()                                            # the newer one, whatever it is
    os.utime(tmp_path/'encoder.safetensors', (0,0))
    assert same()

def test_j_and_f_by_the_formulas_of_davis():
    "Masks at 480p against the measures of Perazzi et al. 2016, with a dilation by a disk pixel by pixel"
    from scipy.ndimage import binary_dilation
    def edge(m):                                                 # a pixel whose right, lower or diagonal neighbour differs
        m = m.astype(int)
        e,s,d = m.copy(),m.copy(),m.copy()
        e[:,:-1],s[:-1],d[:-1,:-1] = m[:,1:],m[1:],m[1:,1:]
        b = (m^e)|(m^s)|(m^d)
        b[-1],b[:,-1],b[-1,-1] = m[-1]^e[-1],m[:,-1]^s[:,-1],0
        return b.astype(bool)
    def plain(p, t):
        r = math.ceil(.008*math.hypot(*t.shape))
        y,x = np.ogrid[-r:r+1,-r:r+1]
        disk,a,b = x*x+y*y<=r*r,edge(p),edge(t)
        precision,recall = (a&binary_dilation(b, disk)).sum()/a.sum(),(b&binary_dilation(a, disk)).sum()/b.sum()
        return (p&t).sum()/(p|t).sum(), 2*precision*recall/(precision+recall)
    rng,(h,w) = np.random.RandomState(0),(240,427)
    y,x = np.mgrid[:h,:w]
    masks = [sum(((y-cy)/a)**2+((x-cx)/b)**2<1+.3*np.sin(k*np.arctan2(y-cy, x-cx)) for cy,cx,a,b,k in zip(rng.uniform(60,180,3), rng.uniform(80,340,3), rng.uniform(15,60,3), rng.uniform(15,60,3), (3,5,9)))>0 for _ in range(4)]
    true = np.stack(masks); pred = np.stack([np.roll(m, (s,2*s), (0,1))^(rng.rand(h,w)<.0005) for s,m in enumerate(masks)])
    want = np.array([plain(p, t) for p,t in zip(pred, true)])
    for (j,f),p,t in zip(want, pred, true): assert abs(mask_j(p, t)-j)<1e-9 and abs(mask_f(p, t)-f)<1e-9
    s = video_scores(pred.astype(int), true.astype(int)).iloc[0]
    assert np.allclose([s.J,s.F,s['J&F']], [*want[1:-1].mean(0), want[1:-1].mean()], atol=1e-9)
