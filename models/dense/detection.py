"""Detectors: torchvision's, and a cascade of its parts, on any backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads

from .backbone import DenseBackbone
from .cascade import CascadeHeads
from .geometry import Anchors, RegionPool, Resize
from .heads import CELLS, fcos_head, in_full_precision, proposal_network, region_heads
from .loading import LoadsPublishedDense, load_dense, read_dense
from .published import CASCADE, DETECTOR_BODY, MASK_RCNN
from .pyramid import Pyramid

HEADS = ("mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "cascade_rcnn", "retinanet", "fcos")
BOX_LOSSES = ("smooth_l1", "giou")
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class Detector(LoadsPublishedDense):
    """A detector of torchvision's interface with labels 0 to num_classes - 1; made by ``create_detector``.

    ``load_state_dict`` takes this package's own keys and those of mmdet's Mask R-CNN and Cascade R-CNN (see
    ``published``).

    Args:
        model: takes normalised targets and a list of images, as torchvision's detectors do.
        num_classes: classes, without background.
        background: whether the model counts background as class 0.
        mask_threshold: probability from which a pixel belongs to an object; None to leave masks as probabilities.

    Attributes:
        has_masks: whether it segments instances, and its targets need ``masks``.
    """

    layouts = (MASK_RCNN, CASCADE)
    body = DETECTOR_BODY
    optional = {"the mask head": re.compile(r".*\.mask_(head|predictor)\.")}
    classifiers = re.compile(
        r"model\.(roi_heads\.(stages\.\d+\.)?(box_predictor\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits)"
        r"|head\.classification_head\.cls_logits)\.(weight|bias)"
    )

    def __init__(
        self, model: nn.Module, num_classes: int, background: bool, mask_threshold: float | None = 0.5
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.num_classes = num_classes
        self.first_label = int(background)
        self.mask_threshold = mask_threshold
        self.has_masks = any(isinstance(module, RoIHeads) and module.has_mask() for module in model.modules())

    @property
    def backbone(self) -> DenseBackbone:
        """The backbone, without the pyramid."""
        return self.model.backbone.body

    def forward(
        self, images: Iterable[Tensor], targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training, results of each image in evaluation.

        Args:
            images: (C, H, W) each, of any sizes, in [0, 1] or uint8. In training they are taken as they are, in
                evaluation scaled to ``min_size`` and ``max_size`` and the results mapped back.
            targets: in training, of each image: ``boxes`` (N, 4) float xyxy in its pixels, ``labels`` (N,) int64 and,
                for instance segmentation, ``masks`` (N, H, W); N may be 0. What else there is is left alone.

        Returns:
            of each image ``boxes`` (N, 4) xyxy in its pixels, ``labels`` (N,), ``scores`` (N,) falling, and ``masks``
            (N, H, W): bool, or probabilities without ``mask_threshold``.

        Raises:
            ValueError: an image or target that is not as said here.
        """
        plain = [self._image(i, image) for i, image in enumerate(images)]
        if self.training:
            if targets is None or len(targets) != len(plain):
                raise ValueError(f"{len(targets or ())} targets for {len(plain)} images: training needs one for each")
            given = [self._target(i, t, image) for i, (t, image) in enumerate(zip(targets, plain, strict=True))]
            return self.model(plain, given)
        return [self._result(result) for result in self.model(plain)] if plain else []

    def _image(self, index: int, image: Tensor) -> Tensor:
        image = image.as_subclass(Tensor)
        channels = len(self.model.transform.image_mean)
        if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
            raise ValueError(f"image {index} has shape {tuple(image.shape)}, expected ({channels}, height, width)")
        return image / 255 if image.dtype == torch.uint8 else image

    def _target(self, index: int, target: Mapping[str, Any], image: Tensor) -> dict[str, Tensor]:
        names = ("boxes", "labels", "masks") if self.has_masks else ("boxes", "labels")
        missing = [name for name in names if name not in target]
        if missing:
            raise ValueError(f"target {index} has no {', '.join(missing)}: it needs {', '.join(names)}")
        given = {name: torch.as_tensor(target[name], device=image.device).as_subclass(Tensor) for name in names}
        boxes, labels = given["boxes"].reshape(-1, 4).to(image.dtype), given["labels"].long()
        if len(boxes) != len(labels):
            raise ValueError(f"target {index} has {len(boxes)} boxes and {len(labels)} labels")
        if len(boxes):
            if not (boxes[:, 2:] > boxes[:, :2]).all():
                bad = int((boxes[:, 2:] <= boxes[:, :2]).any(1).nonzero()[0])
                raise ValueError(
                    f"box {bad} of target {index} is {boxes[bad].tolist()}: xyxy boxes need x1 < x2 and y1 < y2"
                )
            if labels.min() < 0 or labels.max() >= self.num_classes:
                bad = int(labels.max()) if labels.max() >= self.num_classes else int(labels.min())
                raise ValueError(f"target {index} has label {bad}: labels are 0 to {self.num_classes - 1}")
        plain = {"boxes": boxes, "labels": labels + self.first_label}
        if self.has_masks:
            height, width = image.shape[1:]
            masks = given["masks"]
            if masks.shape != (len(boxes), height, width):
                raise ValueError(
                    f"masks of target {index} have shape {tuple(masks.shape)}, expected {(len(boxes), height, width)}"
                )
            plain["masks"] = masks.to(torch.uint8)
        return plain

    def _result(self, result: dict[str, Tensor]) -> dict[str, Tensor]:
        result["labels"] = result["labels"] - self.first_label
        if "masks" in result:
            masks = result["masks"].squeeze(1)
            result["masks"] = masks if self.mask_threshold is None else masks >= self.mask_threshold
        return result

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides norms and biases."""
        return {DETECTOR_BODY + name for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layer groups for layer decay: the backbone's, then all else. As ``DenseBackbone.group_matcher``."""
        groups = self.backbone.group_matcher(coarse)
        return lambda name: groups(name.removeprefix(DETECTOR_BODY))


