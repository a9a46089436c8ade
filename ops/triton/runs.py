"""Runs: how a pass that sums over many tiles, of many images, is cut among programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .schedule import int32

__all__ = ["Runs", "runs"]


@dataclass(frozen=True, eq=False)
class Runs:
    """Pieces of work, each over tiles of one group: item i of a group is its tile i % count of image i // count.

    Attributes:
        table: (R, 5) int32: kind, where the group's tiles begin, their count, first item, items.
        bounds: (groups + 1,) int32: the runs of group g are [bounds[g], bounds[g + 1]).
    """

    table: Tensor
    bounds: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [self.table, self.bounds]


def runs(groups: Sequence[tuple[int, int, int]], batch: int, length: int, device: torch.device) -> Runs:
    """Runs of at most `length` items over `batch` images of each group of tiles: (kind, where it begins, its tiles)."""
    table, bounds = [], [0]
    for kind, begin, count in groups:
        items = count * batch
        pieces = -(-items // length)
        cuts = [items * p // max(pieces, 1) for p in range(pieces + 1)]
        table += [(kind, begin, count, a, b - a) for a, b in pairwise(cuts)]
        bounds.append(len(table))
    return Runs(int32(np.array(table), device), int32(np.array(bounds), device))
