"""Other libraries that are compared where they are installed: lightly and NVIDIA DALI

lightly's DINO (https://github.com/lightly-ai/lightly) as its own example puts it together: `pip install -e '.[bench]'`. DALI's operators for the views: `pip install nvidia-dali-cuda120`; it needs a GPU, and was written without one.
"""
import sys
from copy import deepcopy
from functools import cache
import torch
from torch import nn
from .plain import adamw

@cache
def lightly():
    "The package, or None after a sentence that says why"
    try:
        import lightly.loss, lightly.models.modules, lightly.models.utils, lightly
        return lightly
    except ImportError as e:
        print(f"Without lightly ({e}): pip install -e '.[bench]' adds it to the table", file=sys.stderr)

@cache
def dali():
    "The package, or None after a sentence that says why"
    try:
        import nvidia.dali
        return nvidia.dali
    except ImportError as e:
        print(f"Without DALI ({e}): pip install nvidia-dali-cuda120 adds it to the table", file=sys.stderr)

def dali_views(images, args, stats, device):
    "The views of `images` (n,H,W,C) on the GPU by DALI; `args` has size, area, probability of blur and of solarisation for each view"
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import feed_ndarray
    level = [255*o for o in stats[0].tolist()],[255*o for o in stats[1].tolist()]
    @pipeline_def(batch_size=len(images), num_threads=4, device_id=torch.device(device).index or 0, enable_conditionals=True)
    def views():
        x,outs = fn.external_source(source=lambda: list(images), batch=True, layout='HWC').gpu(),[]
        for size,area,blur,solar in args:
            v = fn.random_resized_crop(x, size=size, random_area=area, interp_type=types.INTERP_CUBIC)
            v = fn.flip(v, horizontal=fn.random.coin_flip())
            if fn.random.coin_flip(probability=.8):
                v = fn.color_twist(v, brightness=fn.random.uniform(range=(.6,1.4)), contrast=fn.random.uniform(range=(.6,1.4)),
                                   saturation=fn.random.uniform(range=(.8,1.2)), hue=fn.random.uniform(range=(-36.,36.)))
            if fn.random.coin_flip(probability=.2):  v = fn.hsv(v, saturation=0.)
            if fn.random.coin_flip(probability=blur): v = fn.gaussian_blur(v, sigma=fn.random.uniform(range=(.1,2.)), window_size=13)
            if fn.random.coin_flip(probability=solar): v = types.Constant(255, dtype=types.UINT8)-v
            outs.append(fn.crop_mirror_normalize(v, dtype=types.FLOAT, output_layout='CHW', mean=level[0], std=level[1]))
        return tuple(outs)
    pipe = views()
    pipe.build()
    def run():
        made = []
        for o in pipe.run():
            t = o.as_tensor()
            made.append(torch.empty(t.shape(), dtype=torch.float32, device=device))
            feed_ndarray(t, made[-1], cuda_stream=torch.cuda.current_stream(device))
        return made
    return run

class LightlyStep:
    "One iteration of lightly's example: each view by itself through backbone and head"
    def __init__(self, model, precision='fp32', lr=1e-4, wd=.04, mom=.996, max_norm=3.):
        self.lib,self.dev = lightly(),model.C.device
        head = model.student[1]
        ins,outs = head.mlp[0].in_features,head.mlp[-1].out_features
        mine = self.lib.models.modules.DINOProjectionHead(ins, head.mlp[0].out_features, outs, head.out_dim).to(self.dev, model.C.dtype)
        with torch.no_grad():
            for p,q in zip((p for l in mine.layers if isinstance(l, nn.Linear) for p in l.parameters()), head.mlp.parameters(), strict=True): p.copy_(q)
            mine.last_layer.weight_v.copy_(head.last_layer.weight_v)
        again = self.lib.models.modules.DINOProjectionHead(ins, head.mlp[0].out_features, outs, head.out_dim).to(self.dev, model.C.dtype)
        again.load_state_dict(mine.state_dict())
        self.student = nn.Sequential(deepcopy(model.student[0].encoder), mine)
        self.teacher = nn.Sequential(deepcopy(model.teacher[0].encoder), again).requires_grad_(False)
        self.loss = self.lib.loss.DINOLoss(head.out_dim, warmup_teacher_temp_epochs=0).to(self.dev, model.C.dtype)
        self.opt,self.precision,self.mom,self.max_norm = adamw(self.student, lr, wd),precision,mom,max_norm
    def __call__(self, views):
        with torch.autocast(self.dev.type, torch.bfloat16, enabled=self.precision=='bf16'):
            self.lib.models.utils.update_momentum(self.student, self.teacher, self.mom)     # before the step, as in its example
            teacher = [self.teacher(v) for v in views[:2]]
            student = [self.student(v) for v in views]
            loss = self.loss(teacher, student)
        self.opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_norm)
        self.opt.step()
        return loss.detach()
