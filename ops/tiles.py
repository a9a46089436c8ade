"""Query tiles and the keys each of them needs, derived from the intervals of a pattern.

Per axis, queries are cut into tiles of consecutive members of one residue class. A *band* is a run of tiles whose keys
overlap, read together as one block of the map; bands that look alike and are evenly spaced are one `Band` with a
`count`, so that a backend can batch them. All numbers are Python ints: a plan holds no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from .patterns import Axis, Pattern, resolve

__all__ = ["Band", "Plan", "Span", "Stack", "Tile", "TileShape", "axis_bands", "inverse_axis", "make_plan", "waste"]


@dataclass(frozen=True)
class Span:
    """Arithmetic progression of coordinates: start, start + step, ... (`length` of them)."""

    start: int
    length: int
    step: int

    @property
    def last(self) -> int:
        """The last coordinate."""
        return self.start + (self.length - 1) * self.step

    def coordinates(self) -> np.ndarray:
        """(length,) int64."""
        return self.start + np.arange(self.length) * self.step


@dataclass(frozen=True)
class TileShape:
    """What a tile looks like relative to its first key, in key steps; equal shapes share masks and bias blocks.

    `low`, `high`: half-open interval of keys of each query; `origin`, `rel_origin`: the key of displacement 0.
    """

    keys: int
    low: tuple[int, ...]
    high: tuple[int, ...]
    origin: tuple[int, ...]
    rel_origin: tuple[int, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.keys, self.low, self.high, self.origin, self.rel_origin))

    def __hash__(self) -> int:  # shapes are dictionary keys on the hot path
        return self._hash

    @cached_property
    def queries(self) -> int:
        """Number of queries of the tile."""
        return len(self.low)

    @cached_property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return bool(self.allowed.all())

    @cached_property
    def allowed(self) -> np.ndarray:
        """(queries, keys) bool: which keys each query sees."""
        j = np.arange(self.keys)
        return (j >= np.array(self.low)[:, None]) & (j < np.array(self.high)[:, None])

    def displacement(self, *, decomposed: bool = False) -> np.ndarray:
        """(queries, keys) int64: key minus query, in steps."""
        origin = self.rel_origin if decomposed else self.origin
        return np.arange(self.keys) - np.array(origin)[:, None]


@dataclass(frozen=True)
class Tile:
    """Queries [query, query + shape.queries) of a band and its keys [key, key + shape.keys), as places in the band."""

    query: int
    key: int
    shape: TileShape


@dataclass(frozen=True)
class Stack:
    """`count` neighbouring tiles of one shape, each `shape.queries` queries and `key_step` keys after the one before.

    Its first tile stands for all of them.
    """

    tile: Tile
    count: int = 1
    key_step: int = 0


@dataclass(frozen=True)
class Band:
    """`count` alike runs of tiles, `query_spacing` and `key_spacing` coordinates apart, each read as one block."""

    queries: Span
    keys: Span
    tiles: tuple[Tile, ...]
    count: int = 1
    query_spacing: int = 0
    key_spacing: int = 0

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The tiles of a run, with those joined that look alike and are evenly spaced."""
        stacks: list[Stack] = []
        for tile in self.tiles:
            if stacks:
                first, count, key_step = stacks[-1].tile, stacks[-1].count, stacks[-1].key_step
                gap = tile.key - first.key
                if tile.shape == first.shape and (count == 1 or gap == count * key_step):
                    stacks[-1] = Stack(first, count + 1, gap if count == 1 else key_step)
                    continue
            stacks.append(Stack(tile))
        return tuple(stacks)

    @cached_property
    def disjoint_every(self) -> int:
        """Smallest m such that runs i, i + m, i + 2m, ... share no key: gradients are added in m groups."""
        runs = self.keys.coordinates() + self.key_spacing * np.arange(self.count)[:, None]
        for m in range(1, self.count):
            if all(len(np.unique(runs[r::m])) == runs[r::m].size for r in range(m)):
                return m
        return self.count


@dataclass(frozen=True)
class Plan:
    """Bands of both axes. Column bands hold one tile each; `exclusive`: every key is read by exactly one block."""

    rows: tuple[Band, ...]
    columns: tuple[Band, ...]
    exclusive: bool


def axis_bands(axis: Axis, tile: int, *, split: bool) -> tuple[Band, ...]:
    """Cut one axis into bands of tiles of at most `tile` queries; with `split` every tile is a band of its own."""
    bands: list[Band] = []
    residue = axis.start % axis.step
    for r in np.unique(residue):
        members = np.flatnonzero(residue == r)
        for component in _components(axis, members):
            tiles = [component[a:b] for a, b in _cuts(axis, component, tile)]
            bands += [_band(axis, [t]) for t in tiles] if split else [_band(axis, tiles)]
    return tuple(_batched(bands, axis.keys))


def _components(axis: Axis, members: np.ndarray) -> Iterator[np.ndarray]:
    """Maximal runs of queries whose key intervals overlap: one cell of a window, a whole class of a neighborhood."""
    furthest = np.maximum.accumulate(axis.stop[members])
    fresh = np.flatnonzero(axis.start[members][1:] >= furthest[:-1]) + 1
    yield from np.split(members, fresh)


