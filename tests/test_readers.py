"All readers of files alike: what is a class, what is an image, what is done with bad files and with images of other kinds; and what their loaders send to workers"
import io, json, pickle, pytest, subprocess, sys, warnings
from multiprocessing.reduction import ForkingPickler
from fastai.vision.all import *
from PIL import Image
from self_supervised.all import *
from self_supervised.data import _to_image
from self_supervised.cli import dino_train, named_open_fn, run_command
from self_supervised.cli.evaluate import dino_eval
from self_supervised.cli.explore import dino_embed, dino_explore
from self_supervised.evaluation.copydetection import copy_detection, read_copydays
from self_supervised.evaluation.retrieval import image_files
from self_supervised.evaluation.segmentation import attention_segmentation, mask_pairs
from self_supervised.evaluation.video import segment_video
from test_distributed import launch
from test_images import bad_rows
from helpers import *

def png(f, seed=0, size=20):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size,size,3), dtype=np.uint8)).save(f)
    return f

def class_folder(d, n=6, parts=('train','test'), classes='ab'):
    for s in parts:
        for c in classes:
            for i in range(n): png(d/s/c/f'{i}.png', hash((s,c,i))%1000)
    return d

def said(f):
    "What `f` gives, and its warnings"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in w]

def labels_of(dls): return dls.vocab, [len(dl.dataset) for dl in dls]

# ---- classes and parts

@pytest.mark.parametrize('train,test', [('train','test'), ('Training','Testing'), ('TRAIN','Val'), ('train','validation'), ('train','dev')])
def test_parts_of_a_data_set_are_no_classes(tmp_path, train, test):
    class_folder(tmp_path, 3, (train,test))
    dls = labelled_dls(tmp_path, 16, 2, num_workers=0)
    assert labels_of(dls)==(['a','b'], [6,6])
    assert {f.parent.parent.name for f in dls.train_ds.items}=={train} and {f.parent.parent.name for f in dls.valid_ds.items}=={test}

def test_folders_without_images_and_those_of_other_programs_are_no_classes(tmp_path):
    class_folder(tmp_path, 4, ('',))
    for o in ('__MACOSX/a','.hidden','@eaDir','empty/deeper','a/.thumbs','__MACOSX/c'): png(tmp_path/o/'x.png')
    (tmp_path/'empty'/'deeper'/'x.png').unlink(); (tmp_path/'notes').mkdir(); (tmp_path/'notes'/'read.txt').write_text('x')
    assert labels_of(labelled_dls(tmp_path, 16, 2, num_workers=0))==(['a','b'], [6,2])
    assert len(find_images(tmp_path))==len(unlabelled_dls(tmp_path, 16, 2, num_workers=0).train_ds)==len(image_files(tmp_path))==8

def test_what_is_ambiguous_is_a_sentence(tmp_path):
    class_folder(tmp_path/'flat', 3, ('',), ('train','test'))    # images in train and test, without classes
    with pytest.raises(ValueError, match='no class folders in a folder train'): labelled_dls(tmp_path/'flat')
    class_folder(tmp_path/'two', 3, ('train','Training','test'))
    with pytest.raises(ValueError, match='has both Training and train'): labelled_dls(tmp_path/'two')
    class_folder(tmp_path/'beside', 3, ('train',)); png(tmp_path/'beside'/'docs'/'0.png')
    with pytest.raises(ValueError, match='and also the folder docs'): labelled_dls(tmp_path/'beside')
    class_folder(tmp_path/'test_only', 3, ('test',))
    with pytest.raises(ValueError, match='no class folders in a folder train'): labelled_dls(tmp_path/'test_only')
    class_folder(tmp_path/'train_only', 4, ('train',)); png(tmp_path/'train_only'/'test'/'0.png')           # a test part without labels
    assert labels_of(labelled_dls(tmp_path/'train_only', num_workers=0))==(['a','b'], [6,2])
    class_folder(tmp_path/'vehicles', 3, ('',), ('train','bus'))  # a class may be called train
    assert labelled_dls(tmp_path/'vehicles', num_workers=0).vocab==['bus','train']

# ---- one list of formats

