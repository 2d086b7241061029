"Which tree is it from?"
__version__ = '0.1.0'
