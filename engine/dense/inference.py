"""From images to class probabilities: whole or by a sliding window, averaged over scales and mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.backbone import MIN_IMAGE
from .crops import as_pair, fitted_size

Model = Callable[[Tensor], Any]
# the ratios of the published multi-scale results (mmseg's `--aug-test`)
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@torch.no_grad()
def predict(
    model: Model,
    images: Tensor,
    *,
    out_size: tuple[int, int] | None = None,
    scale: tuple[int, int] | None = None,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
    crop: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    antialias: bool = True,
) -> Tensor:
    """Class probabilities (B, K, height, width), float32, at the size of `out_size`; `.argmax(1)` is the class map.

    The softmax of each view is averaged, as mmseg does: a view's logits (of windows: their mean) are resized first.
    One view is held at a time, whatever their number.

    Args:
        model: images -> logits (B, K, h, w), in evaluation mode; logits of another size are resized to the images'.
        images: (B, C, H, W), normalised, of any size.
        out_size: (height, width) of the result, the original image's; None: that of `images`.
        scale: (longest, shortest) side that images are fitted into, see `crops.fitted_size`; None: as they are.
        ratios: what the scale, or the size, is multiplied with, one view each; `RATIOS` for published numbers.
        flip: every view mirrored as well.
        crop, stride: of the sliding window, see `slide`; crop None: whole images.
        antialias: smooth while shrinking images.

    Raises:
        ValueError: no ratio, or what `slide` raises.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios={tuple(ratios)}: one or more positive numbers")
    size = tuple(images.shape[-2:])
    total: Tensor | None = None
    for ratio in ratios:
        wanted = fitted_size(size, scale, ratio)
        view = images if wanted == size else _resized(images, wanted, antialias=antialias)
        for mirrored in (False, True) if flip else (False,):
            logits = _view(model, view.flip(-1) if mirrored else view, crop, stride)
            logits = _resized(logits.flip(-1) if mirrored else logits, out_size or size).softmax(1)
            total = logits if total is None else total.add_(logits)
            del logits
    assert total is not None
    views = len(ratios) * (1 + flip)
    return total if views == 1 else total.div_(views)


@torch.no_grad()
def slide(
    model: Model, images: Tensor, *, crop: int | tuple[int, int], stride: int | tuple[int, int] | None = None
) -> Tensor:
    """Logits (B, K, H, W), float32, of images (B, C, H, W): the mean over the windows that see a pixel.

    Windows of the size of `crop` are `stride` apart; the last ones are moved inward, so that all are of one size
    (mmseg's slide mode). Images smaller than the crop are one window of their own size.

    Args:
        model: images -> logits (B, K, h, w).
        images: of any size.
        crop: side or (height, width) of a window.
        stride: from window to window; two thirds of the crop by default (341 of 512, as published).

    Raises:
        ValueError: the stride leaves gaps, or a number is not positive.
    """
    height, width = images.shape[-2:]
    crops = as_pair(crop)
    strides = tuple(max(1, side * 2 // 3) for side in crops) if stride is None else as_pair(stride, "stride")
    if any(step > side for step, side in zip(strides, crops, strict=True)):
        raise ValueError(f"stride={stride} is larger than crop={crop}: pixels between the windows would be missed")
    rows, columns = (
        _windows(length, side, step) for length, side, step in zip((height, width), crops, strides, strict=True)
    )
    total: Tensor | None = None
    for top, bottom in rows:
        for left, right in columns:
            logits = _logits(model, images[..., top:bottom, left:right])
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[..., top:bottom, left:right] += logits
    assert total is not None
    # a pixel is seen once per row of windows and column of windows that hold it
    seen = [_seen(length, windows, total.device) for length, windows in ((height, rows), (width, columns))]
    return total.div_(seen[0][:, None] * seen[1])


def _windows(length: int, side: int, step: int) -> list[tuple[int, int]]:
    """[start, stop) of the windows along an axis."""
    starts = [min(step * index, max(length - side, 0)) for index in range(max(length - side + step - 1, 0) // step + 1)]
    return [(start, min(start + side, length)) for start in starts]


def _seen(length: int, windows: list[tuple[int, int]], device: torch.device) -> Tensor:
    counts = torch.zeros(length, device=device)
    for start, stop in windows:
        counts[start:stop] += 1
    return counts


def _view(
    model: Model, images: Tensor, crop: int | tuple[int, int] | None, stride: int | tuple[int, int] | None
) -> Tensor:
    if crop is None:
        return _logits(model, images)
    return slide(model, images, crop=crop, stride=stride)


def filled_up(model: Model, least: int = MIN_IMAGE) -> Model:
    """`model` for images of any size: those with sides below `least` are filled up at the right and bottom."""

    def filled(images: Tensor) -> Any:
        height, width = images.shape[-2:]
        missing = (0, max(0, least - width), 0, max(0, least - height))
        if not any(missing):
            return model(images)
        return _logits(model, F.pad(images, missing))[..., :height, :width]

    return filled


def _logits(model: Model, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        kind = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model gave {kind}; expected logits (B, K, h, w): is it a segmentor, and in eval mode?")
    return _resized(logits.float(), tuple(images.shape[-2:]))


def _resized(maps: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
