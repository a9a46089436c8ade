"""mIoU and accuracies against pixels counted one class at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nearfield.engine.dense.segmentation_metrics import SegmentationMetrics


def counted(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int, ignore: int) -> dict[str, float]:
    """The definitions, written down once more: sets of pixels, one class after the other."""
    found = np.concatenate([a.reshape(-1) for a, _ in pairs])
    truth = np.concatenate([b.reshape(-1) for _, b in pairs])
    found, truth = found[truth != ignore], truth[truth != ignore]
    ious, accuracies = [], []
    for label in range(classes):
        a, b = found == label, truth == label
        if (a | b).any():
            ious.append((a & b).sum() / (a | b).sum())
        if b.any():
            accuracies.append((a & b).sum() / b.sum())
    return {
        "miou": float(np.mean(ious)),
        "pixel_accuracy": float((found == truth).mean()),
        "mean_accuracy": float(np.mean(accuracies)),
        "n": len(pairs),
    }


@pytest.mark.parametrize("seed", range(12))
def test_numbers_are_those_of_a_naive_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, ignore = int(rng.integers(1, 9)), int(rng.choice([255, -1, 100]))
    used = rng.choice(classes, int(rng.integers(1, classes + 1)), replace=False)  # some classes are nowhere
    metrics = SegmentationMetrics(classes, ignore)
    pairs = []
    for _ in range(4):
        shape = tuple(rng.integers(1, 40, 2))
        truth = np.where(rng.random(shape) < 0.2, ignore, rng.choice(used, shape))
        found = np.where(rng.random(shape) < 0.5, truth, rng.choice(used, shape))
        found[found == ignore] = used[0]
        pairs.append((found, truth))
        metrics.add(torch.from_numpy(found), torch.from_numpy(truth))
    assert metrics.result() == pytest.approx(counted(pairs, classes, ignore), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_their_largest_class(dtype: torch.dtype) -> None:
    truth = torch.randint(0, 5, (3, 7, 9))
    truth[0, :2] = 255
    logits = torch.randn(3, 5, 7, 9).to(dtype)
    one, other = SegmentationMetrics(5), SegmentationMetrics(5)
    one.add(logits, truth[:, None])
    other.add(logits.argmax(1), truth.to(torch.uint8))
    assert (
        one.result()
        == other.result()
        == counted([(m, t) for m, t in zip(logits.argmax(1).numpy(), truth.numpy(), strict=True)], 5, 255)
    )


def test_batches_do_not_matter() -> None:
    truth, found = torch.randint(0, 4, (6, 8, 8)), torch.randint(0, 4, (6, 8, 8))
    whole, parts = SegmentationMetrics(4), SegmentationMetrics(4)
    whole.add(found, truth)
    for a, b in zip(found, truth, strict=True):
        parts.add(a, b)
    assert torch.equal(whole.confusion(), parts.confusion())
    assert whole.confusion().sum() == truth.numel()
    assert whole.result() == parts.result()


def test_each_class_has_its_own_numbers() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    found = torch.tensor([[0, 0, 1, 1], [1, 3, 0, 2]])
    metrics = SegmentationMetrics(5)
    metrics.add(found, truth)
    iou, accuracy = metrics.per_class()
    assert iou.tolist() == pytest.approx([2 / 3, 2 / 4, math.nan, 0.0, math.nan], nan_ok=True)
    assert accuracy.tolist() == pytest.approx([2 / 3, 2 / 3, math.nan, math.nan, math.nan], nan_ok=True)
    expected = {"miou": (2 / 3 + 1 / 2 + 0) / 3, "pixel_accuracy": 4 / 6, "mean_accuracy": 2 / 3, "n": 1}
    assert metrics.result() == pytest.approx(expected)
    assert metrics.confusion()[1].tolist() == [0, 2, 0, 1, 0]


def test_without_a_pixel_that_counts_there_is_no_number() -> None:
    metrics = SegmentationMetrics(3)
    assert metrics.result() == {"n": 0}
    metrics.add(torch.zeros(2, 4, 4, dtype=torch.int64), torch.full((2, 4, 4), 255))
    assert metrics.result() == {"n": 2}


def test_what_is_wrong_is_one_line() -> None:
    zeros = torch.zeros(1, 4, 4, dtype=torch.int64)
    for bad, words in ((zeros + 7, "16 pixels of the targets"), (zeros - 3, "16 pixels of the targets")):
        metrics = SegmentationMetrics(3)
        metrics.add(zeros, bad)
        with pytest.raises(ValueError, match=words):
            metrics.result()
    metrics = SegmentationMetrics(3)
    metrics.add(zeros + 3, zeros)
    with pytest.raises(ValueError, match=r"16 pixels of the predictions are no class: labels must be 0 .. 2$"):
        metrics.result()
    with pytest.raises(ValueError, match=r"predicted class maps \(1, 4, 4\), targets \(1, 5, 4\)"):
        metrics.add(zeros, torch.zeros(1, 5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits of shape \(1, 4, 4, 4\): expected \(B, 3, H, W\)"):
        metrics.add(torch.zeros(1, 4, 4, 4), zeros)
    with pytest.raises(ValueError, match="ignore=2 is one of the 3 classes"):
        SegmentationMetrics(3, ignore=2)
    with pytest.raises(ValueError, match="num_classes=0"):
        SegmentationMetrics(0)
