"Images as they come: every kind of file that a folder may hold is trained on or named, and training goes on"
import io, json, pytest, resource, sys, warnings
from fastai.vision.all import *
from PIL import Image
from self_supervised.data import *
from self_supervised.data import _stride
from self_supervised.cli import dino_train, run_command
import processes
from helpers import *

rgb = np.random.RandomState(0).randint(0, 255, (24,30,3), dtype=np.uint8)
im  = Image.fromarray(rgb)

def encoded(im, fmt, **kwargs):
    im.save(b := io.BytesIO(), fmt, **kwargs)
    return b.getvalue()

def exif(turn):
    ex = Image.Exif()
    ex[0x0112] = turn
    return ex

def good_files(d, n=8):
    d.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(np.roll(rgb, 3*i, 1)).save(d/f'good{i}.png')
    return d

frames = [Image.fromarray(np.roll(rgb, i, 0)) for i in range(3)]
bytes_of_good = {                                                # name, and what is in it
    'wrong extension.png':    lambda: encoded(im, 'JPEG'),
    'upper.JPG':              lambda: encoded(im, 'JPEG'),
    'one pixel.png':          lambda: encoded(im.crop((0,0,1,1)), 'PNG'),
    'one row.png':            lambda: encoded(im.crop((0,0,30,1)), 'PNG'),
    'one column.jpg':         lambda: encoded(im.crop((0,0,1,24)), 'JPEG'),
    'wide.png':               lambda: encoded(im.resize((20000,3)), 'PNG'),
    'wide.jpg':               lambda: encoded(im.resize((20000,3)), 'JPEG'),
    'high.png':               lambda: encoded(im.resize((2,20000)), 'PNG'),
    'cmyk.jpg':               lambda: encoded(im.convert('CMYK'), 'JPEG'),
    '16 bit.png':             lambda: encoded(Image.fromarray(rgb[...,0].astype(np.uint16)*257), 'PNG'),
    '16 bit.tif':             lambda: encoded(Image.fromarray(rgb[...,0].astype(np.uint16)*257), 'TIFF'),
    'float.tif':              lambda: encoded(Image.fromarray(rgb[...,0].astype(np.float32)/255), 'TIFF'),
    'animated.gif':           lambda: encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]),
    'animated.webp':          lambda: encoded(frames[0], 'WEBP', save_all=True, append_images=frames[1:]),
    'animated.png':           lambda: encoded(frames[0], 'PNG', save_all=True, append_images=frames[1:]),
    'pages.tif':              lambda: encoded(frames[0], 'TIFF', save_all=True, append_images=frames[1:]),
    'palette.png':            lambda: encoded(im.quantize(16), 'PNG'),
    'see-through index.png':  lambda: encoded(im.quantize(16), 'PNG', transparency=3),
    'see-through bytes.png':  lambda: encoded(im.quantize(16), 'PNG', transparency=bytes(range(16))),
    'see-through.gif':        lambda: encoded(im.quantize(16), 'GIF', transparency=0),
    'see-through colour.png': lambda: encoded(im, 'PNG', transparency=(1,2,3)),
    'grey.png':               lambda: encoded(im.convert('L'), 'PNG'),
    'two levels.png':         lambda: encoded(im.convert('1'), 'PNG'),
    'la.png':                 lambda: encoded(im.convert('LA'), 'PNG'),
    'rgba.png':               lambda: encoded(im.convert('RGBA'), 'PNG'),
    'lab.tif':                lambda: encoded(Image.merge('LAB', im.split()), 'TIFF'),
    'turned.jpg':             lambda: encoded(im, 'JPEG', exif=exif(6)),
    'turned nonsense.jpg':    lambda: encoded(im, 'JPEG', exif=exif(77)),
    'exif nonsense.jpg':      lambda: encoded(im, 'JPEG', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff' + b'\xff'*40),
    'пример 例 مثال 😀.png':   lambda: encoded(im, 'PNG'),
    ' spaces  and\nlines\t.png': lambda: encoded(im, 'PNG'),
    'quote"back\\slash.png':  lambda: encoded(im, 'PNG'),
    b'no utf \xff\xfe.png':   lambda: encoded(im, 'PNG')}