def test_every_reader_takes_the_same_files_and_names_the_formats_it_does_not_take(tmp_path):
    d = class_folder(tmp_path/'d', 4, ('',))
    im,names = Image.open(d/'a'/'0.png'),['x.PNG','x.jpeg','x.webp','x.tga','x.qoi','x.ppm','x.jp2','x.jfif','x.psd.bmp']
    for c in 'ab':
        for n in names:
            Image.init()
            im.save(d/c/n, format=Image.registered_extensions()[Path(n).suffix.lower()])
    for n in ('logo.svg','IMG_1.HEIC','IMG_2.heic','scan.dcm'): (d/'a'/n).write_bytes(b'x')
    (d/'a'/'notes.txt').write_text('x')
    want = {f for c in 'ab' for f in [*(d/c/n for n in names),*(d/c/f'{i}.png' for i in range(4))]}
    (tmp_path/'days').mkdir(); (tmp_path/'days'/'original').symlink_to(d/'a'); (tmp_path/'days'/'strong').symlink_to(d/'a')
    def days():                                                  # names are known by four characters
        try: return read_copydays(tmp_path/'days')
        except ValueError as e: return str(e)
    readers = {'unlabelled_dls': lambda: unlabelled_dls(d, 16, 2, num_workers=0).train_ds.items, 'image_files': lambda: image_files(d), 'find_images': lambda: find_images(d),
               'labelled_dls': lambda: sum((list(o.dataset.items) for o in labelled_dls(d, 16, 2, num_workers=0)), []),
               'embed': lambda: [d/o for o in embed(create_encoder('convnet_mini'), d, 16).index]}
    for name,f in readers.items():
        got,messages = said(f)
        assert set(got)==want, (name, set(got)^want)
        line, = [o for o in messages if 'are left out' in o]
        assert '4 images of ' in line and '.heic (2, such as a/IMG_1.HEIC)' in line and '.svg (1, such as a/logo.svg)' in line and '.dcm (1' in line, (name,line)
    pairs,messages = said(lambda: mask_pairs(d/'a', d/'b'))
    assert {p[1] for p in pairs}=={o for o in want if o.parent.name=='b'} and any('.svg' in o for o in messages)
    assert "several originals start with 'x." in days()           # the same list: fastai's has none of these

# ---- bad files among the labelled ones

def test_bad_labelled_files_are_replaced_in_training_left_out_of_evaluation_and_named_once(tmp_path):
    d = class_folder(tmp_path, 4)
    bad = [d/'train'/'a'/'0.png',d/'train'/'b'/'2.png',d/'test'/'b'/'1.png']           # among them the very first file
    for f in bad: f.write_bytes(b'\x89PNG')
    for n in (0,2):
        dls = labelled_dls(d, 16, 4, num_workers=n, device='cpu')
        def read(): return [torch.cat([b[1] for b in dl]) for _ in range(2) for dl in (plain_dl(dls[0]),plain_dl(dls[1]),dls[0].new(shuffle=False, drop_last=False))]
        ys,messages = said(read)
        assert [len(o) for o in ys]==[6,7,8]*2
        assert sorted(o.split(' (')[0] for o in messages if 'could not' in o)==sorted(f'could not read {f}' for f in bad)
        assert all(o.endswith('): left out') for o in messages if 'could not' in o)
        for dl,y in zip(dls, ys):
            idxs = read_idxs(plain_dl(dl)).tolist()
            assert set(dl.dataset.items[i] for i in idxs).isdisjoint(bad) and [dls.vocab.o2i[dl.dataset.items[i].parent.name] for i in idxs]==y.tolist()
    ds = dls.train_ds
    for i,j in enumerate(ds.replacement.tolist()):                   # the label is that of the image that is shown
        if j<0: continue
        assert ds.items[i] in bad and ys[2][i]==dls.vocab.o2i[ds.items[j].parent.name]
    for f in (d/'test').rglob('*.png'): f.write_bytes(b'')
    with pytest.raises(ValueError, match='8 of 8 files were tried and cannot be read'): said(lambda: list(labelled_dls(d, 16, 4, num_workers=0).valid))

