"""Parts of residual networks: convolution with norm, stem, bottleneck (He et al., CVPR 2016, arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import ConvNormAct, DropPath, create_act_layer
from torch import Tensor, nn

from .arguments import check_stem_stride


def every(x: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th row and column of (B, C, H, W).

    A 1x1 convolution of that stride is one of stride 1 after this. On a CPU, PyTorch 2.11 corrupts memory in the
    backward pass of the former when a channels-last map has few channels (seen with 8).
    """
    return x[:, :, ::stride, ::stride] if stride > 1 else x


class ConvNorm(ConvNormAct):
    """timm's convolution, norm and activation, drawn as He et al. do: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution anew; the norm is a module of its own."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class FinalConv(ConvNorm):
    """The last convolution, on the maps that stages give: (B, H, W, C) -> (B, H, W, C')."""

    def forward(self, x: Tensor) -> Tensor:
        """Another number of channels."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResNetStem(nn.Module):
    """Convolutions with norm and activation, the first of stride 2: (B, C, H, W) -> (B, H/s, W/s, dims[-1]).

    Args:
        in_chans: channels of the image.
        dims: channels after each convolution.
        kernel_size: of all of them.
        stride: 2, or 4 by 3x3 max pooling or else by the last convolution.
        pool: whether it is by pooling.
        conv: makes a convolution with its norm and activation.
    """

    def __init__(
        self,
        in_chans: int,
        dims: Sequence[int],
        kernel_size: int,
        stride: int,
        pool: bool,
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        check_stem_stride(stride)
        if stride == 4 and not pool and len(dims) < 2:
            raise ValueError(f"stem_stride=4 needs stem_pool=True or two convolutions, got stem_dims={tuple(dims)}")
        for i, dim in enumerate(dims):
            halves = i == 0 or (stride == 4 and not pool and i == len(dims) - 1)
            self.add_module(f"conv{i + 1}", conv(dims[i - 1] if i else in_chans, dim, kernel_size, stride=1 + halves))
        self.convs = len(dims)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stride == 4 and pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, ceil(H/s), ceil(W/s), dims[-1]) map, contiguous."""
        for i in range(self.convs):
            x = self.get_submodule(f"conv{i + 1}")(x)
        return self.pool(x).permute(0, 2, 3, 1).contiguous()


class Bottleneck(nn.Module):
    """Residual bottleneck: 1x1 convolution, mixing of tokens, 1x1 convolution, each with a norm; then the shortcut.

    Args:
        mixer: ``attn`` and the norm after it, or ``conv2`` and the gate after it, by the names that they get here.
        dim, inner_dim, mixed_dim, out_dim: channels in, before the mixer, after it, out.
        stride: reduction by the mixer.
        project: whether a shortcut between unlike maps is a projection; there is none at such a block otherwise.
        last_act: activation after the shortcut, None for none.
        zero_init: begin with a branch of zero, where there is a shortcut.
        drop_path: probability of dropping the branch for a sample.
        conv: makes a convolution with its norm and activation.
    """

    def __init__(
        self,
        mixer: dict[str, nn.Module],
        dim: int,
        inner_dim: int,
        mixed_dim: int,
        out_dim: int,
        stride: int,
        project: bool,
        last_act: str | type[nn.Module] | None,
        zero_init: bool,
        drop_path: float,
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv(dim, inner_dim, 1)
        self.mixers = tuple(mixer)
        for name, module in mixer.items():
            self.add_module(name, module)
        self.conv3: Any = conv(mixed_dim, out_dim, 1, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shortcut: nn.Module | None = nn.Identity()
        if dim != out_dim or stride > 1:
            self.shortcut = conv(dim, out_dim, 1, apply_act=False) if project else None
        self.stride = stride
        self.act = nn.Identity() if last_act is None else create_act_layer(last_act, inplace=True)
        self.zero_init = zero_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the branch to zero if asked for; everything else are modules of their own."""
        if self.zero_init and self.shortcut is not None:
            nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H/s), ceil(W/s), out_dim)."""
        x = x.permute(0, 3, 1, 2)
        y = self.conv1(x)
        for name in self.mixers:
            y = self.get_submodule(name)(y)
        y = self.drop_path(self.conv3(y))
        if self.shortcut is not None:
            y = y + self.shortcut(every(x, self.stride))
        return self.act(y).permute(0, 2, 3, 1)
