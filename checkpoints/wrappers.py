"""From whatever a training script saved to the plain state dict inside: wrappers, EMA copies and key prefixes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

_log = logging.getLogger("nearfield.checkpoints")

_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module")
# timm, Swin's descendants, DETR's descendants, mmengine
_EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
_EMA_PREFIXES = ("model_ema.", "ema_model.", "ema.")
_WHOLE_PREFIXES = ("module.", "model.")
_BACKBONE = "backbone."
_BODY, _PYRAMID = "body.", "fpn."  # within it, of torchvision's detectors
_CLASSIFIER = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")
_DEPTH = 6


def unwrap(obj: Any, *, ema: bool = False, backbone: bool = True) -> dict[str, Tensor]:
    """The plain state dict in a loaded checkpoint; only tensors are kept, detached.

    Taken off: the wrappers ``model``, ``state_dict``, ``model_state``, ``model_state_dict`` and ``module``, those of
    averages, ``model_ema``, ``state_dict_ema``, ``ema`` and ``ema_state_dict``, a ``module.`` or ``model.`` that every
    key begins with, ``_orig_mod`` of compiled modules anywhere in a key, and averages kept under a key prefix.

    Args:
        obj: what the file held.
        ema: take the averaged weights; without it they are taken only when the file has no others.
        backbone: reduce a detector's or segmenter's file to what lies under ``backbone.`` (and a classifier ``head``),
            provided that nothing outside bears the name of one of the backbone's own parts; and that to what lies under
            ``body.`` where there is a pyramid ``fpn.`` beside it, as in torchvision's detectors.

    Raises:
        CheckpointError: no tensors inside, or ``ema`` asked for and no averaged weights inside.
    """
    state, is_ema = _peel(obj, ema)
    state = _strip_whole({_without_compiled(key): value for key, value in state.items()})
    state = _pick_copy(state, ema and not is_ema)
    state = _strip_whole(state)
    if backbone:
        state = _only_backbone(state)
    return {key: value.detach() for key, value in state.items()}


def _peel(obj: Any, ema: bool) -> tuple[dict[str, Tensor], bool]:
    """The innermost mapping of tensors, and whether an EMA wrapper led there."""
    is_ema = False
    for _ in range(_DEPTH):
        if isinstance(obj, torch.nn.Module):
            raise CheckpointError("this is a module, not a state dict: pass module.state_dict()")
        if not isinstance(obj, Mapping):
            raise CheckpointError(f"holds a {type(obj).__name__}, expected a dict of tensors")
        averaged = next((key for key in _EMA_WRAPPERS if _has_tensors(obj.get(key))), None)
        plain = next((key for key in _WRAPPERS if _has_tensors(obj.get(key))), None)
        tensors = {key: value for key, value in obj.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if averaged and (ema or not (plain or tensors)):
            if not ema:
                _log.info("the file holds averaged weights only (%s); using them", averaged)
            obj, is_ema = obj[averaged], True
        elif plain:
            obj = obj[plain]
        elif tensors:
            return tensors, is_ema
        else:
            found = ", ".join(str(key) for key in list(obj)[:6]) or "nothing"
            raise CheckpointError(f"holds no tensors (found: {found}), expected a dict of tensors")
    raise CheckpointError(f"is wrapped more than {_DEPTH} times, expected a dict of tensors")


def _has_tensors(value: Any, depth: int = _DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(item, Tensor) or _has_tensors(item, depth - 1) for item in value.values())


def _without_compiled(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def _strip_whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a prefix that all keys share; AveragedModel's step counter does not count as a key."""
    while True:
        keys = [key for key in state if key != "n_averaged"]
        prefix = next((p for p in _WHOLE_PREFIXES if keys and all(key.startswith(p) for key in keys)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): state[key] for key in keys}


def _pick_copy(state: dict[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """One of the two copies in a state dict that keeps its averaged weights under a prefix."""
    prefix = next((p for p in _EMA_PREFIXES if any(key.startswith(p) for key in state)), None)
    if prefix is None:
        if ema:
            raise CheckpointError("holds no averaged (EMA) weights: load it with ema=False")
        return state
    averaged = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return averaged if ema or not others else others


def _only_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    inside = {key.removeprefix(_BACKBONE): value for key, value in state.items() if key.startswith(_BACKBONE)}
    outside = [key for key in state if not key.startswith(_BACKBONE)]
    parts = {key.split(".", 1)[0] for key in inside}
    left = {key.split(".", 1)[0] for key in outside}
    if not inside or parts & left:
        return state
    for key in outside:
        if key in _CLASSIFIER:
            inside[key] = state[key]
    dropped = [key for key in outside if key not in inside]
    if any(key.startswith(_PYRAMID) for key in inside) and any(key.startswith(_BODY) for key in inside):
        dropped += [_BACKBONE + key for key in inside if not key.startswith(_BODY)]
        inside = {key.removeprefix(_BODY): value for key, value in inside.items() if key.startswith(_BODY)}
    if dropped:
        names = ", ".join(sorted({key.split(".", 1)[0] for key in dropped}))
        _log.info("kept %d tensors of the backbone, left out %d others (%s)", len(inside), len(dropped), names)
    return inside
