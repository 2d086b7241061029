"The console commands. A module is imported when one of its names is used, so a command imports only what it needs"
import importlib

_where = dict(
    run_command='core', command_parser='core', named_open_fn='core', RunFailed='core', dino_train='train', main='train',
    dino_eval='evaluate', dino_attention='evaluate', dino_prepare='prepare', dino_ablate='ablate', dino_embed='explore',
    dino_explore='explore', dino_report='report')
__all__ = list(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f'.{_where[name]}', __name__), name)

def __dir__(): return [*globals(), *__all__]
