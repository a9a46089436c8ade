"""COCO metrics against pycocotools on random scenes; predictions and ground truth that are odd."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from nearfield.engine.dense import coco_metrics
from nearfield.engine.dense.coco_metrics import NAMES, PREFIX, CocoMetrics
from nearfield.engine.errors import DataError, DivergedError
from torch import Tensor

KINDS = ("bbox", "segm")
Scene = tuple[dict[str, Any], list[dict[str, Tensor]], list[dict[str, int]]]
SIDE = 160


def mask_of(box: list[float], rng: np.random.Generator) -> np.ndarray:
    """A box with a hole, or an ellipse in it, on a map of SIDE x SIDE."""
    x, y, w, h = box
    row, column = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    inside = (column > x) & (column < x + w) & (row > y) & (row < y + h)
    if rng.random() < 0.5:
        return inside & (((column - x - w / 2) / (w / 2)) ** 2 + ((row - y - h / 2) / (h / 2)) ** 2 < 1)
    return inside & ~((abs(column - x - w / 2) < w / 8) & (abs(row - y - h / 2) < h / 8))


def random_box(rng: np.random.Generator) -> list[float]:
    w, h = np.exp(rng.uniform(math.log(4), math.log(150), 2))
    return [float(rng.uniform(0, SIDE - w)), float(rng.uniform(0, SIDE - h)), float(w), float(h)]


def scene(seed: int, *, images: int = 6, classes: int = 4) -> Scene:
    """Random objects of all sizes; predictions near them, doubled, elsewhere, of the wrong class, or none at all."""
    from pycocotools import mask as coder

    rng = np.random.default_rng(seed)
    categories = sorted(rng.choice(np.arange(1, 40), classes, replace=False).tolist())
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }
    outputs, targets = [], []
    image_ids = rng.choice(np.arange(1, 1000), images, replace=False).tolist()
    for image_id in image_ids:
        truth["images"].append({"id": image_id, "height": SIDE, "width": SIDE})
        rows: list[tuple[list[float], np.ndarray, int, float]] = []
        for _ in range(int(rng.integers(0, 7)) if rng.random() < 0.85 else 0):
            box, label = random_box(rng), int(rng.integers(classes))
            mask = mask_of(box, rng)
            crowd = rng.random() < 0.15
            runs = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
            runs["counts"] = runs["counts"].decode()
            x, y, w, h = box
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            # areas need not be those of the masks, and sit on the limits now and then
            area = float(rng.choice([mask.sum(), 32.0**2, 96.0**2]))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": categories[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                    "segmentation": polygon if rng.random() < 0.4 and not crowd else runs,
                }
            )
            for _ in range(int(rng.choice([0, 1, 2, 8 if crowd else 3]))):
                moved = [float(v) for v in np.array(box) + rng.normal(0, 0.06 * min(w, h), 4)]
                moved[2:] = [max(1.0, v) for v in moved[2:]]
                guess = label if rng.random() < 0.85 else int(rng.integers(classes))
                rows.append((moved, mask_of(moved, rng), guess, float(rng.choice([0.9, 0.5, 0.25, rng.random()]))))
        for _ in range(int(rng.integers(0, 4))):
            box = random_box(rng)
            rows.append((box, mask_of(box, rng), int(rng.integers(classes)), float(rng.choice([0.5, rng.random()]))))
        if rng.random() < 0.15:
            rows = []
        outputs.append(as_output(rows))
        targets.append({"image_id": image_id})
    return truth, outputs, targets


def as_output(rows: list[tuple[list[float], np.ndarray, int, float]]) -> dict[str, Tensor]:
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    return {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "labels": torch.tensor([row[2] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[3] for row in rows]),
        "masks": torch.from_numpy(np.stack([row[1] for row in rows]) if rows else np.zeros((0, SIDE, SIDE), bool)),
    }


def reference(truth: dict[str, Any], outputs: list[dict[str, Tensor]], targets: list[dict[str, int]], kind: str) -> Any:
    """The twelve numbers of pycocotools; -1 where there is nothing."""
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = sorted(category["id"] for category in truth["categories"])
    found = []
    for output, target in zip(outputs, targets, strict=True):
        for box, label, score, mask in zip(
            *(output[key] for key in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            x, y, right, bottom = box.double().tolist()
            entry = {"image_id": target["image_id"], "category_id": categories[int(label)], "score": float(score)}
            if kind == "bbox":
                entry["bbox"] = [x, y, right - x, bottom - y]
            else:
                entry["segmentation"] = coder.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            found.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        if found:
            dt = gt.loadRes(found)
        else:
            dt = COCO()
            dt.dataset = {**copy.deepcopy(truth), "annotations": []}
            dt.createIndex()
        evaluation = COCOeval(gt, dt, kind)
        evaluation.params.imgIds = sorted(target["image_id"] for target in targets)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def compare(truth: dict[str, Any], outputs: list[dict[str, Tensor]], targets: list[dict[str, int]]) -> dict[str, float]:
    metrics = CocoMetrics(truth, KINDS)
    metrics.add(outputs, targets)
    result = metrics.result()
    for kind in KINDS:
        expected = dict(zip(NAMES, reference(truth, outputs, targets, kind), strict=True))
        got = {name: result.get(f"{PREFIX[kind]}_{name}", -1.0) for name in NAMES}
        assert got == pytest.approx(expected, abs=1e-9), (kind, got, expected)
    return result


@pytest.mark.parametrize("seed", range(40))
def test_all_numbers_are_those_of_pycocotools(seed: int) -> None:
    compare(*scene(seed))


def test_the_random_scenes_are_worth_comparing() -> None:
    """Crowds, ties, polygons, images with no object and with no prediction are among them, and AP is in the middle."""
    scenes = [scene(seed) for seed in range(40)]
    annotations = [a for truth, _, _ in scenes for a in truth["annotations"]]
    assert {a["iscrowd"] for a in annotations} == {0, 1}
    assert {type(a["segmentation"]) for a in annotations} == {list, dict}
    outputs = [output for _, found, _ in scenes for output in found]
    assert any(len(output["scores"]) == 0 for output in outputs)
    assert any(len(output["scores"]) > len(output["scores"].unique()) for output in outputs)
    assert any({i["id"] for i in t["images"]} - {a["image_id"] for a in t["annotations"]} for t, _, _ in scenes)
    metrics = CocoMetrics(scenes[3][0])
    metrics.add(*scenes[3][1:])
    assert 0.05 < metrics.result()["box_ap"] < 0.95


def test_more_than_a_hundred_detections_in_an_image() -> None:
    truth, outputs, targets = scene(3, images=2, classes=1)
    rng = np.random.default_rng(0)
    boxes = [random_box(rng) for _ in range(140)]
    noise = [(box, mask_of(box, rng), 0, float(rng.random())) for box in boxes]
    right = [
        (a["bbox"], mask_of(a["bbox"], rng), 0, 0.3)
        for a in truth["annotations"]
        if a["image_id"] == targets[0]["image_id"]
    ]
    outputs[0] = as_output([*noise, *right, *right])
    compare(truth, outputs, targets)


def test_an_image_of_crowd_alone_and_a_class_without_objects() -> None:
    truth, outputs, targets = scene(7)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 1
        annotation["category_id"] = truth["categories"][0]["id"]
    result = compare(truth, outputs, targets)
    assert result == {"n": len(targets)}  # nothing to find: no number, not a wrong one


@pytest.mark.parametrize("objects", [True, False])
def test_no_prediction_at_all(objects: bool) -> None:
    truth, _, targets = scene(2)
    assert truth["annotations"]
    if not objects:
        truth["annotations"] = []
    result = compare(truth, [as_output([]) for _ in targets], targets)
    assert result.get("box_ap") == (0.0 if objects else None)


def test_perfect_predictions_are_one() -> None:
    rng = np.random.default_rng(1)
    boxes = [[10.0, 10.0, 20.0, 20.0], [50.0, 20.0, 60.0, 70.0], [1.0, 90.0, 50.0, 60.0]]
    masks = [mask_of(box, rng) for box in boxes]
    truth = {
        "images": [{"id": 5, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}, {"id": 11, "name": "c"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": (3, 9, 9)[i], "bbox": box, "segmentation": runs(mask)}
            for i, (box, mask) in enumerate(zip(boxes, masks, strict=True))
        ],
    }
    metrics = CocoMetrics(truth)
    metrics.add(
        [as_output([(b, m, (0, 1, 1)[i], 0.9) for i, (b, m) in enumerate(zip(boxes, masks, strict=True))])],
        [{"image_id": 5}],
    )
    result = metrics.result()
    assert {result[key] for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap75", "box_ar100", "box_ap_small")} == {1.0}
    assert metrics.per_class("segm") == pytest.approx({"a": 1.0, "b": 1.0, "c": math.nan}, nan_ok=True)


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, counted one by one down the columns."""
    counts, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def test_only_the_images_that_were_added_count() -> None:
    truth, outputs, targets = scene(11)
    metrics = CocoMetrics(truth)
    metrics.add(outputs[:3], targets[:3])
    part = {image["image_id"] for image in targets[:3]}
    smaller = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] in part],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in part],
    }
    assert metrics.result() == pytest.approx(compare(smaller, outputs[:3], targets[:3]))
    assert metrics.result()["n"] == 3
    assert CocoMetrics(truth).result() == {"n": 0}


