"""The public operators and the choice of backend.

Layout everywhere: (batch, height, width, heads, head_dim), any strides. `q` may be the packed projection
(batch, height, width, 3, heads, head_dim) with k = v = None: it is read in place and its gradient comes back packed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from . import library, plain  # noqa: F401  library registers torch.ops.nearfield
from .library import unpack
from .notices import say_once
from .patterns import (
    Full,
    Grid,
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Size,
    Window,
    resolve,
)
from .reference import reference_attention, reference_routing
from .routing import cut_regions, route
from .tile_math import own_precision
from .triton.launch import refusal

__all__ = [
    "BACKENDS",
    "grid_attention",
    "halo_attention",
    "hilbert_neighborhood_attention",
    "hilbert_window_attention",
    "local_attention",
    "neighborhood_attention",
    "routing_attention",
    "use_backend",
    "window_attention",
]

BACKENDS = ("reference", "torch", "plain", "triton")

Bias = Tensor | tuple[Tensor, Tensor] | None

# --- choice of backend ----------------------------------------------------------------------------------------------

_HAS_TRITON = find_spec("triton") is not None
_chosen: str | None = None


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}, or None to let nearfield choose"
        )
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operator inside the block, in all threads, on one backend (see `BACKENDS`); None: choose.

    The argument `backend=` of a call goes before this, and this before the environment variable NEARFIELD_BACKEND.
    """
    global _chosen
    before, _chosen = _chosen, None if name is None else _check_backend(name)
    try:
        yield
    finally:
        _chosen = before


