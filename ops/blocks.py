"""Blocks of a map: a band of rows times a band of columns, read and written as one piece.

A block is a strided view of the map where the layout allows and one copy otherwise. Shapes: B batch, H, W map, h heads,
d head_dim; b images, cy row runs and cx column runs of a block, n = b * cy * cx; ly, lx tokens of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from .cache import SCHEDULES
from .curves import curve_order
from .patterns import Pattern
from .tiles import Band, Span, Stack, Tile, make_plan

__all__ = ["Block", "Curve", "Place", "Raster", "Workspace", "cut_blocks"]

BLOCK_BYTES = 4 << 20  # q, k and v of one block: about one core's share of the last-level cache
SCORES_BYTES = 32 << 20  # scores of one tile over all runs of a block, which the backward pass holds


@dataclass(frozen=True)
class Place:
    """Where a part of a block lies in the map: its rows, its columns, and the spacing of the block's runs."""

    rows: Span
    columns: Span
    spacing: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Block:
    """Images [b0, b1) x row runs [y0, y1) x column runs [x0, x1) of one pair of bands."""

    row: Band
    column: Band
    b: tuple[int, int]
    y: tuple[int, int]
    x: tuple[int, int]

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """(images, row runs, column runs)."""
        return self.b[1] - self.b[0], self.y[1] - self.y[0], self.x[1] - self.x[0]

    @cached_property
    def queries(self) -> Place:
        """Where the queries lie."""
        return Place(self.row.queries, self.column.queries, (self.row.query_spacing, self.column.query_spacing))

    @cached_property
    def keys(self) -> Place:
        """Where the keys lie."""
        return Place(self.row.keys, self.column.keys, (self.row.key_spacing, self.column.key_spacing))

    @cached_property
    def same_place(self) -> bool:
        """Whether queries and keys are the same tokens, as in windows: then q, k and v are read in one go."""
        return self.queries == self.keys

    @cached_property
    def tiles(self) -> tuple[tuple[Tile, Place], ...]:
        """Row tiles and where the queries of each lie."""
        return tuple((t, self._part(t.query, t.shape.queries)) for t in self.row.tiles)

    @cached_property
    def stacks(self) -> tuple[tuple[Stack, Place], ...]:
        """What one call of attention each computes, and where its queries lie: of a single run the stacks of tiles."""
        if self.counts == (1, 1, 1):
            stacks = self.row.stacks
            return tuple((s, self._part(s.tile.query, s.count * s.tile.shape.queries)) for s in stacks)
        return tuple((Stack(tile), place) for tile, place in self.tiles)

    def _part(self, query: int, length: int) -> Place:
        rows = self.queries.rows
        part = Span(rows.start + query * rows.step, length, rows.step)
        return Place(part, self.queries.columns, self.queries.spacing)