def test_an_image_added_twice_counts_once() -> None:
    truth, outputs, targets = scene(11)
    metrics = CocoMetrics(truth)
    metrics.add(outputs, targets)
    once = metrics.result()
    metrics.add(outputs[:2], targets[:2])
    assert metrics.result() == once


def test_batches_and_forms_of_masks_do_not_matter() -> None:
    truth, outputs, targets = scene(5)
    whole = CocoMetrics(truth)
    whole.add(outputs, targets)
    single = CocoMetrics(truth)
    for output, target in zip(outputs, targets, strict=True):
        probabilities = torch.where(output["masks"], 0.51, 0.5)[:, None]
        single.add([{**output, "masks": probabilities}], [target])
    assert single.result() == whole.result()
    numbers = CocoMetrics(truth)
    numbers.add([{**output, "masks": output["masks"].to(torch.uint8)} for output in outputs], targets)
    assert numbers.result() == whole.result()


def test_categories_may_have_gaps_and_an_order_of_their_own() -> None:
    truth, outputs, targets = scene(9)
    expected = compare(truth, outputs, targets)
    ids = sorted(category["id"] for category in truth["categories"])[::-1]
    metrics = CocoMetrics(truth, category_ids=ids)
    metrics.add([{**output, "labels": len(ids) - 1 - output["labels"]} for output in outputs], targets)
    assert metrics.result() == pytest.approx(expected)
    shuffled = {**truth, "categories": truth["categories"][::-1]}
    assert compare(shuffled, outputs, targets) == pytest.approx(expected)


