"""Attention of one tile in stock PyTorch: forward with log-sum-exp, and the gradients of its scores.

Shared by everything that cuts attention into dense tiles. Shapes: n runs, h heads, L queries, S keys, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Keep", "attend", "dropout_masks", "own_precision", "score_gradients"]

Keep = Callable[[Tensor], Tensor]


def own_precision(device: torch.device) -> torch.autocast:
    """Context in which autocast leaves the operators' products alone: they choose their precision themselves."""
    # autocast knows no meta device, on which nothing is computed anyway
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: Keep | None = None
) -> tuple[Tensor, Tensor]:
    """Output (n, h, L, d_v) and log-sum-exp (n, h, L) of q (n, h, L, d) on k, v (n, h, S, .), any strides.

    Args:
        mask: added to the scaled scores, broadcastable to (n, h, L, S), or None.
        keep: gives dropout masks for the weights (see `dropout_masks`), or None.
    """
    if q.device.type == "cpu" and keep is None:
        return _flash(q, k, v, mask, scale)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.add_(mask)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    if keep is not None:
        weights = weights.mul_(keep(weights))
    return torch.matmul(weights, v), lse


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash kernel; it wants one head_dim for k and v."""
    d, dv = q.shape[3], v.shape[3]
    if d < dv:
        q, k = (F.pad(t, (0, dv - d)) for t in (q, k))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out[..., :dv], lse


def score_gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, lse: Tensor, delta: Tensor,
    mask: Callable[[Tensor], Tensor] | None, keep: Keep | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights after dropout (for dv) and score gradients, both (n * h, L, S), of tiles laid out (n * h, tokens, d).

    Args:
        k: already scaled. g: gradient of the output. lse, delta: (n * h, L, 1), delta = sum(g * out).
        mask: adds bias and mask to the scores, in place.
    """
    p = torch.bmm(q, k.transpose(1, 2))
    if mask is not None:
        p = mask(p)
    # The clamp changes weights below 1e-26 and spares exp its slow path: masked scores are -inf.
    p.sub_(lse).clamp_min_(-60.0).exp_()
    ds = torch.bmm(g, v.transpose(1, 2))
    kept_p = p
    if keep is not None:
        kept = keep(p)
        ds.mul_(kept)
        kept_p = p * kept
    return kept_p, ds.sub_(delta).mul_(p)


def dropout_masks(p: float, seed: Tensor | None, device: torch.device) -> Keep | None:
    """A function giving one dropout mask after another, scaled by 1 / (1 - p); the same sequence for the same seed.

    Masks are drawn flat, so that a tile laid out (n, h, ...) in one pass and (n * h, ...) in the other gets the same.
    """
    if p == 0.0 or seed is None:
        return None
    generator = torch.Generator(device).manual_seed(int(seed))

    def keep(like: Tensor) -> Tensor:
        drawn = torch.rand(like.numel(), generator=generator, dtype=like.dtype, device=like.device)
        return (drawn >= p).to(like.dtype).div_(1.0 - p).view(like.shape)

    return keep
