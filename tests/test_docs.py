"The site is whole: every name has its entry, links and pictures are there, nothing raw is left, and it looks right in a browser, wide and on a phone"
import base64, functools, html, http.server, inspect, json, os, re, shutil, sys, threading
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote
import pytest
from fastcore.nbio import mk_cell, new_nb

root = Path(__file__).resolve().parent.parent
pytest.importorskip('zensical', reason="the site needs `pip install -e '.[docs]'`")
bs4  = pytest.importorskip('bs4')
sys.path.insert(0, str(root/'tools'))
import docs

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built anew"
    d = tmp_path_factory.mktemp('docs')
    try: docs.katex(d/'katex')
    except OSError as e: pytest.skip(str(e))
    docs.build(d/'site')
    return d/'site'

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): bs4.BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in site.rglob('*.html')}

@pytest.fixture(scope='module')
def notebooks(): return [docs.load(f) for f in docs.files() if f.suffix=='.ipynb']

def page_of(nb): return str(Path(nb.path).with_suffix('.html'))

def test_every_notebook_is_on_the_site_and_in_one_group(pages, notebooks):
    def paths(o): return [o] if isinstance(o, str) else [p for x in (o.values() if isinstance(o, dict) else o) for p in paths(x)]
    listed = paths(docs.nav(notebooks))
    assert sorted(listed)==sorted([docs.OVERVIEW, *(nb.path for nb in notebooks)]) and len(listed)==len(set(listed))>25
    assert {page_of(nb) for nb in notebooks}|{'benchmarks.html'} <= pages.keys()

def test_api_pages_have_a_title_and_the_name_of_their_module(pages, notebooks):
    def texts(links): return {a['href'].removeprefix('./'): a.text.strip() for a in links if a.get('href')}
    menu,overview = texts(pages['api/index.html'].find_all('a', class_='md-nav__link')),texts(pages['api/index.html'].article.find_all('a'))
    for nb in notebooks:
        if not nb.mod: continue
        article = pages[page_of(nb)].article
        assert article.h1.contents[0].strip()==nb.title and article.find('code', class_='module').text==nb.mod.__name__, nb.path
        path = page_of(nb).removeprefix('api/')
        assert menu[path]==overview[path]==nb.title, nb.path
        for name in nb.symbols:
            if '.' not in name: assert overview[f'{path}#{docs.anchor(name)}']==name

def test_a_module_name_as_title_still_makes_a_page():
    md = docs.subtitled('# evaluation.knn\n\n> A sentence', SimpleNamespace(__name__='self_supervised.evaluation.knn'))
    assert md=='# evaluation.knn\n\n`self_supervised.evaluation.knn`{ .module }\n\n> A sentence'

def test_every_exported_name_has_its_entry(pages, notebooks):
    for nb in notebooks:
        if not nb.mod: continue
        ids = {e['id']: e for e in pages[page_of(nb)].find_all(id=True)}
        own = [n for n in nb.mod.__all__ if getattr(getattr(nb.mod, n), '__module__', nb.mod.__name__)==nb.mod.__name__]
        assert set(own) <= set(nb.symbols), nb.path
        for name in nb.symbols:
            head,o = ids.get(docs.anchor(name)),attrgetter(name)(nb.mod)
            assert head is not None and head.name=='h3' and head.code.text==name, f'{nb.path}: {name}'
            if inspect.isfunction(o): assert head.find_next_sibling().code.text.startswith(name.split('.')[-1]+(' ' if hasattr(o, 'groups') else '(')), name

def test_an_entry_says_what_the_code_says(pages):
    def table(page, name):
        rows = pages[page].find(id=name).find_next('table').find_all('tr')
        return [[c.text for c in r.find_all(['th','td'])] for r in rows]
    rows = table('api/objectives.html', 'dino_loss')
    assert rows[0]==['Name','Type','Default','Details']
    assert [r[0] for r in rows[1:]]==['student','teacher','center','tps','tpt','large_crop_ids','Returns']
    assert rows[4]==['tps','float','0.1','Student temperature'] and rows[-1][1]=='Tensor'
    patched = table('api/vision.dino.html', 'learner.fit_dino')
    assert [r[0] for r in patched[1:]]==['n_epoch','lr','lr_min','warmup_epochs','wd','scale_lr','start_epoch','cbs']
    assert patched[4][1]=='float | None'
    assert patched[2][1]=='float | slice | ndarray | None'

