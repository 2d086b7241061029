"""Write README.md from nbs/index.ipynb: prose and code as they stand, tables and text that code printed, without hidden cells.

    python tools/readme.py            # writes README.md
    python tools/readme.py --check    # says whether it would change, by the exit code
"""
import re, sys
from pathlib import Path
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent

def output(o):
    "What a reader sees of one output of a cell"
    if 'text' in o: return f"```\n{''.join(o['text']).strip()}\n```" if o.get('name')=='stdout' else ''
    data = o.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    return f"```\n{''.join(data['text/plain']).strip()}\n```" if 'text/plain' in data else ''

def cell(c):
    "A cell as Markdown"
    if c.cell_type=='markdown': return re.sub(r'\]\((\.\./)?(?=[\w./]+\.(?:ipynb|png|md|py))', lambda m: '](' if m[1] else '](nbs/', c.source)
    if re.search(r'^#\|\s*(hide|default_exp)', c.source, re.M): return ''
    src = re.sub(r'^#\|.*\n', '', c.source, flags=re.M).strip()
    return '\n\n'.join([f'```python\n{src}\n```'] + [t for t in map(output, c.get('outputs', [])) if t])

def readme():
    "The text of README.md"
    cells = [cell(c) for c in read_nb(root/'nbs'/'index.ipynb').cells]
    return '<!-- written from nbs/index.ipynb by tools/readme.py: edit the notebook -->\n\n' + '\n\n'.join(c for c in cells if c) + '\n'

if __name__ == '__main__':
    file,text = root/'README.md',readme()
    if '--check' in sys.argv: sys.exit(file.read_text(encoding='utf-8')!=text)
    file.write_text(text, encoding='utf-8')
