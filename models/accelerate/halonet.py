"""timm's halo attention, in HaloNet and wherever else it stands."""

from __future__ import annotations

from typing import Any

from timm.layers import halo_attn
from torch import Tensor, nn

from ...ops import Halo, local_attention
from .replacement import Replacement, source


class NearfieldHaloAttn(Replacement, halo_attn.HaloAttn):
    """``halo_attn.HaloAttn`` on ``nearfield.ops``: keys outside the map are zero and take part in the softmax."""

    published = halo_attn.HaloAttn
    code = source(
        halo_attn,
        "HaloAttn.forward",
        "PosEmbedRel.forward",
        "rel_logits_1d",
    )
    digest = "e9a2078e17626175"
    absorbed = ("pos_embed",)
    parts = {
        "q": (nn.Conv2d,),
        "kv": (nn.Conv2d,),
        "pos_embed": (halo_attn.PosEmbedRel,),
        "pool": (nn.Identity, nn.AvgPool2d),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim_out, H/s, W/s)."""
        if x.shape[2] % self.block_size or x.shape[3] % self.block_size or self.is_watched(self):
            return super().forward(x)
        # kernels read maps with channels last
        q, kv = (
            t.permute(0, 2, 3, 1).contiguous().unflatten(-1, (self.num_heads, -1)) for t in (self.q(x), self.kv(x))
        )
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], dim=-1)
        rel = (self.pos_embed.height_rel, self.pos_embed.width_rel)
        if self.scale_pos_embed:
            rel = (rel[0] * self.scale, rel[1] * self.scale)
        pattern = Halo(self.block_size, self.halo_size, stride=self.block_stride)
        out = local_attention(q, k, v, pattern, bias=rel, scale=self.scale)
        # as timm's: contiguous, channels first
        return self.pool(out.flatten(3).permute(0, 3, 1, 2).contiguous())
