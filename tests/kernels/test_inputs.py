"""What callers may hand to the kernels: layouts, sizes of one, which gradients are wanted, and what comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_helpers import DTYPES, HALVES, SLOW_ON_GPU, Routed, assert_matches, make_routed
from nearfield.ops import Grid, Halo, HilbertNeighborhood, HilbertWindow, Neighborhood, Pattern, Window, local_attention
from ops_helpers import LAYOUTS, PACKED_VIEWS, Case, ident, make_case
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("poisoned"), SLOW_ON_GPU]

# One call for every kernel and way of its bias.
SMALL: list[tuple[Pattern, int, int, str]] = [
    (Window((3, 2), 1), 4, 5, "table"),
    (Neighborhood(3), 5, 6, "table"),
    (Halo(3, 1), 5, 6, "decomposed"),
    (Grid((2, 3)), 5, 4, "none"),
    (HilbertWindow(7, 2), 4, 5, "positions"),
    (HilbertNeighborhood(5), 4, 5, "positions"),
    (Neighborhood(3, 2), 7, 6, "none"),
]
EVERY = pytest.mark.parametrize(
    ("pattern", "height", "width", "kind"),
    [pytest.param(*small, marks=[] if n in (1, 2, 4) else [pytest.mark.slow]) for n, small in enumerate(SMALL)],
    ids=ident,
)
SILENT = pytest.mark.filterwarnings("error:nearfield's kernels cannot read")
COPYING = pytest.mark.filterwarnings("ignore:nearfield's kernels cannot read")
TWO = pytest.mark.parametrize(("pattern", "height", "width", "kind"), SMALL[:2], ids=ident)


def as_leaves(case: Case, shape: Callable[..., tuple[int, ...]], view: Callable[[Tensor], Tensor]) -> Case:
    """The call with q, k and v as views of leaves of another layout."""
    split = len(case.leaves) - case.biases
    leaves = [torch.randn(shape(*t.shape), device=t.device).to(t.dtype) for t in case.leaves[:split]]
    return replace(case, leaves=[*leaves, *case.leaves[split:]], view=lambda t: tuple(view(x) for x in t))


# --- layouts ----------------------------------------------------------------------------------------------------------

# Of the layouts that ops_helpers lists, those that kernels read in place; (B, H, W, C) views of timm's kind among them.
IN_PLACE = {
    "some heads": LAYOUTS["some heads"],
    "a slice of channels": (lambda B, H, W, h, d: (B, H, W, 3 * h * d + 8),
                            lambda t: t[..., 8:].unflatten(-1, (3, -1, 8))[:, :, :, 1]),
    "rows of a taller map": (lambda B, H, W, h, d: (B, H + 3, W, h, d), lambda t: t[:, 2:-1]),
    "every second image": (lambda B, H, W, h, d: (2 * B, H, W, h, d), lambda t: t[::2]),
    "heads before the last": (lambda B, H, W, h, d: (B, h, H, W, d), lambda t: t.permute(0, 2, 3, 1, 4)),
}  # fmt: skip
COPIED = {name: layout for name, layout in LAYOUTS.items() if name not in ("some heads", "heads first")}


@SILENT
@pytest.mark.parametrize("layout", IN_PLACE)
@TWO
def test_views_with_dense_rows_are_read_in_place(
    device: torch.device, layout: str, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    case = make_case(pattern, height, width, kind, batch=2, heads=2, dtype=torch.float32)
    assert_matches(as_leaves(case, *IN_PLACE[layout]).to(device))


@COPYING
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[] if name == "part of a larger map" else [pytest.mark.slow]) for name in COPIED],
)
@TWO
def test_any_other_strides_are_taken(
    device: torch.device, layout: str, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    case = make_case(pattern, height, width, kind, batch=2, heads=2, dtype=torch.float32)
    assert_matches(as_leaves(case, *COPIED[layout]).to(device))


def notices(call: Callable[[], Any]) -> list[str]:
    """What a call warns of, as Python's own filter shows it: once for every place and text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    return [str(w.message) for w in caught if "nearfield" in str(w.message)]


@COPYING  # of what is run after the notices were counted
def test_a_copy_is_noticed_once_for_each_tensor(device: torch.device) -> None:
    case = make_case(Neighborhood(3), 5, 6, "table", batch=2, dtype=torch.float32)
    crops = as_leaves(case, *LAYOUTS["part of a larger map"]).to(device)
    said = notices(lambda: [crops.run("triton") for _ in range(3)])
    assert [next(name for name in "qkv" if f"cannot read {name} of strides" in text) for text in said] == [
        "q",
        "k",
        "v",
    ]
    assert all("\n" not in text and "copy" in text for text in said)
    routed = make_routed(5, 6, 3, 2)
    wide = [torch.randn(2, 7, 9, *t.shape[3:]) for t in routed.leaves]
    view = lambda t: tuple(x[:, 1:-1, 2:-1] for x in t)  # noqa: E731
    crops_of_routed = replace(routed, leaves=wide, view=view).to(device)
    assert len(notices(lambda: [crops_of_routed.run("triton") for _ in range(3)])) == 3
    assert_matches(crops_of_routed)


