"""The operators as PyTorch sees them, and as a caller sees them: compile, export, FLOPs, dropout, backends, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nearfield.ops.attention as attention
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
    Window,
    grid_attention,
    halo_attention,
    hilbert_neighborhood_attention,
    hilbert_window_attention,
    local_attention,
    neighborhood_attention,
    routing_attention,
    use_backend,
    window_attention,
)
from ops_helpers import (
    CPU_BACKENDS,
    OP_KINDS,
    OPS,
    axis_keys,
    backward_arguments,
    bias_shapes,
    forward_arguments,
    make_case,
    routing_arguments,
    routing_backward_arguments,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pattern", "kind"), OP_KINDS, ids=str)
def test_local_attention_passes_opcheck(pattern: Pattern, kind: str, packed: bool) -> None:
    torch.library.opcheck(OPS.local_attention.default, forward_arguments(pattern, kind, packed))


def test_local_attention_without_gradients_or_with_dropout_passes_opcheck() -> None:
    torch.library.opcheck(OPS.local_attention.default, forward_arguments(Window(3), "table", True, training=False))
    torch.library.opcheck(OPS.local_attention.default, forward_arguments(Neighborhood(3), "table", False, p=0.3))


@pytest.mark.parametrize("bias_needs_grad", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pattern", "kind"), OP_KINDS, ids=str)
def test_local_attention_backward_passes_opcheck(
    pattern: Pattern, kind: str, packed: bool, bias_needs_grad: bool
) -> None:
    call = backward_arguments(pattern, kind, packed, bias_needs_grad)
    torch.library.opcheck(OPS.local_attention_backward.default, call)


@pytest.mark.parametrize("kind", ["table", "positions", "decomposed"])
def test_backward_gives_each_gradient_the_dtype_of_its_input(kind: str) -> None:
    """Autograd would cast silently; compiled graphs believe the fake."""
    pattern = HilbertWindow(5) if kind == "positions" else Halo(2, 1)
    for dtype, bias_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        case = make_case(pattern, 4, 5, kind, dtype=dtype, bias_dtype=bias_dtype)
        inputs = (*case.leaves, None)[:5]
        out, lse = OPS.local_attention(*inputs, None, repr(pattern), 0.5, 0.0, True, "torch")
        gradients = OPS.local_attention_backward(
            case.grad, *inputs, None, out, lse, repr(pattern), 0.5, 0.0, True, "torch"
        )
        for gradient, leaf in zip(gradients, case.leaves, strict=False):
            assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)


@pytest.mark.parametrize("zero_pad", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_routing_attention_passes_opcheck(packed: bool, zero_pad: bool) -> None:
    torch.library.opcheck(OPS.routing_attention.default, routing_arguments(packed, zero_pad))
    torch.library.opcheck(OPS.routing_attention.default, routing_arguments(packed, zero_pad, p=0.2))


@pytest.mark.parametrize("packed", [False, True])
def test_routing_attention_backward_passes_opcheck(packed: bool) -> None:
    torch.library.opcheck(OPS.routing_attention_backward.default, routing_backward_arguments(packed, False))


def test_fake_outputs_have_the_strides_of_real_ones() -> None:
    """Of a map that is one tile, too, and where v has another head_dim."""
    for pattern in (Full(), Window(2), Neighborhood(3), HilbertWindow(4)):
        for dv in (4, 8, 16):
            for training in (False, True):
                q, v = torch.randn(2, 4, 4, 2, 8), torch.randn(2, 4, 4, 2, dv)
                call = (None, None, None, repr(pattern), 0.5, 0.0, training, "torch")
                real = OPS.local_attention(q, q, v, *call)
                with FakeTensorMode() as mode:
                    fq, fv = mode.from_tensor(q), mode.from_tensor(v)
                    fake = OPS.local_attention(fq, fq, fv, *call)
                for a, b in zip(real, fake, strict=True):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype)
                    assert a.stride() == b.stride(), (pattern, dv, training)


# --- compile, export, checkpoint --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A projection, packed attention with a learned bias, a projection."""

    def __init__(self, pattern: Pattern, kind: str, size: tuple[int, int], dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.pattern, self.heads = pattern, heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        shapes = bias_shapes(pattern, *size, heads, dim // heads, kind)
        self.bias = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        bias = None if len(self.bias) == 0 else self.bias[0] if len(self.bias) == 1 else (self.bias[0], self.bias[1])
        return self.proj(local_attention(qkv, None, None, self.pattern, bias=bias).flatten(3))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("pattern", "kind"), OP_KINDS, ids=str)
def test_compiled_whole_equals_eager_in_both_passes(pattern: Pattern, kind: str) -> None:
    model = Block(pattern, kind, (5, 6))
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = gradients(model, x, list(model.parameters()))
    torch.testing.assert_close(gradients(compiled, x, list(model.parameters())), want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_calls_of_every_public_function_equal_eager() -> None:
    q = torch.randn(1, 6, 6, 2, 4, requires_grad=True)

    def call(q: Tensor) -> Tensor:
        return (
            neighborhood_attention(q, q, q, 3, dilation=2)
            + window_attention(q, q, q, (2, 3), shift=1)
            + grid_attention(q, q, q, 3)
            + halo_attention(q, q, q, 3, 1, pad="clip")
            + hilbert_window_attention(q, q, q, 9, shift=4)
            + hilbert_neighborhood_attention(q, q, q, 5)
            + routing_attention(q, q, q, 3, 2)
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, q, []), gradients(call, q, []))


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_with_dynamic_sizes_equals_eager() -> None:
    model = Block(Neighborhood(3), "table", (5, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 5, 6, 8), (3, 7, 9, 8), (1, 4, 11, 8)):
        x = torch.randn(size, requires_grad=True)
        want = gradients(model, x, list(model.parameters()))
        torch.testing.assert_close(gradients(compiled, x, list(model.parameters())), want)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_dropout_keeps_forward_and_backward_together() -> None:
    def call(q: Tensor) -> Tensor:
        return local_attention(q, q, q, Window(3), dropout_p=0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 3, 3, 1, 4, requires_grad=True)
    # with all scores equal, out = dropped weights times v, linear in v: <g, out> = <grad of v, v>
    zero = torch.zeros_like(q)
    both = torch.compile(
        lambda v: local_attention(zero, zero, v, Window(3), dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    out = both(q)
    grad = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, q, grad)
    torch.testing.assert_close((gradient * q).sum(), (grad * out).sum())
    assert not torch.equal(compiled(q), compiled(q))  # drawn anew in each call


class Neighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4))
        return neighborhood_attention(qkv, None, None, 3, dilation=2, bias=self.bias).flatten(3)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("evaluation", [True, False])
