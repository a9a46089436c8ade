"""What is added to a tile's scores, bias and mask, and the way back from score gradients to the bias.

Masks of equal tiles are made once a call; gradients are summed per tile shape and scattered into the table at the end.
Shapes: n runs, h heads, L queries and S keys of a tile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bias import BiasKind, bias_kind, position_index, table_index
from .blocks import Block
from .cache import SCHEDULES
from .patterns import Resolved
from .tiles import Tile, TileShape

__all__ = ["TileScores", "tile_scores"]


class TileScores:
    """Additive term of a tile's scores (bias and mask), and the way back from score gradients to the bias."""

    def __init__(self, resolved: Resolved, compute: torch.dtype, device: torch.device) -> None:
        self.resolved, self.compute, self.device = resolved, compute, device

    def mask(self, block: Block, tile: Tile, q: Tensor) -> Tensor | None:
        """Broadcastable to (n, h, L, S), or None where every score counts and nothing is added."""
        return self._shared_mask(tile.shape, block.column.tiles[0].shape)

    def _shared_mask(self, y: TileShape, x: TileShape) -> Tensor | None:
        if y.full and x.full:
            return None

        def build() -> Tensor:
            allowed = torch.from_numpy(_pairs(y.allowed, x.allowed)).to(self.device)
            return torch.zeros(allowed.shape, dtype=self.compute, device=self.device).masked_fill_(~allowed, -torch.inf)

        return SCHEDULES.get(("mask", y, x, self.compute, self.device), build, self.device)[None, None]

    def collect(self, block: Block, tile: Tile, q: Tensor, ds: Tensor, dq: Tensor) -> None:
        """Take the gradient (n, h, L, S) of a tile's scores; add to dq (n, h, L, d) what the bias sends back to q."""

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the bias tensors."""
        return None, None


def _pairs(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Outer `and` of (ly, ky) and (lx, kx) as (ly * lx, ky * kx)."""
    return (y[:, None, :, None] & x[None, :, None, :]).reshape(y.shape[0] * x.shape[0], y.shape[1] * x.shape[1])


class TableScores(TileScores):
    """A table shared by all tiles of one shape. Masked pairs point at an extra entry that holds -inf."""

    def __init__(self, table: Tensor, resolved: Resolved, compute: torch.dtype) -> None:
        super().__init__(resolved, compute, table.device)
        self.like = table
        flat = table.flatten(1).to(compute)
        self.table = torch.cat([flat, flat.new_full((flat.shape[0], 1), -torch.inf)], 1)
        self.masks: dict[tuple[TileShape, TileShape], Tensor] = {}
        self.sums: dict[tuple[TileShape, TileShape], Tensor] = {}

    def _index(self, y: TileShape, x: TileShape) -> Tensor:
        reach = (self.resolved.y.reach, self.resolved.x.reach)

        def build() -> Tensor:
            index = table_index(y.displacement(), x.displacement(), *reach)
            masked = ~_pairs(y.allowed, x.allowed)
            return torch.from_numpy(np.where(masked, self.table.shape[1] - 1, index).ravel()).to(self.device)

        return SCHEDULES.get(("table", y, x, reach, self.device), build, self.device)

    def mask(self, block: Block, tile: Tile, q: Tensor) -> Tensor | None:
        y, x = tile.shape, block.column.tiles[0].shape
        if (y, x) not in self.masks:
            entries = self.table.index_select(1, self._index(y, x))
            self.masks[y, x] = entries.view(1, -1, y.queries * x.queries, y.keys * x.keys)
        return self.masks[y, x]

    def collect(self, block: Block, tile: Tile, q: Tensor, ds: Tensor, dq: Tensor) -> None:
        key = (tile.shape, block.column.tiles[0].shape)
        total = ds.sum(0)
        self.sums[key] = self.sums[key].add_(total) if key in self.sums else total

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        gradient = torch.zeros_like(self.table)
        for (y, x), total in self.sums.items():
            gradient.index_add_(1, self._index(y, x), total.flatten(1))
        return gradient[:, :-1].contiguous().view(self.like.shape).to(self.like.dtype), None


