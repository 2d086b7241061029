"""Random and mutated input for all that reads: images, checkpoints, weights, masks, pickles, and the command line

`make test` tries some hundred cases, the same each time; `make test-all` ten thousand new ones. What they found stands in `test_what_they_found`."""
import io, pickle, pytest, resource, warnings, zipfile
from fastai.vision.all import *
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save
from self_supervised.checkpoints import *
from self_supervised.cli import dino_train, run_command
from self_supervised.cli.evaluate import dino_attention, dino_eval
from self_supervised.data import *
from self_supervised.encoders import *
from self_supervised.weights import load_dino_weights
from self_supervised.evaluation.linear import load_linear_weights
from self_supervised.evaluation.retrieval import read_revisited
from self_supervised.evaluation.video import read_mask, write_mask
from helpers import *
from test_images import bad_rows, bytes_of_bad, bytes_of_good, encoded, good_files

few_or_many = pytest.mark.parametrize('many', [False, pytest.param(True, marks=pytest.mark.slow)])

def fuzz(check, n, many, *strategies):
    "`n` cases, or a thirtieth of them, always the same"
    def f(case): check(*case)
    f = given(case=st.tuples(*strategies))(f)
    settings(max_examples=n if many else n//30, derandomize=not many, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))(f)()

@st.composite
def mutated(draw, bases):
    "One of `bases` with some bytes changed, mostly at its head, taken out, put in or cut off"
    b = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(b), 80)) | st.integers(0, len(b)))
        match draw(st.integers(0, 5)):
            case 0: b[at:at+1] = bytes([draw(st.integers(0, 255))])
            case 1: b[at:at+4] = draw(st.sampled_from([b'\xff'*4, b'\0'*4, b'\x7f\xff\xff\xff', b'\0\0\0\1', b'\1\0\0\0']))
            case 2: del b[at:]
            case 3: del b[at:at+draw(st.integers(1, 64))]
            case 4: b[at:at] = draw(st.binary(max_size=16))
            case 5: b[at:at] = b[:draw(st.integers(0, 64))]
    return bytes(b)

def refused(f, *args, also=()):
    "What `f` gives, or None where it refuses in a sentence"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return f(*args)
        except (ValueError,OSError,*also) as e: assert str(e).strip(), type(e)

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([torch.zeros(0), torch.ones(3), torch.ones(2,2,dtype=torch.int64), Tensor()]),
                     lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=4), o, max_size=3), max_leaves=4)

@st.composite
def broken(draw, whole):
    "The nested dict `whole` with entries taken out, put in or replaced"
    d = top = dict(whole)
    for _ in range(draw(st.integers(1, 3))):
        d = top
        while True:
            k = draw(st.sampled_from(sorted(d, key=str))) if d else 'x'
            if not isinstance(d.get(k), dict) or draw(st.booleans()): break
            d[k] = d = dict(d[k])
        match draw(st.integers(0, 2)):
            case 0: d.pop(k, None)
            case 1: d[k] = draw(plain)
            case 2: d[draw(st.text(max_size=4))] = draw(plain)
    return top

class Harm:
    "Leaves a file where it is unpickled as code"
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch,(self.file,)

# images

images = [f() for n,f in {**bytes_of_good, **bytes_of_bad}.items() if not str(n).startswith(('bomb','large','wide','high'))]
images += [encoded(Image.open(io.BytesIO(bytes_of_good['wrong extension.png']())), o) for o in ('BMP','PPM','TGA','PCX','SGI','ICO','JPEG2000','DDS','QOI','AVIF','IM','DIB')]
heads  = [o[:n] for o in images for n in (4,16,40) if len(o)>=n]

def check_image(d, good, data):
    (d/'x.jpg').write_bytes(data)
    (d/'bad_files.jsonl').unlink(missing_ok=True)
    dls = unlabelled_dls([d/'x.jpg',good], size=16, bs=2, num_workers=0, path=d)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        x, = dls.train.one_batch()
    assert x.shape==(2,3,16,16) and x.dtype==torch.uint8
    assert [o['path'] for o in bad_rows(d)] in ([], [str(d/'x.jpg')])