@lru_cache(maxsize=256)
def cut_blocks(
    pattern: Pattern,
    height: int,
    width: int,
    tile: tuple[int, int],
    batch: int,
    token_bytes: int,
    one_image: bool,
    score_bytes: int = 4,
    stacked: bool = False,
) -> tuple[Block, ...]:
    """All blocks of a plan, cut so that each fits the cache: whole batch, else one image, else fewer runs.

    Args:
        token_bytes, score_bytes: bytes of a token's, and of a score's, heads.
        stacked: a pass that computes stacks of tiles in one call: blocks are single runs where that takes fewer calls.
    """
    plan, blocks = make_plan(pattern, height, width, tile), []
    for column in plan.columns:
        for row in plan.rows:
            tokens = row.queries.length * column.queries.length + 2 * row.keys.length * column.keys.length
            scores = max(t.shape.queries * t.shape.keys for t in row.tiles)
            scores *= column.tiles[0].shape.queries * column.tiles[0].shape.keys
            fit = max(1, min(BLOCK_BYTES // (tokens * token_bytes), SCORES_BYTES // (scores * score_bytes)))
            nx = min(column.count, fit)
            ny = min(row.count, max(1, fit // nx)) if nx == column.count else 1
            nb = min(batch, fit // (nx * ny)) if ny == row.count else 1
            nb = 1 if one_image else max(1, nb)
            runs = batch * row.count * column.count
            if stacked and runs * len(row.stacks) < -(-runs // (nb * ny * nx)) * len(row.tiles):
                nb = ny = nx = 1
            blocks += [
                Block(row, column, (b, min(b + nb, batch)), (y, min(y + ny, row.count)), (x, min(x + nx, column.count)))
                for b in range(0, batch, nb)
                for y in range(0, row.count, ny)
                for x in range(0, column.count, nx)
            ]
    return tuple(blocks)


class Workspace:
    """Buffers reused from block to block: fresh pages cost more than the copies into them."""

    def __init__(self, compute: torch.dtype, device: torch.device) -> None:
        self.compute, self.device = compute, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor; valid until the same name is taken again."""
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.compute, device=self.device)
        return self._buffers[name][:size].view(shape)

    def tokens(self, name: str, view: Tensor) -> Tensor:
        """(b, cy, cx, ly, lx, ...) as (n, ly * lx, ...): the view itself where strides allow, else one copy."""
        b, cy, cx, ly, lx, *rest = view.shape
        shape = (b * cy * cx, ly * lx, *rest)
        if view.dtype == self.compute and _merges(view, (0, 1, 2)) and _merges(view, (3, 4)) and view.stride(-1) == 1:
            return view.reshape(shape)
        buffer = self.take(name, shape)
        buffer.view(view.shape).copy_(view)
        return buffer

    def heads_first(self, name: str, view: Tensor) -> Tensor:
        """(b, cy, cx, ly, lx, h, d) as contiguous (n * h, ly * lx, d): one copy."""
        return self.parts(name, view.unsqueeze(5))[0]

    def parts(self, name: str, view: Tensor) -> Tensor:
        """(b, cy, cx, ly, lx, p, h, d) as contiguous (p, n * h, ly * lx, d): one copy."""
        b, cy, cx, ly, lx, p, h, d = view.shape
        buffer = self.take(name, (p, b, cy, cx, h, ly, lx, d))
        buffer.copy_(view.permute(5, 0, 1, 2, 6, 3, 4, 7))
        return buffer.view(p, b * cy * cx * h, ly * lx, d)


def _merges(view: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether neighbouring dims can be flattened without a copy."""
    kept = [(view.shape[i], view.stride(i)) for i in dims if view.shape[i] != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))


class Raster:
    """Blocks of a map in raster order: strided views (b, cy, cx, ly, lx, ...) of a (B, H, W, ...) tensor."""

    def _view(self, t: Tensor, block: Block, rows: Span, columns: Span, spacing: tuple[int, int]) -> Tensor:
        sb, sy, sx = t.stride()[:3]
        first_y = rows.start + block.y[0] * spacing[0]
        first_x = columns.start + block.x[0] * spacing[1]
        return t.as_strided(
            (*block.counts, rows.length, columns.length, *t.shape[3:]),
            (sb, spacing[0] * sy, spacing[1] * sx, rows.step * sy, columns.step * sx, *t.stride()[3:]),
            t.storage_offset() + block.b[0] * sb + first_y * sy + first_x * sx,
        )

    def read(self, t: Tensor, block: Block, place: Place) -> Tensor:
        """The part at `place`, a view; where it leaves the map a copy that reads zeros there."""
        rows, columns = _inside(place.rows, t.shape[1]), _inside(place.columns, t.shape[2])
        view = self._view(t, block, rows, columns, place.spacing)
        if rows is place.rows and columns is place.columns:
            return view
        padded = t.new_zeros(*block.counts, place.rows.length, place.columns.length, *t.shape[3:])
        _cut(padded, place, rows, columns).copy_(view)
        return padded

    def write(self, t: Tensor, block: Block, place: Place, value: Tensor) -> None:
        """Store a part."""
        self._view(t, block, place.rows, place.columns, place.spacing).copy_(value)

    def add(self, t: Tensor, block: Block, place: Place, value: Tensor) -> None:
        """Add a part; runs that share coordinates are added one group after another."""
        rows, columns = _inside(place.rows, t.shape[1]), _inside(place.columns, t.shape[2])
        target = self._view(t, block, rows, columns, place.spacing)
        value = _cut(value, place, rows, columns)
        my, mx = block.row.disjoint_every, block.column.disjoint_every
        for y in range(min(my, block.counts[1])):
            for x in range(min(mx, block.counts[2])):
                target[:, y::my, x::mx].add_(value[:, y::my, x::mx])


class Curve:
    """Blocks of a map whose rows are places on a curve: the order is folded into the gather of each block."""

    def __init__(self, name: str, height: int, width: int) -> None:
        self.name, self.size = name, (height, width)

    def _index(self, t: Tensor, block: Block, place: Place) -> Tensor:
        def build() -> Tensor:
            runs = np.arange(*block.y)[:, None] * place.spacing[0] + place.rows.coordinates()
            return torch.from_numpy(curve_order(self.name, *self.size)[runs.ravel()]).to(t.device)

        return SCHEDULES.get((self.name, self.size, block.y, place, t.device), build, t.device)

    def read(self, t: Tensor, block: Block, place: Place) -> Tensor:
        """The part at `place`, (b, cy, 1, l, 1, ...)."""
        tokens = t[block.b[0] : block.b[1]].flatten(1, 2).index_select(1, self._index(t, block, place))
        return tokens.view(*block.counts, place.rows.length, 1, *t.shape[3:])

    def write(self, t: Tensor, block: Block, place: Place, value: Tensor) -> None:
        """Store a part."""
        tokens = t[block.b[0] : block.b[1]].flatten(1, 2)
        tokens.index_copy_(1, self._index(t, block, place), value.flatten(1, 4).to(t.dtype))

    def add(self, t: Tensor, block: Block, place: Place, value: Tensor) -> None:
        """Add a part; repeated places accumulate."""
        tokens = t[block.b[0] : block.b[1]].flatten(1, 2)
        tokens.index_add_(1, self._index(t, block, place), value.flatten(1, 4).to(t.dtype))


def _inside(span: Span, n: int) -> Span:
    """The part of a unit-step span inside [0, n), the span itself where all of it is; others never leave the map."""
    if span.start >= 0 and span.last < n:
        return span
    start = max(span.start, 0)
    return Span(start, min(span.last + 1, n) - start, 1)


def _cut(t: Tensor, place: Place, rows: Span, columns: Span) -> Tensor:
    """The sub-block that `rows` and `columns` are of `place`."""
    y, x = rows.start - place.rows.start, columns.start - place.columns.start
    return t[:, :, :, y : y + rows.length, x : x + columns.length]
