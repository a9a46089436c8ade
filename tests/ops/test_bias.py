"""Bias kinds and their indices, and tables that change size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nearfield.ops import (
    Axes,
    Full,
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Window,
    hilbert_order,
    resize_table,
    resolve,
)
from nearfield.ops.bias import BiasKind, bias_kind, position_index, table_index
from ops_helpers import bias_shapes, kinds_of, random_cases


def test_kinds_are_told_by_shape() -> None:
    for pattern, height, width in random_cases(120, seed=21):
        resolved = resolve(pattern, height, width)
        assert bias_kind(None, None, resolved, 3, 8) is BiasKind.NONE
        for kind in kinds_of(pattern)[1:]:
            first, second = ([torch.zeros(s) for s in bias_shapes(pattern, height, width, 3, 8, kind)] + [None])[:2]
            assert bias_kind(first, second, resolved, 3, 8) is BiasKind(kind)


@pytest.mark.parametrize(
    ("pattern", "shapes", "said"),
    [
        (Neighborhood(7), [(2, 7, 7)], ["Neighborhood(kernel_size=(7, 7)", "(2, 13, 13)", "got (2, 7, 7)"]),
        (Neighborhood((3, 5), 2), [(2, 9, 5)], ["(2, 5, 9)", "got (2, 9, 5)"]),
        (Window(7), [(3, 13, 13)], ["(2, 13, 13)", "got (3, 13, 13)"]),
        (Window(7), [(2, 169)], ["(2, 13, 13)", "got (2, 169)"]),
        (Full(), [(2, 13, 13)], ["Full()", "(2, 19, 27)", "got (2, 13, 13)"]),
        (HilbertWindow(49), [(2, 13, 13)], ["10x14", "(2, 97)", "along the curve", "(2, 19, 27)", "got (2, 13, 13)"]),
        (HilbertNeighborhood(9), [(2, 9)], ["(2, 17)", "(2, 19, 27)", "got (2, 9)"]),
        (Halo(8, 3), [(27, 4), (27, 8)], ["decomposed", "(27, 8), (27, 8)", "got ((27, 4), (27, 8))"]),
        (Halo((4, 8), (1, 3)), [(27, 8), (11, 8)], ["(11, 8), (27, 8)"]),
        (HilbertWindow(49), [(97, 8), (97, 8)], ["decomposed", "two image axes", "HilbertWindow"]),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_with_the_shape_that_does(
    pattern: Pattern, shapes: list[tuple], said: list[str]
) -> None:
    first, second = ([torch.zeros(s) for s in shapes] + [None])[:2]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages are compared below
        bias_kind(first, second, resolve(pattern, 10, 14), 2, 8)
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_table_index_is_row_major_key_minus_query() -> None:
    dy, dx = np.array([[0, 1], [-1, 0]]), np.array([[0, 1, 2], [-1, 0, 1]])
    index = table_index(dy, dx, 1, 2)
    assert index.shape == (4, 6)
    for qy, qx in np.ndindex(2, 2):
        for ky, kx in np.ndindex(2, 3):
            assert index[qy * 2 + qx, ky * 3 + kx] == (dy[qy, ky] + 1) * 5 + dx[qx, kx] + 2


def test_table_index_never_leaves_the_table() -> None:
    index = table_index(np.array([[-9, 9]]), np.array([[-9, 9]]), 1, 2)
    assert index.tolist() == [[0, 4, 10, 14]]


def test_position_index_is_by_true_place() -> None:
    height, width = 5, 7
    order = hilbert_order(height, width).numpy()
    queries, keys = np.array([0, 3, 34]), np.array([1, 17])
    index = position_index(resolve(HilbertWindow(9), height, width), queries, keys)
    for a, p in enumerate(queries):
        for b, j in enumerate(keys):
            (yq, xq), (yk, xk) = divmod(order[p], width), divmod(order[j], width)
            assert index[a, b] == (yk - yq + height - 1) * (2 * width - 1) + xk - xq + width - 1


# --- resize -----------------------------------------------------------------------------------------------------------


def test_resize_to_the_same_size_changes_nothing() -> None:
    table = torch.randn(3, 13, 9)
    assert torch.equal(resize_table(table, (13, 9)), table)


@pytest.mark.parametrize("size", [(21, 21), (5, 5), (27, 3), (1, 1), (13, 27)])
def test_resize_keeps_centre_and_rim(size: tuple[int, int]) -> None:
    table = torch.randn(2, 13, 13)
    out = resize_table(table, size)
    assert out.shape == (2, *size)
    if min(size) > 1:
        torch.testing.assert_close(out[:, [0, 0, -1, -1], [0, -1, 0, -1]], table[:, [0, 0, -1, -1], [0, -1, 0, -1]])
        torch.testing.assert_close(out[:, size[0] // 2, size[1] // 2], table[:, 6, 6])


def test_resize_of_a_smooth_table_follows_it() -> None:
    def smooth(n: int) -> torch.Tensor:
        d = torch.linspace(-1, 1, n)
        return torch.exp(-(d[:, None] ** 2 + 2 * d[None] ** 2))[None]

    torch.testing.assert_close(resize_table(smooth(25), (41, 41)), smooth(41), atol=1e-2, rtol=0)


def test_resize_of_a_linear_table_stays_odd_in_displacement() -> None:
    table = torch.linspace(-1, 1, 13).expand(1, 13, 13)
    out = resize_table(table, (21, 21))
    torch.testing.assert_close(out, -out.flip(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(resize_table(table.mT, (21, 15)), resize_table(table, (15, 21)).mT)


def test_resize_to_one_row_is_displacement_zero() -> None:
    table = torch.randn(2, 13, 9)
    assert torch.equal(resize_table(table, (1, 9)), table[:, 6:7])
    assert torch.equal(resize_table(table, (13, 1)), table[:, :, 4:5])
    assert torch.equal(resize_table(table, (1, 1)), table[:, 6:7, 4:5])
    torch.testing.assert_close(resize_table(table, (1, 5)), resize_table(table[:, 6:7], (1, 5)))


def test_resize_is_bicubic_with_aligned_corners() -> None:
    table = torch.randn(3, 13, 13)
    want = F.interpolate(table[None], size=(21, 17), mode="bicubic", align_corners=True)[0]
    torch.testing.assert_close(resize_table(table, (21, 17)), want)


def test_resize_is_differentiable() -> None:
    table = torch.randn(2, 5, 7, requires_grad=True)
    grad = torch.randn(2, 9, 3)
    (gradient,) = torch.autograd.grad(resize_table(table, (9, 3)), table, grad)
    # linear in the table: <grad, resize(t)> = <gradient, t>
    other = torch.randn(2, 5, 7)
    torch.testing.assert_close((gradient * other).sum(), (grad * resize_table(other, (9, 3))).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resize_keeps_the_dtype(dtype: torch.dtype) -> None:
    table = torch.randn(2, 5, 5).to(dtype)
    out = resize_table(table, (9, 9))
    assert out.dtype == dtype
    wide = resize_table(table.float(), (9, 9))
    torch.testing.assert_close(out.float(), wide, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


def test_resize_computes_float64_in_float64() -> None:
    table = torch.randn(1, 5, 5, dtype=torch.float64)
    want = F.interpolate(table[None], size=(9, 9), mode="bicubic", align_corners=True)[0]
    torch.testing.assert_close(resize_table(table, (9, 9)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 4, 5), (5, 5)), ((2, 5, 4), (5, 5)), ((2, 5, 5), (4, 5)), ((2, 5, 5), (5, 6)), ((5, 5), (5, 5)),
     ((2, 5, 5), (0, 5)), ((2, 5, 5), (-1, 5))],
)  # fmt: skip
def test_resize_refuses_tables_of_no_displacements(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\(heads, odd, odd\)") as caught:
        resize_table(torch.zeros(shape), size)
    assert str(shape) in str(caught.value)
    assert str(size) in str(caught.value)


def test_a_resized_table_fits_the_other_window() -> None:
    table = torch.randn(2, 13, 13)
    for pattern in (Neighborhood(11), Window(12), Axes(Window(4), Neighborhood(3))):
        (shape,) = bias_shapes(pattern, 24, 24, 2, 8, "table")
        resized = resize_table(table, shape[1:])
        assert bias_kind(resized, None, resolve(pattern, 24, 24), 2, 8) is BiasKind.TABLE