def _cuts(axis: Axis, members: np.ndarray, tile: int) -> list[tuple[int, int]]:
    """Cut `members` into pieces of at most `tile`, where possible between queries of different keys."""
    starts = axis.start[members]
    runs = np.flatnonzero(np.diff(starts, prepend=starts[0] - 1))
    ends = [*runs[1:].tolist(), len(members)]
    cuts: list[tuple[int, int]] = []
    begin = 0
    for a, b in zip(runs.tolist(), ends, strict=True):
        if b - begin <= tile:
            continue
        if a > begin:
            cuts.append((begin, a))
            begin = a
        while b - begin > tile:
            cuts.append((begin, begin + tile))
            begin += tile
    cuts.append((begin, len(members)))
    return cuts


def _band(axis: Axis, tiles: list[np.ndarray]) -> Band:
    first, last = tiles[0][0], tiles[-1][-1]
    members = np.concatenate(tiles)
    step = int(members[1] - members[0]) if len(members) > 1 else 1
    key0 = int(axis.start[first])
    keys = Span(key0, -(-(int(axis.stop[last]) - key0) // axis.step), axis.step)
    made, done = [], 0
    for t in tiles:
        low0 = int(axis.start[t[0]])
        made.append(Tile(done, (low0 - key0) // axis.step, _shape(axis, t, low0)))
        done += len(t)
    return Band(Span(int(first), len(members), step), keys, tuple(made))


def _shape(axis: Axis, queries: np.ndarray, key0: int) -> TileShape:
    def steps(x: np.ndarray) -> tuple[int, ...]:
        return tuple((-((key0 - x) // axis.step)).tolist())  # ceil((x - key0) / step)

    low, high = steps(axis.start[queries]), steps(axis.stop[queries])
    shape = TileShape(max(high), low, high, steps(axis.origin[queries]), steps(axis.rel_origin[queries]))
    return _interned(shape)


@lru_cache(maxsize=4096)
def _interned(shape: TileShape) -> TileShape:
    """One object per shape, so that dictionaries find it by identity."""
    return shape


def _batched(bands: list[Band], keys: int) -> Iterator[Band]:
    """Join bands that look alike and whose queries and keys are evenly spaced; padded ones stay alone."""
    alike: dict[object, list[Band]] = {}
    for i, band in enumerate(bands):
        padded = band.keys.start < 0 or band.keys.last >= keys
        kind = (band.queries.length, band.queries.step, band.keys.length, band.tiles, i if padded else -1)
        alike.setdefault(kind, []).append(band)
    for group in alike.values():
        group.sort(key=lambda b: b.queries.start)
        while group:
            head, taken, left = group[0], [group[0]], []
            for band in group[1:]:
                gap = (band.queries.start - taken[-1].queries.start, band.keys.start - taken[-1].keys.start)
                if len(taken) == 1:
                    spacing = gap
                elif gap != spacing:
                    left.append(band)
                    continue
                taken.append(band)
            if len(taken) == 1:
                yield head
            else:
                yield replace(head, count=len(taken), query_spacing=spacing[0], key_spacing=spacing[1])
            group = left


def inverse_axis(axis: Axis) -> Axis:
    """The same pairs seen from the keys: the queries that see key j are `start[j] <= i < stop[j]`, `step` apart.

    Intervals are monotone within a residue class, so the queries of a key are an interval again. Keys outside the map,
    which zero padding makes, have no row here. Origins are not those of the pattern: displacements are taken from it.
    """
    starts, stops = np.zeros(axis.keys, dtype=np.int64), np.zeros(axis.keys, dtype=np.int64)
    residue, keys = axis.start % axis.step, np.arange(axis.keys)
    for r in range(axis.step):
        queries = np.flatnonzero(residue == r)
        members = keys[keys % axis.step == r]
        if not len(queries) or not len(members):
            continue
        first = np.searchsorted(axis.stop[queries], members, side="right")
        past = np.maximum(np.searchsorted(axis.start[queries], members, side="right"), first)
        # A key that nobody sees keeps an empty interval in its own residue class.
        starts[members] = queries[np.minimum(first, len(queries) - 1)]
        stops[members] = np.where(past > first, queries[past - 1] + 1, starts[members])
    return Axis(starts, stops, axis.step, keys, 0, axis.queries, keys, 0)


def waste(rows: tuple[Band, ...], columns: tuple[Band, ...]) -> float:
    """Share of the computed scores that no query asked for: 0 for windows, 0.5 when half the work is masked."""
    computed = useful = 1
    for bands in (rows, columns):
        computed *= sum(b.count * t.shape.queries * t.shape.keys for b in bands for t in b.tiles)
        useful *= sum(b.count * int(t.shape.allowed.sum()) for b in bands for t in b.tiles)
    return 1.0 - useful / computed


@lru_cache(maxsize=1024)
def make_plan(pattern: Pattern, height: int, width: int, tile: tuple[int, int]) -> Plan:
    """Plan of `pattern` on a height x width key map with query tiles of at most tile = (rows, columns)."""
    resolved = resolve(pattern, height, width)
    rows = axis_bands(resolved.y, tile[0], split=False)
    columns = axis_bands(resolved.x, tile[1], split=True)
    exclusive = all(
        sum(b.count * b.keys.length for b in bands) == axis.keys
        for bands, axis in ((rows, resolved.y), (columns, resolved.x))
    )
    return Plan(rows, columns, exclusive)
