"""From pictures to predictions, for each task: what goes into the results, what is printed, what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from _classify import describe, likeliest, transform
from _predict_models import CLASSIFICATION, DETECTION, Loaded
from nearfield.engine.dense import drawing
from nearfield.engine.dense.coco_metrics import encode_masks
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import normalize, to_dtype, to_pil_image

SUFFIXES = PICTURE, CLASS_MAP = ("predicted", "classes")  # of the pictures' names: the annotated one, class numbers


@dataclass
class Prediction:
    """What was found in a picture.

    Attributes:
        record: for json.
        lines: for people.
        pictures: by the suffix of their file name.
        masks: COCO run lengths for each object of the record: too long to print.
    """

    record: dict[str, Any]
    lines: list[str]
    pictures: dict[str, Image.Image]
    masks: list[dict[str, Any]] = field(default_factory=list)


Predictor = Callable[[Sequence[Tensor]], list[Prediction]]


def predictor(loaded: Loaded, device: torch.device, *, threshold: float, topk: int) -> Predictor:
    """A function from pictures (channels, H, W) uint8 to a prediction for each.

    Args:
        loaded: the model.
        device: of the model.
        threshold: objects with a lower score are left out.
        topk: classes named for a picture, if it is classified.
    """
    if loaded.task == CLASSIFICATION:
        return _Classifier(loaded, device, topk)
    if loaded.task == DETECTION:
        return _Detector(loaded, device, threshold)
    return _Segmentor(loaded, device)


class _Classifier:
    def __init__(self, loaded: Loaded, device: torch.device, topk: int) -> None:
        assert loaded.how is not None
        self.loaded, self.device, self.topk, self.transform = loaded, device, topk, transform(loaded.how)

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        batch = torch.stack([self.transform(to_pil_image(image)) for image in images])
        logits = self.loaded.model(batch.to(self.device)).cpu()
        _check_finite(logits)
        out = []
        for image, row in zip(images, logits, strict=True):
            top = likeliest(row, self.loaded.names, self.topk)
            shares = {str(entry["name"] or entry["class"]): entry["p"] for entry in top}
            out.append(Prediction({"top": top}, describe(top), {PICTURE: drawing.draw_caption(image, shares)}))
        return out


class _Detector:
    def __init__(self, loaded: Loaded, device: torch.device, threshold: float) -> None:
        self.loaded, self.device, self.threshold = loaded, device, threshold
        self.names = loaded.names or [str(number) for number in range(loaded.model.num_classes)]

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        outputs = self.loaded.model([image.to(self.device) for image in images])
        return [self._prediction(image, output) for image, output in zip(images, outputs, strict=True)]

    def _prediction(self, image: Tensor, output: dict[str, Tensor]) -> Prediction:
        order = output["scores"].argsort(descending=True, stable=True)
        kept = order[output["scores"][order] >= self.threshold]
        found = {key: value[kept].cpu() for key, value in output.items()}
        _check_finite(found["boxes"])
        objects = [
            {"class": label, "name": self.names[label], "score": score, "box": [round(side, 2) for side in box]}
            for label, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        ]
        lines = [
            f"{entry['score']:6.2f}  {entry['name']}  at {', '.join(f'{side:.0f}' for side in entry['box'])}"
            for entry in objects
        ]
        picture = drawing.draw_objects(image, found, self.names)
        masks = encode_masks(found["masks"]) if "masks" in found else []
        return Prediction({"objects": objects}, lines or ["nothing found"], {PICTURE: picture}, masks)


class _Segmentor:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.names = loaded.names or [str(number) for number in range(loaded.model.num_classes)]

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        from nearfield.engine.dense import inference

        out = []
        for image in images:  # of sizes of their own
            pixels = to_dtype(image.as_subclass(Tensor).to(self.device), scale=True)
            pixels = normalize(pixels, self.loaded.mean, self.loaded.std)[None]
            shares = inference.predict(inference.filled_up(self.loaded.model), pixels, **self.loaded.views)
            _check_finite(shares)
            out.append(self._prediction(image, shares[0].argmax(0).cpu()))
        return out

    def _prediction(self, image: Tensor, labels: Tensor) -> Prediction:
        counts = labels.flatten().bincount(minlength=len(self.names))
        order = [number for number in counts.argsort(descending=True, stable=True).tolist() if counts[number]]
        classes = [
            {"class": number, "name": self.names[number], "share": int(counts[number]) / labels.numel()}
            for number in order
        ]
        picture = drawing.draw_class_map(image, labels, self.names, ignore=-1)
        legend = drawing.map_legend([labels], self.names, picture.width, ignore=-1)
        whole = Image.new("RGB", (picture.width, picture.height + legend.height))
        whole.paste(picture, (0, 0))
        whole.paste(legend, (0, picture.height))
        stored = Image.fromarray(labels.numpy().astype(np.uint8 if len(self.names) <= 256 else np.uint16))
        lines = [f"{entry['share']:7.2%}  {entry['name']}" for entry in classes]
        return Prediction({"classes": classes}, lines, {PICTURE: whole, CLASS_MAP: stored})


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("the model's output is not finite: its weights are broken")
