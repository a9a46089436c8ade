"""Nearfield: hierarchical vision backbones built on local attention.

Importing it registers every backbone with timm, so that ``timm.create_model`` makes them too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import checkpoints, models, ops
from ._version import __version__
from .models import create_model, from_pretrained, list_models, push_to_hub, save_pretrained

if TYPE_CHECKING:
    from .models.accelerate import accelerate
    from .models.dense import create_detector, create_segmentor

__all__ = [
    "__version__",
    "accelerate",
    "checkpoints",
    "create_detector",
    "create_model",
    "create_segmentor",
    "engine",
    "from_pretrained",
    "list_models",
    "models",
    "ops",
    "push_to_hub",
    "save_pretrained",
]


# imported when they are asked for
_LAZY = {
    "accelerate": ".models.accelerate",
    "create_detector": ".models.dense",
    "create_segmentor": ".models.dense",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    # training brings in torchvision and more: only for those who ask
    if name == "engine":
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
