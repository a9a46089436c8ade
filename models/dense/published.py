"""Files of mmdet and mmseg, as the authors of NAT, DiNAT, Swin and BiFormer publish them, into models of this package.

Such a file holds a backbone with one norm for each map (``backbone.norm0`` to ``norm3``, BiFormer's ``extra_norms``)
and, beside it, a decoder (mmseg: ``decode_head``, ``auxiliary_head``, ``neck``) or a detector (mmdet: ``neck``,
``rpn_head``, ``roi_head``). Every module here rewrites the keys of its own part when it is loaded: the segmentor its
heads, the ``DenseBackbone`` its norms, the backbone the rest. mmdet 2 and 3, and mmseg 0 and 1, have the same keys.

A segmentor of such a file computes what mmseg computes, and a Mask R-CNN or a cascade finds what mmdet finds, with the
same scores and boxes (tests/golden/dense): anchors, their order, the pooling of regions and the scales of boxes are
mmdet's, see ``geometry``. Four things differ. Windows of Swin are not shifted along an axis on which a map is a single
window (sides of up to 224 pixels with windows of 7), where mmdet shifts all. Masks are pasted into the image by
torchvision, which rounds boxes to pixels. Boxes that shrink to less than 1/62 of their anchor are not kept at that
(mmdet's ``wh_ratio_clip``). Images are scaled by PyTorch, not by OpenCV.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...checkpoints import CheckpointMismatch, Layout, Rule, convert, describe_mismatch, read, resolve, unwrap
from ..features import Features
from ..loading import OUTPUT_NORM, convert_on_load, shapes_of
from ..registry import load_weights

if TYPE_CHECKING:
    from .backbone import DenseBackbone

_logger = logging.getLogger("nearfield.models")

_BACKBONE = "backbone."
_OURS = "body."


def _conv_norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """mmcv's ConvModule -> ConvNormReLU."""
    return Rule(f"{theirs}.conv.{{rest}}", f"{ours}.conv.{{rest}}"), Rule(
        f"{theirs}.bn.{{rest}}", f"{ours}.norm.{{rest}}"
    )


_FCN = (
    *_conv_norm("auxiliary_head.convs.{i}", "aux_head.convs.{i}"),
    Rule("auxiliary_head.conv_seg.{rest}", "aux_head.classifier.conv.{rest}"),
)

UPERNET = Layout(
    name="mmseg-upernet",
    source="open-mmlab/mmsegmentation, mmseg/models/decode_heads/uper_head.py, psp_head.py and fcn_head.py",
    signature=("decode_head.psp_modules.0.1.conv.weight",),
    rules=(
        *_conv_norm("decode_head.psp_modules.{i}.1", "head.pool.convs.{i}"),
        *_conv_norm("decode_head.bottleneck", "head.pool.fuse"),
        *_conv_norm("decode_head.lateral_convs.{i}", "head.laterals.{i}"),
        *_conv_norm("decode_head.fpn_convs.{i}", "head.outputs.{i}"),
        *_conv_norm("decode_head.fpn_bottleneck", "head.fuse"),
        Rule("decode_head.conv_seg.{rest}", "head.classifier.conv.{rest}"),
        *_FCN,
    ),
)

SEMANTIC_FPN = Layout(
    name="mmseg-fpn",
    source="open-mmlab/mmsegmentation, mmseg/models/decode_heads/fpn_head.py and necks/fpn.py",
    signature=("decode_head.scale_heads.0.0.conv.weight", "neck.lateral_convs.0.conv.weight"),
    rules=(
        Rule("neck.lateral_convs.{i}.conv.{rest}", "head.fpn.inner_blocks.{i}.0.{rest}"),
        Rule("neck.fpn_convs.{i}.conv.{rest}", "head.fpn.layer_blocks.{i}.0.{rest}"),
        # every second of theirs is a doubling
        *_conv_norm("decode_head.scale_heads.{i}.0", "head.scales.{i}.convs.0"),
        *_conv_norm("decode_head.scale_heads.{i}.2", "head.scales.{i}.convs.1"),
        *_conv_norm("decode_head.scale_heads.{i}.4", "head.scales.{i}.convs.2"),
        Rule("decode_head.conv_seg.{rest}", "head.classifier.conv.{rest}"),
        *_FCN,
    ),
)


