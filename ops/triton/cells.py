"""Cells: tokens that attend each other and nothing else. Windows, shifted or not, grids, windows of a curve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind
from ..patterns import Pattern, resolve
from ..tiles import axis_bands
from .axis_tiles import AxisTile, axis_tiles
from .launch import power_of_two
from .schedule import curve_places, int32, resident_fields, streamed_fields

__all__ = ["Cells", "cell_slots", "cells"]

MOST_CELL = 64  # tokens of a cell that one program holds whole


@dataclass(frozen=True, eq=False)
class Cells:
    """A map cut into cells: windows, grids, curve windows.

    Attributes:
        first: (T,) int32, place of each cell's first token, cells of a kind together.
        offset: (K, M) int32, the tokens of a cell relative to it, ABSENT beyond its last.
        entry: (K, M, M) int32, flat table entry of every (query, key) pair, -1 where a slot is empty.
        order: as in `Schedule`.
        begins, counts: where each kind begins in `first`, and its number of cells.
    """

    first: Tensor
    offset: Tensor
    entry: Tensor
    order: Tensor | None
    begins: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [t for t in (self.first, self.offset, self.entry, self.order) if t is not None]


@lru_cache(maxsize=512)
def _cell_size(pattern: Pattern, height: int, width: int) -> tuple[int, int] | None:
    """(y, x) tokens of the largest cell, None where queries and keys are not the same tokens."""
    resolved = resolve(pattern, height, width)
    sizes = []
    for axis in (resolved.y, resolved.x):
        bands = axis_bands(axis, max(axis.queries, 1), split=True)
        if axis.queries != axis.keys or any(b.queries != b.keys or not b.tiles[0].shape.full for b in bands):
            return None
        if any(b.count > 1 and b.query_spacing != b.key_spacing for b in bands):
            return None
        sizes.append(max(b.queries.length for b in bands))
    return sizes[0], sizes[1]


def cell_slots(pattern: Pattern, height: int, width: int) -> int | None:
    """Slots of a cell, a power of two; None where a pattern has no cells, or none that one program can hold whole."""
    size = _cell_size(pattern, height, width)
    if size is None or size[0] * size[1] > MOST_CELL:
        return None
    return power_of_two(size[0] * size[1])


def cells(pattern: Pattern, height: int, width: int, device: torch.device, kind: BiasKind = BiasKind.TABLE) -> Cells:
    """The cells of a pattern that has them. kind: as in `axis_tiles`."""
    size = _cell_size(pattern, height, width)
    assert size is not None
    slots = power_of_two(size[0] * size[1])
    resolved = resolve(pattern, height, width)
    rows, columns = (axis_tiles(a, s, kind=kind) for a, s in zip((resolved.y, resolved.x), size, strict=True))
    pitch = 2 * resolved.x.reach + 1
    row = resolved.x.keys
    alike: dict[tuple[bytes, bytes], list[tuple[AxisTile, AxisTile]]] = {}
    for r in rows:
        for c in columns:
            alike.setdefault((r.alike, c.alike), []).append((r, c))
    first, offset, entry, counts = [], [], [], []
    for members in alike.values():
        y, x = members[0]
        first += [int(r.resident[0]) * row + int(c.resident[0]) for r, c in members]
        own, other = resident_fields(y, x, slots, row), streamed_fields(y, x, slots, row)
        offset.append(own[0])
        present = np.arange(slots) < len(y.resident) * len(x.resident)
        pairs = present[:, None] & present[None, :]
        codes = (own[5] * pitch + own[6])[:, None] + (other[3] * pitch + other[4])[None, :]
        entry.append(np.where(pairs, codes, -1))
        counts.append(len(members))
    begins = tuple(np.cumsum([0, *counts[:-1]]).tolist())
    return Cells(
        int32(np.array(first), device),
        int32(np.stack(offset), device),
        int32(np.stack(entry), device),
        curve_places(pattern, height, width, device),
        begins,
        tuple(counts),
    )
