"""Kernels of bi-level routing against the float64 reference, by lists of regions and by bits on the whole image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_helpers import HALVES, SLOW_ON_GPU, Routed, assert_matches, everywhere, make_routed
from nearfield.ops import routing_attention
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

Launched = list[tuple[str, dict[str, Any]]]
Change = Callable[[Any, str, Any], None]


def forms(launched: Launched) -> set[bool]:
    """Of the launched kernels: True where scores of the whole image are masked, False where lists are followed."""
    assert [name for name, _ in launched] == ["block_sparse.forward", "block_sparse.query", "block_sparse.key"]
    return {constants["DENSE"] for _, constants in launched}


# height, width, region_size, topk, zero_pad, dense
SHAPES = [
    (14, 14, 2, 16, False, True),  # BiFormer's third stage: 49 regions of 4 tokens
    (14, 14, 2, 2, False, False),
    (16, 16, 2, 18, False, True),  # 64 regions: the last one is the sign bit
    (7, 10, 3, 2, False, False),  # short regions
    (7, 10, 3, 6, False, True),
    (4, 4, 2, 4, False, True),  # all regions
    (5, 8, (2, 3), 5, False, True),
    (16, 16, 8, 1, False, False),
    (16, 16, 8, 4, False, False),  # all regions
    (20, 13, 8, 2, False, False),
    (8, 17, (2, 1), 2, False, False),  # 68 regions: more than bits
    (7, 10, 3, 2, True, False),
    (5, 8, (2, 3), 5, True, False),  # zero keys: no bits
    (20, 13, 8, 2, True, False),
    (4, 4, 2, 3, True, True),  # nothing to pad
    (1, 9, (1, 4), 2, False, True),
    (1, 9, (1, 4), 2, True, False),
    (5, 5, 7, 1, False, True),  # one region, larger than the map
    (5, 5, 7, 1, True, False),
    (3, 4, 1, 5, False, True),  # regions of one token
    (24, 12, (12, 12), 1, False, False),  # a region is several tiles
]


@everywhere(
    "height, width, region_size, topk, zero_pad, dense",
    SHAPES,
    fast=(3, 4, 6, 9, 12, 15, 17, 20),
    fast_on_gpu=(0, 2, 8, 12),
)
def test_output_and_every_gradient(
    device: torch.device, height: int, width: int, region_size: Any, topk: int, zero_pad: bool, dense: bool,
    launched: Launched,
) -> None:  # fmt: skip
    packed = (height + topk) % 2 == 0
    call = make_routed(
        height, width, region_size, topk, zero_pad=zero_pad, batch=1 + height % 2, heads=1, packed=packed
    )
    assert_matches(call.to(device))
    if device.type == "cpu":  # a GPU's launch table may decide otherwise
        assert forms(launched) == {dense}


@everywhere("dtype, zero_pad", [(d, z) for d in HALVES for z in (False, True)], fast=(0, 3), fast_on_gpu=(0, 3))
def test_half_precision(device: torch.device, dtype: torch.dtype, zero_pad: bool) -> None:
    assert_matches(make_routed(7, 11, 4, 2, zero_pad=zero_pad, batch=1, head_dim=32, dtype=dtype).to(device))
    assert_matches(make_routed(17, 17, 8, 2, zero_pad=zero_pad, batch=1, heads=1, dtype=dtype).to(device))


# What every region of a row of four attends.
ROUTES: dict[str, list[list[int]]] = {
    "nobody chose region 3": [[0, 1], [1, 2], [2, 0], [0, 2]],
    "everybody chose region 2": [[2, 0], [2, 1], [2, 3], [2, 0]],
    "nobody chose itself": [[1, 2], [0, 3], [3, 1], [2, 0]],
    "one region each": [[3], [3], [0], [1]],
}


@SLOW_ON_GPU
@pytest.mark.parametrize("dense", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("name", ROUTES)
def test_any_routes(device: torch.device, name: str, dense: bool, change: Change, launched: Launched) -> None:
    """Both forms hold for any lists; a region that nobody chose gets gradients of zero."""
    choose_form(change, dense)
    routes = torch.tensor([ROUTES[name], ROUTES[name][::-1]])
    call = make_routed(4, 15, 4, routes.shape[2], heads=1, routes=routes).to(device)
    assert_matches(call)
    assert forms(launched) == {dense}
    got = call.run("triton")
    if name.startswith("nobody chose region 3"):
        assert not got[2][0, :, 12:].any()
        assert not got[3][0, :, 12:].any()


def choose_form(change: Change, dense: bool) -> None:
    from nearfield.ops.cache import SCHEDULES
    from nearfield.ops.triton import routed

    SCHEDULES.clear()
    change(routed, "MOST_BITS", 64 if dense else 0)
    if dense:
        change(routed, "LOAD_SCORES", 1 << 20)  # tiles are what costs


@SLOW_ON_GPU
@pytest.mark.parametrize("topk", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_both_forms_give_one_result(device: torch.device, topk: int, change: Change, launched: Launched) -> None:
    call = make_routed(9, 14, 4, topk, batch=1).to(device)
    results = []
    for dense in (False, True):
        choose_form(change, dense)
        launched.clear()
        results.append(call.run("triton"))
        assert forms(launched) == {dense}
    torch.testing.assert_close(results[0], results[1])


@SLOW_ON_GPU
def test_packed_gradients_are_the_stack_of_the_separate_ones(device: torch.device) -> None:
    packed = make_routed(7, 9, 3, 2, packed=True).to(device)
    (qkv,) = packed.leaves
    apart = Routed(
        [t.contiguous() for t in qkv.unbind(3)], packed.grad, packed.routes, packed.regions, False, packed.scale
    )
    out, dqkv = packed.run("triton")
    want, *gradients = apart.run("triton")
    assert torch.equal(out, want)
    assert torch.equal(dqkv, torch.stack(gradients, 3))


@pytest.mark.parametrize("pad", ["clip", "zero"])
def test_the_public_function_routes_as_the_reference_does(device: torch.device, pad: str) -> None:
    q, k, v = (torch.randn(2, 7, 10, 1, 8, device=device) for _ in range(3))

    def run(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = routing_attention(*leaves, None, 3, region_size=(3, 4), pad=pad, backend=backend)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-5, atol=1e-5)
