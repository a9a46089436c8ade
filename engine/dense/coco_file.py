"""Reading a file of COCO annotations: all in it is checked, named when wrong, counted when mended.

The format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, listing
from . import instance_masks
from .decode import image_size

_TOLERANCE = 0.5  # pixels; annotators round, so a box that reaches past the image by less is not worth a word


@dataclass
class Findings:
    """What was mended or left out while reading: counts by what they count, and the first case of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, case: str, count: int = 1) -> None:
        """`count` more of what is seen in `case`."""
        self.counts[what] += count
        self.first.setdefault(what, case)

    def __str__(self) -> str:
        return "; ".join(f"{count} {what} (first: {self.first[what]})" for what, count in self.counts.items())


@dataclass
class Objects:
    """Annotations, a row each, ordered by image.

    Attributes:
        ids: the annotations' own.
        images: (N,) row of each one's image.
        labels: (N,) 0 .. K-1.
        boxes: (N, 4) xywh float64, in pixels, as the file has them.
        areas: (N,) float64, in square pixels, as the file has them.
        crowd: (N,) bool, regions of many objects.
        empty: (N,) bool, whose mask has no pixel; all False if masks were not read.
        masks: the segmentations, packed; None if they were not read.
    """

    ids: list[Any]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    masks: Packed | None

    def where(self, rows: NDArray[Any]) -> Objects:
        """The given rows, in that order."""
        return Objects(
            [self.ids[row] for row in rows.tolist()],
            self.images[rows],
            self.labels[rows],
            self.boxes[rows],
            self.areas[rows],
            self.crowd[rows],
            self.empty[rows],
            self.masks.where(rows) if self.masks else None,
        )


class Packed:
    """Many byte strings in one buffer, which loader processes share instead of copying."""

    def __init__(self, strings: list[bytes]) -> None:
        self.buffer = np.frombuffer(b"".join(strings), np.uint8)
        lengths = np.array([len(string) for string in strings], np.int64)
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths

    def __getitem__(self, row: int) -> bytes:
        return self.buffer[self.starts[row] : self.stops[row]].tobytes()

    def where(self, rows: NDArray[Any]) -> Packed:
        """The given rows of the same buffer."""
        out = object.__new__(Packed)
        out.buffer, out.starts, out.stops = self.buffer, self.starts[rows], self.stops[rows]
        return out


@dataclass
class CocoFile:
    """A file of annotations that was read and checked.

    Attributes:
        path: the file.
        category_ids: the file's own number of each class 0 .. K-1, ascending.
        class_names: of each class.
        image_ids: of each image.
        names: file name of each image, below the folder of images.
        sizes: (N, 2) height and width of each image.
        objects: the annotations.
        findings: what was mended or left out.
    """

    path: Path
    category_ids: list[int]
    class_names: list[str]
    image_ids: list[int]
    names: list[str]
    sizes: NDArray[np.int64]
    objects: Objects
    findings: Findings


def read_coco(path: str | Path, folder: str | Path, *, masks: bool, skip_missing: bool) -> CocoFile:
    """Read and check a file of annotations.

    Args:
        path: the json file.
        folder: where its images lie.
        masks: whether segmentations are wanted; annotations without one are left out then.
        skip_missing: leave images out whose file is missing, instead of refusing them.

    Raises:
        DataError: the file or an entry is not what it should be; the line names file and entry.
    """
    return _Reader(Path(path), Path(folder)).read(masks=masks, skip_missing=skip_missing)


