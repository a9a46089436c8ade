"""Calls that launch every kernel of the shipped table: for each row its usual call, and those that ask most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from _compiled import Compiled, Launch, recorded
from nearfield.ops.bias import BiasKind, bias_kind
from nearfield.ops.patterns import (
    Axis,
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Window,
    resolve,
)
from nearfield.ops.routing import cut_regions
from nearfield.ops.triton import local, routed
from nearfield.ops.triton.configs import Config
from torch import Tensor

__all__ = [
    "BLOCKS",
    "FAMILIES",
    "HEADS",
    "PASSES",
    "ROUTED",
    "STATIC",
    "Case",
    "Row",
    "Work",
    "calls",
    "launches",
    "rows",
    "work",
]  # fmt: skip

BATCH, HEADS, SCALE = 16, 3, 0.125
BLOCKS = (16, 32, 64, 128)
PASSES = {
    "window": ("forward", "backward"),
    "neighborhood": ("forward", "query", "key", "bias"),
    "routing": ("forward", "query", "key"),
}
FAMILIES = {
    "window": ("cell16", "cell32", "cell64"),
    "neighborhood": ("plane", "curve", "lookup"),
    "routing": ("region16", "region32", "region64"),
}
# Pattern, map side and heads of a call, by family and where its bias comes from; a family's first is its usual call.
STATIC: dict[tuple[str, str], tuple[Pattern, int, int]] = {
    ("cell16", "table"): (Window(4), 56, HEADS),
    ("cell16", "none"): (Window(4, 2), 56, HEADS),
    ("cell16", "positions"): (HilbertWindow(16), 56, HEADS),
    ("cell32", "table"): (Window(5), 55, HEADS),
    ("cell32", "none"): (Window(5, 2), 56, HEADS),
    ("cell32", "positions"): (HilbertWindow(32), 56, HEADS),
    ("cell64", "table"): (Window(7), 56, HEADS),
    ("cell64", "none"): (Window(7, 3), 56, HEADS),
    ("cell64", "positions"): (HilbertWindow(64), 56, HEADS),
    ("plane", "table"): (Neighborhood(7), 56, HEADS),
    ("plane", "none"): (Neighborhood(7), 56, HEADS),
    ("plane", "uneven"): (Neighborhood((3, 9)), 56, HEADS),
    ("plane", "column"): (Neighborhood((9, 1)), 56, HEADS),
    ("plane", "zero keys"): (Halo(8, 3), 56, HEADS),
    ("curve", "table"): (HilbertNeighborhood(49), 56, HEADS),
    ("curve", "none"): (HilbertNeighborhood(49), 56, HEADS),
    ("lookup", "decomposed"): (Halo(8, 3), 56, HEADS),
    ("lookup", "positions"): (HilbertNeighborhood(49), 56, HEADS),
    ("lookup", "gathered"): (Neighborhood(31), 128, 8),  # kinds of tiles too many for terms of each
    ("lookup", "many"): (Neighborhood(41), 128, HEADS),  # and for a mask of each
}
# Map side, tokens of a region's side, regions that each lists, whether padding takes part.
ROUTED: dict[tuple[str, str], tuple[int, int, int, bool]] = {
    ("region16", "lists"): (28, 4, 4, False),
    ("region16", "zero keys"): (27, 4, 4, True),
    ("region32", "lists"): (35, 5, 4, False),
    ("region32", "zero keys"): (33, 5, 4, True),
    ("region64", "lists"): (56, 8, 4, False),
    ("region64", "zero keys"): (54, 8, 4, True),
    ("region64", "bits"): (14, 2, 16, False),
}
# head_dim and value head_dim that share a block beside its own size.
_ODD = {
    16: ((8, 8),),
    32: ((24, 24),),
    64: ((40, 40), (48, 48), (64, 32), (32, 64)),
    128: ((80, 80), (96, 96), (128, 64)),
}


@dataclass(frozen=True)
class Row:
    """What configurations are kept for, the architecture left out."""

    op: str
    precision: str
    block_d: int
    family: str

    @property
    def name(self) -> str:
        """The row's key in the table, the architecture left out."""
        return f"{self.op} {self.precision} {self.block_d} {self.family}"

    def key(self, arch: str) -> str:
        """The row's key in the table."""
        return f"{self.op} {arch} {self.precision} {self.block_d} {self.family}"

    @property
    def group(self) -> str:
        """ "window", "neighborhood" or "routing"."""
        return self.op.split(".")[0]