def create_detector(
    backbone: str,
    head: str = "mask_rcnn",
    *,
    num_classes: int,
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    anchor_sizes: Sequence[float | Sequence[float]] | None = None,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    proposals: int = 1000,
    samples: int = 512,
    box_convs: int | None = None,
    box_features: int = 1024,
    box_loss: str | None = None,
    class_agnostic: bool = False,
    mask_convs: int = 4,
    mask_channels: int = 256,
    mask_size: int = 28,
    mask_threshold: float | None = 0.5,
    sampling_ratio: int = 0,
    stage_ious: Sequence[float] = (0.5, 0.6, 0.7),
    stage_box_weights: Sequence[Sequence[float]] = BOX_WEIGHTS,
    stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
    score_threshold: float = 0.05,
    nms_threshold: float | None = None,
    detections: int = 100,
    out_indices: Sequence[int] | None = None,
    task: str = "detection",
    out_norm: str = "auto",
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    in_chans: int = 3,
    **kwargs: Any,
) -> Detector:
    """Make a detector: a backbone, a feature pyramid on its maps, and heads.

    ``mask_rcnn``, ``faster_rcnn``, ``retinanet`` and ``fcos`` are torchvision's; ``cascade_mask_rcnn`` and
    ``cascade_rcnn`` are three stages of its parts. Defaults are those of the detectors published for NAT and Swin.

    Args:
        backbone: name of a model of this package or of timm.
        head: one of those.
        num_classes: classes, without background.
        channels: of the pyramid and of the heads on it.
        min_size, max_size: in evaluation the shorter side of an image becomes ``min_size``, or less where the longer
            one would exceed ``max_size``.
        image_mean, image_std: of each channel, for images in [0, 1]; default those that the backbone was trained with.
        anchor_sizes: square roots of the anchors' areas in pixels, one entry (or a sequence of several) for each map of
            the pyramid, default 8 strides, or for ``retinanet`` 4, 5.04 and 6.35. ``fcos`` has none.
        aspect_ratios: of the anchors, height / width.
        proposals: R-CNNs: boxes that the proposal network hands on for an image, out of the best of each map: so many,
            in training twice as many.
        samples: R-CNNs: proposals of an image on which the box heads are trained, at most a quarter of them true.
        box_convs: R-CNNs: convolutions with batch norm before the box heads' linear layers; with none there are two
            linear layers, else one. Default 0, or 4 in cascades.
        box_features: R-CNNs: channels of those linear layers.
        box_loss: cascades: ``smooth_l1`` or ``giou`` (default).
        class_agnostic: R-CNNs: predict one box instead of one for each class.
        mask_convs, mask_channels, mask_size: mask heads: convolutions, their channels, cells a side of a mask (even).
        mask_threshold: as in ``Detector``.
        sampling_ratio: R-CNNs: samples a side in each cell when regions are pooled; 0 for as many as it has pixels.
        stage_ious, stage_box_weights, stage_loss_weights: cascades, one entry for each stage: overlap from which a
            proposal is an object, scales of the box deltas, weight of the losses. Files of mmdetection 2 have 1 / 0.033
            and 1 / 0.067 where the paper, and the default, has 30 and 15.
        score_threshold, nms_threshold, detections: results have at least this score, overlap others of their class by
            at most this IoU (default 0.5, ``fcos`` 0.6), and are at most so many.
        out_indices: stages whose maps are taken; default all, or for ``retinanet`` and ``fcos`` all but the first of
            four or more.
        checkpoint_path: a path, URL or index name. A classifier's file gives the backbone; a detector's, of this
            package or of mmdet, everything (what depends on the number of classes is drawn anew for another); a
            segmentor's the backbone with its output norms. One log line says what was left out.
        task, out_norm, pretrained, in_chans, **kwargs: as in ``DenseBackbone``.

    Raises:
        ValueError: unknown name or option, a value out of range.
        CheckpointError: the weights of the backbone cannot be had, or do not fit.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} must be one of {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1 (background is not counted)")
    cascade, dense = head.startswith("cascade"), head in ("retinanet", "fcos")
    box_loss = box_loss or ("giou" if cascade else "smooth_l1")
    if nms_threshold is None:
        nms_threshold = 0.6 if head == "fcos" else 0.5
    if box_loss not in BOX_LOSSES or (box_loss == "giou" and not cascade):
        raise ValueError(f"box_loss={box_loss!r} must be {' or '.join(BOX_LOSSES)}, the second for cascades alone")
    if mask_size % 2:
        raise ValueError(f"mask_size={mask_size} must be even: the last layer doubles it")

    options: dict[str, Any] = {"task": task, "out_norm": out_norm, "in_chans": in_chans, **kwargs}
    if out_indices is None and dense:
        with torch.device("meta"):
            stages = len(DenseBackbone(backbone, **options).channels)
        out_indices = range(1, stages) if stages > 3 else None
    state = read_dense(checkpoint_path)
    body = DenseBackbone(
        backbone,
        out_indices=out_indices,
        pretrained=pretrained and not checkpoint_path,
        checkpoint_path=checkpoint_path if state is None else None,
        **options,
    )
    pyramid = Pyramid(body, channels, {"retinanet": "conv", "fcos": "conv_on_output"}.get(head, "pool"))
    transform = Resize(
        min_size,
        max_size,
        _per_channel("image_mean", image_mean or body.pretrained_cfg["mean"], in_chans),
        _per_channel("image_std", image_std or body.pretrained_cfg["std"], in_chans),
    )
    sizes = _anchor_sizes(anchor_sizes, head, pyramid.strides)
    anchors = Anchors(pyramid.strides, sizes, (1.0,) if head == "fcos" else aspect_ratios)
    if dense:
        one_stage: Any = (RetinaNet if head == "retinanet" else FCOS)(
            pyramid,
            num_classes,
            anchor_generator=anchors,
            head=fcos_head(channels, num_classes) if head == "fcos" else None,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=detections,
        )
        one_stage.transform = transform
        in_full_precision(one_stage.head)
        return _loaded(Detector(one_stage, num_classes, background=False), state)

    stage = partial(
        region_heads,
        channels,
        num_classes + 1,
        RegionPool(body.strides, CELLS, sampling_ratio),
        samples=samples,
        convs=box_convs if box_convs is not None else 4 if cascade else 0,
        features=box_features,
        class_agnostic=class_agnostic,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        detections=detections,
        mask_pool=RegionPool(body.strides, mask_size // 2, sampling_ratio) if "mask" in head else None,
        mask_convs=mask_convs,
        mask_channels=mask_channels,
    )
    heads: nn.Module
    if cascade:
        if not len(stage_ious) == len(stage_box_weights) == len(stage_loss_weights):
            raise ValueError(
                f"stage_ious, stage_box_weights and stage_loss_weights have {len(stage_ious)}, "
                f"{len(stage_box_weights)} and {len(stage_loss_weights)} entries: give one for each stage"
            )
        row = [stage(iou=iou, box_weights=scales) for iou, scales in zip(stage_ious, stage_box_weights, strict=True)]
        heads = CascadeHeads(row, stage_loss_weights, box_loss)
    else:
        heads = stage()
    model = GeneralizedRCNN(pyramid, proposal_network(channels, anchors, proposals), heads, transform)
    return _loaded(Detector(model, num_classes, background=True, mask_threshold=mask_threshold), state)


def _loaded(detector: Detector, state: Mapping[str, Tensor] | None) -> Detector:
    if state is not None:
        load_dense(detector, state)
    return detector


def _anchor_sizes(
    sizes: Sequence[float | Sequence[float]] | None, head: str, strides: Sequence[int]
) -> list[tuple[float, ...]]:
    """The anchor sizes of every map."""
    if head == "fcos":
        # a point stands for a square of one stride
        return [(stride,) for stride in strides]
    if sizes is None:
        octave = [4 * 2 ** (i / 3) for i in range(3)] if head == "retinanet" else [8]
        return [tuple(stride * size for size in octave) for stride in strides]
    table = [tuple(size) if isinstance(size, Sequence) else (size,) for size in sizes]
    if len(table) != len(strides) or len({len(entry) for entry in table}) != 1:
        raise ValueError(
            f"anchor_sizes={sizes!r} must have an entry for each of the {len(strides)} maps, of strides "
            f"{', '.join(map(str, strides))}, with one number of sizes"
        )
    return table


def _per_channel(name: str, values: Sequence[float], channels: int) -> list[float]:
    """One value for each channel; the mean of those of RGB for images of another number."""
    if len(values) == channels:
        return list(values)
    if len(values) != 3:
        raise ValueError(f"{name}={tuple(values)} has {len(values)} values for images of {channels} channels")
    return [math.fsum(values) / 3] * channels
