"""The bias table's way into the kernels and back: terms per kind of tile, sums of score gradients, sums per entry."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind
from ..cache import SCHEDULES
from ..curves import curve_order
from . import bias as kernels
from . import neighborhood
from .launch import dense
from .launcher import Launcher
from .runs import Runs, runs
from .schedule import ABSENT, Schedule
from .site import CellPass, Site, TilePass, tile_pass

__all__ = ["atlas", "cell_bias_gradient", "cell_runs", "displacement_gradient", "tile_bias_gradient"]

PARTIAL_BYTES = 64 << 20  # score gradients held at a time on their way to a table
BUSY = 1024  # programs that keep a device busy: runs are shorter where there would be fewer
BLOCK = 1024  # pairs of an atlas that one program makes
ENTRY_BLOCK = 256  # pairs of one entry that a program sums at a time
RUN_BLOCK = 128  # pairs that one program sums over runs: few, so that many programs share the reading


def atlas(site: Site, table: Tensor, entry: Tensor) -> Tensor:
    """Terms (K, heads, M, N) float32 of every kind of tile, from the flat table entry (K, M, N) of every pair."""
    kinds, pairs = entry.shape[0], entry.shape[1] * entry.shape[2]
    made = torch.empty(kinds, site.heads, *entry.shape[1:], dtype=torch.float32, device=site.device)
    launch = _launcher("atlas", site.device, table.dtype, HEADS=site.heads, ENTRIES=site.entries, BLOCK=BLOCK)
    launch(kernels.atlas_kernel, -(-pairs // BLOCK) * kinds * site.heads, dense(table), entry, made, pairs)
    return made


@functools.lru_cache(maxsize=1024)
def _launcher(kernel: str, device: torch.device, dtype: torch.dtype | None = None, **constants: int) -> Launcher:
    """One for every kernel, device, dtype of the table it reads, and set of constants."""
    return Launcher(constants)


@dataclass(frozen=True, eq=False)
class _Sources:
    """For each table entry the flat places (int32) that add to it: places[bounds[e]:bounds[e + 1]], in order."""

    places: Tensor
    bounds: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [self.places, self.bounds]


def _sources(entry: Tensor, entries: int) -> _Sources:
    """Places of every table entry in `entry`, whose masked pairs are -1."""
    ordered, places = entry.flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(entries + 1, dtype=entry.dtype, device=entry.device))
    return _Sources(places.int(), bounds.int())


def _to_table(site: Site, bias: Tensor, partial: Tensor, work: Runs, sources: _Sources) -> Tensor:
    """Gradient (heads, entries) float32 from partial sums (runs, heads, M, N)."""
    groups, pairs = work.bounds.shape[0] - 1, partial.shape[2] * partial.shape[3]
    summed = torch.empty(groups, *partial.shape[1:], dtype=torch.float32, device=site.device)
    launch = _launcher("runs", site.device, HEADS=site.heads, BLOCK=RUN_BLOCK)
    launch(kernels.runs_kernel, -(-pairs // RUN_BLOCK) * groups * site.heads, partial, work.bounds, summed, pairs)
    gradient = torch.empty(site.heads, site.entries, dtype=torch.float32, device=site.device)
    launch = _launcher("table", site.device, HEADS=site.heads, ENTRIES=site.entries, BLOCK=ENTRY_BLOCK)
    launch(
        kernels.table_kernel, site.entries * site.heads, summed, sources.places, sources.bounds, gradient, pairs
    )  # fmt: skip
    return gradient


def _positions(site: Site, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """(T, M, N) int32: entry of a table of true positions for places (T, M), (T, N) of the curve; -1 where masked."""
    order = curve_order(str(site.pattern.curve), site.height, site.width)
    code = site.codes(keys)[torch.from_numpy(order.copy()).to(site.device)]
    entry = code[keys.long()][:, None, :] - code[queries.long()][:, :, None] + site.centre
    return entry.where(allowed, -1).int()


# --- cells ------------------------------------------------------------------------------------------------------------


def cell_runs(site: Site, cells: CellPass, batch: int, *, summed: bool = False) -> Runs:
    """Runs of cells over a batch; cached. summed: the score gradients of each run are held, in PARTIAL_BYTES."""
    groups = cells.groups
    items = cells.cells.first.shape[0] * batch
    length = min(cells.config.run, max(1, items * site.heads // BUSY))
    if summed:
        slots = cells.cells.offset.shape[1]
        at_once = PARTIAL_BYTES // (slots * slots * site.heads * 4)
        length = max(length, -(-items // max(1, at_once - len(groups))))
    key = ("runs", *_map(site), cells.how, batch, length)
    return SCHEDULES.get(key, lambda: runs(groups, batch, length, site.device), site.device)


def _map(site: Site) -> tuple[Any, ...]:
    """What the places of a site's tokens and of its table entries follow from."""
    return site.pattern, site.height, site.width, site.kind, site.device


