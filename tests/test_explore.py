"The page of `dino_explore` in a browser: whole without a network, names of files shown as text, and names given there come out as labels"
import csv, io, pytest
from fastai.vision.all import *
from self_supervised.all import *
from test_docs import browser, PHONE, WIDE
from test_report import look

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "Thirty images of three colours, one with a name that would be a script, and one that has gone since"
    d,g,rows = tmp_path_factory.mktemp('images'),torch.Generator().manual_seed(0),{}
    for i in range(30):
        name = '<script>alert(1)<b>.png' if i==4 else f'{i:02}, "quoted".png'
        color = torch.eye(3)[i%3]
        Image.new('RGB', (24,24), tuple((color*200).int().tolist())).save(d/name)
        rows[name] = color+.05*torch.randn(3, generator=g)
    feats = pd.DataFrame(torch.stack(list(rows.values())).numpy(), index=pd.Index(rows, name='image'))
    feats.attrs['bad_files'] = {'<i>broken</i>.jpg': 'no image'}
    (d/'07, "quoted".png').unlink()
    file = d.parent/'explore.html'
    file.write_text(explore_page(feats, d, n_clusters=3, threshold=.999), encoding='utf-8')
    return file

@pytest.mark.parametrize('size', [WIDE,PHONE], ids=['wide','phone'])
def test_the_page_is_whole(browser, page, size):
    wrong,text,_ = look(browser, page, size)
    assert set(wrong)=={'a script', 'no picture: 07, "quoted".png'}                        # its own, which writes the labels
    for o in ('30 images','Clusters','Outliers','Near-duplicates','<i>broken</i>.jpg'): assert o in text, o

def test_names_of_clusters_become_labels(browser, page):
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.locator('input[data-cluster="0"]').fill('red, or so')
    tab.locator('input[data-cluster="2"]').fill('blue')
    with tab.expect_download() as d: tab.locator('#save').click()
    rows = list(csv.DictReader(io.StringIO(Path(d.value.path()).read_text(encoding='utf-8'))))
    assert Counter(r['label'] for r in rows)=={'red, or so':10, 'blue':10}
    colors = {i%3 for r in rows if r['label']=='blue' for i in [4 if '<' in r['image'] else int(r['image'][:2])]}
    assert len(colors)==1