bytes_of_bad = {
    'empty.jpg':              lambda: b'',
    'empty.png':              lambda: b'',
    'truncated.jpg':          lambda: encoded(im, 'JPEG')[:-200],
    'truncated.png':          lambda: encoded(im, 'PNG')[:-400],
    'truncated.gif':          lambda: encoded(im.quantize(), 'GIF')[:-200],
    'truncated.webp':         lambda: encoded(im, 'WEBP')[:-100],
    'head alone.jpg':         lambda: encoded(im, 'JPEG')[:3],
    'text.jpg':               lambda: b'not an image',
    'page.html.png':          lambda: b'<html><body>404 Not Found</body></html>',
    'zeros.bmp':              lambda: bytes(500),
    'bomb.png':               lambda: bomb(40000, 40000),
    'large.png':              lambda: bomb(20000, 20000//4),
    'pdf.jpg':                lambda: encoded(im, 'PDF'),
    'program.jpg':            lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) (w) file\nshowpage\n',
    'float out of range.tif': lambda: encoded(Image.fromarray(rgb[...,0].astype(np.float32)), 'TIFF'),
    'not a number.tif':       lambda: encoded(Image.fromarray(np.full((4,4), np.nan, np.float32)), 'TIFF'),
    'line\nbreak.jpg':        lambda: b'',
    'пример 例.jpg':          lambda: b'',
    b'no utf \xff.jpg':       lambda: b''}

@functools.cache
def bomb(w, h):
    "A PNG that says it has w x h pixels; the first thousand rows are in it"
    import struct, zlib
    chunk = lambda kind,data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    z = zlib.compressobj(9)
    data = b''.join(z.compress(bytes(1+w)) for _ in range(min(h,1000))) + z.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b'')

def write(d, name, data): Path(os.fsdecode(os.path.join(os.fsencode(d), os.fsencode(name)))).write_bytes(data)

def bad_rows(d): return [json.loads(l) for l in (Path(d)/'bad_files.jsonl').open()] if (Path(d)/'bad_files.jsonl').exists() else []

def read_all(dls, epochs=2):
    "Batches of all epochs, and the warnings of bad files"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        xs = [x for _ in range(epochs) for dl in dls for x, in dl]
    for x in map(to_unit, xs): assert x.isfinite().all() and 0<=x.min() and x.max()<=1
    return xs,[str(o.message) for o in w if 'could not' in str(o.message)]

@pytest.mark.parametrize('name', bytes_of_good)
def test_what_pillow_reads_is_trained_on(name, tmp_path):
    write(tmp_path, name, bytes_of_good[name]())
    for size in (16,49):                                         # 49/49*1 is less than 1 in floats
        xs,named = read_all(unlabelled_dls(tmp_path, size=size, bs=1, num_workers=0, path=tmp_path), 1)
        assert [o.shape for o in xs]==[(1,3,size,size)] and named==[] and bad_rows(tmp_path)==[]

def check_named(dls, folder, paths):
    xs,named = read_all(dls, 2)
    rows = bad_rows(folder)
    assert sorted(o['path'] for o in rows)==sorted(map(str, paths)) and len(named)==len(set(named))==len(paths), (rows,named)
    for o in rows: assert set(o)=={'path','error','done'} and ': ' in o['error'] and o['done'].startswith('replaced by ')
    assert all(o.count('\n')==0 for o in named)
    return xs,rows

@pytest.mark.parametrize('name', bytes_of_bad)
def test_what_pillow_cannot_read_is_named_and_replaced(name, tmp_path):
    good_files(tmp_path/'d', 4)
    write(tmp_path/'d', name, bytes_of_bad[name]())
    bad = [o for o in (tmp_path/'d').ls() if not o.name.startswith('good')]
    check_named(unlabelled_dls(tmp_path/'d', size=16, bs=5, num_workers=0, path=tmp_path/'run'), tmp_path/'run', bad)