def cell_bias_gradient(site: Site, cells: CellPass, bias: Tensor, partial: Tensor, work: Runs) -> Tensor:
    """Gradient of a bias table from the sums (runs, heads, M, M) of a backward pass over cells."""

    def build() -> _Sources:
        return _sources(_cell_entries(site, cells), site.entries)

    sources = SCHEDULES.get(("cell sources", *_map(site)), build, site.device)
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
    """Tiles whose score gradients are summed in one launch, sorted by group, and the places these are summed from.

    Attributes:
        members: (T,) int32, the tiles.
        groups: (kind, where the group begins in `members`, its tiles) of tiles that share their table entries.
    """

    members: Tensor
    groups: tuple[tuple[int, int, int], ...]
    sources: _Sources

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [self.members, *self.sources.tensors]


def tile_bias_gradient(
    site: Site, made: TilePass, terms: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor,
    sums: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of a bias table. `made`, `terms`: the dQ pass and the bias it read; `scale` has log2(e) in it."""
    own = tile_pass(site, "neighborhood.bias", ("G", "Q", "K", "V"), like=made)
    plan = own.plan
    blocks = plan.streamed.shape[2] // own.config.block_n
    total: Tensor | None = None
    for piece, work in _pieces(site, own, q.shape[0]):
        size = (work.table.shape[0], site.heads, own.config.block_m, plan.streamed.shape[2])
        partial = torch.empty(size, dtype=torch.float32, device=site.device)
        own.launch(
            neighborhood.bias_kernel, size[0] * site.heads * blocks, grad, q, k, v, sums, partial, work.table,
            piece.members, plan.tiles, plan.resident, plan.streamed, own.order, terms, own.codes, q,
            q.shape[1] * q.shape[2], scale, *own.images,
        )  # fmt: skip
        part = _to_table(site, bias, partial, work, piece.sources)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.view(bias.shape).to(bias.dtype)


def _pieces(site: Site, made: TilePass, batch: int) -> Iterator[tuple[_Piece, Runs]]:
    """All tiles, in pieces whose score gradients fit PARTIAL_BYTES, and the runs of each; cached."""
    pairs = made.config.block_m * made.plan.streamed.shape[2]
    at_once = max(1, PARTIAL_BYTES // (pairs * site.heads * 4))
    tiles = made.plan.by_kind
    if site.kind is BiasKind.POSITIONS:  # every tile has entries of its own
        tiles = [[tile] for group in tiles for tile in group]
    for first in range(0, len(tiles), at_once):
        part = tiles[first : first + at_once]
        key = (*made.key, site.kind, first, at_once)
        piece = SCHEDULES.get(("piece", *key), functools.partial(_piece, site, made.plan, part), site.device)
        # As many runs as keep the device busy, unless their score gradients would not fit.
        items = len(piece.members) * batch
        length = min(made.config.run, max(1, items * site.heads // BUSY))
        length = max(length, -(-items // max(1, at_once - len(part))))
        work = functools.partial(runs, piece.groups, batch, length, site.device)
        yield piece, SCHEDULES.get(("runs", *key, batch, length), work, site.device)


def _piece(site: Site, plan: Schedule, part: list[list[int]]) -> _Piece:
    tiles = torch.tensor([tile for group in part for tile in group], device=site.device)
    kinds = plan.tiles[:, 2].tolist()
    begins = np.cumsum([0, *(len(group) for group in part)]).tolist()
    groups = tuple((kinds[group[0]], begin, len(group)) for group, begin in zip(part, begins, strict=False))
    entry = torch.from_numpy(plan.entries()).to(site.device)[[kind for kind, _, _ in groups]]
    if site.kind is BiasKind.POSITIONS:
        slots = (plan.resident[:, 0], plan.streamed[:, 0])
        offsets = [s[plan.tiles[tiles, 2].long()] for s in slots]
        places = [plan.tiles[tiles, f, None] + o.where(o > ABSENT, 0) for f, o in enumerate(offsets)]
        entry = _positions(site, places[0], places[1], entry >= 0)
    return _Piece(tiles.int(), groups, _sources(entry, site.entries))
