"Only functions that a test file defines itself are tests: star imports bring fastcore's `test_eq` and its like"
def pytest_pycollect_makeitem(collector, name, obj):
    if name.startswith('test') and getattr(obj, '__module__', None)!=collector.obj.__name__: return []

import pytest, torch

# With two workers a file is the work of one of them: files that take long come first, so that no worker ends alone
LONG = 'docs','methods','fastai_tools','distributed','resume','monitors','input','leaks','benchmarks','report','training','entrances','images','examples','package'

def pytest_collection_modifyitems(items):
    place = {f'test_{n}': i for i,n in enumerate(LONG)}
    items.sort(key=lambda o: place.get(o.path.stem, len(LONG)))

torch.set_num_threads(1)                                         # the networks are tiny: more threads wait for each other

@pytest.fixture
def double():
    "float64 by default: fastai's smooth loss takes its type from there"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
