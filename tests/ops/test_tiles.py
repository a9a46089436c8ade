"""Query tiles and the keys each needs: nothing lost, nothing twice."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from nearfield.ops import Axes, Full, Grid, Halo, HilbertWindow, Neighborhood, Pattern, Slide, Window, resolve
from nearfield.ops.patterns import Axis
from nearfield.ops.tiles import Band, Span, TileShape, axis_bands, make_plan, waste
from ops_helpers import axis_keys, query_stride, random_cases, step

CASES = random_cases(150, seed=31, largest=22)


def axes_of(pattern: Pattern, height: int, width: int) -> list[tuple[Axis, list[list[int]]]]:
    resolved = resolve(pattern, height, width)
    if pattern.curve:
        return [(resolved.y, axis_keys(pattern, 0, height * width))]
    return [(resolved.y, axis_keys(pattern, 0, height)), (resolved.x, axis_keys(pattern, 1, width))]


def tiles_of(bands: tuple[Band, ...]) -> list[tuple[list[int], list[int], TileShape]]:
    """Query and key coordinates of every tile of every run."""
    tiles = []
    for band in bands:
        for run in range(band.count):
            queries = (band.queries.coordinates() + run * band.query_spacing).tolist()
            keys = (band.keys.coordinates() + run * band.key_spacing).tolist()
            for tile in band.tiles:
                tiles.append(
                    (
                        queries[tile.query : tile.query + tile.shape.queries],
                        keys[tile.key : tile.key + tile.shape.keys],
                        tile.shape,
                    )
                )
    return tiles


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tile", [1, 3, 4, 7, 100])
def test_tiles_partition_the_queries_and_hold_their_keys(tile: int, split: bool) -> None:
    for case in CASES:
        for axis, keys in axes_of(*case):
            seen: Counter[int] = Counter()
            for queries, places, shape in tiles_of(axis_bands(axis, tile, split=split)):
                seen.update(queries)
                assert len(queries) <= tile
                assert len(queries) == shape.queries
                assert len(places) == shape.keys
                for i, allowed in zip(queries, shape.allowed, strict=True):
                    assert [j for j, ok in zip(places, allowed, strict=True) if ok] == keys[i], (case, i)
            assert seen == dict.fromkeys(range(axis.queries), 1), case


def test_no_tile_reads_a_key_that_none_of_its_queries_sees_at_its_ends() -> None:
    for case in CASES:
        for axis, keys in axes_of(*case):
            for queries, places, _ in tiles_of(axis_bands(axis, 5, split=True)):
                wanted = {j for i in queries for j in keys[i]}
                assert places[0] in wanted
                assert places[-1] in wanted


def test_displacements_of_a_tile_are_key_minus_query_in_steps() -> None:
    for pattern, height, width in CASES:
        for which, (axis, _) in enumerate(axes_of(pattern, height, width)):
            n = height * width if pattern.curve else (height, width)[which]
            stride, d = query_stride(pattern)[which], step(pattern, which, n)
            for queries, places, shape in tiles_of(axis_bands(axis, 4, split=False)):
                want = (np.array(places)[None] - stride * np.array(queries)[:, None]) // d
                np.testing.assert_array_equal(shape.displacement(), want)
                rel = (np.array(places)[None] - axis.rel_origin[queries][:, None]) // d
                np.testing.assert_array_equal(shape.displacement(decomposed=True), rel)


def test_split_gives_every_tile_a_band_of_its_own() -> None:
    for case in CASES[:50]:
        for axis, _ in axes_of(*case):
            assert all(len(band.tiles) == 1 for band in axis_bands(axis, 3, split=True))


def test_bands_lie_on_the_map_unless_zeros_pad_it() -> None:
    for case in CASES:
        for axis, keys in axes_of(*case):
            padded = any(not 0 <= j < axis.keys for row in keys for j in row)
            for band in axis_bands(axis, 4, split=False):
                first, last = band.keys.start, band.keys.last + (band.count - 1) * band.key_spacing
                assert padded or (first >= 0 and last < axis.keys)
                if first < 0 or last >= axis.keys:
                    assert band.count == 1  # padded runs are read alone


def test_alike_windows_are_one_band() -> None:
    rows = axis_bands(Window(7).axis(56, 0), 7, split=False)
    assert [(b.count, b.queries, b.keys, b.query_spacing, b.key_spacing) for b in rows] == [
        (8, Span(0, 7, 1), Span(0, 7, 1), 7, 7)
    ]
    shifted = axis_bands(Window(7, 3).axis(56, 0), 7, split=False)
    assert sorted((b.count, b.queries.start, b.queries.length) for b in shifted) == [(1, 0, 3), (1, 52, 4), (7, 3, 7)]
    grid = axis_bands(Grid(7).axis(56, 0), 7, split=False)
    assert [(b.count, b.queries, b.query_spacing) for b in grid] == [(8, Span(0, 7, 8), 1)]


def test_tiles_are_cut_between_queries_of_different_keys_where_possible() -> None:
    # stride 4: four queries share their keys; a tile of 6 would cut the second group, so it holds one group
    tiles = tiles_of(axis_bands(Neighborhood(7, 1, 4).axis(40, 0), 6, split=True))
    assert all(
        len({tuple(axis_keys(Neighborhood(7, 1, 4), 0, 40)[i]) for i in q}) == 1 or len(q) <= 6 for q, _, _ in tiles
    )
    starts = {queries[0] for queries, _, _ in tiles}
    keys = axis_keys(Neighborhood(7, 1, 4), 0, 40)
    assert all(s == 0 or keys[s] != keys[s - 1] for s in starts)


# --- waste ------------------------------------------------------------------------------------------------------------


def test_waste_is_the_share_of_scores_that_no_query_asked_for() -> None:
    rng = random.Random(7)
    for pattern, height, width in CASES:
        if pattern.curve:
            continue
        (y, row_keys), (x, column_keys) = axes_of(pattern, height, width)
        rows = axis_bands(y, rng.randint(1, 9), split=False)
        columns = axis_bands(x, rng.randint(1, 9), split=True)
        computed = sum(
            len(qy) * len(qx) * len(ky) * len(kx) for qy, ky, _ in tiles_of(rows) for qx, kx, _ in tiles_of(columns)
        )
        useful = sum(len(a) * len(b) for a in row_keys for b in column_keys)
        assert waste(rows, columns) == pytest.approx(1 - useful / computed, abs=1e-12)


def test_windows_waste_nothing_and_single_queries_waste_nothing() -> None:
    for pattern in (Window(7), Window((4, 5), (1, 3)), Grid(8), Full(), Halo(4, 0, "clip")):
        plan = make_plan(pattern, 30, 41, (1 << 20, 1 << 20))
        assert waste(plan.rows, plan.columns) == 0
    for pattern in (Neighborhood(7), Slide(5), Halo(4, 2)):
        plan = make_plan(pattern, 30, 41, (1, 1))
        assert waste(plan.rows, plan.columns) == 0
    plan = make_plan(Neighborhood(7), 56, 56, (4, 8))
    assert 0 < waste(plan.rows, plan.columns) < 0.75


# --- what the backward pass needs to know -----------------------------------------------------------------------------


def times_read(bands: tuple[Band, ...], keys: int) -> Counter[int]:
    read: Counter[int] = Counter()
    for band in bands:
        for run in range(band.count):
            read.update((band.keys.coordinates() + run * band.key_spacing).tolist())
    return read


@pytest.mark.parametrize("tile", [(2, 3), (4, 8), (64, 64)])
def test_exclusive_means_every_key_is_read_by_exactly_one_block(tile: tuple[int, int]) -> None:
    found = set()
    for pattern, height, width in CASES:
        plan = make_plan(pattern, height, width, tile)
        resolved = resolve(pattern, height, width)
        once = all(
            times_read(bands, axis.keys) == dict.fromkeys(range(axis.keys), 1)
            for bands, axis in ((plan.rows, resolved.y), (plan.columns, resolved.x))
        )
        assert plan.exclusive == once, (pattern, height, width)
        found.add(once)
    assert found == {True, False}


@pytest.mark.parametrize(
    ("pattern", "exclusive"),
    [
        (Window(7), True),
        (Window(7, 3), True),
        (Grid(7), True),
        (Full(), False),  # several column tiles read the same keys
        (Neighborhood(7), False),
        (Slide(7), False),
        (Halo(7, 3), False),
        (Halo(7, 0, "clip"), True),
        (HilbertWindow(49, 24), True),
        (Axes(Window(7), Neighborhood(7)), False),
    ],
    ids=str,
)
def test_which_patterns_are_exclusive(pattern: Pattern, exclusive: bool) -> None:
    assert make_plan(pattern, 28, 30, (7, 7)).exclusive == exclusive
    assert make_plan(Full(), 28, 30, (7, 30)).exclusive


@pytest.mark.parametrize("tile", [1, 2, 5, 8, 40])
def test_runs_apart_by_disjoint_every_share_no_key_and_fewer_would(tile: int) -> None:
    counts = set()
    for case in CASES:
        for axis, _ in axes_of(*case):
            for band in axis_bands(axis, tile, split=True):
                runs = [set((band.keys.coordinates() + i * band.key_spacing).tolist()) for i in range(band.count)]

                def disjoint(m: int, runs: list[set[int]] = runs) -> bool:
                    return all(not (runs[i] & runs[j]) for i in range(len(runs)) for j in range(i + m, len(runs), m))

                m = band.disjoint_every
                assert 1 <= m <= band.count
                assert disjoint(m)
                assert m == 1 or not disjoint(m - 1)
                counts.add(m)
    assert len(counts) > (1 if tile < 40 else 0)


def test_a_span_is_an_arithmetic_progression() -> None:
    span = Span(3, 4, 5)
    assert span.coordinates().tolist() == [3, 8, 13, 18]
    assert span.last == 18


def test_equal_shapes_are_one_object() -> None:
    bands = axis_bands(Neighborhood(7).axis(200, 0), 4, split=False)
    shapes = [tile.shape for band in bands for tile in band.tiles]
    assert len({id(s) for s in shapes}) == len(set(shapes)) < 8


@pytest.mark.parametrize("n", [9, 30, 61])
def test_stacks_are_the_tiles_of_a_band(n: int) -> None:
    for pattern in (Neighborhood(7), Neighborhood(5, dilation=2), Window(7, 3)):
        for band in axis_bands(pattern.axis(n, 0), 4, split=False):
            tiles = [
                (stack.tile.query + i * stack.tile.shape.queries, stack.tile.key + i * stack.key_step, stack.tile.shape)
                for stack in band.stacks
                for i in range(stack.count)
            ]
            assert tiles == [(tile.query, tile.key, tile.shape) for tile in band.tiles]
    (band,) = axis_bands(Neighborhood(7).axis(61, 0), 4, split=False)
    assert len(band.stacks) <= 4 < len(band.tiles)
