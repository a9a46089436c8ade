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
from .geometry import Anchors, Resize
from .heads import fcos_head, in_full_precision, proposal_network, region_heads
from .loading import LoadsPublishedDense, load_dense, read_dense
from .options import OPTIONS, AnchorOptions, CascadeOptions, HeadOptions, MaskOptions, RegionOptions, options_of
from .published import CASCADE, DETECTOR_BODY, MASK_RCNN
from .pyramid import Pyramid

HEADS = tuple(OPTIONS)


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
        out_indices: stages whose maps are taken; default all, or for ``retinanet`` and ``fcos`` all but the first of
            four or more.
        checkpoint_path: a path, URL or index name. A classifier's file gives the backbone; a detector's, of this
            package or of mmdet, everything (what depends on the number of classes is drawn anew for another); a
            segmentor's the backbone with its output norms. One log line says what was left out.
        task, out_norm, pretrained, in_chans: as in ``DenseBackbone``.
        **kwargs: options of the head, see ``options``: ``score_threshold``, ``anchor_sizes``, ``proposals``,
            ``mask_convs``, ``stage_ious``, ... (one log line names those that only other heads have); and, as in
            ``DenseBackbone``, those of the model.

    Raises:
        ValueError: unknown name or option, a value out of range.
        CheckpointError: the weights of the backbone cannot be had, or do not fit.
    """
    options, of_body = options_of(head, kwargs)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1 (background is not counted)")
    if channels < 1:
        raise ValueError(f"channels={channels} must be at least 1")
    if not 1 <= min_size <= max_size:
        raise ValueError(
            f"min_size={min_size}, max_size={max_size}: pixels, at least 1, the second not below the first"
        )
    of_body |= {"task": task, "out_norm": out_norm, "in_chans": in_chans}
    one_stage = head in ("retinanet", "fcos")
    if out_indices is None and one_stage:
        with torch.device("meta"):
            stages = len(DenseBackbone(backbone, **of_body).channels)
        out_indices = range(1, stages) if stages > 3 else None
    state = read_dense(checkpoint_path)
    body = DenseBackbone(
        backbone,
        out_indices=out_indices,
        pretrained=pretrained and not checkpoint_path,
        checkpoint_path=checkpoint_path if state is None else None,
        **of_body,
    )
    pyramid = Pyramid(body, channels, {"retinanet": "conv", "fcos": "conv_on_output"}.get(head, "pool"))
    transform = Resize(
        min_size,
        max_size,
        _per_channel("image_mean", image_mean or body.pretrained_cfg["mean"], in_chans),
        _per_channel("image_std", image_std or body.pretrained_cfg["std"], in_chans),
    )
    make = _one_stage if one_stage else _two_stage
    detector = make(pyramid, transform, num_classes, options)
    if state is not None:
        load_dense(detector, state)
    return detector


def _one_stage(pyramid: Pyramid, transform: Resize, num_classes: int, options: HeadOptions) -> Detector:
    """RetinaNet, or FCOS where the options know no anchors."""
    channels, strides = pyramid.out_channels, pyramid.strides
    build: Any
    if isinstance(options, AnchorOptions):
        build, head = RetinaNet, None
        octaves = [4 * 2 ** (i / 3) for i in range(3)]
        anchors = Anchors(strides, _anchor_sizes(options, strides, octaves), options.aspect_ratios)
    else:
        build, head = FCOS, fcos_head(channels, num_classes)
        # a point stands for a square of one stride
        anchors = Anchors(strides, [(stride,) for stride in strides], (1.0,))
    model = build(
        pyramid,
        num_classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=options.score_threshold,
        nms_thresh=options.nms_threshold,
        detections_per_img=options.detections,
    )
    model.transform = transform
    in_full_precision(model.head)
    return Detector(model, num_classes, background=False)


def _two_stage(pyramid: Pyramid, transform: Resize, num_classes: int, options: RegionOptions) -> Detector:
    """R-CNNs: a network that proposes regions, then their heads, in cascades three in a row."""
    strides = pyramid.body.strides
    anchors = Anchors(pyramid.strides, _anchor_sizes(options, pyramid.strides, [8]), options.aspect_ratios)
    stage = partial(region_heads, pyramid.out_channels, num_classes + 1, strides, options)
    heads: nn.Module
    if isinstance(options, CascadeOptions):
        settings = zip(options.stage_ious, options.stage_box_weights, strict=True)
        row = [stage(iou=iou, box_weights=scales) for iou, scales in settings]
        heads = CascadeHeads(row, options.stage_loss_weights, options.box_loss)
    else:
        heads = stage()
    proposals = proposal_network(pyramid.out_channels, anchors, options.proposals)
    model = GeneralizedRCNN(pyramid, proposals, heads, transform)
    threshold = options.mask_threshold if isinstance(options, MaskOptions) else None
    return Detector(model, num_classes, background=True, mask_threshold=threshold)


def _anchor_sizes(options: AnchorOptions, strides: Sequence[int], in_strides: Sequence[float]) -> list[Any]:
    """The anchor sizes of every map; unless the options say them, ``in_strides`` of its strides each."""
    sizes = options.anchor_sizes
    if sizes is None:
        return [tuple(stride * size for size in in_strides) for stride in strides]
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
