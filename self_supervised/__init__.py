import warnings

# fastai uses `torch.jit.script` at import, and new versions of PyTorch warn of it: commands and workers stay quiet
warnings.filterwarnings('ignore', r'.torch\.jit\.script. is deprecated', FutureWarning)
