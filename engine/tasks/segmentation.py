"""Semantic segmentation: cross entropy over pixels, with an auxiliary head; mean IoU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ...models.backbone import MIN_IMAGE
from .. import data, network
from ..config import EvalConfig, TaskConfig, TrainConfig
from ..dense import inference
from ..dense.batches import batches, lists, policy_of, stacks
from ..dense.classes import IGNORED
from ..dense.crops import PadTo, segmentation_policy
from ..dense.drawing import write_class_maps
from ..dense.masks import MaskSet
from ..dense.segmentation_metrics import SegmentationMetrics
from ..dense.sources import segmentation_source
from ..dense.task import DenseTask
from ..errors import ConfigError
from ..task import Curves, Forward, Prepared

HEAD = "upernet"


class Segmentation(DenseTask):
    """The task for batches of images and class maps; evaluated image by image at its full size."""

    name = "segmentation"
    primary = "miou"
    curves = Curves(
        "fraction, on held-out images",
        {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"},
        digits=3,
    )
    columns: tuple[str, ...] = tuple(curves.columns)

    def loss(self, forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of the labelled pixels: images (B, C, H, W), class maps (B, H, W), `IGNORED` none."""
        outputs = forward(inputs)
        total = pixel_loss(outputs["out"], targets)
        if "aux" in outputs:
            total = total + self.config.aux_weight * pixel_loss(outputs["aux"], targets)
        return total

    def predict(self, forward: Forward, inputs: list[Tensor]) -> list[Tensor]:
        """Class maps (H, W) int64 of each image, at its size."""
        config = self.config
        scale = None if config.fit is None else (config.fit[0], config.fit[1])
        model = inference.filled_up(forward)
        maps = []
        for image in inputs:
            probabilities = inference.predict(
                model,
                image[None],
                scale=scale,
                ratios=config.ratios,
                flip=config.flip,
                crop=config.crop,
                stride=config.stride,
            )
            maps.append(probabilities[0].argmax(0))
        return maps

    def metrics(self) -> ImageMetrics:
        """Fresh sums."""
        return ImageMetrics(self.measured.num_classes, IGNORED)

    def draw(self, path: Path, images: Sequence[Any], outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """The image, its true and its predicted class map."""
        measured = self.measured
        names = measured.class_names or [str(label) for label in range(measured.num_classes)]
        pictures = [measured.pair(index)[0] for index in range(len(images))]  # as they were before normalisation
        write_class_maps(path, pictures, [one.cpu() for one in outputs], targets, names)


class ImageMetrics(SegmentationMetrics):
    """Those of images of different sizes, as lists of class maps."""

    def add(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:  # type: ignore[override]
        """Add the images of a batch."""
        for output, target in zip(outputs, targets, strict=True):
            super().add(output, target)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, the mean over the labelled pixels; 0 where there is none."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


@dataclass
class Normalisation:
    """How an image becomes an input when it is evaluated: (longest, shortest) side, per-channel mean and std."""

    fit: list[int] | None
    ratios: list[float]
    flip: bool
    crop: int | None
    mean: list[float]
    std: list[float]

    def columns(self) -> dict[str, Any]:
        """What a row of evaluation results says of it."""
        size = "x".join(map(str, self.fit)) if self.fit else "own"
        return {"fit": size, "ratios": " ".join(map(str, self.ratios)), "flip": self.flip, "crop": self.crop or "whole"}


def check_views(config: TaskConfig) -> None:
    """ConfigError for what no image can be evaluated with."""
    fit, crop, stride = config.fit, config.crop, config.stride
    if fit is not None and (len(fit) != 2 or fit[0] < fit[1]):
        raise ConfigError(f"task.fit={fit}: give two numbers of pixels, [longest, shortest] side")
    if not config.ratios:
        raise ConfigError("task.ratios=[]: give one number or more; [1.0] is the size itself")
    if stride is not None and crop is None:
        raise ConfigError(f"task.stride={stride}: there are no windows without task.crop: set it, or task.stride=null")
    if stride is not None and crop is not None and stride > crop:
        raise ConfigError(f"task.stride={stride}: windows of task.crop={crop} would leave gaps: at most {crop}")


def prepare(config: TrainConfig | EvalConfig, device: torch.device) -> Prepared:
    """Data, segmentor and task.

    Raises:
        UserError: anything that can be wrong before the first batch.
    """
    network.check(config.model, config.task)
    check_views(config.task)
    chosen = config.data
    splits = (config.split,) if isinstance(config, EvalConfig) else ("train", "val")
    source = segmentation_source(config, splits)
    head, whole = config.task.head or HEAD, isinstance(config, EvalConfig)
    model = network.build_segmentor(config.model, config.task, head, num_classes=source.num_classes, whole=whole)
    model = model.to(device)
    mean, std = data.mean_and_std(chosen, model.pretrained_cfg, source.in_chans)
    # a model that shall overfit is measured on what it saw, as it saw it
    views = config.task
    if chosen.overfit_batches:
        views = dataclasses.replace(views, fit=None, ratios=[1.0], flip=False, crop=None, stride=None)
    how = Normalisation(views.fit, views.ratios, views.flip, views.crop, mean, std)
    measured: MaskSet = source.train if "val" not in splits or chosen.overfit_batches else source.val
    task = Segmentation(views, measured)
    train = None
    if isinstance(config, TrainConfig):
        data.check_batch_size(chosen, source.train)
        name, options = policy_of(config)
        policy = segmentation_policy(name, options, mean=mean, std=std)
        source.train.transform = v2.Compose([policy, PadTo(MIN_IMAGE)])
        train = batches(chosen, source.train, device, collate=stacks, training=True)
        if chosen.overfit_batches:
            return Prepared(task, source, how, model, train, train)
    measured.transform = segmentation_policy("none", mean=mean, std=std)
    return Prepared(task, source, how, model, train, batches(chosen, measured, device, collate=lists, training=False))
