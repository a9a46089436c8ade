"""NAT: Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv 2204.07143).

Every query sees the kernel_size x kernel_size keys nearest to it; at the border the window moves inward instead of
shrinking. Overlapping convolutions make the tokens and halve the maps. With dilations this is DiNAT, in ``dinat.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from ..checkpoints import Layout, Rule
from ..ops import Neighborhood
from .arguments import stage_count
from .layers import ConvDownsample, ConvStem, LocalAttention, Pair, Size, per_stage, to_pair
from .registry import register
from .transformer import LocalTransformer

Dilations = Sequence[Size | Sequence[Size]]


class NeighborhoodAttention(LocalAttention):
    """Dilated neighborhood attention with a learned table.

    A map smaller than kernel_size * dilation is zero-padded to it before the qkv projection, unmasked, as natten 0.14
    did, with which the published weights were trained.

    Args:
        dim, num_heads, **options: as in ``LocalAttention``.
        kernel_size, dilation: (y, x) pairs.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: Pair, dilation: Pair, **options: Any) -> None:
        super().__init__(dim, num_heads, (kernel_size[0] - 1, kernel_size[1] - 1), **options)
        self.set_kernel(kernel_size, dilation)

    def set_kernel(self, kernel_size: Pair, dilation: Pair) -> None:
        """Change kernel and dilation; the table is resized to the kernel."""
        self.resize_table((kernel_size[0] - 1, kernel_size[1] - 1))
        self.kernel_size, self.dilation = kernel_size, dilation
        self.neighborhood = Neighborhood(kernel_size, dilation)
        self.least = (kernel_size[0] * dilation[0], kernel_size[1] * dilation[1])

    def padded(self, height: int, width: int) -> Pair:
        """At least kernel_size * dilation on each axis."""
        return max(height, self.least[0]), max(width, self.least[1])

    def pattern(self, height: int, width: int) -> Neighborhood:
        """The same for every map."""
        return self.neighborhood


class NAT(LocalTransformer):
    """NAT and DiNAT; takes any image of at least 32 x 32.

    Args:
        kernel_size: an int or (y, x) pair, or one for each stage.
        dilations: for each stage an int for all its blocks, or a sequence with an int or pair for each; None for 1.
        depths, **options: as in ``LocalTransformer``.
    """

    stem_type: ClassVar[type[nn.Module]] = ConvStem
    downsample_type: ClassVar[type[nn.Module]] = ConvDownsample
    first_conv = "stem.conv1"
    out_norm = nn.LayerNorm  # detection/nat.py and dinats.py, segmentation/nat.py and dinats.py
    layouts = (
        Layout(
            name="shi-labs",
            source="SHI-Labs/Neighborhood-Attention-Transformer, classification/nat.py and dinat.py",
            signature=("patch_embed.proj.0.weight", "levels.0.blocks.0.attn.rpb"),
            rules=(
                Rule("patch_embed.proj.0.{rest}", "stem.conv1.{rest}"),
                Rule("patch_embed.proj.1.{rest}", "stem.conv2.{rest}"),
                Rule("patch_embed.norm.{rest}", "stem.norm.{rest}"),
                Rule("levels.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}"),
                Rule("levels.{i}.blocks.{j}.attn.rpb", "stages.{i}.blocks.{j}.attn.rel_pos_bias"),
                Rule("levels.{i}.blocks.{j}.gamma1", "stages.{i}.blocks.{j}.ls1.gamma"),
                Rule("levels.{i}.blocks.{j}.gamma2", "stages.{i}.blocks.{j}.ls2.gamma"),
                Rule("levels.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
        ),
    )

    def __init__(
        self,
        *,
        kernel_size: Size | Sequence[Size] = 7,
        dilations: Dilations | None = None,
        depths: Sequence[int] = (3, 4, 6, 5),
        **options: Any,
    ) -> None:
        kernels = _kernels(kernel_size, stage_count(depths))
        table = _dilations(dilations, depths)

        def attention(stage: int, block: int, dim: int, num_heads: int, **drops: Any) -> NeighborhoodAttention:
            return NeighborhoodAttention(dim, num_heads, kernels[stage], table[stage][block], **drops)

        super().__init__(attention, depths=depths, **options)
        self.depths = tuple(depths)

    def _resize_attention(
        self,
        img_size: Pair,
        kernel_size: Size | Sequence[Size] | None = None,
        dilations: Dilations | None = None,
        **others: Any,
    ) -> None:
        super()._resize_attention(img_size, **others)
        blocks = [list(stage.blocks) for stage in self.stages]
        # one entry for each stage that the model was made with, also where some are pruned
        kernels = None if kernel_size is None else _kernels(kernel_size, len(self.depths))
        table = None if dilations is None else _dilations(dilations, self.depths)
        for i, stage in enumerate(blocks):
            for j, block in enumerate(stage):
                block.attn.set_kernel(
                    block.attn.kernel_size if kernels is None else kernels[i],
                    block.attn.dilation if table is None else table[i][j],
                )


def _kernels(kernel_size: Size | Sequence[Size], stages: int) -> list[Pair]:
    """The kernel of every stage."""
    return [to_pair("kernel_size", kernel) for kernel in per_stage("kernel_size", kernel_size, stages)]


def _dilations(dilations: Dilations | None, depths: Sequence[int]) -> list[list[Pair]]:
    """The dilation of every block of every stage."""
    if dilations is None:
        return [[(1, 1)] * depth for depth in depths]
    if not isinstance(dilations, Sequence) or len(dilations) != len(depths):
        raise ValueError(f"dilations must have one entry for each of the {len(depths)} stages, got {dilations!r}")
    table = []
    for i, (entry, depth) in enumerate(zip(dilations, depths, strict=True)):
        blocks: list[Size] = [entry] * depth if isinstance(entry, int) else list(entry)
        if len(blocks) != depth:
            raise ValueError(f"dilations[{i}] has {len(blocks)} entries for the {depth} blocks of that stage")
        table.append([to_pair(f"dilations[{i}]", dilation) for dilation in blocks])
    return table


_TINY = {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0}

register(
    __name__,
    NAT,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "nat_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 1),
            "num_heads": (1, 2, 4),
            "kernel_size": (5, 5, 3),
            "mlp_ratio": 2.0,
        },
        # for images of 128 x 128 with small things on them: maps of 32, 16 and 8 tokens a side
        "nat_nano_128": {
            "img_size": 128,
            "embed_dim": 32,
            "depths": (2, 2, 2),
            "num_heads": (2, 4, 8),
            "kernel_size": 5,
            "mlp_ratio": 3.0,
        },
        "nat_mini": {**_TINY, "depths": (3, 4, 6, 5), "drop_path_rate": 0.2},
        "nat_tiny": {**_TINY, "depths": (3, 4, 18, 5), "drop_path_rate": 0.2},
        "nat_small": {**_SMALL, "depths": (3, 4, 18, 5), "layer_scale": 1e-5, "drop_path_rate": 0.3},
        "nat_base": {**_BASE, "depths": (3, 4, 18, 5), "layer_scale": 1e-5, "drop_path_rate": 0.5},
    },
)
