"""A picture as a model's input, prepared as its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _classify import preparation, transform
from nearfield.engine.dense.decode import MODES, read_image
from nearfield.engine.errors import DataError
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

DRAWN = "drawn by this script (a gradient with discs): it shows that the model runs, not what it knows"


def as_input(path: Path | None, model: Any, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """The image of a file, or a drawn one, as a batch of one (1, in_chans, H, W); and what it is, in words.

    Raises:
        ValueError: the file is no image, or the model takes channels that no picture has.
    """
    channels = model.in_chans
    if channels not in MODES:
        raise ValueError(f"the model takes {channels} channels: only pictures of 1, 3 or 4 channels can be shown to it")
    if path is None:
        image = _drawn().convert(MODES[channels])
    else:
        try:
            image = to_pil_image(read_image(path, channels))
        except DataError as error:
            raise ValueError(f"--picture is no image that can be read: {error}") from None
    tensor = transform(preparation(model, size, channels))(image)
    return tensor[None], DRAWN if path is None else str(path)


def _drawn(side: int = 256) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.stack([x, y, 1 - x], -1)
    for cy, cx, radius, color in ((0.35, 0.3, 0.18, (1.0, 0.8, 0.1)), (0.65, 0.7, 0.22, (0.1, 0.2, 0.6))):
        image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = color
    return Image.fromarray((255 * image).astype(np.uint8))
