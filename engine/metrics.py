"""Sums over a data set that become numbers at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class ClassificationMetrics:
    """Top-1 and top-5 in percent and the mean cross entropy, over everything that was added.

    Sums stay on the device of the logits, so that adding a batch does not wait for it.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (B, classes) of any dtype, targets (B,) of class indices."""
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        count = torch.full_like(loss, len(targets))
        sums = torch.stack([hits[:, 0].sum().to(loss), hits.any(dim=1).sum().to(loss), loss, count])
        self.sums = sums if self.sums is None else self.sums + sums

    def result(self) -> dict[str, float]:
        """`top1`, `top5` (percent), `loss`, `n`."""
        if self.sums is None:
            return {"top1": 0.0, "top5": 0.0, "loss": float("nan"), "n": 0}
        top1, top5, loss, count = self.sums.tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "n": int(count)}


@dataclass
class Mean:
    """A running weighted mean on the device: `add` does not wait, `value` does."""

    total: Tensor | None = None
    weight: float = 0.0

    def add(self, value: Tensor, weight: float = 1.0) -> None:
        """Add a scalar tensor with a weight."""
        term = value.detach().float() * weight
        self.total = term if self.total is None else self.total + term
        self.weight += weight

    @property
    def value(self) -> float:
        """The mean; NaN when nothing was added."""
        return float("nan") if self.total is None or not self.weight else float(self.total) / self.weight
