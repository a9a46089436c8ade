"""Orders of space-filling curves: permutations, steps, ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nearfield.ops import curve_order, hilbert_order, inverse_order

SMALL = [(h, w) for h in range(1, 25) for w in range(1, 25)]
LARGE = [(56, 56), (64, 64), (1, 300), (300, 1), (7, 200), (200, 7), (37, 91), (92, 37), (128, 50), (2, 99), (99, 2)]


def gilbert(width: int, height: int) -> list[tuple[int, int]]:
    """Recursive form of the generalized Hilbert curve, (x, y) points."""

    def walk(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> list[tuple[int, int]]:
        w, h = abs(ax + ay), abs(bx + by)
        dax, day, dbx, dby = (int(np.sign(c)) for c in (ax, ay, bx, by))
        if h == 1:
            return [(x + i * dax, y + i * day) for i in range(w)]
        if w == 1:
            return [(x + i * dbx, y + i * dby) for i in range(h)]
        ax2, ay2, bx2, by2 = ax // 2, ay // 2, bx // 2, by // 2
        w2, h2 = abs(ax2 + ay2), abs(bx2 + by2)
        if 2 * w > 3 * h:
            if w2 % 2 and w > 2:
                ax2, ay2 = ax2 + dax, ay2 + day
            return walk(x, y, ax2, ay2, bx, by) + walk(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        if h2 % 2 and h > 2:
            bx2, by2 = bx2 + dbx, by2 + dby
        return (
            walk(x, y, bx2, by2, ax2, ay2)
            + walk(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
            + walk(x + ax - dax + bx2 - dbx, y + ay - day + by2 - dby, -bx2, -by2, -(ax - ax2), -(ay - ay2))
        )

    return walk(0, 0, width, 0, 0, height) if width >= height else walk(0, 0, 0, height, width, 0)


def points(height: int, width: int) -> np.ndarray:
    """(H*W, 2) of (y, x)."""
    return np.stack(np.divmod(curve_order("hilbert", height, width), width), 1)


def long_steps(height: int, width: int) -> np.ndarray:
    """Steps of the curve that are no unit steps."""
    steps = np.abs(np.diff(points(height, width), axis=0))
    return steps[steps.sum(1) != 1]


def test_hilbert_visits_every_token_once() -> None:
    for height, width in SMALL + LARGE:
        order = curve_order("hilbert", height, width)
        assert np.array_equal(np.sort(order), np.arange(height * width)), (height, width)


def test_hilbert_is_the_recursive_definition() -> None:
    for height, width in SMALL + LARGE:
        want = [y * width + x for x, y in gilbert(width, height)]
        assert curve_order("hilbert", height, width).tolist() == want, (height, width)


def test_hilbert_steps_are_unit_steps_unless_parity_forbids_it() -> None:
    # Colour the map like a chessboard: unit steps change colour each time. With an odd longer side and an even shorter
    # one both ends have one colour, but a walk over an even number of tokens ends on the other: no such walk exists.
    # Two tokens across, the curve ends a step early instead.
    for height, width in SMALL + LARGE:
        longer, shorter = max(height, width), min(height, width)
        unavoidable = longer % 2 == 1 and shorter % 2 == 0 and shorter > 2
        assert long_steps(height, width).tolist() == ([[1, 1]] if unavoidable else []), (height, width)


def test_hilbert_runs_from_the_corner_to_the_other_end_of_the_longer_side() -> None:
    for height, width in SMALL + LARGE:
        longer, shorter = max(height, width), min(height, width)
        along = longer - 2 if shorter == 2 and longer % 2 == 1 else longer - 1
        walk = points(height, width).tolist()
        assert walk[0] == [0, 0]
        assert walk[-1] == ([0, along] if width >= height else [along, 0]), (height, width)


@pytest.mark.parametrize(
    ("size", "first"),
    [
        (56, [(0, 0), (1, 0), (1, 1), (0, 1)]),
        (8, [(0, 0), (0, 1), (1, 1), (1, 0)]),
        (7, [(0, 0), (0, 1), (1, 1), (1, 0)]),
    ],
)
def test_hilbert_starts_as_the_published_models_do(size: int, first: list[tuple[int, int]]) -> None:
    assert [(x, y) for y, x in points(size, size)[:4].tolist()] == first


def test_hilbert_of_a_wide_map_is_the_transpose_of_the_tall_one() -> None:
    for height, width in SMALL:
        if width > height:
            assert np.array_equal(points(height, width), points(width, height)[:, ::-1]), (height, width)


def test_hilbert_keeps_neighbours_together() -> None:
    # 49 consecutive tokens of a 56x56 map: at most 2 x 7 rows or columns, where raster order spans 49 columns
    walk = points(56, 56)
    spans = [np.ptp(walk[p : p + 49], axis=0).max() + 1 for p in range(0, 56 * 56, 49)]
    assert np.mean(spans) < 14


def test_morton_sorts_by_interleaved_bits() -> None:
    def code(y: int, x: int) -> int:
        return int("".join(a + b for a, b in zip(f"{y:08b}", f"{x:08b}", strict=True)), 2)

    for height, width in [(4, 4), (5, 9), (1, 7), (7, 1), (16, 3), (33, 17)]:
        tokens = [(y, x) for y in range(height) for x in range(width)]
        want = [y * width + x for y, x in sorted(tokens, key=lambda t: code(*t))]
        assert curve_order("morton", height, width).tolist() == want
    assert curve_order("morton", 2, 2).tolist() == [0, 1, 2, 3]
    assert curve_order("morton", 4, 4).tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_raster_is_the_order_of_memory() -> None:
    assert curve_order("raster", 3, 5).tolist() == list(range(15))


@pytest.mark.parametrize("name", ["raster", "hilbert", "morton"])
def test_inverse_order_undoes_an_order(name: str) -> None:
    for height, width in [(1, 1), (5, 8), (13, 4)]:
        order = curve_order(name, height, width)
        inverse = inverse_order(order)
        assert np.array_equal(inverse[order], np.arange(height * width))
        assert np.array_equal(order[inverse], np.arange(height * width))


def test_cached_orders_cannot_be_written() -> None:
    order = curve_order("hilbert", 6, 6)
    assert curve_order("hilbert", 6, 6) is order
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 5


def test_hilbert_order_is_a_tensor_of_its_own() -> None:
    first = hilbert_order(6, 7)
    assert first.dtype == torch.int64
    assert first.shape == (42,)
    first.zero_()
    assert hilbert_order(6, 7).tolist() == curve_order("hilbert", 6, 7).tolist()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_a_map_without_tokens_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"at least 1x1, got {size[0]}x{size[1]}"):
        hilbert_order(*size)


def test_an_unknown_curve_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown curve 'peano': choose one of raster, hilbert, morton"):
        curve_order("peano", 4, 4)
