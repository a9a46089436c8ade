"""The call that a row of configurations is measured on: a forward and a backward pass of a representative size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from _gpu_problems import OF_QKV, OF_TABLE, OUTPUT, Local, Named, Shape
from _kernel_cases import HEADS, ROUTED, STATIC, Case, Row, calls
from nearfield.ops.routing import cut_regions
from nearfield.ops.triton.configs import Config
from torch import Tensor

__all__ = ["Problem", "named", "operation", "problems", "takes"]

ELEMENTS = 64 * 56 * 56 * 96  # of q, or the next smaller number of images: a first stage in training
_BIAS = {"positions": "positions", "decomposed": "decomposed", "none": "none", "many": "none"}  # others: a table


def operation(kernel: str) -> str:
    """Operation of the table from module and name of a kernel."""
    return kernel.removesuffix("_kernel").replace("block_sparse.", "routing.")


def takes(launch: Mapping[str, Any], config: Config) -> bool:
    """Whether a launch, by its constants, is in this configuration and not in that of another row."""
    of = {"BLOCK_M": config.block_m, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return all(launch[name] == value for name, value in of.items())


def problems(row: Row, place: torch.device, *, small: bool, empty: bool) -> Iterator[Problem]:
    """Calls that may take a row, the usual one first, each made when it is asked for.

    Args:
        small: one image and one head of a smaller map.
        empty: without values, which compiling does not need.
    """
    for case in calls(row):
        without = row.op == "neighborhood.bias" and _BIAS.get(case.terms) in ("none", "decomposed")
        if case.d == case.dv == row.block_d and not case.tf32 and not without:
            yield Problem(case, place, small=small, empty=empty)


class Problem:
    """A call through the registered operators, on the packed projection."""

    def __init__(self, case: Case, place: torch.device, *, small: bool, empty: bool) -> None:
        self.case, self._empty = case, empty
        self._generator = None if empty else torch.Generator(place).manual_seed(0)
        self._routed = (case.family, case.terms) in ROUTED
        if self._routed:
            side, self._region, self._topk, self._zero_pad = ROUTED[case.family, case.terms]
            heads = HEADS
        else:
            self._pattern, side, heads = STATIC[case.family, case.terms]
        if small:
            side, heads = side // (2 if self._routed else 3 if side > 64 else 4), 1
        batch = 1 if small else max(1, min(256, ELEMENTS // (side * side * heads * case.d)))
        self.shape = Shape(batch, side, side, heads, case.d, case.dtype)
        self.place, self.scale = place, case.d**-0.5

    def _draw(self, *size: int, dtype: torch.dtype) -> Tensor:
        made = torch.empty(size, dtype=dtype, device=self.place)
        return made if self._empty else made.normal_(generator=self._generator)

    @cached_property
    def _qkv(self) -> Tensor:
        s = self.shape
        return self._draw(s.batch, s.height, s.width, 3, s.heads, s.head_dim, dtype=s.dtype)

    @cached_property
    def _grad(self) -> Tensor:
        s = self.shape
        return self._draw(s.batch, s.height, s.width, s.heads, s.head_dim, dtype=s.dtype)

    @cached_property
    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The bias, and the second table of a decomposed one."""
        local = Local(self._pattern, _BIAS.get(self.case.terms, "table"))  # type: ignore[arg-type]
        first, second, *_ = *(self._draw(*size, dtype=torch.float32) for size in local.tables(self.shape)), None, None
        return first, second

    @cached_property
    def _routes(self) -> Tensor:
        """Regions that each region attends, drawn without replacement."""
        count = cut_regions(self.shape.height, self.shape.width, None, self._region).count
        return self._draw(self.shape.batch, count, count, dtype=torch.float32).topk(min(self._topk, count)).indices

    def forward(self, backend: str) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        packed = (self._qkv, None, None)
        if self._routed:
            call: tuple[Any, ...] = ([self._region] * 2, self._zero_pad, self.scale, 0.0, backend)
            return torch.ops.nearfield.routing_attention(*packed, self._routes, None, *call)
        call = (self._pattern.spelling(), self.scale, 0.0, True, backend)
        return torch.ops.nearfield.local_attention(*packed, *self._tables, None, *call)

    def backward(self, backend: str, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the projection and of the bias, from what a forward pass returned."""
        packed = (self._grad, self._qkv, None, None)
        if self._routed:
            call: tuple[Any, ...] = ([self._region] * 2, self._zero_pad, self.scale, 0.0, backend)
            return torch.ops.nearfield.routing_attention_backward(*packed, self._routes, None, out, lse, *call)[:1]
        bias = self._tables[0] is not None
        call = (self._pattern.spelling(), self.scale, 0.0, bias, backend)
        made = torch.ops.nearfield.local_attention_backward(*packed, *self._tables, None, out, lse, *call)
        return (made[0], made[3]) if bias else made[:1]


def named(result: tuple[Tensor, ...], *, backward: bool) -> Named:
    """What a pass returned, by name."""
    if not backward:
        return {OUTPUT: result[0]}
    return dict(zip((OF_QKV, OF_TABLE), result, strict=False))
