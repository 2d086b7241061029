"DINOv2 and DINOv3 under the names of those who publish them, against transformers' own models"
import pytest, re, subprocess, sys, timm, torch, transformers, warnings
from fastai.vision.all import *
from self_supervised.all import *
from self_supervised.weights import *

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
tiny  = dict(depth=2, embed_dim=48, num_heads=3)
archs = {'dinov2':          ('vit_small_patch14_dinov2', dict(img_size=28)),
         'dinov2 giant':    ('vit_giant_patch14_dinov2', dict(img_size=28)),               # SwiGLU
         'registers':       ('vit_small_patch14_reg4_dinov2', dict(img_size=28)),
         'registers giant': ('vit_giant_patch14_reg4_dinov2', dict(img_size=28)),
         'dinov3':          ('vit_small_patch16_dinov3', dict(img_size=32)),
         'dinov3 biases':   ('vit_small_patch16_dinov3_qkvb', dict(img_size=32)),
         'dinov3 plus':     ('vit_small_plus_patch16_dinov3_qkvb', dict(img_size=32)),     # SwiGLU in two layers
         'dinov3 class':    ('vit_small_patch16_dinov3', dict(img_size=32, global_pool='token'))}

def build(kind, seed=0, **kwargs):
    arch,kw = archs[kind]
    enc = create_encoder(arch, **merge(tiny, kw, kwargs)).eval()
    torch.manual_seed(seed)
    for p in enc.parameters(): p.data = torch.randn_like(p)*.2
    return enc

def close(a, b, eps):
    assert a.shape==b.shape and (a-b).abs().max()<=eps, (a.shape, b.shape, (a-b).abs().max().item())

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def published(enc):
    "The tensors of an encoder as Meta's own code names them"
    sd,res = {k:v.clone() for k,v in enc.state_dict().items()},dict(mask_token=torch.zeros(1,48))
    if isinstance(enc, timm.models.Eva):
        renames = [('reg_token','storage_tokens'), ('gamma_1','ls1.gamma'), ('gamma_2','ls2.gamma'), ('mlp.fc1_g','mlp.w1'), ('mlp.fc1_x','mlp.w2')]
        if any('fc1_g' in k for k in sd): renames.append(('mlp.fc2','mlp.w3'))
        for i in range(2):
            q,v = (sd.pop(f'blocks.{i}.attn.{o}_bias', torch.zeros(48)) for o in 'qv')
            res |= {f'blocks.{i}.attn.qkv.bias': torch.cat([q, torch.randn(48), v]), f'blocks.{i}.attn.qkv.bias_mask': torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])}
        res |= {'rope_embed.periods': torch.ones(4), 'local_cls_norm.weight': torch.ones(48)}
    else:
        renames = [('mlp.fc1','mlp.w12'), ('mlp.fc2','mlp.w3')] if isinstance(enc.blocks[0].mlp, timm.layers.GluMlp) else []
        if enc.reg_token is not None:
            at,pos = torch.randn(1,1,48),sd.pop('pos_embed')
            res |= dict(register_tokens=sd.pop('reg_token'), cls_token=sd.pop('cls_token')-at, pos_embed=torch.cat([at,pos], 1))
    for k,v in sd.items():
        for a,b in renames: k = k.replace(a, b)
        res[k] = v
    return res

