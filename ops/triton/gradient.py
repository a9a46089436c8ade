"""The bias table's way into the kernels and back: terms per kind of tile, sums of score gradients, sums per entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind
from ..curves import curve_order
from . import bias as kernels
from . import neighborhood
from .launch import cached
from .schedule import ABSENT, Runs, runs
from .site import CellPass, Site, TilePass, tile_pass

__all__ = ["atlas", "cell_bias_gradient", "cell_runs", "displacement_gradient", "tile_bias_gradient"]

PARTIAL_BYTES = 64 << 20  # score gradients held at a time on their way to a table
BLOCK = 1024  # pairs of an atlas that one program makes
RUN_BLOCK = 128  # pairs that one program sums over runs: few, so that many programs share the reading


def atlas(site: Site, table: Tensor, entry: Tensor) -> Tensor:
    """Terms (K, heads, M, N) float32 of every kind of tile, from the flat table entry (K, M, N) of every pair."""
    kinds, pairs = entry.shape[0], entry.shape[1] * entry.shape[2]
    made = torch.empty(kinds, site.heads, *entry.shape[1:], dtype=torch.float32, device=site.device)
    kernels.atlas_kernel[(-(-pairs // BLOCK) * kinds * site.heads,)](
        table.contiguous(), entry, made, pairs, HEADS=site.heads, ENTRIES=site.entries, BLOCK=BLOCK
    )
    return made


@dataclass(frozen=True, eq=False)
class _Sources:
    """For each table entry the flat places that add to it: places[bounds[e]:bounds[e + 1]], in order."""

    places: Tensor
    bounds: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.places.nbytes + self.bounds.nbytes


def _sources(entry: Tensor, entries: int) -> _Sources:
    """Places of every table entry in `entry`, whose masked pairs are -1."""
    ordered, places = entry.flatten().long().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(entries + 1, device=entry.device))
    return _Sources(places, bounds.int())


def _to_table(site: Site, bias: Tensor, partial: Tensor, work: Runs, sources: _Sources) -> Tensor:
    """Gradient (heads, entries) float32 from partial sums (runs, heads, M, N)."""
    groups, pairs = work.bounds.shape[0] - 1, partial.shape[2] * partial.shape[3]
    summed = torch.empty(groups, *partial.shape[1:], dtype=torch.float32, device=site.device)
    kernels.runs_kernel[(-(-pairs // RUN_BLOCK) * groups * site.heads,)](
        partial, work.bounds, summed, pairs, HEADS=site.heads, BLOCK=RUN_BLOCK
    )
    gradient = torch.empty(site.heads, site.entries, dtype=torch.float32, device=site.device)
    kernels.table_kernel[(site.entries, site.heads)](
        summed, sources.places, sources.bounds, gradient, pairs, HEADS=site.heads, ENTRIES=site.entries, BLOCK=256
    )
    return gradient


def _positions(site: Site, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """(T, M, N) int32: entry of a table of true positions for places (T, M), (T, N) of the curve; -1 where masked."""
    token = torch.from_numpy(curve_order(str(site.pattern.curve), site.height, site.width).copy()).to(site.device)
    code = token // site.width * (2 * site.width - 1) + token % site.width
    entry = code[keys.long()][:, None, :] - code[queries.long()][:, :, None] + site.centre
    return entry.where(allowed, -1).int()


# --- cells ------------------------------------------------------------------------------------------------------------


def cell_runs(site: Site, cells: CellPass, batch: int) -> Runs:
    """Runs of cells over a batch; cached."""
    key = (site, "cell runs", batch, cells.config.run)
    return cached(key, site.device, lambda: runs(cells.groups, batch, cells.config.run, site.device))


def cell_bias_gradient(site: Site, cells: CellPass, bias: Tensor, partial: Tensor, work: Runs) -> Tensor:
    """Gradient of a bias table from the sums (runs, heads, M, M) of a backward pass over cells."""
    sources = cached((site, "cell sources"), site.device, lambda: _sources(_cell_entries(site, cells), site.entries))
    return _to_table(site, bias, partial, work, sources).view(bias.shape).to(bias.dtype)


def _cell_entries(site: Site, cells: CellPass) -> Tensor:
    """Flat table entry of every pair, by group of cells."""
    held = cells.cells
    if site.kind is BiasKind.TABLE:
        return held.entry
    kinds, begins, _ = zip(*cells.groups, strict=True)
    offset = held.offset[list(kinds)]
    present = offset > ABSENT
    place = held.first[list(begins), None] + offset.where(present, 0)
    return _positions(site, place, place, present[:, :, None] & present[:, None, :])


def displacement_gradient(bias: Tensor, partial: Tensor) -> Tensor:
    """Gradient of a bias table from the sums (programs, rows, columns) of a dQ pass, of which heads alternate."""
    heads, rows, columns = bias.shape
    return partial.unflatten(0, (-1, heads)).sum(0)[:, :rows, :columns].to(bias.dtype).contiguous()


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """Tiles whose score gradients are summed in one launch: sorted by group, cut in runs, with their sources."""

    members: Tensor
    work: Runs
    sources: _Sources

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.members.nbytes + self.work.nbytes + self.sources.nbytes


def tile_bias_gradient(
    site: Site, made: TilePass, terms: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor,
    sums: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of a bias table. `made`, `terms`: the dQ pass and the bias it read; `scale` has log2(e) in it."""
    own = tile_pass(site, "neighborhood.bias", ("G", "Q", "K", "V"), like=made)
    plan = own.plan
    blocks = plan.streamed.shape[2] // own.config.block_n
    total: Tensor | None = None
    for piece in _pieces(site, own, q.shape[0]):
        size = (piece.work.table.shape[0], site.heads, own.config.block_m, plan.streamed.shape[2])
        partial = torch.empty(size, dtype=torch.float32, device=site.device)
        neighborhood.bias_kernel[(size[0] * site.heads * blocks,)](
            grad, q, k, v, sums, partial, piece.work.table, piece.members, plan.tiles, plan.resident,
            plan.streamed, own.order, terms, own.codes, q, q.shape[1] * q.shape[2], scale, *own.images,
            ZERO_KEYS=plan.zero_keys, **own.constants,
        )  # fmt: skip
        part = _to_table(site, bias, partial, piece.work, piece.sources)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.view(bias.shape).to(bias.dtype)