@few_or_many
def test_images(many, tmp_path):
    good_files(tmp_path, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(partial(check_image, tmp_path, tmp_path/'good0.png'), 4000, many, mutated(images) | st.binary(max_size=300) | st.builds(bytes.__add__, st.sampled_from(heads), st.binary(max_size=300)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before<1.5e6, "KB"

# checkpoints and weights

def saved(o):
    torch.save(o, b := io.BytesIO())
    return b.getvalue()

def rezipped(data, i, new):
    "A file of PyTorch whose `i`th record is `new`, with its checksum in order"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as a, zipfile.ZipFile(out, 'w') as b:
        names = a.namelist()
        for n in names: b.writestr(n, new if n==names[i%len(names)] else a.read(n))
    return out.getvalue()

def files_like(whole):
    "Files of PyTorch: broken in what they hold, in their bytes, and in the pickle within"
    data = saved(whole)
    with zipfile.ZipFile(io.BytesIO(data)) as z: pkl = z.read(z.namelist()[0])
    return st.builds(saved, broken(whole)) | mutated([data]) | st.builds(partial(rezipped, data, 0), mutated([pkl])) | st.builds(saved, plain) | st.binary(max_size=200)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of one epoch and its files"
    d = tmp_path_factory.mktemp('run')
    learn = digits_learner(n_train=64, path=d, out_dim=16)
    with quiet(learn): learn.fit_dino(1, cbs=RunCheckpoint(d))
    export_encoder(learn, d/'encoder.safetensors', verbose=False)
    return d

def check_encoder(d, name, data):
    (d/name).write_bytes(data)
    own = create_encoder('convnet_mini')
    before = state(own)
    for enc in (None,own):
        got = refused(load_encoder, d/name, enc)
        assert got is None or isinstance(got, nn.Module) and not got.training
        if enc is not None and got is None: assert changed(own, before)==[]

@few_or_many
def test_run_as_encoder(many, run, tmp_path):
    whole = torch.load(run/'checkpoint.pth', weights_only=True)
    fuzz(partial(check_encoder, tmp_path, 'x.pth'), 600, many, files_like(whole))

@few_or_many
def test_safetensors(many, run, tmp_path):
    from safetensors import safe_open
    with safe_open(run/'encoder.safetensors', 'pt') as f: meta,weights = f.metadata(),{k:f.get_tensor(k) for k in f.keys()}
    odd = st.text(max_size=8) | st.sampled_from(['{}','[]','null','NaN','[1]','{"model_name":"vit_tiny_patch16_224"}','{"model_name":"nonsense","in_chans":3}','{"model_name":"convnet_mini","in_chans":-1}', '1e99'])
    metas   = st.builds(lambda k,v: {**meta, k:v}, st.sampled_from([*meta,'mean','std','args','new']), odd)
    tensors = st.builds(lambda k,v,gone: {k_:v_ for k_,v_ in {**weights, k:v}.items() if k_!=gone}, st.sampled_from([*weights,'new']), st.sampled_from([torch.ones(1), torch.zeros(0,3), torch.ones(2,2,dtype=torch.int64)]),
                        st.sampled_from([None,*weights]))
    fuzz(partial(check_encoder, tmp_path, 'x.safetensors'), 600, many, st.builds(save, tensors, metas) | st.builds(partial(save, weights), metas) | mutated([save(weights, meta)]) | st.binary(max_size=200))

@few_or_many
def test_resume(many, run, tmp_path):
    whole = torch.load(run/'checkpoint.pth', weights_only=True)
    learn = digits_learner(n_train=64, path=tmp_path, out_dim=16, cbs=[])
    class Enough(Callback):
        order = RunCheckpoint.order+1
        def before_fit(self): raise KeyboardInterrupt            # what was to be loaded is loaded
    def check(data):
        (tmp_path/'checkpoint.pth').write_bytes(data)
        before = state(learn.model)
        def fit():
            try: learn.fit_dino(2, cbs=[RunCheckpoint(tmp_path, resume=True), Enough()])
            except KeyboardInterrupt: return True
        with quiet(learn):
            if refused(fit) is None: assert changed(learn.model, before)==[]
    fuzz(check, 500, many, files_like(whole))

@few_or_many
def test_linear_weights(many, tmp_path):
    whole = dict(state_dict={'module.linear.weight': torch.randn(10,64), 'module.linear.bias': torch.zeros(10)}, epoch=3)
    def check(data):
        (tmp_path/'x.pth').write_bytes(data)
        got = refused(load_linear_weights, tmp_path/'x.pth', create_encoder('vit_mini_patch4_16'))
        assert got is None or isinstance(got[0], nn.Linear)
    fuzz(check, 600, many, files_like(whole))

@few_or_many
def test_weights_of_others(many, tmp_path):
    enc  = create_encoder('vit_mini_patch4_16')
    weights = {k:torch.zeros_like(v) for k,v in enc.state_dict().items()}
    whole = dict(teacher={f'module.backbone.{k}':v for k,v in weights.items()}, student={f'module.backbone.{k}':v for k,v in weights.items()}, dino_loss=dict(center=torch.zeros(1,16)), epoch=3)
    before = state(enc)
    def check(data):
        (tmp_path/'x.pth').write_bytes(data)
        if refused(load_dino_weights, enc, tmp_path/'x.pth') is None: assert changed(enc, before)==[]
        else: enc.load_state_dict(before)
    fuzz(check, 500, many, files_like(whole) | files_like(weights))

def test_no_reader_executes_what_it_reads(run, tmp_path):
    whole = torch.load(run/'checkpoint.pth', weights_only=True)
    (tmp_path/'roxford5k').mkdir()
    for o in (Harm(tmp_path/'harm'), {**whole, 'x': Harm(tmp_path/'harm')}):
        (tmp_path/'checkpoint.pth').write_bytes(saved(o))
        (tmp_path/'roxford5k'/'gnd_roxford5k.pkl').write_bytes(pickle.dumps(dict(imlist=[Harm(tmp_path/'harm')], qimlist=[], gnd=[])))
        learn = digits_learner(n_train=64, path=tmp_path, out_dim=16, cbs=[])
        with quiet(learn), pytest.raises(ValueError, match='is not a readable checkpoint'): learn.fit_dino(1, cbs=RunCheckpoint(tmp_path, resume=True))
        for f in (load_encoder,load_linear_weights,partial(load_dino_weights, create_encoder('vit_mini_patch4_16'))): pytest.raises(ValueError, f, tmp_path/'checkpoint.pth')
        with pytest.raises(ValueError, match='asks for'): read_revisited(tmp_path)
        assert not (tmp_path/'harm').exists()

def test_what_they_found(run, tmp_path):
    "Each of these once ended in an error that named no file"
    f   = tmp_path/'x.pth'
    enc = create_encoder('convnet_mini')
    def says(reader, data, *words):
        f.write_bytes(data)
        with pytest.raises(ValueError) as e: reader(f)
        assert all(o in str(e.value) for o in (str(f),*words)), e.value
    linear = partial(load_linear_weights, encoder=None)
    says(linear, b'', 'EOFError')
    for o in (dict(state_dict=3), {1:torch.ones(2), 'bias':torch.ones(2)}, dict(weight=3, bias=torch.ones(2)), dict(weight=torch.ones(2), bias=torch.ones(2)), dict(weight=torch.ones(2,3), bias=torch.ones(3))): says(linear, saved(o))
    whole = torch.load(run/'checkpoint.pth', weights_only=True)
    for o in (dict(whole, model=3), dict(whole, model={1:torch.ones(1)}), dict(whole, encoder=['x']), dict(whole, encoder=dict(whole['encoder'], checkpoint_path='other.pth'))): says(load_encoder, saved(o))
    name = next(k for k in whole['model'] if k.startswith('teacher.0.encoder.'))
    says(load_encoder, saved(dict(whole, model=dict(whole['model'], **{name:torch.ones(1)}))), name.removeprefix('teacher.0.encoder.'), 'nothing was loaded')
    with_stats = lambda m: saved(dict(whole, model=dict(whole['model'], mean=m)))
    says(load_encoder, with_stats('x'))
    (tmp_path/'roxford5k'/'jpg').mkdir(parents=True)
    Image.new('RGB', (4,4)).save(tmp_path/'roxford5k'/'jpg'/'0.jpg')
    for k,v in (('bbx',['a']), ('easy',[[0,1],[1]]), ('junk',[1e400])):
        (tmp_path/'roxford5k'/'gnd_roxford5k.pkl').write_bytes(pickle.dumps(dict(imlist=['0'], qimlist=['0'], gnd=[{**dict(easy=[0], hard=[], junk=[], bbx=[0.,0.,1.,1.]), k:v}])))
        with pytest.raises(ValueError, match='gnd_roxford5k'): read_revisited(tmp_path)
    for data in (b'', encoded(Image.new('P', (8,8)), 'PNG')[:60]):
        f.write_bytes(data)
        with pytest.raises(ValueError, match='x.pth'): read_mask(f)

# masks and pickles

@few_or_many
def test_masks(many, tmp_path):
    write_mask(torch.arange(64).view(8,8), tmp_path/'m.png')
    masks = [(tmp_path/'m.png').read_bytes(), encoded(Image.open(tmp_path/'m.png').convert('L'), 'PNG'), encoded(Image.open(tmp_path/'m.png'), 'GIF'), encoded(Image.open(tmp_path/'m.png').convert('1'), 'PNG')]
    def check(data):
        (tmp_path/'x.png').write_bytes(data)
        got = refused(read_mask, tmp_path/'x.png')
        assert got is None or got.ndim==2 and got.dtype==torch.uint8
    fuzz(check, 1000, many, mutated(masks) | st.binary(max_size=100) | mutated(images))

@few_or_many
def test_revisited(many, tmp_path):
    good_files(tmp_path/'roxford5k'/'jpg', 2)
    for i in range(2): (tmp_path/'roxford5k'/'jpg'/f'good{i}.png').rename(tmp_path/'roxford5k'/'jpg'/f'{i}.jpg')
    whole = dict(imlist=['0','1'], qimlist=['1'], gnd=[dict(easy=np.array([0]), hard=[1], junk=[], bbx=[0.,0.,5.,5.])])
    odd   = plain | st.sampled_from([np.array([9]), np.array([-1]), np.ones((2,2)), np.array(['a']), np.float64(3), [0.5], ['x'], [[0,1],[1]], [None]])
    gnd   = st.builds(lambda k,v: {**whole['gnd'][0], k:v}, st.sampled_from(['easy','hard','junk','bbx','new']), odd)
    def check(data):
        (tmp_path/'roxford5k'/'gnd_roxford5k.pkl').write_bytes(data)
        got = refused(read_revisited, tmp_path)
        assert got is None or len(got)==3
    fuzz(check, 1000, many, st.builds(pickle.dumps, broken(whole)) | st.builds(lambda g: pickle.dumps({**whole, 'gnd':[g]}), gnd) | mutated([pickle.dumps(whole, p) for p in (0,2,4)]) | st.binary(max_size=100))

# the command line

def check_command(func, capfd, args):
    "0, 1 or 2, and one sentence on stderr where it is not 0"
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = run_command(func, args)
    err = capfd.readouterr().err
    assert code in (0,1,2), (code,err)
    if code: assert len(err.strip().splitlines())==1 and err.startswith(f'{func.__name__}: '), err

def options(names, values, flags=()):
    one = st.builds(lambda n,v: [n,*v], st.sampled_from(names), st.lists(values, max_size=2)) | st.sampled_from([[o] for o in flags])
    return st.lists(one, max_size=4).map(lambda o: sum(o, []))

odd_values = st.sampled_from(['-1','0','1','2','3','.5','8','1e9','1e400','nan','inf','-inf','abc','','None','[]','true','99999999999999999999','0x10','1_0','é','../..','/dev/null','\n','a b','--', 'vit_mini_patch4_16','resnet18','student','bf16','cpu','mps','sgd','32','224','.25','1 2','^(.)','knn']) | \
             st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=6)

train_options = ['--arch','--patch-size','--epochs','--batch-size-per-gpu','--size','--n-in','--labels','--seed','--num-workers','--precision','--saveckp-freq','--lr','--min-lr','--warmup-epochs','--weight-decay',
                 '--weight-decay-end','--optimizer','--clip-grad','--grad-accumulation','--out-dim','--use-bn-in-head','--norm-last-layer','--drop-path-rate','--freeze-last-layer','--momentum-teacher',
                 '--warmup-teacher-temp','--teacher-temp','--warmup-teacher-temp-epochs','--global-crops-size','--local-crops-size','--global-crops-scale','--local-crops-scale','--local-crops-number','--max-hours','--nonsense','-x','--path']

@pytest.fixture
def three(tmp_path): return good_files(tmp_path/'d', 3)

@few_or_many
def test_dino_train(many, three, tmp_path, capfd, monkeypatch):
    "As far as the first batch: the fit itself is replaced, and three images are fewer than most batches"
    class Reached(ValueError): "Training would start"
    def stop(*args, **kwargs): raise Reached("training would start")
    monkeypatch.setattr(Learner, 'fit', stop)
    base = ['--path', str(three), '--out', str(tmp_path/'run'), '--arch', 'convnet_mini', '--size', '16', '--num-workers', '0', '--batch-size-per-gpu', '2', '--out-dim', '16', '--local-crops-number', '1']
    fuzz(lambda args: check_command(dino_train, capfd, base+args), 700, many, options(train_options, odd_values, ['--resume','--overwrite','--rot90','--compile','--grad-checkpointing','--cache']))

eval_options = ['--encoder','--data','--who','--size','--n-in','--batch-size','--num-workers','--precision','--device','--seed','--groups','--k','--temperature','--n-blocks','--lrs','--valid-pct','--linear-weights',
                '--labels','--draws','--epochs','--lr','--benchmark','--distractors','--whiten-on','--masks','--keep','--split','--nonsense']

@few_or_many
def test_dino_eval(many, tmp_path, capfd, monkeypatch):
    d = digits_few(tmp_path/'few')
    base = ['--encoder', 'pixels', '--data', str(d), '--out', str(tmp_path/'x.json'), '--size', '16', '--no-progress', '--epochs', '1']
    names = st.sampled_from(['knn','lowshot','linear','finetune','retrieval','copydetection','video','segmentation','unlabelled','kmeans','']) | st.just('knn')
    fuzz(lambda name,args: check_command(dino_eval, capfd, [name]+base+args), 400, many, names, options(eval_options, odd_values, ['--pretrained','--avgpool','--multiscale','--objects']))

@few_or_many
def test_dino_attention(many, three, tmp_path, capfd):
    base = ['--encoder', 'vit_mini_patch4_16', '--out', str(tmp_path/'x.png'), '--size', '16']
    fuzz(lambda image,args: check_command(dino_attention, capfd, [str(image)]+base+args), 100, many, st.sampled_from([three/'good0.png',three,tmp_path/'nowhere']) | odd_values,
         options(['--encoder','--out','--who','--size','--keep','--query','--fps','--device','--nonsense'], odd_values, ['--pretrained']))

def digits_few(d):
    for part in ('train','test'):
        for c in 'ab': good_files(d/part/c, 3)
    return d
