"""A picture as a model's input, prepared as its configuration says; and names of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_MODES = {1: "L", 3: "RGB"}
DRAWN = "drawn by this script (a gradient with discs): it shows that the model runs, not what it knows"


def as_input(path: Path | None, model: Any, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """The image of a file, or a drawn one, as a batch of one (1, in_chans, H, W); and what it is, in words.

    Raises:
        ValueError: the file is no image, or the model takes neither one nor three channels.
    """
    channels = model.in_chans
    if channels not in _MODES:
        raise ValueError(f"the model takes {channels} channels: only pictures of 1 or 3 channels can be shown to it")
    image = _drawn() if path is None else _opened(path)
    config = dict(timm.data.resolve_model_data_config(model))
    height, width = size or config["input_size"][1:]
    config["input_size"] = (channels, height, width)
    for key in ("mean", "std"):  # of colours where the configuration is that of the published weights
        given = tuple(config[key])
        config[key] = given if len(given) == channels else (sum(given) / len(given),) * channels
    tensor: Any = timm.data.create_transform(**config)(image.convert(_MODES[channels]))
    return tensor[None], DRAWN if path is None else str(path)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"--picture {path}: there is no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--picture {path} is no image that can be read ({error})") from None


def _drawn(side: int = 256) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.stack([x, y, 1 - x], -1)
    for cy, cx, radius, color in ((0.35, 0.3, 0.18, (1.0, 0.8, 0.1)), (0.65, 0.7, 0.22, (0.1, 0.2, 0.6))):
        image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = color
    return Image.fromarray((255 * image).astype(np.uint8))


def names_of_classes(path: Path | None, classes: int) -> list[str] | None:
    """The lines of a file, one for each class in the order of the numbers; None without a file.

    Raises:
        ValueError: it cannot be read, or has another number of lines.
    """
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--names {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(names) != classes:
        raise ValueError(f"--names {path} has {len(names)} lines, the model {classes} classes: one name a line")
    return names
