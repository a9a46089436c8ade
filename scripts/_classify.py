"""From a picture to the likeliest classes: preparation as the model wants it, names, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from nearfield.engine import data
from nearfield.engine.config import DataConfig
from PIL import Image
from torch import Tensor

TOP = 5


def preparation(model: Any, size: tuple[int, int] | None, channels: int) -> data.Preparation:
    """How a picture becomes the model's input, by its pretrained_cfg; `size` (height, width) in place of its own."""
    return data.prepare(DataConfig(name="folder"), model, img_size=size, in_chans=channels)


def transform(how: data.Preparation) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of timm: a picture of as many channels as `how` has to a tensor (channels, H, W)."""
    made: Callable[[Image.Image], Tensor] = timm.data.create_transform(
        input_size=(len(how.mean), *how.size),
        interpolation=how.interpolation,
        mean=tuple(how.mean),
        std=tuple(how.std),
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
    )
    return made


def likeliest(logits: Tensor, names: Sequence[str] | None, count: int = TOP) -> list[dict[str, Any]]:
    """The `count` likeliest classes for logits (classes,): `class`, `name` (None without names) and `p`, falling."""
    shares, classes = logits.float().softmax(-1).topk(min(count, len(logits)))
    return [
        {"class": number, "name": names[number] if names else None, "p": share}
        for share, number in zip(shares.tolist(), classes.tolist(), strict=True)
    ]


def describe(top: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each of the likeliest classes."""
    return [f"{row['p']:7.2%}  {row['class']}  {row['name'] or ''}".rstrip() for row in top]


def names_of_classes(path: Path | None, classes: int | None) -> list[str] | None:
    """The lines of a file, one for each class in the order of the numbers; None without a file.

    Args:
        path: of the file.
        classes: how many there must be; None for any number.

    Raises:
        ValueError: it cannot be read, or has another number of lines.
    """
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--names {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(names) != (len(names) if classes is None else classes):
        raise ValueError(f"--names {path} has {len(names)} lines, the model {classes} classes: one name a line")
    return names
