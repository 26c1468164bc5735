"""BEiT-3 with the released checkpoints and the released outputs, as fast as the machine allows.

>>> import beit3_fast
>>> model = beit3_fast.load_model("beit3_base_patch16_384_coco_retrieval.pth")
"""

from . import _extension, ops  # noqa: F401  (importing them registers the ops and their compiled kernels)
from ._info import info
from ._version import __version__
from .accelerate import accelerate
from .backend import use_backend
from .checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from .layout import TokenLayout
from .models.config import EncoderConfig
from .models.registry import create_model, list_models
from .optimize import optimize

__all__ = [
    "CheckpointError",
    "EncoderConfig",
    "TokenLayout",
    "__version__",
    "accelerate",
    "create_model",
    "info",
    "list_models",
    "load_checkpoint",
    "load_model",
    "ops",
    "optimize",
    "save_checkpoint",
    "use_backend",
]
