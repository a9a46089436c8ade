"""The semantic branch of Panoptic FPN (Kirillov et al., CVPR 2019, arXiv 1901.02446): a light decoder on an FPN."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from torch import Tensor, nn

from .convs import ConvNormReLU, PixelClassifier, resize
from .fpn import FPN


class SemanticFPN(nn.Module):
    """An FPN, whose levels are brought to the finest by convolutions and doublings, summed and classified.

    Args:
        in_channels: channels of each map of the backbone, finest first.
        strides: reduction of each map.
        num_classes: maps of logits.
        channels: of the sum, 128 as published.
        fpn_channels: of the pyramid, 256 as published.
        norm: ``batch`` (as BiFormer and PVT train it) or ``group`` (as in the paper).
        dropout: before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        channels: int = 128,
        fpn_channels: int = 256,
        norm: str = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fpn = FPN(list(in_channels), fpn_channels)
        doublings = [round(log2(stride / strides[0])) for stride in strides]
        self.scales = nn.ModuleList(_Scale(fpn_channels, channels, count, norm) for count in doublings)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i), finest first, to logits (B, num_classes, H_0, W_0)."""
        levels = self.fpn({str(i): y for i, y in enumerate(maps)}).values()
        scaled = [scale(level) for scale, level in zip(self.scales, levels, strict=True)]
        total = scaled[0]
        for y in scaled[1:]:
            # a map of an odd size is not doubled to that of the level below
            total = total + resize(y, total.shape[2:])
        return self.classifier(total)


class _Scale(nn.Module):
    """Convolutions, each followed by a doubling of the map; one convolution alone for no doubling."""

    def __init__(self, in_channels: int, channels: int, doublings: int, norm: str) -> None:
        super().__init__()
        self.doubles = doublings > 0
        self.convs = nn.ModuleList(
            ConvNormReLU(channels if i else in_channels, channels, 3, norm) for i in range(max(1, doublings))
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
            if self.doubles:
                x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return x
