"""The maps that detectors and segmentors take from a backbone: one for each stage, with the published output norms."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Format
from timm.models import group_parameters
from torch import Tensor, nn

from ... import checkpoints
from ...checkpoints import CheckpointMismatch, describe_mismatch
from .. import catalog
from ..backbone import take_stages
from ..features import Features
from ..loading import OUTPUT_NORM, convert_on_load, shapes_of
from ..registry import create_model, forget_state_dict, load_weights, read_weights

_logger = logging.getLogger("nearfield.models")

_BODY, _NORMS = "body.", "norms."
OUT_NORMS = ("auto", "layer", "none")


class DenseBackbone(nn.Module):
    """Feature maps of a backbone, each with a norm of its own where the published models have one.

    Args:
        name: a model of this package or of timm, as for ``create_model``.
        task: ``detection`` or ``segmentation``: dilations and regions are those published for it.
        out_indices: stages whose maps are taken, negative from the end; None for all (of a timm model, the last of each
            stride from 4 on).
        out_norm: ``layer`` puts a layer norm over the channels of every map, ``none`` none; ``auto`` does what the
            authors of the family did in their detectors and segmentors (timm's models: none).
        pretrained: load the published classifier, without its head.
        checkpoint_path: load this file instead, whatever ``create_model`` takes (a classifier's head is left out,
            tables of another size are resized), or the backbone of a detector or segmentor with its output norms.
        in_chans: channels of the images.
        norm_eval: keep the running statistics of batch norms as they are also in training, for small batches on a
            pretrained backbone (what the published BiFormer detectors do).
        **kwargs: arguments of the model.

    Attributes:
        body: what makes the maps.
        norms: one norm (or Identity) for each of them.
        channels, strides: of each map.
        stages: the stage of each map (of a timm model: empty).

    Raises:
        ValueError: unknown name, argument or option.
        CheckpointError: the file cannot be had or does not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        task: str = "detection",
        out_indices: Sequence[int] | None = None,
        out_norm: str = "auto",
        pretrained: bool = False,
        checkpoint_path: str | Path | None = None,
        in_chans: int = 3,
        norm_eval: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if out_norm not in OUT_NORMS:
            raise ValueError(f"out_norm={out_norm!r} must be one of {', '.join(OUT_NORMS)}")
        variant = catalog.get(name.partition(".")[0])
        options = {**kwargs, "features_only": True, "in_chans": in_chans}
        body: Any
        if variant is not None:
            options |= {"task": task, "out_indices": out_indices}
            body = create_model(name, pretrained, **options)
            # the norms are of the last axis
            body.output_fmt = Format.NHWC
        else:
            body = _timm_features(name, pretrained, checkpoint_path, out_indices, options)
        self.name = name
        self.body = body
        self.norm_eval = norm_eval
        self.stages: list[int] = list(body.out_indices) if variant is not None else []
        self.channels: list[int] = body.feature_info.channels()
        self.strides: list[int] = body.feature_info.reduction()
        published = None if variant is None else variant.family.out_norm
        make: Callable[..., nn.Module] = nn.Identity
        if out_norm == "layer" or (out_norm == "auto" and published is not None):
            make = published or nn.LayerNorm
        self.norms = nn.ModuleList(make(channels) for channels in self.channels)
        self.pretrained_cfg: dict[str, Any] = body.pretrained_cfg
        self.register_load_state_dict_pre_hook(convert_on_load)
        if checkpoint_path and variant is not None:
            self.load_weights(read_weights(checkpoint_path, variant.name))

    def fit_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of any layout with this module's keys; what the body has to convert is left to it.

        Output norms are taken by the stage in their name; those that the model does not have are left out, which one
        log line says.
        """
        if not isinstance(self.body, Features) or any(key.startswith(_BODY) for key in state):
            return dict(state)
        own = shapes_of(self.norms)
        fitted = {}
        unused = set()
        for key, value in state.items():
            norm = OUTPUT_NORM.fullmatch(key)
            if norm is None:
                fitted[_BODY + key] = value
                continue
            stage, leaf = int(norm[1]), norm[2]
            name = f"{self.stages.index(stage)}.{leaf}" if stage in self.stages else ""
            if name in own:
                fitted[_NORMS + name] = value
            else:
                unused.add(stage)
        _tell_unused_norms(unused)
        return fitted

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load a backbone's weights: a classifier's, or those of a detector or segmentor with their output norms.

        The head of a classifier is left out, tables are resized, the first convolution is adapted to the channels of
        images, and norms that the file does not have stay as they are.

        Raises:
            CheckpointMismatch: it is another model's.
        """
        fitted = self.fit_state_dict(state)
        body = {key.removeprefix(_BODY): value for key, value in fitted.items() if key.startswith(_BODY)}
        if isinstance(self.body, Features):
            load_weights(self.body, {key.removeprefix("model."): value for key, value in body.items()})
        else:
            check_fits(body, shapes_of(self.body), "the backbone")
            self.body.load_state_dict(body)
        norms = {key.removeprefix(_NORMS): value for key, value in fitted.items() if key.startswith(_NORMS)}
        if norms:
            self.norms.load_state_dict(self._norms_here(norms), strict=False)

    def _norms_here(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Norms of a model of this package by their place here: it may take other stages, told by their widths."""
        own = shapes_of(self.norms)
        place = {width: i for i, width in enumerate(self.channels)}
        here, unused = {}, set()
        for key, value in norms.items():
            index, leaf = key.split(".")
            name = f"{place.get(value.shape[0])}.{leaf}"
            if name in own:
                here[name] = value
            else:
                unused.add(int(index))
        _tell_unused_norms(unused)
        return here

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_chans, H, W) to maps (B, channels[i], H / strides[i], W / strides[i])."""
        maps = self.body(x)
        if self.body.output_fmt == Format.NCHW:
            maps = [y.permute(0, 2, 3, 1) for y in maps]
        # channels-last in memory, as the backbones make them
        return [norm(y).permute(0, 3, 1, 2) for norm, y in zip(self.norms, maps, strict=True)]

    def train(self, mode: bool = True) -> DenseBackbone:
        """As ``nn.Module.train``; batch norms stay in evaluation when ``norm_eval``."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of storing them."""
        body = self.body if hasattr(self.body, "set_grad_checkpointing") else self.body.model
        body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides norms and biases."""
        inner, prefix = self._inner()
        names = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
        return {prefix + name for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layer groups for layer decay: those of the backbone, then the output norms with the heads.

        Args:
            coarse: groups are stages instead of blocks.

        Returns:
            a function from the name of a parameter to its group, infinite for what is not the backbone's.
        """
        inner, prefix = self._inner()
        groups: dict[str, int] = {}
        if hasattr(inner, "group_matcher"):
            groups = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        named = {prefix + name: (float(group),) for name, group in groups.items()}
        return lambda name: named.get(name, (float("inf"),))

    def _inner(self) -> tuple[Any, str]:
        """The bare backbone, and the prefix of its parameters here."""
        inner = getattr(self.body, "model", None)
        return (self.body, "body.") if inner is None else (inner, "body.model.")


def _tell_unused_norms(stages: Iterable[int]) -> None:
    which = ", ".join(str(stage) for stage in sorted(stages))
    if which:
        _logger.warning("the file's output norms of stages %s are left out: the model has none there", which)


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Any], what: str) -> None:
    """CheckpointMismatch, which names the keys, unless ``state`` has exactly the ``expected`` keys and shapes."""
    difference = describe_mismatch(state, expected)
    if difference:
        raise CheckpointMismatch(f"{what} in the file and in the model differ: {difference}")


