"""What a kernel reads of a pattern: tiles of tokens, and what the tokens of a tile have to do with each other.

A pass holds one tile of `resident` tokens per program (queries in the forward pass, keys in the dK/dV pass) and streams
the tokens these have to do with through it (`streamed`: their keys, or the queries that see them). A tile is a place in
the map; everything else is said relative to that place and shared by all tiles that look alike, its `kind`. On a curve
the places are those of the curve, and one int32 load per token turns them into places of the map.

Shapes: T tiles, K kinds, M resident slots and N streamed slots of a tile, of which the last may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..curves import curve_order
from ..patterns import Axis, Pattern, Resolved, resolve
from ..tiles import Band, TileShape, axis_bands, inverse_axis

__all__ = ["ABSENT", "Cells", "Runs", "Schedule", "cell_slots", "cells", "in_cells", "runs", "schedule"]

ABSENT = -(1 << 30)  # offset of a slot without a token
NOWHERE = 1 << 20  # coordinate of an empty streamed slot: beyond every interval
SLOT_UNIT = 64  # streamed slots come in multiples of it, and blocks of streamed tokens divide it
MOST_CELL = 64  # tokens of a cell that one program holds whole
LOAD_SCORES = 12  # what streaming one token costs, in scores of one resident token

RESIDENT_FIELDS = ("offset", "low_y", "high_y", "low_x", "high_x", "code_y", "code_x", "rel_y", "rel_x")
STREAMED_FIELDS = ("offset", "y", "x", "code_y", "code_x", "rel_y", "rel_x")


@dataclass(frozen=True, eq=False)
class AxisTile:
    """One tile of one axis. Codes of a pair add up to its row of a bias table: resident.code + streamed.code.

    Attributes:
        resident, streamed: coordinates; streamed ones may leave the map where zero keys pad it.
        low, high: half-open interval of streamed slots of each resident token.
        codes, rel_codes: (resident, streamed) table codes, and those of a decomposed bias.
    """

    resident: np.ndarray
    streamed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    codes: tuple[np.ndarray, np.ndarray]
    rel_codes: tuple[np.ndarray, np.ndarray]
    limit: int

    @cached_property
    def inside(self) -> np.ndarray:
        """(streamed,) bool: which of them lie in the map."""
        return (self.streamed >= 0) & (self.streamed < self.limit)

    @cached_property
    def anchor(self) -> int:
        """The streamed coordinate that the tile's place is given by: the first inside the map."""
        found = np.flatnonzero(self.inside)
        return int(self.streamed[found[0]]) if len(found) else 0

    @cached_property
    def alike(self) -> bytes:
        """Equal for tiles that differ in their place only."""
        parts = [self.resident - self.resident[0], self.streamed - self.anchor, self.inside, self.low, self.high]
        parts += [*self.codes, *self.rel_codes]
        return b"|".join(np.asarray(p, dtype=np.int64).tobytes() for p in parts)


def axis_tiles(axis: Axis, tile: int, *, inverse: bool) -> list[AxisTile]:
    """All tiles of one axis with at most `tile` resident tokens, in the order of the map."""
    seen_from = inverse_axis(axis) if inverse else axis
    tiles = []
    for band in axis_bands(seen_from, tile, split=True):
        shape = band.tiles[0].shape
        for i in range(band.count):
            resident = band.queries.coordinates() + i * band.query_spacing
            streamed = band.keys.coordinates() + i * band.key_spacing
            tiles.append(_axis_tile(axis, seen_from, shape, resident, streamed, inverse))
    return sorted(tiles, key=lambda t: int(t.resident[0]))


