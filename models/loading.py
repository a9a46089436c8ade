"""From a state dict as published to a state dict that a model takes, and back.

One function, ``fit_state_dict``, serves every way in: ``load_state_dict`` (through a pre-hook, so a backbone inside a
detector takes published keys too), timm's ``pretrained_filter_fn`` and ``create_model(checkpoint_path=...)``. It
converts the layout and resizes tables; nothing else is adapted unless asked for, and what does not fit is an error that
names keys, shapes and the models that would fit.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoints import CheckpointMismatch, convert, describe_mismatch, unwrap
from . import catalog
from .layers import PositionTables
from .published import Published

_logger = logging.getLogger("nearfield.models")

CLASSIFIER = "head.fc"
_DENSE = "body.model."
OURS = "nearfield"
OUTPUT_NORM = re.compile(r"(?:norm|extra_norms\.)(\d+)\.(weight|bias)")
"""Norm of the map of a stage, which detectors and segmentors have: NAT's and Swin's names, BiFormer's."""


class StateDictMismatch(CheckpointMismatch, RuntimeError):  # noqa: N818 - named as its parent
    """A state dict does not fit a model; a RuntimeError too, since that is what ``load_state_dict`` raises."""


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of everything in the model's state dict."""
    return {name: value.shape for name, value in model.state_dict().items()}


def fit_state_dict(state: Mapping[str, Tensor], model: Published) -> dict[str, Tensor]:
    """A state dict of any layout that ``model`` knows, in the model's own layout and table sizes.

    Keys that are the model's own already stay as they are. Bias tables of another window or kernel size are resized
    bicubically, which one log line says. Everything else is left for strict loading to judge.
    """
    expected = shapes_of(model)
    fitted, layout = convert(state, model.layouts, expected)
    if layout is not None:
        _logger.debug("converted %d keys from the %s layout", len(state), layout.name)
    tables = {
        name: place
        for name, place in position_tables(model).items()
        if name in fitted and fitted[name].shape != expected[name]
    }
    # a file of another model is left as it is, for the error to name what the file really holds
    if tables and all(name in fitted for name in expected if not name.startswith(CLASSIFIER)):
        _resize_tables(fitted, tables, model, models_that_fit(state))
    return fitted


def position_tables(model: nn.Module) -> dict[str, tuple[PositionTables, str]]:
    """Where each position table of a model is, by its name in the state dict: the module and the name therein."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        if isinstance(module, PositionTables)
        for name in module.position_tables
    }


def _resize_tables(
    fitted: dict[str, Tensor],
    tables: Mapping[str, tuple[PositionTables, str]],
    model: Published,
    names: Sequence[str],
) -> None:
    """Bring ``tables`` in ``fitted`` to the model's sizes; ``names`` are the models whose file it is, if any's."""
    known = [variant for name in names if (variant := catalog.get(name)) is not None]
    sources = [variant for variant in known if isinstance(model, variant.family)]
    # Swin's and HWT's keys differ in the size of tables alone
    if known and not sources:
        return
    source = sources[0].skeleton() if sources else None
    resized: Counter[str] = Counter()
    for key, (module, name) in tables.items():
        made_in: Any = source and source.get_submodule(key.rpartition(".")[0])
        before = fitted[key]
        try:
            fitted[key] = module.fit_table(name, before, made_in)
        except ValueError as error:
            raise StateDictMismatch(f"{key}: {error}") from None
        if fitted[key] is not before:
            change = ("x".join(map(str, table.shape[-2:])) for table in (before, fitted[key]))
            resized[" to ".join(change)] += 1
    if resized:
        sizes = ", ".join(f"{count} from {change}" for change, count in resized.items())
        _logger.warning("resized relative position tables bicubically: %s", sizes)


def convert_on_load(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict pre-hook: rewrites the entries under ``prefix`` through ``module.fit_state_dict``."""
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    fitted = module.fit_state_dict(own)
    for key in own:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in fitted.items()})


class LoadsPublished(nn.Module):
    """Base of modules whose ``load_state_dict`` takes every published layout, wrapped in a checkpoint or not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(convert_on_load)

    def fit_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given state dict (any layout, no prefix) with this module's keys and table sizes."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, for any published layout; also takes all that a checkpoint file holds.

        Raises:
            StateDictMismatch: keys (when strict) or shapes do not fit; names them, and the models that do fit.
        """
        own = shapes_of(self)
        wrapped = any(not isinstance(value, Tensor) for value in state_dict.values())
        if wrapped or (state_dict and not any(key in own for key in state_dict)):
            state_dict = unwrap(state_dict)
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            difference = describe_mismatch(self.fit_state_dict(state_dict), shapes_of(self))
            if not difference:
                raise
            raise mismatch(difference, unwrap(state_dict) if state_dict else {}, self) from error


def mismatch(difference: str, state: Mapping[str, Tensor], model: nn.Module) -> StateDictMismatch:
    """The error for a state dict that does not fit ``model``, with the names of the models that it does fit."""
    own = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    names = models_that_fit(state)
    advice = "it fits no model of this package"
    if any(OUTPUT_NORM.fullmatch(key) or key.startswith(_DENSE) for key in state):
        advice = "it is the backbone of a detector or segmentor: make the model with features_only=True"
    elif names:
        variant = catalog.get(names[0])
        assert variant is not None
        options = published_options(state, variant.family)
        made = f" made with {', '.join(f'{key}={value}' for key, value in options.items())}" if options else ""
        advice = f"it fits {', '.join(names)}{made}"
    return StateDictMismatch(f"the checkpoint does not fit {own}: {difference}; {advice}")


