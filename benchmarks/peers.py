"lightly's DINO (https://github.com/lightly-ai/lightly), as its own example puts it together; an optional implementation: `pip install -e '.[bench]'`"
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
