"""HNT: Hilbert Neighborhood Transformer (Li and Xu, ICLR 2026, arXiv 2511.05832).

NAT's body; the neighborhood of a token is the run of kernel_size consecutive tokens around it along the generalized
Hilbert curve of the map, and the position table is one of displacements along that curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import CheckpointMismatch
from ..ops import HilbertNeighborhood, hilbert_order
from .arguments import stage_count
from .layers import ConvDownsample, ConvStem, LocalAttention, Pair, counts_per_stage, pad_map
from .nat import NAT
from .registry import register
from .transformer import LocalTransformer


@torch.compiler.assume_constant_result  # the drawing of a curve is not traced
def _order(height: int, width: int) -> tuple[int, ...]:
    """Raster index of the token at each place of the curve."""
    return tuple(hilbert_order(height, width).tolist())


class HilbertNeighborhoodAttention(LocalAttention):
    """Neighborhood attention along the Hilbert curve with a learned table of displacements along it.

    The table is (heads, 1, 2 * kernel_size - 1). The tokens of a map that has fewer than kernel_size are zero-padded to
    it at the end of the curve, before the qkv projection, unmasked, as natten 0.14 did.

    Args:
        dim, num_heads, **options: as in ``LocalAttention``.
        kernel_size: tokens of a neighborhood.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, **options: Any) -> None:
        super().__init__(dim, num_heads, (0, kernel_size - 1), **options)
        self.set_kernel(kernel_size)

    def set_kernel(self, kernel_size: int) -> None:
        """Change the kernel; the table is resized to it."""
        self.resize_table((0, kernel_size - 1))
        self.kernel_size = kernel_size
        self.neighborhood = HilbertNeighborhood(kernel_size)

    def pattern(self, height: int, width: int) -> HilbertNeighborhood:
        """The same for every map."""
        return self.neighborhood

    def position_bias(self, height: int, width: int) -> Tensor:
        """The table as the operator takes it, (heads, 2 * kernel_size - 1)."""
        return self.rel_pos_bias.squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        H, W = x.shape[1:3]
        if self.kernel_size <= H * W:
            return super().forward(x)
        # on a map of one row the curve is the row
        sides = tuple(range(self.kernel_size))  # a compiled graph's symbolic side becomes a number by indexing
        order = torch.tensor(_order(sides[H], sides[W]), device=x.device)
        row = pad_map(x.flatten(1, 2)[:, order].unsqueeze(1), 1, self.kernel_size)
        return super().forward(row)[:, 0, order.argsort()].unflatten(1, (H, W))


@dataclass(frozen=True)
class CurveTable:
    """natten's 1-D table (heads, 2 * kernel_size - 1) <-> (heads, 1, 2 * kernel_size - 1); both are key minus query."""

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """A row more; CheckpointMismatch when it is no table along a curve."""
        if tensor.ndim != 2:
            raise CheckpointMismatch(
                f"a table along a curve has shape {tuple(tensor.shape)}, expected (heads, 2*kernel_size-1): "
                "the file is of a model with 2-D neighborhoods, as NAT has"
            )
        return tensor.unsqueeze(1)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """A row less."""
        return tensor.squeeze(1)


class HNT(LocalTransformer):
    """Hilbert Neighborhood Transformer; takes any image of at least 32 x 32.

    Args:
        kernel_size: tokens of a neighborhood, an int or one for each stage.
        depths, **options: as in ``LocalTransformer``.
    """

    stem_type = ConvStem
    downsample_type = ConvDownsample
    first_conv = "stem.conv1"
    out_norm = NAT.out_norm
    # the released file is made from NAT's and kept its keys; the tables have one axis
    layouts = (
        replace(
            NAT.layouts[0],
            name="hilbert",
            source="Yunge6666/Hilbert-Local-Attention, hnt.py",
            rules=tuple(
                replace(rule, transform=CurveTable()) if rule.theirs.endswith(".rpb") else rule
                for rule in NAT.layouts[0].rules
            ),
        ),
    )

    def __init__(
        self, *, kernel_size: int | Sequence[int] = 49, depths: Sequence[int] = (3, 4, 6, 5), **options: Any
    ) -> None:
        kernels = counts_per_stage("kernel_size", kernel_size, stage_count(depths))

        def attention(stage: int, block: int, dim: int, num_heads: int, **drops: Any) -> HilbertNeighborhoodAttention:
            return HilbertNeighborhoodAttention(dim, num_heads, kernels[stage], **drops)

        super().__init__(attention, depths=depths, **options)

    def _resize_attention(self, img_size: Pair, kernel_size: int | Sequence[int] | None = None, **others: Any) -> None:
        super()._resize_attention(img_size, **others)
        if kernel_size is None:
            return
        kernels = counts_per_stage("kernel_size", kernel_size, len(self.feature_info))
        # stages may have been pruned
        for stage, kernel in zip(self.stages, kernels, strict=False):
            for block in stage.blocks:
                block.attn.set_kernel(kernel)


_TINY = {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0}

# the kernel of 49 is not in the released factories: it is what the published FLOPs of mini and tiny imply, and is taken
# for small and base, of which nothing is published
register(
    __name__,
    HNT,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "hnt_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 1),
            "num_heads": (1, 2, 4),
            "kernel_size": (25, 25, 9),
            "mlp_ratio": 2.0,
        },
        "hnt_mini": {**_TINY, "depths": (3, 4, 6, 5), "drop_path_rate": 0.2},
        "hnt_tiny": {**_TINY, "depths": (3, 4, 18, 5), "drop_path_rate": 0.2},
        "hnt_small": {**_SMALL, "depths": (3, 4, 18, 5), "layer_scale": 1e-5, "drop_path_rate": 0.3},
        "hnt_base": {**_BASE, "depths": (3, 4, 18, 5), "layer_scale": 1e-5, "drop_path_rate": 0.5},
    },
)
