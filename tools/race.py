"""Accuracy after equal processor time: this library, lightly's DINO, and training with labels, on the same network and images

    python tools/race.py cifar10 --minutes 5 --seeds 0,1,2        # needs `pip install lightly`

Rows are appended to nbs/experiments/runs/NAME_race/runs.jsonl as by tools/real.py, which finds and splits the images. Each contestant
trains for as many epochs as fit into the minutes, counted over all threads, with its own defaults and schedules over these epochs.
lightly's settings are those of its example for DINO (https://docs.lightly.ai/self-supervised-learning/examples/dino.html): head 512-64-2048,
Adam with 1e-3, momentum .996 to 1, six local crops; the sizes of the crops are in the ratio of its defaults.
"""
import json, time
from copy import deepcopy
from pathlib import Path
import torch
from fastai.data.load import DataLoader
from fastcore.script import call_parse
from torch import nn
from self_supervised.all import (ablate, ablation_table, baselines, create_encoder, labelled_dls, measure, open_rgb,
                                 probe_view, read_runs, set_encoder_stats, small_image_options, stratified_split, to_plain)
from fastai.vision.all import imagenet_stats, set_seed
from real import ROOT, find_data, split

def epochs_for(minutes, batches, step, n=10):
    "Epochs that fit into the minutes, from the time of some steps after the first"
    step()
    start = time.process_time()
    for _ in range(n): step()
    return max(1, int(60*minutes*n/(time.process_time()-start)/batches))

class Repeat:
    "The batches of a loader, one after another, over the ends of epochs"
    def __init__(self, dl): self.dl,self.it = dl,iter(())
    def __call__(self):
        try: return next(self.it)
        except StopIteration:
            self.it = iter(self.dl)
            return next(self.it)

def lightly_dino(arch, labelled, size, bs, minutes, seed):
    "lightly's example; returns the teacher's encoder and the number of epochs"
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.dino_transform import DINOTransform
    from lightly.utils.scheduler import cosine_schedule
    files,views = list(labelled.train_ds.items),DINOTransform(size, local_crop_size=round(size*96/224))
    class Views:
        def __len__(self): return len(files)
        def __getitem__(self, i): return tuple(views(open_rgb(files[i])))
    dl = DataLoader(Views(), bs=bs, shuffle=True, drop_last=True, num_workers=0)
    def make():
        set_seed(seed)
        enc  = create_encoder(arch, **small_image_options(arch, size))
        head = DINOProjectionHead(enc.num_features, 512, 64, 2048, freeze_last_layer=1)
        student,teacher = nn.Sequential(enc, head),nn.Sequential(deepcopy(enc), DINOProjectionHead(enc.num_features, 512, 64, 2048))
        deactivate_requires_grad(teacher)
        return student,teacher,DINOLoss(2048, warmup_teacher_temp_epochs=5),torch.optim.Adam(student.parameters(), lr=1e-3)
    def step(views, parts, momentum, epoch):
        student,teacher,loss_func,opt = parts
        update_momentum(student, teacher, momentum)
        loss = loss_func([teacher(v) for v in views[:2]], [student(v) for v in views], epoch=epoch)
        loss.backward()
        student[1].cancel_last_layer_gradients(current_epoch=epoch)
        opt.step()
        opt.zero_grad()
    parts,batches = make(),Repeat(dl)
    n     = epochs_for(minutes, len(dl), lambda: step(batches(), parts, .996, 0))
    parts = make()
    for epoch in range(n):
        for b in dl: step(b, parts, cosine_schedule(epoch, n, .996, 1), epoch)
    return dict(teacher=parts[1][0], student=parts[0][0]),n

def supervised(arch, labelled, size, bs, minutes, seed, fraction=1.):
    "Training with the labels of a fraction of the images: crops and flips, AdamW and one cycle; returns the encoder and the number of epochs"
    x,y  = (torch.cat(o) for o in zip(*[(x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)) for x,y in
                                       labelled.train.new(shuffle=False, drop_last=False)]))
    if fraction<1:
        idxs = stratified_split(y, 1-fraction, seed)[0]
        x,y  = x[idxs],y[idxs]
    bs,view,loss_func = min(bs, len(x)//2),probe_view(size),nn.CrossEntropyLoss()
    mean,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    def make():
        set_seed(seed)
        enc   = create_encoder(arch, **small_image_options(arch, size)).to(memory_format=torch.channels_last)
        return nn.Sequential(enc, nn.Linear(enc.num_features, int(y.max())+1))
    def step(model, opt, idxs, sched=None):
        with torch.autocast('cpu', torch.bfloat16): out = model((view(x[idxs])-mean)/std)
        loss_func(out.float(), y[idxs]).backward()
        opt.step()
        opt.zero_grad()
        if sched: sched.step()
    batches = len(x)//bs
    model   = make()
    opt     = torch.optim.AdamW(model.parameters())
    n       = epochs_for(minutes, batches, lambda: step(model, opt, torch.randperm(len(x))[:bs]))
    model   = make()
    opt     = torch.optim.AdamW(model.parameters(), weight_decay=.05)
    sched   = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=n*batches)
    for _ in range(n):
        for idxs in torch.randperm(len(x)).split(bs)[:batches]: step(model, opt, idxs, sched)
    return dict(teacher=model[0]),n

contestants = {'DINO of lightly': lightly_dino, 'labels of all images': supervised,
               'labels of 10% of the images': lambda *args: supervised(*args, fraction=.1)}

@call_parse
def main(
    name:str, # Data: cifar10, flowers, or a folder with train/ and test/
    minutes:float=5., # Processor time of each run
    images:int=5000, # Training images; 0 for all
    size:int=32, # Image size in pixels
    arch:str='convnet_mini', # timm model name
    bs:int=64, # Batch size
    out:Path=None, # Folder of the results (default: nbs/experiments/runs/NAME_race)
    data:Path=ROOT/'data', # Folder of the unpacked images, or of their archives
    seeds:str='0,1,2' # Random seeds
):
    "Train each contestant for the same processor time, and measure all on the test images"
    torch.set_num_threads(1)
    folder,out = split(find_data(name, data), images, 'test'),out or ROOT/'nbs'/'experiments'/'runs'/f'{name}_race'
    about  = dict(data=name, holdout='test', images=images, size=size)
    bf16   = dict(precision='bf16')
    ours   = baselines | {'LeJEPA': dict(method='lejepa') | bf16, 'DINO': dict(method='dino') | bf16}
    seeds  = [int(o) for o in seeds.split(',')]
    ablate(out, ours, seeds, folder, 'test', arch, bs=bs, progress=False, size=size, minutes=minutes, about=about)
    labelled = labelled_dls(folder, size, bs, crop_pct=1, num_workers=0, device='cpu')
    for variant,train in contestants.items():
        for seed in seeds:
            done = read_runs(out)
            if ((done.variant==variant) & (done.seed==seed)).any(): continue
            start,cpu = time.time(),time.process_time()
            encs,n = train(arch, labelled, size, bs, minutes, seed)
            row = about | dict(arch=arch, bs=bs, minutes=minutes, variant=variant, seed=seed, settings={}, trained_epochs=n,
                               seconds=time.time()-start, cpu_seconds=time.process_time()-cpu)
            for who,enc in encs.items():
                set_encoder_stats(enc, *imagenet_stats)
                row |= {('' if who=='teacher' else 'student ')+k:v for k,v in measure(enc.eval(), labelled).items()}
            with open(out/'runs.jsonl', 'a') as f: f.write(json.dumps(to_plain(row, other=str))+'\n')
    print(ablation_table(read_runs(out), best=True).to_string())
