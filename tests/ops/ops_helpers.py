"""What the operator tests share: patterns written out from their definition, attention by loops, and error budgets.

Nothing here uses the package's own intervals, tiles or masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from nearfield.ops import (
    BACKENDS,
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
    hilbert_order,
    local_attention,
)
from torch import Tensor

# --- patterns by their definition -------------------------------------------------------------------------------------


def window_keys(n: int, i: int, size: int, shift: int) -> list[int]:
    return [j for j in range(n) if (j - shift) // size == (i - shift) // size]


def grid_keys(n: int, i: int, size: int) -> list[int]:
    """MaxViT's way: pad to size * step tokens, view as (size, step), attend within a column, drop the padding."""
    step = (n + size - 1) // size
    table = np.arange(size * step).reshape(size, step)
    column = table[:, np.argwhere(table == i)[0, 1]]
    return [int(j) for j in column if j < n]


def neighborhood_keys(n: int, i: int, kernel_size: int, dilation: int, stride: int = 1) -> list[int]:
    """Members of the residue class, the run pushed inward one step at a time until it fits."""
    members = [j for j in range(n) if j % dilation == i % dilation]
    place = members.index(i)
    leader = place
    if stride > 1:
        leader = min(place - place % stride + stride // 2, len(members) - 1)
    first = leader - kernel_size // 2
    while first < 0:
        first += 1
    while first + kernel_size > len(members):
        first -= 1
    return members[first : first + kernel_size]


def halo_keys(n: int, i: int, block: int, halo: int, pad: str, stride: int) -> list[int]:
    number = (i * stride) // block
    wide = range(number * block - halo, (number + 1) * block + halo)
    return [j for j in wide if pad == "zero" or 0 <= j < n]


def slide_keys(n: int, i: int, width: int) -> list[int]:
    return [j for j in range(n) if abs(i - j) <= width // 2]


def axis_keys(pattern: Pattern, which: int, n: int) -> list[list[int]]:
    """Keys of every query of one axis of n keys; padding zeros have coordinates outside [0, n)."""
    match pattern:
        case Axes(y, x):
            return axis_keys((y, x)[which], which, n)
        case Window(size, shift):
            return [window_keys(n, i, size[which], shift[which]) for i in range(n)]
        case Grid(size):
            return [grid_keys(n, i, size[which]) for i in range(n)]
        case Neighborhood(k, d, s):
            return [neighborhood_keys(n, i, k[which], d[which], s[which]) for i in range(n)]
        case Halo(block, halo, pad, stride):
            queries = (n + stride[which] - 1) // stride[which]
            return [halo_keys(n, i, block[which], halo[which], pad, stride[which]) for i in range(queries)]
        case Slide(width):
            return [slide_keys(n, i, width[which]) for i in range(n)]
        case Full():
            return [list(range(n)) for _ in range(n)]
        case HilbertWindow(length, shift):
            return [window_keys(n, i, length, shift) for i in range(n)]
        case HilbertNeighborhood(length):
            return [neighborhood_keys(n, i, length, 1) for i in range(n)]
        case HilbertSlide(width):
            return [slide_keys(n, i, width) for i in range(n)]
    raise AssertionError(pattern)


def reach(pattern: Pattern, which: int, n: int) -> int:
    """The largest |key - query| in steps that a table has entries for (DESIGN's list)."""
    match pattern:
        case Axes(y, x):
            return reach((y, x)[which], which, n)
        case Window(size, _) | Grid(size):
            return size[which] - 1
        case Neighborhood(k, _, _):
            return k[which] - 1
        case Halo(block, halo, _, _):
            return block[which] + halo[which] - 1
        case Slide(width):
            return width[which] // 2
        case Full():
            return n - 1
        case HilbertWindow(length, _) | HilbertNeighborhood(length):
            return length - 1
        case HilbertSlide(width):
            return width // 2
    raise AssertionError(pattern)


def step(pattern: Pattern, which: int, n: int) -> int:
    match pattern:
        case Axes(y, x):
            return step((y, x)[which], which, n)
        case Neighborhood(_, d, _):
            return d[which]
        case Grid(size):
            return (n + size[which] - 1) // size[which]
    return 1


def query_stride(pattern: Pattern) -> tuple[int, int]:
    match pattern:
        case Axes(y, x):
            return query_stride(y)[0], query_stride(x)[1]
        case Halo(_, _, _, stride):
            return stride
    return 1, 1


def fits(pattern: Pattern, height: int, width: int) -> bool:
    match pattern:
        case Axes(y, x):
            return fits(y, height, 1 << 20) and fits(x, 1 << 20, width)
        case Neighborhood(k, d, _):
            return height >= k[0] * d[0] and width >= k[1] * d[1]
        case HilbertNeighborhood(length):
            return height * width >= length
    return True


def random_pattern(rng: random.Random, *, joined: bool = True) -> Pattern:
    def pair(low: int, high: int) -> int | tuple[int, int]:
        one = rng.randint(low, high)
        return one if rng.random() < 0.4 else (one, rng.randint(low, high))

    def stride_of(size: int | tuple[int, int]) -> tuple[int, int]:
        y, x = (size, size) if isinstance(size, int) else size
        return rng.randint(1, y), rng.randint(1, x)

    kind = rng.randrange(11 if joined else 7)
    if kind == 0:
        return Window(pair(1, 8), pair(-9, 9))
    if kind == 1:
        return Grid(pair(1, 8))
    if kind == 2:
        return Neighborhood(pair(1, 6), pair(1, 3))
    if kind == 3:
        k = pair(1, 6)
        return Neighborhood(k, pair(1, 2), stride_of(k))
    if kind == 4:
        sy, sx = rng.choice((1, 2, 3)), rng.choice((1, 1, 2))
        block = (sy * rng.randint(1, 3), sx * rng.randint(1, 3))
        return Halo(block, pair(0, 4), rng.choice(("zero", "clip")), (sy, sx))
    if kind == 5:
        return Slide(pair(1, 9))
    if kind == 6:
        return Full()
    if kind == 7:
        return Axes(random_pattern(rng, joined=False), random_pattern(rng, joined=False))
    if kind == 8:
        return HilbertWindow(rng.randint(1, 20), rng.randint(-25, 25))
    if kind == 9:
        return HilbertNeighborhood(rng.randint(1, 12))
    return HilbertSlide(rng.randint(1, 15))


def random_cases(count: int, seed: int, largest: int = 17) -> list[tuple[Pattern, int, int]]:
    """Patterns on maps they are defined on; every fifth map is one token high."""
    rng, cases = random.Random(seed), []
    while len(cases) < count:
        height = 1 if rng.random() < 0.2 else rng.randint(1, largest)
        case = (random_pattern(rng), height, rng.randint(1, largest))
        if fits(*case):
            cases.append(case)
    return cases


# --- attention by loops -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def curve(height: int, width: int) -> list[tuple[int, int]]:
    """(y, x) of each place of the Hilbert curve; its properties have tests of their own."""
    return [divmod(t, width) for t in hilbert_order(height, width).tolist()]


def score_terms(pattern: Pattern, height: int, width: int) -> dict[tuple[int, int], list[tuple[Any, ...]]]:
    """For every query (y, x): its keys as (y, x, dy, dx, ay, ax); (y, x) is None for a padding zero.

    dy, dx: displacement in steps. ay, ax: row of a decomposed table.
    """
    terms: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
    if pattern.curve is not None:
        places = curve(height, width)
        for p, keys in enumerate(axis_keys(pattern, 0, height * width)):
            terms[places[p]] = [(*places[j], j - p, 0, 0, 0) for j in keys]
        return terms
    ys, xs = axis_keys(pattern, 0, height), axis_keys(pattern, 1, width)
    ry, rx = decomposed_rows(pattern, 0, height), decomposed_rows(pattern, 1, width)
    sy, sx = step(pattern, 0, height), step(pattern, 1, width)
    ty, tx = query_stride(pattern)
    for (a, rows), (b, columns) in product(enumerate(ys), enumerate(xs)):
        terms[a, b] = [
            (*((y, x) if 0 <= y < height and 0 <= x < width else (None, None)),
             (y - a * ty) // sy, (x - b * tx) // sx, ry[a][m], rx[b][n])
            for (m, y), (n, x) in product(enumerate(rows), enumerate(columns))
        ]  # fmt: skip
    return terms


def most_keys(pattern: Pattern, height: int, width: int) -> int:
    """Keys of the query that has most."""
    if pattern.curve is not None:
        return max(map(len, axis_keys(pattern, 0, height * width)))
    return max(map(len, axis_keys(pattern, 0, height))) * max(map(len, axis_keys(pattern, 1, width)))


def decomposed_rows(pattern: Pattern, which: int, n: int) -> list[list[int]]:
    """Row of the decomposed table for every key of every query.

    Halo: b - a + win - 1 with a the query's place in its (block / stride) block and b the key's place in the widened
    block. Others: displacement + reach.
    """
    if isinstance(pattern, Axes):
        return decomposed_rows((pattern.y, pattern.x)[which], which, n)
    keys = axis_keys(pattern, which, n)
    if not isinstance(pattern, Halo):
        d, r = step(pattern, which, n), reach(pattern, which, n)
        return [[(j - i) // d + r for j in row] for i, row in enumerate(keys)]
    block, halo, stride = pattern.block[which], pattern.halo[which], pattern.stride[which]
    win = block + 2 * halo
    rows = []
    for i, row in enumerate(keys):
        corner = (i * stride) // block * block - halo
        rows.append([(j - corner) - i % (block // stride) + win - 1 for j in row])
    return rows


def attention_by_loops(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Any = None, kind: str = "none", scale: float | None = None
) -> Tensor:
    """The operator in float64, one query at a time."""
    q, k, v = (t.double() for t in (q, k, v))
    B, _, _, heads, d = q.shape
    height, width = k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(*q.shape[:4], v.shape[4], dtype=torch.float64)
    ry, rx = (0, 0) if pattern.curve else (reach(pattern, 0, height), reach(pattern, 1, width))
    for (a, b), keys in score_terms(pattern, height, width).items():
        for n, h in product(range(B), range(heads)):
            query, scores, values = q[n, a, b, h], [], []
            for y, x, dy, dx, ay, ax in keys:
                zero = y is None
                s = torch.zeros((), dtype=torch.float64) if zero else scale * (query @ k[n, y, x, h])
                if kind == "table" and pattern.curve:
                    s = s + bias[h, dy + reach(pattern, 0, 0)]
                elif kind == "table":
                    s = s + bias[h, dy + ry, dx + rx]
                elif kind == "positions":
                    s = s + bias[h, y - a + height - 1, x - b + width - 1]
                elif kind == "decomposed":
                    s = s + query @ bias[0][ay].double() + query @ bias[1][ax].double()
                scores.append(s)
                values.append(torch.zeros(v.shape[4], dtype=torch.float64) if zero else v[n, y, x, h])
            out[n, a, b, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


# --- inputs and gradients ---------------------------------------------------------------------------------------------


def bias_shapes(pattern: Pattern, height: int, width: int, heads: int, head_dim: int, kind: str) -> list[tuple]:
    """Shapes of the bias tensors of one kind: none, table, positions, decomposed."""
    if kind == "none":
        return []
    if kind == "positions":
        return [(heads, 2 * height - 1, 2 * width - 1)]
    if kind == "table" and pattern.curve:
        return [(heads, 2 * reach(pattern, 0, height * width) + 1)]
    if kind == "table":
        return [(heads, 2 * reach(pattern, 0, height) + 1, 2 * reach(pattern, 1, width) + 1)]
    rows = []
    for which, n in enumerate((height, width)):
        part = (pattern.y, pattern.x)[which] if isinstance(pattern, Axes) else pattern
        if isinstance(part, Halo):
            rows.append((2 * (part.block[which] + 2 * part.halo[which]) - 1, head_dim))
        else:
            rows.append((2 * reach(pattern, which, n) + 1, head_dim))
    return rows


def kinds_of(pattern: Pattern) -> list[str]:
    return ["none", "table", "positions" if pattern.curve else "decomposed"]


# --- what the tests walk through --------------------------------------------------------------------------------------

# Backends that run on CPU tensors; the kernels of "triton" have tests of their own, in tests/kernels.
CPU_BACKENDS = tuple(name for name in BACKENDS if name != "triton")

# (pattern, height, width): every pattern, sizes that divide and sizes that do not
CASES: list[tuple[Pattern, int, int]] = [
    (Window(4), 8, 12),
    (Window(7), 13, 9),
    (Window((3, 5), shift=(1, -2)), 11, 8),
    (Window(9, shift=4), 5, 6),
    (Grid(4), 8, 12),
    (Grid((3, 5)), 10, 7),
    (Grid(9), 4, 5),
    (Neighborhood(7), 7, 7),
    (Neighborhood(7), 9, 20),
    (Neighborhood((3, 5), dilation=(2, 1)), 9, 11),
    (Neighborhood(3, dilation=3), 10, 14),
    (Neighborhood(4), 10, 9),
    (Neighborhood((6, 2), dilation=(1, 3)), 8, 13),
    (Neighborhood(5, stride=2), 11, 10),
    (Neighborhood(6, dilation=2, stride=(6, 3)), 13, 15),
    (Neighborhood(1), 3, 4),
    (Halo(4, 1), 8, 12),
    (Halo(4, 3), 7, 9),
    (Halo(2, 5), 5, 3),
    (Halo((4, 2), (1, 2), "clip"), 9, 7),
    (Halo(4, 2, "zero", 2), 8, 12),
    (Halo((6, 4), (1, 3), "clip", (3, 2)), 13, 10),
    (Slide(5), 9, 12),
    (Slide((4, 30)), 10, 6),
    (Full(), 6, 7),
    (Axes(Full(), Window(3, 1)), 7, 10),
    (Axes(Neighborhood(3, 2), Slide(5)), 8, 9),
    (Axes(Halo(2, 1), Grid(3)), 5, 8),
    (HilbertWindow(16), 8, 8),
    (HilbertWindow(7, shift=4), 9, 6),
    (HilbertNeighborhood(9), 7, 8),
    (HilbertNeighborhood(4), 5, 5),
    (HilbertSlide(11), 6, 9),
    (HilbertSlide(2), 3, 3),
]
EVERY_KIND = [(*case, kind) for case in CASES for kind in kinds_of(case[0])]
FEW = [
    (Window((3, 5), shift=(1, -2)), 11, 8, "table"),
    (Neighborhood((3, 5), dilation=(2, 1)), 9, 11, "table"),
    (Neighborhood(6, dilation=1, stride=(6, 3)), 13, 9, "none"),
    (Halo(4, 2, "clip"), 9, 7, "decomposed"),
    (Halo(4, 3, "zero"), 7, 9, "table"),
    (Slide(5), 9, 12, "none"),
    (Grid((3, 5)), 10, 7, "table"),
    (HilbertWindow(7, shift=4), 9, 6, "positions"),
    (HilbertNeighborhood(9), 7, 8, "table"),
]


def ident(value: Any) -> str | None:
    return repr(value).replace(" ", "") if isinstance(value, Pattern) else None


@dataclass
class Case:
    """Inputs of one call; `leaves` are what gradients are taken of, `view` makes q, k, v of the first ones."""

    pattern: Pattern
    leaves: list[Tensor]
    grad: Tensor
    biases: int
    view: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None, Tensor | None]] = field(
        default=lambda leaves: (leaves[0], leaves[1], leaves[2])
    )
    scale: float | None = None

    def to(self, kind: torch.dtype | torch.device) -> Case:
        """The same call in another dtype or on another device."""
        return replace(self, leaves=[t.to(kind) for t in self.leaves], grad=self.grad.to(kind))

    @property
    def terms(self) -> int:
        """Terms of the longest sums: of a score, and of a row of weights."""
        key = self.leaves[min(1, len(self.leaves) - self.biases - 1)]
        return key.shape[-1] + most_keys(self.pattern, *key.shape[1:3])

    @property
    def names(self) -> list[str]:
        inputs = ["qkv"] if len(self.leaves) - self.biases == 1 else ["q", "k", "v"]
        return ["out", *inputs, *("bias", "rel_x")[: self.biases]]

    def run(self, backend: str) -> list[Tensor]:
        """Output and the gradient of every leaf."""
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves]
        split = len(leaves) - self.biases
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[self.biases]
        q, k, v = self.view(leaves[:split])
        out = local_attention(q, k, v, self.pattern, bias=bias, scale=self.scale, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))]


def make_case(
    pattern: Pattern,
    height: int,
    width: int,
    kind: str = "none",
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
    value_dim: int | None = None,
    packed: bool = False,
    dtype: torch.dtype = torch.float64,
    bias_dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Case:
    sy, sx = query_stride(pattern)
    size = (-(-height // sy), -(-width // sx))
    dv = value_dim or head_dim
    size_of_bias = head_dim**-0.5 if kind == "decomposed" else 1.0  # scores of order one, whatever the kind
    biases = [
        (torch.randn(*shape, dtype=torch.float64) * size_of_bias).to(bias_dtype or dtype)
        for shape in bias_shapes(pattern, height, width, heads, head_dim, kind)
    ]
    grad = torch.randn(batch, *size, heads, dv, dtype=torch.float64).to(dtype)
    if packed:
        qkv = torch.randn(batch, height, width, 3, heads, head_dim, dtype=torch.float64).to(dtype)
        return Case(pattern, [qkv, *biases], grad, len(biases), lambda t: (t[0], None, None), scale)
    q = torch.randn(batch, *size, heads, head_dim, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, height, width, heads, head_dim, dtype=torch.float64).to(dtype)
    v = torch.randn(batch, height, width, heads, dv, dtype=torch.float64).to(dtype)
    return Case(pattern, [q, k, v, *biases], grad, len(biases), scale=scale)


# --- layouts of the inputs --------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    # name: (shape of the leaf for (B, H, W, h, d), view of it in that shape)
    "heads first": (lambda B, H, W, h, d: (B, h, H, W, d), lambda t: t.permute(0, 2, 3, 1, 4)),
    "channels first": (lambda B, H, W, h, d: (B, h, d, H, W), lambda t: t.permute(0, 3, 4, 1, 2)),
    "transposed map": (lambda B, H, W, h, d: (B, W, H, h, d), lambda t: t.transpose(1, 2)),
    "every second token": (lambda B, H, W, h, d: (B, 2 * H, 2 * W, h, d), lambda t: t[:, 1::2, ::2]),
    "part of a larger map": (lambda B, H, W, h, d: (B, H + 3, W + 2, h, d), lambda t: t[:, 2:-1, 1:-1]),
    "every second channel": (lambda B, H, W, h, d: (B, H, W, h, 2 * d), lambda t: t[..., ::2]),
    "some heads": (lambda B, H, W, h, d: (B, H, W, h + 3, d), lambda t: t[:, :, :, 2:-1]),
    "reversed storage": (lambda B, H, W, h, d: (d, h, W, H, B), lambda t: t.permute(4, 3, 2, 1, 0)),
}
PACKED_VIEWS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[[Tensor], Tensor]]] = {
    "three first": (lambda B, H, W, h, d: (3, B, h, H, W, d), lambda t: t.permute(1, 3, 4, 0, 2, 5)),
    "three last": (lambda B, H, W, h, d: (B, H, W, h, d, 3), lambda t: t.permute(0, 1, 2, 5, 3, 4)),
    "head before three": (lambda B, H, W, h, d: (B, H, W, h, 3, d), lambda t: t.transpose(3, 4)),
    "three reversed": (lambda B, H, W, h, d: (B, H, W, 3, h, d), lambda t: t.flip(3)),
    "part of a wider projection": (lambda B, H, W, h, d: (B, H, W, 5, h, d), lambda t: t[:, :, :, 1:4]),
    "one row repeated": (lambda B, H, W, h, d: (B, 1, W, 3, h, d), lambda t: t.expand(-1, 11, -1, -1, -1, -1)),
}


# --- arguments of the registered operators ----------------------------------------------------------------------------

OPS = torch.ops.nearfield
OP_KINDS = [
    (Neighborhood(3), "none"),
    (Window(3, 1), "table"),
    (Halo(2, 1), "decomposed"),
    (HilbertWindow(5, 2), "positions"),
    (HilbertNeighborhood(5), "table"),
    (Full(), "table"),
]


def forward_arguments(
    pattern: Pattern, kind: str, packed: bool, *, training: bool = True, p: float = 0.0, backend: str = "torch"
) -> tuple:
    # torch.testing's check perturbs what requires a gradient: float32, as in use
    case = make_case(pattern, 5, 6, kind, batch=2, packed=packed, dtype=torch.float32, value_dim=None if packed else 4)
    leaves = [t.requires_grad_(training) for t in case.leaves]
    split = len(leaves) - case.biases
    inputs = (leaves[0], None, None) if packed else tuple(leaves[:3])
    biases = [*leaves[split:], None, None][:2]
    seed = torch.tensor(7) if p else None
    return (*inputs, *biases, seed, repr(pattern), 0.5, p, training, backend)


def backward_arguments(
    pattern: Pattern, kind: str, packed: bool, bias_needs_grad: bool, *, backend: str = "torch"
) -> tuple:
    *tensors, spelling, scale, p, _, _ = detached(forward_arguments(pattern, kind, packed, backend=backend))
    out, lse = OPS.local_attention(*tensors, spelling, scale, p, True, backend)
    return (torch.randn_like(out), *tensors, out, lse, spelling, scale, p, bias_needs_grad, backend)


def routing_arguments(packed: bool, zero_pad: bool, *, p: float = 0.0, backend: str = "torch") -> tuple:
    if packed:
        inputs: tuple = (torch.randn(2, 5, 6, 3, 2, 4, requires_grad=True), None, None)
    else:
        inputs = tuple(torch.randn(2, 5, 6, 2, d, requires_grad=True) for d in (4, 4, 3))
    routes = torch.rand(2, 6, 6).argsort(-1)[..., :2]
    return (*inputs, routes, torch.tensor(3) if p else None, [2, 3], zero_pad, 0.5, p, backend)


def routing_backward_arguments(packed: bool, zero_pad: bool, *, backend: str = "torch") -> tuple:
    arguments = detached(routing_arguments(packed, zero_pad, backend=backend))
    out, lse = OPS.routing_attention(*arguments)
    return (torch.randn_like(out), *arguments[:5], out, lse, *arguments[5:])


def detached(arguments: Sequence[Any]) -> tuple:
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)


# --- how far from the truth -------------------------------------------------------------------------------------------


def assert_exact(case: Case, backend: str = "torch") -> None:
    """A backend in float64 equals the reference to the last digits, in output and every gradient."""
    for name, got, want in zip(case.names, case.run(backend), case.run("reference"), strict=True):
        assert got.dtype == want.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def uncancelled(case: Any) -> tuple[list[Tensor], list[Tensor], float]:
    """The float64 result, what is summed up to it, and the largest score.

    Score gradients are differences p * (dP - delta) that may cancel to nothing (a single key); rounding acts on the
    terms. Without the gradient of the softmax's normaliser there is no delta to cancel them.
    """
    largest = 0.0

    def softmax_without_normaliser(scores: Tensor, dim: int) -> Tensor:
        nonlocal largest
        largest = scores.detach().masked_fill(scores.isinf(), 0).abs().max().item()
        return (scores - scores.logsumexp(dim, keepdim=True).detach()).exp()

    ruler = case.to(torch.float64)
    whole = ruler.run("reference")
    with mock.patch.object(torch.Tensor, "softmax", softmax_without_normaliser):
        terms = ruler.run("reference")
    return whole, terms, largest


def assert_within_rounding(case: Case, backend: str = "torch") -> None:
    """Error of a backend <= error of the eager reference in the same dtype + what rounding a sum may cost.

    The ruler is the float64 reference on the same (rounded) inputs. The budget, relative to the size of what is summed,
    is sqrt(terms) * unit roundoff (the terms of a score and of a softmax row are the head_dim and the keys), and what
    exp makes of a score rounded in float32.
    """
    q = case.leaves[0]
    ruler, terms, largest_score = uncancelled(case)
    sizes = [max(a.abs().max().item(), b.abs().max().item()) for a, b in zip(ruler, terms, strict=True)]
    budget = case.terms**0.5 * torch.finfo(q.dtype).eps / 2
    budget += (1 + largest_score) * torch.finfo(torch.float32).eps  # of the score and of its row's log-sum-exp
    eager, got = case.run("reference"), case.run(backend)
    for name, want, easy, have, leaf, size in zip(case.names, ruler, eager, got, [q, *case.leaves], sizes, strict=True):
        assert have.dtype == leaf.dtype, name
        assert torch.isfinite(have).all(), name
        allowed = (easy.double() - want).abs().max().item() + budget * size
        error = (have.double() - want).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"
