"""Bi-level routing attention: each region of queries attends the tokens of its top-k regions of keys.

The one data-dependent pattern of this package (BiFormer, Zhu et al. 2023, arXiv 2303.08810, section 3.2). Region scores
and the choice are plain tensor code without gradient; the attention reads K and V rows of one image and some regions
at a time, so that the k-fold copies of the published code never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .patterns import Size
from .tile_math import attend, dropout_masks, own_precision, score_gradients

__all__ = ["Regions", "backward", "cut_regions", "forward", "inverse_lists", "route"]

GATHER_BYTES = 8 << 20  # gathered keys and values held at a time


@dataclass(frozen=True)
class Regions:
    """A map cut into ny x nx regions of (y, x) tokens each; the last of an axis may be short."""

    height: int
    width: int
    ny: int
    nx: int
    size_y: int
    size_x: int

    @property
    def count(self) -> int:
        """Number of regions."""
        return self.ny * self.nx

    @property
    def tokens(self) -> int:
        """Tokens of a whole region."""
        return self.size_y * self.size_x

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns that the last regions lack."""
        return self.ny * self.size_y - self.height, self.nx * self.size_x - self.width

    def cut(self, t: Tensor) -> Tensor:
        """(B, H, W, h, d) as (B, regions, tokens, h, d); what short regions lack is zero."""
        if any(self.padding):
            t = F.pad(t, (0, 0, 0, 0, 0, self.padding[1], 0, self.padding[0]))
        t = t.unflatten(2, (self.nx, self.size_x)).unflatten(1, (self.ny, self.size_y)).transpose(2, 3)
        return t.flatten(3, 4).flatten(1, 2)

    def join(self, t: Tensor) -> Tensor:
        """Inverse of `cut`."""
        t = t.unflatten(2, (self.size_y, self.size_x)).unflatten(1, (self.ny, self.nx)).transpose(2, 3)
        return t.flatten(3, 4).flatten(1, 2)[:, : self.height, : self.width]

    def real(self, device: torch.device) -> Tensor:
        """(ny, nx) int64: tokens of each region that exist."""
        rows, columns = (
            (limit - torch.arange(n, device=device) * size).clamp_(max=size)
            for limit, n, size in ((self.height, self.ny, self.size_y), (self.width, self.nx, self.size_x))
        )
        return rows[:, None] * columns

    def present(self, device: torch.device) -> Tensor:
        """(regions, tokens) bool: which tokens exist."""
        ones = torch.ones(1, self.height, self.width, 1, 1, dtype=torch.uint8, device=device)
        return self.cut(ones).view(self.count, self.tokens).bool()

    def absent(self, zero_pad: bool, device: torch.device) -> Tensor | None:
        """(regions, tokens) bool: slots that are no keys; None where all are, as those that are padded with zeros."""
        return None if zero_pad or not any(self.padding) else ~self.present(device)


