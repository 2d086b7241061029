"""The project is written in plain technical English: texts of notebooks, docstrings, parameter comments and messages use the field's terms.

    python tests/test_language.py [FILE ...]      # lists what breaks the rules of CONTRIBUTING.md; default: all files
"""
import ast, io, json, re, sys, tokenize
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

BANNED = {                                                       # pattern: what to write instead
    r'(?<!make )\brooms?\b|\bthe house\b': 'module(s)',
    r'\bembedded (digits|data|sets?|images)\b': 'built-in digits',
    r'\bas drawn\b|\bdrawn anew\b|\banew\b': 'frozen at its initial weights; randomly initialised; again',
    r'\bdrawn (images|shapes|scenes|objects)\b': 'synthetic',
    r'\bwithout (a )?network\b|\bneeds no network\b': 'works offline; no model',
    r'\b(large|small) views?\b': 'global crop, local crop',
    r'\breleased (weights|classifiers?|checkpoints?|models?)\b': 'pretrained',
    r'\b(go|goes|going|gone|went) on\b': 'resume, continue',
    r'\b(came|comes|come) of it\b': 'the results',
    r'\bas a part of\b|\bpart of the (image|batch|labels|training|teacher)\b': 'fraction',
    r'\b(\d+|few|rows?|labels?|frames|images|seconds|steps?|pages?|lines?|one) an? (class|image|row|step|core|second|epoch|batch|model|object|view|file|folder|process|worker|pixel|method|run)\b': 'per',
    r'(?<!there )\bis no (an? )?(folder|file|checkpoint|run|number|image|protocol|module|view|model|picture|list|name|encoder)\b': 'is not a',
    r'\bof yours\b|\bof ours\b|\bone\'s own\b': 'your own, custom',
    r'[,(] say[.,;:)]|\bsay[;)]': 'for example',
    r'\bat hand\b': 'available',
    r'(?<!lags )(?<!lag )\bbehind\b': 'after',
    r'\bin front of\b': 'before',
    r'\bbeside\b': 'next to, compared with, in addition to',
    r'\b(nobody|somebody)\b': 'say who acts',
    r'\breckon(s|ed|ing)?\b': 'compute',
    r'\bmiddle square\b': 'centre crop',
    r'\bnear-cop(y|ies)\b': 'near-duplicate',
    r'\btorn\b': 'truncated',
    r'\bby heart\b': 'overfit, memorise',
    r'\bfrom nothing\b': 'from scratch',
    r'\breal steps?\b': 'optimizer step',
    r'\bjoint (batch|rows)\b': 'global batch',
    r'\bmade-up\b': 'learned',
    r'\b(un)?decided\b': 'high-entropy, low-entropy',
    r'\blength 1\b': 'L2-normalised (unit-norm)',
    r'\bquarter turns?\b': 'multiples of 90°',
    r'\b(sticks?|sticking|stands? still)\b': 'plateaus',
    r'\btakes? (its|their) places?\b|\btook (its|their) places?\b': 'is replaced by',
    r'(?<!standard )\bdeviations?\b': 'standard deviation (std), sigma',
    r'\bas it stands\b|\bas they stand\b': 'unchanged',
    r'\bthe reference(\'s)?\b(?! implementation)': 'the original implementation',
    r'\b(the|a|its|their) (vote|votes)\b|\bneighbour vote\b': 'k-NN classification',
    r'\bflatters?\b|\bflattering\b': 'inflate',
    r'\bin a sentence\b|\ba sentence each\b|\bwith a sentence\b': 'raise an error that says',
    r'\b(side|sides) of the (squares?|views?|patch(es)?|crops?|images?)\b': 'image size, crop size, patch size',
    r'\bflat answers?\b|\b(the|its) answers?\b|\bsame answer\b': 'output, prediction',
    r'\b(rivals?|contestants?)\b': 'baseline, implementation',
    r'\bwith(out)? chance\b|\bnothing but chance\b': 'deterministic; random variation',
    r'\bseveral processes\b': 'distributed training, several ranks',
    r'\boptimisers?\b': 'optimizer',
    r'\b(colors?|grays?|normaliz\w+|labeled|unlabeled|centering)\b': 'British spelling in prose: colour, grey, normalise, labelled, centring',
    r'(?<![\w.)\]/])\.\d': 'a leading zero: 0.5',
}
PATTERNS = [(re.compile(p, re.I), instead) for p,instead in BANNED.items()]