@dataclass(frozen=True)
class BackgroundFirst:
    """Rows of classes and background, which mmdet has last and torchvision first."""

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """(classes + 1, ...) -> (1 + classes, ...)."""
        return tensor.roll(1, 0)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """(1 + classes, ...) -> (classes + 1, ...)."""
        return tensor.roll(-1, 0)


@dataclass(frozen=True)
class WithBackground:
    """Rows of each class, to which torchvision adds some for background that nothing reads.

    Args:
        rows: of each class.
    """

    rows: int

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """(classes * rows, ...) -> ((1 + classes) * rows, ...); what is the same for all classes stays."""
        if shape is not None and tensor.shape[0] == shape[0] == self.rows:
            return tensor
        return torch.cat([torch.zeros_like(tensor[: self.rows]), tensor])

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """((1 + classes) * rows, ...) -> (classes * rows, ...)."""
        return tensor if tensor.shape[0] == self.rows else tensor[self.rows :]


_DETECTOR = "model.backbone.body."
_PROPOSALS = (
    Rule("backbone.{rest}", _DETECTOR + "{rest}"),
    Rule("neck.lateral_convs.{i}.conv.{rest}", "model.backbone.fpn.inner_blocks.{i}.0.{rest}"),
    Rule("neck.fpn_convs.{i}.conv.{rest}", "model.backbone.fpn.layer_blocks.{i}.0.{rest}"),
    Rule("rpn_head.rpn_conv.{rest}", "model.rpn.head.conv.0.0.{rest}"),
    Rule("rpn_head.rpn_cls.{rest}", "model.rpn.head.cls_logits.{rest}"),
    Rule("rpn_head.rpn_reg.{rest}", "model.rpn.head.bbox_pred.{rest}"),
)


def _regions(stage: str, box_head: Mapping[str, str]) -> tuple[Rule, ...]:
    """mmdet's box and mask heads -> torchvision's RoIHeads.

    Args:
        stage: what comes after the names of theirs, ``{s}.`` in a cascade.
        box_head: templates of what is before the box head's predictions.
    """
    ours = f"model.roi_heads.{'stages.' if stage else ''}{stage}"
    box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
    return (
        *(Rule(f"{box}{a}.{{rest}}", f"{ours}box_head.{b}.{{rest}}") for a, b in box_head.items()),
        Rule(f"{box}fc_cls.{{rest}}", f"{ours}box_predictor.cls_score.{{rest}}", BackgroundFirst()),
        Rule(f"{box}fc_reg.{{rest}}", f"{ours}box_predictor.bbox_pred.{{rest}}", WithBackground(4)),
        Rule(f"{mask}convs.{{i}}.conv.{{rest}}", f"{ours}mask_head.{{i}}.0.{{rest}}"),
        Rule(f"{mask}upsample.{{rest}}", f"{ours}mask_predictor.conv5_mask.{{rest}}"),
        Rule(f"{mask}conv_logits.{{rest}}", f"{ours}mask_predictor.mask_fcn_logits.{{rest}}", WithBackground(1)),
    )


MASK_RCNN = Layout(
    name="mmdet-rcnn",
    source="open-mmlab/mmdetection, configs/_base_/models/mask_rcnn_r50_fpn.py",
    signature=("rpn_head.rpn_conv.weight", "roi_head.bbox_head.shared_fcs.1.weight"),
    rules=(*_PROPOSALS, *_regions("", {"shared_fcs.0": "fc6", "shared_fcs.1": "fc7"})),
)

CASCADE = Layout(
    name="mmdet-cascade",
    source="SwinTransformer/Swin-Transformer-Object-Detection, configs/swin/cascade_mask_rcnn_swin_*_giou_4conv1f_*.py",
    signature=("rpn_head.rpn_conv.weight", "roi_head.bbox_head.0.shared_convs.3.conv.weight"),
    rules=(
        *_PROPOSALS,
        # the linear layer comes after four convolutions and a flattening
        *_regions(
            "{s}.",
            {"shared_convs.{i}.conv": "{i}.0", "shared_convs.{i}.bn": "{i}.1", "shared_fcs.0": "5"},
        ),
    ),
)


class LoadsPublishedDense(nn.Module):
    """Base of models on a ``DenseBackbone`` whose ``load_state_dict`` takes published keys and whole checkpoint files.

    Class attributes, set by the models: ``layouts`` (published layouts of what is not the backbone), ``body`` (prefix
    of the keys of the ``DenseBackbone``), ``optional`` (parts that a file or a model may do without, and what matches
    their keys) and ``classifiers`` (matches the keys whose first axis has the classes).
    """

    layouts: ClassVar[tuple[Layout, ...]] = ()
    body: ClassVar[str] = _BACKBONE
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


