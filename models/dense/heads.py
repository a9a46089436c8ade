"""The heads of R-CNNs, of torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from .geometry import Anchors, RegionPool
from .options import MaskOptions, RegionOptions

CELLS = 7


class AgnosticPredictor(FastRCNNPredictor):
    """``FastRCNNPredictor`` with one box for all classes, given out once for each.

    Args:
        in_channels: features of a region.
        num_classes: classes with background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, in_channels) to (n, classes) and (n, 4 * classes)."""
        scores, deltas = super().forward(x)
        return scores, deltas.repeat(1, self.num_classes)


def proposal_network(channels: int, anchors: Anchors, proposals: int) -> RegionProposalNetwork:
    """The network that proposes regions, with the settings of the published detectors.

    Args:
        channels: of the maps.
        anchors: what it starts from.
        proposals: boxes that it hands on for an image, out of the best of each map: so many, in training twice as many.
    """
    head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    in_full_precision(head)
    return RegionProposalNetwork(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
        post_nms_top_n={"training": proposals, "testing": proposals},
        nms_thresh=0.7,
    )


def region_heads(
    channels: int,
    num_classes: int,
    strides: Sequence[int],
    options: RegionOptions,
    *,
    iou: float = 0.5,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
) -> RoIHeads:
    """Box heads, and mask heads where the options are of these.

    Args:
        channels: of the maps.
        num_classes: classes with background.
        strides: of the maps from which regions are cut.
        options: of the head.
        iou: overlap from which a proposal is an object.
        box_weights: scales of the box deltas.
    """
    features, convs = options.box_features, options.box_convs
    box_head: nn.Module = TwoMLPHead(channels * CELLS**2, features)
    if convs:
        size = (channels, CELLS, CELLS)
        box_head = FastRCNNConvFCHead(size, [channels] * convs, [features], norm_layer=nn.BatchNorm2d)
    predictor = AgnosticPredictor if options.class_agnostic else FastRCNNPredictor
    masks: dict[str, Any] = {}
    if isinstance(options, MaskOptions):
        width = options.mask_channels
        masks["mask_roi_pool"] = RegionPool(strides, options.mask_size // 2, options.sampling_ratio)
        masks["mask_head"] = MaskRCNNHeads(channels, (width,) * options.mask_convs, 1)
        masks["mask_predictor"] = MaskRCNNPredictor(width if options.mask_convs else channels, width, num_classes)
        in_full_precision(masks["mask_predictor"])
    heads = RoIHeads(
        RegionPool(strides, CELLS, options.sampling_ratio),
        box_head,
        predictor(features, num_classes),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=options.samples,
        positive_fraction=0.25,
        bbox_reg_weights=tuple(box_weights),
        score_thresh=options.score_threshold,
        nms_thresh=options.nms_threshold,
        detections_per_img=options.detections,
        **masks,
    )
    in_full_precision(heads.box_predictor)
    return heads


def fcos_head(channels: int, num_classes: int) -> FCOSHead:
    """torchvision's FCOS head with 32 groups in its norms, or fewer where they would not divide the channels.

    A group has two channels at least: maps can be of one point.
    """
    groups = math.gcd(channels, 32)
    if groups == channels:
        groups //= 2
    norm = partial(nn.GroupNorm, max(groups, 1))
    head = FCOSHead(32, 1, num_classes)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=norm)
    return head


def in_full_precision(module: nn.Module) -> None:
    """Let a module give single precision under autocast: boxes are decoded in the dtype of the deltas."""
    module.register_forward_hook(_widen)


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.to(torch.promote_types(output.dtype, torch.float32))
    if isinstance(output, dict):
        return {name: _widen(module, args, value) for name, value in output.items()}
    return type(output)(_widen(module, args, value) for value in output)
