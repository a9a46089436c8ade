"""Intervals of every pattern against masks written out from their definition, and patterns as values."""

from __future__ import annotations

import ast
import copy
import pickle
import random
from dataclasses import FrozenInstanceError
from itertools import product

import nearfield.ops.patterns as module
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
    halo_attention,
    local_attention,
    parse_pattern,
    resolve,
)
from nearfield.ops.patterns import Axis
from ops_helpers import (
    CPU_BACKENDS,
    axis_keys,
    fits,
    neighborhood_keys,
    query_stride,
    random_cases,
    random_pattern,
    reach,
    step,
)

EXAMPLES: list[Pattern] = [
    Window(7),
    Window((4, 6), shift=(2, -3)),
    Grid((3, 5)),
    Neighborhood(7, dilation=2),
    Neighborhood((4, 5), (1, 3), (2, 5)),
    Halo(8, 3),
    Halo((4, 6), (0, 2), "clip", (2, 3)),
    Slide((3, 8)),
    Full(),
    Axes(Full(), Window(7)),
    HilbertWindow(49, 24),
    HilbertNeighborhood(49),
    HilbertSlide(49),
]


def seen(axis: Axis) -> list[list[int]]:
    """Keys of every query, read off the intervals as their docstring says."""
    far = range(int(axis.start.min()) - 3, int(axis.stop.max()) + 3)
    return [
        [j for j in far if a <= j < b and (j - a) % axis.step == 0]
        for a, b in zip(axis.start.tolist(), axis.stop.tolist(), strict=True)
    ]


def check_intervals(pattern: Pattern, height: int, width: int) -> None:
    resolved = resolve(pattern, height, width)
    axes = [(resolved.y, 0, height * width)] if pattern.curve else [(resolved.y, 0, height), (resolved.x, 1, width)]
    for axis, which, n in axes:
        want = axis_keys(pattern, which, n)
        assert seen(axis) == want
        assert axis.queries == len(want)
        assert axis.keys == n
        # displacement 0 is the query's own place, and no key is further away than the reach
        spread = query_stride(pattern)[which]
        assert axis.step == step(pattern, which, n)
        assert axis.reach == reach(pattern, which, n)
        assert axis.origin.tolist() == [i * spread for i in range(axis.queries)]
        assert max(abs(j - o) for o, row in zip(axis.origin, want, strict=True) for j in row) <= axis.reach * axis.step
        rows = [(j - o) // axis.step for o, row in zip(axis.rel_origin, want, strict=True) for j in row]
        assert max(map(abs, rows)) <= axis.rel_reach
    if pattern.curve:
        assert resolved.x.queries == resolved.x.keys == 1


def test_intervals_equal_the_definition_on_hundreds_of_random_maps() -> None:
    cases = random_cases(600, seed=1)
    assert {type(pattern) for pattern, _, _ in cases} == {type(p) for p in EXAMPLES}
    for case in cases:
        check_intervals(*case)


sizes = st.integers(1, 16)
pairs = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
shifts = st.one_of(st.integers(-20, 20), st.tuples(st.integers(-20, 20), st.integers(-20, 20)))


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    kernel = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    return Neighborhood(kernel, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), stride)


@st.composite
def halos(draw: st.DrawFn) -> Halo:
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    block = tuple(s * draw(st.integers(1, 3)) for s in stride)
    halo = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return Halo(block, halo, draw(st.sampled_from(("zero", "clip"))), stride)


