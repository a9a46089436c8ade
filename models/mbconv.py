"""MBConv: the inverted bottleneck of MobileNetV2 (arXiv 1801.04381) with squeeze-excite, as in MaxViT and CoAtNet.

The two lines of MaxViT, TensorFlow's and timm's, differ in what ``Convolutions`` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath, SEModule, create_conv2d, make_divisible
from torch import Tensor, nn

from .layers import pad_end, round_up


@dataclass(frozen=True)
class Convolutions:
    """In what the convolutions of published models differ.

    Attributes:
        act_layer: activation of the stem and the MBConvs.
        norm_eps: epsilon of the batch norms.
        padding: timm's padding of the 3x3 convolutions: ``same`` as TensorFlow pads, at the right and bottom first, or
            "" for one pixel on every side.
        bias: whether the stem, the shortcut and the last convolution of an MBConv have biases.
        of_output: whether the hidden channels are a multiple of the output's, not the input's.
        squeeze: channels between the two layers of squeeze-excite, as a fraction of the output's (``of_output``) or of
            the hidden ones.
    """

    act_layer: type[nn.Module]
    norm_eps: float
    padding: str
    bias: bool
    of_output: bool
    squeeze: float

    def norm_act(self, dim: int, act: bool = True) -> nn.Module:
        """Batch norm with the activation after it."""
        return BatchNormAct2d(dim, eps=self.norm_eps, act_layer=self.act_layer, apply_act=act)


class HalvingPool(nn.Module):
    """2x2 means; at an odd side the last mean is over what there is: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    ``nn.AvgPool2d`` with ``ceil_mode`` and without ``count_include_pad``, but compiled as one graph for all sizes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        H, W = x.shape[2:]
        padding = (0, round_up(W, 2) - W, 0, round_up(H, 2) - H)
        padded = pad_end(x, padding)
        means = F.avg_pool2d(padded, 2)
        return means if padded is x else means / F.avg_pool2d(pad_end(x.new_ones(1, 1, H, W), padding), 2)


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excite and a norm in front (MaxViT, section 3.3), on channels-last maps.

    Args:
        dim, out_dim: channels in and out.
        stride: 2 halves the map in the 3x3 convolution, and by 2x2 means in the shortcut; at an odd side the last mean
            is over what there is, as in TensorFlow (timm counts a zero there).
        expand_ratio: hidden channels as a multiple of the output's or input's.
        conv: the rest.
        drop_path: probability of dropping the branch for a sample.
    """

    def __init__(
        self, dim: int, out_dim: int, stride: int, expand_ratio: float, conv: Convolutions, drop_path: float
    ) -> None:
        super().__init__()
        hidden = make_divisible((out_dim if conv.of_output else dim) * expand_ratio)
        squeezed = int(conv.squeeze * (out_dim if conv.of_output else hidden))
        self.pool = HalvingPool() if stride == 2 else nn.Identity()
        self.expand = create_conv2d(dim, out_dim, 1, bias=conv.bias) if dim != out_dim else nn.Identity()
        self.pre_norm = conv.norm_act(dim, act=False)
        self.conv1 = create_conv2d(dim, hidden, 1)
        self.norm1 = conv.norm_act(hidden)
        self.conv2 = create_conv2d(hidden, hidden, 3, stride=stride, groups=hidden, padding=conv.padding)
        self.norm2 = conv.norm_act(hidden)
        self.se = SEModule(hidden, rd_channels=squeezed, act_layer=nn.SiLU)
        self.conv3 = create_conv2d(hidden, out_dim, 1, bias=conv.bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        x = x.permute(0, 3, 1, 2)
        shortcut = self.expand(self.pool(x))
        x = self.norm1(self.conv1(self.pre_norm(x)))
        x = self.se(self.norm2(self.conv2(x)))
        return (shortcut + self.drop_path(self.conv3(x))).permute(0, 2, 3, 1)