@COPYING
def test_a_tensor_that_starts_anywhere_in_memory_is_taken(device: torch.device) -> None:
    """Its pointer is not a multiple of 16 bytes."""
    case = make_case(Window(3), 5, 6, "table", heads=1, dtype=torch.bfloat16)
    view = lambda t: t.flatten()[1:241].view(1, 5, 6, 1, 8)  # noqa: E731
    assert_matches(as_leaves(case, lambda B, H, W, h, d: (B, H, W + 1, h, d), view).to(device))


@pytest.mark.parametrize("layout", PACKED_VIEWS)
@COPYING
def test_packed_projections_of_any_strides_are_taken(device: torch.device, layout: str) -> None:
    shape, view = PACKED_VIEWS[layout]
    for pattern in (Window((3, 4), 1), Neighborhood((5, 3))):
        leaf = torch.randn(shape(2, 11, 5, 1, 8), device=device)
        grad = torch.randn(2, 11, 5, 1, 8, device=device)
        assert_matches(Case(pattern, [leaf], grad, 0, lambda t: (view(t[0]), None, None)))


@SILENT
@EVERY
def test_packed_gradients_are_the_stack_of_the_separate_ones(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    packed = make_case(pattern, height, width, kind, packed=True, batch=2, dtype=torch.float32).to(device)
    qkv, *biases = packed.leaves
    apart = Case(pattern, [*(t.contiguous() for t in qkv.unbind(3)), *biases], packed.grad, packed.biases)
    out, dqkv, *of_bias = packed.run("triton")
    want, dq, dk, dv, *want_of_bias = apart.run("triton")
    torch.testing.assert_close([out, dqkv, *of_bias], [want, torch.stack((dq, dk, dv), 3), *want_of_bias])


def test_q_k_v_may_be_one_tensor(device: torch.device) -> None:
    for pattern in (Window(3), Neighborhood(3)):
        leaf, grad = (torch.randn(1, 5, 6, 2, 8, device=device) for _ in range(2))
        assert_matches(Case(pattern, [leaf], grad, 0, lambda t: (t[0], t[0], t[0])))


@COPYING
@TWO
def test_expanded_inputs_are_taken(device: torch.device, pattern: Pattern, height: int, width: int, kind: str) -> None:
    full = (2, height, width, 2, 8)
    case = make_case(pattern, height, width, kind, batch=2, dtype=torch.float32)
    for small in ((1, height, width, 2, 8), (2, height, width, 1, 8), (2, 1, 1, 2, 8)):
        assert_matches(as_leaves(case, lambda *_, s=small: s, lambda t: t.expand(full)).to(device))


# name: (shape of what is made for (B, H, W, h, d), view of it in that shape)
GRADIENTS = {
    "one number": (lambda *shape: (1,) * 5, lambda t, shape: t.expand(shape)),
    "one image": (lambda B, *shape: (1, *shape), lambda t, shape: t.expand(shape)),
    "transposed": (lambda B, H, W, h, d: (B, h, d, H, W), lambda t, _: t.permute(0, 3, 4, 1, 2)),
    "sliced": (lambda B, H, W, h, d: (B, H, 2 * W, h, 2 * d), lambda t, _: t[:, :, ::2, :, 1::2]),
}


@SILENT  # nobody can do anything about the layouts that autograd makes
@pytest.mark.parametrize("layout", GRADIENTS)
def test_incoming_gradients_of_any_strides_are_taken(device: torch.device, layout: str) -> None:
    shape, view = GRADIENTS[layout]
    calls = [make_case(*SMALL[0], batch=2, dtype=torch.float32), make_case(*SMALL[1], batch=2, dtype=HALVES[0])]
    for call in (*calls, make_routed(5, 6, 3, 2)):
        made = torch.randn(shape(*call.grad.shape), device=device).to(call.grad.dtype)
        moved = replace(call.to(device), grad=view(made, call.grad.shape))
        assert not moved.grad.is_contiguous()
        assert_matches(moved)


def test_a_bias_of_any_strides_is_taken(device: torch.device) -> None:
    table = torch.randn(5, 5, 2, device=device).permute(2, 0, 1)
    one_row = torch.randn(1, 5, 5, device=device).expand(2, 5, 5)
    q = torch.randn(1, 5, 6, 2, 8, device=device)
    for bias in (table, one_row):
        for pattern in (Window(3), Neighborhood(3)):
            got, want = (
                local_attention(q, q, q, pattern, bias=bias, backend=backend) for backend in ("triton", "reference")
            )
            torch.testing.assert_close(got, want)


# --- sizes of one, sizes of none --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (3, 1), (5, 2)])
@TWO
def test_every_number_of_images_and_heads(
    device: torch.device, batch: int, heads: int, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    case = make_case(pattern, height, width, kind, batch=batch, heads=heads, packed=True, dtype=torch.float32)
    assert_matches(case.to(device))


@EVERY
def test_an_empty_batch_gives_an_empty_output_and_zero_bias_gradients(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    for packed in (False, True):
        case = make_case(pattern, height, width, kind, batch=0, packed=packed, dtype=torch.float32).to(device)
        out, *gradients = case.run("triton")
        assert out.shape == (0, height, width, 2, 8)
        assert [g.shape for g in gradients] == [t.shape for t in case.leaves]
        assert not any(g.any() for g in gradients)


def test_an_empty_batch_is_routed(device: torch.device) -> None:
    for packed in (False, True):
        for size in (2, 3):
            call = make_routed(4, 6, size, 1, batch=0, packed=packed).to(device)
            out, *gradients = call.run("triton")
            assert out.shape == (0, 4, 6, 2, 8)
            assert [g.shape for g in gradients] == [t.shape for t in call.leaves]


# --- which gradients --------------------------------------------------------------------------------------------------


@EVERY
def test_only_the_gradients_asked_for_are_given(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str, launched: list[tuple[str, Any]]
) -> None:
    case = make_case(pattern, height, width, kind, heads=1, dtype=torch.float32).to(device)
    every = case.run("triton")[1:]
    count = len(case.leaves)
    of_bias = [1 << i for i in range(3, count)]
    for wanted in {1, 2, 6, 7, *of_bias, sum(of_bias) or 5}:
        leaves = [t.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.leaves)]
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        launched.clear()
        local_attention(*leaves[:3], pattern, bias=bias, backend="triton").backward(case.grad)
        if not wanted >> 3:  # then no kernel works for the bias
            assert not {"bias.runs", "bias.table", "neighborhood.bias"} & {name for name, _ in launched}
        for leaf, want in zip(leaves, every, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, want)


@EVERY
def test_nothing_is_recorded_where_nothing_needs_a_gradient(
    device: torch.device, pattern: Pattern, height: int, width: int, kind: str
) -> None:
    case = make_case(pattern, height, width, kind, heads=1, dtype=torch.float32).to(device)
    out = case.run("triton")[0]
    bias = {0: None, 1: case.leaves[-1], 2: tuple(case.leaves[-2:])}[case.biases]
    plain = local_attention(*case.leaves[:3], pattern, bias=bias, backend="triton")
    assert plain.grad_fn is None
    assert torch.equal(plain, out)
    for context in (torch.no_grad, torch.inference_mode):
        leaves = [t.clone().requires_grad_() for t in case.leaves]
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        with context():
            evaluated = local_attention(*leaves[:3], pattern, bias=bias, backend="triton")
        assert torch.equal(evaluated.clone(), out)


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_works_after_evaluation_in_the_same_process(
    device: torch.device, context: Callable[[], Any], change: Callable[..., None]
) -> None:
    """What evaluation caches must not be an inference tensor."""
    for small in SMALL:
        case = make_case(*small, heads=1, dtype=torch.float32).to(device)
        bias = {0: None, 1: case.leaves[-1], 2: tuple(case.leaves[-2:])}[case.biases]
        with context():
            local_attention(*case.leaves[:3], case.pattern, bias=bias, backend="triton")
        assert_matches(case)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_outputs_are_contiguous_and_inputs_are_left_as_they_are(device: torch.device, number: int) -> None:
    dtype = DTYPES[number % 3]
    case = make_case(*SMALL[number], value_dim=12, dtype=dtype).to(device)
    before = [t.clone() for t in (*case.leaves, case.grad)]
    leaves = [t.requires_grad_() for t in case.leaves]
    bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
    out = local_attention(*leaves[:3], case.pattern, bias=bias, backend="triton")
    kept = out.detach().clone()
    gradients = torch.autograd.grad(out, leaves, case.grad)
    assert torch.equal(out, kept)
    assert out.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip((*case.leaves, case.grad), before, strict=True))
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in leaves]


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    for call in (
        make_case(Window(2), 2, 3, "none", heads=1, dtype=torch.float32).to(device),
        make_case(Neighborhood(2), 2, 3, "none", heads=1, dtype=torch.float32).to(device),
    ):
        leaves = [t.requires_grad_() for t in call.leaves]
        out = local_attention(*leaves, call.pattern, backend="triton")
        (gradient,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_poisoned_memory_reaches_the_kernels(device: torch.device, poisoned: list[int]) -> None:
    """The fixture that this folder's comparisons rely on: outputs and sums are made of poisoned memory."""
    before = len(poisoned)
    make_case(Neighborhood(3), 3, 3, "table", dtype=torch.float32).to(device).run("triton")
    assert len(poisoned) > before + 6
    assert isinstance(make_routed(4, 4, 2, 1), Routed)