def _pieces(site: Site, made: TilePass, batch: int) -> Iterator[_Piece]:
    """All tiles, in pieces whose score gradients fit PARTIAL_BYTES; cached."""
    pairs = made.config.block_m * made.plan.streamed.shape[2]
    at_once = max(1, PARTIAL_BYTES // (pairs * site.heads * 4))
    groups = made.plan.by_kind
    if site.kind is BiasKind.POSITIONS:  # every tile has entries of its own
        groups = [[tile] for group in groups for tile in group]
    for first in range(0, len(groups), at_once):
        part = groups[first : first + at_once]
        key = (site, "bias piece", batch, first, at_once)
        yield cached(key, site.device, lambda part=part: _piece(site, made, batch, part, at_once))  # type: ignore[misc]


def _piece(site: Site, made: TilePass, batch: int, part: list[list[int]], at_once: int) -> _Piece:
    plan = made.plan
    tiles = torch.tensor([tile for group in part for tile in group], device=site.device)
    kinds = plan.tiles[:, 2].tolist()
    begins = np.cumsum([0, *(len(group) for group in part)]).tolist()
    groups = [(kinds[group[0]], begin, len(group)) for group, begin in zip(part, begins, strict=False)]
    # As many runs as keep the device busy, unless their score gradients would not fit.
    length = max(made.config.run, -(-len(tiles) * batch // max(1, at_once - len(groups))))
    entry = torch.from_numpy(plan.entries()).to(site.device)[[kind for kind, _, _ in groups]]
    if site.kind is BiasKind.POSITIONS:
        slots = (plan.resident[:, 0], plan.streamed[:, 0])
        offsets = [s[plan.tiles[tiles, 2].long()] for s in slots]
        places = [plan.tiles[tiles, f, None] + o.where(o > ABSENT, 0) for f, o in enumerate(offsets)]
        entry = _positions(site, places[0], places[1], entry >= 0)
    return _Piece(tiles.int(), runs(groups, batch, length, site.device), _sources(entry, site.entries))
