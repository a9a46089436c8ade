"""What the heads of detectors can be asked for: one dataclass for each, with the published values as defaults."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_logger = logging.getLogger("nearfield.models")

BOX_LOSSES = ("smooth_l1", "giou")
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Of every head.

    Attributes:
        score_threshold, nms_threshold, detections: results have at least this score, overlap others of their class by
            at most this IoU, and are at most so many for an image.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        self._at_least(1, "detections")
        self._shares("score_threshold", "nms_threshold")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an int of at least {least}")

    def _shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a number from 0 to 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_positive(values: Any) -> bool:
    """Whether it is a sequence of numbers above 0, or of such sequences; not an empty one."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return False
    return all(value > 0 if _is_number(value) else _are_positive(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class FCOSOptions(HeadOptions):
    """Of ``fcos``, which has no anchors."""

    nms_threshold: float = 0.6


@dataclass(frozen=True, kw_only=True)
class AnchorOptions(HeadOptions):
    """Of heads with anchors, ``retinanet`` among them.

    Attributes:
        anchor_sizes: square roots of the anchors' areas in pixels, one entry (or a sequence of several) for each map of
            the pyramid; default 8 strides, or for ``retinanet`` 4, 5.04 and 6.35.
        aspect_ratios: height / width.
    """

    anchor_sizes: Sequence[float | Sequence[float]] | None = None
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("aspect_ratios", "anchor_sizes"):
            value = getattr(self, name)
            if value is not None and not _are_positive(value):
                raise ValueError(f"{name}={value!r} must be numbers above 0, at least one")


@dataclass(frozen=True, kw_only=True)
class RegionOptions(AnchorOptions):
    """Of R-CNNs, the cascades included.

    Attributes:
        proposals: boxes that the proposal network hands on for an image, out of the best of each map: so many, in
            training twice as many.
        samples: proposals of an image on which the box heads are trained, at most a quarter of them true.
        box_convs: convolutions with batch norm before the box heads' linear layers; with none there are two linear
            layers, else one.
        box_features: channels of those linear layers.
        box_loss: ``smooth_l1``, or in cascades ``giou``.
        class_agnostic: predict one box instead of one for each class.
        sampling_ratio: samples a side in each cell when regions are pooled; 0 for as many as it has pixels.
    """

    proposals: int = 1000
    samples: int = 512
    box_convs: int = 0
    box_features: int = 1024
    box_loss: str = "smooth_l1"
    class_agnostic: bool = False
    sampling_ratio: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "proposals", "samples", "box_features")
        self._at_least(0, "box_convs", "sampling_ratio")
        if not isinstance(self.class_agnostic, bool):
            raise ValueError(f"class_agnostic={self.class_agnostic!r} must be True or False")
        if self.box_loss not in BOX_LOSSES or (self.box_loss == "giou" and not isinstance(self, CascadeOptions)):
            losses = " or ".join(BOX_LOSSES)
            raise ValueError(f"box_loss={self.box_loss!r} must be {losses}, the second for cascades alone")


@dataclass(frozen=True, kw_only=True)
class MaskOptions(RegionOptions):
    """Of R-CNNs with mask heads.

    Attributes:
        mask_convs, mask_channels, mask_size: convolutions, their channels, cells a side of a mask (even).
        mask_threshold: probability from which a pixel belongs to an object; None to leave masks as probabilities.
    """

    mask_convs: int = 4
    mask_channels: int = 256
    mask_size: int = 28
    mask_threshold: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "mask_channels")
        self._at_least(0, "mask_convs")
        self._at_least(2, "mask_size")
        if self.mask_size % 2:
            raise ValueError(f"mask_size={self.mask_size} must be even: the last layer doubles it")
        if self.mask_threshold is not None:
            self._shares("mask_threshold")


@dataclass(frozen=True, kw_only=True)
class CascadeOptions(RegionOptions):
    """Of cascades.

    Attributes:
        stage_ious, stage_box_weights, stage_loss_weights: one entry for each stage: overlap from which a proposal is an
            object, scales of the box deltas, weight of the losses. Files of mmdetection 2 have 1 / 0.033 and 1 / 0.067
            where the paper, and the default, has 30 and 15.
    """

    box_convs: int = 4
    box_loss: str = "giou"
    stage_ious: Sequence[float] = (0.5, 0.6, 0.7)
    stage_box_weights: Sequence[Sequence[float]] = BOX_WEIGHTS
    stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stage_ious", "stage_box_weights", "stage_loss_weights"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or (value and not _are_positive(value)):
                raise ValueError(f"{name}={value!r} must be numbers above 0, one entry for each stage")
        if max(self.stage_ious, default=0) > 1:
            raise ValueError(f"stage_ious={self.stage_ious!r} must be overlaps, at most 1")
        counts = [len(entries) for entries in (self.stage_ious, self.stage_box_weights, self.stage_loss_weights)]
        if not counts[0] or len(set(counts)) > 1:
            raise ValueError(
                f"stage_ious, stage_box_weights and stage_loss_weights have {counts[0]}, {counts[1]} and {counts[2]} "
                "entries: give one for each stage"
            )


@dataclass(frozen=True, kw_only=True)
class CascadeMaskOptions(CascadeOptions, MaskOptions):
    """Of cascades with mask heads; what both have is the cascades'."""


OPTIONS: dict[str, type[HeadOptions]] = {
    "mask_rcnn": MaskOptions,
    "faster_rcnn": RegionOptions,
    "cascade_mask_rcnn": CascadeMaskOptions,
    "cascade_rcnn": CascadeOptions,
    "retinanet": AnchorOptions,
    "fcos": FCOSOptions,
}
"""The heads, and what each of them takes."""

NAMES = {field.name for options in OPTIONS.values() for field in fields(options)}
"""Every option of any head."""
_MAY_BE_NONE = ("anchor_sizes", "mask_threshold")


def options_of(head: str, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The options of a head out of keyword arguments, and those that are options of no head.

    None stands for the default, where the option may not be None. One log line names options of other heads.

    Raises:
        ValueError: unknown head, a value that is not allowed.
    """
    if head not in OPTIONS:
        raise ValueError(f"head={head!r} must be one of {', '.join(OPTIONS)}")
    own = {field.name for field in fields(OPTIONS[head])}
    spare = sorted(name for name in given if name in NAMES and name not in own)
    if spare:
        _logger.warning("%s does not read %s", head, ", ".join(spare))
    values = {
        name: value for name, value in given.items() if name in own and (value is not None or name in _MAY_BE_NONE)
    }
    return OPTIONS[head](**values), {name: value for name, value in given.items() if name not in NAMES}