@dataclass(frozen=True)
class Case:
    """A forward and backward pass of one family of tiles.

    Attributes:
        terms: what the scores have besides q . k: a key of the tables above.
        tf32: whether float32 products may be rounded.
    """

    family: str
    terms: str
    dtype: torch.dtype
    d: int
    dv: int
    tf32: bool = False

    def __str__(self) -> str:
        name = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.family} {self.terms} {name} d={self.d}" + (f" dv={self.dv}" if self.dv != self.d else "")


def rows() -> list[Row]:
    """Every row of the table, for any architecture."""
    return [
        Row(f"{group}.{name}", precision, block_d, family)
        for precision in ("half", "float")
        for group, names in PASSES.items()
        for family in FAMILIES[group]
        for block_d in BLOCKS
        for name in names
    ]


def calls(row: Row) -> list[Case]:
    """Calls that may take this row, the usual one first: every kind of bias, odd head dimensions, rounded to TF32."""
    dtype = torch.bfloat16 if row.precision == "half" else torch.float32
    kinds = [terms for family, terms in (*STATIC, *ROUTED) if family == row.family]
    found = [Case(row.family, terms, dtype, row.block_d, row.block_d) for terms in kinds]
    found += [replace(found[0], d=d, dv=dv) for d, dv in _ODD[row.block_d]]
    rounded = [replace(case, tf32=True) for case in found[: len(kinds)]] if row.precision == "float" else []
    return [*found, *rounded]


def _has_table(case: Case) -> bool:
    return case.terms in ("table", "gathered", "uneven", "column", "zero keys", "positions")


