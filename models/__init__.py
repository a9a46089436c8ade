"""Backbones, one file a family, all with timm's interface; importing this package registers them with timm.

The file of a family reads top to bottom: attention, model with its published layouts, variants. To add a family, write
such a file and import it here.
"""

from __future__ import annotations

from . import biformer, dinat, dinat_s, halonet, hnt, hwt, maxvit, nat, swin, swin_v2
from .backbone import Backbone
from .features import Features
from .hub import from_pretrained, push_to_hub, save_pretrained
from .loading import export_state_dict, models_that_fit
from .registry import create_model, list_models, warn_about_names

warn_about_names()

__all__ = [
    "Backbone",
    "Features",
    "biformer",
    "create_model",
    "dinat",
    "dinat_s",
    "export_state_dict",
    "from_pretrained",
    "halonet",
    "hnt",
    "hwt",
    "list_models",
    "maxvit",
    "models_that_fit",
    "nat",
    "push_to_hub",
    "save_pretrained",
    "swin",
    "swin_v2",
]
