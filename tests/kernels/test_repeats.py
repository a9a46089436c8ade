"""The same bits every time: no atomics, every sum in a fixed order."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import DTYPES, HALVES, Call, make_routed
from nearfield.ops import Halo, HilbertNeighborhood, HilbertWindow, Neighborhood, Pattern, Window
from ops_helpers import CASES, kinds_of, make_case

REPEATS = 20


def assert_repeats(call: Call) -> None:
    first = call.run("triton")
    for _ in range(REPEATS - 1):
        again = call.run("triton")
        for name, a, b in zip(call.names, first, again, strict=True):
            assert torch.equal(a, b), name


SMALL: list[tuple[Pattern, int, int, str]] = [
    (Window(2, 1), 2, 3, "table"),
    (Neighborhood(3), 4, 5, "table"),
    (Halo(2, 5), 5, 3, "table"),  # whose gradient the dQ pass takes along
    (Halo(3, 1), 4, 5, "decomposed"),
    (HilbertWindow(5), 3, 4, "positions"),
    (HilbertNeighborhood(5), 4, 5, "positions"),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n < 2 else [pytest.mark.slow]) for n in range(len(SMALL))]
)
def test_twenty_interpreted_runs_are_one(number: int) -> None:
    assert_repeats(make_case(*SMALL[number], heads=1, packed=True, dtype=DTYPES[number % 3]))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(3, 5, 3, 1), (3, 5, 2, 5)], ids=["lists", "bits"])
def test_twenty_interpreted_routed_runs_are_one(shape: tuple[int, int, int, int]) -> None:
    assert_repeats(make_routed(*shape, heads=1, batch=1))


FAST = (1, 8, 15, 18, 24, 29, 30)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in range(len(CASES))]
)
def test_twenty_runs_of_every_pattern_are_one(number: int) -> None:
    """On hardware programs run in any order."""
    pattern, height, width = CASES[number]
    kind = kinds_of(pattern)[1 + number % 2]
    case = make_case(pattern, 4 * height, 4 * width, kind, batch=4, heads=3, head_dim=32, dtype=HALVES[number % 2])
    assert_repeats(case.to(torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14, 14, 2, 16), (28, 28, 4, 4), (56, 56, 8, 4), (30, 41, 8, 3)], ids=str)
def test_twenty_routed_runs_are_one(shape: tuple[int, int, int, int]) -> None:
    assert_repeats(make_routed(*shape, batch=8, head_dim=32, dtype=torch.bfloat16).to(torch.device("cuda")))