def test_ground_truth_without_areas_and_crowd_is_completed() -> None:
    truth, outputs, targets = scene(4)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
    for annotation in truth["annotations"]:
        annotation["area"] = float(known.annToMask(known.anns[annotation["id"]]).sum())
    expected = compare(truth, outputs, targets)
    bare = copy.deepcopy(truth)
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    metrics = CocoMetrics(bare)
    metrics.add(outputs, targets)
    assert metrics.result() == pytest.approx(expected)


def test_a_ground_truth_is_checked_once_for_many_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, outputs, targets = scene(4)
    alone = CocoMetrics(truth)
    alone.add(outputs, targets)
    shared = coco_metrics.GroundTruth(truth)
    before = json.dumps(shared.content)
    monkeypatch.setattr(coco_metrics, "_checked", None)
    for _ in range(2):
        metrics = CocoMetrics(shared)
        metrics.add(outputs, targets)
        assert metrics.result() == alone.result()
        assert metrics.per_class("segm") == alone.per_class("segm")
    assert json.dumps(shared.content) == before


def test_an_annotation_with_the_id_zero_is_found_like_any_other() -> None:
    truth, outputs, targets = scene(4)
    metrics = CocoMetrics(truth)
    metrics.add(outputs, targets)
    moved = copy.deepcopy(truth)
    for annotation in moved["annotations"]:
        annotation["id"] -= 1
    shifted = CocoMetrics(moved)
    shifted.add(outputs, targets)
    assert shifted.result() == metrics.result()


def test_nothing_is_printed_logged_or_changed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    truth, outputs, targets = scene(6)
    before = json.dumps(truth)
    with caplog.at_level(logging.INFO):
        metrics = CocoMetrics(truth)
        metrics.add(outputs, targets)
        first = metrics.result()
        metrics.per_class()
        assert metrics.result() == first
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert json.dumps(truth) == before


def test_predictions_are_what_coco_reads() -> None:
    truth, outputs, targets = scene(6)
    metrics = CocoMetrics(truth)
    metrics.add(outputs, targets)
    rows = json.loads(json.dumps(metrics.predictions("segm")))
    assert len(rows) == sum(len(output["scores"]) for output in outputs)
    assert rows[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    from pycocotools import mask as coder

    by_id = {target["image_id"]: output for output, target in zip(outputs, targets, strict=True)}
    areas = sorted(int(coder.area(row["segmentation"])) for row in rows)
    assert areas == sorted(int(mask.sum()) for output in by_id.values() for mask in output["masks"])


def test_what_is_wrong_is_one_line() -> None:
    truth, outputs, targets = scene(3)
    which = next(i for i, output in enumerate(outputs) if len(output["scores"]))
    output, target = outputs[which], targets[which]

    def message(**changed: Any) -> str:
        wanted = changed.pop("error", ValueError)
        with pytest.raises(wanted) as caught:
            CocoMetrics(truth).add([{**output, **changed}], [changed.pop("target", target)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "image_id 100000 is no image" in message(target={"image_id": 100000})
    assert "label 4 is none of the 4 classes" in message(labels=torch.full_like(output["labels"], 4))
    assert "label -1" in message(labels=torch.full_like(output["labels"], -1))
    assert "masks of (80, 80)" in message(masks=torch.zeros(len(output["scores"]), 80, 80))
    assert "not finite" in message(error=DivergedError, scores=torch.full_like(output["scores"], math.nan))
    assert "not finite" in message(error=DivergedError, boxes=torch.full_like(output["boxes"], math.inf))
    with pytest.raises(ValueError, match="without masks"):
        CocoMetrics(truth).add([{k: v for k, v in output.items() if k != "masks"}], [target])
    with pytest.raises(ValueError, match="kinds"):
        CocoMetrics(truth, ("boxes",))
    with pytest.raises(ValueError, match="77 is no category"):
        CocoMetrics(truth, category_ids=[77])
    with pytest.raises(DataError, match="no list of categories"):
        CocoMetrics({"images": [], "annotations": []})
    broken = copy.deepcopy(truth)
    del broken["annotations"][1]["segmentation"]
    with pytest.raises(DataError, match="annotation 2 of the ground truth has no segmentation"):
        CocoMetrics(broken)
    CocoMetrics(broken, ("bbox",))  # boxes alone need none
