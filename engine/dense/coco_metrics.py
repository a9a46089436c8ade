"""Average precision and recall of boxes and instance masks as COCO defines them: the twelve numbers of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, DivergedError
from ..hardware import cores

# in the order of COCO's summary
NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
PREFIX = {"bbox": "box", "segm": "mask"}


class GroundTruth:
    """A COCO dictionary, checked and completed once for as many `CocoMetrics` as are made of it.

    Args:
        content: with `images`, `annotations` and `categories`; not changed. `area` and `iscrowd` may be missing: then
            it is the area of the mask, or of the box, and no crowd.
        kinds: which of `bbox` and `segm` will be computed.

    Attributes:
        content: a copy that has all that evaluators read; sizes: (height, width) of each image by its id.
        names: of the categories, by their ids in ascending order.

    Raises:
        DataError: it is no such dictionary, or an annotation lacks what is asked for.
    """

    def __init__(self, content: Mapping[str, Any], kinds: Sequence[str] = ("bbox", "segm")) -> None:
        if not kinds or not set(kinds) <= set(PREFIX):
            raise ValueError(f"kinds={tuple(kinds)} must name some of {', '.join(PREFIX)}")
        self.kinds = tuple(kinds)
        self.content = _checked(content, self.kinds)
        self.sizes = {image["id"]: (image.get("height"), image.get("width")) for image in self.content["images"]}
        named = {int(one["id"]): str(one.get("name", one["id"])) for one in self.content["categories"]}
        self.names = dict(sorted(named.items()))
        self._by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in self.content["annotations"]:
            self._by_image.setdefault(annotation["image_id"], []).append(annotation)

    def of_images(self, images: Sequence[int]) -> dict[str, Any]:
        """The dictionary with the annotations of some images alone, which evaluators may write to."""
        own = [dict(annotation) for image in images for annotation in self._by_image.get(image, [])]
        return {**self.content, "annotations": own}


class CocoMetrics:
    """Box and mask AP and AR over the images that were added (https://cocodataset.org/#detection-eval).

    Small is an area below 32 x 32 pixels, large one above 96 x 96; at most 100 detections of a class count in an image;
    crowd regions are neither found nor missed. Computed by faster_coco_eval; equal to pycocotools to 1e-9
    (tests/engine/test_coco_metrics.py).

    Args:
        ground_truth: checked already, or a dictionary as `GroundTruth` takes it.
        kinds: which of `bbox` and `segm` to compute, of a dictionary; a `GroundTruth` says it itself.
        category_ids: the category of each label 0 .. K-1. Default: the ids of the ground truth in ascending order.

    Raises:
        DataError: what `GroundTruth` raises.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any] | GroundTruth,
        kinds: Sequence[str] = ("bbox", "segm"),
        *,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth, kinds)
        self.kinds = self.truth.kinds
        self.category_ids = list(category_ids) if category_ids is not None else list(self.truth.names)
        if strangers := sorted(set(self.category_ids) - set(self.truth.names)):
            raise ValueError(f"category_ids: {strangers[0]} is no category of the ground truth")
        self._found: dict[int, list[dict[str, Any]]] = {}

    def add(self, outputs: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the predictions of a batch; those of an image that was there already take their place.

        Args:
            outputs: for each image `boxes` (N, 4) xyxy in pixels of the image of the ground truth, `labels` (N,) of
                0 .. K-1, `scores` (N,); for masks also `masks`, (N, H, W) or (N, 1, H, W) of the size of that image:
                bool, or probabilities, of which those above 0.5 count. On any device.
            targets: for each image its `image_id`.

        Raises:
            ValueError: an image that the ground truth does not have, a label out of range, or masks that are missing or
                of another size.
            DivergedError: a score or a box is not finite.
        """
        for output, target in zip(outputs, targets, strict=True):
            image_id = int(target["image_id"])
            if image_id not in self.truth.sizes:
                known = len(self.truth.sizes)
                raise ValueError(f"image_id {image_id} is no image of the ground truth ({known} images)")
            self._found[image_id] = self._entries(image_id, output)

    def _entries(self, image_id: int, output: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        boxes = output["boxes"].detach().double().cpu().reshape(-1, 4)
        scores = output["scores"].detach().double().cpu()
        labels = output["labels"].tolist()
        if not bool(torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise DivergedError(f"predictions for image_id {image_id} are not finite: the weights have diverged")
        if labels and not 0 <= min(labels) <= max(labels) < len(self.category_ids):
            wrong = next(label for label in labels if not 0 <= label < len(self.category_ids))
            raise ValueError(
                f"image_id {image_id}: label {wrong} is none of the {len(self.category_ids)} classes of the ground "
                f"truth (0 .. {len(self.category_ids) - 1})"
            )
        sizes = boxes[:, 2:] - boxes[:, :2]
        found = [
            {"image_id": image_id, "category_id": self.category_ids[label], "score": score, "bbox": box}
            for label, score, box in zip(
                labels, scores.tolist(), torch.cat([boxes[:, :2], sizes], 1).tolist(), strict=True
            )
        ]
        if "segm" in self.kinds:
            if "masks" not in output:
                raise ValueError(f"image_id {image_id}: predictions without masks: ask for kinds=('bbox',) alone")
            masks, size = output["masks"], self.truth.sizes[image_id]
            if len(masks) and masks.shape[-2:] != size:
                raise ValueError(
                    f"image_id {image_id}: masks of {tuple(masks.shape[-2:])}, but the image is {size} pixels"
                )
            for entry, mask in zip(found, encode_masks(masks), strict=True):
                entry["segmentation"] = mask
        return found

    def predictions(self, kind: str = "bbox") -> list[dict[str, Any]]:
        """What was added as COCO's results format, ready for json and for COCO's server: `kind` is bbox or segm."""
        field = "bbox" if kind == "bbox" else "segmentation"
        keys = ("image_id", "category_id", "score", field)
        return [{key: entry[key] for key in keys} for image in sorted(self._found) for entry in self._found[image]]

    def result(self) -> dict[str, float]:
        """Fractions by name, and the number of images as `n`.

        `box_` and `mask_` followed by ap (mean over IoU 0.50:0.95), ap50, ap75, ap_small, ap_medium, ap_large, ar1,
        ar10, ar100 (1, 10, 100 detections), ar_small, ar_medium, ar_large. What the ground truth has no object for is
        left out (COCO writes -1 there).
        """
        out: dict[str, float] = {}
        if self._found:
            for kind in self.kinds:
                stats = self._evaluate(kind).stats
                out |= {f"{PREFIX[kind]}_{name}": float(value) for name, value in zip(NAMES, stats, strict=True)}
        return {**{key: value for key, value in out.items() if value > -1}, "n": len(self._found)}

    def per_class(self, kind: str = "bbox") -> dict[str, float]:
        """AP (mean over IoU 0.50:0.95) by the name of the class; NaN for a class without an object."""
        names = self.truth.names
        if not self._found:
            return {names[category]: math.nan for category in self.category_ids}
        evaluation = self._evaluate(kind)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
        out = {}
        for category in self.category_ids:
            of_class = precision[:, :, list(evaluation.params.catIds).index(category)]
            of_class = of_class[of_class > -1]
            out[names[category]] = float(of_class.mean()) if of_class.size else math.nan
        return out

    def _evaluate(self, kind: str) -> Any:
        from faster_coco_eval import COCO, COCOeval_faster

        def say_nothing(*_: object) -> None:
            pass

        images = sorted(self._found)
        truth = COCO(self.truth.of_images(images), print_function=say_nothing)
        # masks without boxes: with both, the area of a detection would be that of its box
        found = truth.loadRes(self.predictions(kind))
        evaluation = COCOeval_faster(
            truth, found, iouType=kind, print_function=say_nothing, rle_iou_max_workers=cores()
        )
        evaluation.params.imgIds = images
        evaluation.run()
        return evaluation


def _checked(truth: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """A copy with everything that the evaluation reads; annotations numbered from 1, since 0 means "not matched"."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth.get(key), Sequence):
            raise DataError(f"the ground truth has no list of {key}: it is no COCO data set of detections")
    annotations = []
    for number, annotation in enumerate(truth["annotations"], 1):
        name = f"annotation {annotation.get('id', number)} of the ground truth"
        needed = ["image_id", "category_id", "bbox", *(["segmentation"] if "segm" in kinds else [])]
        if lacking := [key for key in needed if not annotation.get(key) and annotation.get(key) != 0]:
            raise DataError(f"{name} has no {lacking[0]}, which {' and '.join(kinds)} need")
        own = {"iscrowd": 0, **annotation, "id": number}
        own.setdefault("area", None)
        annotations.append(own)
    out = {**truth, "images": [dict(image) for image in truth["images"]], "annotations": annotations}
    _fill_areas(out)
    return out


def _fill_areas(truth: dict[str, Any]) -> None:
    from faster_coco_eval.core import mask as masks

    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in truth["images"]}
    for annotation in truth["annotations"]:
        if annotation["area"] is not None:
            continue
        height, width = sizes.get(annotation["image_id"], (None, None))
        if annotation.get("segmentation") and height and width:
            annotation["area"] = float(masks.area(masks.segmToRle(annotation["segmentation"], width, height)))
        else:
            annotation["area"] = float(annotation["bbox"][2] * annotation["bbox"][3])


def binary_masks(masks: Tensor) -> Tensor:
    """Masks (N, H, W) or (N, 1, H, W) as bool (N, H, W): of probabilities those above 0.5, of integers all but 0."""
    masks = masks[:, 0] if masks.ndim == 4 else masks
    return masks > 0.5 if masks.is_floating_point() else masks != 0


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's run lengths of masks as `binary_masks` takes them: `size` [H, W] and `counts`, a string."""
    from faster_coco_eval.core import mask as coder

    binary = binary_masks(masks.detach())
    columns = binary.transpose(1, 2).contiguous().to("cpu", torch.uint8).numpy()  # run lengths go down the columns
    if not len(columns):
        return []
    runs = coder.encode(np.asfortranarray(columns.transpose(2, 1, 0)))
    return [{"size": list(run["size"]), "counts": run["counts"].decode("ascii")} for run in runs]