def _axis_tile(
    axis: Axis, seen_from: Axis, shape: TileShape, resident: np.ndarray, streamed: np.ndarray, inverse: bool
) -> AxisTile:
    queries, keys = (streamed, resident) if inverse else (resident, streamed)
    frame = int(keys[0]) // axis.step if len(keys) else 0

    def codes(origin: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
        of_queries, of_keys = reach - origin[queries] // axis.step + frame, keys // axis.step - frame
        return (of_keys, of_queries) if inverse else (of_queries, of_keys)

    return AxisTile(
        resident,
        streamed,
        np.clip(shape.low, 0, len(streamed)),
        np.clip(shape.high, 0, len(streamed)),
        codes(axis.origin, axis.reach),
        codes(axis.rel_origin, axis.rel_reach),
        seen_from.keys,
    )


@dataclass(frozen=True, eq=False)
class Schedule:
    """One pass of one pattern on one map.

    Attributes:
        tiles: (T, 4) int32: place of the first resident token, place of the first streamed one, kind, streamed slots.
        resident: (K, 9, M) int32 and streamed: (K, 7, N) int32, the fields named above for every slot.
        order: (H*W,) int32, the map's place of every place of the curve; None where there is no curve.
        sides: streamed tokens (y, x) of the largest tile.
        zero_keys: whether slots without a token take part (zero padding).
        pitch: entries of a row of the bias table.
        grid: slots of a tile laid out as resident rows, columns, and streamed columns, all powers of two; None where
            slots are filled without gaps.
    """

    tiles: Tensor
    resident: Tensor
    streamed: Tensor
    order: Tensor | None
    sides: tuple[int, int]
    zero_keys: bool
    pitch: int
    grid: tuple[int, int, int] | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.tiles, self.resident, self.streamed, self.order) if t is not None)

    @property
    def kinds(self) -> int:
        """Number of different tiles."""
        return self.resident.shape[0]

    @cached_property
    def by_kind(self) -> list[list[int]]:
        """Tiles of each kind."""
        kinds = self.tiles[:, 2].tolist()
        return [[t for t, kind in enumerate(kinds) if kind == k] for k in range(self.kinds)]

    def entries(self) -> np.ndarray:
        """(K, M, N) int32: flat table entry of every pair, -1 where the pair is masked."""
        resident, streamed = self.resident.cpu().numpy(), self.streamed.cpu().numpy()
        _, low_y, high_y, low_x, high_x, own_y, own_x, *_ = (resident[:, f, :, None] for f in range(7))
        _, y, x, other_y, other_x, *_ = (streamed[:, f, None, :] for f in range(5))
        allowed = (y >= low_y) & (y < high_y) & (x >= low_x) & (x < high_x)
        return np.where(allowed, (own_y + other_y) * self.pitch + own_x + other_x, -1).astype(np.int32)


