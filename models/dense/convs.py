"""The convolution of segmentation heads, and resizing as they do it."""

from __future__ import annotations

from math import gcd

from torch import Size, Tensor, nn
from torch.nn import functional as F


class ConvNormReLU(nn.Module):
    """Convolution without bias, norm, ReLU; the size of the map stays.

    A single value per channel (a batch of one image on a map of one token, as in UPerNet's coarsest pooling) has no
    statistics: batch norm then takes its running ones in training too, where PyTorch would raise.

    Args:
        in_channels, out_channels: channels.
        kernel_size: odd.
        norm: ``batch``, or ``group`` for 32 groups, fewer where they would have less than four channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = _norm(norm, out_channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        x = self.conv(x)
        norm = self.norm
        if self.training and isinstance(norm, nn.BatchNorm2d) and x.numel() == x.shape[1]:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = norm(x)
        return self.act(x)


def _norm(name: str, channels: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        # a group of a single channel would have no statistics on a map of one token
        return nn.GroupNorm(gcd(32, channels // 4) if channels % 4 == 0 else 1, channels)
    raise ValueError(f"norm={name!r} is unknown: use batch or group")


class PixelClassifier(nn.Module):
    """Dropout of whole channels and a 1x1 convolution to one map of logits per class.

    Args:
        channels: of the map.
        num_classes: maps of logits.
        dropout: probability that a channel is zeroed in training.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, num_classes, H, W)."""
        return self.conv(self.drop(x))


def resize(x: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) to the given (height, width), bilinearly between pixel centres (``align_corners=False``)."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
