"""Schedules against the pairs that the patterns' definitions name: nothing is left out, nothing is done twice."""

from __future__ import annotations

from time import process_time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.ops import (
    Axes,
    Full,
    Grid,
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Slide,
    Window,
    hilbert_order,
    resolve,
)
from nearfield.ops.bias import BiasKind
from nearfield.ops.tiles import inverse_axis
from nearfield.ops.triton.cells import cell_slots, cells
from nearfield.ops.triton.runs import runs
from nearfield.ops.triton.schedule import (
    ABSENT,
    RESIDENT_FIELDS,
    SLOT_UNIT,
    STREAMED_FIELDS,
    Schedule,
    choose_tile,
    schedule,
)
from ops_helpers import CASES, axis_keys, decomposed_rows, query_stride, random_cases, reach, step

CPU = torch.device("cpu")
MANY = random_cases(240, seed=71)
DIRECTIONS = pytest.mark.parametrize("inverse", [False, True], ids=["from queries", "from keys"])


class Pairs(NamedTuple):
    """(query, key) tokens, the key -1 for a padding zero; the table's entry; the rows of a decomposed bias."""

    query: np.ndarray
    key: np.ndarray
    entry: np.ndarray
    rel_y: np.ndarray
    rel_x: np.ndarray

    def rows(self) -> np.ndarray:
        """All of it as rows in a fixed order, so that two sets of pairs can be compared."""
        table = np.stack([np.asarray(f, dtype=np.int64) for f in self], 1)
        return table[np.lexsort(table.T[::-1])]


def axis_pairs(pattern: Pattern, which: int, n: int) -> tuple[np.ndarray, ...]:
    """Query, key, displacement in steps and decomposed row of every pair of one axis, from the definition."""
    keys, rel = axis_keys(pattern, which, n), decomposed_rows(pattern, which, n)
    query = np.repeat(np.arange(len(keys)), [len(row) for row in keys])
    key = np.array([j for row in keys for j in row])
    ahead = (key - query * query_stride(pattern)[which]) // step(pattern, which, n)
    return query, key, ahead, np.array([j for row in rel for j in row])


