"""The kernels behind the registered operators: opcheck, fake tensors, compile, export, checkpoints, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_helpers import SLOW_ON_GPU, everywhere
from nearfield.ops import Full, Halo, HilbertWindow, Neighborhood, Pattern, Window, local_attention, routing_attention
from ops_helpers import (
    OP_KINDS,
    OPS,
    backward_arguments,
    bias_shapes,
    detached,
    forward_arguments,
    make_case,
    routing_arguments,
    routing_backward_arguments,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def moved(arguments: tuple, device: torch.device) -> tuple:
    return tuple(
        t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in arguments
    )


# Every kind packed and apart, one of the two in training only.
CALLS = [
    (*case, packed, packed == (i % 2 == 0) or i > 2) for i, case in enumerate(OP_KINDS) for packed in (False, True)
]


@everywhere("pattern, kind, packed, training", CALLS, fast=(2, 3, 4), fast_on_gpu=(3,))
def test_local_attention_passes_opcheck(
    device: torch.device, pattern: Pattern, kind: str, packed: bool, training: bool
) -> None:
    arguments = forward_arguments(pattern, kind, packed, training=training, backend="triton")
    torch.library.opcheck(OPS.local_attention.default, moved(arguments, device))


@everywhere("pattern, kind, packed, bias_needs_grad", CALLS, fast=(1, 5), fast_on_gpu=(3,))
def test_local_attention_backward_passes_opcheck(
    device: torch.device, pattern: Pattern, kind: str, packed: bool, bias_needs_grad: bool
) -> None:
    # on the CPU the torch backend makes the outputs, on any machine
    arguments = backward_arguments(pattern, kind, packed, bias_needs_grad, backend="torch")[:-1]
    torch.library.opcheck(OPS.local_attention_backward.default, moved((*arguments, "triton"), device))


@everywhere("packed, zero_pad", [(False, False), (True, True)], fast=(0,), fast_on_gpu=(1,))
def test_routing_attention_passes_opcheck(device: torch.device, packed: bool, zero_pad: bool) -> None:
    arguments = routing_arguments(packed, zero_pad, backend="triton")
    torch.library.opcheck(OPS.routing_attention.default, moved(arguments, device))
    arguments = routing_backward_arguments(packed, zero_pad, backend="torch")[:-1]
    torch.library.opcheck(OPS.routing_attention_backward.default, moved((*arguments, "triton"), device))


@SLOW_ON_GPU
def test_fake_outputs_have_the_sizes_and_strides_of_real_ones(device: torch.device) -> None:
    for pattern, kind in OP_KINDS[1:5]:
        for training in (False, True):
            arguments = detached(forward_arguments(pattern, kind, False, training=training, backend="triton"))
            assert_fakes_look_real(OPS.local_attention, moved(arguments, device))
        arguments = backward_arguments(pattern, kind, True, True, backend="torch")[:-1]
        assert_fakes_look_real(OPS.local_attention_backward, moved((*arguments, "triton"), device))


def assert_fakes_look_real(op: Callable[..., tuple[Tensor, ...]], arguments: tuple) -> None:
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
    for a, b in zip(real, fakes, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


# --- compile, export, checkpoint --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A projection, packed attention with a learned bias, routed attention, a projection."""

    def __init__(self, pattern: Pattern, kind: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.pattern = pattern
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in bias_shapes(pattern, *size, 2, 8, kind)])

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8))
        bias = None if len(self.bias) == 0 else self.bias[0] if len(self.bias) == 1 else (self.bias[0], self.bias[1])
        out = local_attention(qkv, None, None, self.pattern, bias=bias)
        out = out + routing_attention(qkv, None, None, None, 2, region_size=3)
        return self.proj(out.flatten(3))


KINDS = [(Window(3, 1), "table"), (Neighborhood(3), "table"), (Halo(3, 1), "decomposed"), (HilbertWindow(5), "none")]


@pytest.fixture
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before; the environment names the backend, as it does for other people's models."""
    monkeypatch.setenv("NEARFIELD_BACKEND", "triton")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


@pytest.mark.usefixtures("_fresh_dynamo")
@everywhere("pattern, kind", KINDS, fast=(1,), fast_on_gpu=(1,))
def test_compiled_whole_equals_eager_in_both_passes(
    device: torch.device, pattern: Pattern, kind: str, launched: list[tuple[str, Any]]
) -> None:
    model = Block(pattern, kind, (5, 6)).to(device)
    x = torch.randn(1, 5, 6, 16, device=device, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    want = gradients(model, x, parameters)
    kernels = sorted(name for name, _ in launched)
    launched.clear()
    torch.testing.assert_close(gradients(compiled, x, parameters), want)
    assert sorted(name for name, _ in launched) == kernels
    assert {"block_sparse.forward", "block_sparse.key"} < set(kernels)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@SLOW_ON_GPU
@pytest.mark.usefixtures("_fresh_dynamo")
def test_export_keeps_the_operators_and_their_result(device: torch.device) -> None:
    model = Block(Neighborhood(3, 2), "table", (6, 7)).requires_grad_(False).to(device)
    batch = torch.export.Dim("batch", min=1, max=16)
    x = torch.randn(2, 6, 7, 16, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    targets = {node.target for node in program.graph.nodes}
    assert {OPS.local_attention.default, OPS.routing_attention.default} <= targets
    for batch_size in (2, 3):
        x = torch.randn(batch_size, 6, 7, 16, device=device)
        torch.testing.assert_close(program.module()(x), model(x))


@SLOW_ON_GPU
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_plain_ones(device: torch.device, use_reentrant: bool) -> None:
    for pattern in (Window(3), Neighborhood(3)):
        case = make_case(pattern, 5, 6, "table", packed=True, dtype=torch.float32).to(device)
        qkv, table = (t.requires_grad_() for t in case.leaves)

        def call(qkv: Tensor, pattern: Pattern = pattern, table: Tensor = table) -> Tensor:
            return local_attention(qkv, None, None, pattern, bias=table, backend="triton")

        plain = torch.autograd.grad(call(qkv), [qkv, table], case.grad)
        out = checkpoint(call, qkv, use_reentrant=use_reentrant)
        out.backward(case.grad)
        assert torch.equal(qkv.grad, plain[0])
        assert torch.equal(table.grad, plain[1])


@SLOW_ON_GPU
def test_flops_do_not_depend_on_the_backend(device: torch.device) -> None:
    for pattern in (Window(3), Neighborhood(3), Full()):
        counted = []
        for backend in ("torch", "triton"):
            qkv = torch.randn(1, 5, 6, 3, 1, 8, device=device, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                local_attention(qkv, None, None, pattern, backend=backend).sum().backward()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_autocast_leaves_the_operators_alone(device: torch.device) -> None:
    """Bias and products keep their precision under autocast, in both passes."""
    for pattern, kind in KINDS[:3]:
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(pattern, 3, 4, kind, heads=1, dtype=dtype, bias_dtype=torch.float32).to(device)
            plain = case.run("triton")
            with torch.autocast(device.type, dtype=torch.bfloat16):
                within = case.run("triton")
            assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))
