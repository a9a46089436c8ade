"""UPerNet's decoder (Xiao et al., ECCV 2018, arXiv 1807.10221), with the numbers that Swin, NAT and BiFormer use.

Pyramid pooling of the coarsest map, a top-down pathway over the others, and all levels fused at the finest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convs import ConvNormReLU, PixelClassifier, resize

POOL_SIZES = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """PSPNet's pooling: the map beside its averages over grids of several sizes, fused (arXiv 1612.01105).

    Args:
        in_channels: of the map.
        channels: of each pooled map and of the result.
        sizes: cells a side of each grid.
        norm: as in ``ConvNormReLU``.
    """

    def __init__(self, in_channels: int, channels: int, sizes: Sequence[int] = POOL_SIZES, norm: str = "batch") -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.convs = nn.ModuleList(ConvNormReLU(in_channels, channels, 1, norm) for _ in sizes)
        self.fuse = ConvNormReLU(in_channels + len(self.sizes) * channels, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        pooled = [
            resize(conv(F.adaptive_avg_pool2d(x, size)), x.shape[2:])
            for size, conv in zip(self.sizes, self.convs, strict=True)
        ]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class UPerNet(nn.Module):
    """UPerNet's decoder: maps of a backbone to logits at the size of the finest.

    Args:
        in_channels: channels of each map, finest first; at least two maps.
        num_classes: maps of logits.
        channels: width of the decoder, 512 as published.
        dropout: before the classifier.
        pool_sizes: of the pyramid pooling.
        norm: as in ``ConvNormReLU``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        pool_sizes: Sequence[int] = POOL_SIZES,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.pool = PyramidPooling(in_channels[-1], channels, pool_sizes, norm)
        self.laterals = nn.ModuleList(ConvNormReLU(width, channels, 1, norm) for width in in_channels[:-1])
        self.outputs = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in in_channels[:-1])
        self.fuse = ConvNormReLU(len(in_channels) * channels, channels, 3, norm)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i), finest first, to logits (B, num_classes, H_0, W_0)."""
        x = self.pool(maps[-1])
        levels = [x]
        for y, lateral, output in reversed(list(zip(maps, self.laterals, self.outputs, strict=False))):
            x = lateral(y) + resize(x, y.shape[2:])
            levels.insert(0, output(x))
        finest = levels[0].shape[2:]
        return self.classifier(self.fuse(torch.cat([resize(level, finest) for level in levels], dim=1)))
