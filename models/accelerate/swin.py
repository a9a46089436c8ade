"""timm's Swin and SwinV2 blocks: shift, padding, partition and their inverses become the pattern of one operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from ...ops import Window, local_attention
from ..layers import Pair, pad_map, round_up
from .replacement import Replacement, dropout_of, source
from .tables import flipped


class _ShiftedWindows(Replacement):
    """What the two generations share: which maps are exact, and the way from map to map.

    timm rolls the map before it pads it. Where a shifted axis is no multiple of the window, the padding then lies
    between the two ends of the map and its mask is off: no pattern of ours says that.
    """

    def _attn(self: Any, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if self.is_watched(self) or not _is_exact(self, H, W):
            return super()._attn(x)  # type: ignore[misc]
        attn, window = self.attn, self.window_size
        x = pad_map(x, *_padded(self, H, W))
        x = self._attend(attn, x, Window(window, self.shift_size))
        return attn.proj_drop(attn.proj(x[:, :H, :W].flatten(3)))

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """As every replacement's; and a map at which windows wrap."""
        reason = super().refusal(module)
        H, W = module.input_resolution
        if reason is None and _wraps(module, H, W):
            y, x = module.window_size
            reason = f"timm rolls the {H}x{W} map before it pads it to multiples of {y}x{x}, so that windows wrap"
        return reason


class NearfieldSwinBlock(_ShiftedWindows, v1.SwinTransformerBlock):
    """``swin_transformer.SwinTransformerBlock`` on ``nearfield.ops``."""

    published = v1.SwinTransformerBlock
    code = source(
        v1,
        "SwinTransformerBlock.forward",
        "SwinTransformerBlock._attn",
        "SwinTransformerBlock.get_attn_mask",
        "SwinTransformerBlock._init_buffers",
        "WindowAttention.forward",
        "WindowAttention._get_rel_pos_bias",
        "WindowAttention._init_buffers",
        "get_relative_position_index",
        "window_partition",
        "window_reverse",
    )
    digest = "476610a83e554365"
    parts = {
        "attn": (v1.WindowAttention,),
        "attn.qkv": (nn.Linear,),
        "attn.attn_drop": (nn.Dropout,),
        "attn.proj": (nn.Linear,),
        "attn.proj_drop": (nn.Dropout,),
    }

    @staticmethod
    def _attend(attn: Any, x: Tensor, pattern: Window) -> Tensor:
        """(B, H, W, C) -> (B, H, W, heads, head_dim)."""
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
        table = flipped(attn.relative_position_bias_table, attn.window_size)
        drop = dropout_of(attn.attn_drop)
        return local_attention(qkv, None, None, pattern, bias=table, scale=attn.scale, dropout_p=drop)


class NearfieldSwinV2Block(_ShiftedWindows, v2.SwinTransformerV2Block):
    """``swin_transformer_v2.SwinTransformerV2Block`` on ``nearfield.ops``: cosine attention, bias from an MLP."""

    published = v2.SwinTransformerV2Block
    code = source(
        v2,
        "SwinTransformerV2Block.forward",
        "SwinTransformerV2Block._attn",
        "SwinTransformerV2Block.get_attn_mask",
        "SwinTransformerV2Block._init_buffers",
        "WindowAttention.forward",
        "WindowAttention._init_buffers",
        "WindowAttention._make_pair_wise_relative_positions",
        "window_partition",
        "window_reverse",
    )
    digest = "c1e1de3cedb93991"
    parts = {
        "attn": (v2.WindowAttention,),
        "attn.qkv": (nn.Linear,),
        "attn.cpb_mlp": (nn.Sequential,),
        "attn.attn_drop": (nn.Dropout,),
        "attn.proj": (nn.Linear,),
        "attn.proj_drop": (nn.Dropout,),
    }

    @staticmethod
    def _attend(attn: Any, x: Tensor, pattern: Window) -> Tensor:
        """(B, H, W, C) -> (B, H, W, heads, head_dim)."""
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if bias is not None and not attn.qkv_bias_separate:
            qkv = F.linear(x, attn.qkv.weight, bias)
        else:
            qkv = attn.qkv(x) if bias is None else attn.qkv(x) + bias
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
        # the learned scale of each head goes into q
        scale = attn.logit_scale.clamp(max=math.log(1 / 0.01)).exp().flatten()[:, None]
        q, k = (F.normalize(q, dim=-1) * scale).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        table = flipped(attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2), attn.window_size)
        drop = dropout_of(attn.attn_drop)
        return local_attention(q, k, v, pattern, bias=16 * torch.sigmoid(table), scale=1.0, dropout_p=drop)


def _padded(block: Any, height: int, width: int) -> Pair:
    """The next multiples of the window."""
    return round_up(height, block.window_size[0]), round_up(width, block.window_size[1])


def _wraps(block: Any, height: int, width: int) -> bool:
    """Whether a shifted axis is padded."""
    sizes = zip((height, width), block.window_size, block.shift_size, strict=True)
    return any(shift and size % window for size, window, shift in sizes)


def _is_exact(block: Any, height: int, width: int) -> bool:
    """Whether the pattern gives timm's numbers on a map; a mask made for another map is timm's own affair."""
    if _wraps(block, height, width):
        return False
    if not any(block.shift_size) or getattr(block, "dynamic_mask", False):
        return True
    return _padded(block, height, width) == _padded(block, *block.input_resolution)