def prose(text):
    "`text` without code, links, formulas, quotations of other works and directives"
    text = re.sub(r'^```.*?^```$|^ {4}[^\n]*$|^#\|[^\n]*$|\$\$.*?\$\$', '', text, flags=re.S|re.M)
    return re.sub(r'``[^`]*``|`[^`]*`|\]\([^)]*\)|\$[^$\n]+\$|<[^>\n]*>|https?://\S+|"[^"\n]{0,200}"', '', text)

def texts_of_code(src):
    "Docstrings, messages and parameter comments of Python code, as (kind, text)"
    src  = re.sub(r'^([ \t]*)[%!].*$', r'\1pass', src, flags=re.M)
    tree = ast.parse(src)
    docs = {id(o.body[0].value) for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef,ast.ClassDef,ast.Module)) and ast.get_docstring(o) is not None}
    parts = {id(v) for o in ast.walk(tree) if isinstance(o, ast.JoinedStr) for v in o.values}
    for o in ast.walk(tree):
        if isinstance(o, ast.Constant) and isinstance(o.value, str) and id(o) not in parts:
            if id(o) in docs: yield 'docstring',o.value
            elif len(o.value.split())>3: yield 'message',o.value
        if isinstance(o, ast.JoinedStr):
            text = ''.join(v.value if isinstance(v, ast.Constant) else 'X' for v in o.values)
            if len(text.split())>3: yield 'message',text
    for t in tokenize.generate_tokens(io.StringIO(src).readline):
        if t.type==tokenize.COMMENT and not t.string.startswith('#|'): yield 'comment',t.string[1:].strip()

def texts(file):
    "The texts of a file, as (kind, text)"
    src = file.read_text(encoding='utf-8')
    if file.suffix=='.ipynb':
        for c in json.loads(src)['cells']:
            s = ''.join(c['source'])
            if c['cell_type']=='markdown': yield 'markdown',s
            elif c['cell_type']=='code': yield from texts_of_code(s)
    elif file.suffix=='.py': yield from texts_of_code(src)
    else: yield 'markdown',src

def wrong(file):
    "What breaks the rules in a file: (kind, phrase, what to write instead, its surroundings)"
    for kind,text in texts(file):
        text = prose(text)
        for p,instead in PATTERNS:
            for m in p.finditer(text): yield kind,m[0],instead,re.sub(r'\s+', ' ', text[max(0,m.start()-40):m.end()+40])
        if kind in ('docstring','comment') and re.search(r'\w\?\s*$', text.split('\n')[0]): yield kind,'?','a statement, not a question',text[:80]

def files():
    "Files whose texts are checked"
    nbs = [f for d in ('api','guides','experiments') for f in sorted((root/'nbs'/d).glob('*.ipynb'))]
    pages = [root/o for o in ('README.md','CONTRIBUTING.md','CHANGELOG.md','benchmarks/results.md')]
    examples = [f for ext in ('ipynb','md','py') for f in sorted((root/'examples').rglob(f'*.{ext}')) if '.ipynb_checkpoints' not in f.parts]
    return [*pages, *sorted((root/'benchmarks').glob('*.py')), *nbs, *examples]

@pytest.mark.parametrize('file', files(), ids=lambda f: f.relative_to(root).as_posix())
def test_texts_are_plain_technical_english(file):
    assert [f'{kind}: {phrase!r} in "…{around}…": {instead}' for kind,phrase,instead,around in wrong(file)]==[]

@pytest.mark.parametrize('text', ['nine rooms', 'the embedded digits', 'two small views', '1 label a class', 'the run goes on', 'x is no folder', '.5 of them', 'the mean deviation', 'the optimiser'])
def test_banned_phrases_are_found(text): assert any(p.search(prose(text)) for p,_ in PATTERNS)

@pytest.mark.parametrize('text', ['`.5` and `color`', 'standard deviation', 'there is no file', 'v1.5', 'a class', 'say so'])
def test_other_phrases_are_not(text): assert not any(p.search(prose(text)) for p,_ in PATTERNS)

if __name__=='__main__':
    for f in [Path(o) for o in sys.argv[1:]] or files():
        found = list(wrong(f))
        print(f"{f}: {len(found)}")
        if len(sys.argv)>1:
            for kind,phrase,instead,around in found: print(f'  {kind:9} {phrase!r:20} -> {instead:40}  …{around}…')