def test_a_command_has_a_table_of_options_per_group(pages):
    from self_supervised.cli.train import dino_train
    head = pages['api/cli.train.html'].find(id='dino_train')
    assert head.find_next('code').find_next('code').text.strip()==dino_train.example
    tables = {t.find_previous('h4').contents[0].strip(): [[c.text for c in r.find_all(['th','td'])] for r in t.find_all('tr')] for t in head.find_all_next('table', limit=len(dino_train.groups))}
    assert list(tables)==list(dino_train.groups)
    for title,names in dino_train.groups.items():
        assert tables[title][0]==['Option','Value','Default','Description']
        assert [r[0] for r in tables[title][1:]]==[f"--{n.replace('_','-')}" for n in names.split()]
    rows = {r[0]:r[1:] for t in tables.values() for r in t}
    assert rows['--batch-size-per-gpu']==['int','64','Batch size per rank']
    assert rows['--teacher-temp'][:2]==['float','0.04'] and 'default' not in rows['--teacher-temp'][2]
    assert rows['--global-crops-scale'][:2]==['float float','by method; 0.4 1.0 for dino'] and rows['--resume']==['','','Resume the run in --out']
    assert 'sys.exit' not in pages['api/cli.train.html'].article.text                # what is internal is not shown

def test_names_in_prose_lead_to_their_entries(pages):
    def href(page, text): return {a['href'] for a in pages[page].article.find_all('a') if a.text==text}
    assert href('guides/explore_a_folder.html', 'near_duplicates')=={'../api/explore.html#near_duplicates'}
    assert 'augmentations.html#get_dino_aug_pipelines' in href('api/vision.dino.html', 'get_dino_aug_pipelines')
    assert href('index.html', 'distributed training')=={'guides/distributed.html'}
    assert href('guides/quick_start.html', 'Learner')=={'https://docs.fast.ai/learner.html#learner'}

def test_an_entry_leads_to_the_repository(monkeypatch, notebooks):
    from self_supervised.objectives import dino_loss
    monkeypatch.setattr(docs, 'get_config', lambda: SimpleNamespace(git_url='https://example.org/us/it', branch='main'))
    url,line = docs.source_url(dino_loss).split('#L')
    assert url=='https://example.org/us/it/blob/main/self_supervised/objectives.py'
    assert (root/'self_supervised'/'objectives.py').read_text().splitlines()[int(line)-1].startswith('def dino_loss(')
    for nb in notebooks:
        for name in nb.symbols:
            if inspect.isfunction(attrgetter(name)(nb.mod)): assert f"/{nb.mod.__name__.replace('.', '/')}.py#L" in docs.entry(name, nb.mod), name

def broken(pages, site, names=None):
    "Links, pictures, scripts and styles of the pages called `names` that lead nowhere"
    ids = {site/n: {e['id'] for e in p.find_all(id=True)} for n,p in pages.items()}
    for name in names or pages:
        for e in pages[name].find_all(['a','img','link','script']):
            to = e.get('href') or e.get('src') or ''
            path,_,anchor = unquote(to).partition('#')
            if not to or re.match(r'https?:|mailto:|data:', to): continue
            file = Path(os.path.normpath(site/path.lstrip('/') if path.startswith('/') else (site/name).parent/path)) if path else site/name
            if not (file/'index.html' if file.is_dir() else file).exists() or anchor and file in ids and anchor not in ids[file]: yield name,to

def test_no_link_is_broken(pages, site): assert list(broken(pages, site))==[]

def test_a_broken_link_is_found(pages, site):
    bad = bs4.BeautifulSoup('<a href="api/objectives.html#nothing">a</a><img src="img/none.png"><a href="api/objectives.html#dino_loss">b</a>', 'html.parser')
    assert [to for _,to in broken(pages|{'bad.html': bad}, site, ['bad.html'])]==['api/objectives.html#nothing','img/none.png']

