"The example that has to run as it stands, in a script"
import re
from pathlib import Path
from self_supervised.data import digits_path
import processes

EXAMPLE = '''
import matplotlib; matplotlib.use('agg')
from fastai.vision.all import *
from self_supervised.vision.dino import *

aug_pipelines = get_dino_aug_pipelines()
bs = 4
x_large = [torch.randn(4,3,224,224)]*2
x_small = [torch.randn(4,3,96,96)]*4
deits16 = deit_small(patch_size=16, drop_path_rate=0.1)
deits16 = MultiCropWrapper(deits16)
dino_head = DINOHead(deits16.encoder.embed_dim, 2**16, norm_last_layer=True)
student_model = nn.Sequential(deits16,dino_head)
deits16 = deit_small(patch_size=16)
deits16 = MultiCropWrapper(deits16)
dino_head = DINOHead(deits16.encoder.embed_dim, 2**16, norm_last_layer=True)
teacher_model = nn.Sequential(deits16,dino_head)
dino_model = DINOModel(student_model, teacher_model)
dino_model.student[1]
fig,ax = plt.subplots(1,2,figsize=(15,5))
lr_sched = combine_scheds([0.1,0.9], [SchedLin(0.,1e-3), SchedCos(1e-3,1e-6)])
ax[0].plot([lr_sched(i) for i in np.linspace(0,1,100)]);ax[0].set_title('lr')
wd_sched = SchedCos(0.04,0.4)
ax[1].plot([wd_sched(i) for i in np.linspace(0,1,100)]);ax[1].set_title('wd');
out = dino_model.student(x_large + x_small)
assert out.shape==(6*bs, 65536)
assert len(aug_pipelines)==6 and isinstance(aug_pipelines, list) and aug_pipelines[5](torch.rand(2,3,256,256)).shape==(2,3,96,96)
assert (aug_pipelines.stats[0]-tensor(imagenet_stats[0])).abs().max()<1e-6
learn = Learner(DataLoaders([(torch.rand(2,3,64,64),)], [(torch.rand(2,3,64,64),)]), dino_model, loss_func=noop,
                cbs=DINO([lambda x: x*2-1]*2))
'''

def test_the_example_runs_as_a_script(tmp_path):
    (tmp_path/'example.py').write_text(EXAMPLE)
    processes.run(processes.script, tmp_path/'example.py', cwd=tmp_path)

def test_the_readme_runs_as_it_stands(tmp_path):
    "Its notebook example, on a small folder and with a small network"
    code = re.search(r'```python\n(from fastai.*?)```', (Path(__file__).parent.parent/'README.md').read_text(), re.S).group(1)
    for a,b in (("'IMAGES', size=256, bs=64","'images/test', size=32, bs=64, num_workers=0"), ('vit_small_patch16_224','vit_mini_patch4_16'), ('fit_dino(100)','fit_dino(1)'),
                ("labelled_dls('LABELLED')","labelled_dls('images', 16, num_workers=0)")):
        assert a in code
        code = code.replace(a, b)
    for f in sorted((digits_path(tmp_path/'images')/'train').rglob('*.png')):
        if int(f.stem)%5: f.unlink()                             # few labelled images
    (tmp_path/'readme.py').write_text("import matplotlib; matplotlib.use('agg')\n"+code)
    out,_ = processes.run(processes.script, tmp_path/'readme.py', cwd=tmp_path)
    assert (tmp_path/'encoder.safetensors').exists() and 'timm.create_model(' in out
