"""timm's MaxViT partitions, block and grid, channels last or first: partition and reverse become the pattern."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import maxxvit
from torch import Tensor, nn

from ...ops import Grid, Pattern, Window, local_attention
from . import tables
from .replacement import Replacement, dropout_of, source

_Types = dict[str, tuple[type, ...]]

_LINEAR: _Types = {"qkv": (nn.Linear,), "attn_drop": (nn.Dropout,), "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}
_CONV: _Types = {**_LINEAR, "qkv": (nn.Conv2d,), "proj": (nn.Conv2d,)}


def _parts(name: str, kind: type, children: _Types) -> _Types:
    children = {**children, "rel_pos": tables.TYPES}
    return {name: (kind,), **{f"{name}.{child}": types for child, types in children.items()}}


class _Partition(Replacement):
    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """As every replacement's; and position biases that are no table."""
        reason = super().refusal(module)
        for name in cls.absorbed:
            reason = reason or tables.table_refusal(getattr(module, name).rel_pos)
        return reason

    def _is_known(self: Any, height: int, width: int) -> bool:
        """Whether a map is cut without a rest (timm raises otherwise) and nobody watches."""
        y, x = self.partition_size
        return height % y == 0 and width % x == 0 and not self.is_watched(self)


class NearfieldPartitionAttentionCl(_Partition, maxxvit.PartitionAttentionCl):
    """``maxxvit.PartitionAttentionCl`` on ``nearfield.ops``."""

    published = maxxvit.PartitionAttentionCl
    code = (
        source(
            maxxvit,
            "PartitionAttentionCl.forward",
            "PartitionAttentionCl._partition_attn",
            "AttentionCl.forward",
            "window_partition",
            "window_reverse",
            "grid_partition",
            "grid_reverse",
        )
        + tables.CODE
    )
    digest = "1649500ebb3db398"
    parts = _parts("attn", maxxvit.AttentionCl, _LINEAR)

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if not self._is_known(x.shape[1], x.shape[2]):
            return super()._partition_attn(x)
        return _attend(self.attn, x, _pattern(self.partition_block, self.partition_size))


class NearfieldParallelPartitionAttention(_Partition, maxxvit.ParallelPartitionAttention):
    """``maxxvit.ParallelPartitionAttention`` on ``nearfield.ops``."""

    published = maxxvit.ParallelPartitionAttention
    code = (
        source(
            maxxvit,
            "ParallelPartitionAttention.forward",
            "ParallelPartitionAttention._partition_attn",
        )
        + NearfieldPartitionAttentionCl.code[2:]
    )
    digest = "78fa9ba1c7be4a17"
    absorbed = ("attn_block", "attn_grid")
    parts = {
        **_parts("attn_block", maxxvit.AttentionCl, _LINEAR),
        **_parts("attn_grid", maxxvit.AttentionCl, _LINEAR),
    }

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if not self._is_known(x.shape[1], x.shape[2]):
            return super()._partition_attn(x)
        windows = _attend(self.attn_block, x, Window(self.partition_size))
        return torch.cat([windows, _attend(self.attn_grid, x, Grid(self.partition_size))], dim=-1)


class NearfieldPartitionAttention2d(_Partition, maxxvit.PartitionAttention2d):
    """``maxxvit.PartitionAttention2d``, channels first, on ``nearfield.ops``."""

    published = maxxvit.PartitionAttention2d
    code = (
        source(
            maxxvit,
            "PartitionAttention2d.forward",
            "PartitionAttention2d._partition_attn",
            "Attention2d.forward",
            "window_partition_nchw",
            "window_reverse_nchw",
            "grid_partition_nchw",
            "grid_reverse_nchw",
        )
        + tables.CODE
    )
    digest = "792a04da3009373e"
    parts = _parts("attn", maxxvit.Attention2d, _CONV)

    def _partition_attn(self: Any, x: Tensor) -> Tensor:
        if not self._is_known(x.shape[2], x.shape[3]):
            return super()._partition_attn(x)
        attn = self.attn
        qkv = attn.qkv(x).permute(0, 2, 3, 1).contiguous()  # kernels read maps with channels last
        x = _between_projections(attn, qkv, _pattern(self.partition_block, self.partition_size))
        return attn.proj_drop(attn.proj(x.permute(0, 3, 1, 2)))


def _pattern(block: bool, size: tuple[int, int]) -> Pattern:
    return Window(size) if block else Grid(size)


def _attend(attn: Any, x: Tensor, pattern: Pattern) -> Tensor:
    """``AttentionCl`` on a whole map (B, H, W, C)."""
    return attn.proj_drop(attn.proj(_between_projections(attn, attn.qkv(x), pattern)))


def _between_projections(attn: Any, qkv: Tensor, pattern: Pattern) -> Tensor:
    """(B, H, W, 3 * heads * head_dim) -> (B, H, W, heads * head_dim)."""
    if attn.head_first:
        qkv = qkv.unflatten(-1, (attn.num_heads, 3, attn.dim_head)).transpose(3, 4)
    else:
        qkv = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head))
    table, drop = tables.table_of(attn.rel_pos), dropout_of(attn.attn_drop)
    return local_attention(qkv, None, None, pattern, bias=table, scale=attn.scale, dropout_p=drop).flatten(3)
