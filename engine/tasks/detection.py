"""Object detection and instance segmentation on COCO-format sets: torchvision's detectors and a cascade."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data, network
from ..config import EvalConfig, TaskConfig, TrainConfig
from ..dense.batches import batches, lists, policy_of
from ..dense.coco import CocoSet
from ..dense.coco_metrics import NAMES, PREFIX, CocoMetrics, GroundTruth
from ..dense.drawing import write_detections
from ..dense.sources import detection_source
from ..dense.task import DenseTask
from ..dense.transforms import detection_policy
from ..task import Curves, Forward, Prepared

HEAD = "mask_rcnn"
_logger = logging.getLogger("nearfield.engine")


class Detection(DenseTask):
    """The task for batches of image lists and target lists, measured against the objects of a `CocoSet`."""

    name = "detection"
    primary = "box_ap"
    curves = Curves(
        "average precision on held-out images",
        {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"},
        digits=3,
    )
    columns: tuple[str, ...] = tuple(f"{prefix}_{name}" for prefix in PREFIX.values() for name in NAMES)

    def __init__(self, config: TaskConfig, measured: CocoSet, *, masks: bool) -> None:
        super().__init__(config, measured)
        truth = measured.ground_truth()
        if all(one.get("iscrowd") for one in truth["annotations"]):
            _logger.warning(
                "%s: no object to find in its %d images: there will be no %s, and of a training no best weights",
                measured.path,
                len(measured),
                self.primary,
            )
        self.truth = GroundTruth(truth, ("bbox", "segm") if masks else ("bbox",))

    def loss(self, forward: Forward, inputs: list[Tensor], targets: list[dict[str, Any]]) -> Tensor:
        """The sum of the detector's losses: images (C, H, W) in [0, 1], targets as the detector takes them."""
        losses: dict[str, Tensor] = forward(inputs, targets)
        return torch.stack([value.float() for value in losses.values()]).sum()

    def predict(self, forward: Forward, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores and masks of each image, in its pixels."""
        outputs: list[dict[str, Tensor]] = forward(inputs)
        return outputs

    def metrics(self) -> CocoMetrics:
        """COCO's numbers over the images that are added."""
        return CocoMetrics(self.truth, category_ids=self.measured.category_ids)

    def draw(self, path: Path, images: Sequence[Any], outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """The truth on the left, what the model finds on the right."""
        write_detections(path, images, outputs, targets, self.measured.class_names, threshold=self.config.threshold)


@dataclass
class Resizing:
    """How an image becomes an input of the detector when it is evaluated; sides in pixels."""

    min_size: int
    max_size: int
    mean: list[float]
    std: list[float]

    def columns(self) -> dict[str, Any]:
        """What a row of evaluation results says of it."""
        return {"min_size": self.min_size, "max_size": self.max_size}


def prepare(config: TrainConfig | EvalConfig, device: torch.device) -> Prepared:
    """Data, detector and task.

    Raises:
        UserError: anything that can be wrong before the first batch.
    """
    network.check(config.model, config.task)
    chosen = config.data
    head = config.task.head or HEAD
    masks = "mask" in head
    splits = (config.split,) if isinstance(config, EvalConfig) else ("train", "val")
    source = detection_source(config, splits, masks=masks)
    whole = isinstance(config, EvalConfig)
    model = network.build_detector(config.model, config.task, head, num_classes=source.num_classes, whole=whole)
    model = model.to(device)
    transform = model.model.transform
    how = Resizing(transform.min_size[-1], transform.max_size, transform.image_mean, transform.image_std)

    # a model that shall overfit is measured on what it saw, as it saw it
    measured: CocoSet = source.train if "val" not in splits or chosen.overfit_batches else source.val
    task = Detection(config.task, measured, masks=masks)
    train = None
    if isinstance(config, TrainConfig):
        data.check_batch_size(chosen, source.train)
        name, options = policy_of(config)
        source.train.transform = detection_policy(name, options)
        train = batches(chosen, source.train, device, collate=lists, training=True)
        if chosen.overfit_batches:
            return Prepared(task, source, how, model, train, train)
    measured.transform = detection_policy("none")
    return Prepared(task, source, how, model, train, batches(chosen, measured, device, collate=lists, training=False))
