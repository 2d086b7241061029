"""Train and measure variants on real photographs: CIFAR-10 and Oxford flowers, or any folder of class folders

    python tools/real.py cifar10 methods --images 5000 --epochs 10 --seeds 0 1 2 --holdout valid
    python tools/real.py flowers methods --size 64 --minutes 10

Each run appends a row to nbs/experiments/runs/NAME/runs.jsonl; runs that are there already are skipped, so the same command continues.
`--holdout valid` splits the training images: settings are chosen there, and the test images are used for reported results only.
"""
import random, shutil, tarfile, tempfile
from pathlib import Path
from fastcore.script import call_parse
from self_supervised.all import KoLeo, ablate, ablation_table, baselines

ROOT = Path(__file__).parents[1]

# folder below the data folder, archive in it, and where to get the images
DATA = dict(
    cifar10 = ('cifar10', 'cifar10.tar.xz', 'https://www.cs.toronto.edu/~kriz/cifar.html'),
    flowers = ('flowers', 'flowers.tar.xz', 'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/'))

mini   = dict(arch='resnet18', channels=(32,64,128,256), layers=(1,1,1,1))                   # 1.2 million parameters
lejepa = dict(method='lejepa')
dino   = dict(method='dino')

EXPERIMENTS = dict(
    methods  = baselines | {'DINO': dino, 'LeJEPA': lejepa},
    others   = {'SimDINO': dict(method='simdino'), 'SimCLR': dict(method='simclr'), 'BYOL': dict(method='byol'),
                'Barlow Twins': dict(method='barlowtwins'), 'SwAV': dict(method='swav'), 'MoCo': dict(method='moco')},
    dino     = {'DINO': dino, 'batch 32': dino | dict(bs=32), 'learning rate x 2': dino | dict(lr=2e-2), 'with KoLeo': dino | dict(parts=[KoLeo()]),
                'teacher temperature .02': dino | dict(tpt_start=.02, tpt_end=.02), 'K=64': dino | dict(out_dim=64),
                'Sinkhorn-Knopp': dino | dict(target='sinkhorn'), 'with predictor': dino | dict(predictor=True),
                'two layers in the head': dino | dict(nlayers=2), '2 local crops': dino | dict(num_crops=(2,2)),
                'head 2048 wide, K=1024': dino | dict(hidden_dim=2048, out_dim=1024)},
    lejepa   = {'LeJEPA': lejepa, 'learning rate / 2': lejepa | dict(lr=1e-2), 'learning rate x 2': lejepa | dict(lr=4e-2),
                'batch 32': lejepa | dict(bs=32), '4 local crops': lejepa | dict(num_crops=(2,4)),
                'projector 512 wide': lejepa | dict(hidden_dim=512), 'batch 128': lejepa | dict(bs=128)},
    hour     = {'convnet_mini, twice as wide': lejepa | dict(nf=(64,128,256))},
    backbone = {'small ResNet': lejepa | mini, 'small ResNet, learning rate x 5': lejepa | mini | dict(lr=2e-2),
                'small ResNet, stem of timm': lejepa | mini | dict(small_images=False),
                'small ResNet, DINO': dino | mini})

def find_data(
    name:str, # 'cifar10', 'flowers', or a folder
    data:Path # Folder of the unpacked images or of the archives
)->Path: # Folder with train/CLASS/*.jpg and test/CLASS/*.jpg
    "Find a data set, and unpack its archive into a temporary folder if it is there"
    if name not in DATA:
        if (Path(name)/'train').is_dir(): return Path(name)
        raise SystemExit(f"{name}: pass {', '.join(DATA)}, or a folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    folder,archive,url = DATA[name]
    for root in (data, Path(tempfile.gettempdir())/'self_supervised_data'):
        if (root/folder/'test').is_dir(): return root/folder
    if not (data/archive).is_file():
        raise SystemExit(f"{data} has neither {folder}/ nor {archive}: download the images from {url}, and arrange them as "
                         f"{folder}/train/CLASS/*.jpg and {folder}/test/CLASS/*.jpg, or pass another --data")
    with tarfile.open(data/archive) as f: f.extractall(root, filter='data')
    return root/folder

def split(
    source:Path, # Folder with train/ and test/
    images:int, # Training images; 0 for all
    holdout:str # 'valid' or 'test'
)->Path: # Folder of links with train/ and test/, the same images for the same arguments
    "Link a part of the training images, an equal share of each class, and the images to measure on"
    out = Path(tempfile.gettempdir())/'self_supervised_data'/f'{source.name}_{images or "all"}_{holdout}'
    if out.is_dir(): return out
    tmp,rng = Path(tempfile.mkdtemp(dir=out.parent if out.parent.is_dir() else None)),random.Random(0)
    classes = sorted(o for o in (source/'train').iterdir() if o.is_dir())
    for c in classes:
        files = sorted(c.iterdir())
        rng.shuffle(files)
        n     = round(images/len(classes)) if images else len(files)
        valid = files[:max(1, len(files)//5)]
        test,train = (valid,files[len(valid):][:n]) if holdout=='valid' else (sorted((source/'test'/c.name).iterdir()),files[:n])
        for part,fs in dict(train=train, test=test).items():
            (tmp/part/c.name).mkdir(parents=True)
            for f in fs: (tmp/part/c.name/f.name).symlink_to(f.resolve())
    out.parent.mkdir(exist_ok=True)
    try: tmp.rename(out)
    except OSError: shutil.rmtree(tmp)                           # another run was faster
    return out

@call_parse
def main(
    name:str, # Data: cifar10, flowers, or a folder with train/ and test/
    experiment:str, # One of EXPERIMENTS
    images:int=5000, # Training images; 0 for all
    size:int=32, # Image size in pixels
    arch:str='convnet_mini', # timm model name
    epochs:int=10, # Epochs of each run
    minutes:float=None, # Minutes of CPU time of each run, instead of --epochs
    bs:int=64, # Batch size
    holdout:str='valid', # valid to choose settings, test to report results
    out:str=None, # Folder of the results (default: nbs/experiments/runs/NAME_EXPERIMENT)
    data:Path=ROOT/'data', # Folder of the unpacked images, or of their archives
    precision:str='bf16', # Precision of the training
    threads:int=1, # CPU threads
    seeds:str='0,1,2' # Random seeds
):
    "Train and measure the variants of an experiment"
    import torch
    torch.set_num_threads(threads)
    if experiment not in EXPERIMENTS: raise SystemExit(f"{experiment}: pass one of {', '.join(EXPERIMENTS)}")
    folder = split(find_data(name, data), images, holdout)
    out    = out or ROOT/'nbs'/'experiments'/'runs'/f'{name}_{experiment}'
    about  = dict(data=name, holdout=holdout, images=images, size=size, precision=precision)
    chosen = {k: v if v in baselines.values() else v | dict(precision=precision) for k,v in EXPERIMENTS[experiment].items()}
    runs   = ablate(out, chosen, [int(o) for o in seeds.split(',')], folder, 'test', arch, epochs, bs,
                    progress=False, size=size, minutes=minutes, about=about)
    print(ablation_table(runs, best=True).to_string())
