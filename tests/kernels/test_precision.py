"""Dtypes and head sizes: what is rounded where. Budgets come from eager runs in the same dtype (see kernel_helpers)."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import HALVES, SLOW_ON_GPU, assert_matches, everywhere, largest, make_routed
from nearfield.ops import (
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Window,
    local_attention,
)
from ops_helpers import FEW, Case, make_case

pytestmark = pytest.mark.usefixtures("poisoned")

# One call for every way that kernels treat bias and tiles, as small as can be.
SMALL: list[tuple[Pattern, int, int, str]] = [
    (Window(3, 1), 5, 6, "table"),
    (Neighborhood(3), 5, 6, "table"),
    (Halo(3, 1), 5, 6, "decomposed"),
    (HilbertWindow(7, 2), 5, 6, "positions"),
    (HilbertNeighborhood(5), 5, 6, "positions"),
]
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 80, 96, 128)


@everywhere(
    "pattern, height, width, kind, dtype",
    [(*few, dtype) for few in FEW for dtype in HALVES],
    fast=(0, 3, 4, 7, 15),
    fast_on_gpu=(0, 3, 6, 9, 14, 17),
)
def test_half_precision(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str, dtype: torch.dtype
) -> None:
    case = make_case(pattern, height, width, kind, batch=3, heads=1, head_dim=32, dtype=dtype)
    assert_matches(case.to(device))


@everywhere(
    "head_dim, pattern, height, width, kind, dtype",
    [
        (head_dim, *small, (torch.float32, *HALVES)[(i + j) % 3])
        for i, head_dim in enumerate(HEAD_DIMS)
        for j, small in enumerate(SMALL[:3])
    ],
    fast=range(1, 27, 5),
    fast_on_gpu=range(0, 27, 4),
)
def test_every_head_dim(
    device: torch.device, head_dim: int, pattern: Pattern, height: int, width: int, kind: str, dtype: torch.dtype
) -> None:
    case = make_case(pattern, height, width, kind, heads=1, head_dim=head_dim, packed=head_dim % 16 == 8, dtype=dtype)
    assert_matches(case.to(device))


@everywhere(
    "head_dim, dtype",
    [(d, (torch.float32, *HALVES)[i % 3]) for i, d in enumerate(HEAD_DIMS)],
    fast=(2, 4),
    fast_on_gpu=(2, 5, 7),
)
def test_every_head_dim_routed(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    assert_matches(make_routed(5, 7, 3, 2, batch=1, heads=1, head_dim=head_dim, dtype=dtype).to(device))


@everywhere(
    "dims, pattern, height, width, kind",
    [
        (dims, *SMALL[i % 5])
        for i, dims in enumerate(((8, 24), (40, 8), (1, 3), (5, 1), (16, 128), (128, 32), (20, 72)))
    ],
    fast=(0, 2),
    fast_on_gpu=(1, 5),
)
def test_values_may_have_another_head_dim(
    device: torch.device, dims: tuple[int, int], pattern: Pattern, height: int, width: int, kind: str
) -> None:
    options = {"heads": 2, "head_dim": dims[0], "value_dim": dims[1], "dtype": torch.float32}
    assert_matches(make_case(pattern, height, width, kind, **options).to(device))
    assert_matches(make_routed(4, 5, 2, 2, batch=1, **options).to(device))


@everywhere(
    "number, dtype, bias_dtype",
    [
        (n, *dtypes)
        for n in range(len(SMALL))
        for dtypes in ((HALVES[n % 2], torch.float32), (torch.float32, HALVES[n % 2]))
    ],
    fast=(0, 3, 4),
    fast_on_gpu=(0, 3, 4, 6),
)
def test_a_bias_has_a_dtype_of_its_own(
    device: torch.device, number: int, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    pattern, height, width, kind = SMALL[number]
    case = make_case(pattern, height, width, kind, heads=1, head_dim=16, dtype=dtype, bias_dtype=bias_dtype)
    assert_matches(case.to(device))


@SLOW_ON_GPU
@pytest.mark.parametrize("pattern", [Window((1, 2)), Neighborhood((1, 2)), HilbertWindow(2)], ids=str)
def test_a_float32_table_beside_half_precision_inputs_is_not_rounded(device: torch.device, pattern: Pattern) -> None:
    """In bfloat16 both entries would be 100: equal weights."""
    q, v = torch.zeros(1, 1, 2, 1, 16), torch.zeros(1, 1, 2, 1, 16)
    v[0, 0, 1] = 1.0
    table = torch.full((1, 3), 100.0)
    table[0, 2] = 100.2  # of the token ahead
    table = table if pattern.curve else table[:, None]
    q, v = (t.bfloat16().to(device) for t in (q, v))
    got = local_attention(q, q, v, pattern, bias=table.to(device), backend="triton")[0, 0, 0].float().cpu()
    weight = torch.tensor(0.2).sigmoid()  # of 100.2 beside 100
    assert largest(got - weight) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("pattern", [Window(8), pytest.param(Neighborhood(3), marks=pytest.mark.slow)], ids=str)
def test_table_gradients_are_summed_in_float32(device: torch.device, pattern: Pattern) -> None:
    """Hundreds of equal terms: a bfloat16 sum would stop growing at 256 of them."""
    case = make_case(pattern, 16, 32, "table", heads=1, dtype=torch.bfloat16)
    q, k, v, bias = (torch.zeros_like(t) for t in case.leaves)
    v[:, :, ::2] = 1
    case.leaves, case.grad = [q, k, v, bias], v.clone()
    got, want = case.to(device).run("triton")[-1], case.to(torch.float64).run("reference")[-1]
    # every term has the same error here, that of outputs rounded to bfloat16, so errors do not average out
    assert largest(got.double().cpu() - want) <= 4 * torch.finfo(torch.bfloat16).eps * largest(want)


@SLOW_ON_GPU
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 30.0])
def test_any_scale(device: torch.device, scale: float) -> None:
    for i, small in enumerate(SMALL[: 2 if device.type == "cpu" else 5]):
        dtype = (torch.float32, *HALVES)[i % 3]
        assert_matches(make_case(*small, heads=1, head_dim=16, scale=scale, dtype=dtype).to(device))


# --- scores far from zero ---------------------------------------------------------------------------------------------

# Every source of bias and mask: an atlas of cells, of tiles and of a curve, entries by place, q . rel, a mask.
SOURCES = [*SMALL, (HilbertNeighborhood(5), 5, 6, "table"), (Neighborhood(3, 2), 7, 6, "none")]
OFFSET = 30.0  # what bfloat16 holds in steps of 1/8


def far_from_zero(number: int, dtype: torch.dtype, offset: float) -> Case:
    """A call with `offset` added to every entry of its float32 table."""
    case = make_case(*SOURCES[number], heads=1, head_dim=16, dtype=dtype, bias_dtype=torch.float32)
    if case.biases == 1:
        case.leaves[-1] += offset
    return case


@everywhere(
    "number, dtype, offset",
    [(n, dtype, OFFSET * (-1) ** (n + i)) for n in range(len(SOURCES)) for i, dtype in enumerate(HALVES)],
    fast=range(14),
    fast_on_gpu=(0, 3, 7, 8),
)
def test_scores_that_spread_wide_around_a_large_offset(
    device: torch.device, number: int, dtype: torch.dtype, offset: float
) -> None:
    """A standard deviation of 8: one key has nearly all the weight of many queries."""
    case = far_from_zero(number, dtype, offset)
    case.leaves[0] *= 8
    assert_matches(case.to(device))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # in slots without a token: they are not stored
@everywhere("dtype, zero_pad", [(d, z) for d in HALVES for z in (False, True)], fast=range(4), fast_on_gpu=(1, 2))
def test_routed_scores_that_spread_wide(device: torch.device, dtype: torch.dtype, zero_pad: bool) -> None:
    call = make_routed(5, 7, 3, 2, zero_pad=zero_pad, batch=1, heads=1, head_dim=16, dtype=dtype)
    call.leaves[0] *= 8
    assert_matches(call.to(device))


@everywhere(
    "number, dtype, offset",
    [(n, dtype, OFFSET * (-1) ** (n + i)) for n in (0, 1, 3, 4, 5) for i, dtype in enumerate(HALVES)],
    fast=range(10),
    fast_on_gpu=(1, 2),
)
def test_a_common_offset_of_a_table_changes_nothing(
    device: torch.device, number: int, dtype: torch.dtype, offset: float
) -> None:
    """Softmax takes it out again, to the last digits of float32: what is added to scores is never rounded to half."""
    runs = []
    for added in (0.0, offset):
        torch.manual_seed(0)
        runs.append(far_from_zero(number, dtype, added).to(device).run("triton"))
    for want, got in zip(*runs, strict=True):  # a weight and the sum it is in may be rounded to the other side
        assert largest(got.double() - want.double()) <= 2 * torch.finfo(dtype).eps * largest(want.double())