RAW = re.compile(r':::|^#\||```|\*\*\w|\]\(|<style|\{ ?[.#]\w|\$[^$\n]*[\\_^{][^$\n]*\$|^(?:[-*]|\d+\.) \w', re.M)

def raw(article):
    "What a reader would see of Markdown, directives or styles in the HTML of an article"
    code = re.findall(r'<pre.*?</pre>', article, re.S)
    text = re.sub(r'<(pre|code|script|style)\b.*?</\1>|<(span|div) class="arithmatex">.*?</\2>', lambda m: '<style' if m[1] in ('script','style') else '', article, flags=re.S)
    text = html.unescape(re.sub(r'<(?!style)[^>]*>', '', text))
    return [m[0] for m in RAW.finditer(text)] + [c for c in code if re.search(r'^#\| ?\w', re.sub('<[^>]*>', '', c), re.M)]

def test_nothing_raw_is_left(pages, site):
    for name in pages:
        article = re.search(r'<article.*?</article>', (site/name).read_text(encoding='utf-8'), re.S)[0]
        assert raw(article)==[], name

@pytest.mark.parametrize('bad', ['<p>::: {.note}</p>', '<p>a $x_1$ b</p>', '<style scoped>td {}</style>', '<pre><code><span>#| hide</span></code></pre>', '<p>**bold**</p>',
                                 '<p>text\n- no list</p>', '<p>[a](b.ipynb)</p>', '<p>head { .entry }</p>'])
def test_what_is_raw_is_found(bad): assert raw(f'<article><p>fine</p>{bad}</article>')

def test_pictures_and_tables_are_those_of_the_notebooks(pages, site, notebooks):
    n = 0
    for nb in notebooks:
        article = pages[page_of(nb)].article
        shown = [(site/page_of(nb)).parent/i['src'] for i in article.find_all('img')]
        data = [o['data'] for c in nb.cells for o in c.get('outputs', []) if 'data' in o]
        assert {base64.b64decode(d['image/png']) for d in data if 'image/png' in d} <= {f.read_bytes() for f in shown}, nb.path
        for d in data:
            if 'text/html' not in d: continue
            want = [c.text for c in bs4.BeautifulSoup(''.join(d['text/html']), 'html.parser').find_all('td')]
            assert want in [[c.text for c in t.find_all('td')] for t in article.find_all('table')], nb.path
            n += 1
        assert all(i['alt'] for i in article.find_all('img')), nb.path
    assert n>5

def test_directives_and_callouts(tmp_path):
    cells = [mk_cell(src, kind, outputs=[dict(output_type='stream', name='stdout', text='printed\n')] if kind=='code' else [])
             for src,kind in [('# A page\n\n::: {.callout-note}\nSee `dino_loss`.\n:::','markdown'), ('#| hide\nhidden()','code'),
                              ('#| echo: false\nsilent()','code'), ('shown() #| hide_line\nx = 1','code')]]
    file = root/'nbs'/'guides'/'a.ipynb'
    nb = docs.NBProcessor(nb=new_nb(cells), procs=docs.PROCS, process=True).nb
    page = SimpleNamespace(file=file, path='guides/a.md', mod=None, cells=nb.cells, symbols=[])
    other = SimpleNamespace(file=root/'nbs'/'api'/'04_objectives.ipynb', path='api/objectives.md', mod=None, cells=[], symbols=['dino_loss'])
    md = docs.markdown(page, docs.Links([page,other]), tmp_path)
    assert '!!! note\n\n    See [`dino_loss`](../api/objectives.md#dino_loss).' in md
    assert 'hidden' not in md and 'silent' not in md and 'shown' not in md and 'x = 1' in md and md.count('printed')==2

def test_search_finds_what_is_there(site):
    found = [i for i in json.loads((site/'search.json').read_text())['items'] if i['location']=='api/objectives.html#dino_loss']
    assert found and 'cross-entropy' in found[0]['text']

# In a browser

def browser_path():
    names = 'chromium','chromium-browser','google-chrome','google-chrome-stable','chrome','msedge'
    return next((p for p in map(shutil.which, names) if p), None)