def test_figures_are_those_of_the_folder_without_its_bad_files(tmp_path):
    d,enc = class_folder(tmp_path/'d', 12),create_encoder('convnet_mini')
    bad = [d/'train'/'a'/f'{i}.png' for i in range(5)] + [d/'test'/'b'/f'{i}.png' for i in (0,3,4,5,6,7,8)]      # the last ones fill a batch
    shutil.copytree(d, tmp_path/'clean')
    for f in bad:
        f.write_bytes(f.read_bytes()[:40])
        (tmp_path/'clean'/f.relative_to(d)).unlink()
    group = lambda f: Path(f).stem
    for n in (0,2):
        dls,clean = (labelled_dls(o, 16, 4, num_workers=n, device='cpu') for o in (d,tmp_path/'clean'))
        for kw in ({},dict(groups=group)):
            got,messages = said(lambda: split_features(enc, dls, **kw))
            for a,b in zip(got, split_features(enc, clean, **kw)): assert torch.allclose(a, b, atol=1e-5)        # the batches differ, and so does the rounding
        assert len(got[1])+len(got[3])==48-len(bad)
    listed = split_features(enc, dls, groups=[group(f) for dl in dls for f in dl.dataset.items])
    assert all(torch.equal(a, b) for a,b in zip(listed, got))
    with pytest.raises(ValueError, match='one group per image'): split_features(enc, dls, groups=[1]*9)
    t,c = (linear_probe(enc, o, lrs=(.1,), epochs=2, augment=View(16, 1., 1., ratio=(1,1), flip_p=0, jitter_p=0., saturation=0., hue=0., gray_p=0., blur_p=0.))[0] for o in (dls,clean))
    assert t.equals(c)

def test_many_bad_files_are_ten_warnings_and_a_count(tmp_path):
    for i in range(40): png(tmp_path/'d'/f'{i:02d}.png', i)
    for i in range(15): (tmp_path/'d'/f'{i:02d}.png').write_bytes(b'text')
    dls = unlabelled_dls(tmp_path/'d', 16, 4, num_workers=0, path=tmp_path)
    _,messages = said(lambda: [list(dls.train) for _ in range(2)])
    named = [o for o in messages if o.startswith('could not read /')]
    assert len(named)==10 and [o for o in messages if 'could not read 15 of 40 files (38%)' in o and 'bad_files.jsonl lists them' in o]
    assert len(messages)==11 and len(bad_rows(tmp_path))==15

def test_dino_train_looks_at_labelled_files_before_it_trains(tmp_path, capfd):
    lab,out = class_folder(tmp_path/'labels', 6),tmp_path/'run'
    (lab/'test'/'b'/'0.png').write_bytes(b'\x89PNG'); (lab/'train'/'a'/'logo.svg').write_bytes(b'<svg/>'); (lab/'train'/'a'/'1.HEIC').write_bytes(b'\0')
    args = ['--path', str(lab), '--labels', str(lab), '--arch', 'convnet_mini', '--size', '16', '--batch-size-per-gpu', '8', '--epochs', '2', '--num-workers', '0', '--local-crops-number', '1', '--no-report', '--out', str(out)]
    code,messages = said(lambda: run_command(dino_train, args))
    assert code==0 and len(pd.read_csv(out/'history.csv'))==2 and (out/'encoder.safetensors').exists()
    assert {Path(o['path']).name for o in bad_rows(out)}=={'0.png'} and any('.heic (1' in o and '.svg (1' in o for o in messages)
    for f in (lab/'test').rglob('*.png'): f.write_bytes(b'')
    shutil.rmtree(out)
    assert said(lambda: run_command(dino_train, args))[0]==2 and not (out/'checkpoint.pth').exists() and not (out/'history.csv').exists()           # nothing to test on: refused before the first batch
    assert 'were tried and cannot be read' in capfd.readouterr().err

def test_dino_train_decodes_labelled_files_once(tmp_path, monkeypatch):
    "Not for each network at each evaluation"
    images,lab,opened,open_ = class_folder(tmp_path/'images', 8, ('',)),class_folder(tmp_path/'labels', 6),Counter(),Image.open
    monkeypatch.setattr(Image, 'open', lambda f, *args, **kwargs: opened.update([str(f)]) or open_(f, *args, **kwargs))
    args = ['--path', str(images), '--labels', str(lab), '--arch', 'convnet_mini', '--size', '16', '--batch-size-per-gpu', '8', '--epochs', '2', '--num-workers', '0', '--local-crops-number', '1', '--out', str(tmp_path/'run')]
    assert said(lambda: run_command(dino_train, args))[0]==0 and (tmp_path/'run'/'table.csv').exists()
    counts = [opened[str(f)] for f in lab.rglob('*.png')]
    assert len(counts)==24 and 1<=min(counts) and max(counts)<=4, counts                 # once more to look at the first batch before training