def schedule(
    pattern: Pattern, height: int, width: int, block_m: int, device: torch.device, *, inverse: bool, grid: bool = False
) -> Schedule:
    """Schedule of `pattern` on a height x width key map, with tiles of at most block_m resident tokens.

    inverse: resident tokens are keys, streamed ones the queries that see them. grid: lay slots out as `Schedule.grid`.
    """
    resolved = resolve(pattern, height, width)
    y, x = resolved.y, resolved.x
    shape = choose_tile(resolved, block_m, inverse, grid=grid)[0]
    rows, columns = (axis_tiles(a, s, inverse=inverse) for a, s in zip((y, x), shape, strict=True))
    widths = (x.keys, x.queries) if inverse else (x.queries, x.keys)
    layout = None
    if grid:
        across = _power_of_two(shape[1])
        layout = (block_m // across, across, _power_of_two(max(len(c.streamed) for c in columns)))
    kinds: dict[tuple[bytes, bytes], int] = {}
    made: list[tuple[AxisTile, AxisTile]] = []
    tiles = []
    for r in rows:
        for c in columns:
            key = (r.alike, c.alike)
            if key not in kinds:
                kinds[key] = len(made)
                made.append((r, c))
            place = int(r.resident[0]) * widths[0] + int(c.resident[0])
            first = r.anchor * widths[1] + c.anchor
            tiles.append((place, first, kinds[key], len(r.streamed) * (layout[2] if layout else len(c.streamed))))
    slots = max(1, *(t[3] for t in tiles))
    slots = -(-slots // SLOT_UNIT) * SLOT_UNIT
    resident = np.stack([_resident(r, c, block_m, widths[0], layout[1] if layout else 0) for r, c in made])
    streamed = np.stack([_streamed(r, c, slots, widths[1], layout[2] if layout else 0) for r, c in made])
    order = None
    if resolved.pattern.curve is not None:
        order = curve_order(resolved.pattern.curve, resolved.height, resolved.width)
    return Schedule(
        _int32(np.array(tiles), device),
        _int32(resident, device),
        _int32(streamed, device),
        None if order is None else _int32(order, device),
        (max(len(r.streamed) for r in rows), max(len(c.streamed) for c in columns)),
        any(not t.inside.all() for t in (*rows, *columns)),
        2 * x.reach + 1,
        layout,
    )


def _int32(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)


def _outer(y: np.ndarray, x: np.ndarray, scale: int) -> np.ndarray:
    """y * scale + x of every pair, flat."""
    return (np.asarray(y)[:, None] * scale + np.asarray(x)[None, :]).ravel()


def _pairwise(y: np.ndarray, x: np.ndarray, which: int) -> np.ndarray:
    """One axis' value for every pair, flat."""
    y, x = np.broadcast_arrays(np.asarray(y)[:, None], np.asarray(x)[None, :])
    return (y, x)[which].ravel()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _filled(
    fields: Sequence[np.ndarray], fill: Sequence[int], slots: int, tokens: tuple[int, int], across: int
) -> np.ndarray:
    """(fields, slots): the fields of tokens (y, x), and what empty slots hold: after the last, or to `across` a row."""
    y, x = tokens
    at = np.arange(y)[:, None] * (across or x) + np.arange(x)
    filled = np.repeat(np.array(fill)[:, None], slots, 1)
    filled[:, at.ravel()] = np.stack(fields)
    return filled


def _resident(y: AxisTile, x: AxisTile, slots: int, width: int, across: int = 0) -> np.ndarray:
    fields = [
        _outer(y.resident - y.resident[0], x.resident - x.resident[0], width),
        _pairwise(y.low, x.low, 0),
        _pairwise(y.high, x.high, 0),
        _pairwise(y.low, x.low, 1),
        _pairwise(y.high, x.high, 1),
        *(_pairwise(y.codes[0], x.codes[0], which) for which in (0, 1)),
        *(_pairwise(y.rel_codes[0], x.rel_codes[0], which) for which in (0, 1)),
    ]
    return _filled(fields, (ABSENT, *[0] * 8), slots, (len(y.resident), len(x.resident)), across)


def _streamed(y: AxisTile, x: AxisTile, slots: int, width: int, across: int = 0) -> np.ndarray:
    inside = (y.inside[:, None] & x.inside[None, :]).ravel()
    offset = np.where(inside, _outer(y.streamed - y.anchor, x.streamed - x.anchor, width), ABSENT)
    places = np.arange(len(y.streamed)), np.arange(len(x.streamed))
    fields = [
        offset,
        _pairwise(*places, 0),
        _pairwise(*places, 1),
        *(_pairwise(y.codes[1], x.codes[1], which) for which in (0, 1)),
        *(_pairwise(y.rel_codes[1], x.rel_codes[1], which) for which in (0, 1)),
    ]
    # Empty slots read the tile's anchor: always a token, never counted.
    fill = (0, NOWHERE, NOWHERE, 0, 0, 0, 0)
    return _filled(fields, fill, slots, (len(y.streamed), len(x.streamed)), across)


def choose_tile(
    resolved: Resolved, block_m: int, inverse: bool, *, grid: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Resident tokens (y, x) of a tile, at most block_m in all, and its cost: scores computed and tokens streamed."""
    y, x = (inverse_axis(a) if inverse else a for a in (resolved.y, resolved.x))
    sides = sorted({min(s, n) for n in (y.queries, x.queries) for s in (1, 2, 4, 7, 8, 14, 16, 32, 64, 128)})
    candidates = {(ty, min(block_m // ty, x.queries)) for ty in sides if ty <= min(block_m, y.queries)}
    candidates |= {(min(block_m // tx, y.queries), tx) for tx in sides if tx <= min(block_m, x.queries)}
    candidates |= {(s, s) for s in sides if s * s <= block_m and s <= min(y.queries, x.queries)}
    if grid:
        powers = [1 << p for p in range(block_m.bit_length())]
        candidates = {(min(block_m // tx, y.queries), min(tx, x.queries)) for tx in powers}
    rows = {t: _streamed_lengths(axis_bands(y, t, split=True)) for t in {c[0] for c in candidates}}
    columns = {t: _streamed_lengths(axis_bands(x, t, split=True)) for t in {c[1] for c in candidates}}

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        (ny, cy), (nx, cx) = rows[tile[0]], columns[tile[1]]
        if grid:
            nx = np.full_like(nx, _power_of_two(int(nx.max())))
        slots = -(-(ny[:, None] * nx) // SLOT_UNIT) * SLOT_UNIT
        return int((slots * cy[:, None] * cx).sum()) * (block_m + LOAD_SCORES), -tile[1]

    best = min(sorted(candidates), key=cost)
    return best, cost(best)


def _streamed_lengths(bands: tuple[Band, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Streamed tokens of each band's tile, and how many such tiles there are."""
    return np.array([b.keys.length for b in bands]), np.array([b.count for b in bands])


# --- cells: tokens that attend each other and nothing else ------------------------------------------------------------


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
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.first, self.offset, self.entry, self.order) if t is not None)


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


def _slots(size: tuple[int, int]) -> int:
    return max(16, 1 << (size[0] * size[1] - 1).bit_length())


def cell_slots(pattern: Pattern, height: int, width: int) -> int | None:
    """Slots of a cell of a pattern that is in cells, a power of two; None for others."""
    size = _cell_size(pattern, height, width)
    return _slots(size) if size is not None and in_cells(pattern, height, width) else None


def in_cells(pattern: Pattern, height: int, width: int) -> bool:
    """Whether a pattern cuts the map into cells small enough for one program to hold whole."""
    size = _cell_size(pattern, height, width)
    return size is not None and size[0] * size[1] <= MOST_CELL


def cells(pattern: Pattern, height: int, width: int, device: torch.device) -> Cells:
    """The cells of a pattern that has them."""
    size = _cell_size(pattern, height, width)
    assert size is not None

    slots = _slots(size)
    resolved = resolve(pattern, height, width)
    rows, columns = (axis_tiles(a, s, inverse=False) for a, s in zip((resolved.y, resolved.x), size, strict=True))
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
        own, other = _resident(y, x, slots, row), _streamed(y, x, slots, row)
        offset.append(own[0])
        present = np.arange(slots) < len(y.resident) * len(x.resident)
        pairs = present[:, None] & present[None, :]
        codes = (own[5] * pitch + own[6])[:, None] + (other[3] * pitch + other[4])[None, :]
        entry.append(np.where(pairs, codes, -1))
        counts.append(len(members))
    order = None
    if pattern.curve is not None:
        order = _int32(curve_order(pattern.curve, height, width), device)
    begins = tuple(np.cumsum([0, *counts[:-1]]).tolist())
    return Cells(
        _int32(np.array(first), device),
        _int32(np.stack(offset), device),
        _int32(np.stack(entry), device),
        order,
        begins,
        tuple(counts),
    )


# --- runs: how a pass that sums over many tiles is cut among programs -------------------------------------------------


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
    def nbytes(self) -> int:
        """Bytes held."""
        return self.table.nbytes + self.bounds.nbytes


def runs(groups: Sequence[tuple[int, int, int]], batch: int, length: int, device: torch.device) -> Runs:
    """Runs of at most `length` items over `batch` images of each group of tiles: (kind, where it begins, its tiles)."""
    table, bounds = [], [0]
    for kind, begin, count in groups:
        items = count * batch
        pieces = -(-items // length)
        cuts = [items * p // max(pieces, 1) for p in range(pieces + 1)]
        table += [(kind, begin, count, a, b - a) for a, b in pairwise(cuts)]
        bounds.append(len(table))
    return Runs(_int32(np.array(table), device), _int32(np.array(bounds), device))
