"""Opening a picture: from any file that Pillow reads to 8-bit gray, RGB or RGBA, the right way up."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import tv_tensors

from ..errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels: Pillow's colour mode
_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str | Path, channels: int = 3, *, upright: bool = True) -> tv_tensors.Image:
    """The picture in a file as a uint8 image (channels, height, width), 0 black and 255 white.

    Palettes, CMYK and gray are converted; 16-bit values are scaled, not clipped; alpha is kept with 4 channels and
    dropped otherwise, as torchvision and mmdet do. Of several frames the first is read.

    Args:
        path: the file.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA).
        upright: turn the picture as its EXIF orientation says, as viewers do.

    Raises:
        DataError: the file is missing or broken, or its values have no agreed range (32-bit, floating point).
        ValueError: another number of channels.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels}: pictures have 1, 3 or 4")
    try:
        with open(path, "rb") as file:
            return tv_tensors.Image(open_picture(file, MODES[channels], upright=upright))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # Pillow raises nearly everything
        raise unreadable(path, error) from error


def open_picture(file: str | Path | IO[bytes], mode: str, *, upright: bool) -> Image.Image:
    """The picture in a file, loaded, in one of the `MODES`. Raises whatever Pillow raises."""
    opened = Image.open(file)
    opened.load()
    image = as_eight_bits(opened)  # before turning: a turned picture no longer says which format it came from
    return as_mode(turned(image) if upright else image, mode)


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The same picture in 8 bits per channel of one of the `MODES`.

    Raises:
        ValueError: 32-bit integers or floating point numbers, or a colour space that Pillow does not convert.
    """
    image = as_eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def as_eight_bits(image: Image.Image) -> Image.Image:
    """The same picture with 16 bits scaled to 8, EXIF kept; ValueError for 32 bits, whose range nobody knows."""
    # 16-bit files are I;16 in today's Pillow and were I in older ones; only PNG and PGM say that 65535 is white
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint16)
        eight = Image.fromarray((values >> 8).astype(np.uint8))  # the upper byte, as Pillow reads 16-bit RGB
        exif = image.getexif() if image.format else None
        if exif:
            eight.getexif().update(exif)
        return eight
    if image.mode in ("I", "F"):
        raise ValueError(f"values of mode {image.mode} have no agreed range; save it with 8 or 16 bits per channel")
    return image


def turned(image: Image.Image) -> Image.Image:
    """The loaded picture as its EXIF orientation says it is seen; unchanged when there is none or it is unreadable."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def unreadable(name: object, error: Exception) -> DataError:
    """The one line about a picture that cannot be read."""
    # PIL's own text names an object in memory
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(f"{name}: cannot read this image ({reason}): repair or remove it")


def image_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """(height, width) of the picture in a file, as `read_image` would give it, from its header alone.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                across = upright and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            except Exception:  # as in `turned`
                across = False
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # Pillow raises nearly everything
        raise unreadable(path, error) from error
    return (width, height) if across else (height, width)
