"Small models and data that several tests share"
from fastai.vision.all import *
from self_supervised.vision.dino import *

def mlp_model(n_in=12, nf=6, K=7, seed=0, **kwargs):
    "Student and teacher without BatchNorm: every row by itself"
    torch.manual_seed(seed)
    enc  = nn.Sequential(nn.Flatten(), nn.Linear(n_in, nf), nn.GELU())
    head = DINOHead(nf, K, hidden_dim=8, bottleneck_dim=5, **kwargs)
    return DINOModel(nn.Sequential(MultiCropWrapper(enc), head))

class FixedViews(list):
    "Two large views and a small one of images (bs,3,2,2), without chance"
    def __init__(self): super().__init__([lambda x: x, lambda x: x.flip(-1)*.9, lambda x: x.roll(1,1)+.05])

class Rows:
    n_inp = 1
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return (self.x[i],)

def row_dls(n=16, bs=4, n_valid=4, shuffle=False, seed=0, shape=(3,2,2)):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n+n_valid, *shape, generator=g, dtype=torch.float64).to(torch.get_default_dtype())
    return DataLoaders(DataLoader(Rows(x[:n]), bs=bs, shuffle=shuffle, drop_last=True), DataLoader(Rows(x[n:]), bs=bs), device='cpu')

def state(m): return {k:v.detach().clone() for k,v in m.state_dict().items()}

def changed(m, before): return sorted(k for k,v in m.state_dict().items() if not torch.equal(v, before[k]))

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn

def digits_learner(seed=0, n_train=None, arch='convnet_mini', path=None, holdout=None, **kwargs):
    "A real learner on (some of) the digits"
    set_seed(seed)
    dls = digits_dls(holdout=holdout)
    if n_train:
        for a in 'xy': setattr(dls.train_ds, a, getattr(dls.train_ds, a)[:n_train])
        dls.train.n = n_train
    if path: dls.path = Path(path)
    return dino_learner(dls, arch, get_digits_aug_pipelines((2,2)), **kwargs)