@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='the browser tests need `pip install playwright`')
    if not browser_path(): pytest.skip('no Chromium or Chrome on the PATH: the browser tests need one (for example `apt install chromium`)')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser_path(), args=['--no-sandbox'] if os.name=='posix' and os.geteuid()==0 else [])
        yield b
        b.close()

@pytest.fixture(scope='module')
def url(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

WIDE,PHONE = dict(width=1280, height=900),dict(width=390, height=844)

def open_page(browser, url, size):
    "A page that notes what goes wrong on it: errors, files that are missing, calls to other places"
    page,wrong = browser.new_page(viewport=size),[]
    page.set_default_timeout(10_000)
    page.on('console',       lambda m: wrong.append(m.text) if m.type in ('error','warning') else None)
    page.on('pageerror',     lambda e: wrong.append(str(e)))
    page.on('requestfailed', lambda r: wrong.append(f'failed: {r.url}') if r.failure!='net::ERR_ABORTED' else None)
    page.on('response',      lambda r: wrong.append(f'{r.status}: {r.url}') if r.status>=400 else None)
    page.on('request',       lambda r: wrong.append(f'leaves the site: {r.url}') if not r.url.startswith((url,'data:','blob:')) else None)
    return page,wrong

STICKS_OUT = """() => {
    const held = e => { for (let p = e.parentElement; p; p = p.parentElement) if (['auto','scroll','hidden'].includes(getComputedStyle(p).overflowX) && p!==document.body && p!==document.documentElement) return true; return false }
    return [...document.querySelectorAll('article *')].filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth+1 && !held(e)).map(e => e.outerHTML.slice(0,120))
}"""

def look(page):
    "What is wrong with the page as it is drawn"
    page.wait_for_load_state('load')
    res  = page.evaluate(STICKS_OUT)
    res += page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => 'no picture: ' + i.src)")
    res += page.evaluate("[...document.querySelectorAll('.arithmatex')].filter(e => !e.querySelector('.katex') || e.querySelector('.katex-error')).map(e => 'no formula: ' + e.textContent)")
    if page.evaluate('document.documentElement.scrollWidth > innerWidth'): res.append('the page scrolls sideways')
    return res

MAIN = 'index.html','api/objectives.html','api/vision.dino.html','api/evaluation.linear.html','api/cli.train.html','benchmarks.html'

@pytest.mark.parametrize('sizes,names', [((WIDE,PHONE),MAIN), pytest.param((PHONE,), None, marks=pytest.mark.slow)], ids=['wide-phone','phone-all'])
def test_pages_in_a_browser(browser, url, pages, sizes, names):
    page,wrong = open_page(browser, url, sizes[0])
    for name in names or sorted(pages.keys()-{'404.html'}):
        page.goto(url+name)
        for size in sizes:
            page.set_viewport_size(size)
            wrong += [f'{name}, {size}: {w}' for w in look(page)]
    page.close()
    assert wrong==[]

def test_the_browser_sees_what_is_wrong(browser, url):
    page,wrong = open_page(browser, url, PHONE)
    page.goto(url+'index.html')
    page.evaluate("""document.querySelector('article').insertAdjacentHTML('beforeend',
        '<div style="width:600px">wide</div><img src="none.png"><span class="arithmatex">\\\\(x\\\\)</span>'); console.error('oh')""")
    page.wait_for_timeout(200)
    found = ' '.join(look(page)+wrong)
    page.close()
    for what in ('width:600px','no picture','no formula','oh','404'): assert what in found, what

@pytest.mark.parametrize('size', [WIDE,PHONE], ids=['wide','phone'])
def test_search_in_a_browser(browser, url, size):
    page,wrong = open_page(browser, url, size)
    page.goto(url+'index.html')
    page.locator('header [class*=search]').locator('visible=true').first.click()
    page.get_by_role('combobox').fill('dino_loss')
    page.get_by_role('option', name='dino_loss', exact=True).first.click()
    page.wait_for_url('**/objectives.html*#dino_loss')
    assert page.locator('#dino_loss').is_visible()
    page.close()
    assert wrong==[]
