"""The definition of every operator: a dense mask, a softmax, plain differentiable PyTorch.

Memory grows with (H*W)^2. Half precision is computed in float32.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import BiasKind, bias_kind, position_index, table_index
from .curves import curve_order, inverse_order
from .patterns import Axis, Resolved
from .routing import Regions

__all__ = ["reference_attention", "reference_routing"]


def _key_coordinates(axis: Axis) -> np.ndarray:
    """All key coordinates, those of padding zeros included."""
    return np.arange(min(0, int(axis.start.min())), max(axis.keys, int(axis.stop.max())))


def _allowed(axis: Axis) -> np.ndarray:
    """(queries, keys) bool: `start <= j < stop and (j - start) % step == 0`."""
    j, start, stop = _key_coordinates(axis)[None], axis.start[:, None], axis.stop[:, None]
    return (j >= start) & (j < stop) & ((j - start) % axis.step == 0)


def _displacement(axis: Axis, *, decomposed: bool = False) -> np.ndarray:
    origin = axis.rel_origin if decomposed else axis.origin
    return (_key_coordinates(axis)[None] - origin[:, None]) // axis.step


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: Resolved,
    bias: Tensor | None,
    rel_x: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T + bias, over the keys of the pattern) v, for (B, H, W, heads, head_dim) tensors."""
    out_dtype, out_shape = q.dtype, (*q.shape[:4], v.shape[4])
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(compute) for t in (q, k, v))
    kind = bias_kind(bias, rel_x, resolved, q.shape[3], q.shape[4])
    y, x = resolved.y, resolved.x
    if resolved.pattern.curve is not None:
        places = curve_order(resolved.pattern.curve, resolved.height, resolved.width)
        order = torch.from_numpy(places.copy()).to(q.device)
        q, k, v = (t.flatten(1, 2)[:, order].unsqueeze(2) for t in (q, k, v))
    ky, kx = _key_coordinates(y), _key_coordinates(x)
    pad = (0, 0, 0, 0, -kx[0].item(), kx[-1].item() + 1 - x.keys, -ky[0].item(), ky[-1].item() + 1 - y.keys)
    k, v = F.pad(k, pad), F.pad(v, pad)

    scores = torch.einsum("bihd,bjhd->bhij", q.flatten(1, 2), k.flatten(1, 2)) * scale
    if kind is BiasKind.DECOMPOSED:
        assert bias is not None
        assert rel_x is not None
        dy, dx = (
            torch.from_numpy(np.clip(_displacement(a, decomposed=True) + a.rel_reach, 0, 2 * a.rel_reach)).to(q.device)
            for a in (y, x)
        )
        sy = torch.einsum("byxhd,ykd->bhyxk", q, bias.to(compute)[dy])[..., None]
        sx = torch.einsum("byxhd,xkd->bhyxk", q, rel_x.to(compute)[dx])[..., None, :]
        scores = scores + (sy + sx).reshape(scores.shape)
    elif kind is not BiasKind.NONE:
        assert bias is not None
        if kind is BiasKind.POSITIONS:
            index = position_index(resolved, np.arange(y.queries), ky)
        else:
            index = table_index(_displacement(y), _displacement(x), y.reach, x.reach)
        scores = scores + bias.to(compute).flatten(1)[:, torch.from_numpy(index).to(q.device)]
    allowed = (_allowed(y)[:, None, :, None] & _allowed(x)[None, :, None, :]).reshape(scores.shape[2:])
    scores = scores.masked_fill(~torch.from_numpy(allowed).to(q.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", weights, v.flatten(1, 2))
    if resolved.pattern.curve is not None:
        out = out[:, torch.from_numpy(inverse_order(places)).to(q.device)]
    return out.reshape(out_shape).to(out_dtype).contiguous()


def reference_routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: Regions,
    zero_pad: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """The definition of routed attention: a dense mask from the chosen regions (B, regions, topk)."""
    out_dtype = q.dtype
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (regions.cut(t.to(compute)) for t in (q, k, v))  # (B, regions, tokens, h, d)
    scores = torch.einsum("brihd,bsjhd->bhrisj", q, k) * scale
    allowed = torch.zeros(q.shape[0], regions.count, regions.count, dtype=torch.bool, device=q.device)
    allowed = allowed.scatter(2, routes, True)[:, None, :, None, :, None]
    if not zero_pad:
        allowed = allowed & regions.present(q.device)
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = F.dropout(scores.flatten(4).softmax(-1), dropout_p).reshape(scores.shape)
    return regions.join(torch.einsum("bhrisj,bsjhd->brihd", weights, v)).to(out_dtype).contiguous()
