"""Bi-level routing on Triton: lists or bits, and the launches of both passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cache import SCHEDULES
from ..routing import Regions, inverse_lists
from . import block_sparse
from .configs import Config, architecture, choose, precision_name
from .launch import LOG2_E, Strides, call_constants, constants, dense, layout, power_of_two, precision, readable
from .launcher import Launcher
from .schedule import LOAD_SCORES

__all__ = ["backward", "forward"]

MOST_BITS = 64  # regions of an image that one int64 holds a bit each for
DENSE_BLOCK = 64  # queries of a tile where the whole image is masked


@dataclass(frozen=True)
class _Call:
    """What a launch follows from: regions, sizes and strides of its tensors; batch left out."""

    regions: Regions
    topk: int
    heads: int
    d: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    zero_pad: bool
    layout: tuple[tuple[str, Strides], ...]
    precision: str

    @property
    def zero_keys(self) -> bool:
        """Whether slots without a token take part."""
        return self.zero_pad and any(self.regions.padding)

    def config(self, op: str, slots: int) -> Config:
        """Launch configuration of "forward", "query" or "key", for tiles of that many slots."""
        block_d = power_of_two(max(self.d, self.dv))
        where = architecture(self.device), precision_name(self.dtype)
        return choose(f"routing.{op}", *where, block_d, f"region{slots}")

    def chosen_config(self, op: str) -> tuple[Config, bool]:
        """Configuration of a kernel, and whether it masks the whole image.

        That is where it is less work than lists, whose tiles hold one region each: the same for every kernel.
        """
        r, tokens = self.regions, self.regions.height * self.regions.width
        slots = power_of_two(min(r.tokens, DENSE_BLOCK))
        by_lists = self.config("forward", slots)

        def work(tiles: int, block_m: int, streamed: int) -> int:
            return tiles * (block_m + LOAD_SCORES) * -(-streamed // by_lists.block_n) * by_lists.block_n

        lists = work(r.count * -(-r.tokens // by_lists.block_m), by_lists.block_m, self.topk * r.tokens)
        whole = work(-(-tokens // DENSE_BLOCK), DENSE_BLOCK, tokens)
        dense = r.count <= MOST_BITS and not self.zero_keys and whole < lists
        return self.config(op, DENSE_BLOCK if dense else slots), dense


@dataclass(frozen=True, eq=False)
class _Pass:
    """One kernel of a call.

    Attributes:
        dense: regions are bits of a mask, not lists. images: image strides of its tensors, in units.
        programs: of one image.
    """

    dense: bool
    images: tuple[int, ...]
    programs: int
    launch: Launcher
    tensors: tuple[Tensor, ...] = ()


def _pass(call: _Call, op: str) -> _Pass:
    """The pass "forward", "query" or "key" of a call; cached."""
    return SCHEDULES.get(("routing", op, call), partial(_make_pass, call, op), call.device)


def _make_pass(call: _Call, op: str) -> _Pass:
    (config, dense), r, strides = call.chosen_config(op), call.regions, dict(call.layout)
    slots, of = (r.height * r.width, 1) if dense else (r.tokens, r.count)
    tiles = of * -(-slots // config.block_m)
    made = call_constants(strides, r.height * r.width, call.heads, call.d, call.dv, call.precision)
    made |= {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TILES": tiles,
        "REGIONS": r.count, "TOPK": call.topk, "HEIGHT": r.height, "WIDTH": r.width, "ACROSS": r.nx,
        "SIZE_Y": r.size_y, "SIZE_X": r.size_x, "DENSE": dense,
        "num_warps": config.num_warps, "num_stages": config.num_stages, **constants(strides),
    }  # fmt: skip
    if op != "key":
        made["ZERO_KEYS"] = call.zero_keys
    images = tuple(s.image // made["UNIT"] for s in strides.values())
    return _Pass(dense, images, tiles * call.heads, Launcher(made))


def _bits(routes: Tensor) -> Tensor:
    """(B, regions) int64, bit s set where a region chose region s: none is listed twice, so the sum is the union."""
    return torch.bitwise_left_shift(1, routes).sum(2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, zero_pad: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, h, d_v) and log-sum-exp (B, h, regions, tokens) float32."""
    out = q.new_empty(*q.shape[:4], v.shape[4])
    made = torch.zeros if any(regions.padding) else torch.empty  # what short regions lack is not written
    lse = made(q.shape[0], q.shape[3], regions.count, regions.tokens, dtype=torch.float32, device=q.device)
    if not q.shape[0]:
        return out, lse
    q, k, v, routes = readable(q, "q"), readable(k, "k"), readable(v, "v"), dense(routes)
    sizes = (routes.shape[2], q.shape[3], q.shape[4], v.shape[4], q.dtype, q.device, zero_pad)
    own = _pass(_Call(regions, *sizes, layout(Q=q, K=k, V=v), precision(q.dtype)), "forward")
    own.launch(
        block_sparse.forward_kernel, own.programs * q.shape[0], q, k, v, out, lse, routes,
        _bits(routes) if own.dense else routes, scale * LOG2_E, *own.images,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, regions: Regions, zero_pad: bool, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk and dv (all entries are written)."""
    batch = q.shape[0]
    if not batch:
        return
    q, k, v, grad, routes = readable(q), readable(k), readable(v), readable(grad), dense(routes)
    out, lse = dense(out), dense(lse)
    sums = torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
    sizes = (routes.shape[2], q.shape[3], q.shape[4], v.shape[4], q.dtype, q.device, zero_pad)
    own = _pass(_Call(regions, *sizes, layout(G=grad, Q=q, K=k, V=v, DQ=dq), precision(q.dtype)), "query")
    chosen = _bits(routes) if own.dense else routes
    own.launch(
        block_sparse.query_kernel, own.programs * batch, grad, q, k, v, out, lse, dq, sums, routes, chosen,
        scale * LOG2_E, scale, *own.images,
    )  # fmt: skip
    own = _pass(_Call(regions, *sizes, layout(G=grad, Q=q, K=k, V=v, DK=dk, DV=dv), precision(q.dtype)), "key")
    chosen_by, bounds = (routes, routes) if own.dense else inverse_lists(routes, regions.count)
    own.launch(
        block_sparse.key_kernel, own.programs * batch, grad, q, k, v, sums, dk, dv, chosen_by, bounds, chosen,
        scale * LOG2_E, scale, *own.images,
    )  # fmt: skip