def defined_pairs(pattern: Pattern, height: int, width: int) -> Pairs:
    """Every pair of a pattern, from its definition."""
    if pattern.curve is not None:
        order = hilbert_order(height, width).numpy()
        keys = axis_keys(pattern, 0, height * width)
        query = np.repeat(np.arange(len(keys)), [len(row) for row in keys])
        key = np.array([j for row in keys for j in row])
        ahead = key - query + reach(pattern, 0, height * width)
        return Pairs(order[query], order[key], ahead, np.zeros_like(key), np.zeros_like(key))
    (qy, ky, dy, ry), (qx, kx, dx, rx) = axis_pairs(pattern, 0, height), axis_pairs(pattern, 1, width)
    across = -(-width // query_stride(pattern)[1])
    qy, ky, dy, ry = (a[:, None] for a in (qy, ky, dy, ry))
    inside = (ky >= 0) & (ky < height) & (kx >= 0) & (kx < width)
    entry = (dy + reach(pattern, 0, height)) * (2 * reach(pattern, 1, width) + 1) + dx + reach(pattern, 1, width)
    fields = (qy * across + qx, np.where(inside, ky * width + kx, -1), entry, ry, rx)
    return Pairs(*(np.broadcast_to(f, inside.shape).ravel() for f in fields))


def map_tokens(order: torch.Tensor | None, places: np.ndarray) -> np.ndarray:
    return places if order is None else order.numpy()[places]


def scheduled_pairs(plan: Schedule, *, inverse: bool, curve: bool) -> tuple[Pairs, np.ndarray]:
    """Every pair that a schedule's tiles allow, and the resident tokens of all tiles."""
    entries = plan.entries()
    found: list[list[np.ndarray]] = []
    residents = []
    for place, first, kind, count in plan.tiles.tolist():
        own = dict(zip(RESIDENT_FIELDS, plan.resident[kind].numpy(), strict=True))
        other = dict(zip(STREAMED_FIELDS, plan.streamed[kind].numpy(), strict=True))
        there = own["offset"] > ABSENT
        resident = map_tokens(plan.order, place + np.where(there, own["offset"], 0))
        known = other["offset"] > ABSENT
        streamed = np.where(known, map_tokens(plan.order, first + np.where(known, other["offset"], 0)), -1)
        residents.append(resident[there])
        m, n = np.nonzero(entries[kind] >= 0)
        assert there[m].all(), "a slot without a token has keys"
        assert (n < count).all(), "a pair lies beyond the tile's streamed slots"
        tokens = (streamed[n], resident[m]) if inverse else (resident[m], streamed[n])
        rel = [own[f][m] + other[f][n] for f in ("rel_y", "rel_x")]
        found.append([*tokens, entries[kind][m, n], *([np.zeros_like(r) for r in rel] if curve else rel)])
    return Pairs(*(np.concatenate(f) for f in zip(*found, strict=True))), np.concatenate(residents)


def with_codes_of(pairs: Pairs, kind: BiasKind) -> Pairs:
    """The pairs with the codes that a schedule for that kind of bias has; all others are 0."""
    zero = np.zeros_like(pairs.query)
    table = pairs.entry if kind is BiasKind.TABLE else zero
    rel = (pairs.rel_y, pairs.rel_x) if kind is BiasKind.DECOMPOSED else (zero, zero)
    return Pairs(pairs.query, pairs.key, table, *rel)


def assert_is_scheduled(
    pattern: Pattern, height: int, width: int, block_m: int, *, inverse: bool, grid: bool,
    kind: BiasKind = BiasKind.TABLE,
) -> None:  # fmt: skip
    plan = schedule(pattern, height, width, block_m, CPU, inverse=inverse, grid=grid, kind=kind)
    stride = query_stride(pattern)
    queries, keys = -(-height // stride[0]) * -(-width // stride[1]), height * width
    got, residents = scheduled_pairs(plan, inverse=inverse, curve=pattern.curve is not None)
    want = defined_pairs(pattern, height, width)
    zeros = want.key < 0
    if inverse:  # padding zeros are nobody's keys to sum up gradients for
        want = Pairs(*(f[~zeros] for f in want))
    want = with_codes_of(want, kind)
    assert np.array_equal(got.rows(), want.rows()), "the pairs of the schedule are not those of the pattern"
    assert np.array_equal(np.sort(residents), np.arange(keys if inverse else queries)), "a token is not resident once"
    assert plan.zero_keys or (got.key >= 0).all(), "a padding zero in a schedule that says it has none"
    # What kernels load without a mask must be there: every slot's place, also of slots without a token.
    place, first = plan.tiles[:, 0], plan.tiles[:, 1]
    for at, offset, limit in (
        (place, plan.resident[:, 0], keys if inverse else queries),
        (first, plan.streamed[:, 0], queries if inverse else keys),
    ):
        kinds = plan.tiles[:, 2].long()
        read = at[:, None] + torch.where(offset > ABSENT, offset, 0)[kinds]
        assert 0 <= int(read.min()) <= int(read.max()) < limit, "a slot reads outside the map"
    assert plan.resident.shape[2] == block_m
    assert plan.streamed.shape[2] % SLOT_UNIT == 0
    assert sorted(t for group in plan.by_kind for t in group) == list(range(len(plan.tiles)))
    assert all((plan.tiles[group, 2] == kind).all() for kind, group in enumerate(plan.by_kind))


@DIRECTIONS
@pytest.mark.parametrize("grid", [False, True], ids=["dense slots", "gridded slots"])
@pytest.mark.parametrize("number", range(0, len(MANY), 40))
def test_a_schedule_holds_exactly_the_pairs_of_its_pattern(number: int, grid: bool, inverse: bool) -> None:
    for i, case in enumerate(MANY[number : number + 40]):
        if grid and case[0].curve is not None:
            continue
        kind = (BiasKind.TABLE, BiasKind.DECOMPOSED, BiasKind.NONE)[i // 3 % 3]
        assert_is_scheduled(*case, (16, 64, 128)[i % 3], inverse=inverse, grid=grid, kind=kind)


@DIRECTIONS
@pytest.mark.parametrize("block_m", [1, 16, 32, 64, 128])
def test_every_size_of_tile_holds_the_same_pairs(block_m: int, inverse: bool) -> None:
    for case in CASES:
        for kind in (BiasKind.TABLE, BiasKind.DECOMPOSED, BiasKind.NONE):
            assert_is_scheduled(*case, block_m, inverse=inverse, grid=False, kind=kind)


@DIRECTIONS
@pytest.mark.parametrize(
    ("pattern", "height", "width"),
    [
        (Neighborhood(7), 56, 56),
        (Neighborhood(7, 8), 56, 60),
        (Neighborhood((3, 13), (4, 1), (1, 8)), 40, 33),
        (Halo(8, 3), 33, 56),
        (Halo(8, 3, "zero", 2), 32, 48),
        (Halo((16, 4), (5, 2), "clip"), 40, 39),
        (Window(7, 3), 56, 59),
        (Window(12), 48, 50),
        (Grid(7), 57, 49),
        (Slide((9, 5)), 37, 41),
        (Axes(Full(), Window(7)), 28, 30),
        (HilbertNeighborhood(49), 28, 28),
        (HilbertWindow(128, 64), 24, 32),
    ],
    ids=str,
)  # fmt: skip
def test_larger_maps_hold_exactly_their_pairs(pattern: Pattern, height: int, width: int, inverse: bool) -> None:
    for grid in (False, True)[: 1 + (pattern.curve is None)]:
        assert_is_scheduled(pattern, height, width, 64, inverse=inverse, grid=grid)


@DIRECTIONS
def test_without_a_bias_tiles_differ_in_what_is_masked_only(inverse: bool) -> None:
    for pattern, kinds in ((Full(), 1), (Window(16), 1), (Neighborhood(7), 15)):
        plan = schedule(pattern, 64, 64, 64, CPU, inverse=inverse, kind=BiasKind.NONE)
        assert plan.kinds <= kinds, pattern
        assert schedule(pattern, 64, 64, 64, CPU, inverse=inverse).kinds >= plan.kinds


def test_a_long_curve_is_cut_in_full_tiles_at_once() -> None:
    resolved = resolve(HilbertNeighborhood(49), 512, 512)
    begun = process_time()
    assert choose_tile(resolved, 64, False)[0] == (64, 1)
    assert process_time() - begun < 2.0


@pytest.mark.slow
@DIRECTIONS
@pytest.mark.parametrize("seed", range(8))
def test_many_more_random_schedules(seed: int, inverse: bool) -> None:
    for i, case in enumerate(random_cases(100, seed=9000 + seed, largest=30)):
        assert_is_scheduled(*case, (16, 64, 128)[i % 3], inverse=inverse, grid=i % 2 == 0 and case[0].curve is None)


# --- cells ------------------------------------------------------------------------------------------------------------


def assert_cells_hold_the_pairs(pattern: Pattern, height: int, width: int) -> None:
    made = cells(pattern, height, width, CPU)
    found: list[list[np.ndarray]] = []
    residents = []
    for kind, (begin, count) in enumerate(zip(made.begins, made.counts, strict=True)):
        offset, entry = made.offset[kind].numpy(), made.entry[kind].numpy()
        there = offset > ABSENT
        m, n = np.nonzero(entry >= 0)
        assert there[m].all()
        assert there[n].all()
        for place in made.first[begin : begin + count].tolist():
            tokens = map_tokens(made.order, place + np.where(there, offset, 0))
            residents.append(tokens[there])
            found.append([tokens[m], tokens[n], entry[m, n]])
    got = [np.concatenate(f) for f in zip(*found, strict=True)]
    want = defined_pairs(pattern, height, width)
    zero = np.zeros_like(got[0])
    want_rows = Pairs(*want[:3], *([np.zeros_like(want.query)] * 2)).rows()
    assert np.array_equal(Pairs(*got, zero, zero).rows(), want_rows)
    assert np.array_equal(np.sort(np.concatenate(residents)), np.arange(height * width))
    assert made.offset.shape[1] == cell_slots(pattern, height, width)
    assert sum(made.counts) == len(made.first)


def test_cells_hold_exactly_the_pairs_of_their_pattern() -> None:
    seen = 0
    for case in [*CASES, *MANY, *random_cases(200, seed=73, largest=40)]:
        if cell_slots(*case):
            seen += 1
            assert_cells_hold_the_pairs(*case)
    assert seen > 60


@pytest.mark.parametrize("shift", [0, 1, 3, -2])
@pytest.mark.parametrize("size", range(1, 9))
def test_windows_of_up_to_64_tokens_are_cells(size: int, shift: int) -> None:
    for height, width in ((8, 8), (13, 9), (1, 17), (33, 20)):
        assert cell_slots(Window(size, shift), height, width)
        assert_cells_hold_the_pairs(Window(size, shift), height, width)


def test_which_patterns_are_in_cells() -> None:
    inside = [Window((4, 16)), Window((2, 30), 1), Grid(8), Grid((3, 5)), HilbertWindow(64, 32), HilbertWindow(49)]
    inside += [Axes(Window(7), Grid(4))]
    outside = [Window(9), Window((5, 13)), Grid(10), HilbertWindow(65), Neighborhood(3), Slide(3), Halo(4, 1), Full()]
    outside += [Halo(4, 1, stride=2), HilbertNeighborhood(9), Axes(Full(), Window(3))]
    assert all(cell_slots(p, 40, 40) for p in inside)
    assert not any(cell_slots(p, 40, 40) for p in outside)
    assert cell_slots(Full(), 7, 7)  # one cell
    assert cell_slots(Neighborhood(5), 5, 5)


# --- runs -------------------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(0, 9),
    length=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_runs_hold_every_item_once_in_order(counts: list[int], batch: int, length: int) -> None:
    begins = np.cumsum([0, *counts]).tolist()
    groups = [(7 * i, begin, count) for i, (begin, count) in enumerate(zip(begins, counts, strict=False))]
    made = runs(groups, batch, length, CPU)
    table, bounds = made.table.reshape(-1, 5).tolist(), made.bounds.tolist()
    assert len(bounds) == len(groups) + 1
    assert (bounds[0], bounds[-1]) == (0, len(table))
    for (kind, begin, count), a, b in zip(groups, bounds, bounds[1:], strict=False):
        items: list[int] = []
        for row in table[a:b]:
            assert row[:3] == [kind, begin, count]
            assert 0 < row[4] <= length
            items += range(row[3], row[3] + row[4])
        assert items == list(range(count * batch))


# --- the keys' side of an axis ----------------------------------------------------------------------------------------


def assert_inverse_names_the_same_pairs(pattern: Pattern, height: int, width: int) -> None:
    resolved = resolve(pattern, height, width)
    for which, axis in enumerate((resolved.y, resolved.x)):
        if pattern.curve is not None and which == 1:
            continue
        n = height * width if pattern.curve is not None else (height, width)[which]
        want = {(j, i) for i, keys in enumerate(axis_keys(pattern, which, n)) for j in keys if 0 <= j < n}
        other = inverse_axis(axis)
        assert (other.queries, other.keys) == (n, axis.queries)
        got = [
            (j, i)
            for j, (start, stop) in enumerate(zip(other.start.tolist(), other.stop.tolist(), strict=True))
            for i in range(start, stop, other.step)
        ]
        assert len(got) == len(set(got))
        assert set(got) == want


def test_the_inverse_axis_names_the_same_pairs() -> None:
    for case in [*CASES, *MANY]:
        assert_inverse_names_the_same_pairs(*case)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_inverse_of_any_axis(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60), label="n")
    kernel = data.draw(st.integers(1, n), label="kernel")
    dilation = data.draw(st.integers(1, n // kernel), label="dilation")
    stride = data.draw(st.integers(1, kernel), label="stride")
    assert_inverse_names_the_same_pairs(Axes(Full(), Neighborhood(kernel, dilation, stride)), 1, n)
    block = data.draw(st.integers(1, 12), label="block")
    part = data.draw(st.sampled_from([s for s in range(1, block + 1) if block % s == 0]), label="part")
    pad = data.draw(st.sampled_from(["zero", "clip"]), label="pad")
    halo = Halo(block, data.draw(st.integers(0, 9), label="halo"), pad, part)
    assert_inverse_names_the_same_pairs(Axes(Full(), halo), 1, n)
    window = Window(data.draw(st.integers(1, 20), label="size"), data.draw(st.integers(-30, 30), label="shift"))
    assert_inverse_names_the_same_pairs(Axes(Full(), window), 1, n)
