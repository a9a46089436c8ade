"""Which blocks of keys each block of queries visits, counted from the intervals of the pattern.

Tokens are put in an order and cut into blocks; a block of queries then computes every score of each key block of which
it needs at least one. Query blocks are taken one by one, within the box of keys that any of their queries sees: no mask
of all pairs is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from _blocks import Block, BlockMap, Layout, tile_of, tokens_of
from nearfield.ops.curves import CURVES, curve_order, inverse_order
from nearfield.ops.patterns import Axis, Full, Pattern, Resolved, resolve

__all__ = ["block_map", "seen_keys"]

Visits = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Intervals:
    """An axis whose keys are sorted by residue class, so that the keys of a query are the places low <= p < high.

    `coordinate`: (keys,) of each place, outside [0, size) for padding; `query_class`: residue class of each query.
    """

    low: np.ndarray
    high: np.ndarray
    coordinate: np.ndarray
    size: int
    step: int
    query_class: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """(keys,) bool: the place is a token of the map."""
        return (self.coordinate >= 0) & (self.coordinate < self.size)


def _intervals(axis: Axis) -> _Intervals:
    first = min(0, int(axis.start.min()))
    coordinate = np.arange(first, max(axis.keys, int(axis.stop.max())))
    order = np.argsort(coordinate % axis.step, kind="stable")
    low = inverse_order(order)[axis.start - first]
    high = low + axis.counts
    return _Intervals(low, high, coordinate[order], axis.keys, axis.step, axis.start % axis.step)


def _seen_by(y: _Intervals, x: _Intervals, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, slice, slice]:
    """How many of the queries (rows[i], columns[i]) see each key, within the box of places that any of them sees."""
    y0, y1 = y.low[rows], y.high[rows]
    x0, x1 = x.low[columns], x.high[columns]
    box_y, box_x = slice(y0.min(), y1.max()), slice(x0.min(), x1.max())
    # Sums over the corners of the rectangles fill them.
    corners = np.zeros((box_y.stop - box_y.start + 1, box_x.stop - box_x.start + 1), dtype=np.int64)
    for a, b, sign in ((y0, x0, 1), (y1, x1, 1), (y0, x1, -1), (y1, x0, -1)):
        np.add.at(corners, (a - box_y.start, b - box_x.start), sign)
    return corners.cumsum(0).cumsum(1)[:-1, :-1], box_y, box_x


def _visits(y: _Intervals, x: _Intervals, query_ids: np.ndarray, key_ids: np.ndarray) -> Visits:
    """(query, key, pairs) of all visits between blocks of any shape; ids by query coordinates and by key places."""
    order = np.argsort(query_ids, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(query_ids.ravel()))
    query, key, pairs = [], [], []
    for block, members in enumerate(np.split(order, ends[:-1])):
        seen, box_y, box_x = _seen_by(y, x, *np.divmod(members, query_ids.shape[1]))
        sums = np.bincount(key_ids[box_y, box_x].ravel(), weights=seen.ravel())
        found = np.flatnonzero(sums)
        query.append(np.full(len(found), block, dtype=np.int32))
        key.append(found.astype(np.int32))
        pairs.append(sums[found].astype(np.int64))
    return np.concatenate(query), np.concatenate(key), np.concatenate(pairs)


def _numbered(*labels: np.ndarray) -> np.ndarray:
    """Block numbers 0, 1, ... in the order of the labels; equal labels make a block."""
    return np.unique(np.stack(labels), axis=1, return_inverse=True)[1].reshape(-1)


def _query_tiles(axis: _Intervals, tile: int, *, in_cells: bool = False) -> np.ndarray:
    """(queries,) number of the tile of each query: `tile` consecutive members of a residue class.

    With `in_cells` tiles begin anew where a query shares no key with those before it, as in each window.
    """
    cell, place = np.zeros_like(axis.query_class), np.empty_like(axis.query_class)
    for residue in np.unique(axis.query_class):
        members = np.flatnonzero(axis.query_class == residue)
        rank = np.arange(len(members))
        if in_cells:
            fresh = axis.low[members][1:] >= np.maximum.accumulate(axis.high[members])[:-1]
            cell[members[1:]] = np.cumsum(fresh)
            rank -= np.maximum.accumulate(np.where(np.append(False, fresh), rank, 0))
        place[members] = rank
    return _numbered(axis.query_class, cell, place // tile)


def _key_tiles(axis: _Intervals, tile: int) -> np.ndarray:
    """(keys,) number of the tile of each place; tiles are aligned to the first token of the map."""
    return _numbered(axis.coordinate % axis.step, axis.coordinate // axis.step // tile)


def _tiles_of_image(resolved: Resolved, layout: Layout) -> BlockMap:
    """Tiles for patterns of the image axes: each axis is counted alone, a visit is one of y and one of x."""
    alone = _intervals(Full().axis(1, 1))

    def count(axis: Axis, query_tile: int, key_tile: int) -> tuple[_Intervals, np.ndarray, np.ndarray, Visits]:
        intervals = _intervals(axis)
        query_ids, key_ids = _query_tiles(intervals, query_tile), _key_tiles(intervals, key_tile)
        return intervals, query_ids, key_ids, _visits(intervals, alone, query_ids[:, None], key_ids[:, None])

    query_tile, key_tile = tile_of(layout.query_block), tile_of(layout.key_block)
    y, query_y, key_y, (qy, ky, pairs_y) = count(resolved.y, query_tile[0], key_tile[0])
    x, query_x, key_x, (qx, kx, pairs_x) = count(resolved.x, query_tile[1], key_tile[1])
    query_columns, key_columns = query_x.max() + 1, key_x.max() + 1
    visits = (
        np.add.outer(qy * query_columns, qx).ravel(),
        np.add.outer(ky * key_columns, kx).ravel(),
        np.multiply.outer(pairs_y, pairs_x).ravel(),
    )
    query_ids, key_ids = np.add.outer(query_y * query_columns, query_x), np.add.outer(key_y * key_columns, key_x)
    return _block_map(resolved, layout, y, x, visits, query_ids, key_ids)


def _blocks_of_order(resolved: Resolved, layout: Layout) -> BlockMap:
    """Blocks of any shape on the map, for any pattern."""
    y, x = _intervals(resolved.y), _intervals(resolved.x)
    curve = resolved.pattern.curve
    if curve is None:
        query_map, key_map = (len(y.low), len(x.low)), (len(y.coordinate), len(x.coordinate))
    else:
        query_map = key_map = (resolved.height, resolved.width)
    query_ids, key_ids = (
        _ids(layout.order, block, *size)
        for block, size in ((layout.query_block, query_map), (layout.key_block, key_map))
    )
    if curve is not None:
        places = curve_order(curve, resolved.height, resolved.width)
        by_query, by_key = query_ids.ravel()[places, None], key_ids.ravel()[places, None]
    else:
        rows, columns = (axis.coordinate - axis.coordinate.min() for axis in (y, x))
        by_query, by_key = query_ids, key_ids[np.ix_(rows, columns)]
    visits = _visits(y, x, by_query, by_key)
    return _block_map(resolved, layout, y, x, visits, by_query, by_key)


def _ids(order: str, block: Block, height: int, width: int) -> np.ndarray:
    """(height, width) number of the block of each token."""
    if order in CURVES:
        place = inverse_order(curve_order(order, height, width))
        return (place // tokens_of(block)).reshape(height, width)
    rows, columns = tile_of(block)
    return np.arange(height)[:, None] // rows * -(-width // columns) + np.arange(width) // columns


def _block_map(
    resolved: Resolved,
    layout: Layout,
    y: _Intervals,
    x: _Intervals,
    visits: Visits,
    by_query: np.ndarray,
    by_key: np.ndarray,
) -> BlockMap:
    """From the visits and the blocks by query coordinates and by key places."""
    query, key, pairs = visits
    tokens = np.bincount(by_key.ravel(), weights=np.multiply.outer(y.inside, x.inside).ravel())
    return BlockMap(
        layout=layout,
        query_blocks=int(by_query.max()) + 1,
        key_blocks=len(tokens),
        query=query,
        key=key,
        pairs=pairs,
        useful=_useful(resolved),
        reread=float(tokens[key].sum() / tokens.sum()),
        query_ids=_on_map(resolved, by_query),
        key_ids=_on_map(resolved, by_key[np.ix_(np.argsort(y.coordinate), np.argsort(x.coordinate))]),
    )


def _on_map(resolved: Resolved, values: np.ndarray) -> np.ndarray:
    """Values by coordinates of the pattern's axes, as rows and columns of the map."""
    if resolved.pattern.curve is None:
        return values
    place = inverse_order(curve_order(resolved.pattern.curve, resolved.height, resolved.width))
    return values.ravel()[place].reshape(resolved.height, resolved.width)