@contextmanager
def _rounding(tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(case: Case, arch: str, chosen: Mapping[str, Config] | None = None) -> dict[str, list[Launch]]:
    """The launches of a case by operation, without those that move bias tables.

    chosen: configurations by operation, instead of the shipped ones.
    """
    with _rounding(case.tf32), recorded(arch, chosen) as found:
        if (case.family, case.terms) in ROUTED:
            _call_routed(case)
        else:
            _call_static(case)
    named: dict[str, list[Launch]] = {}
    for launch in found:
        named.setdefault(launch.name.removesuffix("_kernel").replace("block_sparse.", "routing."), []).append(launch)
    return {op: made for op, made in named.items() if not op.startswith("bias.")}


def _tensors(case: Case, side: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection where their sizes allow it, and the gradient of the output."""
    size = (BATCH, side, side)
    if case.d == case.dv:
        q, k, v = torch.empty(*size, 3, heads, case.d, dtype=case.dtype).unbind(3)
    else:
        q, k, v = (torch.empty(*size, heads, d, dtype=case.dtype) for d in (case.d, case.d, case.dv))
    return q, k, v, torch.empty(*size, heads, case.dv, dtype=case.dtype)


def _call_static(case: Case) -> None:
    pattern, side, heads = STATIC[case.family, case.terms]
    q, k, v, grad = _tensors(case, side, heads)
    y, x = resolve(pattern, side, side).y, resolve(pattern, side, side).x
    bias, rel_x = None, None
    if case.terms == "decomposed":
        bias, rel_x = (torch.empty(2 * axis.rel_reach + 1, case.d) for axis in (y, x))
    elif case.terms == "positions":
        bias = torch.empty(heads, 2 * side - 1, 2 * side - 1)
    elif _has_table(case):
        bias = torch.empty(heads, 2 * y.reach + 1, *(() if pattern.curve else (2 * x.reach + 1,)))
    assert (case.terms == "positions") == (
        bias_kind(bias, rel_x, resolve(pattern, side, side), heads, case.d) is BiasKind.POSITIONS
    )
    out, lse = local.forward(q, k, v, bias, rel_x, pattern, SCALE)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    local.backward(grad, q, k, v, bias, rel_x, out, lse, dq, dk, dv, pattern, SCALE, bias is not None)


def _call_routed(case: Case) -> None:
    side, size, topk, zero_pad = ROUTED[case.family, case.terms]
    q, k, v, grad = _tensors(case, side, HEADS)
    regions = cut_regions(side, side, None, size)
    routes = torch.zeros(BATCH, regions.count, topk, dtype=torch.int64)
    out, lse = routed.forward(q, k, v, routes, regions, zero_pad, SCALE)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    routed.backward(grad, q, k, v, routes, out, lse, dq, dk, dv, regions, zero_pad, SCALE)


@dataclass(frozen=True)
class Work:
    """How often the parts of a launch run, and what comes of it.

    Attributes:
        inner, outer: rounds of the loop that holds the products, and of the loop around it (0 where there is none).
        programs: of the launch.
        scores: computed in one round of the inner loop. useful: scores of the pattern, of the whole launch.
        moved: bytes read and written in all rounds, as often as they are, beyond what registers and shared memory keep.
    """

    inner: int
    outer: int
    programs: int
    scores: int
    useful: int
    moved: int

    def per_score(self, compiled: Compiled) -> float:
        """Instructions of a thread in one round of the inner loop, for each score computed there."""
        assert compiled.code is not None
        return compiled.code.nest[0] * 32 * compiled.warps / self.scores

    def per_useful_score(self, compiled: Compiled) -> float:
        """Instructions of all threads for each score of the pattern: tiles' waste and everything else counts."""
        assert compiled.code is not None
        inner, outer, total = compiled.code.nest
        rounds = self.inner * inner + self.outer * (outer - inner) + self.programs * (total - max(inner, outer))
        return rounds * 32 * compiled.warps / self.useful


def work(case: Case, made: Sequence[Launch]) -> Work:
    """Rounds of the loops of one kernel's launches in this case."""
    a = made[0].arguments
    useful, programs = _useful(case), sum(launch.grid[0] for launch in made)
    block_m, block_n = a["BLOCK_M"], a.get("BLOCK_N", a["BLOCK_M"])
    pair = (case.d + case.dv) * case.dtype.itemsize  # two vectors of one token
    passes = {"forward": 1, "backward": 3.5}.get(made[0].name.split(".")[1].removesuffix("_kernel"), 2)
    resident, streamed = int(passes * block_m * pair), block_n * pair
    terms = a["bias"].element_size() * block_m * block_n if a.get("BIAS") in ("atlas", "mask") else 0
    if made[0].name.startswith("block_sparse"):
        tokens = a["HEIGHT"] * a["WIDTH"] if a["DENSE"] else a["TOPK"] * a["SIZE_Y"] * a["SIZE_X"]
        rounds = programs * -(-tokens // block_n)
        return Work(rounds, 0, programs, block_m * block_n, useful, rounds * streamed + programs * resident)
    if "runs" in a:
        items = sum(int(launch.arguments["runs"][:, 4].sum()) for launch in made) * a["HEADS"]
        if "SLOTS" not in a:
            return Work(items, 0, programs, block_m * block_n, useful, items * (resident + streamed))
        items *= a["SLOTS"] // block_n
        return Work(items, 0, programs, block_m * block_n, useful, items * (block_m * pair + streamed + terms))
    counts, images = a["tiles"][:, 3], BATCH * a["HEADS"]
    rounds, tiles = int((-(-counts // block_n)).sum()) * images, len(counts) * images
    moved = rounds * (streamed + terms) + tiles * resident
    return Work(rounds, tiles, programs, block_m * block_n, useful, moved)


def _useful(case: Case) -> int:
    if (case.family, case.terms) in ROUTED:
        side, size, topk, _ = ROUTED[case.family, case.terms]
        return BATCH * HEADS * side * side * topk * size * size
    pattern, side, heads = STATIC[case.family, case.terms]
    resolved = resolve(pattern, side, side)

    def pairs(axis: Axis) -> int:
        return int((-(-(axis.stop - axis.start) // axis.step)).sum())

    return BATCH * heads * pairs(resolved.y) * pairs(resolved.x)