@pytest.mark.parametrize('kind', archs)
def test_files_of_meta(kind, tmp_path):
    enc,new = build(kind),build(kind, 1)
    torch.save(published(enc), tmp_path/'a.pth')
    assert load_dino_weights(new, tmp_path/'a.pth')==len(enc.state_dict())
    for k,v in new.state_dict().items(): close(v, enc.state_dict()[k], 1e-6)
    # a checkpoint of DINOv2's training: blocks in chunks, a head beside the backbone; into a DINOModel
    chunks = {re.sub(r'^blocks\.(\d)', r'blocks.0.\1', k):v for k,v in published(enc).items()}
    torch.save(dict(teacher={f'backbone.{k}':v for k,v in chunks.items()}|{'dino_head.mlp.0.weight': torch.ones(2,2)}), tmp_path/'b.pth')
    new = build(kind, 1)
    assert load_dino_weights(new, tmp_path/'b.pth')==len(enc.state_dict())
    model = create_dino_model(build(kind, 1), 8, hidden_dim=8, bottleneck_dim=4, size=32 if 'dinov3' in kind else 28)
    assert load_dino_weights(model, tmp_path/'a.pth')==2*len(enc.state_dict())
    assert {tuple(o.state_dict()) for o in (encoder_of(model),encoder_of(model,'student'))}=={tuple(enc.state_dict())}

@pytest.mark.parametrize('kind', archs)
def test_transformers_reads_what_is_written(kind, tmp_path, capsys):
    enc = build(kind)
    to_transformers(enc, tmp_path)
    said = capsys.readouterr().out
    name = re.search(r'transformers\.(\w+)\.', said)[1]
    hf,info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert [len(info[k]) for k in ('missing_keys','unexpected_keys','mismatched_keys')]==[0,0,0]
    side = 32 if 'dinov3' in kind else 28
    for hw in ((side,side),)+(((32,64),) if 'dinov3' in kind else ()):                     # rotary positions are made for each size
        x = torch.randn(2,3,*hw)
        with torch.no_grad():
            out = hf.eval()(x).last_hidden_state
            close(out, enc.forward_features(x), 1e-4)
            close(out[:,0] if '[:,0]' in said else out[:,5:].mean(1), enc(x), 1e-4)
    assert ('[:,5:].mean(1)' in said)==(image_feature(enc)=='mean of patches')
    new = build(kind, 1)                                                                   # and back
    assert load_dino_weights(new, tmp_path/'model.safetensors')==len(enc.state_dict())
    for k,v in new.state_dict().items(): close(v, enc.state_dict()[k], 1e-6)
    assert norm_stats(new)[0].tolist()==pytest.approx(list(imagenet_stats[0]))

common = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
models = {'dinov2':          ('Dinov2', dict(image_size=28, patch_size=14)),
          'dinov2 giant':    ('Dinov2', dict(image_size=28, patch_size=14, use_swiglu_ffn=True)),
          'registers':       ('Dinov2WithRegisters', dict(image_size=28, patch_size=14, num_register_tokens=4)),
          'registers giant': ('Dinov2WithRegisters', dict(image_size=28, patch_size=14, num_register_tokens=4, use_swiglu_ffn=True)),
          'dinov3 biases':   ('DINOv3ViT', dict(image_size=32, intermediate_size=192, num_register_tokens=4)),
          'dinov3 plus':     ('DINOv3ViT', dict(image_size=32, intermediate_size=192, num_register_tokens=4, use_gated_mlp=True, hidden_act='silu')),
          'dinov3':          ('DINOv3ViT', dict(image_size=32, intermediate_size=192, num_register_tokens=4, query_bias=False, value_bias=False))}

@pytest.mark.parametrize('kind', models)
def test_what_transformers_writes_is_read(kind, tmp_path):
    name,kw = models[kind]
    hf = getattr(transformers, f'{name}Model')(getattr(transformers, f'{name}Config')(**common, **kw)).eval()
    torch.manual_seed(0)
    for p in hf.parameters(): p.data = torch.randn_like(p)*.2
    hf.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path/'memory.pth')                                     # other names than in the file
    torch.save({f'{name.lower()}.{k}':v for k,v in hf.state_dict().items()}|{'classifier.weight': torch.ones(3,96)}, tmp_path/'classifier.pth')
    x = torch.randn(2,3,kw['image_size'],kw['image_size'])
    for f in ('model.safetensors','memory.pth')+(('classifier.pth',) if name=='Dinov2' else ()):
        enc = build(kind, 1, **(dict(mlp_ratio=128*2/48) if 'giant' in kind else {}))
        assert load_dino_weights(enc, tmp_path/f)==len(enc.state_dict())
        with torch.no_grad(): close(enc.forward_features(x), hf(x).last_hidden_state, 1e-4)