def _exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` is tracing; asked without an import of torch.onnx, which PyTorch imports on use."""
    return torch.compiler.is_exporting() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _backend(asked: str | None, q: Tensor, v: Tensor, dropout_p: float) -> str:
    """The backend of a call: the one that is named, else Triton for CUDA tensors that it takes, else stock PyTorch.

    ONNX knows no op of ours: in an export to it, plain operations take the place of those two.
    """
    names = (asked, _chosen, os.environ.get("NEARFIELD_BACKEND") or None)
    named = next((name for name in names if name is not None), None)
    if named is None:
        fused = q.device.type == "cuda" and _HAS_TRITON and refusal(q, v) is None
        named = "triton" if fused else "torch"
    elif _check_backend(named) == "triton":
        reason = refusal(q, v) if _HAS_TRITON else "backend 'triton' needs the package triton, which is not installed"
        if reason is not None:
            raise ValueError(reason)
    if named in ("torch", "triton") and _exporting_to_onnx():
        return "plain"
    if named == "triton" and dropout_p > 0.0:
        if not torch.compiler.is_compiling():
            say_once("attention dropout runs on the 'torch' backend: Triton's kernels have none", stacklevel=4)
        return "torch"
    return named


# --- the operators --------------------------------------------------------------------------------------------------


def local_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pattern: Pattern,
    *,
    bias: Bias = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention in which `pattern` says which keys each query sees.

    Args:
        q, k, v: (B, H, W, heads, head_dim), float16, bfloat16, float32 or float64, any strides; v may have another
            head_dim. Or q packed as (B, H, W, 3, heads, head_dim) with k = v = None. With `Halo(stride=s)` q lives on a
            map s times smaller than k and v.
        pattern: from `nearfield.ops.patterns`.
        bias: None; a table (heads, 2*ry+1, 2*rx+1) by displacement key - query in steps, r being the pattern's reach
            (kernel_size - 1, window - 1, width // 2, n - 1); for curve patterns (heads, 2*r+1) along the curve or
            (heads, 2H-1, 2W-1) by 2-D position; or a pair (rel_y, rel_x) of (rows, head_dim) added as q . rel, q
            unscaled. May have another dtype than q.
        scale: multiplies q . k; None means head_dim ** -0.5.
        dropout_p: dropout on the attention weights, in [0, 1).
        backend: "reference", "torch", "plain", "triton" or None (choose). One that is named runs or raises; it never
            falls back, but for dropout, which "triton" hands to "torch" with a notice, and for an export to ONNX, which
            gets "plain" operations for a registered op.

    Returns:
        (B, H, W, heads, head_dim of v) in q's dtype, contiguous. Scores, softmax and sums are float32 or wider.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit each other or the pattern.

    Example:
        >>> qkv = torch.randn(2, 14, 14, 3, 4, 32)
        >>> local_attention(qkv, None, None, Neighborhood(7), bias=torch.zeros(4, 13, 13)).shape
        torch.Size([2, 14, 14, 4, 32])
    """
    _check_inputs(q, k, v, pattern, dropout_p)
    if isinstance(bias, (tuple, list)) and len(bias) != 2:
        raise ValueError(f"bias must be one table or a pair (rel_y, rel_x), got {len(bias)} tensors")
    table, rel_x = (bias[0], bias[1]) if isinstance(bias, (tuple, list)) else (bias, None)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    backend = _backend(backend, q, q if v is None else v, dropout_p)
    if backend == "reference":
        q, k, v = unpack(q, k, v)
        resolved = resolve(pattern, k.shape[1], k.shape[2])
        with own_precision(q.device):
            return reference_attention(q, k, v, resolved, table, rel_x, scale, dropout_p)
    if backend == "plain":
        with own_precision(q.device):
            return plain.local_attention(*unpack(q, k, v), table, rel_x, pattern, scale, dropout_p)
    need_lse = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, table, rel_x))
    arguments = (q, k, v, table, rel_x, _seed(dropout_p), _spelled(pattern), scale, dropout_p, need_lse, backend)
    return torch.ops.nearfield.local_attention.default(*arguments)[0]


def _spelled(pattern: Pattern) -> str:
    return pattern.spelling() if torch.compiler.is_compiling() else _spelling(pattern)


_spelling = lru_cache(maxsize=512)(Pattern.spelling)


def _seed(dropout_p: float) -> Tensor | None:
    """Seed of a call's dropout masks, drawn from PyTorch's generator; both passes use it."""
    return torch.randint(1 << 62, (), dtype=torch.int64) if dropout_p > 0.0 else None


def _check_inputs(q: Tensor, k: Tensor | None, v: Tensor | None, pattern: Pattern, dropout_p: float) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a nearfield pattern such as Neighborhood(7), got {pattern!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1)")
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating point tensor, got {q.dtype}")
    if q.ndim > 1 and 0 in q.shape[-2:]:
        raise ValueError(f"q must have at least one head and one channel, got {tuple(q.shape)}")
    stride = pattern.query_stride()
    if k is None or v is None:
        if k is not None or v is not None:
            raise ValueError("give both k and v, or neither with q packed as (B, H, W, 3, heads, head_dim)")
        if q.ndim != 6 or q.shape[3] != 3:
            raise ValueError(f"packed q must be (B, H, W, 3, heads, head_dim), got {tuple(q.shape)}")
        if stride != (1, 1):
            raise ValueError(f"{pattern} has its queries on a smaller map: give q, k and v apart, not packed")
        return
    if q.ndim != 5 or k.ndim != 5 or v.ndim != 5:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k and v must be (B, H, W, heads, head_dim), got {shapes}")
    if k.shape[:4] != v.shape[:4] or q.shape[0] != k.shape[0] or q.shape[3:] != k.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k and v must agree in batch, heads and head_dim, and k and v in size; got {shapes}")
    if any(q.shape[1 + a] != -(-k.shape[1 + a] // stride[a]) for a in (0, 1)):
        raise ValueError(
            f"{pattern} wants a query map of {-(-k.shape[1] // stride[0])}x{-(-k.shape[2] // stride[1])} "
            f"for keys on {k.shape[1]}x{k.shape[2]}, got {q.shape[1]}x{q.shape[2]}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def neighborhood_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kernel_size: Size,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Neighborhood attention (arXiv 2204.07143, 2209.15001): see `Neighborhood` and `local_attention`.

    bias: (heads, 2*ky-1, 2*kx-1); entry [h, dy+ky-1, dx+kx-1] is added where key - query = (dy, dx) in units of
    dilation.
    A map smaller than kernel_size * dilation is an error.
    """
    pattern = Neighborhood(kernel_size, dilation, stride)
    return local_attention(q, k, v, pattern, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)


def window_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    window_size: Size,
    *,
    shift: Size = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Window attention, shifted by `shift` as Swin's is (arXiv 2103.14030): see `Window` and `local_attention`.

    bias: (heads, 2*wy-1, 2*wx-1) by key - query. Swin's published tables are query - key: flip both axes.
    """
    pattern = Window(window_size, shift)
    return local_attention(q, k, v, pattern, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)


def grid_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    grid_size: Size,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Grid attention (MaxViT, arXiv 2204.01697): see `Grid` and `local_attention`.

    bias: (heads, 2*gy-1, 2*gx-1) by key - query in grid steps.
    """
    return local_attention(q, k, v, Grid(grid_size), bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: Size,
    halo_size: Size,
    *,
    rel: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    pad: Literal["zero", "clip"] = "zero",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Blocked local attention with halo (HaloNet, arXiv 2103.12731): see `Halo` and `local_attention`.

    rel: (rel_y, rel_x), each (2*win-1, head_dim) with win = block + 2*halo; row b - a + win - 1, with a the query's
    place in its block and b the key's place in the widened block; multiplies the unscaled q. q may live on a map s
    times smaller than k and v (s divides block_size); s is read off the shapes.
    """
    block = Halo(block_size, halo_size, pad).block
    stride = _query_stride(q, k, block)  # type: ignore[arg-type]
    pattern = Halo(block_size, halo_size, pad, stride)
    return local_attention(q, k, v, pattern, bias=rel, scale=scale, dropout_p=dropout_p, backend=backend)


def _query_stride(q: Tensor, k: Tensor | None, block: tuple[int, int]) -> Size:
    """How many times smaller q's map is than k's: the divisor s of the block with ceil(keys / s) = queries."""
    if k is None or q.ndim != 5 or k.ndim != 5:
        return 1
    found = []
    for axis in (0, 1):
        divisors = [s for s in range(1, block[axis] + 1) if block[axis] % s == 0]
        fits = [s for s in divisors if -(-k.shape[1 + axis] // s) == q.shape[1 + axis]]
        if not fits:
            sizes = f"queries on {q.shape[1]}x{q.shape[2]}, keys on {k.shape[1]}x{k.shape[2]}"
            raise ValueError(f"{sizes}: no stride that divides block_size={block} leads from one to the other")
        found.append(fits[0])
    return found[0], found[1]


def hilbert_window_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    length: int,
    *,
    shift: int = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Windows of `length` tokens along the Hilbert curve (arXiv 2511.05832): see `HilbertWindow`, `local_attention`.

    bias: (heads, 2H-1, 2W-1) over true 2-D positions, key - query; or (heads, 2*length-1) along the curve.
    """
    pattern = HilbertWindow(length, shift)
    return local_attention(q, k, v, pattern, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)


def hilbert_neighborhood_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    length: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Neighborhoods of `length` tokens along the Hilbert curve (arXiv 2511.05832): see `HilbertNeighborhood`.

    bias: (heads, 2*length-1) along the curve, key - query.
    """
    pattern = HilbertNeighborhood(length)
    return local_attention(q, k, v, pattern, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    regions: Size | None,
    topk: int,
    *,
    region_size: Size | None = None,
    pad: Literal["zero", "clip"] = "clip",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Bi-level routing attention (BiFormer, arXiv 2303.08810): every query sees all keys of its region's top-k regions.

    Args:
        q, k, v: (B, H, W, heads, head_dim), or q packed, as in `local_attention`.
        regions: the (ny, nx) count of regions; None where region_size is given.
        topk: key regions of each query region, chosen by the dot product of region means over all channels, without
            gradient; equal scores go to the region that comes first in raster order.
        region_size: tokens of a region, int or (y, x). The last region of an axis may be short: its mean is over real
            tokens.
        pad: what short regions lack: "clip" no keys, "zero" zero keys that take part in the softmax (BiFormer nchw).
        scale: multiplies q . k; None means head_dim ** -0.5. BiFormer's models use (heads * head_dim) ** -0.5.
        dropout_p, backend: as in `local_attention`.

    Returns:
        (B, H, W, heads, head_dim of v) in q's dtype.
    """
    _check_inputs(q, k, v, Full(), dropout_p)
    if pad not in ("zero", "clip"):
        raise ValueError(f"pad={pad!r} must be 'zero' or 'clip'")
    qs, ks, vs = unpack(q, k, v)
    cut = cut_regions(qs.shape[1], qs.shape[2], regions, region_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    routes = route(qs, ks, cut, topk, for_onnx=_exporting_to_onnx())
    backend = _backend(backend, q, vs, dropout_p)
    if backend == "reference":
        with own_precision(q.device):
            return reference_routing(qs, ks, vs, routes, cut, pad == "zero", scale, dropout_p)
    if backend == "plain":
        with own_precision(q.device):
            return plain.routing_attention(qs, ks, vs, routes, cut, pad == "zero", scale, dropout_p)
    size = [cut.size_y, cut.size_x]
    seed = _seed(dropout_p)
    arguments = (q, k, v, routes, seed, size, pad == "zero", scale, dropout_p, backend)
    return torch.ops.nearfield.routing_attention.default(*arguments)[0]
