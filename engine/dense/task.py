"""What the tasks on whole images share: how their numbers are told, and pictures of what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config import TaskConfig
from ..task import Curves, Forward, sizes_vary


class DenseTask:
    """Base of detection and segmentation.

    Args:
        config: the `task` group.
        measured: the map-style set that is evaluated, with its transform.
    """

    curves: Curves

    def __init__(self, config: TaskConfig, measured: Any) -> None:
        self.config, self.measured = config, measured

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing changes over the epochs."""

    def compile(self, model: nn.Module, *, training: bool) -> Forward:
        """The backbone, where it stands: what comes after it looks at values, and goes by them."""
        cast(Any, model).backbone.compile(dynamic=sizes_vary(training))
        return model

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The fractions by name."""
        return "  ".join(f"{name} {metrics[key]:.3f}" for key, name in self.curves.columns.items() if key in metrics)

    def predict(self, forward: Forward, inputs: Any) -> Any:
        """What `draw` and the metrics take."""
        raise NotImplementedError

    def draw(self, path: Path, images: Sequence[Any], outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """Write the picture of predictions (on the CPU) next to the truth."""
        raise NotImplementedError

    @torch.no_grad()
    def pictures(self, model: nn.Module, folder: Path, device: torch.device) -> None:
        """predictions.png: the first `task.pictures` images measured."""
        count = min(self.config.pictures, len(self.measured))
        if count:
            images, targets = zip(*(self.measured[index] for index in range(count)), strict=True)
            outputs = self.predict(model.eval(), [image.to(device) for image in images])
            self.draw(folder / "predictions.png", images, outputs, targets)