def fit_backbone(state: Mapping[str, Tensor], backbone: DenseBackbone) -> dict[str, Tensor]:
    """A backbone's state dict, of any published layout, with the keys of a ``DenseBackbone``.

    Output norms are taken by the stage in their name; those that the model does not have are left out, which one log
    line says. What the body has to convert is left to it.
    """
    if not isinstance(backbone.body, Features) or any(key.startswith(_OURS) for key in state):
        return dict(state)
    stages = backbone.stages
    own = shapes_of(backbone.norms)
    fitted = {}
    unused = set()
    for key, value in state.items():
        norm = OUTPUT_NORM.fullmatch(key)
        if norm is None:
            fitted[_OURS + key] = value
            continue
        stage, leaf = int(norm[1]), norm[2]
        name = f"{stages.index(stage)}.{leaf}" if stage in stages else ""
        if name in own:
            fitted[f"norms.{name}"] = value
        else:
            unused.add(stage)
    _tell_unused_norms(unused)
    return fitted


def _tell_unused_norms(stages: Iterable[int]) -> None:
    which = ", ".join(str(stage) for stage in sorted(stages))
    if which:
        _logger.warning("the file's output norms of stages %s are left out: the model has none there", which)


def load_backbone(backbone: DenseBackbone, state: Mapping[str, Tensor]) -> None:
    """Load a backbone's weights: a classifier's, or those of a detector or segmentor with their output norms.

    The head of a classifier is left out, tables are resized, the first convolution is adapted to the channels of
    images, and norms that the file does not have stay as they are.

    Raises:
        CheckpointMismatch: it is another model's.
    """
    fitted = fit_backbone(state, backbone)
    body = {key.removeprefix(_OURS): value for key, value in fitted.items() if key.startswith(_OURS)}
    if isinstance(backbone.body, Features):
        load_weights(backbone.body, {key.removeprefix("model."): value for key, value in body.items()})
    else:
        _check(body, shapes_of(backbone.body), "the backbone")
        backbone.body.load_state_dict(body)
    norms = {key.removeprefix("norms."): value for key, value in fitted.items() if key.startswith("norms.")}
    if norms:
        norms = _norms_here(norms, backbone)
        backbone.norms.load_state_dict(norms, strict=False)


def _norms_here(norms: Mapping[str, Tensor], backbone: DenseBackbone) -> dict[str, Tensor]:
    """Norms of a model of this package by their place in another: it may take other stages, told by their widths."""
    own = shapes_of(backbone.norms)
    place = {width: i for i, width in enumerate(backbone.channels)}
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


def read_dense(source: str | Path | None) -> dict[str, Tensor] | None:
    """The state dict of a detector or segmentor, None where ``source`` (see ``checkpoints.resolve``) is a classifier.

    Raises:
        CheckpointError: the file cannot be had or is none.
    """
    if not source:
        return None
    state = _as_saved(read(resolve(source), backbone=False))
    return state if any(key.startswith((_BACKBONE, _DETECTOR)) for key in state) else None


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
    body = next(
        prefix for prefix in (model.body, _DETECTOR, _BACKBONE) if any(key.startswith(prefix) for key in fitted)
    )
    inside = {key.removeprefix(body): value for key, value in fitted.items() if key.startswith(body)}
    heads = {key: value for key, value in fitted.items() if not key.startswith(body)}
    wanted = {key: shape for key, shape in own.items() if not key.startswith(model.body)}
    backbone = cast("DenseBackbone", model.get_submodule(model.body.rstrip(".")))
    load_backbone(backbone, inside)
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
    _check(heads, wanted, "the heads")
    nn.Module.load_state_dict(model, heads, strict=False)
    if notes:
        _logger.warning("%s", "; ".join(notes))


def _as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the ``model.`` of this package's detectors, which ``unwrap`` takes off as a wrapper's."""
    own = any(key.startswith("backbone.fpn.") for key in state)
    return {f"model.{key}": value for key, value in state.items()} if own else state


def _parts(keys: Iterable[str]) -> str:
    return ", ".join(sorted({key.partition(".")[0] for key in keys})) or "none"


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Any], what: str) -> None:
    difference = describe_mismatch(state, expected)
    if difference:
        raise CheckpointMismatch(f"{what} in the file and in the model differ: {difference}")
