"""Sets of images with a class map each: ADE20K, Cityscapes, Pascal VOC and plain folders, read and checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from ..errors import ConfigError, DataError, listing
from .classes import IGNORED
from .decode import read_image
from .pairs import Pair, find_pairs

_logger = logging.getLogger("nearfield.engine")
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]
Colour = tuple[int, int, int]
# modes whose pixel is one number; P holds indices beside its colours
_INDEX_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
_PROBED = 8


class MaskSet(torch.utils.data.Dataset):
    """A map-style set of images and class maps.

    An item is (image, mask): a uint8 `tv_tensors.Image` (channels, H, W) and an int64 `tv_tensors.Mask` (H, W) of
    classes 0 .. num_classes - 1, `IGNORED` (255) where there is none; or what `transform` makes of them.

    Folders per layout are in docs/data.md. A few masks are read at once, so that what is wrong with all of them is said
    before a training starts; each is checked again whenever it is read.

    Args:
        root: the set's folder.
        split: `train`, `val`, `test`, one of their usual spellings, or a folder's own name.
        layout: `ade20k`, `cityscapes`, `voc` or `folder`.
        num_classes: for `folder`, where no names say it; at most 255.
        class_names: the classes in the order of their labels, instead of the layout's or of `classes.txt`.
        label_map: what a stored value means, if it is not the class itself: {0: 255, 1: 0} by number, or
            {(128, 64, 128): 0} by colour, for masks stored in colours; also spelled "128,64,128". 255 is ignored.
            Every value that is stored must be in it.
        mask_suffix: for `folder`: `_mask` if the mask of cat.jpg is cat_mask.png.
        channels: 1, 3 or 4 channels of the images.
        skip_missing: leave images without a mask out, counted, instead of refusing them.
        transform: applied to (image, mask uint8); can be set later.

    Attributes:
        report: counts by what they count: images, images without a mask, masks without an image. Logged once.

    Raises:
        DataError: a folder or mask is missing, the set is empty, a mask is not what it should be.
        ConfigError: the arguments contradict each other or the layout.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        layout: str = "folder",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        label_map: Mapping[Any, int] | None = None,
        mask_suffix: str = "",
        channels: int = 3,
        skip_missing: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self.root, self.layout, self.channels, self.transform = Path(root).expanduser(), layout, channels, transform
        found = find_pairs(self.root, split, layout, mask_suffix=mask_suffix)
        self.pairs = found.pairs
        names = list(class_names) if class_names is not None else found.class_names
        if not label_map and found.class_names and names and len(names) != len(found.class_names):
            raise ConfigError(
                f"class_names: {len(names)} names, but {layout} has {len(found.class_names)} classes here"
            )
        self.class_names = names
        self.num_classes = _count(num_classes, names, layout)
        self._mapped = bool(label_map)
        self._by_colour, by_number = _tables(label_map, self.num_classes)
        # by number: few tables, each for many masks
        self._by_number, self._table_of = _tables_of(self.pairs, self.num_classes, by_number)
        self.report = {
            "images": len(self.pairs),
            "images without a mask": len(found.unlabelled),
            "masks without an image": len(found.spare),
        }
        where = f"{self.root} ({layout}, {split})"
        if found.unlabelled and not (skip_missing and self.pairs):
            image, mask = found.unlabelled[0]
            there = f" (there is {found.spare[0].name})" if found.spare else ""
            raise DataError(
                f"{image}: no mask {mask}{there}; so it is with {len(found.unlabelled)} of "
                f"{len(found.unlabelled) + len(self.pairs)} images: add them or leave them out with skip_missing"
            )
        if not self.pairs:
            raise DataError(f"{where}: no images in it")
        counts = f"{len(self.pairs)} images, {self.num_classes} classes" + (f", {found.note}" if found.note else "")
        _logger.info("%s: %s", where, counts)
        for what, files in (
            ("images without a mask, left out", [image for image, _ in found.unlabelled]),
            ("masks without an image", found.spare),
        ):
            if files:
                _logger.warning("%s: %d %s: %s", where, len(files), what, listing(files, limit=1))
        self._probe()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pair(index)
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return image, mask.to(torch.int64)  # 8 bits through the transforms, 64 for the loss

    def pair(self, index: int) -> tuple[Any, Any]:
        """The image uint8 (channels, H, W) and the class map uint8 (H, W) of an item, without a transform."""
        pair = self.pairs[index]
        image: Any = read_image(pair.image, self.channels)
        mask: Any = self.mask(index)
        if image.shape[-2:] != mask.shape:
            # labelled on the stored pixels: the tool did not look at the EXIF orientation
            stored = read_image(pair.image, self.channels, upright=False)
            if stored.shape[-2:] != mask.shape:
                raise _sizes_differ(pair, image.shape[-2:], mask.shape)
            image = stored
        return image, mask

    def mask(self, index: int) -> tv_tensors.Mask:
        """The class map of an item alone, uint8 (H, W), checked.

        Raises:
            DataError: it cannot be read, holds colours, or a label that is no class.
        """
        pair = self.pairs[index]
        if self._by_colour is not None:
            return tv_tensors.Mask(torch.from_numpy(_from_colours(pair.mask, self._by_colour)))
        table = self._by_number[self._table_of[index]]
        return tv_tensors.Mask(torch.from_numpy(_from_numbers(pair.mask, table, self.num_classes)))

    def filename(self, index: int) -> str:
        """The image file of an item, for messages."""
        return str(self.pairs[index].image)

    def _probe(self) -> None:
        """Read a few masks from all over the set, and the first image."""
        read_image(self.pairs[0].image, self.channels)
        count = min(_PROBED, len(self.pairs))
        probed = [index * len(self.pairs) // count for index in range(count)]
        seen = {int(label) for index in probed for label in self.mask(index).unique()}
        if self.num_classes == 2 and seen == {0, IGNORED} and not self._mapped and self.layout == "folder":
            raise DataError(
                f"{self.pairs[0].mask}: 2 classes, but this and {count - 1} other masks hold only 0 and 255, "
                "and 255 is ignored: if it is the second class, set label_map={0: 0, 255: 1}"
            )
        if seen == {IGNORED}:
            _logger.warning("%s: every pixel of the %d masks tried is ignored", self.root, count)


def _count(num_classes: int | None, names: list[str] | None, layout: str) -> int:
    if names is None and num_classes is None:
        raise ConfigError(f"num_classes is not set, and layout={layout} has no classes.txt to count: set it")
    if names is not None and num_classes not in (None, len(names)):
        raise ConfigError(
            f"num_classes={num_classes}, but there are {len(names)} class names ({listing(names, limit=5)})"
        )
    count = len(names) if names is not None else int(num_classes or 0)
    if not 1 <= count <= IGNORED:
        raise ConfigError(f"num_classes={count}: class maps have 1 to {IGNORED} classes, {IGNORED} itself is ignored")
    return count


def _tables(
    label_map: Mapping[Any, int] | None, num_classes: int
) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray | None]:
    """(sorted colour codes and their classes, None) or (None, class by stored value); (None, None) without a map."""
    if not label_map:
        return None, None
    keys: dict[tuple[int, ...], int] = {}
    for key, label in label_map.items():
        parts = key.split(",") if isinstance(key, str) else key if isinstance(key, Sequence) else (key,)
        try:
            stored, label = tuple(int(part) for part in parts), int(label)
        except ValueError as error:
            raise ConfigError(f"label_map: {key!r}: {label!r} is no number or colour and its class") from error
        if label != IGNORED and not 0 <= label < num_classes:
            raise ConfigError(f"label_map: {key!r}: {label} is no class; allowed: 0..{num_classes - 1} or {IGNORED}")
        if any(not 0 <= part <= 255 for part in stored):
            raise ConfigError(f"label_map: {key!r}: stored values are 0..255")
        keys[stored] = label
    lengths = {len(stored) for stored in keys}
    if lengths == {1}:
        return None, _number_table({stored[0]: label for stored, label in keys.items()}, keep_ignored=False)
    if lengths == {3}:
        codes = np.array([_code(np.array(stored)) for stored in keys], dtype=np.int32)
        order = codes.argsort()
        return (codes[order], np.array(list(keys.values()), dtype=np.uint8)[order]), None
    raise ConfigError("label_map: keys are all numbers (7) or all colours ((128, 64, 128)), not both")


