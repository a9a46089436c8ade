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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoints import Layout, Rule

SEGMENTOR_BODY = "backbone."
DETECTOR_BODY = "model.backbone.body."
"""Prefixes of the backbone's keys in this package's segmentors and detectors."""


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


_PROPOSALS = (
    Rule("backbone.{rest}", DETECTOR_BODY + "{rest}"),
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
