"""Segmentation policies: random scale, crop, flip and colours for training; resizing for evaluation.

The training policy is the one of the published UPerNet recipes (mmseg's ADE20K configurations: scale (2048, 512) times
0.5 to 2, crop 512 with at most 75 % of a class, flip, photometric distortion, padding with 255), on tv_tensors of
torchvision. Randomness is torch's global generator. Images are resized bilinearly, class maps by the nearest pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .classes import IGNORED
from .policies import choose_policy, factors, number, side, sides, switch

ADE20K_SCALE = (2048, 512)


def train_transform(
    *,
    crop: int | tuple[int, int] = 512,
    scale: tuple[int, int] | None = ADE20K_SCALE,
    ratio: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    hflip: float = 0.5,
    photometric: bool = True,
    mean: Sequence[float],
    std: Sequence[float],
    antialias: bool = True,
) -> v2.Compose:
    """(image uint8, mask) -> (image float32 (C, height, width), mask (height, width)), all of the size of the crop.

    Args:
        crop: side, or (height, width).
        scale: (longest, shortest) side that an image is fitted into, keeping its shape, before `ratio`; None: its own.
        ratio: the range that both are multiplied with, drawn uniformly.
        cat_max_ratio: a crop in which one class has this share of the labelled pixels, or more, is drawn again.
        hflip: how often an image is mirrored.
        photometric: distort brightness, contrast, saturation and hue.
        mean, std: per channel, of images in [0, 1].
        antialias: smooth while shrinking; mmseg (OpenCV) does not.
    """
    steps: list[v2.Transform] = [
        RandomRescale(scale, ratio, antialias=antialias),
        RandomCrop(crop, cat_max_ratio),
        v2.RandomHorizontalFlip(number("hflip", hflip, 0, 1)),
    ]
    if switch("photometric", photometric):
        steps.append(PhotometricDistortion())
    # padded after normalisation: zeros are the mean colour
    return v2.Compose([*steps, *_normalised(mean, std), PadTo(crop)])


def light_transform(
    *,
    crop: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    ratio: tuple[float, float] = (0.8, 1.25),
) -> v2.Compose:
    """A policy for small sets and for what must not be mirrored, such as digits: a little scale, a crop, no more."""
    return train_transform(
        crop=crop, scale=None, ratio=ratio, cat_max_ratio=1.0, hflip=0.0, photometric=False, mean=mean, std=std
    )


def eval_transform(
    *,
    scale: tuple[int, int] | None = ADE20K_SCALE,
    mean: Sequence[float],
    std: Sequence[float],
    antialias: bool = True,
) -> v2.Compose:
    """(image uint8, mask) -> (image float32, fitted into `scale`; mask as it was, for results at full size)."""
    return v2.Compose([FitImage(scale, antialias=antialias), *_normalised(mean, std)])


POLICIES: dict[str, Callable[..., v2.Compose]] = {
    "none": partial(eval_transform, scale=None),
    "random_crop": train_transform,
    "light": light_transform,
}


def segmentation_policy(
    name: str, options: Mapping[str, Any] | None = None, *, mean: Sequence[float], std: Sequence[float]
) -> v2.Compose:
    """The policy of a name with the options it takes, as a configuration gives them, for images of that mean and std.

    Raises:
        ConfigError: no such policy, an option it does not take, or a value that is not allowed.
    """
    policy: v2.Compose = choose_policy(POLICIES, name, options or {}, {"mean": mean, "std": std})
    return policy


def fitted_size(size: Sequence[int], scale: tuple[int, int] | None, ratio: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image that is fitted into (longest, shortest) side times ratio, keeping its shape.

    The largest size that exceeds neither side, as mmcv's `imrescale` counts it; with scale None, `size` times ratio.
    """
    height, width = size
    if scale is None:
        factor = ratio
    else:
        longest, shortest = (int(side * ratio) for side in scale)
        factor = min(longest / max(height, width), shortest / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize(value: Any, size: tuple[int, int], *, antialias: bool = True) -> Any:
    """An image resized bilinearly or a class map (..., H, W) by the nearest pixel, both with pixels as areas.

    torchvision's own nearest neighbour takes the upper left of a pixel for its centre, which moves labels against the
    image by up to half a pixel.
    """
    if not isinstance(value, tv_tensors.Mask):
        return F.resize(value, list(size), antialias=antialias)
    for dim, (have, want) in enumerate(zip(value.shape[-2:], size, strict=True), start=-2):
        if have != want:
            nearest = ((torch.arange(want, dtype=torch.float64) + 0.5) * (have / want)).long().clamp(max=have - 1)
            value = tv_tensors.wrap(value.index_select(dim, nearest), like=value)
    return value


def as_pair(size: int | Sequence[int], name: str = "crop") -> tuple[int, int]:
    """(height, width) of a side or of (height, width); `name` is what a message calls it."""
    rule = "a side, or (height, width), in pixels"
    if isinstance(size, Sequence):
        height, width = sides(name, size, rule, 2)
        return height, width
    one = side(name, size, rule)
    return one, one


class RandomRescale(v2.Transform):
    """Resize to `fitted_size` at a random ratio."""

    def __init__(
        self, scale: tuple[int, int] | None, ratio: tuple[float, float] = (0.5, 2.0), *, antialias: bool = True
    ) -> None:
        super().__init__()
        self.scale, self.ratio = _checked_scale(scale), factors("ratio", ratio)
        self.antialias = switch("antialias", antialias)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size drawn for this sample."""
        ratio = _uniform(*self.ratio)
        return {"size": fitted_size(v2.query_size(flat_inputs), self.scale, ratio)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One image or class map at that size."""
        return resize(inpt, params["size"], antialias=self.antialias)


class FitImage(v2.Transform):
    """Resize the image to `fitted_size`; masks stay."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, scale: tuple[int, int] | None, *, antialias: bool = True) -> None:
        super().__init__()
        self.scale, self.antialias = _checked_scale(scale), switch("antialias", antialias)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The image, resized."""
        return resize(inpt, fitted_size(inpt.shape[-2:], self.scale), antialias=self.antialias)


class RandomCrop(v2.Transform):
    """A random crop, at most as large as the image, that one class does not fill.

    Up to ten crops are drawn after the first until there are two classes in it and the commonest has less than
    `cat_max_ratio` of the pixels that are not ignored (mmseg's RandomCrop).
    """

    def __init__(self, size: int | tuple[int, int], cat_max_ratio: float = 1.0, *, tries: int = 10) -> None:
        super().__init__()
        if not isinstance(cat_max_ratio, (int, float)) or not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio={cat_max_ratio!r}: a share above 0, at most 1, which takes any crop")
        self.size, self.cat_max_ratio, self.tries = as_pair(size), cat_max_ratio, tries

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The crop drawn for this sample."""
        size = v2.query_size(flat_inputs)
        mask = next((value for value in flat_inputs if isinstance(value, tv_tensors.Mask)), None)
        box = self._draw(size)
        for _ in range(self.tries if mask is not None and self.cat_max_ratio < 1 else 0):
            if not self._filled(F.crop(mask, **box)):
                break
            box = self._draw(size)
        return box

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """That part of an image or class map."""
        return F.crop(inpt, **params)

    def _draw(self, size: Sequence[int]) -> dict[str, int]:
        height, width = (min(have, want) for have, want in zip(size, self.size, strict=True))
        top, left = (int(torch.randint(have - cut + 1, ())) for have, cut in zip(size, (height, width), strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def _filled(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.as_subclass(Tensor).flatten().long(), minlength=IGNORED + 1)
        counts[IGNORED] = 0
        return int((counts > 0).sum()) < 2 or int(counts.max()) >= self.cat_max_ratio * int(counts.sum())


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each changed half of the time (SSD's distortion as mmseg has it).

    Brightness is added (at most 32 of 255), contrast and saturation are multiplied with 0.5 to 1.5 (contrast around
    black, before or after the colours), hue is turned by at most 18 of 180. Gray images keep their gray.
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """What is done to this sample; None is nothing."""
        drawn: dict[str, Any] = {
            name: _uniform(low, high) if torch.rand(()) < 0.5 else None
            for name, low, high in (
                ("brightness", -32 / 255, 32 / 255),
                ("contrast", 0.5, 1.5),
                ("saturation", 0.5, 1.5),
                ("hue", -0.1, 0.1),
            )
        }
        return drawn | {"contrast_first": bool(torch.rand(()) < 0.5)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The image distorted, its dtype kept."""
        image = F.to_dtype_image(inpt.as_subclass(Tensor), torch.float32, scale=True)
        if params["brightness"] is not None:
            image = (image + params["brightness"]).clamp(0, 1)
        if params["contrast"] is not None and params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        if image.shape[-3] == 3:
            if params["saturation"] is not None:
                image = saturated(image, params["saturation"])
            if params["hue"] is not None:
                image = F.adjust_hue(image, params["hue"])
        if params["contrast"] is not None and not params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        return tv_tensors.wrap(F.to_dtype_image(image, inpt.dtype, scale=True), like=inpt)


def saturated(image: Tensor, factor: float) -> Tensor:
    """RGB (..., 3, H, W) in [0, 1] with the saturation of HSV multiplied and clipped to 1; value and hue stay."""
    value = image.amax(-3, keepdim=True)
    chroma = value - image.amin(-3, keepdim=True)
    # saturation is chroma / value, so that 1 is reached at value / chroma
    factors = (value / chroma.clamp(min=1e-6)).clamp(max=factor)
    return (value - (value - image) * factors).clamp(0, 1)


class PadTo(v2.Transform):
    """Fill up to a size at the right and the bottom: images with 0, masks with `IGNORED`. Larger ones stay."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = as_pair(size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """What is missing."""
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image or class map, filled up."""
        if not any(params["padding"]):
            return inpt
        return F.pad(inpt, params["padding"], fill=IGNORED if isinstance(inpt, tv_tensors.Mask) else 0)


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(list(mean), list(std))]


def _uniform(low: float, high: float) -> float:
    return low + float(torch.rand(())) * (high - low)


def _checked_scale(scale: Sequence[int] | None) -> tuple[int, int] | None:
    if scale is None:
        return None
    rule = "(longest, shortest) side in pixels"
    longest, shortest = sides("scale", scale, rule, 2)
    if shortest > longest:
        raise ValueError(f"scale={[longest, shortest]}: {rule}")
    return longest, shortest
