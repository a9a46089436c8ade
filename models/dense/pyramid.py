"""Feature pyramids as torchvision's detectors take them (arXiv 1612.03144)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .backbone import DenseBackbone
from .fpn import FPN


class Pyramid(nn.Module):
    """A backbone's maps with one number of channels, and coarser ones on top of them.

    Args:
        body: makes the maps.
        channels: of every map.
        coarser: ``pool`` adds every second point of the last map (R-CNNs); ``conv`` two maps by convolutions of stride
            2 on the backbone's last one (RetinaNet), ``conv_on_output`` on the pyramid's last one (FCOS).

    Attributes:
        out_channels: channels of every map.
        strides: of each map, the finest first.
    """

    def __init__(self, body: DenseBackbone, channels: int = 256, coarser: str = "pool") -> None:
        super().__init__()
        extra: ExtraFPNBlock = LastLevelMaxPool()
        if coarser != "pool":
            extra = LastLevelP6P7(body.channels[-1] if coarser == "conv" else channels, channels)
        self.body = body
        self.fpn = FPN(body.channels, channels, extra)
        self.out_channels = channels
        self.strides = [*body.strides, *(body.strides[-1] * 2**i for i in range(1, 2 if coarser == "pool" else 3))]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Image (B, in_chans, H, W) to maps (B, channels, H / stride, W / stride), by name: ``0``, ``1``, ..."""
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