def cut_regions(height: int, width: int, regions: Size | None, region_size: Size | None) -> Regions:
    """Regions of a map, from their number (ny, nx) or from their size.

    Raises:
        ValueError: both or neither given, or a number of regions that no single size gives.
    """
    if (regions is None) == (region_size is None):
        raise ValueError("give either regions, the (ny, nx) count, or region_size, not both or neither")
    given = regions if region_size is None else region_size
    assert given is not None
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2 or not all(isinstance(p, int) and p >= 1 for p in pair):
        raise ValueError(f"regions and region_size are positive ints or (y, x) pairs, got {given!r}")
    size_y, size_x = pair if regions is None else (-(-height // pair[0]), -(-width // pair[1]))
    ny, nx = -(-height // size_y), -(-width // size_x)
    if regions is not None and (ny, nx) != pair:
        raise ValueError(
            f"a {height}x{width} map has no {pair[0]}x{pair[1]} regions of one size: pad it, or give region_size="
        )
    return Regions(height, width, ny, nx, size_y, size_x)


def route(q: Tensor, k: Tensor, regions: Regions, topk: int, *, for_onnx: bool = False) -> Tensor:
    """(B, regions, topk) int64: the key regions of each query region, best first.

    Scores are dot products of region means over all channels, without heads, scale or gradient. Of equal scores the
    region that comes first in raster order wins.

    ONNX has no stable sort, but its TopK has that rule for equal scores, as PyTorch's has not: `for_onnx` traces it.

    Raises:
        ValueError: topk is not in [1, regions].
    """
    if not isinstance(topk, int) or not 1 <= topk <= regions.count:
        raise ValueError(f"topk={topk} must be an int in [1, {regions.count}], the number of regions")
    with own_precision(q.device):
        scores = _means(q, regions) @ _means(k, regions).transpose(1, 2)
    if for_onnx:
        return scores.topk(topk, dim=-1).indices
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk].contiguous()


def _means(t: Tensor, regions: Regions) -> Tensor:
    """(B, regions, h * d) float32 or wider: means over each region's tokens of a (B, H, W, h, d) map, not copied."""
    compute = torch.promote_types(t.dtype, torch.float32)
    sums = _sums(_sums(t.detach(), 2, regions.size_x, compute), 1, regions.size_y, compute)
    real = regions.real(t.device)[:, :, None] if any(regions.padding) else regions.tokens
    return sums.flatten(3).div_(real).flatten(1, 2)


def _sums(t: Tensor, axis: int, size: int, compute: torch.dtype) -> Tensor:
    """Sums of every `size` entries of one axis, of which the last may be fewer."""
    whole = t.shape[axis] // size
    parts = (
        [t.narrow(axis, 0, whole * size).unflatten(axis, (whole, size)).sum(axis + 1, dtype=compute)] if whole else []
    )
    if whole * size < t.shape[axis]:
        parts.append(t.narrow(axis, whole * size, t.shape[axis] - whole * size).sum(axis, keepdim=True, dtype=compute))
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def inverse_lists(routes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For every key region the query regions that chose it, in raster order.

    Args:
        routes: (B, regions, topk) int64. count: number of regions.

    Returns:
        chosen_by (B, regions * topk) int64, and bounds (B, regions + 1) int32: those of key region s of image b are
        chosen_by[b, bounds[b, s]:bounds[b, s + 1]].
    """
    ordered, places = routes.flatten(1).sort(dim=1, stable=True)
    wanted = torch.arange(count + 1, device=routes.device).expand(routes.shape[0], -1).contiguous()
    return places // routes.shape[2], torch.searchsorted(ordered, wanted).int()


def _chunks(q: Tensor, routes: Tensor, regions: Regions) -> Iterator[tuple[int, slice]]:
    """Images and ranges of regions whose gathered keys and values fit GATHER_BYTES."""
    size = 2 * routes.shape[2] * regions.tokens * q.shape[3] * q.shape[4] * 4
    step = max(1, GATHER_BYTES // size)
    for image in range(q.shape[0]):
        for first in range(0, regions.count, step):
            yield image, slice(first, min(first + step, regions.count))


def _gather(t: Tensor, routes: Tensor) -> Tensor:
    """Rows (regions, tokens, ...) of the routed regions, (chunk, topk * tokens, ...)."""
    return t.index_select(0, routes.flatten()).view(routes.shape[0], routes.shape[1] * t.shape[1], *t.shape[2:])


def _mask(absent: Tensor | None, routes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Additive mask (chunk, 1, 1, topk * tokens) of absent keys, None where all keys count."""
    if absent is None:
        return None
    chosen = _gather(absent, routes)
    return torch.zeros(chosen.shape, dtype=dtype, device=routes.device).masked_fill_(chosen, -torch.inf)[:, None, None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, zero_pad: bool, scale: float,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, H, W, h, d_v) and log-sum-exp (B, h, regions, tokens)."""
    compute = torch.promote_types(q.dtype, torch.float32)
    keep = dropout_masks(dropout_p, seed, q.device)
    qs, ks, vs = (regions.cut(t) for t in (q, k, v))
    out = qs.new_empty(*qs.shape[:4], v.shape[4])
    lse = torch.empty(q.shape[0], q.shape[3], regions.count, regions.tokens, dtype=compute, device=q.device)
    absent = regions.absent(zero_pad, q.device)
    for b, part in _chunks(q, routes, regions):
        chosen = routes[b, part]
        kt, vt = (_gather(t[b], chosen).to(compute).transpose(1, 2) for t in (ks, vs))
        mask = _mask(absent, chosen, compute)
        o, s = attend(qs[b, part].to(compute).transpose(1, 2), kt, vt, mask, scale, keep)
        out[b, part] = o.transpose(1, 2).to(out.dtype)
        lse[b, :, part] = s.transpose(0, 1)
    return regions.join(out).contiguous(), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, regions: Regions,
    zero_pad: bool, scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; gathered rows are read again, not kept."""
    compute = torch.promote_types(q.dtype, torch.float32)
    keep = dropout_masks(dropout_p, seed, q.device)
    qs, ks, vs, gs, os = (regions.cut(t) for t in (q, k, v, grad, out))
    dq = torch.empty(qs.shape, dtype=compute, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=compute, device=q.device) for t in (ks, vs))

    def heads_first(t: Tensor) -> Tensor:
        return t.to(compute).transpose(1, 2).flatten(0, 1)

    def tokens_first(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, q.shape[3])).transpose(1, 2)

    absent = regions.absent(zero_pad, q.device)
    for b, part in _chunks(q, routes, regions):
        chosen = routes[b, part]
        mask = _mask(absent, chosen, compute)
        qt, gt, ot = (heads_first(t[b, part]) for t in (qs, gs, os))
        kt, vt = (heads_first(_gather(t[b], chosen)) for t in (ks, vs))
        delta = (gt * ot).sum(-1, keepdim=True)
        ls = lse[b, :, part].transpose(0, 1).reshape(-1, regions.tokens, 1)

        def add(scores: Tensor, mask: Tensor | None = mask) -> Tensor:
            if mask is not None:
                scores.unflatten(0, (-1, q.shape[3])).add_(mask)
            return scores

        p, ds = score_gradients(qt, kt * scale, vt, gt, ls, delta, add, keep)
        dq[b, part] = tokens_first(torch.bmm(ds, kt).mul_(scale))
        for total, gradient in (
            (dk, torch.bmm(ds.transpose(1, 2), qt).mul_(scale)),
            (dv, torch.bmm(p.transpose(1, 2), gt)),
        ):
            rows = tokens_first(gradient).reshape(chosen.numel(), regions.tokens, q.shape[3], -1)
            total[b].index_add_(0, chosen.flatten(), rows)
    return regions.join(dq).to(q.dtype), regions.join(dk).to(k.dtype), regions.join(dv).to(v.dtype)