def test_evaluation_on_folders_leaves_out_bad_files_and_names_them(tmp_path):
    enc,vit = create_encoder('convnet_mini'),create_encoder('vit_mini_patch4_16')
    for i in range(4):
        png(tmp_path/'images'/f'{i}.png', i)
        Image.fromarray(np.eye(20, dtype=np.uint8)).save(png(tmp_path/'masks'/f'{i}.png'))
    flip  = dict(flip=lambda im,rng: im.transpose(Image.FLIP_LEFT_RIGHT))
    good  = copy_detection(enc, [tmp_path/'images'/f'{i}.png' for i in (0,2,3)], attacks=flip, size=16)
    (tmp_path/'images'/'1.png').write_bytes(b'')
    table,messages = said(lambda: copy_detection(enc, tmp_path/'images', attacks=flip, size=16))
    assert table.equals(good) and [o for o in messages if '1.png cannot be read' in o and 'left out' in o]
    pairs = mask_pairs(tmp_path/'images', tmp_path/'masks')
    table,messages = said(lambda: attention_segmentation(vit, pairs, size=16))
    assert table.equals(attention_segmentation(vit, [p for p in pairs if p[0].name!='1.png'], size=16)) and len([o for o in messages if 'left out' in o])==1
    with pytest.raises(ValueError, match='none of 1 images can be read'), warnings.catch_warnings(): warnings.simplefilter('ignore'); attention_segmentation(vit, pairs[1:2], size=16)

# ---- images of any kind

def modes():
    a = np.linspace(0, 65535, 16*16).reshape(16,16).astype(np.uint16)
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 255, (16,16,3), dtype=np.uint8))
    return {'I;16': Image.fromarray(a), 'I': Image.fromarray(a.astype(np.int32)), 'F': Image.fromarray((a/65535).astype(np.float32)), 'P': rgb.quantize(16), 'L': rgb.convert('L'), '1': rgb.convert('1')}

@pytest.mark.parametrize('mode', modes())
def test_pillow_images_are_the_picture_of_their_file_in_every_reader(mode, tmp_path):
    im  = modes()[mode]
    fn  = tmp_path/f'im.{"tif" if mode in "IF" else "png"}'
    im.save(fn)
    want = image2tensor(open_rgb(fn)).float()/255
    enc  = create_encoder('vit_mini_patch4_16').eval()
    seen = dict(plots=for_encoder(enc, im)[1][0], plots_file=for_encoder(enc, fn)[1][0], lazy=for_encoder(enc, Image.open(fn))[1][0])
    for k,v in seen.items(): assert torch.allclose(v, want), k
    feats = [image_features(enc, [o], lambda i,o: o, lambda e,x: e(x)) for o in (fn,im,Image.open(fn))]
    assert torch.equal(feats[0], feats[1]) and torch.equal(feats[0], feats[2])
    mask = torch.zeros(16,16); mask[:8] = 1
    seg  = [segment_video(enc, [o,o], mask, size=None) for o in (fn,im,np.asarray(im.convert('RGB') if mode in 'P1' else modes()['I;16'] if mode=='I' else im))]
    assert torch.equal(seg[0], seg[1]) and (mode=='1' or torch.equal(seg[0], seg[2]))
    # from an open_fn, loaded or not: none white, none a palette's numbers; one channel to its last bit
    for open_fn in (Image.open, lambda f: im, lambda f: PILImage(im.copy())):
        x = unlabelled_dls([fn], 16, 1, num_workers=0, path=tmp_path, open_fn=open_fn, device='cpu').one_batch()[0][0]
        x = to_unit(x)
        if mode in ('I;16','I','F'): assert x.shape[0]==1 and torch.allclose(x[0], torch.from_numpy(np.linspace(0, 65535, 256).reshape(16,16).astype(np.uint16)/65535).float(), atol=1e-6)
        else: assert torch.allclose(x.expand(3,-1,-1), want)

def test_a_pillow_image_is_turned_as_its_file_is(tmp_path):
    ex = Image.Exif(); ex[0x0112] = 6
    Image.fromarray(np.zeros((10,20,3), np.uint8)).save(tmp_path/'t.jpg', exif=ex)
    im = Image.open(tmp_path/'t.jpg')
    assert open_rgb(tmp_path/'t.jpg').size==read_image(im).size==open_image(im).size==(10,20) and im.size==(20,10)

