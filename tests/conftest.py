"Only functions that a test file defines itself are tests: star imports bring fastcore's `test_eq` and its like"
def pytest_pycollect_makeitem(collector, name, obj):
    if name.startswith('test') and getattr(obj, '__module__', None)!=collector.obj.__name__: return []

import pytest, torch

torch.set_num_threads(1)                                         # the networks are tiny: more threads wait for each other

@pytest.fixture
def double():
    "float64 by default: fastai's smooth loss takes its type from there"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
