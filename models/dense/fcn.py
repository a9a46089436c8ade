"""FCN's head (Long et al., CVPR 2015, arXiv 1411.4038): the auxiliary loss of semantic segmentation."""

from __future__ import annotations

from torch import Tensor, nn

from .convs import ConvNormReLU, PixelClassifier


class FCN(nn.Module):
    """3x3 convolutions on one map, and a classifier.

    Args:
        in_channels: of the map.
        num_classes: maps of logits.
        channels: of the convolutions, 256 as published with UPerNet.
        depth: number of convolutions, 1 as published with UPerNet.
        dropout: before the classifier.
        norm: as in ``ConvNormReLU``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(ConvNormReLU(channels if i else in_channels, channels, 3, norm) for i in range(depth)),
        )
        self.classifier = PixelClassifier(channels if depth else in_channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes, H, W)."""
        return self.classifier(self.convs(x))