def test_what_is_no_file_is_named_or_left_alone(tmp_path, monkeypatch):
    d = good_files(tmp_path/'d')
    good_files(tmp_path/'elsewhere', 1)
    (d/'loop').symlink_to(d)                                     # a circle of folders
    (d/'sub').mkdir(); (d/'sub'/'up').symlink_to('../..')
    (d/'linked').symlink_to(tmp_path/'elsewhere')                # links that lead somewhere
    (d/'linked.png').symlink_to(tmp_path/'elsewhere'/'good0.png')
    good_files(d/'folder.jpg', 1)                                # a folder that is called as an image
    (d/'empty folder.png').mkdir()
    (d/'dangling.png').symlink_to('nowhere.png')
    (d/'self.jpg').symlink_to('self.jpg')
    os.mkfifo(d/'pipe.jpg')                                      # whoever opens it waits for ever
    (d/'locked.png').write_bytes(bytes_of_good['grey.png']())
    open_ = Image.open                                           # root may read all files: say no in the system's place
    def no_entry(fn, *args, **kwargs):
        if Path(fn).name=='locked.png': raise PermissionError(13, 'Permission denied', str(fn))
        return open_(fn, *args, **kwargs)
    (d/'locked.png').chmod(0)
    monkeypatch.setattr(Image, 'open', no_entry)
    (d/'.hidden.png').write_bytes(b'')
    dls = unlabelled_dls(d, size=16, bs=4, num_workers=2, path=tmp_path)
    names = [o.relative_to(d).as_posix() for o in dls.train_ds.items]
    assert sorted(names)==sorted([f'good{i}.png' for i in range(8)] + ['linked.png','linked/good0.png','folder.jpg/good0.png','dangling.png','self.jpg','pipe.jpg','locked.png'])
    _,rows = check_named(dls, tmp_path, [d/o for o in ('dangling.png','self.jpg','pipe.jpg','locked.png')])
    assert {Path(o['path']).name: o['error'].split(':')[0] for o in rows}=={'dangling.png':'FileNotFoundError', 'self.jpg':'OSError', 'pipe.jpg':'ValueError', 'locked.png':'PermissionError'}
    assert len(list(unlabelled_dls([d/'empty folder.png',d/'good0.png'], size=16, bs=1, num_workers=0, path=tmp_path).train))==2

def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    d = good_files(tmp_path)
    good_files(d/'locked')
    scandir = os.scandir
    def no_entry(p):
        if Path(p).name=='locked': raise PermissionError(13, 'Permission denied', str(p))
        return scandir(p)
    monkeypatch.setattr(os, 'scandir', no_entry)
    with pytest.warns(UserWarning, match='could not read the folder .*locked'): dls = unlabelled_dls(d, size=16, bs=8, num_workers=0, path=d)
    assert len(dls.train_ds)==8

def test_large_images_take_little_memory(tmp_path):
    "A process that reads a JPEG of 20,000 x 4,500 pixels, wide images and bombs stays below 400 MB above its start"
    good_files(tmp_path)
    for name in ('wide.png','wide.jpg','high.png'): write(tmp_path, name, bytes_of_good[name]())
    for name in ('bomb.png','large.png'): write(tmp_path, name, bytes_of_bad[name]())
    Image.new('L', (20000,4500), 90).save(tmp_path/'large.jpg')  # more than the 89 million, but read at an eighth
    code = f"""
import resource, warnings
from self_supervised.data import *
dls = unlabelled_dls({str(tmp_path)!r}, size=224, bs=7, num_workers=0, path={str(tmp_path)!r})
rss, = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
for _ in dls.train: pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-rss)//1024)
"""
    out,_ = processes.run(processes.code, code)
    assert int(out)<400, out
    assert sorted(Path(o['path']).name for o in bad_rows(tmp_path))==['bomb.png','large.png'] and 'large.png has 20000x5000 pixels' in str(bad_rows(tmp_path))