def test_labelled_learner_predicts_from_what_web_apps_give(tmp_path):
    d  = class_folder(tmp_path/'d', 4, ('',))
    (d/'a'/'0.png').write_bytes(b'')                             # a bad file does not stand in the way
    finetune_learner(labelled_dls(d, 16, 4, num_workers=0, device='cpu'), create_encoder('convnet_mini'), path=tmp_path).export('x.pkl')
    l,f = load_learner(tmp_path/'x.pkl'),d/'a'/'1.png'
    im  = Image.open(f)
    kinds = [f, str(f), f.read_bytes(), PILImage.create(f), im, np.asarray(im), np.asarray(im)/255, TensorImage(image2tensor(im))]
    with l.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        preds = torch.stack([l.predict(o)[2] for o in kinds])
        many  = l.get_preds(dl=l.dls.test_dl([str(f)]*3+[im,np.asarray(im)]))[0]
    assert torch.allclose(preds, preds[:1].expand_as(preds), atol=1e-6) and torch.allclose(many, preds[:1].expand_as(many), atol=1e-6)
    dl = l.dls.test_dl([str(f),d/'b'/'0.png'], with_labels=True)
    assert [l.dls.vocab[i] for i in dl.one_batch()[1]]==['a','b']
    (tmp_path/'bad.png').write_bytes(b'x')
    with pytest.raises(ValueError, match='bad.png cannot be read'), l.no_bar(): l.predict(tmp_path/'bad.png')          # no other image's prediction

# ---- 12 bits

def test_few_levels_of_12_bit_values_are_named_and_16_bits_are_exact(tmp_path):
    a = np.arange(4096).reshape(64,64)
    for i in range(3): Image.fromarray(a.astype(np.uint16)).save(png(tmp_path/'scans'/f'{i}.png'))
    dls,messages = said(lambda: unlabelled_dls(tmp_path/'scans', 16, 2, num_workers=0))
    line, = [o for o in messages if 'levels' in o]
    assert 'the first 3 16-bit images' in line and 'no value above 4095 of 65535' in line and '16 of 256 levels' in line
    whole = np.arange(65536).reshape(256,256).astype(np.uint16)
    Image.fromarray(whole).save(png(tmp_path/'whole'/'0.png'))
    dls,messages = said(lambda: unlabelled_dls(tmp_path/'whole', 16, 1, num_workers=0))
    assert messages==[] and np.array_equal(np.asarray(open_gray(tmp_path/'whole'/'0.png')), (whole/65535*255).round().astype(np.uint8))

def test_a_tiff_that_says_12_bits_is_scaled_by_them(tmp_path):
    a = np.arange(4096).reshape(64,64)
    packed = np.stack([a[:,::2]>>4, (a[:,::2]&15)<<4|a[:,1::2]>>8, a[:,1::2]&255], -1).astype(np.uint8).tobytes()
    tags = [(256,3,64),(257,3,64),(258,3,12),(259,3,1),(262,3,1),(273,4,8),(277,3,1),(278,4,64),(279,4,len(packed))]
    import struct
    ifd = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', t,k,1,v) for t,k,v in tags) + bytes(4)
    (tmp_path/'x.tif').write_bytes(b'II*\0'+struct.pack('<I', 8+len(packed))+packed+ifd)
    assert np.array_equal(np.asarray(open_gray(tmp_path/'x.tif')), (a/4095*255).round().astype(np.uint8))
    assert torch.allclose(_to_image(Image.open(tmp_path/'x.tif')).as_subclass(Tensor), torch.from_numpy(a/4095).float()[None])
    assert said(lambda: find_images(tmp_path))[1]==[]

# ---- n channels

@pytest.fixture(scope='module')
def five(tmp_path_factory):
    "Files of five channels in class folders, and an encoder that was trained on them"
    d,rng = tmp_path_factory.mktemp('five'),np.random.RandomState(0)
    for s in ('train','test'):
        for c in 'ab':
            (d/'data'/s/c).mkdir(parents=True)
            for i in range(6): np.save(d/'data'/s/c/f'{i}.npy', ((rng.rand(24,24,5)*.5+.4*(c=='b'))*65535).astype(np.uint16))
    args = ['--path', d/'data', '--labels', d/'data', '--open-fn', 'numpy:load', '--n-in', '5', '--arch', 'convnet_mini', '--size', '24', '--batch-size-per-gpu', '8', '--epochs', '1', '--num-workers', '0', '--local-crops-number', '1', '--no-report', '--out', d/'run']
    assert run_command(dino_train, list(map(str, args)))==0
    return d

