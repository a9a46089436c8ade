"""What a task is to the loop: how a batch becomes a loss, a prediction and, over an evaluation, numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .data import Batches, Source

Forward = Callable[..., Any]


def sizes_vary(training: bool) -> bool | None:
    """`dynamic` of `torch.compile`: None has the second size that is seen make a graph for all."""
    # not in training: PyTorch 2.11 fails on saved activations (https://github.com/pytorch/pytorch/issues/185510)
    return False if training else None


class Metrics(Protocol):
    """Sums over an evaluation."""

    def add(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""

    def result(self) -> dict[str, float]:
        """The numbers by name; `n`, the images, is among them."""


@dataclass(frozen=True)
class Curves:
    """What curves.png draws beside the losses.

    Attributes:
        label: of the axis, with the unit.
        columns: of metrics.csv, each with its name in the legend.
        digits: after the point.
    """

    label: str
    columns: Mapping[str, str]
    digits: int


class Task(Protocol):
    """A task: its loss, its metrics, which of them says how good a model is, and the columns of its results."""

    name: str
    primary: str
    curves: Curves
    columns: tuple[str, ...]

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, counted from 0."""

    def compile(self, model: nn.Module, *, training: bool) -> Forward:
        """What is called instead of the model: its parameters, compiled by PyTorch on first use.

        In training each size of input gets a graph of its own, up to PyTorch's `recompile_limit` of 8; what comes after
        runs uncompiled. In evaluation a second size makes one graph for all.
        """

    def loss(self, forward: Forward, inputs: Any, targets: Any) -> Tensor:
        """The mean loss of a training batch, a scalar with gradients."""

    def predict(self, forward: Forward, inputs: Any) -> Any:
        """What `metrics().add` takes for the images of a batch."""

    def metrics(self) -> Metrics:
        """Fresh metrics for an evaluation."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The numbers of an evaluation as a line for people."""

    def pictures(self, model: nn.Module, folder: Path, device: torch.device) -> None:
        """Write pictures of a few predictions into `folder`, where the task has any."""


class How(Protocol):
    """How an image becomes an input when it is evaluated; a dataclass, written down with the run."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def columns(self) -> dict[str, Any]:
        """What a row of evaluation results says of it."""


@dataclass
class Prepared:
    """All that comes before the first batch: the task, its data, its model.

    Attributes:
        task: with its loss and metrics.
        source: the opened data sets.
        how: how an image becomes an input.
        model: on the device.
        train: batches to train on; None for an evaluation.
        val: batches to evaluate on.
    """

    task: Task
    source: Source
    how: How
    model: nn.Module
    train: Batches | None
    val: Batches
