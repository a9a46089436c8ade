"""Preparing images and their objects for a detector: the policies of the published recipes, and none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .policies import choose_policy, factors, number, side, sides

Target = dict[str, Any]
SHORT_SIDES = tuple(range(480, 801, 32))  # pixels
_OF_OBJECTS = ("boxes", "labels", "masks", "iscrowd")


class Policy:
    """Steps of torchvision on (image, target), then everything as plain tensors that agree with one another.

    Takes an image (uint8 `tv_tensors.Image`) and the target of a `CocoSet`; gives the image as float32 (channels, H, W)
    in [0, 1] and the target without what is not seen any more. Random steps follow torch's global generator.

    Args:
        steps: transforms of torchvision.transforms.v2.
        training: objects smaller than a pixel, or without a pixel of their mask, are removed, and so is `area`, which
            no longer holds.
        tight: objects at the border are given the box around what is left of their mask, instead of the part of their
            box that is left.
    """

    def __init__(self, steps: Sequence[Any], *, training: bool = True, tight: bool = False) -> None:
        self.steps = v2.Compose(list(steps)) if steps else None
        self.training, self.tight = training, tight

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
        """The prepared image and target."""
        if self.steps is not None:
            image, target = self.steps(image, target)
        pixels = F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        target = {
            key: value.as_subclass(Tensor) if isinstance(value, tv_tensors.TVTensor) else value
            for key, value in target.items()
        }
        if self.training:
            target = _tidied(target, (pixels.shape[-2], pixels.shape[-1]), tight=self.tight)
        return pixels, target


def _tidied(target: Target, size: tuple[int, int], *, tight: bool) -> Target:
    """The target with its boxes inside the image of `size`, and without the objects that are gone."""
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = target["boxes"].clamp(min=0).minimum(limits)
    masks = target.get("masks")
    seen = torch.ones(len(boxes), dtype=torch.bool)
    if masks is not None:
        seen = masks.flatten(1).any(1).bool()  # `any` of uint8 is uint8
        if tight:
            at_border = ((boxes[:, :2] <= 0.5) | (boxes[:, 2:] >= limits[2:] - 0.5)).any(1) & seen
            boxes[at_border] = boxes_around(masks[at_border])
    seen &= ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    target = {**target, "boxes": boxes}
    target.pop("area", None)
    return {key: value[seen] if key in _OF_OBJECTS else value for key, value in target.items()}


def boxes_around(masks: Tensor) -> Tensor:
    """The boxes (N, 4) xyxy float32 around masks (N, H, W), none of them empty, in pixels.

    The far sides lie behind the last pixel, as COCO has it; torchvision.ops.masks_to_boxes lays them through it.
    """
    columns, rows = masks.any(1).byte(), masks.any(2).byte()
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = columns.shape[1] - columns.flip(1).argmax(1), rows.shape[1] - rows.flip(1).argmax(1)
    return torch.stack([left, top, right, bottom], 1).float()


class RandomResize(v2.Transform):
    """Resizing by one factor, which `factor` draws for an image; no side becomes less than a pixel."""

    def factor(self, height: int, width: int) -> float:
        """By how much an image of this size grows."""
        raise NotImplementedError

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The new size: drawn anew for each image."""
        height, width = v2.query_size(flat_inputs)
        factor = self.factor(height, width)
        return {"size": [max(1, round(side * factor)) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The resized image, boxes or masks."""
        return self._call_kernel(F.resize, inpt, **params)


class RandomShortSide(RandomResize):
    """The short side becomes one of `short_sides` pixels, or less where the long one would exceed `max_size`.

    As torchvision's RandomShortestSize, but rounded as mmdet does, and images of a pixel or a line survive. `name` is
    what a message calls the sides.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int, name: str = "short_sides") -> None:
        super().__init__()
        self.max_size = side("max_size", max_size)
        rule = f"one or more sides in pixels, at most max_size={max_size}"
        self.short_sides = sides(name, short_sides, rule)
        if max(self.short_sides) > max_size:
            raise ValueError(f"{name}={self.short_sides}: {rule}")

    def factor(self, height: int, width: int) -> float:
        """One of the short sides, each as likely, over that of the image."""
        wanted = self.short_sides[_drawn(0, len(self.short_sides) - 1)]
        return min(wanted / min(height, width), self.max_size / max(height, width))


class RandomScale(RandomResize):
    """A factor drawn evenly from `scale`, relative to an image that just fits into `size` (height, width)."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        super().__init__()
        self.size, self.scale = size, scale

    def factor(self, height: int, width: int) -> float:
        """Drawn evenly."""
        low, high = self.scale
        return (low + (high - low) * torch.rand(()).item()) * min(self.size[0] / height, self.size[1] / width)


class RandomWindow(v2.Transform):
    """A crop whose height and width are drawn on their own from `low` to `high` pixels, as far as the image goes.

    It may hold no object. mmdet: RandomCrop with crop_type "absolute_range" and allow_negative_crop.
    """

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where the crop is: drawn anew for each image."""
        height, width = v2.query_size(flat_inputs)
        high, wide = (_drawn(min(side, self.low), min(side, self.high)) for side in (height, width))
        return {"top": _drawn(0, height - high), "left": _drawn(0, width - wide), "height": high, "width": wide}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The crop of an image, of its boxes or of its masks."""
        return self._call_kernel(F.crop, inpt, **params)


def _drawn(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def unchanged() -> Policy:
    """The image as it is in [0, 1]: for evaluation, since detectors resize by themselves."""
    return Policy([], training=False)


def multi_scale(
    *, short_sides: Sequence[int] = SHORT_SIDES, max_size: int = 1333, hflip: float = 0.5, color_jitter: float = 0.0
) -> Policy:
    """The short side drawn from `short_sides`, the long one at most `max_size` pixels; flipped at times.

    One short side, 800, is the policy of the 1x schedule (mmdet, configs/_base_/datasets/coco_instance.py).
    """
    return Policy([*_looks(hflip, color_jitter), RandomShortSide(short_sides, max_size)])


def multi_scale_crop(
    *,
    short_sides: Sequence[int] = SHORT_SIDES,
    max_size: int = 1333,
    hflip: float = 0.5,
    color_jitter: float = 0.0,
    crop_prob: float = 0.5,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_range: Sequence[int] = (384, 600),
) -> Policy:
    """DETR's policy, which most 3x recipes since use too.

    Half of the time `multi_scale`; else resized to one of `crop_short_sides`, a window of `crop_range` pixels a side
    cut out, and that resized as in `multi_scale`. Source: github.com/facebookresearch/detr, datasets/coco.py.
    """
    rule = "the least and the largest side of the window in pixels"
    low, high = sides("crop_range", crop_range, rule, 2)
    if low > high:
        raise ValueError(f"crop_range={[low, high]}: {rule}")
    window = [RandomShortSide(crop_short_sides, max_size, "crop_short_sides"), RandomWindow(low, high)]
    cut = v2.RandomApply(window, p=number("crop_prob", crop_prob, 0, 1))
    return Policy([*_looks(hflip, color_jitter), cut, RandomShortSide(short_sides, max_size)])


def jitter(
    *,
    size: Sequence[int] = (128, 128),
    scale: Sequence[float] = (0.8, 1.25),
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    fill: float = 0.0,
) -> Policy:
    """Scale drawn from `scale`, then a window of `size` (height, width) cut out, padded with `fill` where it is larger.

    With the defaults a light policy for small scenes, not flipped: a mirrored digit is none. With size=(1024, 1024),
    scale=(0.1, 2.0) and hflip=0.5 the large-scale jitter of arXiv:2012.07177. Boxes of objects that are cut are those
    of what is left of their masks.

    Args:
        size: of the result, pixels.
        scale: of the image relative to one that just fits into `size`.
        hflip: probability of a horizontal flip.
        color_jitter: strength of changes of brightness, contrast and saturation.
        fill: value of padded pixels, 0 to 255.
    """
    height, width = sides("size", size, "height and width in pixels", 2)
    window = (height, width)
    zoom = RandomScale(window, factors("scale", scale))
    padding: Any = {tv_tensors.Image: number("fill", fill, 0, 255), "others": 0}
    return Policy(
        [*_looks(hflip, color_jitter), zoom, v2.RandomCrop(window, pad_if_needed=True, fill=padding)], tight=True
    )


POLICIES: dict[str, Callable[..., Policy]] = {
    "none": unchanged,
    "multi_scale": multi_scale,
    "multi_scale_crop": multi_scale_crop,
    "jitter": jitter,
}


def detection_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a name with the options it takes, as a configuration gives them.

    Raises:
        ConfigError: no such policy, an option it does not take, or a value that is not allowed.
    """
    policy: Policy = choose_policy(POLICIES, name, options or {})
    return policy


def _looks(hflip: float, color_jitter: float) -> list[Any]:
    mirrored, strength = number("hflip", hflip, 0, 1), number("color_jitter", color_jitter)
    steps: list[Any] = [v2.RandomHorizontalFlip(mirrored)] if mirrored else []
    return [*steps, v2.ColorJitter(strength, strength, strength)] if strength else steps
