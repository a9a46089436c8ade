"""timm's GCViT blocks: windows whose queries are the map's own, or one set of global queries for all windows."""

from __future__ import annotations

from typing import Any

from timm.layers import RelPosBias
from timm.models import gcvit
from torch import Tensor, nn

from ...ops import Window, local_attention
from . import tables
from .replacement import Replacement, dropout_of, source


class NearfieldGlobalContextVitBlock(Replacement, gcvit.GlobalContextVitBlock):
    """``gcvit.GlobalContextVitBlock`` on ``nearfield.ops``.

    Global queries are repeated over the map, one set a window: the copy that timm makes as well.
    """

    published = gcvit.GlobalContextVitBlock
    code = (
        source(
            gcvit,
            "GlobalContextVitBlock.forward",
            "GlobalContextVitBlock._window_attn",
            "WindowAttentionGlobal.forward",
            "window_partition",
            "window_reverse",
        )
        + tables.CODE
    )
    digest = "d7b59c0285247752"
    parts = {
        "attn": (gcvit.WindowAttentionGlobal,),
        "attn.rel_pos": (RelPosBias,),
        "attn.qkv": (nn.Linear,),
        "attn.attn_drop": (nn.Dropout,),
        "attn.proj": (nn.Linear,),
        "attn.proj_drop": (nn.Dropout,),
    }

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """As every replacement's; and position biases that are no table."""
        return super().refusal(module) or tables.table_refusal(module.attn.rel_pos)

    def _window_attn(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if not self._is_known(x, q_global):
            return super()._window_attn(x, q_global)
        attn = self.attn
        qkv = attn.qkv(x).unflatten(-1, (-1, attn.num_heads, attn.head_dim))
        q, k, v = qkv, None, None
        if attn.use_global:
            (height, width), (B, H, W) = self.window_size, x.shape[:3]
            q = q_global.reshape(B, 1, height, 1, width, attn.num_heads, attn.head_dim)  # type: ignore[union-attr]
            q = q.expand(-1, H // height, -1, W // width, -1, -1, -1).flatten(3, 4).flatten(1, 2).to(qkv.dtype)
            k, v = qkv.unbind(3)
        table, drop = tables.table_of(attn.rel_pos), dropout_of(attn.attn_drop)
        out = local_attention(q, k, v, Window(self.window_size), bias=table, scale=attn.scale, dropout_p=drop)
        return attn.proj_drop(attn.proj(out.flatten(3)))

    def _is_known(self: Any, x: Tensor, q_global: Tensor | None) -> bool:
        """Whether nobody watches and everything fits; what does not is for timm to refuse."""
        height, width = self.window_size
        if x.shape[1] % height or x.shape[2] % width or self.is_watched(self):
            return False
        if not self.attn.use_global:
            return True
        wanted = x.shape[0] * height * width * x.shape[3]
        return q_global is not None and q_global.shape[0] == x.shape[0] and q_global.numel() == wanted
