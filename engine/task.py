"""What is learned: how a batch becomes a loss, and an evaluation numbers. The loop knows nothing else about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import AugConfig, TaskConfig
from .errors import ConfigError
from .metrics import ClassificationMetrics

Forward = Callable[[Tensor], Tensor]


class Metrics(Protocol):
    """Sums over an evaluation."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""

    def result(self) -> dict[str, float]:
        """The numbers by name; `loss` and `n` are among them."""


class Task(Protocol):
    """A task: its loss, its metrics and which of them says how good a model is."""

    name: str
    primary: str

    def loss(self, forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a training batch, a scalar with gradients."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, counted from 0."""

    def metrics(self) -> Metrics:
        """Fresh metrics for an evaluation."""


class Classification:
    """Image classification: (soft) cross entropy or binary cross entropy, mixup and cutmix, top-1 and top-5."""

    name = "classification"
    primary = "top1"

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
        self.criterion: torch.nn.Module
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

    def loss(self, forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the batch: inputs (B, C, H, W), targets (B,) of class indices."""
        if self.mixup is not None:
            inputs, targets = self.mixup(inputs, targets)
        return self.criterion(forward(inputs).float(), targets)

    def metrics(self) -> ClassificationMetrics:
        """Fresh sums."""
        return ClassificationMetrics()


def create_task(config: TaskConfig, aug: AugConfig, num_classes: int, *, batch_size: int | None = None) -> Task:
    """The task that the configuration names, for training with batches of `batch_size` images.

    Raises:
        ConfigError: images are mixed in pairs and the batch is odd.
    """
    task = Classification(config, aug, num_classes)
    if task.mixup is not None and batch_size is not None and batch_size % 2:
        raise ConfigError(
            f"data.batch_size={batch_size}: aug.mixup and aug.cutmix mix pairs of images: make it even, or both 0"
        )
    return task