def test_images_of_n_channels_are_evaluated_with_the_open_fn_they_were_trained_with(five, tmp_path, capfd):
    d,enc = five/'data',load_encoder(five/'run'/'encoder.safetensors')
    assert channels_of(enc)==5 and json.loads((five/'run'/'run.json').read_text()) and 'knn' in pd.read_csv(five/'run'/'history.csv')
    dls = labelled_dls(d, 24, 12, open_fn=np.load, crop_pct=1, num_workers=0, device='cpu')
    x,y = first(dls.valid)
    assert torch.allclose(x.as_subclass(Tensor), torch.stack([torch.from_numpy(np.load(f)/65535).permute(2,0,1).float() for f in dls.valid_ds.items]), atol=1e-5) and y.tolist()==[0]*6+[1]*6
    assert labelled_dls(d, 16, 4, open_fn=np.load, num_workers=0).one_batch()[0].shape==(4,5,16,16) and 0<=knn_accuracy(enc, dls, k=3)<=1
    df = embed(enc, d, 24, open_fn=np.load)
    assert len(df)==24 and not df.attrs['bad_files'] and Thumbnails(d, 24, np.load)['test/a/0.npy'].size==(24,24)
    for p in ('knn','lowshot','linear','finetune','unlabelled'):
        args = [p, '--encoder', str(five/'run'), '--data', str(d), '--size', '24', '--num-workers', '0', '--open-fn', 'numpy:load', '--batch-size', '6', '--out', str(tmp_path/'o.json'), *(['--epochs','1'] if p in ('linear','finetune') else []), '--no-progress']
        assert run_command(dino_eval, args)==0, (p, capfd.readouterr().err)
        assert json.loads((tmp_path/'o.json').read_text())['settings']['open_fn']=='numpy:load'
    common = [str(d), '--encoder', str(five/'run'), '--size', '24', '--open-fn', 'numpy:load', '--no-progress']
    assert run_command(dino_embed, [*common, '--out', str(tmp_path/'f.npz')])==0 and len(load_embedding(tmp_path/'f.npz'))==24
    assert run_command(dino_explore, [*common, '--out', str(tmp_path/'p.html'), '--clusters', '2', '--k', '2'])==0
    page = (tmp_path/'p.html').read_text()
    assert page.count('data:image/jpeg')>20 and 'data:,' not in page

def test_messages_on_channels_advise_what_the_caller_has(five, tmp_path, capfd):
    d,enc = five/'data',load_encoder(five/'run'/'encoder.safetensors')
    def message(f):
        with pytest.raises(ValueError) as e: f()
        return str(e.value)
    for f in (lambda: labelled_dls(d, 16, 4, n_in=5), lambda: embed(enc, d, 24), lambda: unlabelled_dls(d, 16, 4), lambda: embed(enc, list(d.rglob('*.npy')), 24)): assert 'open_fn' in message(f)
    vit = create_encoder('vit_mini_patch4_16', n_in=5)
    plt.close(show_attention(vit, torch.rand(1,5,16,16))[0,0].figure); plt.close(show_neighbours(torch.eye(3), torch.rand(3,5,16,16), [0], 2)[0,0].figure)
    for f in (lambda: show_attention(vit, png(tmp_path/'x.png')), lambda: segment_video(vit, [tmp_path/'x.png']*2, torch.ones(20,20)), lambda: attention_segmentation(vit, [(tmp_path/'x.png',tmp_path/'x.png')]),
              lambda: copy_detection(enc, tmp_path), lambda: find_images(d)):
        assert 'open_fn' not in message(f) and '--' not in message(f)
    assert 'an image of 5 channels: expected colour (3 channels) or grey (1 channel)' in message(lambda: copy_detection(enc, d, open_fn=np.load, size=16))
    for cmd,args in ((dino_eval, ['knn','--data',str(d)]), (dino_embed, [str(d)]), (dino_explore, [str(d)])):
        assert run_command(cmd, [*args, '--encoder', str(five/'run')])==2 and 'pass --open-fn' in capfd.readouterr().err
    assert run_command(dino_train, ['--path', str(d), '--n-in', '5'])==2 and 'for others pass --open-fn' in capfd.readouterr().err
    assert run_command(dino_train, ['--path', str(d), '--open-fn', 'numpy:load', '--arch', 'convnet_mini', '--batch-size-per-gpu', '4', '--num-workers', '0', '--out', str(tmp_path/'r')])==2
    assert '--open-fn gives images of 5 channels: pass --n-in 5' in capfd.readouterr().err
    for name,what in (('numpy','pass module:function'), ('numpy:nothing','has no function nothing'), ('no_such:f','cannot be imported')):
        with pytest.raises(ValueError, match=what): named_open_fn(name)
    assert named_open_fn('numpy:load') is np.load and named_open_fn(None) is None

