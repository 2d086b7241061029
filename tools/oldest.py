"The requirements of settings.ini at their lower bounds, for pip: `make test-oldest`"
import re
from configparser import ConfigParser
from pathlib import Path

def oldest(
    settings:Path=Path(__file__).parent.parent/'settings.ini', # Where the requirements are declared
    skip:tuple=('all','bench','docs','dev') # Extras that users of the library do not need
)->list: # `torch==2.6`, ...; what has no lower bound stays as it is
    "Requirements of the core and of its extras, `>=` replaced by `==`"
    cfg = ConfigParser()
    cfg.read(settings)
    keys = [k for k in cfg['DEFAULT'] if re.fullmatch(r'(\w+_)?requirements', k) and k.removesuffix('_requirements') not in skip]
    return [re.sub(r'>=([^,]+).*', r'==\1', r) for k in keys for r in cfg['DEFAULT'][k].split()]

if __name__=='__main__': print(*oldest())
