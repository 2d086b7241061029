"The explorer in a real Jupyter page: a click on a patch brings that patch's picture"
import base64, importlib.util, io, json, os, socket, subprocess, sys, time, urllib.request
import pytest
from fastai.vision.all import *
from self_supervised.checkpoints import *
from self_supervised.data import *
from self_supervised.encoders import *
from self_supervised.widgets import *
from test_docs import browser                                    # the fixture

for o in ('ipywidgets','anywidget','jupyterlab'):
    if not importlib.util.find_spec(o): pytest.skip(f'pip install {o}', allow_module_level=True)

CELL = """from self_supervised.widgets import *
from self_supervised.checkpoints import load_encoder
from self_supervised.data import digits_dls
w = explore_attention(load_encoder('e.safetensors'), digits_dls().valid_ds.x[:3])
w"""

@pytest.fixture
def lab(tmp_path):
    "A Jupyter server on a free port, whose folder has an encoder and a notebook"
    export_encoder(create_encoder('vit_mini_patch4_16'), tmp_path/'e.safetensors', verbose=False)
    meta = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source=CELL)
    (tmp_path/'page.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=meta, cells=[cell])))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {k: str(tmp_path/'.jupyter') for k in ('JUPYTER_CONFIG_DIR','JUPYTER_DATA_DIR','JUPYTER_RUNTIME_DIR','JUPYTERLAB_SETTINGS_DIR','JUPYTERLAB_WORKSPACES_DIR','IPYTHONDIR','MPLCONFIGDIR')}
    args = ['--no-browser','--ip=127.0.0.1',f'--port={port}','--ServerApp.port_retries=0','--IdentityProvider.token=','--allow-root','--expose-app-in-browser',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate','--LabApp.news_url=None','--LabApp.extension_manager=readonly',f'--ServerApp.root_dir={tmp_path}']
    env = os.environ | own | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get('PYTHONPATH', '')]))
    with open(tmp_path/'log', 'w') as log: p = subprocess.Popen([sys.executable,'-m','jupyterlab',*args], cwd=tmp_path, env=env, stdout=log, stderr=log)
    url = f'http://127.0.0.1:{port}/'
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url+'api/status', timeout=5)
                break
            except OSError: time.sleep(.2)
            assert p.poll() is None, (tmp_path/'log').read_text()
        yield url
    finally:
        p.terminate()                                            # the server ends its kernels
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()

PIXELS = """i => { const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight; c.getContext('2d').drawImage(i, 0, 0); return c.toDataURL('image/png') }"""

def pixels(img): return np.asarray(Image.open(io.BytesIO(base64.b64decode(img.evaluate(PIXELS).split(',')[1]))).convert('RGB')).astype(float)

def difference(a, b): return abs(a-b).mean() if a.shape==b.shape else math.inf

def drawn(tmp_path, **kwargs):
    "The picture of a patch, made here"
    fig = show_patch(load_encoder(tmp_path/'e.safetensors'), digits_dls(device='cpu').valid_ds.x[:3], **kwargs)
    fig.savefig(b := io.BytesIO(), format='png', dpi=80)
    plt.close(fig)
    return np.asarray(Image.open(b).convert('RGB')).astype(float)

def test_a_click_on_a_patch_shows_it(lab, browser, tmp_path):
    page,outside = browser.new_page(viewport=dict(width=1400, height=1000)),[]
    page.set_default_timeout(60_000)
    page.on('request', lambda r: None if r.url.startswith((lab,lab.replace('http','ws'),'data:','blob:')) else outside.append(r.url))
    page.goto(lab+'doc/tree/page.ipynb')
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    image,picture = page.locator('.patch-picker img'),page.locator('img.widget-image')
    picture.wait_for()
    ready = "e => e.complete && e.naturalWidth>0"
    page.wait_for_function(ready, arg=picture.element_handle())
    first = pixels(picture)
    assert difference(first, drawn(tmp_path, patch=(2,2)))<1

    def after(do):
        "The picture behind an action, when it has changed"
        was = picture.get_attribute('src')
        do()
        page.wait_for_function("([e, was]) => e.src!==was && e.complete && e.naturalWidth>0", arg=[picture.element_handle(), was])
        return pixels(picture)
    b   = image.bounding_box()
    got = after(lambda: image.click(position=dict(x=b['width']*.9, y=b['height']*.3)))
    assert difference(got, drawn(tmp_path, patch=(1,3)))<1<difference(got, first)
    got = after(lambda: (page.locator('.patch-picker').focus(), page.keyboard.press('ArrowDown')))
    assert difference(got, drawn(tmp_path, patch=(2,3)))<1
    got = after(lambda: page.locator('.widget-dropdown select').nth(1).select_option('3'))
    assert difference(got, drawn(tmp_path, patch=(2,3), head=2))<1<difference(got, drawn(tmp_path, patch=(2,3)))
    page.close()
    assert outside==[]                                           # it works without a network
