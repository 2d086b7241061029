"""Pretrain `LeafNet` with a training loop in plain PyTorch; the loss and the update of its centre are from self_supervised.

    python -m leaves.loop SCANS leaf.pth
"""
import sys
from copy import deepcopy
import torch
from torch import nn
from torchvision.transforms import v2
from leaves.pretrain import STATS, LeafNet, scans
from self_supervised.objectives import dino_loss, update_center

def view(size, scale):
    "Create a random crop, normalised; all images of a batch have the same crop box, as in torchvision"
    return v2.Compose([v2.RandomResizedCrop(size, scale, antialias=True), v2.ColorJitter(.4, .4), v2.Normalize(*STATS)])

def train(folder, file, epochs=2, lr=1e-3, K=256, momentum=.98):
    "Train a `LeafNet` on the images in `folder`, write its weights to `file`, and return the loss of each step"
    batches = scans(folder).train
    if not len(batches): raise ValueError(f"{folder} has too few scans for a batch")
    student = nn.Sequential(LeafNet(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, K)).to(batches.device)
    teacher = deepcopy(student).requires_grad_(False)
    opt     = torch.optim.AdamW(student.parameters(), lr, weight_decay=.04)
    views   = [view(16, (.5,1.))]*2 + [view(8, (.3,.7))]*2       # global crops first: the teacher receives them
    center,losses = torch.zeros(1, K, device=batches.device),[]
    for _ in range(epochs):
        for x, in batches:
            vs = [v(x.as_subclass(torch.Tensor)) for v in views]
            with torch.no_grad(): target = torch.cat([teacher(v) for v in vs[:2]])
            loss = dino_loss(torch.cat([student(v) for v in vs]), target, center)
            opt.zero_grad(); loss.backward(); opt.step()
            center = update_center(center, target.mean(0, keepdim=True))
            with torch.no_grad(): torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1-momentum)
            losses.append(loss.item())
    torch.save(teacher[0].cpu().state_dict(), file)
    return losses

if __name__ == '__main__': train(*sys.argv[1:])
