"""Sizes, anchors and regions of detectors, with strides that are known instead of guessed from the images.

torchvision works out strides from the sizes of images and maps, which goes wrong for images much smaller than what they
are padded to, and computes coordinates in the dtype of the maps, which under autocast is too coarse for pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper


class Resize(GeneralizedRCNNTransform):
    """Normalises images and pads a batch; in evaluation scales them to ``min_size`` and ``max_size`` before.

    The shorter side becomes ``min_size``, or less where the longer one would exceed ``max_size``. In training images
    come as the data set made them.
    """

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """(C, H, W) to (C, H', W'), each at least 1."""
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        if size != (height, width):
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        return image, target


class Anchors(AnchorGenerator):
    """Anchors centred at the multiples of a map's stride, neither rounded nor of less than single precision.

    Args:
        strides: of the maps.
        sizes: square roots of the anchors' areas in pixels, several for each map.
        aspect_ratios: height / width, the same for all maps.
    """

    def __init__(
        self, strides: Sequence[int], sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(ratios * scales, 4) boxes around the origin."""
        boxes = [
            (-scale / root, -scale * root, scale / root, scale * root)
            for root in map(math.sqrt, aspect_ratios)
            for scale in scales
        ]
        return torch.tensor(boxes, dtype=dtype, device=device) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the anchors to the device of the maps."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """Anchors of maps of these sizes; the strides are those of the constructor."""
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])


class RegionPool(MultiScaleRoIAlign):
    """Maps under boxes at a fixed resolution, each box from the map of its size (arXiv 1612.03144, equation 1).

    Args:
        strides: of the maps, doubling from one to the next.
        output_size: cells a side.
        sampling_ratio: samples a side in each cell; 0 for as many as it has pixels, as published.
    """

    def __init__(self, strides: Sequence[int], output_size: int, sampling_ratio: int = 0) -> None:
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(f"strides {tuple(strides)} must double from map to map: choose out_indices without a gap")
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio)
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """Maps by name and one (n, 4) of boxes for each image to (sum of n, channels, output_size, output_size)."""
        maps = [x[name] for name in self.featmap_names]
        rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
        levels = self.map_levels(boxes)
        pooled = rois.new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (scale, y) in enumerate(zip(self.scales, maps, strict=True)):
            mine = torch.where(levels == level)[0]
            # half a pixel further up and left than torchvision's own pooling: as published
            pooled[mine] = roi_align(
                y.to(rois.dtype), rois[mine], self.output_size, scale, self.sampling_ratio, aligned=True
            )
        return pooled
