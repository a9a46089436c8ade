"""Backbones of transformer blocks that differ in their attention only: NAT, DiNAT, Swin, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from timm.layers import calculate_drop_path_rates, get_norm_layer
from torch import nn

from .arguments import by_name, check_arguments, check_entries, stage_count
from .backbone import Backbone
from .layers import Block, Size, Stage, per_stage


class LocalTransformer(Backbone):
    """A stem, stages of blocks with a downsampler between, channels doubling from stage to stage.

    A family gives the attention, and the classes of its stem, downsampler and (where it is no ``Block``) block as class
    attributes.

    Args:
        attention: called with (stage, block, dim, num_heads, qkv_bias=, attn_drop=, proj_drop=) for every block.
        img_size, in_chans, num_classes, global_pool, drop_rate: as in ``Backbone``.
        embed_dim: channels of the first stage.
        depths, num_heads: blocks and heads of each stage.
        mlp_ratio: hidden channels of the MLP as a multiple of the stage's, one value or one for each stage.
        qkv_bias: whether q, k, v have a bias.
        layer_scale: initial value of the learned channel scales, None for none.
        stem_stride: reduction of the stem.
        proj_drop_rate: dropout after attention and in the MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        norm_layer: a class, or timm's name of one.
    """

    stem_type: ClassVar[type[nn.Module]]
    downsample_type: ClassVar[type[nn.Module]]
    block_type: ClassVar[type[nn.Module]] = Block

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        *,
        img_size: Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: int | Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        count = stage_count(depths)
        check_arguments(
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            layer_scale=layer_scale,
            stem_stride=stem_stride,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        check_entries(num_heads=num_heads, mlp_ratio=mlp_ratio)
        norm = by_name("norm_layer", norm_layer, get_norm_layer)
        dims = [embed_dim * 2**i for i in range(count)]
        heads = per_stage("num_heads", num_heads, count, pairs=False)
        ratios = per_stage("mlp_ratio", mlp_ratio, count, pairs=False)
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        stages = [
            Stage(
                self.downsample_type(dims[i - 1], dim, norm) if i else nn.Identity(),
                [
                    self.block_type(
                        dim,
                        attention(i, j, dim, heads[i], **options),
                        mlp_ratio=ratios[i],
                        layer_scale=layer_scale,
                        proj_drop=proj_drop_rate,
                        drop_path=rates[i][j],
                        norm_layer=norm,
                    )
                    for j in range(depths[i])
                ],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            self.stem_type(in_chans, embed_dim, norm, stem_stride),
            stages,
            dims,
            stem_stride=stem_stride,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm,
        )
