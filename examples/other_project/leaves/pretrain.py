"""Pretrain `LeafNet` in a plain fastai `Learner`; the callback `DINO` is from self_supervised.

    python -m leaves.pretrain SCANS leaf.pth
"""
import sys
from fastai.vision.all import *
from self_supervised.vision.dino import DINO, DINOHead, DINOModel, MultiCropWrapper, get_dino_aug_pipelines

STATS = [.5],[.25]                                               # mean and std for normalisation

class LeafNet(nn.Sequential):
    "A small convnet for grey images of any size that returns (bs,64) features"
    def __init__(self):
        widths = [1,16,32,64]
        super().__init__(*[ConvLayer(i, o, stride=2) for i,o in zip(widths, widths[1:])], nn.AdaptiveAvgPool2d(1), nn.Flatten())

def scans(folder, size=16, bs=32):
    "Create DataLoaders of grey images in [0,1], without labels"
    block = DataBlock(ImageBlock(PILImageBW), get_items=get_image_files, splitter=RandomSplitter(.1, seed=0), item_tfms=Resize(size))
    return block.dataloaders(folder, bs=bs, num_workers=0)

def pretrain(folder, file, epochs=2, lr=2e-3):
    "Train a `LeafNet` on the images in `folder`, write its weights to `file`, and return the learner"
    student = nn.Sequential(MultiCropWrapper(LeafNet()), DINOHead(64, 256, use_bn=True, hidden_dim=256, bottleneck_dim=64))
    views   = get_dino_aug_pipelines((2,2), (16,8), n_in=1, stats=STATS)
    learn   = Learner(scans(folder), DINOModel(student), loss_func=noop, opt_func=ranger, cbs=DINO(views, tmom_start=.98))
    learn.fit_one_cycle(epochs, lr)
    torch.save(learn.model.teacher[0].encoder.state_dict(), file)
    return learn

if __name__ == '__main__': pretrain(*sys.argv[1:])