flat = st.one_of(
    st.builds(Window, pairs, shifts), st.builds(Grid, pairs), neighborhoods(), halos(), st.builds(Slide, pairs),
    st.just(Full()),
)  # fmt: skip
patterns = st.one_of(
    flat,
    st.builds(Axes, flat, flat),
    st.builds(HilbertWindow, st.integers(1, 30), st.integers(-40, 40)),
    st.builds(HilbertNeighborhood, st.integers(1, 12)),
    st.builds(HilbertSlide, st.integers(1, 12)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(patterns, sizes, sizes)
def test_intervals_equal_the_definition_on_drawn_maps(pattern: Pattern, height: int, width: int) -> None:
    if fits(pattern, height, width):
        check_intervals(pattern, height, width)
    else:
        with pytest.raises(ValueError, match=f"feature map {height}x{width} "):
            resolve(pattern, height, width)


def test_neighborhood_equals_the_naive_clamp_for_every_small_size() -> None:
    for n, k, d in product(range(1, 40), range(1, 9), range(1, 5)):
        if n >= k * d:
            axis = Neighborhood(k, d).axis(n, 0)
            assert seen(axis) == [neighborhood_keys(n, i, k, d) for i in range(n)], (n, k, d)


def test_generalized_neighborhood_equals_the_naive_leader_for_every_small_size() -> None:
    for n, k, d in product(range(1, 24), range(1, 7), (1, 3)):
        for s in range(1, k + 1) if n >= k * d else ():
            axis = Neighborhood(k, d, s).axis(n, 1)
            assert seen(axis) == [neighborhood_keys(n, i, k, d, s) for i in range(n)], (n, k, d, s)


def test_every_neighborhood_has_exactly_kernel_size_keys_of_its_residue_class() -> None:
    rng = random.Random(3)
    for _ in range(200):
        k, d = rng.randint(1, 9), rng.randint(1, 5)
        n = k * d + rng.randint(0, 20)
        for i, row in enumerate(seen(Neighborhood(k, d, rng.randint(1, k)).axis(n, 0))):
            assert len(row) == k
            assert i in row
            assert all(0 <= j < n and j % d == i % d for j in row)


def test_even_kernels_look_one_key_further_left() -> None:
    assert seen(Neighborhood(4).axis(9, 0))[4] == [2, 3, 4, 5]


# --- against the published procedures ---------------------------------------------------------------------------------


def dense_mask(pattern: Pattern, height: int, width: int) -> np.ndarray:
    """(queries, keys) bool over raster tokens."""
    resolved = resolve(pattern, height, width)
    y, x = (np.zeros((a.queries, a.keys), bool) for a in (resolved.y, resolved.x))
    for axis, mask in ((resolved.y, y), (resolved.x, x)):
        for i, row in enumerate(seen(axis)):
            mask[i, row] = True
    return np.kron(y, x)


def swin_mask(height: int, width: int, ws: int, s: int) -> np.ndarray:
    """Allowed pairs of Swin's shifted windows: roll by -s, cut, compare the nine region labels; s may be 0."""
    image = torch.zeros(height, width)
    label = 0
    for rows in (slice(0, -ws), slice(-ws, -s), slice(-s, None)):
        for columns in (slice(0, -ws), slice(-ws, -s), slice(-s, None)):
            image[rows, columns] = label
            label += 1

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t.view(height // ws, ws, width // ws, ws).transpose(1, 2).reshape(-1, ws * ws)

    tokens = cut(torch.roll(torch.arange(height * width).view(height, width), (-s, -s), (0, 1)))
    labels = cut(image) if s else torch.zeros(tokens.shape)
    mask = np.zeros((height * width, height * width), bool)
    for window, regions in zip(tokens.tolist(), labels.tolist(), strict=True):
        for (a, ra), (b, rb) in product(zip(window, regions, strict=True), repeat=2):
            mask[a, b] = ra == rb
    return mask


@pytest.mark.parametrize(("height", "width", "ws"), [(14, 14, 7), (8, 12, 4), (9, 3, 3), (6, 6, 2), (10, 15, 5)])
def test_shifted_windows_allow_the_pairs_of_swins_roll_and_mask(height: int, width: int, ws: int) -> None:
    for s in range(ws):
        np.testing.assert_array_equal(dense_mask(Window(ws, shift=s), height, width), swin_mask(height, width, ws, s))


@pytest.mark.parametrize(("tokens", "length", "s"), [(64, 16, 8), (196, 49, 24), (64, 9, 4), (30, 7, 1), (12, 12, 6)])
def test_curve_windows_are_hwts_shifted_groups(tokens: int, length: int, s: int) -> None:
    group = [(p + s) // length for p in range(tokens)]
    rows = seen(HilbertWindow(length, shift=length - s).axis(tokens, 0))
    assert rows == [[j for j in range(tokens) if group[j] == group[p]] for p in range(tokens)]


@pytest.mark.parametrize(("tokens", "length", "s"), [(64, 16, 8), (196, 49, 24)])
def test_curve_windows_are_hwts_roll_and_first_window_mask(tokens: int, length: int, s: int) -> None:
    rolled = np.roll(np.arange(tokens), s).reshape(-1, length)
    want: dict[int, list[int]] = {}
    for number, window in enumerate(rolled.tolist()):
        for part in (window[:s], window[s:]) if number == 0 else (window,):
            want |= {p: sorted(part) for p in part}
    rows = seen(HilbertWindow(length, shift=length - s).axis(tokens, 0))
    assert rows == [want[p] for p in range(tokens)]


def test_grid_is_maxvits_partition_where_the_size_divides() -> None:
    height, width, g = 8, 12, 4
    tokens = torch.arange(height * width).view(g, height // g, g, width // g)
    cells = tokens.permute(1, 3, 0, 2).reshape(-1, g * g).tolist()
    mask = np.zeros((height * width, height * width), bool)
    for cell in cells:
        mask[np.ix_(cell, cell)] = True
    np.testing.assert_array_equal(dense_mask(Grid(g), height, width), mask)


def halo_by_unfold(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, halo: int, stride: int, rel: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """HaloNet as released: blocks of queries, keys unfolded from the zero-padded map, rel_logits by tables."""
    B, H, W, heads, d = k.shape
    win, small = block + 2 * halo, block // stride
    ny, nx = H // block, W // block

    def windows(t: torch.Tensor) -> torch.Tensor:  # (B, ny, nx, heads, win * win, d)
        padded = F.pad(t, (0, 0, 0, 0, halo, halo, halo, halo))
        cut = padded.unfold(1, win, block).unfold(2, win, block)  # (B, ny, nx, heads, d, win, win)
        return cut.flatten(5).transpose(4, 5)

    qs = q.unflatten(2, (nx, small)).unflatten(1, (ny, small)).permute(0, 1, 3, 5, 2, 4, 6)  # B ny nx heads a b d
    logits = (qs.flatten(4, 5) * d**-0.5) @ windows(k).transpose(-1, -2)
    place = torch.arange(win)[None] - torch.arange(small)[:, None] + win - 1  # (a, key) row of a table
    by_y = torch.einsum("byxnacd,akd->byxnack", qs, rel[0][place])[..., :, None]
    by_x = torch.einsum("byxnacd,ckd->byxnack", qs, rel[1][place])[..., None, :]
    weights = (logits + (by_y + by_x).flatten(-2).flatten(4, 5)).softmax(-1)
    out = (weights @ windows(v)).unflatten(4, (small, small))
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H // stride, W // stride, heads, -1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 1, 1), (4, 2, 2), (2, 3, 1), (6, 1, 2), (3, 0, 3)])
def test_zero_padded_halo_is_halonets_unfold(block: int, halo: int, stride: int, backend: str) -> None:
    H, W, heads, d, win = 2 * block, 3 * block, 2, 8, block + 2 * halo
    q = torch.randn(2, H // stride, W // stride, heads, d, dtype=torch.float64)
    k, v = torch.randn(2, 2, H, W, heads, d, dtype=torch.float64)
    rel = tuple(torch.randn(2, 2 * win - 1, d, dtype=torch.float64))
    want = halo_by_unfold(q, k, v, block, halo, stride, rel)
    got = halo_attention(q, k, v, block, halo, rel=(rel[0], rel[1]), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_clipped_halo_ignores_what_lies_outside_the_map() -> None:
    resolved = resolve(Halo(4, 2, "clip"), 6, 6)
    assert resolved.y.start.tolist() == [0] * 4 + [2] * 2
    assert resolved.y.stop.tolist() == [6] * 6


# --- patterns as values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_repr_is_read_back(pattern: Pattern) -> None:
    assert parse_pattern(repr(pattern)) == pattern
    assert repr(parse_pattern(repr(pattern))) == repr(pattern)
    assert eval(repr(pattern), vars(module)) == pattern


def test_repr_of_random_patterns_is_read_back() -> None:
    rng = random.Random(5)
    for _ in range(300):
        pattern = random_pattern(rng)
        assert parse_pattern(repr(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Neighborhood(7)", Neighborhood(7)),
        (" Neighborhood( 7 , dilation = 2 ) ", Neighborhood(7, 2)),
        ("Window((7, 8), shift=-3)", Window((7, 8), -3)),
        ("Window([7, 8])", Window((7, 8))),
        ("Halo(8, 3, pad='clip')", Halo(8, 3, "clip")),
        ("Axes(Full(), Window(7))", Axes(Full(), Window(7))),
        ("Axes(x=Full(), y=Slide(3))", Axes(Slide(3), Full())),
        ("HilbertWindow(49, 24)", HilbertWindow(49, 24)),
    ],
)
def test_text_is_read_as_code_is_written(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "Window", "Window(", "window(7)", "Pattern()", "Axis(1)", "Window(7)(7)", "module.Window(7)",
        "Window(7) + Window(7)", "Window(7); Window(7)", "lambda: 0", "Window(size)", "Window(1 + len([]))",
        "Window(__import__('os').getpid())", "Window(print('seen'))", "Window(*(7, 1))", "Window(**{'size': 7})",
        "Window(7, depth=3)", "Window(7, 1, 2)", "Window()", "Full(7)", "Window('7')", "Window(7.5)", "Window(True)",
        "Window((1, 2, 3))", "Window(())", "Window(None)", "Window(0)", "Window(7\x00)", "Window(f'{7}')",
        "Axes(7, Full())", "Axes(Full(), HilbertWindow(4))", "Halo(4, 1, 'wrap')", "Window(size=7.5)",
        "Window(size={[]: 1})", "Window(size=7, size=8)",
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages differ
        parse_pattern(text)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_reading_a_pattern_evaluates_nothing_but_literals(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr("builtins.eval", refuse)
    monkeypatch.setattr("builtins.exec", refuse)
    asked: list[str] = []
    real = ast.literal_eval
    monkeypatch.setattr(ast, "literal_eval", lambda node: (asked.append(ast.unparse(node)), real(node))[1])
    assert parse_pattern.__wrapped__("Window((3, 5), shift=2)") == Window((3, 5), 2)
    assert asked == ["2", "(3, 5)"] or asked == ["(3, 5)", "2"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Window(0), ["Window", "size=0", "at least 1"]),
        (lambda: Window((7, -1)), ["Window", "size=(7, -1)", "at least 1"]),
        (lambda: Window((1, 2, 3)), ["Window", "size=(1, 2, 3)", "(y, x) pair"]),
        (lambda: Window("7"), ["Window", "size='7'", "(y, x) pair"]),
        (lambda: Window(True), ["Window", "size=True", "int"]),
        (lambda: Window(7.0), ["Window", "size=7.0", "int"]),
        (lambda: Window(None), ["Window", "size=None", "int"]),
        (lambda: Window((7, 2.5)), ["Window", "size=(7, 2.5)", "ints"]),
        (lambda: Window(7, shift=0.5), ["Window", "shift=0.5", "int"]),
        (lambda: Grid(0), ["Grid", "size=0", "at least 1"]),
        (lambda: Slide(0), ["Slide", "width=0", "at least 1"]),
        (lambda: Neighborhood(0), ["Neighborhood", "kernel_size=0", "at least 1"]),
        (lambda: Neighborhood(7, 0), ["Neighborhood", "dilation=0", "at least 1"]),
        (lambda: Neighborhood(7, 1, 0), ["Neighborhood", "stride=0", "at least 1"]),
        (lambda: Neighborhood(7, 1, (1, 8)), ["stride=(1, 8)", "kernel_size=(7, 7)"]),
        (lambda: Halo(0, 1), ["Halo", "block=0", "at least 1"]),
        (lambda: Halo(8, -1), ["Halo", "halo=-1", "at least 0"]),
        (lambda: Halo(8, 3, "wrap"), ["Halo", "pad='wrap'", "'zero'", "'clip'"]),
        (lambda: Halo(8, 3, stride=3), ["Halo", "stride=(3, 3)", "divide", "block=(8, 8)"]),
        (lambda: Axes(7, Full()), ["Axes", "y=7", "pattern"]),
        (lambda: Axes(Full(), HilbertWindow(4)), ["Axes", "x=HilbertWindow", "image axes"]),
        (lambda: Axes(Axes(Full(), Full()), Full()), ["Axes", "y=Axes", "image axes"]),
        (lambda: HilbertWindow(0), ["HilbertWindow", "length=0", "int >= 1"]),
        (lambda: HilbertWindow((7, 7)), ["HilbertWindow", "length=(7, 7)", "int >= 1"]),
        (lambda: HilbertNeighborhood(2.0), ["HilbertNeighborhood", "length=2.0", "int >= 1"]),
        (lambda: HilbertSlide(True), ["HilbertSlide", "width=True", "int >= 1"]),
        (lambda: resolve(Neighborhood(7), 5, 9), [
            "feature map 5x9 is smaller than kernel_size 7: use a larger image or kernel_size <= 5"]),
        (lambda: resolve(Neighborhood(7), 9, 5), ["feature map 9x5 is smaller than kernel_size 7", "<= 5"]),
        (lambda: resolve(Neighborhood(3, 4), 12, 11), ["12x11", "kernel_size 3 * dilation 4 = 12", "<= 2"]),
        (lambda: resolve(Neighborhood(1, 4), 3, 9), ["3x9", "kernel_size 1 * dilation 4 = 4", "dilation <= 3"]),
        (lambda: resolve(Axes(Neighborhood(7), Full()), 5, 9), ["feature map 5x9 is smaller than kernel_size 7"]),
        (lambda: resolve(Axes(Full(), Neighborhood(7)), 9, 5), ["feature map 9x5 is smaller than kernel_size 7"]),
        (lambda: resolve(HilbertNeighborhood(49), 6, 8), ["6x8", "length 49", "<= 48"]),
        (lambda: resolve(Window(7), 0, 4), ["0x4", "no tokens", "at least 1"]),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_by_name_and_value(make, said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages are compared below
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_one_axis_check_reads_only_its_own_axis() -> None:
    assert resolve(Axes(Neighborhood(7), Full()), 7, 1).y.queries == 7
    assert resolve(Axes(Full(), Neighborhood(7)), 1, 7).x.queries == 7


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_patterns_are_frozen_hashable_values(pattern: Pattern) -> None:
    twin = copy.deepcopy(pattern)
    assert twin == pattern
    assert hash(twin) == hash(pattern)
    assert len({twin, pattern}) == 1
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    for name in pattern.__match_args__:
        with pytest.raises(FrozenInstanceError):
            setattr(pattern, name, 3)


def test_an_int_is_the_pair_of_it() -> None:
    assert Window(7) == Window((7, 7)) == Window([7, 7], shift=0) == Window(7, (0, 0))
    assert hash(Window(7)) == hash(Window((7, 7)))
    assert Neighborhood(7, 2, 3) == Neighborhood((7, 7), (2, 2), (3, 3))
    assert Halo(8, 3) == Halo((8, 8), (3, 3), "zero", (1, 1))
    assert Grid(7) == Grid((7, 7))
    assert Slide(7) == Slide((7, 7))
    assert Window(7).size == (7, 7)


def test_patterns_of_different_kinds_or_sizes_differ() -> None:
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert Window(7) != Grid(7)
    assert Window(7) != Window((7, 8))
    assert HilbertWindow(7) != HilbertNeighborhood(7)


def test_intervals_are_resolved_once_per_map() -> None:
    assert resolve(Window(7), 14, 15) is resolve(Window((7, 7)), 14, 15)


def test_a_new_pattern_needs_one_class_with_one_method() -> None:
    class Diagonalish(Pattern):
        __match_args__ = ()

        def axis(self, n: int, which: int) -> Axis:
            return Window(2).axis(n, which)

    q = torch.randn(1, 4, 6, 1, 8, dtype=torch.float64)
    want = local_attention(q, q, q, Window(2), backend="reference")
    torch.testing.assert_close(local_attention(q, q, q, Diagonalish(), backend="reference"), want)
    with pytest.raises(NotImplementedError, match="Pattern defines no axis"):
        resolve(Pattern(), 4, 4)
