"""Notebooks as plain text, to write and review them in an editor.

    python tools/nbtext.py to-text nbs/03_heads.ipynb > heads.txt
    python tools/nbtext.py to-nb heads.txt nbs/03_heads.ipynb      # keeps the outputs of cells that did not change
    python tools/nbtext.py tidy nbs/*.ipynb                        # drops what no reader wants: outputs of hidden cells, and warnings

A text is its cells one after the other, each below a line `#%%` (code) or `#%% md` (markdown). A cell's id is a hash of its source, so
that an unchanged cell keeps its id, its outputs and its comment in the exported module.
"""
import hashlib, re, sys
from pathlib import Path
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

_sep = re.compile(r'^#%%(?: (md))?$\n', re.M)

def to_text(nb):
    "The cells of `nb` as one text"
    return '\n\n'.join(f"#%%{' md' if c.cell_type=='markdown' else ''}\n{c.source.strip()}" for c in nb.cells) + '\n'

def to_nb(text, old=()):
    "A notebook from `text`, with the outputs of those `old` cells that are still in it"
    outputs,seen,cells = {c.id: c.get('outputs', []) for c in old},{},[]
    for kind,src in zip(*[iter(_sep.split(text)[1:])]*2):
        src = src.strip()
        h = hashlib.sha1(src.encode()).hexdigest()[:8]
        seen[h] = n = seen.get(h, -1) + 1
        if n: h = f'{h[:6]}{n:02d}'
        cells.append(mk_cell(src, 'markdown', id=h) if kind else mk_cell(src, id=h, outputs=outputs.get(h, [])))
    meta = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    return new_nb(cells, meta)

def tidy(nb):
    "`nb` without the outputs of hidden cells, and without warnings"
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = [] if re.search(r'^#\|\s*hide', c.source, re.M) else [o for o in c.outputs if 'Warning: ' not in ''.join(o.get('text', ''))]
    return nb

if __name__ == '__main__':
    match sys.argv[1:]:
        case ['to-text', nb]: sys.stdout.write(to_text(read_nb(nb)))
        case ['to-nb', txt, nb]: write_nb(to_nb(Path(txt).read_text(), read_nb(nb).cells if Path(nb).exists() else ()), nb)
        case ['tidy', *nbs]:
            for nb in nbs: write_nb(tidy(read_nb(nb)), nb)
        case _: sys.exit(__doc__)
