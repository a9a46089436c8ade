"""The plain backend: the operators as a graph of ordinary operations, gathers, products and a softmax.

What an exporter traces where `torch.ops.nearfield` means nothing, ONNX above all: no custom op, no strides, no loop
over the batch, which may be symbolic. Tiles are those of `torch_tiles`, and all runs of a tile are one batched product;
index tensors are constants, so the map's size is one too. Gradients are PyTorch's own.

Shapes: B batch, H, W map, h heads, d head_dim; n runs of a tile, L queries and S keys of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import BiasKind
from .blocks import Block
from .curves import curve_order
from .patterns import Pattern, resolve
from .routing import Regions
from .scores import tile_scores
from .tiles import Band, Span, make_plan
from .torch_tiles import choose_tile

__all__ = ["local_attention", "routing_attention"]


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None,
    pattern: Pattern, scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Output (B, H, W, h, d_v) in q's dtype."""
    size, heads = (int(k.shape[1]), int(k.shape[2])), q.shape[3]
    compute = torch.promote_types(q.dtype, torch.float32)
    scores, kind = tile_scores(bias, rel_x, resolve(pattern, *size), compute, q)
    plan = make_plan(pattern, *size, choose_tile(pattern, *size, heads))
    (top, bottom), (left, right) = (
        _overhang(bands, n) for bands, n in zip((plan.rows, plan.columns), _axes(pattern, size), strict=True)
    )
    pad = (0, 0, 0, 0, left, right, top, bottom)
    qs, ks, vs = (
        (F.pad(t, pad) if any(p) else t).to(compute).flatten(1, 2) for t, p in ((q, (0,)), (k, pad), (v, pad))
    )
    places: list[np.ndarray] = []
    outs: list[Tensor] = []
    for column, row in product(plan.columns, plan.rows):
        block = Block(row, column, (0, 1), (0, row.count), (0, column.count))
        xq = _coordinates(column.queries, column.count, column.query_spacing)
        xk = _coordinates(column.keys, column.count, column.key_spacing) + left
        yq = _coordinates(row.queries, row.count, row.query_spacing)
        yk = _coordinates(row.keys, row.count, row.key_spacing) + top
        for tile, _ in block.tiles:
            at = _tokens(yq[:, tile.query : tile.query + tile.shape.queries], xq, pattern, (q.shape[1], q.shape[2]))
            seen = _tokens(yk[:, tile.key : tile.key + tile.shape.keys], xk, pattern, (size[0], size[1] + left + right))
            qt, kt, vt = (_take(t, tokens) for t, tokens in ((qs, at), (ks, seen), (vs, seen)))
            mask = scores.mask(block, tile, qt.flatten(0, 1))
            if mask is not None and kind is BiasKind.DECOMPOSED:  # it depends on q: one of each image
                mask = mask.unflatten(0, (-1, len(at)))
            outs.append(_attend(qt, kt, vt, mask, scale, dropout_p).transpose(2, 3).flatten(1, 2))
            places.append(at.ravel())
    return _placed(outs, places).unflatten(1, q.shape[1:3]).to(q.dtype).contiguous()


def _axes(pattern: Pattern, size: tuple[int, int]) -> tuple[int, int]:
    """Key coordinates of both axes: those of the map, or of the curve and a second one of length 1."""
    return size if pattern.curve is None else (size[0] * size[1], 1)


def _overhang(bands: Sequence[Band], n: int) -> tuple[int, int]:
    """How many key coordinates lie before 0, and from `n` on; only bands that are alone leave the map."""
    return -min(0, *(b.keys.start for b in bands)), max(0, *(b.keys.last + 1 - n for b in bands))


def _coordinates(span: Span, count: int, spacing: int) -> np.ndarray:
    """(runs, length) coordinates of a band."""
    return np.arange(count)[:, None] * spacing + span.coordinates()


def _tokens(y: np.ndarray, x: np.ndarray, pattern: Pattern, size: tuple[int, int]) -> np.ndarray:
    """(n, tokens) places in a flattened map, from the coordinates (cy, ly) and (cx, lx) of both axes."""
    if pattern.curve is not None:
        return curve_order(pattern.curve, *size)[y]
    places = y[:, None, :, None] * size[1] + x[None, :, None, :]
    return places.reshape(y.shape[0] * x.shape[0], y.shape[1] * x.shape[1])


def _take(t: Tensor, tokens: np.ndarray) -> Tensor:
    """Tokens (n, L) of a flattened map (B, H * W, h, d) as (B, n, h, L, d)."""
    index = torch.from_numpy(tokens.ravel()).to(t.device)
    return t.index_select(1, index).unflatten(1, tokens.shape).transpose(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    """Output (B, n, h, L, d_v) of q on k and v (B, n, h, S, .)."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ v


def _placed(parts: Sequence[Tensor], places: Sequence[np.ndarray]) -> Tensor:
    """Parts (B, tokens, ...) of a map, and the place of each token, as (B, H * W, ...)."""
    whole = torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
    inverse = np.argsort(np.concatenate(places))
    if np.array_equal(inverse, np.arange(len(inverse))):
        return whole
    return whole.index_select(1, torch.from_numpy(inverse).to(whole.device))


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, zero_pad: bool, scale: float, dropout_p: float
) -> Tensor:
    """Output (B, H, W, h, d_v) in q's dtype."""
    compute = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = (regions.cut(t).to(compute) for t in (q, k, v))  # (B, regions, tokens, h, d)
    images = torch.arange(q.shape[0], device=q.device)[:, None, None] * regions.count
    rows = (images + routes).flatten()

    def chosen(t: Tensor) -> Tensor:
        """The regions that each region attends, (B, regions, h, topk * tokens, d)."""
        taken = t.flatten(0, 1).index_select(0, rows).unflatten(0, (-1, *routes.shape[1:]))
        return taken.flatten(2, 3).transpose(2, 3)

    mask, absent = None, regions.absent(zero_pad, q.device)
    if absent is not None:
        unseen = absent[routes].flatten(2)[:, :, None, None]
        mask = torch.zeros(unseen.shape, dtype=compute, device=q.device).masked_fill(unseen, -torch.inf)
    out = _attend(qs.transpose(2, 3), chosen(ks), chosen(vs), mask, scale, dropout_p)
    return regions.join(out.transpose(2, 3)).to(q.dtype).contiguous()
