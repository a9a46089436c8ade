"""Sets of images with objects: COCO, and whatever is written in its format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from ..errors import DataError
from . import instance_masks
from .coco_file import clip, read_coco
from .decode import read_image

_logger = logging.getLogger("nearfield.engine")
Target = dict[str, Any]
Transform = Callable[[tv_tensors.Image, Target], tuple[Tensor, Target]]


class CocoSet(torch.utils.data.Dataset):
    """A map-style set of images and their objects.

    An item is (image, target), or what `transform` makes of them. The image is a uint8 `tv_tensors.Image`
    (channels, H, W). The target has, for N objects:
        boxes: `tv_tensors.BoundingBoxes` (N, 4) xyxy float32 in pixels, clipped to the image.
        labels: (N,) int64, 0 .. K-1: place of the category among the ids of the file in ascending order.
        masks: `tv_tensors.Mask` (N, H, W) uint8, 1 inside; only with `masks`. Drawn when the item is read.
        iscrowd: (N,) bool, regions of many objects that a detector is neither asked for nor blamed for.
        area: (N,) float32, square pixels as the file says, of the picture as it is stored in the file.
        image_id: int.

    Args:
        images: the folder of the images.
        annotations: the json file.
        training: crowd regions and objects whose mask has no pixel are left out, and a set without any object is
            refused.
        masks: read segmentations too. Objects without one are left out then, and counted.
        keep_empty: images without objects stay in the set. mmdet and detectron2 train without them.
        skip_missing: leave images out whose file is missing, counted, instead of refusing the set.
        channels: 1, 3 or 4 channels of the images.
        transform: applied to (image, target); can be set later.

    Attributes:
        class_names: of the labels 0 .. K-1; category_ids: the ids that the file uses for them.
        image_ids: of the images, in the order of the set; sizes: (N, 2) their heights and widths.
        report: counts by what they count: images, objects, and whatever was left out, clipped or measured. Logged once.

    Raises:
        DataError: a file or folder is missing or broken, or an entry is wrong: the line names the file and the entry.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        training: bool = False,
        masks: bool = False,
        keep_empty: bool = True,
        skip_missing: bool = False,
        channels: int = 3,
        transform: Transform | None = None,
    ) -> None:
        self.folder, self.path = Path(images).expanduser(), Path(annotations).expanduser()
        self.masks, self.channels, self.transform = masks, channels, transform
        file = read_coco(self.path, self.folder, masks=masks, skip_missing=skip_missing)
        self.category_ids, self.class_names = file.category_ids, file.class_names
        crowd = int(file.objects.crowd.sum())
        usable = ~(file.objects.crowd | file.objects.empty)
        self._objects = file.objects.where(np.flatnonzero(usable)) if training else file.objects
        counts = np.bincount(self._objects.images, minlength=len(file.image_ids))
        wanted = np.arange(len(counts)) if keep_empty else np.flatnonzero(counts)
        stops = np.cumsum(counts)
        self._starts, self._stops = (stops - counts)[wanted], stops[wanted]
        self.image_ids = [file.image_ids[row] for row in wanted.tolist()]
        self._names = [file.names[row] for row in wanted.tolist()]
        self.sizes = file.sizes[wanted]
        empty = int((counts == 0).sum())
        self.report = {
            "images": len(wanted),
            "images without objects" + ("" if keep_empty else ", left out"): empty,
            "objects": int((~self._objects.crowd).sum()),
            "crowd regions" + (", left out" if training else ""): crowd,
            **file.findings.counts,
        }
        if training and not len(self._objects.ids):
            left_out = f" that can be used ({file.findings})" if file.findings.counts else ""
            raise DataError(f"{self.path}: no object in it{left_out}: nothing to train on")
        _logger.info("%s: %s", self.path, ", ".join(f"{count} {what}" for what, count in self.report.items() if count))
        if file.findings.counts:
            _logger.warning("%s: %s", self.path, file.findings)

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.image_ids)

    def filename(self, index: int) -> str:
        """The file of image `index`."""
        return str(self.folder / self._names[index])

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        image, target = self._image(index), self.target(index)
        return (image, target) if self.transform is None else self.transform(image, target)

    def target(self, index: int) -> Target:
        """The target of image `index` without a transform; the image is not read."""
        height, width = self._size(index)
        rows = self._rows(index)
        objects = self._objects
        boxes = torch.from_numpy(clip(objects.boxes[rows], self.sizes[index]))
        target: Target = {
            "image_id": self.image_ids[index],
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(objects.labels[rows].copy()),
            "iscrowd": torch.from_numpy(objects.crowd[rows].copy()),
            "area": torch.from_numpy(objects.areas[rows].astype(np.float32)),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(
                torch.from_numpy(self._masks(range(rows.start, rows.stop), height, width))
            )
        return target

    def ground_truth(self) -> dict[str, Any]:
        """What the set holds as a COCO dictionary, for metrics: the file's ids, boxes (not clipped), areas and masks.

        Annotations are numbered anew if ids are missing, 0 or not unique, which evaluators cannot do with.
        """
        objects, ids = self._objects, list(self._objects.ids)
        if len(set(map(str, ids))) < len(ids) or not all(ids):
            ids = list(range(1, len(ids) + 1))
        annotations = []
        for index, image_id in enumerate(self.image_ids):
            size = self._size(index)
            rows = self._rows(index)
            for row in range(rows.start, rows.stop):
                entry = {
                    "id": ids[row],
                    "image_id": image_id,
                    "category_id": self.category_ids[objects.labels[row]],
                    "bbox": objects.boxes[row].tolist(),
                    "area": float(objects.areas[row]),
                    "iscrowd": int(objects.crowd[row]),
                }
                if objects.masks is not None:
                    entry["segmentation"] = instance_masks.unpack(objects.masks[row], size)
                annotations.append(entry)
        images = [
            {"id": identity, "file_name": name, "height": height, "width": width}
            for identity, name, (height, width) in zip(self.image_ids, self._names, self.sizes.tolist(), strict=True)
        ]
        names = zip(self.category_ids, self.class_names, strict=True)
        return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in names]}

    def _size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index].tolist()
        return height, width

    def _rows(self, index: int) -> slice:
        return slice(int(self._starts[index]), int(self._stops[index]))

    def _image(self, index: int) -> tv_tensors.Image:
        image = read_image(self.filename(index), self.channels)
        size = self._size(index)
        if tuple(image.shape[-2:]) == size:
            return image
        # annotated on the stored pixels: the tool did not look at the EXIF orientation
        stored = read_image(self.filename(index), self.channels, upright=False)
        if tuple(stored.shape[-2:]) == size:
            return stored
        (there, across), (height, width) = image.shape[-2:], size
        raise DataError(
            f"{self.filename(index)}: {across} x {there} pixels, but {self.path} says {width} x {height} (image id "
            f"{self.image_ids[index]}): its boxes would be misplaced; use the image that was annotated"
        )

    def _masks(self, rows: Iterable[int], height: int, width: int) -> np.ndarray:
        rows = list(rows)
        packed = self._objects.masks
        assert packed is not None
        masks = np.zeros((len(rows), height, width), np.uint8)
        for place, row in enumerate(rows):
            try:
                masks[place] = instance_masks.draw(packed[row], (height, width))
            except (ValueError, RuntimeError) as error:
                raise DataError(f"{self.path}: annotation {self._objects.ids[row]}: broken mask ({error})") from error
        return masks


def collate(items: Iterable[tuple[Any, Target]]) -> tuple[list[Any], list[Target]]:
    """A batch as detectors take it: a list of images, which may differ in size, and a list of targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
