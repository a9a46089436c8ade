"""The forms a kernel may take: each is forced on calls that would take another, and must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_helpers import SLOW_ON_GPU, assert_matches, everywhere, make_routed
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
)
from nearfield.ops.patterns import Axis
from nearfield.ops.triton.configs import SHIPPED, Config, choose, known, override, read_table
from ops_helpers import make_case

pytestmark = pytest.mark.usefixtures("poisoned")

Launched = list[tuple[str, dict[str, Any]]]
Change = Callable[[Any, str, Any], None]
Call = tuple[Pattern, int, int, str]

# Calls in tiles, with several kinds of tiles each.
TILES: list[Call] = [
    (Neighborhood(3), 9, 11, "table"),
    (Neighborhood((3, 5), (2, 1)), 9, 11, "table"),
    (Halo(3, 2), 7, 8, "table"),
    (Halo(4, 1, "zero", 2), 9, 8, "table"),
    (HilbertNeighborhood(9), 7, 8, "table"),
    (Axes(Full(), Slide(3)), 9, 8, "table"),
    (Neighborhood(3, 2), 7, 8, "none"),
    (Halo(3, 2), 7, 8, "none"),
    (Halo(3, 1), 7, 8, "decomposed"),
    (HilbertNeighborhood(9), 7, 8, "positions"),
]
CELLS: list[Call] = [
    (Window((3, 4), 1), 7, 9, "table"),
    (Grid(3), 7, 8, "none"),
    (HilbertWindow(12, 5), 6, 7, "positions"),
]
TABLES = [call for call in TILES if call[3] == "table"]


def assert_call_matches(device: torch.device, call: Call, *, batch: int = 1, heads: int = 1) -> None:
    assert_matches(make_case(*call, batch=batch, heads=heads, dtype=torch.float32).to(device))


@pytest.fixture
def _small_tiles() -> Iterator[None]:
    """Of 16 tokens: even small maps have several kinds of them."""
    with override(rows("neighborhood", lambda row: replace(row, block_m=16))):
        yield


def rows(op: str, changed: Callable[[Config], Config]) -> dict[str, Config]:
    """The shipped rows of some kernels, changed."""
    return {key: changed(row) for key, row in read_table(SHIPPED).items() if key.startswith(op)}


def constants(launched: Launched, kernel: str, name: str) -> set[Any]:
    """Values of one constant in all launches of the kernels whose name ends so."""
    return {given[name] for kind, given in launched if kind.endswith(kernel) and name in given}


# --- how a pass gets its bias -----------------------------------------------------------------------------------------


@everywhere("call", [(call,) for call in TILES], fast=(0, 4, 6), fast_on_gpu=(2, 7))
@pytest.mark.parametrize("large", [False, True], ids=["atlas", "no atlas"])
def test_bias_and_mask_come_from_a_table_of_tiles_or_are_looked_up(
    device: torch.device, call: Call, large: bool, change: Change, launched: Launched
) -> None:
    from nearfield.ops.triton import site

    if large:
        change(site, "ATLAS_BYTES", 0)
    assert_call_matches(device, call)
    form = {"table": ("atlas", "gather"), "none": ("mask", "none")}.get(call[3], (call[3],) * 2)[large]
    assert constants(launched, "", "BIAS") == {form}


# --- the gradient of a bias table -------------------------------------------------------------------------------------


# Their slots regroup into displacements.
ALONG: list[Call] = [
    (Neighborhood(7), 9, 20, "table"),
    (Neighborhood(3, 3), 10, 14, "table"),
    (Neighborhood((6, 2), (1, 3)), 8, 13, "table"),
    (Neighborhood(6, 2, (6, 3)), 13, 15, "table"),
    (Window(10, 3), 14, 15, "table"),
    (Halo(2, 5), 5, 3, "table"),
    (Halo(4, 2, "zero", 2), 8, 12, "table"),
    (Axes(Halo(2, 1), Grid(3)), 5, 8, "table"),
]


@everywhere("call", [(call,) for call in ALONG], fast=(5, 6), fast_on_gpu=(0, 3))
@pytest.mark.parametrize("along", [True, False], ids=["taken along", "in a pass of its own"])
def test_table_gradients_are_taken_along_or_summed_in_a_pass_of_their_own(
    device: torch.device, call: Call, along: bool, change: Change, launched: Launched
) -> None:
    from nearfield.ops.triton import site

    change(site, "GRID_COST", 1e9 if along else 0.0)
    assert_call_matches(device, call, batch=3)
    if device.type == "cpu" or not along:  # a GPU's blocks may be too small to regroup
        assert ("neighborhood.bias" in {name for name, _ in launched}) != along


@pytest.mark.usefixtures("_small_tiles")
@everywhere("call", [(call,) for call in (*TABLES, TILES[9], CELLS[0], CELLS[2])], fast=(0, 4, 6), fast_on_gpu=(0, 6))
def test_score_gradients_too_large_to_hold_are_summed_in_pieces(
    device: torch.device, call: Call, change: Change, launched: Launched
) -> None:
    from nearfield.ops.triton import gradient, site

    change(site, "GRID_COST", 0.0)
    change(gradient, "PARTIAL_BYTES", 1)
    assert_call_matches(device, call, batch=2, heads=2)
    tiled = call in TILES
    pieces = [name for name, _ in launched].count("neighborhood.bias")
    assert pieces > 1 if tiled else pieces == 0


@SLOW_ON_GPU
@pytest.mark.slow
@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("size", [1, 1 << 13, 1 << 15])
def test_pieces_of_any_size_give_the_same_gradient(device: torch.device, size: int, change: Change) -> None:
    from nearfield.ops.triton import gradient, site

    change(site, "GRID_COST", 0.0)
    change(gradient, "PARTIAL_BYTES", size)
    assert_call_matches(device, (Neighborhood(3), 7, 9, "table"), batch=3)


# --- addresses --------------------------------------------------------------------------------------------------------


@everywhere("call", [(call,) for call in (*TILES, *CELLS)], fast=(1, 8, 10), fast_on_gpu=(1, 11))
def test_offsets_of_64_bits_give_the_same_result(
    device: torch.device, call: Call, change: Change, launched: Launched
) -> None:
    from nearfield.ops.triton import launch

    change(launch, "wide", lambda *_: True)
    assert_call_matches(device, call, batch=2)
    assert constants(launched, "", "WIDE") == {True}


@SLOW_ON_GPU
def test_routed_offsets_of_64_bits_give_the_same_result(
    device: torch.device, change: Change, launched: Launched
) -> None:
    from nearfield.ops.triton import launch

    change(launch, "wide", lambda *_: True)
    for shape in ((7, 10, 3, 2), (9, 9, 8, 2)):
        assert_matches(make_routed(*shape, batch=1, heads=1).to(device))
    assert constants(launched, "", "WIDE") == {True}


@pytest.mark.interpreted
def test_no_sum_or_product_of_integers_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter asserts it of every operation; empty slots have offsets far outside the map."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    for call in (TILES[2], TILES[9], CELLS[0], CELLS[2]):
        assert_call_matches(torch.device("cpu"), call)
    for shape in ((5, 7, 3, 2), (5, 7, 3, 5)):
        assert_matches(make_routed(*shape, batch=1, heads=1))


def test_only_maps_of_two_billion_elements_need_64_bits() -> None:
    from nearfield.ops.triton.launch import Strides, wide

    packed, tokens = {"Q": Strides(0, 3 * 128, 32), "K": Strides(0, 128, 32)}, (1 << 31) // 384
    assert not wide(packed, tokens, 4, 32)
    assert wide(packed, tokens + 1, 4, 32)
    tokens = 4096 * 4096
    heads_first = {"Q": Strides(0, 32, tokens * 32)}
    assert wide(heads_first, tokens, 8, 32)
    assert wide(heads_first, tokens, 4, 32)  # the last entry is 2**31 - 1, but a dense output has 2**31
    assert not wide(heads_first, tokens, 3, 32)
    assert wide({"Q": Strides(0, 64, 16)}, 2300 * 2300, 4, 102), "the rows of a decomposed bias"


# --- launch configurations --------------------------------------------------------------------------------------------


BLOCKS = [(16, 16), (16, 64), (32, 32), (64, 16), (128, 32), (128, 64)]


@everywhere(
    "blocks, call",
    [(blocks, TILES[(2 * i + j) % 10]) for i, blocks in enumerate(BLOCKS) for j in (0, 5)],
    fast=(3, 8),
    fast_on_gpu=(4, 10),
)
def test_every_size_of_block_gives_the_same_result(
    device: torch.device, blocks: tuple[int, int], call: Call, launched: Launched
) -> None:
    m, n = blocks
    with override(rows("neighborhood", lambda row: replace(row, block_m=m, block_n=n))):
        assert_call_matches(device, call, batch=1)
    assert constants(launched, "neighborhood.forward", "BLOCK_M") == {m}
    assert constants(launched, "neighborhood.forward", "BLOCK_N") == {n}


@everywhere("blocks", [(blocks,) for blocks in BLOCKS[:5]], fast=(1, 3), fast_on_gpu=(0,))
@pytest.mark.parametrize("region", [3, 8])
def test_every_size_of_block_routes_the_same(
    device: torch.device, blocks: tuple[int, int], region: int, launched: Launched
) -> None:
    m, n = blocks
    with override(rows("routing", lambda row: replace(row, block_m=m, block_n=n))):
        assert_matches(make_routed(10, 11, region, 2, batch=1, heads=1).to(device))
    assert constants(launched, "block_sparse.key", "BLOCK_M") == {m}


@SLOW_ON_GPU
@pytest.mark.parametrize("run", [1, 2, 3, 64])
def test_a_program_may_take_any_number_of_images_or_cells(device: torch.device, run: int) -> None:
    """More than there are, or some that do not divide their number."""
    with override(rows("", lambda row: replace(row, run=run))):
        for call in ((Neighborhood(3), 4, 5, "table"), (HilbertWindow(5, 2), 3, 4, "table")):
            assert_call_matches(device, call, batch=4)


ARCHITECTURES = ("cpu", "sm_80", "sm_90", "sm_100", "gfx942", "sm_999")
PRECISIONS, HEAD_DIMS = ("half", "float"), (16, 32, 64, 128)
FAMILIES = {
    **{f"window.{op}": ("cell16", "cell32", "cell64") for op in ("forward", "backward")},
    **{f"neighborhood.{op}": ("plane", "curve", "lookup") for op in ("forward", "query", "key", "bias")},
    **{f"routing.{op}": ("region16", "region32", "region64") for op in ("forward", "query", "key")},
}


@pytest.fixture
def _shipped_rows_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("NEARFIELD_TUNED", str(tmp_path / "none.json"))
    with override({}):
        yield


@pytest.mark.usefixtures("_shipped_rows_only")
@pytest.mark.parametrize("op", [op for op in FAMILIES if not op.startswith("window")])
def test_every_call_has_a_shipped_configuration(op: str) -> None:
    for arch, precision, head_dim, family in product(ARCHITECTURES, PRECISIONS, HEAD_DIMS, FAMILIES[op]):
        assert known(op, arch, precision, head_dim, family)
        choose(op, arch, precision, head_dim, family)


@pytest.mark.usefixtures("_shipped_rows_only")
def test_the_windows_of_published_models_are_held_whole() -> None:
    """Larger windows or heads may be cut into tiles, windows of 7 tokens and heads of 32 channels may not."""
    for arch, op in product(ARCHITECTURES, ("window.forward", "window.backward")):
        assert known(op, arch, "half", 32, "cell64")
        assert all(known(op, "cpu", *rest) for rest in product(PRECISIONS, HEAD_DIMS, FAMILIES[op]))


def test_every_shipped_row_belongs_to_a_kernel() -> None:
    for op, arch, precision, head_dim, family in (key.split() for key in read_table(SHIPPED)):
        assert arch in (*ARCHITECTURES, "*")
        assert family in FAMILIES[op]
        assert precision in PRECISIONS
        assert int(head_dim) in HEAD_DIMS


@pytest.mark.parametrize("missing", ["window.forward", "window.backward", "window"])
def test_windows_without_a_configuration_are_cut_into_tiles_in_both_passes(
    device: torch.device, missing: str, change: Change, launched: Launched
) -> None:
    """Window kernels leave no log-sum-exp behind for tiles to read."""
    from nearfield.ops.triton import site

    change(site, "known", lambda op, *_: not op.startswith(missing))
    for call in CELLS:
        assert_call_matches(device, call)
    assert not {name for name, _ in launched if name.startswith("window")}


# --- rows without a key -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Gaps(Pattern):
    """Every third row sees nothing and is seen by nobody, the two before it see each other. None is shipped."""

    def axis(self, n: int, which: int) -> Axis:
        if which == 1:
            return Slide(3).axis(n, which)
        place = np.arange(n)
        first = place // 3 * 3
        start, stop = first + 3 * (place % 3 == 2), first + np.where(place % 3 == 2, 3, 2)
        return Axis(np.minimum(start, n), np.minimum(stop, n), 1, place, 1, n, place, 1)


@SLOW_ON_GPU
@pytest.mark.parametrize("kind", ["none", "table", "decomposed"])
@pytest.mark.parametrize(
    "form", ["", *(pytest.param(f, marks=pytest.mark.slow) for f in ("looked up", "small blocks"))]
)
def test_rows_without_a_key_give_zero(device: torch.device, kind: str, form: str, change: Change) -> None:
    from nearfield.ops.triton import local, site

    if form == "looked up":
        change(site, "ATLAS_BYTES", 0)
    pair = make_case(Axes(Full(), Slide(3)), 2, 5, kind)  # two rows that see each other
    q, k, v, grad = torch.randn(4, 1, 8, 5, 2, 8, device=device).unbind(0)
    biases = [t.float().to(device) for t in pair.leaves[3:]]
    bias, rel_x = [*biases, None, None][:2]
    with override(rows("neighborhood", lambda row: replace(row, block_m=16) if form == "small blocks" else row)):
        out, lse = local.forward(q, k, v, bias, rel_x, Gaps(), 0.3, True)
        gradients = [torch.full_like(t, float("nan")) for t in (q, k, v)]
        of_bias = local.backward(grad, q, k, v, bias, rel_x, out, lse, *gradients, Gaps(), 0.3, bool(biases))
    for t in (out, *gradients):
        assert not t[:, 2::3].any()
    assert lse[:, 2::3].isneginf().all()

    total = [torch.zeros_like(t, dtype=torch.float64) for t in biases]
    for row in (0, 3, 6):
        part = slice(row, row + 2)
        leaves = [t[:, part].double() for t in (q, k, v)] + [t.double() for t in biases]
        want = replace(pair, leaves=leaves, grad=grad[:, part].double(), scale=0.3).run("reference")
        for have, right in zip((out, *gradients), want, strict=False):
            torch.testing.assert_close(have[:, part].double(), right, rtol=1e-5, atol=1e-5)
        for t, right in zip(total, want[4:], strict=True):
            t += right
    for have, right in zip(of_bias, total, strict=False):
        torch.testing.assert_close(have.double(), right, rtol=1e-5, atol=1e-5)
