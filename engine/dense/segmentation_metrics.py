"""Mean intersection over union and accuracies of class maps, from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


class SegmentationMetrics:
    """mIoU, pixel and mean accuracy over everything that was added; pixels of the class `ignore` are left out.

    The sums run over the whole data set, as ADE20K and Cityscapes want it, and not over images. They stay on the device
    of the predictions.

    Args:
        num_classes: K; classes are 0 .. K-1.
        ignore: the label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if 0 <= ignore < num_classes:
            raise ValueError(f"ignore={ignore} is one of the {num_classes} classes: ignored pixels need another label")
        self.num_classes, self.ignore = num_classes, ignore
        self.images = 0
        self._counts: Tensor | None = None  # (K + 1) x (K + 1): target, prediction; the last of each is out of range

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch or one image.

        Args:
            outputs: logits (B, K, H, W) of any dtype, or class maps (B, H, W) or (H, W) of integers.
            targets: class maps (B, H, W) or (H, W) of integers; (B, 1, H, W) is taken too.

        Raises:
            ValueError: the shapes do not belong together.
        """
        if outputs.is_floating_point():
            if outputs.ndim != 4 or outputs.shape[1] != self.num_classes:
                raise ValueError(f"logits of shape {tuple(outputs.shape)}: expected (B, {self.num_classes}, H, W)")
            outputs = outputs.argmax(1)
        if targets.ndim == 4 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if targets.ndim == 2:
            targets = targets[None]
        if outputs.ndim == 2:
            outputs = outputs[None]
        if outputs.shape != targets.shape or outputs.ndim != 3:
            raise ValueError(
                f"predicted class maps {tuple(outputs.shape)}, targets {tuple(targets.shape)}: they must be equal, "
                "(B, H, W) or (H, W)"
            )
        self.images += len(targets)
        side = self.num_classes + 1
        targets = targets.to(outputs.device, torch.int64).flatten()
        counted = targets != self.ignore
        # what is out of range goes to the last row or column, for `confusion` to name it
        rows = torch.where((targets >= 0) & (targets < self.num_classes), targets, self.num_classes)
        columns = outputs.to(torch.int64).flatten()
        columns = torch.where((columns >= 0) & (columns < self.num_classes), columns, self.num_classes)
        # a bin behind the matrix takes the ignored ones
        flat = torch.where(counted, rows * side + columns, side * side)
        counts = torch.bincount(flat, minlength=side * side + 1)[:-1].view(side, side)
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)

    def confusion(self) -> Tensor:
        """Pixels (K, K) int64 on the CPU: row the target's class, column the predicted one.

        Raises:
            ValueError: a target or a class map had a label that is neither a class nor `ignore`.
        """
        if self._counts is None:
            return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        counts = self._counts.cpu()
        for what, pixels in (("targets", counts[-1].sum()), ("predictions", counts[:, -1].sum())):
            if pixels:
                raise ValueError(
                    f"{int(pixels)} pixels of the {what} are no class: labels must be 0 .. {self.num_classes - 1}"
                    + (f", or {self.ignore} for what does not count" if what == "targets" else "")
                )
        return counts[:-1, :-1]

    def per_class(self) -> tuple[Tensor, Tensor]:
        """(IoU, accuracy) of each class as fractions, (K,) float64 each.

        NaN: an IoU of a class that neither targets nor predictions have, an accuracy of a class the targets have not.
        """
        counts = self.confusion().double()
        hits, truth = counts.diagonal(), counts.sum(1)
        return hits / (truth + counts.sum(0) - hits), hits / truth

    def result(self) -> dict[str, float]:
        """`miou`, `pixel_accuracy`, `mean_accuracy` as fractions, `n` images.

        Classes that neither targets nor predictions have are left out of the mean IoU, classes that the targets do not
        have out of the mean accuracy. Without a single pixel that counts, the numbers are left out.
        """
        counts = self.confusion()
        if not counts.sum():
            return {"n": self.images}
        iou, accuracy = self.per_class()
        return {
            "miou": float(iou.nanmean()),
            "pixel_accuracy": int(counts.diagonal().sum()) / int(counts.sum()),
            "mean_accuracy": float(accuracy.nanmean()),
            "n": self.images,
        }
