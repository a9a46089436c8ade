"""Registration with torch.library: one op per direction, fake kernels, autograd and FLOP formulas beside each other.

Patterns travel as their spelling and are parsed back (cached), so that schemas hold nothing but tensors and plain
values. `k` and `v` are None where `q` is the packed projection; its gradient then comes back packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import routing, torch_tiles
from .patterns import parse_pattern, resolve
from .routing import cut_regions
from .tile_math import own_precision
from .triton.launch import on_device

__all__ = ["unpack"]

_LIBRARY = torch.library.Library("nearfield", "DEF")


@cache
def _kernels(name: str) -> Any:
    """A module of .triton, imported on first use: it imports Triton."""
    return import_module(f".triton.{name}", __package__)


def _give_gradient(name: str, tensors: int, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gradient of an op whose first `tensors` inputs are tensors, under the dispatcher's Autograd key.

    `torch.library.register_autograd` does the same through a walk over all arguments, for half as much again a call.
    """
    op = getattr(torch.ops.nearfield, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:tensors]):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    _LIBRARY.impl(name, call, "Autograd")


# --- local attention -----------------------------------------------------------------------------------------------

_LIBRARY.define(
    "local_attention(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? rel_x, Tensor? seed, str pattern, "
    "float scale, float dropout_p, bool need_lse, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "local_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? rel_x, Tensor? seed, "
    "Tensor out, Tensor lse, str pattern, float scale, float dropout_p, bool bias_needs_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a call; views of q where it is packed."""
    if k is None or v is None:
        first, second, third = q.unbind(3)
        return first, second, third
    return q, k, v


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, rel_x: Tensor | None, seed: Tensor | None,
    pattern: str, scale: float, dropout_p: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = parse_pattern(pattern)
    if backend == "triton":
        with on_device(q.device):
            return _kernels("local").forward(*unpack(q, k, v), bias, rel_x, known, scale, need_lse)
    with own_precision(q.device):
        return torch_tiles.forward(*unpack(q, k, v), bias, rel_x, known, scale, dropout_p, seed, need_lse)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, rel_x: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, pattern: str, scale: float, dropout_p: float, bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _empty_gradients(q, k, v)
    tensors = (grad, *unpack(q, k, v), bias, rel_x, out, lse, *unpack(*gradients))
    known = parse_pattern(pattern)
    if backend == "triton":
        with on_device(q.device):
            dbias, drel_x = _kernels("local").backward(*tensors, known, scale, bias_needs_grad)
    else:
        with own_precision(q.device):
            dbias, drel_x = torch_tiles.backward(*tensors, known, scale, dropout_p, seed, bias_needs_grad)
    filled = [q.new_empty(0) if g is None else g for g in (*gradients, dbias, drel_x)]
    return filled[0], filled[1], filled[2], filled[3], filled[4]


def _empty_gradients(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if k is None or v is None:
        return dq, None, None
    return (
        dq,
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
    )


def _fake_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, rel_x: Tensor | None, seed: Tensor | None,
    pattern: str, scale: float, dropout_p: float, need_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, _, v = unpack(q, k, v)
    size = q.shape[:4] if need_lse else (0,)
    lse = torch.empty(size, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return q.new_empty(*q.shape[:4], v.shape[4]), lse


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, rel_x: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, pattern: str, scale: float, dropout_p: float, bias_needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parts: list[Tensor | None] = [*_empty_gradients(q, k, v)]
    parts += [torch.empty(t.shape, dtype=t.dtype, device=t.device) if t is not None and bias_needs_grad else None
              for t in (bias, rel_x)]  # fmt: skip
    a, b, c, d, e = (q.new_empty(0) if p is None else p for p in parts)
    return a, b, c, d, e


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("nearfield's fused attention has no second derivative: use backend='reference' for it")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, rel_x, seed, pattern, scale, dropout_p, _, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, bias, rel_x, seed, out, lse)
    ctx.call, ctx.backend = (pattern, scale, dropout_p), backend


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, rel_x, seed, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dq, dk, dv, dbias, drel_x = torch.ops.nearfield.local_attention_backward(
        grad,
        q,
        k,
        v,
        bias,
        rel_x,
        seed,
        out,
        lse,
        *ctx.call,
        needs[3] or needs[4],
        ctx.backend,
    )
    given = [g if need else None for g, need in zip((dq, dk, dv, dbias, drel_x), needs[:5], strict=True)]
    return (*given, None, None, None, None, None, None)


_LIBRARY.impl("local_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("local_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("nearfield::local_attention", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("nearfield::local_attention_backward", _fake_backward, lib=_LIBRARY)
_give_gradient("local_attention", 5, _setup_context, _autograd)
torch.library.register_autograd("nearfield::local_attention_backward", _no_second_derivative, lib=_LIBRARY)

# --- routing --------------------------------------------------------------------------------------------------------

_LIBRARY.define(
    "routing_attention(Tensor q, Tensor? k, Tensor? v, Tensor routes, Tensor? seed, SymInt[] region_size, "
    "bool zero_pad, float scale, float dropout_p, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "routing_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor routes, Tensor? seed, Tensor out, "
    "Tensor lse, SymInt[] region_size, bool zero_pad, float scale, float dropout_p, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _routing_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, routes: Tensor, seed: Tensor | None, region_size: list[int],
    zero_pad: bool, scale: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parts = unpack(q, k, v)
    regions = cut_regions(q.shape[1], q.shape[2], None, (region_size[0], region_size[1]))
    if backend == "triton":
        with on_device(q.device):
            return _kernels("routed").forward(*parts, routes, regions, zero_pad, scale)
    with own_precision(q.device):
        return routing.forward(*parts, routes, regions, zero_pad, scale, dropout_p, seed)


def _routing_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, routes: Tensor, seed: Tensor | None, out: Tensor,
    lse: Tensor, region_size: list[int], zero_pad: bool, scale: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    regions = cut_regions(q.shape[1], q.shape[2], None, (region_size[0], region_size[1]))
    parts = unpack(q, k, v)
    if backend == "triton":
        made = _empty_gradients(q, k, v)
        with on_device(q.device):
            _kernels("routed").backward(grad, *parts, routes, out, lse, *unpack(*made), regions, zero_pad, scale)
        filled = [q.new_empty(0) if g is None else g for g in made]
        return filled[0], filled[1], filled[2]
    with own_precision(q.device):
        gradients = routing.backward(grad, *parts, routes, out, lse, regions, zero_pad, scale, dropout_p, seed)
    if k is None:
        return torch.stack(gradients, 3), q.new_empty(0), q.new_empty(0)
    dq, dk, dv = (g.contiguous() for g in gradients)
    return dq, dk, dv


def _fake_routing_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, routes: Tensor, seed: Tensor | None, region_size: list[int],
    zero_pad: bool, scale: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, _, v = unpack(q, k, v)
    tokens = region_size[0] * region_size[1]
    size = (q.shape[0], q.shape[3], routes.shape[1], tokens)
    lse = torch.empty(size, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return q.new_empty(*q.shape[:4], v.shape[4]), lse


def _fake_routing_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, routes: Tensor, seed: Tensor | None, out: Tensor,
    lse: Tensor, region_size: list[int], zero_pad: bool, scale: float, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (q.new_empty(0) if g is None else g for g in _empty_gradients(q, k, v))
    return dq, dk, dv


def _setup_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, routes, seed, *rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, routes, seed, out, lse)
    ctx.call = rest


def _routing_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, routes, seed, out, lse = ctx.saved_tensors
    gradients = torch.ops.nearfield.routing_attention_backward(grad, q, k, v, routes, seed, out, lse, *ctx.call)
    given = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
    return (*given, None, None, None, None, None, None, None)


_LIBRARY.impl("routing_attention", _routing_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("routing_attention_backward", _routing_backward, "CompositeExplicitAutograd")
torch.library.register_fake("nearfield::routing_attention", _fake_routing_forward, lib=_LIBRARY)
torch.library.register_fake("nearfield::routing_attention_backward", _fake_routing_backward, lib=_LIBRARY)
_give_gradient("routing_attention", 3, _setup_routing, _routing_autograd)
torch.library.register_autograd("nearfield::routing_attention_backward", _no_second_derivative, lib=_LIBRARY)

# --- FLOPs: two a multiply-add, useful scores only --------------------------------------------------------------------


def _score_flops(q_shape: Any, v_shape: Any, pairs: int, *, backward: bool = False) -> int:
    """FLOPs of `pairs` (query, key) pairs an image and head; shapes of q, and of v unless q is packed.

    Forward: q k^T and p v. Backward: the scores again, dq and dk over head_dim, dp and dv over v's.
    """
    batch, (heads, d) = q_shape[0], q_shape[-2:]
    dv = d if v_shape is None else v_shape[-1]
    return 2 * batch * heads * pairs * (3 * d + 2 * dv if backward else d + dv)


def _pattern_pairs(pattern: str, q_shape: Any, k_shape: Any) -> int:
    height, width = (q_shape if k_shape is None else k_shape)[1:3]
    resolved = resolve(parse_pattern(pattern), height, width)
    return int(resolved.y.counts.sum()) * int(resolved.x.counts.sum())


@register_flop_formula(torch.ops.nearfield.local_attention)
def _local_flops(
    q: Any, k: Any, v: Any, bias: Any, rel_x: Any, seed: Any, pattern: str, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return _score_flops(q, v, _pattern_pairs(pattern, q, k))


@register_flop_formula(torch.ops.nearfield.local_attention_backward)
def _local_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, rel_x: Any, seed: Any, out: Any, lse: Any, pattern: str, *_: Any,
    out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return _score_flops(q, v, _pattern_pairs(pattern, q, k), backward=True)


@register_flop_formula(torch.ops.nearfield.routing_attention)
def _routing_flops(
    q: Any, k: Any, v: Any, routes: Any, seed: Any, region_size: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return _score_flops(q, v, q[1] * q[2] * routes[2] * region_size[0] * region_size[1])


@register_flop_formula(torch.ops.nearfield.routing_attention_backward)
def _routing_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, routes: Any, seed: Any, out: Any, lse: Any, region_size: Any, *_: Any,
    out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return _score_flops(q, v, q[1] * q[2] * routes[2] * region_size[0] * region_size[1], backward=True)