def test_turned_and_see_through_images_are_what_one_sees(tmp_path):
    for name in ('turned.jpg','turned nonsense.jpg','exif nonsense.jpg','see-through bytes.png','animated.gif'): write(tmp_path, name, bytes_of_good[name]())
    sizes = {f.name: open_rgb(f).size for f in tmp_path.ls()}
    assert sizes.pop('turned.jpg')==(24,30) and set(sizes.values())=={(30,24)}
    first = np.asarray(open_rgb(tmp_path/'animated.gif')).astype(int)
    assert np.abs(first-rgb).mean()<40

def mixed_folder(d):
    good_files(d, 10)
    for name in bytes_of_good: write(d, name, bytes_of_good[name]())
    for name in bytes_of_bad: write(d, name, bytes_of_bad[name]())
    (d/'loop').symlink_to(d); (d/'dangling.jpg').symlink_to('nowhere.jpg'); os.mkfifo(d/'pipe.png')
    return [d/os.fsdecode(o) for o in bytes_of_bad]+[d/'dangling.jpg',d/'pipe.png']

@pytest.mark.parametrize('num_workers', [0,2])
def test_a_fit_on_all_of_it_ends_and_names_each_bad_file_once(num_workers, tmp_path):
    bad = mixed_folder(tmp_path/'d')
    dls = unlabelled_dls(tmp_path/'d', size=16, bs=16, valid_pct=.2, seed=0, num_workers=num_workers, path=tmp_path/'run')
    learn = dino_learner(dls, 'convnet_mini', get_digits_aug_pipelines((2,1)), out_dim=32)
    with warnings.catch_warnings(record=True) as w, quiet(learn):
        warnings.simplefilter('always')
        learn.fit_dino(3)
        learn.validate()
    named = [str(o.message) for o in w if 'could not' in str(o.message)]
    seen  = {o['path'] for o in bad_rows(tmp_path/'run')}
    named = [o for o in named if ' files (' not in o]                                                # and not the count of all
    assert len(named)==len(set(named))==sum(min(10, len(dl.dataset.reported)) for dl in dls)
    assert len(seen)==len(bad_rows(tmp_path/'run')) and seen<=set(map(str, bad)) and len(seen)>=len(bad)-2        # drop_last may leave out one or two
    assert [o for o in map(str, (o.message for o in w)) if 'PIL' in o or 'xif' in o or 'ransparency' in o]==[] or num_workers==0

def test_dino_train_ends_and_lists_them_in_out(tmp_path, capfd):
    bad,out = mixed_folder(tmp_path/'d'),tmp_path/'run'
    args = ['--path', str(tmp_path/'d'), '--out', str(out), '--arch', 'convnet_mini', '--size', '16', '--batch-size-per-gpu', '16', '--local-crops-number', '1', '--out-dim', '32', '--no-report', '--epochs', '2']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert run_command(dino_train, args+['--num-workers', '2'])==0, capfd.readouterr().err
        first = bad_rows(out)
        assert (out/'encoder.safetensors').exists() and {o['path'] for o in first}<=set(map(str, bad)) and len(first)>=len(bad)-2
        args[-1] = '3'
        assert run_command(dino_train, args+['--num-workers', '0', '--resume'])==0
        assert bad_rows(out)[:len(first)]==first and len({o['path'] for o in bad_rows(out)})==len(bad_rows(out))              # goes on with the list
        for o in bad: o.unlink()
        assert run_command(dino_train, args+['--num-workers', '0', '--overwrite'])==0
        assert bad_rows(out)==[]                                 # a new run, a new list

@pytest.mark.parametrize('num_workers', [0,2])
def test_files_that_vanish_while_training_are_named(num_workers, tmp_path):
    d = good_files(tmp_path/'d', 12)
    dls = unlabelled_dls(d, size=16, bs=4, seed=0, num_workers=num_workers, path=tmp_path)
    assert read_all(dls, 1)[1]==[]
    for i in (2,5,7): (d/f'good{i}.png').unlink()
    check_named(dls, tmp_path, [d/f'good{i}.png' for i in (2,5,7)])
    assert read_all(dls, 2)[1]==[]
    for o in d.ls(): o.unlink()
    with pytest.raises(ValueError, match='12 of 12 files were tried and cannot be read'): read_all(dls)
    assert len(bad_rows(tmp_path))==12