class PositionScores(TileScores):
    """A table indexed by the true 2-D places of two tokens of a curve: every tile has entries of its own."""

    def __init__(self, table: Tensor, resolved: Resolved, compute: torch.dtype) -> None:
        super().__init__(resolved, compute, table.device)
        self.like = table
        self.table = table.flatten(1).to(compute)
        self.gradient = torch.zeros_like(self.table)

    def _index(self, block: Block, tile: Tile) -> Tensor:
        row = block.row

        def build() -> Tensor:
            run = np.arange(*block.y)[:, None]
            queries = run * row.query_spacing + row.queries.start + tile.query + np.arange(tile.shape.queries)
            keys = run * row.key_spacing + row.keys.start + tile.key + np.arange(tile.shape.keys)
            return torch.from_numpy(position_index(self.resolved, queries, keys)).to(self.device)

        key = ("positions", self.resolved.pattern.curve, self.resolved.height, self.resolved.width)
        return SCHEDULES.get((*key, row, block.y, tile, self.device), build, self.device)

    def mask(self, block: Block, tile: Tile, q: Tensor) -> Tensor | None:
        entries = self.table[:, self._index(block, tile)].transpose(0, 1)  # (cy, h, L, S)
        shared = self._shared_mask(tile.shape, block.column.tiles[0].shape)
        return entries if shared is None else entries + shared

    def collect(self, block: Block, tile: Tile, q: Tensor, ds: Tensor, dq: Tensor) -> None:
        index = self._index(block, tile).flatten()
        self.gradient.index_add_(1, index, ds.transpose(0, 1).flatten(1))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        return self.gradient.view(self.like.shape).to(self.like.dtype), None


class DecomposedScores(TileScores):
    """q . rel_y[key - query] + q . rel_x[key - query], q unscaled (HaloNet, arXiv 2103.12731)."""

    def __init__(self, rel_y: Tensor, rel_x: Tensor, resolved: Resolved, compute: torch.dtype) -> None:
        super().__init__(resolved, compute, rel_y.device)
        self.like = (rel_y, rel_x)
        self.rel = (rel_y.to(compute), rel_x.to(compute))
        self.gradient = (torch.zeros_like(self.rel[0]), torch.zeros_like(self.rel[1]))

    def _index(self, shape: TileShape, which: int) -> Tensor:
        reach = (self.resolved.y.rel_reach, self.resolved.x.rel_reach)[which]

        def build() -> Tensor:
            return torch.from_numpy(np.clip(shape.displacement(decomposed=True) + reach, 0, 2 * reach)).to(self.device)

        return SCHEDULES.get(("decomposed", shape, reach, self.device), build, self.device)

    def _shapes(self, block: Block, tile: Tile) -> tuple[TileShape, TileShape]:
        return tile.shape, block.column.tiles[0].shape

    def mask(self, block: Block, tile: Tile, q: Tensor) -> Tensor | None:
        y, x = self._shapes(block, tile)
        grid = q.unflatten(2, (y.queries, x.queries))  # (n, h, ly, lx, d)
        sy = torch.einsum("nhyxd,ykd->nhyxk", grid, self.rel[0][self._index(y, 0)])
        sx = torch.einsum("nhyxd,xkd->nhyxk", grid, self.rel[1][self._index(x, 1)])
        scores = (sy[..., None] + sx[..., None, :]).flatten(4).flatten(2, 3)
        shared = self._shared_mask(y, x)
        return scores if shared is None else scores.add_(shared)

    def collect(self, block: Block, tile: Tile, q: Tensor, ds: Tensor, dq: Tensor) -> None:
        y, x = self._shapes(block, tile)
        grid, dgrid = q.unflatten(2, (y.queries, x.queries)), dq.unflatten(2, (y.queries, x.queries))
        full = ds.unflatten(3, (y.keys, x.keys)).unflatten(2, (y.queries, x.queries))
        for which, (shape, sums, axis) in enumerate(((y, full.sum(-1), "y"), (x, full.sum(-2), "x"))):
            index = self._index(shape, which)
            dgrid += torch.einsum(f"nhyxk,{axis}kd->nhyxd", sums, self.rel[which][index])
            part = torch.einsum(f"nhyxk,nhyxd->{axis}kd", sums, grid)
            self.gradient[which].index_add_(0, index.flatten(), part.flatten(0, 1))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        dy, dx = (g.to(r.dtype) for g, r in zip(self.gradient, self.like, strict=True))
        return dy, dx


def tile_scores(
    bias: Tensor | None, rel_x: Tensor | None, resolved: Resolved, compute: torch.dtype, q: Tensor
) -> tuple[TileScores, BiasKind]:
    """The additive term that a call's bias (checked against the pattern) calls for, and its kind."""
    kind = bias_kind(bias, rel_x, resolved, q.shape[3], q.shape[4])
    if kind is BiasKind.TABLE:
        assert bias is not None
        return TableScores(bias, resolved, compute), kind
    if kind is BiasKind.POSITIONS:
        assert bias is not None
        return PositionScores(bias, resolved, compute), kind
    if kind is BiasKind.DECOMPOSED:
        assert bias is not None
        assert rel_x is not None
        return DecomposedScores(bias, rel_x, resolved, compute), kind
    return TileScores(resolved, compute, q.device), kind