def models_that_fit(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the registered models whose keys and shapes are exactly those of ``state`` (any layout, any head).

    Models that differ in nothing that a file stores (NAT and DiNAT: the dilation is no parameter) are all named.
    """
    return list(layouts_that_fit(state))


def layouts_that_fit(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What ``models_that_fit`` names, each with the name of the layout that the file has for it.

    That is one of the family's ``layouts``, or ``OURS`` where the keys are this package's own.
    """
    converted: dict[Any, tuple[dict[str, Tensor], str]] = {}
    fitting = {}
    for variant in catalog.variants():
        layouts = variant.family.layouts
        if layouts not in converted:
            converted[layouts] = _converted_or_empty(state, layouts)
        theirs, layout = converted[layouts]
        if theirs and _fits(theirs, variant):
            fitting[variant.name] = layout
    return fitting


def _converted_or_empty(state: Mapping[str, Tensor], layouts: Any) -> tuple[dict[str, Tensor], str]:
    try:
        converted, layout = convert(state, layouts)
    except CheckpointMismatch:
        return {}, OURS
    return converted, OURS if layout is None else layout.name


def _fits(state: Mapping[str, Tensor], variant: catalog.Variant) -> bool:
    body = {key: value.shape for key, value in state.items() if not key.startswith(CLASSIFIER)}
    conv = f"{variant.family.first_conv}.weight"
    if len(body.get(conv, ())) != 4:
        return False
    out, _, *kernel = body[conv]
    return {**body, conv: torch.Size((out, 3, *kernel))} == variant.shapes


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Published) -> dict[str, Tensor]:
    """timm's ``pretrained_filter_fn``: unwrapped, converted, resized, and strictly checked.

    The classifier and the first convolution are not checked: timm adapts them afterwards to another number of classes
    or channels.
    """
    fitted = fit_state_dict(unwrap(state_dict), model)
    adapted = (CLASSIFIER, model.first_conv)
    ours = {key: value for key, value in fitted.items() if not key.startswith(adapted)}
    expected = {key: shape for key, shape in shapes_of(model).items() if not key.startswith(adapted)}
    difference = describe_mismatch(ours, expected)
    if difference:
        raise mismatch(difference, unwrap(state_dict), model)
    return fitted


def bare_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's own keys, where they are those of a detector's or segmentor's ``DenseBackbone``.

    Its output norms are left out, which one log line says.
    """
    body = {key.removeprefix(_DENSE): value for key, value in state.items() if key.startswith(_DENSE)}
    if not body:
        return state
    tell_norms_left_out([key for key in state if not key.startswith(_DENSE)])
    return body


def tell_norms_left_out(keys: Sequence[str]) -> None:
    """One log line, if there are any."""
    if keys:
        told = "left out the norms that the file's detector or segmentor puts on its maps (%s): DenseBackbone has them"
        _logger.warning(told, ", ".join(keys))


def published_options(state: Mapping[str, Tensor], family: type[Published]) -> dict[str, int]:
    """``num_classes`` (0 without a classifier) and ``in_chans`` of the model that a file was saved from.

    What its keys do not tell is left out.
    """
    state, _ = _converted_or_empty(state, family.layouts)
    options = {}
    for option, key, axis in (
        ("num_classes", f"{CLASSIFIER}.weight", 0),
        ("in_chans", f"{family.first_conv}.weight", 1),
    ):
        if key in state and state[key].ndim > axis:
            options[option] = state[key].shape[axis]
    if "in_chans" in options:
        options.setdefault("num_classes", 0)
    return options


def adapt_state_dict(state: Mapping[str, Tensor], model: Published) -> dict[str, Tensor]:
    """Fit a state dict to a model with another number of classes or input channels; each change is one log line.

    The head of another class count is left out in favour of the model's own, newly drawn one; the first convolution is
    summed or repeated over channels as timm does.
    """
    fitted = fit_state_dict(state, model)
    own = model.state_dict()
    weight, bias = f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"
    theirs, ours = (side[weight].shape[0] if weight in side else 0 for side in (fitted, own))
    if theirs != ours:
        told = f"drawn anew for {ours} classes" if ours else "left out"
        if theirs:
            _logger.warning("the classifier of %d classes in the file is %s", theirs, told)
        elif f"{model.first_conv}.weight" in fitted:
            _logger.warning("the file has no classifier: it is %s", told)
        for key in (weight, bias):
            fitted.pop(key, None)
            if key in own:
                fitted[key] = own[key]
    conv = f"{model.first_conv}.weight"
    if conv in fitted and fitted[conv].ndim == 4 and fitted[conv].shape[1] != model.in_chans:
        base = fitted[conv].shape[1]
        fitted[conv] = adapt_input_conv(model.in_chans, fitted[conv], base_chans=base)
        _logger.warning("the first convolution is adapted from %d to %d input channels", base, model.in_chans)
    return fitted


def export_state_dict(model: Published, layout: str) -> dict[str, Tensor]:
    """The model's weights in a published layout, bit for bit.

    Args:
        model: a backbone of this package.
        layout: name of one of ``model.layouts``.

    Raises:
        ValueError: the family has no layout of that name.
    """
    for known in model.layouts:
        if known.name == layout:
            return known.to_theirs(model.state_dict())
    names = ", ".join(known.name for known in model.layouts)
    raise ValueError(f"layout={layout!r} is unknown for {type(model).__name__}: known are {names}")
