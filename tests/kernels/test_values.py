"""Kernels of the static patterns against the float64 reference: output and every gradient of every pattern.

All of it runs on poisoned memory: a number that was never written is NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_helpers import DTYPES, SLOW_ON_GPU, assert_matches, everywhere
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
)
from ops_helpers import CASES, EVERY_KIND, kinds_of, make_case, most_keys, query_stride

pytestmark = pytest.mark.usefixtures("poisoned")

# Of every pattern one kind of bias is fast; which one changes from pattern to pattern.
_FIRST = [sum(len(kinds_of(p)) for p, _, _ in CASES[:i]) for i in range(len(CASES))]
ONE_KIND_EACH = {first + i % 3 for i, first in enumerate(_FIRST)}


def numbered(values: list[tuple]) -> list[tuple]:
    return [(number, *value) for number, value in enumerate(values)]


@everywhere(
    "number, pattern, height, width, kind",
    numbered(EVERY_KIND),
    fast=ONE_KIND_EACH,
    fast_on_gpu=[n for n in ONE_KIND_EACH if n % 4 == 0],
)
def test_output_and_every_gradient_of_every_pattern(
    device: torch.device, number: int, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    batch, heads = ((1, 1), (1, 2), (1, 1), (2, 1))[number % 4]
    packed = number % 3 == 0 and query_stride(pattern) == (1, 1)
    dtype = torch.float32 if device.type == "cpu" else DTYPES[number % 3]
    case = make_case(pattern, height, width, kind, batch=batch, heads=heads, packed=packed, dtype=dtype)
    assert_matches(case.to(device))


# --- windows ----------------------------------------------------------------------------------------------------------

WINDOWS: list[tuple[Pattern, int, int, str]] = [
    *((Window(size), size + 3, 2 * size - 1, kind)
      for size, kind in zip(range(2, 9), ("table", "none", "table", "none", "table", "table", "none"), strict=True)),
    (Window(9), 10, 9, "table"),
    (Window(10), 7, 11, "none"),
    (Window(11), 13, 6, "table"),
    (Window(12), 6, 13, "none"),
    (Window(14), 16, 8, "table"),
    (Window(16), 5, 17, "table"),
    (Window(7, 3), 14, 17, "table"),  # shifted, with cut cells at every border
    (Window(8, 4), 16, 16, "table"),  # 64 tokens: every slot has one
    (Window((4, 16), (1, -5)), 9, 20, "none"),
    (Window((2, 32)), 5, 40, "table"),
    (Window(2, 1), 1, 9, "table"),
    (Grid(8), 16, 24, "table"),
    (Grid(7), 15, 13, "none"),
    (Grid((3, 12)), 7, 30, "table"),
    (HilbertWindow(64, 32), 9, 16, "positions"),
    (HilbertWindow(49, 12), 11, 13, "table"),
    (HilbertWindow(33), 9, 9, "none"),
    (HilbertWindow(100, 30), 12, 14, "positions"),
    (Axes(Window(7, 2), Grid(3)), 15, 10, "table"),
]  # fmt: skip


@everywhere("pattern, height, width, kind", WINDOWS, fast=(1, 5, 6, 7, 15, 16, 20, 23, 24), fast_on_gpu=(5, 7, 15, 24))
def test_windows_of_every_size(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str, launched: list[tuple[str, Any]]
) -> None:
    """Up to 64 tokens a program holds a window whole; larger ones stream, and float32 ones where registers are few."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = make_case(pattern, height, width, kind, heads=1, packed=True, dtype=dtype)
    assert_matches(case.to(device))
    family = "window" if most_keys(pattern, height, width) <= 64 else "neighborhood"
    assert {name for name, _ in launched if name.endswith("forward")} == {f"{family}.forward"}


@everywhere("kind", ["none", "table"], fast=(0, 1), fast_on_gpu=(1,))
def test_a_program_takes_many_windows_of_many_images(
    device: torch.device, kind: str, launched: list[tuple[str, Any]]
) -> None:
    case = make_case(Window(2), 6, 10, kind, batch=5, heads=1, packed=True, dtype=torch.float32)
    assert_matches(case.to(device))  # 75 windows
    assert {name for name, _ in launched if name.endswith("backward")} == {"window.backward"}


@SLOW_ON_GPU
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 21)], ids=str)
def test_maps_of_one_row_or_one_token(device: torch.device, size: tuple[int, int]) -> None:
    for i, pattern in enumerate((Window(4, 1), Grid(3), Neighborhood(1), Halo(4, 2), Slide(3), HilbertWindow(4, 1))):
        kind = kinds_of(pattern)[(i + size[1]) % 3]
        assert_matches(make_case(pattern, *size, kind, heads=1, dtype=torch.float32).to(device))


# --- tiles with a halo ------------------------------------------------------------------------------------------------

TILES: list[tuple[Pattern, int, int, str]] = [
    (Neighborhood(7), 18, 25, "table"),  # corners, borders and interior tiles on both axes
    (Neighborhood(7), 7, 30, "table"),
    (Neighborhood((2, 6)), 21, 18, "table"),
    (Neighborhood((5, 3), (3, 4)), 19, 25, "table"),
    (Neighborhood((9, 8), 1, (4, 8)), 24, 25, "table"),
    (Neighborhood(13), 17, 20, "none"),
    (Slide((7, 5)), 16, 19, "table"),
    (Halo(8, 3), 16, 24, "decomposed"),
    (Halo(8, 3), 13, 20, "table"),
    (Halo(8, 3, "zero", 2), 16, 22, "decomposed"),
    (Halo(8, 2, "clip", 2), 19, 16, "decomposed"),
    (Halo((8, 4), (3, 9)), 9, 8, "decomposed"),
    (HilbertNeighborhood(25), 13, 14, "table"),
    (HilbertNeighborhood(25), 13, 14, "positions"),
    (HilbertSlide(49), 12, 17, "positions"),
    (Axes(Full(), Window(7)), 18, 20, "table"),
    (Axes(Slide(5), Neighborhood(3, 5)), 16, 23, "decomposed"),
    (Full(), 14, 14, "table"),
]  # fmt: skip


@everywhere("pattern, height, width, kind", TILES, fast=(1, 9), fast_on_gpu=(0, 3, 9, 13))
def test_several_tiles_and_kinds_of_tiles(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    apart = query_stride(pattern) != (1, 1)
    case = make_case(pattern, height, width, kind, heads=1, head_dim=16, packed=not apart, dtype=torch.float32)
    assert_matches(case.to(device))
