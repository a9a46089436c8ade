"""Feature pyramid network (Lin et al., CVPR 2017, arXiv 1612.03144).

In inference no upsampled copy is made of a map that is added to a channels-last one of twice its size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from ..inference import ordinary_inference, unhooked

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
        and ordinary_inference(fine, coarse)
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
    parts = list(block.children())
    return unhooked(block, Conv2dNormActivation) and len(parts) == 1 and unhooked(parts[0], nn.Conv2d)