@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('n', [3,400])
def test_nothing_but_bad_files_is_a_sentence(num_workers, n, tmp_path):
    for i in range(n): (tmp_path/f'{i}.jpg').write_bytes(b'')
    dls = unlabelled_dls(tmp_path, size=16, bs=3, num_workers=num_workers, path=tmp_path)
    for _ in range(2):                                           # the second time nothing is left to try
        with pytest.raises(ValueError, match=f'[0-9]+ of {n} files were tried and cannot be read'): read_all(dls)
    rows = bad_rows(tmp_path)
    assert min(n,100)<=len(rows)==len({o['path'] for o in rows}) and {o['done'] for o in rows}=={'no replacement was found'}

def test_dino_train_on_nothing_but_bad_files_is_a_sentence(tmp_path, capfd):
    (tmp_path/'a\nb').mkdir()
    for i in range(5): (tmp_path/'a\nb'/f'{i}\n.jpg').write_bytes(b'x')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in '02': assert run_command(dino_train, ['--path', str(tmp_path), '--out', str(tmp_path/'run'), '--batch-size-per-gpu', '2', '--num-workers', n, '--size', '16', '--arch', 'convnet_mini'])==2
    err = capfd.readouterr().err.strip().splitlines()
    assert len(err)==2 and all('5 of 5 files were tried' in o for o in err), err
    assert len(bad_rows(tmp_path/'run'))==5

def test_what_takes_the_place_is_spread_over_the_folder(tmp_path):
    for i in range(60): (tmp_path/f'a{i:02d}.png').write_bytes(b'')                      # a subfolder that was copied by half
    good_files(tmp_path, 60)
    dls = unlabelled_dls(tmp_path, size=16, bs=1, num_workers=0, path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i in range(120): dls.train.create_item(i)
        dls.train.report_bad()
    took = Counter(o['done'] for o in bad_rows(tmp_path))
    assert sum(took.values())==60 and max(took.values())<=3
    for n in [*range(1,200),1281167]:
        s = _stride(n)
        assert math.gcd(s,n)==1 and (n>1000 or {j*s%n for j in range(n)}==set(range(n)))

def test_a_list_that_cannot_be_written_ends_nothing(tmp_path):
    good_files(tmp_path/'d')
    (tmp_path/'d'/'bad.jpg').write_bytes(b'')
    (tmp_path/'run').write_text('a file where the folder should be')
    _,named = read_all(unlabelled_dls(tmp_path/'d', size=16, bs=9, num_workers=0, path=tmp_path/'run'))
    assert len(named)==2 and 'could not write' in named[1] and (tmp_path/'run').is_file()

def test_a_file_twice_in_the_list_is_named_once(tmp_path):
    good_files(tmp_path)
    (tmp_path/'bad.jpg').write_bytes(b'')
    _,named = read_all(unlabelled_dls([*get_image_files(tmp_path), tmp_path/'bad.jpg'], size=16, bs=10, num_workers=0, path=tmp_path))
    assert len(named)==len(bad_rows(tmp_path))==1

def test_memory_that_runs_out_is_no_bad_file(tmp_path):
    def full(fn): raise MemoryError
    dls = unlabelled_dls(good_files(tmp_path), size=16, bs=2, num_workers=0, open_fn=full, path=tmp_path)
    with pytest.raises(MemoryError): next(iter(dls.train))
    assert bad_rows(tmp_path)==[]

def test_formats_of_other_programs_are_not_opened(tmp_path):
    write(tmp_path, 'program.png', bytes_of_bad['program.jpg']())
    good_files(tmp_path)
    for o in ('film.mpg','film.mpeg','table.h5','program.eps','page.ps'): write(tmp_path, o, b'x')
    with pytest.raises(Image.UnidentifiedImageError): open_rgb(tmp_path/'program.png')
    assert {o.suffix for o in unlabelled_dls(tmp_path, size=16, bs=2, num_workers=0, path=tmp_path).train_ds.items}=={'.png'}
