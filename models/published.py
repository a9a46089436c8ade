"""What files and the catalog know of a backbone: its published layouts, and the names of what loading adapts."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import nn

from ..checkpoints import Layout


class Published(nn.Module):
    """Base of the backbones.

    Class attributes, set by the families: ``layouts`` (published layouts), ``first_conv`` (name of the first
    convolution) and ``out_norm`` (makes the norm that the published detectors and segmentors put on every map that they
    take, None for none).
    """

    layouts: ClassVar[tuple[Layout, ...]] = ()
    first_conv: ClassVar[str] = "stem.proj"
    out_norm: ClassVar[type[nn.Module] | partial[Any] | None] = None
    in_chans: int