def _timm_features(
    name: str,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    out_indices: Sequence[int] | None,
    options: dict[str, Any],
) -> nn.Module:
    """timm's feature extractor, by ``forward_intermediates`` where the model has it: that keeps the model's groups.

    Raises:
        CheckpointError: the file cannot be had, or is that of another model.
    """
    with torch.device("meta"):
        whole: Any = create_model(name)
    if out_indices is None:
        last = {info["reduction"]: i for i, info in enumerate(whole.feature_info) if info["reduction"] >= 4}
        out_indices = list(last.values())
    options["out_indices"] = take_stages(out_indices, len(whole.feature_info), "out_indices")
    if hasattr(whole, "forward_intermediates"):
        options["feature_cls"] = "getter"
    if checkpoint_path:
        return _timm_features_of(checkpoints.read(checkpoints.resolve(checkpoint_path)), name, options)
    return create_model(name, pretrained, **options)


def _timm_features_of(state: Mapping[str, Tensor], name: str, options: Mapping[str, Any]) -> nn.Module:
    """timm's feature extractor with the weights of a file.

    Given to timm as a file to load they would go into the extractor, whose names differ; as published weights they go
    into the model inside. Timm then loads what has the same name, and be it nothing, and only logs what is missing.
    """
    log = logging.getLogger("timm.models._builder")
    level, unfound = log.level, _Unfound(log.getEffectiveLevel())
    log.addFilter(unfound)
    log.setLevel(logging.INFO)
    try:
        body: Any = create_model(name, True, **options, pretrained_cfg_overlay={"state_dict": dict(state)})
    except (RuntimeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointMismatch(f"the file and {name} differ: {type(error).__name__}: {reason}") from error
    finally:
        log.removeFilter(unfound)
        log.setLevel(level)
    forget_state_dict(body)
    # extractors write dots of names as underscores
    needed = {re.sub(r"[._]", "", key.removeprefix("model.")) for key, _ in body.named_parameters()}
    lacking = [key for key in unfound.keys if re.sub(r"[._]", "", key) in needed]
    if lacking:
        more = " ..." if len(lacking) > 6 else ""
        raise CheckpointMismatch(f"the file is of another model than {name}: it lacks {', '.join(lacking[:6])}{more}")
    return body


class _Unfound(logging.Filter):
    """The keys that timm says it did not find in a state dict; records below ``level`` go no further."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        self.keys: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes the keys out of a record; whether it is shown."""
        found = re.match(r"Missing keys \((.*?)\)", record.getMessage())
        if found:
            self.keys += found[1].split(", ")
        return record.levelno >= self.level
