"All public names at once: `from self_supervised.all import *`"
from .data import *
from .augmentations import *
from .encoders import *
from .heads import *
from .objectives import *
from .schedules import *
from .features import *
from .checkpoints import *
from .evaluation.knn import *
from .evaluation.linear import *
from .evaluation.lowshot import *
from .evaluation.retrieval import *
from .evaluation.table import *
from .monitors import *
from .vision.core import *
from .vision.dino import *
from .plots import *