class _Reader:
    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.findings = Findings()

    def fail(self, what: str) -> NoReturn:
        raise DataError(f"{self.path}: {what}")

    def read(self, *, masks: bool, skip_missing: bool) -> CocoFile:
        content = self.content()
        category_ids, class_names = self.categories(content["categories"])
        entries, absent = self.present(self.images(content["images"]), skip_missing=skip_missing)
        sizes = np.array([self.size(entry) for entry in entries], np.int64).reshape(-1, 2)
        image_ids = [int(entry["id"]) for entry in entries]
        objects = self.objects(content["annotations"], image_ids, absent, category_ids, sizes, masks=masks)
        names = [str(entry["file_name"]) for entry in entries]
        return CocoFile(self.path, category_ids, class_names, image_ids, names, sizes, objects, self.findings)

    def content(self) -> dict[str, list[Any]]:
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot read annotations ({error.strerror or error})") from error
        if not raw.strip():
            self.fail("this file of annotations is empty: download or export it again")
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not JSON ({error}): download or export it again") from error
        needed = ("images", "annotations", "categories")
        if not isinstance(content, dict):
            self.fail(f"a {type(content).__name__}, not a COCO data set, which has {listing(needed)}")
        for key in needed:
            if not isinstance(content.get(key), list):
                self.fail(f"no list {key!r} (there is: {listing(content, limit=6) or 'nothing'}): not a COCO data set")
            for position, entry in enumerate(content[key]):
                if not isinstance(entry, dict):
                    self.fail(f"{key}[{position}] is {entry!r:.40}, not an entry with keys and values")
        return content

    def categories(self, entries: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
        names: dict[int, str] = {}
        for position, entry in enumerate(entries):
            identity = self.identity(entry, f"categories[{position}]")
            if identity in names:
                self.fail(f"category id {identity} occurs twice: labels would not be told apart")
            names[identity] = str(entry.get("name", identity))
        if not names:
            self.fail("no categories: objects have no class")
        ordered = sorted(names)
        return ordered, [names[identity] for identity in ordered]

    def images(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not entries:
            self.fail("no images in it")
        seen: set[int] = set()
        for position, entry in enumerate(entries):
            identity = self.identity(entry, f"images[{position}]")
            if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
                self.fail(f"image {identity} has no file_name")
            if identity in seen:
                self.fail(f"image id {identity} occurs twice: annotations would not be told apart")
            seen.add(identity)
        return entries

    def identity(self, entry: Mapping[str, Any], where: str) -> int:
        value = entry.get("id")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"{where} has the id {value!r}: ids are whole numbers")
        return value

    def present(
        self, entries: list[dict[str, Any]], *, skip_missing: bool
    ) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """The images whose files are there, and the others by their id."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; the images of {self.path} should be in it")
        parents = {os.path.dirname(entry["file_name"]) for entry in entries}
        # one listing a folder, not one question an image: that takes minutes on a network drive
        there = {parent: _names_in(self.folder / parent) for parent in parents}
        here: list[dict[str, Any]] = []
        gone: list[dict[str, Any]] = []
        for entry in entries:
            parent, name = os.path.split(entry["file_name"])
            (here if name in there[parent] else gone).append(entry)
        if gone:
            first = f"{gone[0]['file_name']}, image id {int(gone[0]['id'])}"
            if not (skip_missing and here):
                raise DataError(
                    f"{self.folder}: {len(gone)} of {len(entries)} images of {self.path} are missing (first: {first}): "
                    "add them or leave them out with skip_missing"
                )
            self.findings.note("images missing in the folder, left out", first, len(gone))
        return here, {int(entry["id"]): row for row, entry in enumerate(gone)}

    def size(self, entry: Mapping[str, Any]) -> tuple[int, int]:
        height, width = entry.get("height"), entry.get("width")
        if _is_side(height) and _is_side(width):
            return int(height), int(width)
        self.findings.note("images without a size, measured", f"image {int(entry['id'])}")
        return image_size(self.folder / entry["file_name"])

    def objects(
        self,
        entries: list[dict[str, Any]],
        image_ids: list[int],
        absent: dict[int, int],
        category_ids: list[int],
        sizes: NDArray[np.int64],
        *,
        masks: bool,
    ) -> Objects:
        rows = {identity: row for row, identity in enumerate(image_ids)}
        label_of = {identity: label for label, identity in enumerate(category_ids)}
        shapes = [(height, width) for height, width in sizes.tolist()]
        kept: list[dict[str, Any]] = []
        names, images, labels, boxes, areas, packed = [], [], [], [], [], []
        for position, entry in enumerate(entries):
            name = f"annotation {entry['id']}" if "id" in entry else f"annotations[{position}]"
            row = _looked_up(rows, entry.get("image_id"))
            label = _looked_up(label_of, entry.get("category_id"))
            if row is None:
                if "image_id" not in entry:
                    self.fail(f"{name} has no image_id")
                gone = _looked_up(absent, entry["image_id"]) is not None
                whose = "missing images" if gone else "images that are not listed"
                self.findings.note(f"annotations of {whose}, left out", name)
                continue
            if label is None:
                if "category_id" not in entry:
                    self.fail(f"{name} has no category_id")
                known = listing(category_ids, limit=6)
                self.fail(f"{name} has the category_id {entry['category_id']!r}, which is none of {known}")
            box, drawn = entry.get("bbox"), b""
            if masks or not box or not _has_area(entry):
                drawn = self.mask(entry, name, shapes[row])
            if not box and drawn:
                self.findings.note("annotations without a bbox, given the one around their mask", name)
                box = self.measured(instance_masks.bounds, drawn, shapes[row], name)
            if not box:
                self.fail(f"{name} has no bbox")
            if masks and not drawn:
                self.findings.note("annotations without a mask, left out", name)
                continue
            kept.append(entry)
            names.append(name)
            images.append(row)
            labels.append(label)
            boxes.append(box)
            areas.append(self.area(entry, name, drawn, shapes[row]))
            packed.append(drawn)
        found = self.numbers(boxes, names)
        objects = Objects(
            [entry.get("id") for entry in kept],
            np.array(images, np.int64),
            np.array(labels, np.int64),
            found,
            self.areas(areas, found, names),
            np.array([self.crowd(entry, name) for entry, name in zip(kept, names, strict=True)], bool),
            np.zeros(len(kept), bool),
            Packed(packed) if masks else None,
        )
        ordered = self.order(objects, sizes, names)
        if masks:
            drawn_on = sizes[objects.images[ordered]]
            objects.empty[ordered] = instance_masks.empty([packed[row] for row in ordered], drawn_on)
            self.several("masks without a pixel, not trained on", objects.empty, names)
        return objects.where(ordered)

    def area(self, entry: Mapping[str, Any], name: str, drawn: bytes, size: tuple[int, int]) -> Any:
        """As the file has it, or that of the mask; None if there is no mask either."""
        if _has_area(entry):
            return entry["area"]
        missing = entry.get("area") is None
        what = "annotations without an area" if missing else "areas that are negative or not finite"
        self.findings.note(f"{what}, measured", name)
        return self.measured(instance_masks.area, drawn, size, name) if drawn else None

    def measured(
        self, measure: Callable[[bytes, tuple[int, int]], Any], drawn: bytes, size: tuple[int, int], name: str
    ) -> Any:
        try:
            return measure(drawn, size)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{self.path}: {name}: broken mask ({error})") from error

    def several(self, what: str, which: NDArray[np.bool_], names: list[str]) -> None:
        if which.any():
            self.findings.note(what, names[int(which.argmax())], int(which.sum()))

    def crowd(self, entry: Mapping[str, Any], name: str) -> bool:
        value = entry.get("iscrowd") or 0
        if value not in (0, 1):
            self.fail(f"{name}: iscrowd={value!r} must be 0 or 1: correct or remove the annotation")
        return bool(value)

    def mask(self, entry: Mapping[str, Any], name: str, size: tuple[int, int]) -> bytes:
        if not entry.get("segmentation"):
            return b""
        try:
            packed = instance_masks.pack(entry["segmentation"], size)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{self.path}: {name}: {error}") from error
        if packed is None:
            self.findings.note("annotations without a polygon of three corners", name)
            return b""
        if packed[1]:
            self.findings.note("polygons of fewer than three corners, left out", name, packed[1])
        return packed[0]

    def numbers(self, boxes: list[Any], names: list[str]) -> NDArray[np.float64]:
        try:
            found = np.array(boxes, np.float64).reshape(len(boxes), -1)
        except (TypeError, ValueError, OverflowError):
            found = np.empty((0, 0))
        if found.shape != (len(boxes), 4) or not np.isfinite(found).all():
            for box, name in zip(boxes, names, strict=True):
                if not _is_box(box):
                    self.fail(
                        f"{name} has the bbox {box!r:.60}, which is not four finite numbers (x, y, width, height)"
                    )
        return found.reshape(-1, 4)

    def areas(self, areas: list[Any], boxes: NDArray[np.float64], names: list[str]) -> NDArray[np.float64]:
        # NaN stands for "measure it", which without a mask is that of the box
        try:
            found = np.array([np.nan if area is None else area for area in areas], np.float64)
        except (TypeError, ValueError):
            for area, name in zip(areas, names, strict=True):
                if not isinstance(area, (int, float, type(None))):
                    self.fail(f"{name} has the area {area!r:.40}, which is not a number")
            raise
        return np.where(np.isfinite(found), found, boxes[:, 2] * boxes[:, 3])

    def order(self, objects: Objects, sizes: NDArray[np.int64], names: list[str]) -> NDArray[np.int64]:
        """The rows that have something of their box inside their image, ordered by image."""
        x, y, width, height = objects.boxes.T
        canvas = sizes[objects.images]
        clipped = clip(objects.boxes, canvas)
        flat = (width <= 0) | (height <= 0)
        outside = ~flat & ((clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1]))
        beyond = np.maximum.reduce([-x, -y, x + width - canvas[:, 1], y + height - canvas[:, 0], np.zeros_like(x)])
        cut = ~flat & ~outside & (beyond > _TOLERANCE)
        self.several("boxes without an area, left out", flat, names)
        self.several("boxes outside the image, left out", outside, names)
        self.several("boxes reaching past the image, clipped", cut, names)
        twice = [identity for identity, count in Counter(map(str, objects.ids)).items() if count > 1]
        if twice and twice != ["None"]:
            self.findings.note("annotation ids that occur more than once, kept", twice[0], len(twice))
        kept = np.flatnonzero(~flat & ~outside)
        return kept[np.argsort(objects.images[kept], kind="stable")]


def clip(boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Boxes (N, 4) xywh cut at the border of images of `sizes` (N, 2) or (2,), height and width; as xyxy float32."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.asarray(sizes, np.float64)[..., [1, 0, 1, 0]]
    return np.clip(corners, 0, limits).astype(np.float32)


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if not entry.is_dir()}
    except OSError:
        return set()


def _looked_up(table: Mapping[int, int], key: Any) -> int | None:
    try:
        return table.get(key)
    except TypeError:  # a list is no key
        return None


def _is_side(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and 1 <= value < 2**31


def _has_area(entry: Mapping[str, Any]) -> bool:
    area = entry.get("area")
    if isinstance(area, (int, float)):
        return 0 <= area <= sys.float_info.max
    return area is not None  # what is no number is refused where all of them are read


def _is_box(box: Any) -> bool:
    try:
        values = np.array(box, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return values.shape == (4,) and bool(np.isfinite(values).all())
