"""Image classification: (soft) cross entropy or binary cross entropy, mixup and cutmix, top-1 and top-5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, network
from ..config import AugConfig, EvalConfig, TaskConfig, TrainConfig
from ..errors import ConfigError
from ..metrics import ClassificationMetrics
from ..task import Curves, Forward, Prepared, sizes_vary


class Classification:
    """The task for `num_classes` classes, on batches of images (B, C, H, W) and class indices (B,)."""

    name = "classification"
    primary = "top1"
    curves = Curves("accuracy on held-out images (%)", {"top1": "top-1", "top5": "top-5"}, digits=2)
    columns: tuple[str, ...] = ("top1", "top5", "loss")

    def __init__(self, config: TaskConfig, aug: AugConfig, num_classes: int) -> None:
        from timm.data import Mixup
        from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        mixes = (aug.mixup > 0 or aug.cutmix > 0) and not aug.no_aug
        self.mixup_off_epochs = aug.mixup_off_epochs
        self.mixup: Any = None
        if mixes:
            self.mixup = Mixup(
                mixup_alpha=aug.mixup,
                cutmix_alpha=aug.cutmix,
                prob=aug.mixup_prob,
                switch_prob=aug.mixup_switch_prob,
                mode=aug.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )
        self.criterion: nn.Module
        if config.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=0.0 if mixes else config.smoothing)
        elif mixes:
            self.criterion = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(config.smoothing)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch mixing off in the last `aug.mixup_off_epochs` epochs."""
        if self.mixup is not None:
            self.mixup.mixup_enabled = epoch < epochs - self.mixup_off_epochs

    def compile(self, model: nn.Module, *, training: bool) -> Forward:
        """The whole model."""
        compiled: Forward = torch.compile(model, dynamic=sizes_vary(training))
        return compiled

    def loss(self, forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the batch: inputs (B, C, H, W), targets (B,) of class indices."""
        if self.mixup is not None:
            inputs, targets = self.mixup(inputs, targets)
        return self.criterion(forward(inputs).float(), targets)

    def predict(self, forward: Forward, inputs: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = forward(inputs)
        return logits

    def metrics(self) -> ClassificationMetrics:
        """Fresh sums."""
        return ClassificationMetrics()

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Accuracies in percent and the loss."""
        return f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"

    def pictures(self, model: nn.Module, folder: Path, device: torch.device) -> None:
        """None: a class is no picture."""


def prepare(config: TrainConfig | EvalConfig, device: torch.device) -> Prepared:
    """Data, model and task of a classification.

    Raises:
        ConfigError: images are mixed in pairs and the batch is odd, and what `data` and `network` raise.
    """
    network.check(config.model, config.task)
    splits = (config.split,) if isinstance(config, EvalConfig) else ("train", "val")
    source = data.open_source(config.data, splits=splits, in_chans=config.model.in_chans)
    model = network.build(
        config.model,
        num_classes=source.num_classes,
        in_chans=source.in_chans,
        class_names=source.class_names,
        strict_head=isinstance(config, EvalConfig) or (bool(config.model.checkpoint) and not config.model.new_head),
    ).to(device)
    how = data.prepare(config.data, model, img_size=network.image_size(config.model), in_chans=source.in_chans)
    if isinstance(config, EvalConfig):
        task = Classification(config.task, AugConfig(no_aug=True), source.num_classes)
        batches = data.eval_batches(config.data, source, how, device, split=config.split)
        return Prepared(task, source, how, model, None, batches)
    aug = dataclasses.replace(config.aug, no_aug=True) if config.data.overfit_batches else config.aug
    task = Classification(config.task, aug, source.num_classes)
    if task.mixup is not None and config.data.batch_size % 2:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: aug.mixup and aug.cutmix mix pairs of images: make it even, "
            "or both 0"
        )
    train = data.train_batches(config.data, aug, source, how, device)
    # a model that shall overfit is measured on what it saw
    val = train if config.data.overfit_batches else data.eval_batches(config.data, source, how, device, split="val")
    return Prepared(task, source, how, model, train, val)
