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
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind
from ..curves import curve_order
from ..patterns import Pattern, Resolved, resolve
from ..tiles import Band, axis_bands, inverse_axis
from .axis_tiles import AxisTile, axis_tiles
from .launch import power_of_two

__all__ = [
    "ABSENT",
    "LOAD_SCORES",
    "RESIDENT_FIELDS",
    "SLOT_UNIT",
    "STREAMED_FIELDS",
    "Schedule",
    "choose_tile",
    "curve_places",
    "int32",
    "resident_fields",
    "schedule",
    "streamed_fields",
]

ABSENT = -(1 << 30)  # offset of a slot without a token
NOWHERE = 1 << 20  # coordinate of an empty streamed slot: beyond every interval
SLOT_UNIT = 64  # streamed slots come in multiples of it, and blocks of streamed tokens divide it
LOAD_SCORES = 12  # what streaming one token costs, in scores of one resident token

RESIDENT_FIELDS = ("offset", "low_y", "high_y", "low_x", "high_x", "code_y", "code_x", "rel_y", "rel_x")
STREAMED_FIELDS = ("offset", "y", "x", "code_y", "code_x", "rel_y", "rel_x")


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
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [t for t in (self.tiles, self.resident, self.streamed, self.order) if t is not None]

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
    pattern: Pattern, height: int, width: int, block_m: int, device: torch.device, *, inverse: bool, grid: bool = False,
    kind: BiasKind = BiasKind.TABLE,
) -> Schedule:  # fmt: skip
    """Schedule of `pattern` on a height x width key map, with tiles of at most block_m resident tokens.

    inverse: resident tokens are keys, streamed ones the queries that see them. grid: lay slots out as `Schedule.grid`.
    kind: as in `axis_tiles`.
    """
    resolved = resolve(pattern, height, width)
    y, x = resolved.y, resolved.x
    shape = choose_tile(resolved, block_m, inverse, grid=grid)[0]
    rows, columns = (axis_tiles(a, s, inverse=inverse, kind=kind) for a, s in zip((y, x), shape, strict=True))
    widths = (x.keys, x.queries) if inverse else (x.queries, x.keys)
    layout = None
    if grid:
        across = power_of_two(shape[1], 1)
        layout = (block_m // across, across, power_of_two(max(len(c.streamed) for c in columns), 1))
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
    resident = np.stack([resident_fields(r, c, block_m, widths[0], layout[1] if layout else 0) for r, c in made])
    streamed = np.stack([streamed_fields(r, c, slots, widths[1], layout[2] if layout else 0) for r, c in made])
    return Schedule(
        int32(np.array(tiles), device),
        int32(resident, device),
        int32(streamed, device),
        curve_places(pattern, height, width, device),
        (max(len(r.streamed) for r in rows), max(len(c.streamed) for c in columns)),
        any(not t.inside.all() for t in (*rows, *columns)),
        2 * x.reach + 1,
        layout,
    )


def curve_places(pattern: Pattern, height: int, width: int, device: torch.device) -> Tensor | None:
    """(height * width,) int32: the map's place of every place of a pattern's curve; None where it has none."""
    if pattern.curve is None:
        return None
    return int32(curve_order(pattern.curve, height, width), device)


def int32(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)


def _outer(y: np.ndarray, x: np.ndarray, scale: int) -> np.ndarray:
    """y * scale + x of every pair, flat."""
    return (np.asarray(y)[:, None] * scale + np.asarray(x)[None, :]).ravel()


def _pairwise(y: np.ndarray, x: np.ndarray, which: int) -> np.ndarray:
    """One axis' value for every pair, flat."""
    y, x = np.broadcast_arrays(np.asarray(y)[:, None], np.asarray(x)[None, :])
    return (y, x)[which].ravel()


def _filled(
    fields: Sequence[np.ndarray], fill: Sequence[int], slots: int, tokens: tuple[int, int], across: int
) -> np.ndarray:
    """(fields, slots): the fields of tokens (y, x), and what empty slots hold: after the last, or to `across` a row."""
    y, x = tokens
    at = np.arange(y)[:, None] * (across or x) + np.arange(x)
    filled = np.repeat(np.array(fill)[:, None], slots, 1)
    filled[:, at.ravel()] = np.stack(fields)
    return filled


def resident_fields(y: AxisTile, x: AxisTile, slots: int, width: int, across: int = 0) -> np.ndarray:
    """(9, slots): `Schedule.resident` of one kind of tile on a map of that width; `across` as in `_filled`."""
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


def streamed_fields(y: AxisTile, x: AxisTile, slots: int, width: int, across: int = 0) -> np.ndarray:
    """(7, slots): `Schedule.streamed` of one kind of tile on a map of that width; `across` as in `_filled`."""
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
    if 1 in (y.queries, x.queries):  # a curve: bands of short tiles would be many, and are never better
        candidates = {(min(block_m, y.queries), min(block_m, x.queries))}
    if grid:
        powers = [1 << p for p in range(block_m.bit_length())]
        candidates = {(min(block_m // tx, y.queries), min(tx, x.queries)) for tx in powers}
    rows = {t: _streamed_lengths(axis_bands(y, t, split=True)) for t in {c[0] for c in candidates}}
    columns = {t: _streamed_lengths(axis_bands(x, t, split=True)) for t in {c[1] for c in candidates}}

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        (ny, cy), (nx, cx) = rows[tile[0]], columns[tile[1]]
        if grid:
            nx = np.full_like(nx, power_of_two(int(nx.max()), 1))
        slots = -(-(ny[:, None] * nx) // SLOT_UNIT) * SLOT_UNIT
        return int((slots * cy[:, None] * cx).sum()) * (block_m + LOAD_SCORES), -tile[1]

    best = min(sorted(candidates), key=cost)
    return best, cost(best)


def _streamed_lengths(bands: tuple[Band, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Streamed tokens of each band's tile, and how many such tiles there are."""
    return np.array([b.keys.length for b in bands]), np.array([b.count for b in bands])
