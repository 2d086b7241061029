"""DINO written out plainly, as the paper's own code does it: explicit attention; loops over the pairs of views and over the parameters

Names of parameters are those of timm and of the library, so that both start from the same weights, and positions for other sizes are
resampled as timm does, antialiased and in float32. Nothing here is tuned.
"""
import random
import torch, torch.nn.functional as F
from torch import nn
from PIL import Image, ImageFilter, ImageOps

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads,self.qkv,self.proj = heads,nn.Linear(dim, 3*dim),nn.Linear(dim, dim)
    def forward(self, x):
        b,n,d = x.shape
        q,k,v = self.qkv(x).reshape(b, n, 3, self.heads, d//self.heads).permute(2,0,3,1,4)
        a = (q@k.transpose(-2,-1)*(d//self.heads)**-.5).softmax(-1)
        return self.proj((a@v).transpose(1,2).reshape(b,n,d))

class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1,self.fc2 = nn.Linear(dim, hidden),nn.Linear(hidden, dim)
    def forward(self, x): return self.fc2(F.gelu(self.fc1(x)))

class Block(nn.Module):
    def __init__(self, dim, heads, hidden, drop):
        super().__init__()
        self.norm1,self.attn,self.drop = nn.LayerNorm(dim, eps=1e-6),Attention(dim, heads),drop
        self.norm2,self.mlp = nn.LayerNorm(dim, eps=1e-6),MLP(dim, hidden)
    def drop_path(self, x):
        if not (self.drop and self.training): return x
        return x/(1-self.drop)*(torch.rand(len(x),1,1, device=x.device, dtype=x.dtype)+1-self.drop).floor()
    def forward(self, x):
        x = x+self.drop_path(self.attn(self.norm1(x)))
        return x+self.drop_path(self.mlp(self.norm2(x)))

class ViT(nn.Module):
    "A vision transformer of the shape of one of timm's"
    def __init__(self, like, drop_path=0.):
        super().__init__()
        dim,depth,block = like.embed_dim,len(like.blocks),like.blocks[0]
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, like.patch_embed.patch_size, like.patch_embed.patch_size)))
        self.cls_token,self.pos_embed = nn.Parameter(torch.zeros_like(like.cls_token)),nn.Parameter(torch.zeros_like(like.pos_embed))
        self.blocks = nn.ModuleList(Block(dim, block.attn.num_heads, block.mlp.fc1.out_features, drop_path*i/max(1,depth-1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
    def positions(self, h, w):
        cls,grid = self.pos_embed[:,:1],self.pos_embed[:,1:]
        side = int(grid.shape[1]**.5)
        if (h,w)==(side,side): return self.pos_embed
        grid = F.interpolate(grid.float().unflatten(1,(side,side)).permute(0,3,1,2), size=(h,w), mode='bicubic', antialias=True)
        return torch.cat([cls, grid.flatten(2).transpose(1,2).to(cls.dtype)], 1)
    def forward(self, x):
        x = self.patch_embed['proj'](x)
        pos = self.positions(*x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x),-1,-1), x.flatten(2).transpose(1,2)], 1)+pos
        for b in self.blocks: x = b(x)
        return self.norm(x)[:,0]

class Head(nn.Module):
    "Three layers, unit length, prototypes with a weight norm"
    def __init__(self, like):
        super().__init__()
        self.mlp = nn.Sequential(*(nn.Linear(o.in_features, o.out_features) if isinstance(o, nn.Linear) else nn.GELU() for o in like.mlp))
        self.last_layer = nn.ParameterDict({k: nn.Parameter(torch.zeros_like(p), requires_grad=p.requires_grad) for k,p in like.last_layer.named_parameters()})
    def forward(self, x): return F.linear(F.normalize(self.mlp(x), dim=-1), torch._weight_norm(self.last_layer['weight_v'], self.last_layer['weight_g'], 0))

class Net(nn.Module):
    "Encoder and head for a list of views, neighbours of one size together"
    def __init__(self, like, drop_path=0.):
        super().__init__()
        self.encoder,self.head = ViT(like[0].encoder, drop_path),Head(like[1])
        for mine,theirs in ((self.encoder,like[0].encoder),(self.head,like[1])):
            mine.load_state_dict({k:v for k,v in theirs.state_dict().items() if k not in ('mean','std')})
    def forward(self, views):
        feats,start = [],0
        for i in range(1, len(views)+1):
            if i==len(views) or views[i].shape[-1]!=views[start].shape[-1]:
                feats.append(self.encoder(torch.cat(views[start:i])))
                start = i
        return self.head(torch.cat(feats))

