"""The torch backend holds no N x N scores and no copy of the keys for each query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nearfield.ops import (
    Axes,
    Full,
    Grid,
    Halo,
    HilbertNeighborhood,
    HilbertSlide,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Slide,
    Window,
    local_attention,
    routing_attention,
)
from nearfield.ops.routing import cut_regions, route
from ops_helpers import bias_shapes, kinds_of
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

SIDE, HEADS, HEAD_DIM = 64, 2, 32
TOKENS = SIDE * SIDE
INPUT = TOKENS * 3 * HEADS * HEAD_DIM * 4  # bytes of q, k and v in float32: 3 MiB
FEW_MEGABYTES = 4 << 20
SCORES = TOKENS * TOKENS * 4  # one head's scores, 64 MiB


def _walk(nodes: list[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        yield from _walk(node.children)


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest single allocation, in C++ or Python, and the peak of all that lived at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    result = seen.profiler.kineto_results
    events = [e.extra_fields for e in _walk(result.experimental_event_tree()) if e.tag == _EventType.Allocation]
    before = events[0].total_allocated - events[0].alloc_size
    return max(e.alloc_size for e in events), max(e.total_allocated for e in events) - before


def train_step(pattern: Pattern, kind: str) -> Callable[[], None]:
    qkv = torch.randn(1, SIDE, SIDE, 3, HEADS, HEAD_DIM, requires_grad=True)
    shapes = bias_shapes(pattern, SIDE, SIDE, HEADS, HEAD_DIM, kind)
    tables = [torch.randn(shape, requires_grad=True) for shape in shapes]
    bias = {0: None, 1: tables[0] if tables else None, 2: tuple(tables)}[len(tables)]

    def run() -> None:
        local_attention(qkv, None, None, pattern, bias=bias).sum().backward()

    return run


def test_the_measurement_sees_an_n_by_n_matrix() -> None:
    q = torch.randn(1, SIDE, SIDE, 1, 8)
    largest, peak = allocations(lambda: local_attention(q, q, q, Window(4), backend="reference"))
    assert largest >= SCORES
    assert peak >= largest


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood(7),
        Neighborhood(7, dilation=8),
        Window(7),
        Window(7, shift=3),
        Slide(7),
        Grid(8),
        Halo(8, 3),
        HilbertWindow(49, 24),
        HilbertNeighborhood(49),
        HilbertSlide(49),
    ],
    ids=str,
)
def test_local_patterns_allocate_no_more_than_their_input(pattern: Pattern) -> None:
    for kind in kinds_of(pattern):
        largest, peak = allocations(train_step(pattern, kind))
        assert largest <= max(INPUT, FEW_MEGABYTES), f"{kind}: {largest / 2**20:.1f} MiB at once"
        assert peak <= 8 * INPUT, f"{kind}: {peak / 2**20:.1f} MiB in all"


@pytest.mark.parametrize("pattern", [Full(), Axes(Full(), Window(7)), HilbertWindow(1024)], ids=str)
def test_wide_patterns_never_hold_all_scores_of_a_head(pattern: Pattern) -> None:
    for kind in kinds_of(pattern)[:2]:
        largest, _ = allocations(train_step(pattern, kind))
        assert largest <= SCORES // 4, f"{kind}: {largest / 2**20:.1f} MiB at once"


def test_routing_never_copies_all_routed_keys() -> None:
    """topk copies of K and V would be 16 times the map, the scores as many."""
    topk = 16
    qkv = torch.randn(1, SIDE, SIDE, 3, HEADS, HEAD_DIM, requires_grad=True)
    largest, _ = allocations(lambda: routing_attention(qkv, None, None, 8, topk).sum().backward())
    assert largest <= 8 << 20
    assert largest < topk * INPUT // 3


@pytest.mark.parametrize("region_size", [8, 7], ids=["whole regions", "short regions"])
def test_choosing_regions_copies_neither_queries_nor_keys(region_size: int) -> None:
    q, k = torch.randn(2, 1, SIDE, SIDE, HEADS, HEAD_DIM)
    cut = cut_regions(SIDE, SIDE, None, region_size)
    largest, peak = allocations(lambda: route(q, k, cut, 4))
    assert largest <= INPUT // 6
    assert peak <= INPUT // 2
