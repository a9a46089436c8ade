"""Detection and segmentation: backbones of this package (or timm's) under the heads of the field.

Nothing here is imported by ``import nearfield``.
"""

from __future__ import annotations

from .backbone import DenseBackbone
from .detection import Detector, create_detector
from .pyramid import Pyramid
from .segmentation import Segmentor, create_segmentor

__all__ = ["DenseBackbone", "Detector", "Pyramid", "Segmentor", "create_detector", "create_segmentor"]
