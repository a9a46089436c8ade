"""Everything that changes while training, in one object that can be taken down and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class TrainState:
    """The mutable state of a training run.

    Attributes:
        model: the network that is trained, as it was built (not compiled, not wrapped).
        optimizer: over its parameters.
        scheduler: timm's, or None.
        scaler: for float16; a disabled one otherwise.
        ema: timm's ModelEmaV3, or None.
        epoch: epochs that are finished.
        step: updates that were tried, also those skipped for a loss that was not finite.
        skipped: updates skipped so far.
        skipped_in_a_row: of these, without one that went well in between.
        best: the best value of the task's metric so far.
        best_epoch: and the number of finished epochs when it was reached.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    ema: Any = None
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_epoch: int = 0

    @property
    def weights(self) -> nn.Module:
        """The network that is evaluated and written: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The largest learning rate of the parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """All of it, the random number generators included, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "progress": {key: getattr(self, key) for key in _PROGRESS},
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        for key in _PROGRESS:
            setattr(self, key, state["progress"][key])
        set_rng_state(state["rng"])


_PROGRESS = ("epoch", "step", "skipped", "skipped_in_a_row", "best", "best_epoch")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's augmentation draws from the global generator
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator that training draws from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
