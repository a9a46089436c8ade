"""timm's DaViT blocks with window attention; the blocks with channel attention are none of ours."""

from __future__ import annotations

from typing import Any

from timm.models import davit
from torch import Tensor, nn

from ...ops import Window, local_attention
from ..layers import pad_map, round_up
from .replacement import Replacement, source


class NearfieldSpatialBlock(Replacement, davit.SpatialBlock):
    """``davit.SpatialBlock`` on ``nearfield.ops``: windows without bias, padding unmasked."""

    published = davit.SpatialBlock
    code = source(
        davit,
        "SpatialBlock.forward",
        "WindowAttention.forward",
        "window_partition",
        "window_reverse",
    )
    digest = "fd9ab54ebf9cdcd2"
    parts = {"attn": (davit.WindowAttention,), "attn.qkv": (nn.Linear,), "attn.proj": (nn.Linear,)}

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.mlp is None or self.is_watched(self):
            return super().forward(x)
        size = x.shape[2:]
        x = self.cpe1(x).flatten(2).transpose(1, 2)
        attended = self._windows(self.norm1(x).unflatten(1, size))
        x = x + self.drop_path1(attended.flatten(1, 2))
        x = self.cpe2(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).unflatten(2, size)

    def _windows(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        attn, (height, width) = self.attn, self.window_size
        H, W = x.shape[1:3]
        qkv = attn.qkv(pad_map(x, round_up(H, height), round_up(W, width))).unflatten(-1, (3, attn.num_heads, -1))
        out = local_attention(qkv, None, None, Window(self.window_size), scale=attn.scale)
        return attn.proj(out[:, :H, :W].flatten(3))