def pair_loss(student, teacher, center, n_crops, tps=.1, tpt=.04):
    "Cross-entropy of every pair of a global view of the teacher and another view of the student"
    student = (student/tps).chunk(n_crops)
    teacher = F.softmax((teacher-center)/tpt, dim=-1).detach().chunk(2)
    loss,pairs = 0.,0
    for i,t in enumerate(teacher):
        for j,s in enumerate(student):
            if i==j: continue
            loss += torch.sum(-t*F.log_softmax(s, dim=-1), dim=-1).mean()
            pairs += 1
    return loss/pairs

@torch.no_grad()
def move_center(center, teacher, mom=.9): return center*mom + teacher.sum(0, keepdim=True)/len(teacher)*(1-mom)

def clip(params, max_norm):
    for p in params:
        if p.grad is None: continue
        coef = max_norm/(p.grad.norm(2)+1e-6)
        if coef<1: p.grad.mul_(coef)

@torch.no_grad()
def ema(student, teacher, mom):
    for s,t in zip(student.parameters(), teacher.parameters()): t.mul_(mom).add_((1-mom)*s.detach())

def adamw(model, lr, wd):
    "torch's AdamW as it comes, without decay for biases and norms"
    ps = [(n,p) for n,p in model.named_parameters() if p.requires_grad]
    group = lambda bare,wd: dict(params=[p for n,p in ps if (n.endswith('.bias') or p.ndim==1)==bare], weight_decay=wd)
    return torch.optim.AdamW([group(False, wd), group(True, 0.)], lr=lr)

class Step:
    "One iteration of the paper's loop, from views to the moved teacher"
    def __init__(self, model, precision='fp32', lr=1e-4, wd=.04, mom=.996, max_norm=3., drop_path=0.):
        dev = model.C.device
        self.student,self.teacher = Net(model.student, drop_path).to(dev),Net(model.teacher).to(dev).requires_grad_(False)
        self.center,self.opt = torch.zeros_like(model.C),adamw(self.student, lr, wd)
        self.dev,self.precision,self.mom,self.max_norm = dev,precision,mom,max_norm
    def __call__(self, views):
        with torch.autocast(self.dev.type, torch.bfloat16, enabled=self.precision=='bf16'):
            teacher = self.teacher(views[:2])
            student = self.student(views)
            loss = pair_loss(student, teacher, self.center, len(views))
            self.center = move_center(self.center, teacher)
        if not torch.isfinite(loss): raise ValueError(f"loss is {loss.item()}")
        self.opt.zero_grad()
        loss.backward()
        clip(self.student.parameters(), self.max_norm)
        self.opt.step()
        ema(self.student, self.teacher, self.mom)
        return loss.detach()

class PILViews:
    "The paper's views of an image, one after the other with Pillow, through torchvision's transforms"
    def __init__(self, n_small=8, sizes=(224,96), scales=((.4,1.),(.05,.4))):
        from torchvision import transforms as T
        blur  = lambda p: T.RandomApply([T.Lambda(lambda im: im.filter(ImageFilter.GaussianBlur(random.uniform(.1,2.))))], p)
        crop  = lambda i: T.RandomResizedCrop(sizes[i], scales[i], interpolation=Image.BICUBIC)
        solar = T.RandomApply([T.Lambda(ImageOps.solarize)], .2)
        colour = [T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(.4,.4,.2,.1)], .8), T.RandomGrayscale(.2)]
        done  = [T.ToTensor(), T.Normalize((.485,.456,.406), (.229,.224,.225))]
        self.makers  = [T.Compose([crop(i), *colour, *last, *done]) for i,last in ((0,[blur(1.)]),(0,[blur(.1),solar]))]
        self.makers += [T.Compose([crop(1), *colour, blur(.5), *done])]*n_small
    def __call__(self, im): return [make(im) for make in self.makers]

def knn(train, train_y, test, k, T, n_classes):
    "Votes of the k nearest, weighted by exp(similarity/T), with a one-hot row for every neighbour"
    train,test = F.normalize(train, dim=1),F.normalize(test, dim=1)
    outs = []
    for rows in test.split(max(1, len(test)//100)):
        sim,ids = (rows@train.T).topk(k)
        votes = F.one_hot(train_y[ids], n_classes)*(sim/T).exp().unsqueeze(-1)
        outs.append(votes.sum(1))
    return torch.cat(outs)
