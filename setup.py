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
    license          = cfg['license'],
    keywords         = cfg['keywords'].split(),
    python_requires  = f">={cfg['min_python']}",
    install_requires = cfg['requirements'].split(),
    extras_require   = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    packages         = find_packages(include=['self_supervised', 'self_supervised.*']),
    package_data     = {'self_supervised': ['*.jinja']},
    entry_points     = {'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['self_supervised=self_supervised._modidx:d']},
    classifiers      = ['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
