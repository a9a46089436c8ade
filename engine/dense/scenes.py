"""Scenes of handwritten digits: real images for detection and segmentation that need no download.

Every scene is a canvas of faint texture on which some of scikit-learn's digits lie, enlarged and partly over one
another. It is written as data sets usually come: pictures, COCO annotations, and class maps in folders.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import DataConfig
from ..errors import DataError
from ..memory import MemorySet, digits

CLASSES = [str(digit) for digit in range(10)]
MAP_CLASSES = ["background", *CLASSES]  # the values of a class map: 0 background, 1 + d digit d

_VERSION = 1  # of the drawing below: a change of what scenes look like is another set
_MARKER = "scenes.json"
_INK = 0.35  # a pixel whose ink is above this belongs to the digit
_VISIBLE = 0.85  # fraction of a digit that the digits laid over it must leave to be seen
_FEWEST, _MOST = 3, 6  # digits tried on a canvas of the least size; a crowded one takes fewer
_SMALLEST, _LARGEST = 20, 44  # pixels, the height of a digit

_logger = logging.getLogger("nearfield.engine")
_Array = NDArray[Any]


@dataclass(frozen=True)
class _Parameters:
    count_train: int
    count_val: int
    size: int
    seed: int
    version: int = _VERSION

    @property
    def folder(self) -> str:
        return f"digits-{self.count_train}-{self.count_val}-{self.size}px-seed{self.seed}-v{self.version}"


def write_scenes(
    root: str | Path, *, count_train: int = 600, count_val: int = 150, size: int = 128, seed: int = 0
) -> Path:
    """A folder of scenes below `root`, drawn unless it is there; the same bytes every time.

    The folder holds, for SPLIT of `train` and `val`:
        images/SPLIT/000000.png: RGB, size x size.
        annotations/instances_SPLIT.json: COCO; boxes and masks of what is seen of each digit; category d + 1 is d.
        annotations/SPLIT/000000.png: class map, 0 background, d + 1 digit d.
        classes.txt: the classes of the maps, one a line, in the order of their values.
    The digits of `val` are those that `data=digits` holds out. Processes that start together may each draw the scenes;
    the first to finish is used by all.

    Args:
        root: where such folders are kept; made if missing.
        count_train: scenes to train on.
        count_val: scenes held out.
        size: side of a scene in pixels, at least 64.
        seed: another seed, other scenes.

    Returns:
        The folder, whose name says the parameters.

    Raises:
        ValueError: a count below 1, a size below 64, a negative seed.
        DataError: the folder cannot be written, or something else has its name.
    """
    if min(count_train, count_val) < 1 or size < 64 or seed < 0:
        raise ValueError(
            f"scenes: count_train={count_train}, count_val={count_val}, size={size}, seed={seed}: "
            "counts are at least 1, the size at least 64, the seed at least 0"
        )
    wanted = _Parameters(count_train, count_val, size, seed)
    target = Path(root) / wanted.folder
    if not _complete(target, wanted):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{wanted.folder}.", dir=target.parent))
        except OSError as error:
            raise DataError(f"{target.parent}: cannot write scenes here ({error})") from error
        try:
            _draw(part, wanted)
            os.chmod(part, 0o755)  # mkdtemp keeps its folders to the user
            os.rename(part, target)
            _logger.info("drew %d + %d scenes of digits: %s", count_train, count_val, target)
        except OSError as error:
            if not _complete(target, wanted):  # no other process was first
                raise DataError(f"{target}: cannot write scenes there ({error}): remove it or make room") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _complete(folder: Path, wanted: _Parameters) -> bool:
    try:
        return json.loads((folder / _MARKER).read_text(encoding="utf-8")) == asdict(wanted)
    except (OSError, ValueError):
        return False


def _draw(folder: Path, wanted: _Parameters) -> None:
    train, held_out = digits(DataConfig())
    splits = (("train", wanted.count_train, train), ("val", wanted.count_val, held_out))
    for stream, (split, count, source) in enumerate(splits):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations" / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            # a generator a scene: the first hundred are the same however many follow
            rng = np.random.default_rng([wanted.seed, stream, index])
            picture, masks, labels = _scene(rng, source, wanted.size)
            name = f"{index:06d}.png"
            Image.fromarray(picture).save(folder / "images" / split / name)
            class_map = np.zeros((wanted.size, wanted.size), np.uint8)
            for mask, label in zip(masks, labels, strict=True):
                class_map[mask] = label + 1
                annotations.append(_annotation(len(annotations) + 1, index + 1, label, mask))
            Image.fromarray(class_map).save(folder / "annotations" / split / name)
            images.append({"id": index + 1, "file_name": name, "width": wanted.size, "height": wanted.size})
        content = {
            "info": {"description": "Scenes of the handwritten digits of scikit-learn", **asdict(wanted)},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(MAP_CLASSES) + "\n", encoding="utf-8")
    (folder / _MARKER).write_text(json.dumps(asdict(wanted)), encoding="utf-8")


def _scene(rng: np.random.Generator, source: MemorySet, size: int) -> tuple[_Array, list[_Array], list[int]]:
    """A picture (size, size, 3) uint8, the visible mask of each digit (size, size) bool, and the digits."""
    picture = _background(rng, size)
    masks: list[_Array] = []
    whole: list[int] = []
    labels: list[int] = []
    area = (size / 128) ** 2
    for _ in range(int(rng.integers(round(_FEWEST * area) or 1, (round(_MOST * area) or 1) + 1))):
        index = int(rng.integers(len(source)))
        ink = _enlarged(rng, source.images[index, 0].numpy())
        height, width = ink.shape
        for _ in range(20):
            y, x = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            mask = np.zeros((size, size), bool)
            mask[y : y + height, x : x + width] = ink > _INK
            if all((old & ~mask).sum() >= _VISIBLE * full for old, full in zip(masks, whole, strict=True)):
                break
        else:
            continue  # the canvas is full
        masks = [old & ~mask for old in masks]
        masks.append(mask)
        whole.append(int(mask.sum()))
        labels.append(int(source.labels[index]))
        colour = rng.uniform(150, 255, 3)
        # opaque from the edge of its mask on, so that what is covered is covered; a soft rim outside
        cover = np.clip(ink / _INK, 0, 1)[..., None] ** 2
        patch = picture[y : y + height, x : x + width]
        patch += cover * (colour * (0.75 + 0.25 * ink[..., None]) - patch)
    noisy = picture + rng.normal(0, 4, picture.shape)
    return np.clip(noisy, 0, 255).round().astype(np.uint8), masks, labels


def _background(rng: np.random.Generator, size: int) -> _Array:
    """Dark gray with smooth blotches of two grains, slightly coloured: (size, size, 3) float32, 0 to 120 or so."""
    canvas = np.full((size, size, 3), rng.uniform(25, 75), np.float32)
    for cells, strength in ((4, 12.0), (16, 8.0)):
        for channel in range(3):
            canvas[..., channel] += _resized(rng.normal(0, strength, (cells, cells)), size, size)
    return canvas


def _enlarged(rng: np.random.Generator, digit: _Array) -> _Array:
    """The ink of a digit (8, 8) on a smooth, larger grid, cut to where it is; between 0 and 1."""
    height = int(rng.integers(_SMALLEST, _LARGEST + 1))
    framed = np.pad(digit, 1)
    scale = height / 8
    width = scale * rng.uniform(0.85, 1.2)
    ink = np.clip(_resized(framed, round(10 * scale), round(10 * width)), 0, 1)
    rows, columns = np.flatnonzero((ink > _INK).any(1)), np.flatnonzero((ink > _INK).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(values: _Array, height: int, width: int) -> _Array:
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _annotation(identity: int, image: int, label: int, mask: _Array) -> dict[str, Any]:
    from faster_coco_eval.core.mask import encode

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    rle = encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": identity,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": {"size": list(rle["size"]), "counts": _text(rle["counts"])},
        "iscrowd": 0,
    }


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
