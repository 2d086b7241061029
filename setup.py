"Reads settings.ini, so that metadata and requirements stand in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg  = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg  = cfg['DEFAULT']

setup(
    version          = cfg['version'],
    description      = cfg['description'],
    long_description = (here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type = 'text/markdown',
    author           = cfg['author'],
    license_expression = cfg['license'],
    keywords         = cfg['keywords'].split(),
    python_requires  = f">={cfg['pythons'].split()[0]}",
    install_requires = cfg['requirements'].split(),
    extras_require   = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    packages         = [*find_packages(include=['self_supervised', 'self_supervised.*']), 'self_supervised.templates'],
    package_data     = {'': ['py.typed', '*.jinja']},
    entry_points     = {'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['self_supervised=self_supervised._modidx:d']},
    classifiers      = ['Development Status :: 4 - Beta', 'Intended Audience :: Science/Research', 'Framework :: Jupyter', 'Typing :: Typed',
                        *(f'Programming Language :: Python :: {v}' for v in ('3', *cfg['pythons'].split())),
                        'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Topic :: Scientific/Engineering :: Image Recognition'],
)