def test_export_keeps_the_operator_and_its_result(evaluation: bool) -> None:
    model = Neighbours().requires_grad_(not evaluation)
    x = torch.randn(2, 6, 7, 8)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes]
    assert OPS.local_attention.default in targets
    for batch_size in (2, 5):
        x = torch.randn(batch_size, 6, 7, 8)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointed_gradients_are_the_plain_ones(dropout_p: float, use_reentrant: bool) -> None:
    table = torch.randn(2, 5, 5, requires_grad=True)
    q = torch.randn(1, 6, 6, 3, 2, 4, requires_grad=True)

    def call(q: Tensor) -> Tensor:
        return local_attention(q, None, None, Neighborhood(3), bias=table, dropout_p=dropout_p)

    runs = []
    for run in (call, lambda t: checkpoint(call, t, use_reentrant=use_reentrant)):
        q.grad = table.grad = None
        torch.manual_seed(3)
        out = run(q)
        out.square().sum().backward()
        runs.append((out.detach(), q.grad, table.grad))
    torch.testing.assert_close(runs[1], runs[0])


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [Neighborhood(3, 2), Window(4, 1), Full(), Halo(4, 1), Halo(3, 2, "clip"), HilbertWindow(16, 4),
     HilbertSlide(7), Axes(Full(), Window(3))],
    ids=str,
)  # fmt: skip
def test_flops_are_those_of_the_scores_asked_for(pattern: Pattern, packed: bool) -> None:
    B, H, W, heads, d, dv = 2, 7, 9, 3, 4, 4 if packed else 6
    if pattern.curve:
        pairs = sum(map(len, axis_keys(pattern, 0, H * W)))
    else:
        pairs = sum(map(len, axis_keys(pattern, 0, H))) * sum(map(len, axis_keys(pattern, 1, W)))
    useful = 2 * B * heads * pairs * (d + dv)  # a multiply-add is two
    if packed:
        qkv = torch.randn(B, H, W, 3, heads, d, requires_grad=True)
        inputs: tuple = (qkv, None, None)
    else:
        inputs = tuple(torch.randn(B, H, W, heads, c, requires_grad=True) for c in (d, d, dv))
    with FlopCounterMode(display=False) as forward:
        out = local_attention(*inputs, pattern)
    assert forward.get_total_flops() == useful
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # scores again, dP, dV, dQ, dK: three products over d, two over d_v
    assert backward.get_total_flops() == 2 * B * heads * pairs * (3 * d + 2 * dv)


