"""Bi-level routing on Triton: lists or bits, and the launches of both passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routing import Regions, inverse_lists
from . import block_sparse
from .configs import Config, architecture, choose, precision_name
from .launch import LOG2_E, constants, layout, power_of_two, precision, readable, units, wide
from .schedule import LOAD_SCORES

__all__ = ["backward", "forward"]

MOST_BITS = 64  # regions of an image that one int64 holds a bit each for


class _Call:
    """Inputs as kernels read them, and the choice between lists of regions and a mask of bits."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, zero_pad: bool, *, forward: bool
    ) -> None:
        names = ("q", "k", "v") if forward else ("", "", "")
        self.q, self.k, self.v = (readable(t, name) for t, name in zip((q, k, v), names, strict=True))
        self.routes, self.regions = routes.contiguous(), regions
        self.zero_keys = zero_pad and any(regions.padding)
        self.batch, self.heads, self.topk = q.shape[0], q.shape[3], routes.shape[2]
        self.d, self.dv = q.shape[4], v.shape[4]
        slots = power_of_two(min(regions.tokens, 64))
        self.configs = {op: self._config(op, slots) for op in ("forward", "query", "key")}
        self.dense = self._dense(self.configs["forward"])
        if self.dense:
            self.configs = {op: self._config(op, 64) for op in self.configs}
        # A region never lists another twice, so the sum of its bits is their union.
        bits = torch.ones_like(self.routes).bitwise_left_shift(self.routes).sum(2) if self.dense else self.routes
        self.chosen = bits

    def _config(self, op: str, slots: int) -> Config:
        block_d = power_of_two(max(self.d, self.dv))
        arch = architecture(self.q.device)
        return choose(f"routing.{op}", arch, precision_name(self.q.dtype), block_d, f"region{slots}")

    def _dense(self, config: Config) -> bool:
        """Whether masking the whole image is less work than lists, whose tiles hold one region each."""
        r, tokens = self.regions, self.regions.height * self.regions.width
        if r.count > MOST_BITS or self.zero_keys:
            return False

        def padded(n: int, block: int) -> int:
            return -(-n // block) * block

        def work(tiles: int, block_m: int, streamed: int) -> int:
            return tiles * (block_m + LOAD_SCORES) * padded(streamed, config.block_n)

        lists = work(r.count * -(-r.tokens // config.block_m), config.block_m, self.topk * r.tokens)
        return work(-(-tokens // 64), 64, tokens) < lists

    def tiles(self, config: Config) -> int:
        """Tiles of one image."""
        if self.dense:
            return -(-self.regions.height * self.regions.width // config.block_m)
        return self.regions.count * -(-self.regions.tokens // config.block_m)

    def programs(self, op: str) -> int:
        """Programs of a launch."""
        return self.tiles(self.configs[op]) * self.heads * self.batch

    def common(self, op: str, **named: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Image strides and constants of a kernel; `named` tensors come before q, k, v, or after them if gradients."""
        config, r = self.configs[op], self.regions
        first = {name: t for name, t in named.items() if name == "G"}
        last = {name: t for name, t in named.items() if name != "G"}
        strides = dict(layout(**first, Q=self.q, K=self.k, V=self.v, **last))
        unit = units(strides)
        return tuple(s.image // unit for s in strides.values()), {
            "HEADS": self.heads, "D": self.d, "DV": self.dv,
            "BLOCK_D": power_of_two(self.d), "BLOCK_DV": power_of_two(self.dv),
            "UNIT": unit, "WIDE": wide(strides, r.height * r.width), "PRECISION": precision(self.q.dtype),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "TILES": self.tiles(config),
            "REGIONS": r.count, "TOPK": self.topk, "HEIGHT": r.height, "WIDTH": r.width, "ACROSS": r.nx,
            "SIZE_Y": r.size_y, "SIZE_X": r.size_x, "DENSE": self.dense,
            "num_warps": config.num_warps, "num_stages": config.num_stages, **constants(strides),
        }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, zero_pad: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, h, d_v) and log-sum-exp (B, h, regions, tokens) float32."""
    out = q.new_empty(*q.shape[:4], v.shape[4])
    made = torch.zeros if any(regions.padding) else torch.empty  # what short regions lack is not written
    lse = made(q.shape[0], q.shape[3], regions.count, regions.tokens, dtype=torch.float32, device=q.device)
    if not q.shape[0]:
        return out, lse
    call = _Call(q, k, v, routes, regions, zero_pad, forward=True)
    images, constant = call.common("forward")
    block_sparse.forward_kernel[call.programs("forward"),](
        call.q, call.k, call.v, out, lse, call.routes, call.chosen, scale * LOG2_E,
        *images, ZERO_KEYS=call.zero_keys, **constant,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, regions: Regions, zero_pad: bool, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk and dv (all entries are written)."""
    if not q.shape[0]:
        return
    call = _Call(q, k, v, routes, regions, zero_pad, forward=False)
    grad, sums = readable(grad), torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
    images, constant = call.common("query", G=grad, DQ=dq)
    block_sparse.query_kernel[call.programs("query"),](
        grad, call.q, call.k, call.v, out, lse, dq, sums, call.routes, call.chosen, scale * LOG2_E, scale,
        *images, ZERO_KEYS=call.zero_keys, **constant,
    )  # fmt: skip
    chosen_by, bounds = (call.routes, call.routes) if call.dense else inverse_lists(call.routes, regions.count)
    images, constant = call.common("key", G=grad, DK=dk, DV=dv)
    block_sparse.key_kernel[call.programs("key"),](
        grad, call.q, call.k, call.v, sums, dk, dv, chosen_by, bounds, call.chosen, scale * LOG2_E, scale,
        *images, **constant,
    )  # fmt: skip
