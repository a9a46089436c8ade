"""The reference backend against the definition written as loops over queries and keys."""

from __future__ import annotations

import pytest
import torch
from nearfield.ops import Full, Halo, HilbertWindow, Neighborhood, Pattern, Window, local_attention
from ops_helpers import CPU_BACKENDS, attention_by_loops, kinds_of, make_case, random_cases

CASES = random_cases(40, seed=11, largest=5)


@pytest.mark.parametrize("number", range(0, len(CASES), 10))
def test_reference_equals_the_loops_for_every_pattern_and_bias(number: int) -> None:
    for pattern, height, width in CASES[number : number + 10]:
        for kind in kinds_of(pattern):
            case = make_case(pattern, height, width, kind, batch=2, value_dim=5)
            bias = {0: None, 1: case.leaves[-1], 2: tuple(case.leaves[-2:])}[case.biases]
            want = attention_by_loops(*case.leaves[:3], pattern, bias, kind)
            torch.testing.assert_close(case.run("reference")[0], want, rtol=1e-10, atol=1e-12, msg=str(case.pattern))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_bias_entry_moves_exactly_the_pairs_at_its_displacement(backend: str) -> None:
    """Entry [h, dy + ry, dx + rx] is of key - query = (dy, dx) in steps. Values are one-hot: outputs are weights."""
    H, W, k, d = 8, 10, 3, 2
    q = torch.zeros(1, H, W, 2, 4, dtype=torch.float64)
    v = torch.eye(H * W, dtype=torch.float64).view(1, H, W, 1, H * W).expand(1, H, W, 2, H * W)
    for dy, dx in [(0, 1), (1, 0), (-1, -1), (2, 0), (0, -2)]:
        table = torch.zeros(2, 2 * k - 1, 2 * k - 1, dtype=torch.float64)
        table[1, dy + k - 1, dx + k - 1] = 30.0
        out = local_attention(q, q, v, Neighborhood(k, d), bias=table, backend=backend)
        assert torch.allclose(out[..., 0, :].amax(-1), torch.tensor(1 / 9, dtype=torch.float64))  # the other head
        for y in range(H):
            for x in range(W):
                j = (y + d * dy, x + d * dx)
                if 0 <= j[0] < H and 0 <= j[1] < W and out[0, y, x, 1, j[0] * W + j[1]] > 0.5:
                    assert out[0, y, x, 1, j[0] * W + j[1]] > 0.999
                else:  # the displaced key is not among this query's keys
                    assert out[0, y, x, 1].max() < 0.2
        # in the middle of the map every displacement of the kernel is seen
        if abs(dy) <= 1 and abs(dx) <= 1:
            assert out[0, 4, 5, 1, (4 + d * dy) * W + 5 + d * dx] > 0.999


def test_default_scale_is_the_inverse_root_of_head_dim() -> None:
    q = torch.randn(1, 4, 4, 1, 16, dtype=torch.float64)
    for backend in CPU_BACKENDS:
        given = local_attention(q, q, q, Full(), scale=0.25, backend=backend)
        assert torch.equal(local_attention(q, q, q, Full(), backend=backend), given)


@pytest.mark.parametrize("pattern", [Window(3, 1), Neighborhood(3), HilbertWindow(5, 2)], ids=str)
def test_constant_values_come_back(pattern: Pattern) -> None:
    """Weights of a query sum to one over its keys."""
    q = torch.randn(1, 5, 6, 2, 8)
    for backend in CPU_BACKENDS:
        out = local_attention(q, q, torch.ones_like(q), pattern, backend=backend)
        torch.testing.assert_close(out, torch.ones_like(q))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padding_zeros_of_a_halo_take_part_in_the_softmax(backend: str) -> None:
    q = torch.zeros(1, 2, 2, 1, 4)  # all scores are 0: weights are 1 / 16, of which 4 lie on the map
    out = local_attention(q, q, torch.ones_like(q), Halo(2, 1), backend=backend)
    torch.testing.assert_close(out, torch.full_like(q, 0.25))
    clipped = local_attention(q, q, torch.ones_like(q), Halo(2, 1, "clip"), backend=backend)
    torch.testing.assert_close(clipped, torch.ones_like(q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    case = make_case(Neighborhood(3), 6, 6, "table", dtype=dtype)
    q, k, v, table = case.leaves
    for backend in CPU_BACKENDS:
        wide = local_attention(q.float(), k.float(), v.float(), case.pattern, bias=table.float(), backend=backend)
        got = local_attention(q, k, v, case.pattern, bias=table, backend=backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
