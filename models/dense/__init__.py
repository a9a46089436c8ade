"""Detection and segmentation: backbones of this package (or timm's) under the heads of the field.

Nothing here is imported by ``import nearfield``: torchvision's detectors cost time.
"""

from __future__ import annotations

from .backbone import DenseBackbone

__all__ = ["DenseBackbone"]
