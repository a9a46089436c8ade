"""Weights into detectors and segmentors: files of this package, of mmdet and mmseg, and bare backbones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ...checkpoints import Layout, convert, read, resolve, unwrap
from ..loading import OUTPUT_NORM, convert_on_load, shapes_of
from .backbone import DenseBackbone, check_fits
from .published import DETECTOR_BODY, SEGMENTOR_BODY

_logger = logging.getLogger("nearfield.models")


class LoadsPublishedDense(nn.Module):
    """Base of models on a ``DenseBackbone`` whose ``load_state_dict`` takes published keys and whole checkpoint files.

    Class attributes, set by the models: ``layouts`` (published layouts of what is not the backbone), ``body`` (prefix
    of the keys of the ``DenseBackbone``), ``optional`` (parts that a file or a model may do without, and what matches
    their keys) and ``classifiers`` (matches the keys whose first axis has the classes).
    """

    layouts: ClassVar[tuple[Layout, ...]] = ()
    body: ClassVar[str]
    optional: ClassVar[Mapping[str, re.Pattern[str]]] = {}
    classifiers: ClassVar[re.Pattern[str]]

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(convert_on_load)

    def fit_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given state dict with this model's keys for all but the backbone, which rewrites its own."""
        return convert(state, self.layouts, shapes_of(self))[0]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, for published keys too; also takes all that a checkpoint file holds."""
        if any(not isinstance(value, Tensor) for value in state_dict.values()):
            state_dict = _as_saved(unwrap(state_dict, backbone=False))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def read_dense(source: str | Path | None) -> dict[str, Tensor] | None:
    """The state dict of a detector or segmentor, None where ``source`` (see ``checkpoints.resolve``) is a classifier.

    Raises:
        CheckpointError: the file cannot be had or is none.
    """
    if not source:
        return None
    state = _as_saved(read(resolve(source), backbone=False))
    return state if any(key.startswith((SEGMENTOR_BODY, DETECTOR_BODY)) for key in state) else None


def load_dense(model: LoadsPublishedDense, state: Mapping[str, Tensor]) -> None:
    """Load a detector's or segmentor's file: all of it into one of the same kind, else its backbone alone.

    Args:
        model: made for any number of classes: classifiers for another number stay as they were drawn.
        state: what ``read_dense`` gives.

    Raises:
        CheckpointMismatch: its backbone or its heads are others than the model's.
    """
    fitted = model.fit_state_dict(state)
    own = shapes_of(model)
    # in a file of another kind of model the backbone may lie elsewhere
    bodies = (model.body, DETECTOR_BODY, SEGMENTOR_BODY)
    body = next(prefix for prefix in bodies if any(key.startswith(prefix) for key in fitted))
    inside = {key.removeprefix(body): value for key, value in fitted.items() if key.startswith(body)}
    heads = {key: value for key, value in fitted.items() if not key.startswith(body)}
    wanted = {key: shape for key, shape in own.items() if not key.startswith(model.body)}
    backbone = cast(DenseBackbone, model.get_submodule(model.body.rstrip(".")))
    backbone.load_weights(inside)
    if shapes_of(backbone.norms) and not any(OUTPUT_NORM.fullmatch(key) or key.startswith("norms.") for key in inside):
        _logger.warning("the file has no output norms, the model has: make it with out_norm='none' to compute the same")
    # detectors of different kinds have a pyramid in common, and more
    if 2 * len(heads.keys() & wanted.keys()) < max(len(heads), len(wanted)):
        _logger.warning("the file has other heads (%s): its backbone alone is loaded", _parts(heads))
        return
    notes = []
    for part, keys in model.optional.items():
        there, here = (any(keys.match(key) for key in side) for side in (heads, wanted))
        if there != here:
            notes.append(f"{part} is {'left out' if there else 'not in the file'}")
            heads = {key: value for key, value in heads.items() if not keys.match(key)}
            wanted = {key: shape for key, shape in wanted.items() if not keys.match(key)}
    anew = [
        key
        for key, shape in wanted.items()
        if model.classifiers.fullmatch(key) and key in heads and heads[key].shape[0] != shape[0]
    ]
    if anew:
        theirs, ours = heads[anew[0]].shape[0], wanted[anew[0]][0]
        notes.append(f"the classifiers, with {theirs} outputs in the file and {ours} here, stay as drawn")
    heads = {key: value for key, value in heads.items() if key not in anew}
    wanted = {key: shape for key, shape in wanted.items() if key not in anew}
    check_fits(heads, wanted, "the heads")
    nn.Module.load_state_dict(model, heads, strict=False)
    if notes:
        _logger.warning("%s", "; ".join(notes))


def _as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the ``model.`` of this package's detectors, which ``unwrap`` takes off as a wrapper's."""
    own = any(key.startswith("backbone.fpn.") for key in state)
    return {f"model.{key}": value for key, value in state.items()} if own else state


def _parts(keys: Iterable[str]) -> str:
    bare = (key.removeprefix("model.").removeprefix("backbone.") for key in keys)
    return ", ".join(sorted({key.partition(".")[0] for key in bare})) or "none"