def test_flops_of_a_halo_on_a_smaller_query_map() -> None:
    q, k = torch.randn(1, 4, 6, 2, 8), torch.randn(1, 8, 12, 2, 8)
    with FlopCounterMode(display=False) as counter:
        halo_attention(q, k, k, 4, 1)
    assert counter.get_total_flops() == 2 * 2 * (4 * 6) * 36 * (8 + 8)


@pytest.mark.parametrize("packed", [False, True])
def test_flops_of_routing_are_those_of_the_routed_regions(packed: bool) -> None:
    B, H, W, heads, d, topk = 2, 8, 12, 2, 4, 3
    q = torch.randn(B, H, W, 3, heads, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = routing_attention(*((q, None, None) if packed else q.unbind(3)), 4, topk)
    by_op = counter.get_flop_counts()["Global"]
    want = 2 * B * heads * (H * W) * (topk * 2 * 3) * 2 * d
    assert by_op[OPS.routing_attention] == want
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_flop_counts()["Global"][OPS.routing_attention_backward] == want * 5 // 2


# --- dropout ----------------------------------------------------------------------------------------------------------

Call = Callable[..., Tensor]


def _local(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return local_attention(q, k, v, Neighborhood(3), **kwargs)


def _routed(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return routing_attention(q, k, v, None, 2, region_size=3, **kwargs)


DROPPING = pytest.mark.parametrize("call", [_local, _routed], ids=["local", "routing"])
EVERY_BACKEND = pytest.mark.parametrize("backend", CPU_BACKENDS)


@DROPPING
@EVERY_BACKEND
def test_dropout_zeroes_a_share_of_the_weights_and_scales_the_others(call: Call, backend: str) -> None:
    """Values are one-hot, so the output of a query is its weights."""
    H, W, p = 8, 9, 0.3
    q, k = torch.randn(2, 2, H, W, 3, 4, dtype=torch.float64)
    v = torch.eye(H * W, dtype=torch.float64).view(1, H, W, 1, H * W).expand(2, H, W, 3, H * W)
    weights = call(q, k, v, backend=backend)
    dropped = call(q, k, v, backend=backend, dropout_p=p)
    seen = weights > 0
    lost = seen & (dropped == 0)
    torch.testing.assert_close(dropped, torch.where(lost, 0.0, weights / (1 - p)))
    n = int(seen.sum())
    assert abs(int(lost.sum()) - p * n) < 5 * (n * p * (1 - p)) ** 0.5
    # heads and images have masks of their own
    assert not torch.equal(lost[:, :, :, 0], lost[:, :, :, 1])
    assert not torch.equal(lost[0], lost[1])


@DROPPING
@EVERY_BACKEND
def test_dropout_keeps_the_expectation(call: Call, backend: str) -> None:
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)
    want = call(q, k, v, backend=backend)
    runs = torch.stack([call(q, k, v, backend=backend, dropout_p=0.4) for _ in range(400)])
    deviation = runs.std(0) / 400**0.5
    assert ((runs.mean(0) - want).abs() < 6 * deviation + 1e-6).all()
    assert runs.std(0).min() > 0


@DROPPING
@EVERY_BACKEND
def test_dropout_follows_pytorchs_generator(call: Call, backend: str) -> None:
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(q, k, v, backend=backend, dropout_p=0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    assert not torch.equal(call(q, k, v, backend=backend, dropout_p=0.5), call(q, k, v, backend=backend, dropout_p=0.5))


@DROPPING
def test_no_dropout_draws_nothing_from_the_generator(call: Call) -> None:
    q = torch.randn(1, 6, 6, 2, 4)
    before = torch.get_rng_state()
    call(q, q, q)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [(Window(2), "table"), (Neighborhood(2), "none"), (Halo(2, 1), "decomposed"), (HilbertWindow(4, 1), "positions")],
    ids=str,
)
@EVERY_BACKEND
def test_dropout_gradients_belong_to_the_masks_of_the_forward_pass(pattern: Pattern, kind: str, backend: str) -> None:
    case = make_case(pattern, 3, 3, kind, heads=2, head_dim=1)

    def call(*leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        bias = {0: None, 1: leaves[-1], 2: leaves[3:]}[case.biases]
        return local_attention(*leaves[:3], pattern, bias=bias, dropout_p=0.4, backend=backend)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in case.leaves])


@pytest.mark.usefixtures("tiny_blocks")
def test_dropout_gradients_belong_to_the_masks_of_many_blocks() -> None:
    test_dropout_gradients_belong_to_the_masks_of_the_forward_pass(Neighborhood(2), "table", "torch")
    test_dropout_gradients_belong_to_the_masks_of_the_forward_pass(HilbertWindow(4, 1), "positions", "torch")


@pytest.mark.parametrize("pad", ["zero", "clip"])
@EVERY_BACKEND
def test_routed_dropout_gradients_belong_to_the_masks_of_the_forward_pass(pad: str, backend: str) -> None:
    leaves = [torch.randn(1, 3, 3, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return routing_attention(*leaves, None, 2, region_size=2, pad=pad, dropout_p=0.4, backend=backend)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_out_of_range_is_refused(p: float) -> None:
    q = torch.randn(1, 4, 4, 1, 4)
    with pytest.raises(ValueError, match=r"dropout_p=.* must lie in \[0, 1\)") as caught:
        local_attention(q, q, q, Window(2), dropout_p=p)
    assert f"dropout_p={p}" in str(caught.value)


# --- choice of backend ------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Says which backend a call ran on."""
    monkeypatch.delenv("NEARFIELD_BACKEND", raising=False)
    used: list[str] = []
    real, real_routing = attention.reference_attention, attention.reference_routing

    def spy(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: (used.append("reference"), f(*args))[1]

    monkeypatch.setattr(attention, "reference_attention", spy(real))
    monkeypatch.setattr(attention, "reference_routing", spy(real_routing))
    q = torch.randn(1, 4, 4, 1, 4)

    def call(**kwargs: Any) -> str:
        used.clear()
        local_attention(q, q, q, Window(2), **kwargs)
        local = used == ["reference"]
        used.clear()
        routing_attention(q, q, q, 2, 1, **kwargs)
        assert (used == ["reference"]) == local
        return "reference" if local else "torch"

    return call


def test_the_torch_backend_is_the_default(ran: Callable[..., str]) -> None:
    assert ran() == "torch"
    assert ran(backend=None) == "torch"


def test_the_argument_beats_the_context_beats_the_environment(
    ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFIELD_BACKEND", "reference")
    assert ran() == "reference"
    assert ran(backend="torch") == "torch"
    with use_backend("torch"):
        assert ran() == "torch"
        assert ran(backend="reference") == "reference"
        with use_backend("reference"):
            assert ran() == "reference"
        assert ran() == "torch"
        with use_backend(None):
            assert ran() == "reference"  # the environment again
    assert ran() == "reference"
    monkeypatch.setenv("NEARFIELD_BACKEND", "")
    assert ran() == "torch"


def test_the_context_ends_with_an_error_in_it(ran: Callable[..., str]) -> None:
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert ran() == "torch"


@pytest.mark.parametrize("name", ["cuda", "Torch", "Triton", ""])
def test_an_unknown_backend_is_refused_and_never_replaced(
    name: str, ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"unknown backend '{name}': choose one of reference, torch"
    with pytest.raises(ValueError, match=said):
        ran(backend=name)
    with pytest.raises(ValueError, match=said), use_backend(name):
        pass
    assert ran() == "torch"
    if name:
        monkeypatch.setenv("NEARFIELD_BACKEND", name)
        with pytest.raises(ValueError, match=said):
            ran()


# --- choice of backend while tracing ----------------------------------------------------------------------------------


class Both(nn.Module):
    """A static pattern with a bias, and routing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = local_attention(q, k, v, Neighborhood(3), bias=table)
        return out + routing_attention(q, k, v, None, 2, region_size=3)


Inputs = tuple[Tensor, ...]


def traced(call: Callable[..., Tensor], inputs: Inputs) -> torch.fx.Graph:
    return make_fx(call)(*inputs).graph


def compiled(call: Callable[..., Tensor], inputs: Inputs) -> torch.fx.Graph:
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch.compile(call, fullgraph=True, backend=keep, dynamic=True)(*inputs)
    (graph,) = graphs
    return graph


def exported(call: Callable[..., Tensor], inputs: Inputs) -> torch.fx.Graph:
    batch = {0: torch.export.Dim("batch", min=1, max=16)}
    graph = torch.export.export(call, inputs, dynamic_shapes=(batch, batch, batch, None)).graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    assert not isinstance(first.meta["val"].shape[0], int)  # a symbol
    return graph


def backends_in(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    """Name and last argument of every operator of ours."""
    calls = [(str(node.target).split("."), node.args) for node in graph.nodes if node.op == "call_function"]
    return [(name[1], args[-1]) for name, args in calls if name[0] == "nearfield"]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "backend"),
    [
        ("cuda", torch.bfloat16, 32, "triton"),
        ("cuda", torch.float32, 128, "triton"),
        ("cuda", torch.float64, 32, "torch"),
        ("cuda", torch.float16, 136, "torch"),
        ("cpu", torch.float32, 32, "torch"),
    ],
)
@pytest.mark.parametrize("trace", [traced, compiled, exported])
def test_tracing_chooses_triton_for_the_cuda_tensors_that_it_takes(
    trace: Callable[[Callable[..., Tensor], Inputs], torch.fx.Graph],
    device: str, dtype: torch.dtype, head_dim: int, backend: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On tensors that nobody computes: the machine that traces needs no GPU, and no Triton."""
    monkeypatch.delenv("NEARFIELD_BACKEND", raising=False)
    monkeypatch.setattr(attention, "_HAS_TRITON", True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        q, k, v = (torch.empty(2, 6, 7, 2, head_dim, dtype=dtype, device=device) for _ in range(3))
        inputs = (q, k, v, torch.empty(2, 5, 5, device=device))
        graph = trace(Both(), inputs)
    assert backends_in(graph) == [("local_attention", backend), ("routing_attention", backend)]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("major", "backend"), [(7, "torch"), (8, "triton"), (9, "triton")])
def test_gpus_older_than_ampere_keep_the_torch_backend(
    major: int, backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from torch._dynamo import utils

    monkeypatch.delenv("NEARFIELD_BACKEND", raising=False)
    monkeypatch.setattr(attention, "_HAS_TRITON", True)
    # What torch.cuda.get_device_properties asks, and what torch.compile takes for a constant.
    for name, value in (("_initialized", True), ("_lazy_init", lambda: None), ("device_count", lambda: 1)):
        monkeypatch.setattr(torch.cuda, name, value)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda device: properties, raising=False)
    utils.common_constant_types.add(SimpleNamespace)
    request.addfinalizer(lambda: utils.common_constant_types.discard(SimpleNamespace))
    with FakeTensorMode(shape_env=ShapeEnv()):
        q, k, v = (torch.empty(2, 6, 7, 2, 32, device="cuda:0") for _ in range(3))
        graph = compiled(Both(), (q, k, v, torch.empty(2, 5, 5, device="cuda:0")))
        if backend == "torch":
            with pytest.raises(ValueError, match=r"capability 8\.0 or newer, which cuda:0 has not"):
                local_attention(q, k, v, Window(3), backend="triton")
    assert backends_in(graph) == [("local_attention", backend), ("routing_attention", backend)]


# --- public functions -------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_every_function_is_its_pattern(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 6, 8, 2, 4)
    options: dict[str, Any] = {"scale": 0.7, "backend": backend}

    def table(y: int, x: int) -> Tensor:
        return torch.randn(2, 2 * y - 1, 2 * x - 1)

    t, rel = table(3, 3), (torch.randn(11, 4), torch.randn(11, 4))
    pairs = [
        (neighborhood_attention(q, k, v, 3, dilation=2, stride=2, bias=t, **options), Neighborhood(3, 2, 2), t),
        (window_attention(q, k, v, 3, shift=1, bias=t, **options), Window(3, 1), t),
        (grid_attention(q, k, v, 3, bias=t, **options), Grid(3), t),
        (halo_attention(q, k, v, 2, 2, rel=rel, **options), Halo(2, 2), rel),
        (halo_attention(q, k, v, 2, 2, rel=rel, pad="clip", **options), Halo(2, 2, "clip"), rel),
    ]
    by_place, along = table(6, 8), torch.randn(2, 17)
    pairs += [
        (hilbert_window_attention(q, k, v, 9, shift=4, bias=by_place, **options), HilbertWindow(9, 4), by_place),
        (hilbert_neighborhood_attention(q, k, v, 9, bias=along, **options), HilbertNeighborhood(9), along),
    ]
    for got, pattern, bias in pairs:
        torch.testing.assert_close(got, local_attention(q, k, v, pattern, bias=bias, **options), rtol=0, atol=0)


@pytest.mark.parametrize("stride", [1, 2, 4, (2, 1), (1, 4)])
def test_halo_attention_reads_the_query_stride_off_the_shapes(stride: Any) -> None:
    sy, sx = (stride, stride) if isinstance(stride, int) else stride
    for H, W in ((8, 12), (9, 13), (7, 5)):
        q, k = torch.randn(1, -(-H // sy), -(-W // sx), 1, 4), torch.randn(1, H, W, 1, 4)
        got = halo_attention(q, k, k, 4, 1)
        want = local_attention(q, k, k, Halo(4, 1, "zero", (sy, sx)), backend="reference")
        torch.testing.assert_close(got, want)


def test_a_list_of_two_tables_is_a_pair() -> None:
    q, rel = torch.randn(1, 4, 4, 1, 4), [torch.randn(7, 4), torch.randn(7, 4)]
    want = local_attention(q, q, q, Halo(2, 1), bias=(rel[0], rel[1]))
    torch.testing.assert_close(local_attention(q, q, q, Halo(2, 1), bias=rel), want)  # type: ignore[arg-type]


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD = (1, 4, 4, 2, 8)
WRONG: list[tuple[tuple, dict, list[str]]] = [
    ((x(*GOOD), x(*GOOD), x(*GOOD), 7), {}, ["pattern", "Neighborhood(7)", "got 7"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), "Window(2)"), {}, ["pattern", "got 'Window(2)'"]),
    ((x(*GOOD, dtype=torch.int64), x(*GOOD), x(*GOOD), Window(2)), {}, ["q", "floating point", "torch.int64"]),
    ((x(*GOOD), x(*GOOD), None, Window(2)), {}, ["both k and v", "(B, H, W, 3, heads, head_dim)"]),
    ((x(*GOOD), None, x(*GOOD), Window(2)), {}, ["both k and v"]),
    ((x(*GOOD), None, None, Window(2)), {}, ["packed q", "(B, H, W, 3, heads, head_dim)", "got (1, 4, 4, 2, 8)"]),
    ((x(1, 4, 4, 2, 2, 8), None, None, Window(2)), {}, ["packed q", "got (1, 4, 4, 2, 2, 8)"]),
    ((x(1, 4, 4, 3, 2, 8), None, None, Halo(2, 1, stride=2)), {}, ["Halo", "smaller map", "apart, not packed"]),
    ((x(4, 4, 2, 8), x(*GOOD), x(*GOOD), Window(2)), {}, ["(B, H, W, heads, head_dim)", "(4, 4, 2, 8)"]),
    ((x(*GOOD), x(1, 16, 2, 8), x(*GOOD), Window(2)), {}, ["(B, H, W, heads, head_dim)", "(1, 16, 2, 8)"]),
    ((x(1, 4, 4, 3, 2, 8), x(*GOOD), x(*GOOD), Window(2)), {}, ["(B, H, W, heads, head_dim)", "(1, 4, 4, 3, 2, 8)"]),
    ((x(2, 4, 4, 2, 8), x(*GOOD), x(*GOOD), Window(2)), {}, ["agree in batch", "(2, 4, 4, 2, 8)"]),
    ((x(1, 4, 4, 1, 8), x(*GOOD), x(*GOOD), Window(2)), {}, ["heads", "(1, 4, 4, 1, 8)"]),
    ((x(1, 4, 4, 2, 4), x(*GOOD), x(*GOOD), Window(2)), {}, ["head_dim", "(1, 4, 4, 2, 4)"]),
    ((x(*GOOD), x(*GOOD), x(1, 4, 5, 2, 8), Window(2)), {}, ["k and v in size", "(1, 4, 5, 2, 8)"]),
    ((x(*GOOD), x(1, 4, 5, 2, 8), x(1, 4, 5, 2, 8), Window(2)), {}, ["Window", "query map of 4x5", "got 4x4"]),
    ((x(*GOOD), x(1, 8, 9, 2, 8), x(1, 8, 9, 2, 8), Halo(2, 1, stride=2)), {}, ["Halo", "4x5", "8x9", "got 4x4"]),
    ((x(*GOOD), x(*GOOD, dtype=torch.float64), x(*GOOD), Window(2)), {}, ["one dtype", "torch.float64"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Neighborhood(5)), {}, ["feature map 4x4", "kernel_size 5", "<= 4"]),
    ((x(1, 0, 4, 2, 8), x(1, 0, 4, 2, 8), x(1, 0, 4, 2, 8), Window(2)), {}, ["0x4", "at least 1"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Window(2)), {"bias": x(2, 2, 2)}, ["bias", "Window", "(2, 3, 3)", "got (2, 2, 2)"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Window(2)), {"bias": x(1, 3, 3)}, ["(2, 3, 3)", "got (1, 3, 3)"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Window(2)), {"bias": (x(3, 8),)}, ["bias", "pair"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Window(2)), {"bias": (x(3, 8), x(3, 8), x(3, 8))}, ["bias", "pair"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), Window(2)), {"bias": (x(3, 4), x(3, 8))}, ["(3, 8), (3, 8)", "(3, 4)"]),
    ((x(*GOOD), x(*GOOD), x(*GOOD), HilbertWindow(4)), {"bias": x(2, 5, 5)}, ["4x4", "(2, 7)", "(2, 7, 7)", "got"]),
]  # fmt: skip


@EVERY_BACKEND
@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_inputs_are_refused_with_what_is_allowed(number: int, backend: str) -> None:
    arguments, options, said = WRONG[number]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages are compared below
        local_attention(*arguments, **options, backend=backend)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@EVERY_BACKEND
def test_a_map_smaller_than_the_kernel_says_what_to_do(backend: str) -> None:
    q = torch.randn(1, 5, 9, 2, 8)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the whole message is compared
        neighborhood_attention(q, q, q, 7, backend=backend)
    assert str(caught.value) == (
        "feature map 5x9 is smaller than kernel_size 7: use a larger image or kernel_size <= 5"
    )
