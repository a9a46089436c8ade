"""Feature pyramid network (Lin et al., CVPR 2017, arXiv 1612.03144), which makes no upsampled copies in inference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from ..products import unhooked

__all__ = ["FPN"]


class FPN(FeaturePyramidNetwork):
    """torchvision's FPN, with its arguments, parameters and results."""

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps (B, in_channels[i], H_i, W_i) by name, finest first, to (B, out_channels, H_i, W_i) each."""
        names, maps = list(x), list(x.values())
        above: Tensor | None = None
        results: list[Tensor] = []
        for y, inner, layer in zip(maps[::-1], self.inner_blocks[::-1], self.layer_blocks[::-1], strict=True):
            lateral = inner(y)
            above = lateral if above is None else _add_upsampled(lateral, above, ours=_makes_its_own(inner))
            results.insert(0, layer(above))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def _add_upsampled(fine: Tensor, coarse: Tensor, ours: bool) -> Tensor:
    """``fine`` plus ``coarse`` at its size, by nearest neighbours; stored in ``fine`` if it is ours to change."""
    in_place = (
        ours
        # first: whatever is asked of a tensor while a graph is made becomes a condition of that graph
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_grad_enabled()
        and fine.shape[2:] == (2 * coarse.shape[2], 2 * coarse.shape[3])
        # otherwise the innermost loop runs over two neighbours, not over channels: slower than a copy
        and fine.is_contiguous(memory_format=torch.channels_last)
    )
    if not in_place:
        return fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest")
    height, width = coarse.shape[2:]
    fine.unflatten(3, (width, 2)).unflatten(2, (height, 2)).add_(coarse[:, :, :, None, :, None])
    return fine


def _makes_its_own(block: nn.Module) -> bool:
    """Whether nobody but the caller holds what a block returns: a convolution made it, and no hook saw it."""
    return unhooked(block, Conv2dNormActivation) and all(unhooked(part, nn.Conv2d) for part in block.children())
