"""What only hardware shows: larger maps, graphs, streams, compilers, mixed precision, and more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import nearfield
import pytest
import torch
from kernel_helpers import DTYPES, HALVES, assert_at_most, assert_matches, largest, make_routed, uncancelled
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
    local_attention,
    routing_attention,
)
from ops_helpers import make_case, query_stride
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")

# The sizes that models have: pattern, map, kind of bias, heads, head_dim.
LARGER: list[tuple[Pattern, int, int, str, int, int]] = [
    (Window(7), 56, 56, "table", 3, 32),
    (Window(7, 3), 56, 56, "table", 3, 32),
    (Window(12, 6), 48, 48, "table", 2, 32),
    (Window(8), 64, 61, "none", 2, 48),
    (Grid(7), 56, 56, "table", 2, 32),
    (Neighborhood(7), 56, 56, "table", 2, 32),
    (Neighborhood(7, 8), 56, 57, "table", 2, 32),
    (Neighborhood(7), 14, 14, "table", 8, 64),
    (Neighborhood(13), 64, 64, "none", 1, 40),
    (Neighborhood((5, 11), (2, 3), (1, 4)), 41, 55, "table", 2, 24),
    (Slide(7), 48, 50, "table", 2, 80),
    (Halo(8, 3), 56, 56, "decomposed", 2, 16),
    (Halo(8, 3, "zero", 2), 32, 46, "decomposed", 2, 32),
    (Halo(8, 2, "clip"), 33, 45, "table", 1, 96),
    (HilbertWindow(49), 56, 56, "positions", 3, 32),
    (HilbertWindow(144, 72), 48, 48, "table", 2, 32),
    (HilbertNeighborhood(49), 48, 50, "positions", 2, 32),
    (Axes(Full(), Window(7)), 28, 31, "table", 2, 32),
    (Full(), 14, 14, "table", 4, 128),
]
NUMBERS = [pytest.param(n, marks=[] if n in (0, 5, 11, 16) else [pytest.mark.slow]) for n in range(len(LARGER))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS)
def test_sizes_of_real_models(number: int, dtype: torch.dtype) -> None:
    pattern, height, width, kind, heads, head_dim = LARGER[number]
    packed = query_stride(pattern) == (1, 1)
    case = make_case(
        pattern, height, width, kind, batch=2, heads=heads, head_dim=head_dim, packed=packed, dtype=dtype,
        bias_dtype=torch.float32,
    )  # fmt: skip
    assert_matches(case.to(CUDA))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(56, 56, 8, 1), (28, 28, 4, 4), (14, 14, 2, 16), (30, 45, 7, 3)], ids=str)
def test_routing_of_real_models(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_matches(make_routed(*shape, batch=3, heads=2, head_dim=32, packed=True, dtype=dtype).to(CUDA))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_batch(batch: int) -> None:
    for pattern in (Window(7, 3), Neighborhood(7)):
        case = make_case(pattern, 14, 17, "table", batch=batch, heads=3, head_dim=32, packed=True, dtype=HALVES[0])
        assert_matches(case.to(CUDA))


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _product_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_product_precision")
def test_tf32_is_off_unless_it_is_asked_for() -> None:
    for pattern in (Window(7), Neighborhood(7)):
        call = make_case(pattern, 14, 15, "table", head_dim=64, dtype=torch.float32).to(CUDA)
        want, terms, _ = uncancelled(call)
        assert torch.get_float32_matmul_precision() == "highest"
        assert_matches(call)
        torch.set_float32_matmul_precision("high")
        coarse = call.run("triton")
        torch.set_float32_matmul_precision("highest")
        for name, a, b, term in zip(call.names, coarse, want, terms, strict=True):
            # TF32 keeps 10 bits of a factor
            assert_at_most(largest(a - b), call.terms**0.5 * 2.0**-11 * max(largest(b), largest(term)), name)
        if torch.cuda.get_device_capability() >= (8, 0):
            exact = call.run("triton")
            assert any(not torch.equal(a, b) for a, b in zip(coarse, exact, strict=True))


# --- graphs and streams -----------------------------------------------------------------------------------------------

Step = Callable[[], list[Tensor]]


def local_step(pattern: Pattern, kind: str) -> tuple[list[Tensor], Step]:
    """Inputs, and what makes the output and all gradients of them."""
    case = make_case(pattern, 14, 15, kind, batch=2, heads=2, head_dim=32, packed=True, dtype=torch.bfloat16).to(CUDA)
    leaves = [t.requires_grad_() for t in case.leaves]

    def step() -> list[Tensor]:
        bias = {0: None, 1: leaves[-1], 2: tuple(leaves[-2:])}[case.biases]
        out = local_attention(leaves[0], None, None, pattern, bias=bias, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, case.grad)]

    return leaves, step


def routed_step(pad: str, topk: int) -> tuple[list[Tensor], Step]:
    leaves = [torch.randn(2, 14, 15, 3, 2, 32, device=CUDA, dtype=torch.bfloat16, requires_grad=True)]

    def step() -> list[Tensor]:
        out = routing_attention(leaves[0], None, None, None, topk, region_size=4, pad=pad, backend="triton")  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return leaves, step


STEPS: dict[str, Callable[[], tuple[list[Tensor], Step]]] = {
    "window": lambda: local_step(Window(7, 3), "table"),
    "neighborhood": lambda: local_step(Neighborhood(7), "table"),
    "halo": lambda: local_step(Halo(4, 2), "decomposed"),
    "hilbert window": lambda: local_step(HilbertWindow(49), "positions"),
    "hilbert neighborhood": lambda: local_step(HilbertNeighborhood(25), "positions"),
    "dilated, no bias": lambda: local_step(Neighborhood(3, 2), "none"),
    "routing by lists": lambda: routed_step("zero", 3),
    "routing by bits": lambda: routed_step("clip", 12),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_captured_graph_replays_both_passes_on_new_inputs(name: str) -> None:
    leaves, step = STEPS[name]()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and schedules made before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for t in leaves:
                t.normal_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device is an error inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits_for_the_device(name: str) -> None:
    _, step = STEPS[name]()
    step()
    with no_waiting():
        step()


@pytest.mark.parametrize("name", ["window", "neighborhood", "routing by lists"])
def test_another_stream_gives_the_same_result(name: str) -> None:
    _, step = STEPS[name]()
    want = [t.clone() for t in step()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_run_there() -> None:
    for pattern in (Window(7), Neighborhood(7)):
        case = make_case(pattern, 14, 15, "table", packed=True, dtype=torch.bfloat16)
        assert torch.cuda.current_device() == 0
        want = case.to(torch.device("cuda:0")).run("triton")
        got = case.to(torch.device("cuda:1")).run("triton")
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


# --- models -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two blocks of packed attention with learned tables."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.window = nn.Parameter(torch.randn(2, 13, 13) * 0.1)
        self.near = nn.Parameter(torch.randn(2, 13, 13) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        for pattern, table in ((Window(7, 3), self.window), (Neighborhood(7), self.near)):
            qkv = self.qkv(x).unflatten(-1, (3, 2, -1))
            x = x + self.proj(local_attention(qkv, None, None, pattern, bias=table).flatten(3))
        return x


def step_of(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), parameters)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_computes_what_the_eager_one_does(mode: str) -> None:
    torch.compiler.reset()
    model = Small().to(CUDA)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    parameters = list(model.parameters())
    for _ in range(3):
        x = torch.randn(4, 14, 15, 64, device=CUDA)
        got = [t.clone() for t in step_of(compiled, x, parameters)]
        for have, want in zip(got, step_of(model, x, parameters), strict=True):
            assert_at_most(largest(have - want), 1e-4 * largest(want), "difference to the eager step")
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mixed_precision_training_lowers_the_loss_as_on_the_reference(dtype: torch.dtype) -> None:
    """autocast, and GradScaler where float16 needs it: losses of both backends stay together."""
    x = torch.randn(4, 14, 15, 64, device=CUDA)
    losses: dict[str, list[float]] = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(3)
        model = Small().to(CUDA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
        losses[backend] = []
        for _ in range(12):
            with torch.autocast("cuda", dtype=dtype), nearfield.ops.use_backend(backend):
                loss = (model(x).float() - 1.0).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[backend].append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    first, last = losses["triton"][0], losses["triton"][-1]
    assert last < 0.7 * first
    for ours, stock in zip(losses["triton"], losses["torch"], strict=True):
        assert abs(ours - stock) <= 4 * torch.finfo(torch.bfloat16).eps * stock


@pytest.mark.parametrize("name", ["nat_nano", "swin_nano", "dinat_nano"])
def test_models_take_the_kernels_by_themselves(name: str) -> None:
    model = nearfield.create_model(name, num_classes=5).to(CUDA).eval()
    image = torch.randn(8, 3, 32, 32, device=CUDA)
    with torch.no_grad():
        got = model(image)
        with nearfield.ops.use_backend("triton"):
            assert torch.equal(got, model(image))
        with nearfield.ops.use_backend("reference"):
            torch.testing.assert_close(got, model(image), rtol=1e-3, atol=1e-4)


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def needs(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free:.0f}")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Window(7, 3), Neighborhood(7)], ids=str)
def test_a_batch_of_more_than_two_billion_elements(pattern: Pattern) -> None:
    """Its first and its last image come out as they do alone."""
    needs(60)
    batch, size, heads, d = 1200, 56, 8, 32
    qkv = torch.empty(batch, size, size, 3, heads, d, dtype=torch.bfloat16, device=CUDA)
    assert qkv.numel() > 1 << 31
    for part in qkv.split(100):
        part.normal_()
    table = torch.randn(heads, 13, 13, device=CUDA)
    assert_parts_come_out_as_they_do_alone(qkv, pattern, table, [slice(0, 1), slice(-1, None)])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Window(7), Neighborhood(3)], ids=str)
def test_a_map_of_more_than_two_billion_elements(pattern: Pattern) -> None:
    """Offsets inside an image need 64 bits: a map of 4096 x 2048 and one of its last rows alone.

    Heights and rows are multiples of a tile's or a window's: blocks then begin at the same rows in both.
    """
    needs(60)
    height, rows = (4095, 42) if isinstance(pattern, Window) else (4096, 64)
    qkv = torch.empty(1, height, 2044, 3, 3, 32, dtype=torch.bfloat16, device=CUDA)
    assert qkv.numel() > 1 << 31
    for part in qkv.split(256, dim=1):
        part.normal_()
    leaf = qkv.requires_grad_()
    out = local_attention(leaf, None, None, pattern, backend="triton")
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    corner = qkv[:, -rows:].detach().clone().requires_grad_()
    want = local_attention(corner, None, None, pattern, backend="triton")
    (want_gradient,) = torch.autograd.grad(want, corner, torch.ones_like(want))
    inner = slice(-rows // 2, None)  # where the cut is not felt
    torch.testing.assert_close(out[:, inner], want[:, inner])
    torch.testing.assert_close(gradient[:, inner], want_gradient[:, inner])


def assert_parts_come_out_as_they_do_alone(qkv: Tensor, pattern: Pattern, table: Tensor, parts: list[slice]) -> None:
    leaf = qkv.requires_grad_()
    out = local_attention(leaf, None, None, pattern, bias=table, backend="triton")
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    for part in parts:
        alone = qkv[part].detach().clone().requires_grad_()
        want = local_attention(alone, None, None, pattern, bias=table, backend="triton")
        (want_gradient,) = torch.autograd.grad(want, alone, torch.ones_like(want))
        assert torch.equal(out[part], want)
        assert torch.equal(gradient[part], want_gradient)


@pytest.mark.slow
def test_a_routed_batch_of_more_than_two_billion_elements() -> None:
    needs(60)
    qkv = torch.empty(1200, 56, 56, 3, 8, 32, dtype=torch.bfloat16, device=CUDA)
    for part in qkv.split(100):
        part.normal_()
    with torch.no_grad():
        out = routing_attention(qkv, None, None, 7, 4, backend="triton")
        for part in (slice(0, 1), slice(-1, None)):
            assert torch.equal(out[part], routing_attention(qkv[part], None, None, 7, 4, backend="triton"))
