import warnings

# fastai uses `torch.jit.script` when it is imported, and new versions of PyTorch warn of it; commands and their workers stay quiet
warnings.filterwarnings('ignore', r'.torch\.jit\.script. is deprecated', FutureWarning)
