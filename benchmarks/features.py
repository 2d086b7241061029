"""Features of images by an encoder, without gradients, from batches of bytes on the CPU

    python -m benchmarks.features --device cuda

Compared with a loop over timm's encoder: bytes to floats, normalisation, forward pass, features to the CPU.
"""
import timm, torch
from self_supervised.features import extract_features
from .race import main, on_gpu, race, rows_of, same

def rows(
    arch:str='vit_tiny_patch16_224', # timm's name of the encoder
    n_images:int=32, # Images
    bs:int=16, # Images in a batch
    size:int=224, # Their side, in pixels
    precision:str='fp32', # Or bf16
    rounds:int=5, # Rounds
    device:str='cpu' # Where
):
    torch.manual_seed(0)
    net     = timm.create_model(arch, num_classes=0, img_size=size).to(device).eval()
    batches = list(torch.randint(0, 256, (n_images,3,size,size), dtype=torch.uint8).split(bs))
    if on_gpu(device): batches = [b.pin_memory() for b in batches]
    stats   = (.485,.456,.406),(.229,.224,.225)
    m,s     = (torch.tensor(o, device=device)[:,None,None] for o in stats)
    def theirs():
        feats = []
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision=='bf16'):
            for x in batches: feats.append(net((x.to(device, non_blocking=True)/255-m)/s).float().cpu())
        return torch.cat(feats)
    def ours(): return extract_features(net, batches, stats=stats, precision=precision)[0]
    with torch.no_grad(): diff = same("features", ours(), theirs(), 5e-2 if precision=='bf16' else 1e-4)
    secs = race(dict(ours=ours, plain=theirs), rounds, device, least=0)
    return rows_of(f"{n_images} images of {size} pixels, {arch}, batch {bs}, {precision}", secs, differs=dict(plain=diff), **{'images/s': lambda s: n_images/s})

rows.gpu = dict(arch='vit_small_patch16_224', n_images=2048, bs=256, precision='bf16')

if __name__=='__main__': main(rows, __doc__)