def _tables_of(
    pairs: Sequence[Pair], num_classes: int, mapped: np.ndarray | None
) -> tuple[list[np.ndarray], list[int]]:
    """The distinct tables of class by stored value, and which of them each pair has; `mapped` instead of all."""
    if mapped is not None:
        return [mapped], [0] * len(pairs)
    as_they_are = {label: label for label in range(num_classes)}
    distinct = {id(pair.labels): pair.labels for pair in pairs}
    places = {identity: place for place, identity in enumerate(distinct)}
    tables = [_number_table(labels or as_they_are) for labels in distinct.values()]
    return tables, [places[id(pair.labels)] for pair in pairs]


def _number_table(labels: Mapping[int, int], *, keep_ignored: bool = True) -> np.ndarray:
    """Class by stored value, int16 (256,); -1 where a value is not allowed."""
    table = np.full(256, -1, dtype=np.int16)
    if keep_ignored:
        table[IGNORED] = IGNORED
    table[list(labels)] = list(labels.values())
    return table


def _code(colours: np.ndarray) -> Any:
    """RGB (..., 3) as one number a pixel."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow raises nearly everything
        raise DataError(f"{path}: cannot read this mask ({error}): repair or remove it") from error
    if image.format == "JPEG":
        raise DataError(f"{path}: a JPEG file does not keep label values as they are: make the masks again as png")
    return image


def _from_numbers(path: Path, table: np.ndarray, num_classes: int) -> np.ndarray:
    image = _open(path)
    if image.mode not in _INDEX_MODES:
        raise DataError(
            f"{path}: a mask of mode {image.mode} holds colours, not class numbers: "
            "give label_map={(R, G, B): class, ...}, or save it with one channel of numbers"
        )
    stored = np.asarray(image)
    if stored.dtype != np.uint8:
        stored = stored.astype(np.int64)
    inside = stored if stored.dtype == np.uint8 else stored.clip(0, 255)
    labels = table[inside]
    bad = (labels < 0) | (stored != inside)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        allowed = np.flatnonzero(table >= 0)
        raise DataError(
            f"{path}: label {int(stored[row, column])} at row {row}, column {column} ({int(bad.sum())} such pixels) "
            f"is none of {_ranges(allowed)} that {num_classes} classes allow: set num_classes or label_map, or mend it"
        )
    return labels.astype(np.uint8)


def _from_colours(path: Path, by_colour: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    codes, labels = by_colour
    stored = np.asarray(_open(path).convert("RGB"))
    wanted = _code(stored)
    place = codes.searchsorted(wanted).clip(max=len(codes) - 1)
    bad = codes[place] != wanted
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        colour = tuple(int(value) for value in stored[row, column])
        raise DataError(
            f"{path}: colour {colour} at row {row}, column {column} ({int(bad.sum())} such pixels) "
            "is not in label_map: add it (255 to ignore it), or mend the mask"
        )
    return labels[place]


def _ranges(values: np.ndarray) -> str:
    """0..3, 7, 255: sorted numbers with runs drawn together."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return listing(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _sizes_differ(pair: Pair, image: Sequence[int], mask: Sequence[int]) -> DataError:
    (height, width), (rows, columns) = image, mask
    return DataError(
        f"{pair.mask}: the mask has {columns}x{rows} pixels, its image {pair.image} {width}x{height}: "
        "a mask has a label for each pixel of its image"
    )
