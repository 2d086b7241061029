"""A user script that ends in `learn.fit`: all components of DINO are explicit. It trains on a folder of images, or on the built-in digits.

    python examples/script.py                                                                        # digits, a minute
    python examples/script.py --path IMAGES --arch vit_small_patch16_224 --size 256 --epochs 100     # any folder, any timm name

The run directory is `out`; `load_encoder('OUT/checkpoint.pth')` loads the encoder.
"""
from fastai.vision.all import *
from fastcore.script import call_parse
from self_supervised.all import *

@call_parse
def main(
    path:Path=None, # Folder of images, searched recursively; default: the built-in digits
    arch:str='convnet_mini', # timm model name
    size:int=256, # Image size in pixels (ignored for digits, which have 16)
    bs:int=64, # Batch size
    epochs:int=20, # Number of epochs
    out:Path='runs/script', # Run directory
    resume:bool=False, # Resume from the checkpoint in `out`
    seed:int=42 # Random seed
):
    "Pretrain a backbone with DINO"
    set_seed(seed)
    dls   = unlabelled_dls(path, size, bs, seed=seed) if path else digits_dls(bs=bs)
    enc   = create_encoder(arch, drop_path_rate=.1)
    d     = dino_defaults(len(dls.train_ds), bs, epochs, total_params(enc)[0])                         # settings for this data size
    model = create_dino_model(enc, d.out_dim, use_bn=d.use_bn, hidden_dim=d.hidden_dim, bottleneck_dim=d.bottleneck_dim)
    views = get_dino_aug_pipelines(**view_defaults(size, patch=patch_size(enc))) if path else get_digits_aug_pipelines((2,2))
    dino  = DINO(views, tmom_start=d.tmom_start, tpt_start=d.tpt_start, tpt_end=d.tpt_end, tpt_warmup_pct=d.tpt_warmup_pct)
    watch = [RankMeMonitor(), CollapseMonitor()] + ([] if path else [KNNMonitor(dls)])
    learn = Learner(dls, model, loss_func=noop, opt_func=dino_opt, splitter=dino_splitter, cbs=[dino,*watch])
    lr,n  = scaled_lr(d.lr, bs),len(dls.train)
    sched = ParamScheduler(dict(lr=lr_sched(lr, d.lr_min, n*epochs, round(n*d.warmup_epochs)), wd=wd_sched(*d.wd)))
    learn.fit(epochs, lr, cbs=[sched, RunCheckpoint(out, resume)])