def _useful(resolved: Resolved) -> int:
    return int(resolved.y.counts.sum()) * int(resolved.x.counts.sum())


def _halo(resolved: Resolved, layout: Layout) -> BlockMap:
    """Query tiles, each with its own rectangle of keys read row by row in chunks; tiles that look alike count once."""
    y, x = _intervals(resolved.y), _intervals(resolved.x)
    rows, columns = tile_of(layout.query_block) if resolved.pattern.curve is None else (layout.query_tokens, 1)
    tiles_y, tiles_x = (_query_tiles(axis, side, in_cells=True) for axis, side in ((y, rows), (x, columns)))
    sides_y, sides_x = _sides(y, tiles_y), _sides(x, tiles_x)
    chunk = layout.key_tokens
    known: dict[tuple[bytes, bytes], np.ndarray] = {}
    query, key, pairs, read = [], [], [], 0
    for block, ((seen_y, read_y), (seen_x, read_x)) in enumerate((a, b) for a in sides_y for b in sides_x):
        name = seen_y.tobytes(), seen_x.tobytes()
        if name not in known:
            seen = np.multiply.outer(seen_y, seen_x).ravel()
            known[name] = np.add.reduceat(seen, np.arange(0, len(seen), chunk))
        query.append(np.full(len(known[name]), block, dtype=np.int32))
        key.append(np.arange(len(known[name]), dtype=np.int32))
        pairs.append(known[name])
        read += read_y * read_x
    return BlockMap(
        layout=layout,
        query_blocks=len(pairs),
        key_blocks=-(-len(y.coordinate) * len(x.coordinate) // chunk),
        query=np.concatenate(query),
        key=np.concatenate(key),
        pairs=np.concatenate(pairs),
        useful=_useful(resolved),
        reread=read / (resolved.height * resolved.width),
        query_ids=_on_map(resolved, tiles_y[:, None] * len(sides_x) + tiles_x),
        key_ids=None,
    )


def _sides(axis: _Intervals, tiles: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """For each tile of an axis: how many of its queries see each key of its range, and how many of those are tokens."""
    sides = []
    for tile in range(tiles.max() + 1):
        low, high = axis.low[tiles == tile], axis.high[tiles == tile]
        places = np.arange(low.min(), high.max())
        seen = ((places >= low[:, None]) & (places < high[:, None])).sum(0)
        sides.append((seen, int(axis.inside[places].sum())))
    return sides


def block_map(pattern: Pattern, height: int, width: int, layout: Layout) -> BlockMap:
    """The block map of `pattern` on a height x width key map.

    Raises:
        ValueError: a map on which the pattern is not defined.
    """
    resolved = resolve(pattern, height, width)
    make: Callable[[Resolved, Layout], BlockMap] = _blocks_of_order
    if layout.order == "halo":
        make = _halo
    elif layout.order == "tiles" and pattern.curve is None:
        make = _tiles_of_image
    return make(resolved, layout)


def seen_keys(pattern: Pattern, height: int, width: int, queries: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Which keys some queries see.

    Args:
        pattern, height, width: the pattern and its key map.
        queries: bool, of the size of the query map: the queries in question.

    Returns:
        (rows, columns) int64, how many of them see each key of the map with its padding; and the (y, x) coordinates of
        its first row and column, negative where there is padding.
    """
    resolved = resolve(pattern, height, width)
    y, x = _intervals(resolved.y), _intervals(resolved.x)
    if pattern.curve is None:
        members = np.nonzero(queries)
    else:
        place = inverse_order(curve_order(pattern.curve, height, width))[np.flatnonzero(queries)]
        members = (place, np.zeros_like(place))
    seen = np.zeros((len(y.coordinate), len(x.coordinate)), dtype=np.int64)
    counts, box_y, box_x = _seen_by(y, x, *members)
    seen[box_y, box_x] = counts
    seen = seen[np.ix_(np.argsort(y.coordinate), np.argsort(x.coordinate))]
    origin = (0, 0) if pattern.curve is not None else (int(y.coordinate.min()), int(x.coordinate.min()))
    return _on_map(resolved, seen), origin