def test_a_file_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path/'a.pth'
    def refused(kind, says, **kwargs):
        new = build(kind, 1, **kwargs)
        before = deepcopy(new)
        with pytest.raises(ValueError, match=says): load_dino_weights(new, file)
        assert same(before, new)
    enc = build('registers')
    torch.save(published(enc), file)
    refused('registers', 'pass resample=True', img_size=56)                                # timm would resample unasked
    big = build('registers', 1, img_size=56)
    load_dino_weights(big, file, resample=True)
    close(big.pos_embed, resample_pos_embed(enc.pos_embed, (4,4), 0), 1e-6)
    refused('registers', 'patch_size=14', patch_size=7, img_size=14)
    refused('registers', 'another architecture', depth=1)
    refused('dinov2', 'another architecture')
    refused('dinov3', 'Nothing was loaded')
    torch.save(published(build('dinov3 biases')), file)
    refused('dinov3', 'biases of queries and values')                                      # timm would leave them out
    torch.save({k:v for k,v in published(build('dinov3')).items() if 'ls1' not in k}, file)
    refused('dinov3', '2 missing')

def test_registers_without_layer_scale(tmp_path):
    "Kinds of encoders that no published model has, but transformers can hold"
    for kw in (dict(reg_tokens=2), dict(reg_tokens=2, no_embed_class=True), dict(init_values=1.), dict(no_embed_class=True), dict(mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=5.5, act_layer=nn.SiLU)):
        enc = create_encoder('vit_mini_patch4_16', **kw).eval()
        for p in enc.parameters(): p.data = torch.randn_like(p)*.2
        to_transformers(enc, tmp_path/'a', verbose=False)
        hf = transformers.AutoModel.from_pretrained(tmp_path/'a').eval()
        x = torch.randn(2,3,16,16)
        with torch.no_grad(): close(hf(x).last_hidden_state, enc.forward_features(x), 1e-4)
    with pytest.raises(ValueError, match='an MLP of 160 units'): to_transformers(create_encoder('vit_mini_patch4_16', **kw|dict(mlp_ratio=5)), tmp_path/'b')

def test_families_are_read_by_timms_own_conversion(tmp_path):
    "ConvNeXt as its authors name it, beside a network whose names are timm's already"
    enc,new = (create_encoder('convnext_atto', depths=(1,1,1,1), dims=(8,8,8,8)) for _ in range(2))
    fb = {}
    for k,v in enc.state_dict().items():
        k = re.sub(r'stages\.(\d)\.blocks\.(\d)', r'stages.\1.\2', k).replace('conv_dw','dwconv').replace('mlp.fc1','pwconv1').replace('mlp.fc2','pwconv2')
        k = re.sub(r'stages\.(\d)\.downsample\.(\d)', r'downsample_layers.\1.\2', k).replace('stem.','downsample_layers.0.').replace('head.norm','norm')
        fb[k] = v[:,:,0,0] if 'pwconv' in k and v.ndim==4 else v
    torch.save(fb, tmp_path/'a.pth')
    assert load_dino_weights(new, tmp_path/'a.pth')==len(enc.state_dict()) and same(enc, new)

@pytest.mark.slow
def test_the_printed_line_works_as_printed(tmp_path, capsys):
    enc,x = create_encoder('vit_mini_patch4_16').eval(),torch.randn(2,3,16,16)
    export_encoder(enc, tmp_path/'a.safetensors')
    line = capsys.readouterr().out.strip().replace('timm.create_model', 'm = timm.create_model')
    torch.save(x, tmp_path/'x.pth')
    code = f"import timm, torch; {line}; torch.save(m.eval()(torch.load('x.pth')).detach(), 'y.pth')"
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    with torch.no_grad(): close(torch.load(tmp_path/'y.pth'), enc(x), 1e-5)
