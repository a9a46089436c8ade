"""The torch backend against the float64 reference: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nearfield.ops import (
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
    blocks,
    cache,
    local_attention,
    torch_tiles,
)
from ops_helpers import (
    CASES,
    CPU_BACKENDS,
    EVERY_KIND,
    FEW,
    LAYOUTS,
    PACKED_VIEWS,
    Case,
    assert_exact,
    assert_within_rounding,
    bias_shapes,
    ident,
    kinds_of,
    make_case,
    query_stride,
    random_cases,
)
from torch import Tensor


def test_every_pattern_is_among_the_cases() -> None:
    """A new one is tested by everything that walks through them, kernels included."""
    known = {kind for kind in Pattern.__subclasses__() if kind.__module__ == Pattern.__module__}
    assert {type(pattern) for pattern, _, _ in CASES} == known


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "plain"])
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), EVERY_KIND, ids=ident)
def test_output_and_every_gradient_equal_the_reference(
    pattern: Pattern, height: int, width: int, kind: str, backend: str
) -> None:
    assert_exact(make_case(pattern, height, width, kind, batch=3), backend)
    if query_stride(pattern) == (1, 1):
        assert_exact(make_case(pattern, height, width, kind, packed=True), backend)


@pytest.mark.parametrize("seed", range(6))
def test_random_patterns_equal_the_reference(seed: int) -> None:
    for pattern, height, width in random_cases(20, seed=100 + seed, largest=14):
        for kind in kinds_of(pattern):
            assert_exact(make_case(pattern, height, width, kind, heads=1 + seed % 3, batch=1 + seed % 2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_many_more_random_patterns_equal_the_reference(seed: int) -> None:
    for pattern, height, width in random_cases(30, seed=1000 + seed, largest=26):
        for kind in kinds_of(pattern):
            assert_exact(make_case(pattern, height, width, kind, heads=2, batch=1 + seed % 3, head_dim=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), EVERY_KIND, ids=ident)
def test_errors_stay_within_rounding(pattern: Pattern, height: int, width: int, kind: str, dtype: torch.dtype) -> None:
    assert_within_rounding(make_case(pattern, height, width, kind, dtype=dtype, head_dim=32))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40])
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), FEW, ids=ident)
def test_every_head_dim_and_batch(
    pattern: Pattern, height: int, width: int, kind: str, head_dim: int, batch: int
) -> None:
    assert_exact(make_case(pattern, height, width, kind, head_dim=head_dim, batch=batch))
    assert_within_rounding(make_case(pattern, height, width, kind, head_dim=head_dim, batch=batch, dtype=torch.float32))


@pytest.mark.parametrize("dims", [(8, 24), (24, 8), (1, 3), (5, 1)])
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), FEW, ids=ident)
def test_values_may_have_another_head_dim(
    pattern: Pattern, height: int, width: int, kind: str, dims: tuple[int, int]
) -> None:
    assert_exact(make_case(pattern, height, width, kind, head_dim=dims[0], value_dim=dims[1], batch=2))


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_every_number_of_heads(heads: int) -> None:
    for pattern, height, width, kind in FEW:
        assert_exact(make_case(pattern, height, width, kind, heads=heads))


@pytest.mark.parametrize("scale", [0.1, 1.0, -0.5, 0.0])
def test_scale_can_be_given(scale: float) -> None:
    for pattern, height, width, kind in FEW:
        assert_exact(make_case(pattern, height, width, kind, scale=scale))


def test_large_scores_do_not_overflow() -> None:
    for pattern, height, width, kind in FEW:
        assert_exact(make_case(pattern, height, width, kind, scale=100.0))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 64), (2, 2)])
def test_maps_of_one_row_or_one_token(size: tuple[int, int]) -> None:
    for pattern in (Window(4, 1), Grid(3), Neighborhood(1), Halo(4, 2), Halo(3, 1, "clip"), Slide(3), Full(),
                    HilbertWindow(4, 1), HilbertSlide(5), HilbertNeighborhood(1)):  # fmt: skip
        for kind in kinds_of(pattern):
            assert_exact(make_case(pattern, *size, kind, batch=2))


# --- layouts of the inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), FEW, ids=ident)
def test_packed_gradient_is_the_stack_of_the_separate_ones(
    pattern: Pattern, height: int, width: int, kind: str, batch: int
) -> None:
    packed = make_case(pattern, height, width, kind, packed=True, batch=batch)
    qkv, *biases = packed.leaves
    apart = Case(pattern, [*(t.contiguous() for t in qkv.unbind(3)), *biases], packed.grad, packed.biases)
    out, dqkv, *dbias = packed.run("torch")
    want, dq, dk, dv, *want_bias = apart.run("torch")
    assert dqkv.shape == qkv.shape
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dqkv, torch.stack((dq, dk, dv), 3), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dbias, want_bias, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_are_taken(layout: str) -> None:
    shape, view = LAYOUTS[layout]
    for pattern, height, width, kind in FEW:
        case = make_case(pattern, height, width, kind, batch=2)
        biases = case.leaves[3:]
        leaves = [torch.randn(shape(*t.shape), dtype=torch.float64) for t in case.leaves[:3]]
        strided = Case(pattern, [*leaves, *biases], case.grad, case.biases, lambda t: tuple(view(x) for x in t))
        assert_exact(strided)
        plain = Case(pattern, [*(view(t).contiguous() for t in leaves), *biases], case.grad, case.biases)
        torch.testing.assert_close(strided.run("torch")[0], plain.run("torch")[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", PACKED_VIEWS)
def test_packed_projections_of_any_strides_are_taken(layout: str) -> None:
    shape, view = PACKED_VIEWS[layout]
    for pattern in (Window(4, 1), Neighborhood(5, 2), HilbertWindow(9, 4)):
        leaf = torch.randn(shape(2, 11, 13, 2, 8), dtype=torch.float64)
        case = Case(pattern, [leaf], torch.randn(2, 11, 13, 2, 8).double(), 0, lambda t: (view(t[0]), None, None))
        assert_exact(case)


def test_q_k_v_may_share_memory_in_any_way() -> None:
    """Evenly spaced views of one storage are read as one; what merely looks like it must not be."""
    views: list[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = [
        lambda t: (t[..., :8], t[..., :8], t[..., :8]),
        lambda t: (t[..., 0:8], t[..., 8:16], t[..., 16:24]),
        lambda t: (t[..., 16:24], t[..., 8:16], t[..., 0:8]),
        lambda t: (t[..., 0:8], t[..., 1:9], t[..., 2:10]),
        lambda t: (t[..., 0:8], t[..., 8:16], t[..., 8:16]),
        lambda t: (t[..., 0:8], t[..., 8:16], t[..., 9:17]),
        lambda t: (t[:, :9], t[:, 1:10], t[:, 2:11]),
        lambda t: (t[:, :9], t[:, 1:10], t[:, 3:12]),
    ]
    for pattern in (Window(4, 1), Neighborhood(3), Full()):
        for view in views:
            leaf = torch.randn(1, 12, 9, 2, 24, dtype=torch.float64)
            out = view(leaf)[0]
            assert_exact(
                Case(pattern, [leaf], torch.randn(out.shape, dtype=torch.float64), 0, lambda t, f=view: f(t[0]))
            )


def test_expanded_inputs_are_read_in_place() -> None:
    for pattern, height, width, kind in FEW:
        full = (2, height, width, 2, 8)
        for small in ((1, height, width, 2, 8), (2, height, width, 1, 8), (2, 1, 1, 2, 8), (2, height, width, 2, 1)):
            case = make_case(pattern, height, width, kind, batch=2)
            leaves = [torch.randn(small, dtype=torch.float64) for _ in range(3)]
            view = lambda t, full=full: tuple(x.expand(full) for x in t)  # noqa: E731
            assert_exact(Case(pattern, [*leaves, *case.leaves[3:]], case.grad, case.biases, view))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_incoming_gradients_of_any_strides_are_taken(layout: str) -> None:
    for pattern, height, width, kind in FEW:
        case = make_case(pattern, height, width, kind, batch=2)
        B, H, W, h, d = case.grad.shape
        if layout == "expanded":
            case.grad = torch.ones((), dtype=torch.float64).expand(B, H, W, h, d)
        elif layout == "transposed":
            case.grad = torch.randn(B, h, d, H, W, dtype=torch.float64).permute(0, 3, 4, 1, 2)
        else:
            case.grad = torch.randn(B, H, 2 * W, h, 2 * d, dtype=torch.float64)[:, :, ::2, :, 1::2]
        assert_exact(case)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("value_dim", [8, 4, 16])
def test_outputs_are_contiguous(value_dim: int, backend: str) -> None:
    for pattern in (Full(), Window(2), Neighborhood(3), HilbertWindow(5)):
        q, v = torch.randn(2, 4, 4, 2, 8), torch.randn(2, 4, 4, 2, value_dim)
        for training in (False, True):
            out = local_attention(q.requires_grad_(training), q, v, pattern, backend=backend)
            assert out.shape == v.shape
            assert out.is_contiguous(), pattern


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inputs_are_left_as_they_are(backend: str) -> None:
    for pattern, height, width, kind in FEW:
        case = make_case(pattern, height, width, kind, batch=2)
        before = [t.clone() for t in [*case.leaves, case.grad]]
        leaves = [t.requires_grad_() for t in case.leaves]
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        out = local_attention(*leaves[:3], pattern, bias=bias, backend=backend)
        kept = out.detach().clone()
        torch.autograd.grad(out, leaves, case.grad)
        assert torch.equal(out, kept)
        for a, b in zip([*case.leaves, case.grad], before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_batch_gives_an_empty_output_and_zero_bias_gradients(packed: bool, backend: str) -> None:
    for pattern, kind in ((Window(2), "table"), (Neighborhood(3), "table"), (HilbertWindow(4), "positions")):
        case = make_case(pattern, 4, 6, kind, batch=0, packed=packed)
        out, *gradients = case.run(backend)
        assert out.shape == (0, 4, 6, 2, 8)
        for leaf, gradient in zip(case.leaves, gradients, strict=True):
            assert gradient.shape == leaf.shape
        assert not gradients[-1].any()


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pattern", "height", "width", "kind"), [c for c in FEW if c[3] != "none"], ids=ident)
def test_a_bias_keeps_its_own_dtype(pattern: Pattern, height: int, width: int, kind: str, low: torch.dtype) -> None:
    assert_within_rounding(make_case(pattern, height, width, kind, dtype=low, bias_dtype=torch.float32, batch=2))


@pytest.mark.parametrize(("pattern", "height", "width", "kind"), [c for c in FEW if c[3] != "none"], ids=ident)
def test_a_low_precision_bias_beside_float32(pattern: Pattern, height: int, width: int, kind: str) -> None:
    case = make_case(pattern, height, width, kind, dtype=torch.float32, bias_dtype=torch.bfloat16)
    for name, got, want in zip(case.names, case.run("torch"), case.run("reference"), strict=True):
        assert got.dtype == want.dtype == (torch.bfloat16 if name in ("bias", "rel_x") else torch.float32)
        rounding = 2 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want, rtol=rounding, atol=4 * rounding * want.abs().max().item())


def test_low_precision_table_gradients_are_summed_in_float32() -> None:
    """Thousands of ones: a bfloat16 sum would stop growing at 256."""
    table = torch.zeros(1, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    q = torch.zeros(1, 64, 64, 1, 8, dtype=torch.bfloat16)
    v = torch.zeros(1, 64, 64, 1, 8, dtype=torch.bfloat16)
    v[:, :, ::2] = 1
    grad = torch.zeros(1, 64, 64, 1, 8, dtype=torch.bfloat16)
    grad[:, :, ::2, :, 0] = 1
    for backend in CPU_BACKENDS:
        out = local_attention(q, q, v, Window(2), bias=table, backend=backend)
        (got,) = torch.autograd.grad(out, table, grad)
        # even columns see value 1 at dx = 0 and 0 at dx = 1: dP - delta = +-1/2, weight 1/4, 2048 queries
        torch.testing.assert_close(got[0, :, 2].float(), torch.tensor([-128.0, -256.0, -128.0]), rtol=1e-2, atol=0)
        torch.testing.assert_close(got[0, :, 1].float(), torch.tensor([128.0, 256.0, 128.0]), rtol=1e-2, atol=0)
        assert not got[0, :, 0].any()


@pytest.mark.parametrize("packed", [False, True])
def test_low_precision_gradients_of_many_blocks_are_summed_in_float32(
    packed: bool, set_tile: Callable[[int, int], None]
) -> None:
    """A thousand blocks add one each to dv: a bfloat16 sum would stop growing at 256."""
    set_tile(1, 1)
    qkv = torch.zeros(1, 1, 1024, 3, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    inputs = (qkv, None, None) if packed else qkv.unbind(3)
    out = local_attention(*inputs, Full(), backend="torch")
    (gradient,) = torch.autograd.grad(out, qkv, torch.full_like(out, 1024.0))
    assert (gradient[:, :, :, 2] == 1024).all()
    assert not gradient[:, :, :, :2].any()


# The reference is differentiated by PyTorch's own formulas, which follow an autocast that is on around backward().
@pytest.mark.parametrize(
    ("around", "backend"), [("forward", "reference"), ("forward", "torch"), ("both passes", "torch")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_operator_alone(around: str, dtype: torch.dtype, backend: str) -> None:
    """Scores, softmax and sums stay float32 under autocast: results are bitwise those without it."""
    for pattern, height, width, kind in FEW:
        case = make_case(pattern, height, width, kind, dtype=dtype, bias_dtype=torch.float32)
        leaves = [t.requires_grad_() for t in case.leaves]
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        plain = case.run(backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = local_attention(*leaves[:3], pattern, bias=bias, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "both passes"):
            gradients = torch.autograd.grad(out, leaves, case.grad)
        for name, got, want in zip(case.names, [out, *gradients], plain, strict=True):
            assert got.dtype == want.dtype, name
            assert torch.equal(got, want), f"{name} of {pattern} with {kind}"


# --- tiles and blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (8, 2), (64, 64)])
def test_any_tile_gives_the_same_result(tile: tuple[int, int], set_tile: Callable[[int, int], None]) -> None:
    for pattern, height, width in CASES:
        set_tile(tile[0] * tile[1], 1) if pattern.curve else set_tile(*tile)
        for kind in kinds_of(pattern)[1:]:
            assert_exact(make_case(pattern, height, width, kind, batch=2, packed=query_stride(pattern) == (1, 1)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("tiny_blocks")
def test_many_small_blocks_give_the_same_result(packed: bool) -> None:
    for pattern, height, width in CASES:
        for kind in kinds_of(pattern)[1:]:
            if not packed or query_stride(pattern) == (1, 1):
                assert_exact(make_case(pattern, height, width, kind, batch=2, packed=packed))


@pytest.mark.parametrize("block_bytes", [1 << 12, 1 << 14, 1 << 16])
def test_blocks_of_some_runs_and_some_images_give_the_same_result(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch, set_tile: Callable[[int, int], None]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    blocks.cut_blocks.cache_clear()
    cut = set()
    for pattern, height, width, kind in [*FEW, (Window(2), 12, 14, "table"), (Neighborhood(3), 24, 24, "table")]:
        set_tile(9, 1) if pattern.curve else set_tile(3, 4)
        case = make_case(pattern, height, width, kind, batch=5)
        assert_exact(case)
        made = blocks.cut_blocks(pattern, height, width, torch_tiles.choose_tile(), 5, 2 * 8 * 8, kind == "positions")
        cut |= {block.counts for block in made}
    blocks.cut_blocks.cache_clear()
    assert len(cut) > 1


def test_a_map_that_is_one_tile_is_written_at_once() -> None:
    for pattern in (Full(), Window(6), Neighborhood(6), Grid(6)):
        for dtype in (torch.float64, torch.float32):
            case = make_case(pattern, 6, 6, "table", batch=2, dtype=dtype)
            torch.testing.assert_close(case.run("torch")[0], case.run("reference")[0])


def test_blocks_cover_every_query_of_every_image_once(set_tile: Callable[[int, int], None]) -> None:
    for pattern, height, width in CASES:
        if pattern.curve is not None:
            continue
        stride = query_stride(pattern)
        seen = torch.zeros(3, -(-height // stride[0]), -(-width // stride[1]), dtype=torch.int64)
        for block in blocks.cut_blocks(pattern, height, width, (3, 4), 3, 4096, False):
            for run_y in range(*block.y):
                for run_x in range(*block.x):
                    rows = block.row.queries.coordinates() + run_y * block.row.query_spacing
                    columns = block.column.queries.coordinates() + run_x * block.column.query_spacing
                    seen[block.b[0] : block.b[1], torch.from_numpy(rows)[:, None], torch.from_numpy(columns)] += 1
        assert (seen == 1).all(), pattern


# --- gradients by finite differences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "height", "width", "kind"),
    [
        (Window(2, 1), 3, 4, "none"),
        (Window(2, 1), 3, 4, "table"),
        (Window(2, 1), 3, 4, "decomposed"),
        (Neighborhood(2, 2), 4, 5, "table"),
        (Neighborhood(3, 1, 2), 3, 4, "decomposed"),
        (Grid(2), 3, 4, "table"),
        (Halo(2, 1), 3, 3, "decomposed"),
        (Halo(2, 1, "clip", 2), 4, 3, "decomposed"),
        (Halo(2, 1), 3, 3, "table"),
        (Slide(3), 3, 3, "table"),
        (HilbertWindow(4, 1), 3, 3, "table"),
        (HilbertWindow(4, 1), 3, 3, "positions"),
        (HilbertNeighborhood(3), 2, 4, "positions"),
    ],
    ids=ident,
)  # fmt: skip
def test_gradcheck(pattern: Pattern, height: int, width: int, kind: str) -> None:
    case = make_case(pattern, height, width, kind, heads=1, head_dim=2, value_dim=3)
    split = 3

    def call(*leaves: Tensor) -> Tensor:
        bias = {0: None, 1: leaves[-1], 2: leaves[split:]}[case.biases]
        return local_attention(*leaves[:split], pattern, bias=bias, backend="torch")

    leaves = [t.requires_grad_() for t in case.leaves]
    assert torch.autograd.gradcheck(call, leaves)


def test_gradcheck_packed() -> None:
    for pattern, bias in ((Window(2, 1), (1, 3, 3)), (Neighborhood(2), (1, 3, 3)), (HilbertWindow(4, 1), (1, 5, 5))):
        qkv = torch.randn(1, 3, 3, 3, 1, 2, dtype=torch.float64, requires_grad=True)
        table = torch.randn(bias, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, b, p=pattern: local_attention(a, None, None, p, bias=b), (qkv, table))


# --- what else a training loop does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "decomposed"])
def test_only_the_gradients_asked_for_are_given(kind: str) -> None:
    case = make_case(Neighborhood(3), 6, 7, kind, batch=2)
    every = case.run("torch")[1:]
    count = len(case.leaves)
    for wanted in range(1, 1 << count):
        leaves = [t.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.leaves)]
        bias = leaves[3] if case.biases == 1 else tuple(leaves[3:])
        out = local_attention(*leaves[:3], case.pattern, bias=bias, backend="torch")
        out.backward(case.grad)
        for leaf, want in zip(leaves, every, strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


def test_nothing_is_recorded_where_nothing_needs_a_gradient() -> None:
    q = torch.randn(1, 6, 6, 2, 8)
    assert local_attention(q, q, q, Window(3)).grad_fn is None
    with torch.no_grad():
        assert not local_attention(q.clone().requires_grad_(), q, q, Window(3)).requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_works_after_evaluation_in_the_same_process(context: Callable[[], Any]) -> None:
    """What evaluation caches must not be an inference tensor. Sizes are used nowhere else, so caches start empty."""
    odd = {torch.no_grad: 0, torch.inference_mode: 1}[context]
    for pattern, kind in (
        (Window(5, 2), "table"), (Window(5, 2), "none"), (Neighborhood(3, 2), "table"), (Halo(4, 3), "decomposed"),
        (HilbertWindow(6, 1), "positions"), (HilbertNeighborhood(6), "table"), (Slide(4), "none"),
    ):  # fmt: skip
        cache.SCHEDULES.clear()
        cached = pattern != Window(5, 2) or kind != "none"  # a whole window needs no schedule
        case = make_case(pattern, 17 + odd, 19, kind)
        leaves = case.leaves
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        with context():
            evaluated = local_attention(*leaves[:3], pattern, bias=bias, backend="torch").clone()
        assert (cache.SCHEDULES.nbytes > 0) == cached
        assert_exact(case)
        torch.testing.assert_close(evaluated.clone(), case.run("torch")[0], rtol=1e-12, atol=1e-12)


def test_results_are_bitwise_repeatable() -> None:
    for pattern, height, width, kind in FEW:
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(pattern, height, width, kind, batch=2, dtype=dtype)
            first = case.run("torch")
            for _ in range(4):
                for a, b in zip(first, case.run("torch"), strict=True):
                    assert torch.equal(a, b)


def test_evaluation_gives_what_training_gives() -> None:
    for pattern, height, width, kind in FEW:
        case = make_case(pattern, height, width, kind, batch=2, dtype=torch.float32)
        bias = {0: None, 1: case.leaves[-1], 2: tuple(case.leaves[-2:])}[case.biases]
        with torch.no_grad():
            out = local_attention(*case.leaves[:3], pattern, bias=bias, backend="torch")
        assert torch.equal(out, case.run("torch")[0])


def test_gradients_accumulate_over_two_calls() -> None:
    table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 6, 6, 2, 8, dtype=torch.float64)
    for backend in ("torch", "reference"):
        both = sum(local_attention(q, q, q, Neighborhood(3, d), bias=table, backend=backend).sum() for d in (1, 2))
        assert isinstance(both, Tensor)
        (gradient,) = torch.autograd.grad((both * both), table)
        if backend == "torch":
            first = gradient
    torch.testing.assert_close(first, gradient, rtol=1e-10, atol=1e-11)


# --- memory that was never written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_no_uninitialised_memory_is_read(packed: bool, poisoned: list[int]) -> None:
    for pattern, height, width in CASES:
        if packed and query_stride(pattern) != (1, 1):
            continue
        for kind in kinds_of(pattern):
            before = len(poisoned)
            assert_exact(make_case(pattern, height, width, kind, batch=2, packed=packed))
            assert len(poisoned) > before + 3  # the operator's own buffers were poisoned


@pytest.mark.usefixtures("tiny_blocks", "poisoned")
def test_no_uninitialised_memory_is_read_between_blocks(set_tile: Callable[[int, int], None]) -> None:
    for pattern, height, width in CASES:
        set_tile(8, 1) if pattern.curve else set_tile(3, 4)
        for kind in kinds_of(pattern)[1:]:
            assert_exact(make_case(pattern, height, width, kind, batch=2))


@pytest.mark.usefixtures("poisoned")
def test_no_uninitialised_memory_is_read_in_low_precision() -> None:
    for pattern, height, width in CASES:
        for kind in kinds_of(pattern)[1:]:
            assert_within_rounding(make_case(pattern, height, width, kind, dtype=torch.bfloat16))


def test_poisoned_memory_is_seen(poisoned: list[int]) -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert poisoned == [3, 3, 3]


@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize(
    "pattern", [Neighborhood(7), Neighborhood(5, dilation=2), Slide(7), HilbertNeighborhood(9)], ids=ident
)
def test_tiles_computed_together_on_tall_maps(monkeypatch: pytest.MonkeyPatch, pattern: Pattern, layout: str) -> None:
    """Tiles of one column go through one call where that saves calls: rows of many tiles, few columns."""
    size, tile = (100, 12), (2, 12)
    monkeypatch.setattr(torch_tiles, "choose_tile", lambda *_: tile)
    torch.manual_seed(0)
    qkv = torch.randn(1, *size, 3, 2, 8)
    parts = (qkv, None, None) if layout == "packed" else qkv.unbind(3)
    for kind in kinds_of(pattern):
        tables = [torch.randn(shape) for shape in bias_shapes(pattern, *size, 2, 8, kind)]
        bias: Any = {0: None, 1: tables[0] if tables else None, 2: tuple(tables)}[len(tables)]
        got, want = (local_attention(*parts, pattern, bias=bias, backend=name) for name in ("torch", "reference"))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    cut = blocks.cut_blocks(pattern, *size, tile, 1, 64, False, 8, True)
    assert any(stack.count > 1 for block in cut for stack, _ in block.stacks)
