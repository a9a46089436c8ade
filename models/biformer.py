"""BiFormer (Zhu et al., CVPR 2023, arXiv 2303.08810): attention to those regions that a region finds relevant.

The map is cut into regions; every query region attends all tokens of its top-k key regions, chosen by the dot product
of region means. Of equal scores the region that comes first in raster order wins. The last stage attends the whole map.
What is special: scores are scaled by the width of the stage, not of a head, except in the last stage; a depthwise
convolution adds local detail to the output of attention; a second one before each block marks positions; the norms of
stem, downsamplers and head are batch norms. BiFormer-STL is the same attention in Swin's layout, and has been published
twice: in the first code and in a later one (``nchw``) that pads differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointMismatch, Layout, Rule
from ..ops import Full, local_attention, routing_attention
from .arguments import check_heads, stage_count
from .layers import (
    Block,
    ConvDownsample,
    ConvStem,
    NormLayer,
    Pair,
    PatchStem,
    Size,
    crop_map,
    pad_map,
    per_stage,
    round_up,
    to_pair,
)
from .registry import register
from .transformer import LocalTransformer

_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a (B, H, W, C) map that keeps its size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a (B, H, W, C) map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RoutingAttention(nn.Module):
    """Bi-level routing attention with a depthwise convolution of the values (section 3.2).

    Sides that are no multiple of the number of regions are handled as one of the two published codes does:

    - ``pad="map"``: the map is zero-padded at the right and bottom to the next multiple before the projection. Padded
      tokens carry the bias, enter the region means and are attended like others.
    - ``pad="keys"``: regions have the rounded-down size, so there may be more of them; the last ones are filled up
      after the projection with zero keys and values, which take part in the softmax but not in the region means.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        regions: (y, x) number of regions.
        topk: key regions of each query region; all of them on a map that has fewer.
        pad: ``map`` or ``keys``.
        qkv_bias: whether q, k, v have a bias.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        regions: Pair,
        topk: int,
        pad: str = "map",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = dim**-0.5
        self.pad = pad
        self.topk = topk
        self.regions = regions
        self.attn_drop = attn_drop
        # as the nchw code names them: published files name the projections of full attention otherwise, so do we
        self.qkv_linear = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = DepthwiseConv(dim, 5)
        self.output_linear = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        H, W = x.shape[1:3]
        ny, nx = self.regions
        if self.pad == "map":
            x = pad_map(x, round_up(H, ny), round_up(W, nx))
            size = (x.shape[1] // ny, x.shape[2] // nx)
        else:
            size = (max(H // ny, 1), max(W // nx, 1))
        topk = min(self.topk, -(-x.shape[1] // size[0]) * -(-x.shape[2] // size[1]))
        if torch.jit.is_tracing():  # sides are tensors there, and a trace is of one size
            size, topk = (int(size[0]), int(size[1])), int(topk)
        qkv = self.qkv_linear(x).unflatten(-1, (3, self.num_heads, -1))
        routed = routing_attention(
            qkv,
            None,
            None,
            None,
            topk,
            region_size=size,
            pad="zero",
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        x = routed.flatten(3) + self.lepe(qkv[:, :, :, 2].flatten(3))
        return self.proj_drop(self.output_linear(crop_map(x, H, W)))


class FullAttention(nn.Module):
    """Attention to the whole map plus a depthwise convolution, of the values or (``lepe="input"``) of the input.

    Args:
        dim, num_heads, attn_drop, proj_drop: as in ``RoutingAttention``; q, k, v have no bias.
        lepe: what is convolved, ``input`` or ``value``.
    """

    def __init__(
        self, dim: int, num_heads: int, lepe: str = "input", attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.lepe_of_value = lepe == "value"
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = local_attention(qkv, None, None, Full(), dropout_p=self.attn_drop if self.training else 0.0)
        local = self.lepe(qkv[:, :, :, 2].flatten(3) if self.lepe_of_value else x)
        return self.proj_drop(self.proj(out.flatten(3) + local))


class PositionBlock(Block):
    """A block after a depthwise 3x3 convolution that tells positions apart: x + conv(x) goes in."""

    def __init__(self, dim: int, *args: Any, **options: Any) -> None:
        super().__init__(dim, *args, **options)
        self.pos_embed = DepthwiseConv(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return super().forward(x + self.pos_embed(x))


class NormedConvStem(ConvStem):
    """``ConvStem`` with batch norm and GELU after the first convolution and batch norm after the second."""

    def __init__(self, in_chans: int, dim: int, norm_layer: NormLayer, stride: int = 4) -> None:
        super().__init__(in_chans, dim, BatchNorm, stride)
        self.norm1 = nn.BatchNorm2d(dim // 2) if stride == 4 else nn.Identity()
        self.act = nn.GELU() if stride == 4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, ceil(H/s), ceil(W/s), dim) map."""
        return self.norm(self.conv2(self.act(self.norm1(self.conv1(x)))).permute(0, 2, 3, 1))


class NormedConvDownsample(ConvDownsample):
    """``ConvDownsample`` with a bias and batch norm."""

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer) -> None:
        super().__init__(dim, out_dim, BatchNorm, bias=True)


class NormedPatchStem(PatchStem):
    """``PatchStem`` with batch norm."""

    def __init__(self, in_chans: int, dim: int, norm_layer: NormLayer, patch_size: int = 4) -> None:
        super().__init__(in_chans, dim, BatchNorm, patch_size)


class NormedPatchMerging(nn.Module):
    """Batch norm, then a 2x2 convolution of stride 2: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), out)."""

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = BatchNorm(dim)
        self.reduction = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map; odd sides are zero-padded after the norm, where the published code drops a row or column."""
        x = pad_map(self.norm(x), round_up(x.shape[1], 2), round_up(x.shape[2], 2))
        return self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Pointwise:
    """Weight of a 1x1 convolution (out, in, 1, 1) <-> that of a linear layer (out, in); a bias stays as it is."""

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """(out, in, 1, 1) -> (out, in)."""
        if tensor.ndim == 1:
            return tensor
        if tensor.ndim != 4 or tensor.shape[2:] != (1, 1):
            raise CheckpointMismatch(f"the weight has shape {tuple(tensor.shape)}, expected (out, in, 1, 1)")
        return tensor.flatten(1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """(out, in) -> (out, in, 1, 1)."""
        return tensor if tensor.ndim == 1 else tensor[:, :, None, None]


class BiFormer(LocalTransformer):
    """BiFormer; takes any image of at least 32 x 32.

    Args:
        regions: number of regions a side, an int or (y, x) pair, or one for each stage. The authors' detectors have 16,
            their segmentors 8.
        topk: key regions of each query region, one value or one for each stage; None for full attention.
        depths, **options: as in ``LocalTransformer``; ``num_heads`` of a stage of full attention is 8 in the published
            models, ``qkv_bias`` is that of routed attention, and ``norm_layer`` that of the blocks.
    """

    stem_type: ClassVar[type[nn.Module]] = NormedConvStem
    downsample_type: ClassVar[type[nn.Module]] = NormedConvDownsample
    block_type: ClassVar[type[Block]] = PositionBlock
    first_conv = "stem.conv1"
    # object_detection/models_mm/biformer_mm.py and its twin for segmentation, which do not feed it on
    out_norm = _LAYER_NORM
    pad: ClassVar[str] = "map"
    lepe: ClassVar[str] = "input"
    layouts = (
        Layout(
            name="rayleizhu",
            source="rayleizhu/BiFormer, models/biformer.py",
            signature=("downsample_layers.0.0.weight", "stages.0.0.norm1.weight"),
            rules=(
                Rule("downsample_layers.0.0.{rest}", "stem.conv1.{rest}"),
                Rule("downsample_layers.0.1.{rest}", "stem.norm1.{rest}"),
                Rule("downsample_layers.0.3.{rest}", "stem.conv2.{rest}"),
                Rule("downsample_layers.0.4.{rest}", "stem.norm.{rest}"),
                Rule("downsample_layers.{i}.0.{rest}", "stages.{i}.downsample.reduction.{rest}"),
                Rule("downsample_layers.{i}.1.{rest}", "stages.{i}.downsample.norm.{rest}"),
                Rule("stages.{i}.{j}.attn.qkv.qkv.{rest}", "stages.{i}.blocks.{j}.attn.qkv_linear.{rest}"),
                Rule("stages.{i}.{j}.attn.wo.{rest}", "stages.{i}.blocks.{j}.attn.output_linear.{rest}"),
                Rule("stages.{i}.{j}.mlp.0.{rest}", "stages.{i}.blocks.{j}.mlp.fc1.{rest}"),
                Rule("stages.{i}.{j}.mlp.3.{rest}", "stages.{i}.blocks.{j}.mlp.fc2.{rest}"),
                Rule("stages.{i}.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
        ),
    )

    def __init__(
        self,
        *,
        regions: Size | Sequence[Size] = 7,
        topk: int | Sequence[int | None] | None = (1, 4, 16, None),
        depths: Sequence[int] = (2, 2, 8, 2),
        norm_layer: str | Callable[..., nn.Module] = _LAYER_NORM,
        **options: Any,
    ) -> None:
        cut = _regions(regions, stage_count(depths))
        chosen = _topk(topk, cut)

        def attention(
            stage: int, block: int, dim: int, num_heads: int, qkv_bias: bool, **drops: Any
        ) -> RoutingAttention | FullAttention:
            count = chosen[stage]
            if count is None:
                return FullAttention(dim, num_heads, self.lepe, **drops)
            return RoutingAttention(dim, num_heads, cut[stage], count, self.pad, qkv_bias, **drops)

        super().__init__(attention, depths=depths, norm_layer=norm_layer, **options)
        self.norm = BatchNorm(self.num_features)
        self.topk = chosen

    def _resize_attention(self, img_size: Pair, regions: Size | Sequence[Size] | None = None, **others: Any) -> None:
        super()._resize_attention(img_size, **others)
        if regions is None:
            return
        cut = _regions(regions, len(self.topk))
        _topk(self.topk, cut)
        # stages may have been pruned
        for stage, pair in zip(self.stages, cut, strict=False):
            for block in stage.blocks:
                if isinstance(block.attn, RoutingAttention):
                    block.attn.regions = pair


class BiFormerSTL(BiFormer):
    """BiFormer in Swin-Tiny's layout: patches and merging without overlap, no convolution before the blocks."""

    stem_type = NormedPatchStem
    downsample_type = NormedPatchMerging
    block_type = Block
    first_conv = "stem.proj"
    layouts = (
        Layout(
            name="rayleizhu",
            source="rayleizhu/BiFormer, models/biformer_stl.py",
            signature=("downsample_layers.0.0.weight", "stages.0.blocks.0.attn.qkv.qkv.weight"),
            rules=(
                Rule("downsample_layers.0.0.{rest}", "stem.proj.{rest}"),
                Rule("downsample_layers.0.1.{rest}", "stem.norm.{rest}"),
                Rule("downsample_layers.{i}.0.{rest}", "stages.{i}.downsample.norm.{rest}"),
                Rule("downsample_layers.{i}.1.{rest}", "stages.{i}.downsample.reduction.{rest}"),
                Rule("stages.{i}.blocks.{j}.attn.qkv.qkv.{rest}", "stages.{i}.blocks.{j}.attn.qkv_linear.{rest}"),
                Rule("stages.{i}.blocks.{j}.attn.wo.{rest}", "stages.{i}.blocks.{j}.attn.output_linear.{rest}"),
                Rule("stages.{i}.blocks.{j}.mlp.0.{rest}", "stages.{i}.blocks.{j}.mlp.fc1.{rest}"),
                Rule("stages.{i}.blocks.{j}.mlp.2.{rest}", "stages.{i}.blocks.{j}.mlp.fc2.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
        ),
    )


class BiFormerSTLNchw(BiFormerSTL):
    """BiFormer-STL of the later code: other padding, and the last stage convolves its values."""

    pad = "keys"
    lepe = "value"
    layouts = (
        Layout(
            name="rayleizhu",
            source="rayleizhu/BiFormer, models/biformer_stl_nchw.py",
            signature=("downsample_layers.0.0.weight", "stages.0.blocks.0.attn.qkv_linear.weight"),
            rules=(
                Rule("downsample_layers.0.0.{rest}", "stem.proj.{rest}"),
                Rule("downsample_layers.0.1.{rest}", "stem.norm.{rest}"),
                Rule("downsample_layers.{i}.0.{rest}", "stages.{i}.downsample.norm.{rest}"),
                Rule("downsample_layers.{i}.1.{rest}", "stages.{i}.downsample.reduction.{rest}"),
                *(
                    Rule(f"stages.{{i}}.blocks.{{j}}.{key}", f"stages.{{i}}.blocks.{{j}}.{key}", Pointwise())
                    for key in (
                        "attn.qkv_linear.{rest}",
                        "attn.output_linear.{rest}",
                        "attn.qkv.{rest}",
                        "attn.proj.{rest}",
                    )
                ),
                Rule("stages.{i}.blocks.{j}.mlp.0.{rest}", "stages.{i}.blocks.{j}.mlp.fc1.{rest}", Pointwise()),
                Rule("stages.{i}.blocks.{j}.mlp.2.{rest}", "stages.{i}.blocks.{j}.mlp.fc2.{rest}", Pointwise()),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
        ),
    )


def _regions(regions: Size | Sequence[Size], stages: int) -> list[Pair]:
    """The number of regions of every stage."""
    return [to_pair("regions", pair) for pair in per_stage("regions", regions, stages)]


def _topk(topk: int | Sequence[int | None] | None, regions: Sequence[Pair]) -> list[int | None]:
    """The number of key regions of every stage, None for full attention."""
    counts = list(per_stage("topk", topk, len(regions), pairs=False))
    for count, (ny, nx) in zip(counts, regions, strict=True):
        if count is not None and not (isinstance(count, int) and 1 <= count <= ny * nx):
            raise ValueError(
                f"topk={count!r} must be None, for full attention, or 1 to {ny * nx}, the {ny}x{nx} regions"
            )
    return counts


_TINY = {
    "embed_dim": 64,
    "depths": (2, 2, 8, 2),
    "num_heads": (2, 4, 8, 8),
    "mlp_ratio": 3.0,
    "regions": 7,
    "topk": (1, 4, 16, None),
    "drop_path_rate": 0.1,
}
_SMALL = {**_TINY, "depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
_STL = {**_TINY, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 8), "mlp_ratio": 4.0}

# object_detection/configs/coco and semantic_segmentation/configs/ade20k of rayleizhu/BiFormer, which have S and B
_BY_TASK = {"detection": {"regions": 16}, "segmentation": {"regions": 8}}

register(
    __name__,
    BiFormer,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "biformer_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 1),
            "num_heads": (1, 2, 4),
            "mlp_ratio": 2.0,
            "regions": 4,
            "topk": (2, 4, None),
        },
        "biformer_tiny": _TINY,
        "biformer_small": _SMALL,
        # the authors' repository does not say which drop path the base was trained with
        "biformer_base": {**_SMALL, "embed_dim": 96, "num_heads": (3, 6, 12, 8), "drop_path_rate": 0.4},
    },
    tasks=dict.fromkeys(("biformer_tiny", "biformer_small", "biformer_base"), _BY_TASK),
)
register(__name__, BiFormerSTL, {"biformer_stl": _STL}, tasks={"biformer_stl": _BY_TASK})
register(__name__, BiFormerSTLNchw, {"biformer_stl_nchw": _STL}, tasks={"biformer_stl_nchw": _BY_TASK})