def test_open_fn_of_a_module_in_this_folder(tmp_path, monkeypatch):
    (tmp_path/'my_scans_for_a_test.py').write_text('def open_scan(f): return 1')
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(sys, 'path', [o for o in sys.path if o])
    assert named_open_fn('my_scans_for_a_test:open_scan')('x')==1

# ---- workers that are spawned

READERS = """
def readers(d, n):
    "Name and function of everything that reads with workers; n of them"
    kw   = dict(num_workers=n, device='cpu')
    enc,vit = create_encoder('convnet_mini'),create_encoder('vit_mini_patch4_16')
    lab  = lambda **k: labelled_dls(d, 16, 4, crop_pct=1, **kw, **k)
    fast = lambda: ImageDataLoaders.from_folder(d, valid_pct=.25, item_tfms=Resize(16), bs=4, **kw)
    un   = lambda **k: unlabelled_dls(d, 16, 8, path=d, valid_pct=.3, **kw, **k)
    def fit(dls, *cbs):
        l = dino_learner(dls, 'convnet_mini', get_dino_aug_pipelines((2,1), crop_sizes=(16,8)), out_dim=32, cbs=list(cbs))
        with l.no_bar(), l.no_logging(): l.fit_dino(1)
        assert len(l.recorder.values)==1
        return l
    def predict():
        l = finetune_learner(lab(), enc, path=d)
        with l.no_bar(), l.no_logging():
            l.fit(1)
            l.get_preds(dl=l.dls.test_dl(list(find_images(d))[:5], num_workers=n))
    def few():
        from self_supervised.report import _subset
        return list(_subset(lab().train, 3))
    return {'unlabelled_dls': lambda: fit(un()), 'cache': lambda: un(cache=True), 'labelled_dls': lambda: list(lab().train), 'open_fn': lambda: list(lab(open_fn=open_gray).valid),
            'test_dl of unlabelled_dls': lambda: list(un().test_dl(list(find_images(d))[:5], num_workers=n)), 'fine-tuning and test_dl': predict, "fastai's": lambda: extract_features(enc, fast().train),
            'PyTorch\\'s': lambda: extract_features(enc, torch.utils.data.DataLoader(digits_dls().valid_ds, 8, num_workers=n)) if n else None,
            'monitors': lambda: fit(un(), KNNMonitor(lab(), 3), RankMeMonitor(), CollapseMonitor()), 'k-NN': lambda: knn_accuracy(enc, lab(), k=3), 'groups': lambda: knn_accuracy(enc, lab(), k=3, groups=lambda f: f.stem),
            'linear probe': lambda: linear_probe(enc, lab(), epochs=1, augment=probe_view(16, 3)), 'lowshot': lambda: lowshot_accuracy(enc, lab(), 1, draws=1), 'embed': lambda: embed(enc, d, 16, num_workers=n),
            'copy detection': lambda: copy_detection(enc, d, attacks=dict(text=text_attack), size=16, num_workers=n), 'retrieval': lambda: retrieval_features(vit, d, 16, num_workers=n),
            'rank table': lambda: rank_table({'x': enc}, un().train), 'the report': few, 'prepare_images': lambda: prepare_images(d, d.parent/f'small{n}', 16, num_workers=n, progress=False)}
"""
HEAD = """
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.prepare import prepare_images
from self_supervised.evaluation.copydetection import *
from self_supervised.evaluation.retrieval import *
"""

@pytest.fixture
def few_images(tmp_path): return class_folder(tmp_path/'d', 12, ('',))

def test_what_loaders_send_to_spawned_workers_can_be_pickled(few_images, monkeypatch):
    "The half that always runs: all that spawn would send is pickled, and the batches are then made without workers"
    from torch.utils.data import dataloader
    import fastai.data.load as load, self_supervised.data as data
    sent = []
    class Unforked(dataloader._SingleProcessDataLoaderIter):
        def _reset(self, loader, first_iter=False): vars(self).update(vars(pickled(loader)))
        def _shutdown_workers(self): pass
    def pickled(loader):
        vars(getattr(loader, 'default', loader)).pop('it', None)  # left by an iteration without workers, which here all are
        for k in ('dataset','collate_fn','worker_init_fn'): ForkingPickler.dumps(getattr(loader, k))
        sent.append(loader)
        n,loader.num_workers = loader.num_workers,0
        try: return Unforked(loader)
        finally: loader.num_workers = n
    monkeypatch.setattr(dataloader, '_MultiProcessingDataLoaderIter', pickled)
    monkeypatch.setattr(load, '_loaders', (pickled,dataloader._SingleProcessDataLoaderIter))
    monkeypatch.setattr(data, '_MultiProcessingDataLoaderIter', pickled)
    space = {}
    exec(HEAD+READERS, space)
    for name,f in space['readers'](few_images, 1).items():
        n = len(sent)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            f()
        assert len(sent)>n, f'{name} used no worker'

SPAWNS = 'unlabelled_dls','cache','labelled_dls',"fastai's",'monitors','prepare_images'

@pytest.mark.slow
def test_readers_with_a_spawned_worker(few_images, tmp_path):
    "Each kind of loader once: the others send the same"
    script = tmp_path/'script.py'
    script.write_text(f"""{HEAD}{READERS}
if __name__=='__main__':
    import multiprocessing as mp
    mp.set_start_method('spawn', force=True)
    for name,f in readers(Path({str(few_images)!r}), 1).items():
        if name not in {SPAWNS}: continue
        f()
        print('read:', name, flush=True)
""")
    res = subprocess.run([sys.executable, '-W', 'ignore', script], capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    assert res.returncode==0 and [o[6:] for o in res.stdout.splitlines() if o.startswith('read: ')]==list(SPAWNS), res.stdout+res.stderr[-3000:]

def test_loaders_of_several_processes_can_be_pickled(few_images):
    for dl in (unlabelled_dls(few_images, 16, 4, num_workers=1).train, labelled_dls(few_images, 16, 4, num_workers=1).train): ForkingPickler.dumps(JointDL(dl, rank=0, world_size=2).fake_l)

SPAWNED = """
import multiprocessing as mp
mp.set_start_method('spawn', force=True)
torch.set_default_dtype(torch.float32)
set_seed(rank)
dls   = unlabelled_dls(out/'d', 16, 4, num_workers=1, path=out, device='cpu', seed=0)
learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32, path=out, cbs=KNNMonitor(labelled_dls(out/'d', 16, 4, num_workers=1, device='cpu'), 3))
with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit_dino(1)
(out/f'{rank}.txt').write_text(str(learn.recorder.values[-1]))
"""

@pytest.mark.slow
def test_two_processes_with_a_spawned_worker_each(few_images, tmp_path):
    launch(tmp_path, 2, SPAWNED)
    assert 'nan' not in (tmp_path/'0.txt').read_text() and (tmp_path/'1.txt').exists()

# ---- rare realities of labelled folders

def test_dino_eval_names_copies_over_the_split_and_reports_uneven_classes(tmp_path):
    rng,d = np.random.RandomState(0),tmp_path/'d'
    for s,n in (('train',20),('test',16)):
        for c in 'ab': (d/s/c).mkdir(parents=True)
        for i in range(n):
            for c in 'ab'[:2 if i<5 else 1]: Image.fromarray(rng.randint(0, 255, (5,5,3), dtype=np.uint8)).resize((30,40)).save(d/s/c/f'{i}.jpg')
    for i in (2,4): Image.open(d/'train'/'b'/f'{i}.jpg').resize((60,80)).save(d/'test'/'b'/f'copy{i}.jpg', quality=60)
    (d/'test'/'a'/'0.jpg').write_bytes(b'')
    out = tmp_path/'e.json'
    _,messages = said(lambda: dino_eval('knn', ['pixels'], data=str(d), out=str(out), size=16, no_progress=True, k=[1]))
    line, = [o for o in messages if 'copies of training images' in o]
    assert line.startswith('2 of 23 test images') and f"{d}/test/b/copy2.jpg of {d}/train/b/2.jpg" in line and 'groups' in line
    row, = json.loads(out.read_text())['table']
    assert 'balanced' in row and abs(row['top-1']*.22-round(row['top-1']*.22))<3e-3        # of 22 test images, not 23
    _,messages = said(lambda: dino_eval('knn', ['pixels'], data=str(d), out=str(out), size=16, no_progress=True, k=[1], groups=r'(\d+)\.jpg'))
    assert not [o for o in messages if 'copies of training images' in o]
