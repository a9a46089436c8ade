"""COCO-format sets: what is read, the masks against pycocotools, and everything that real files get wrong."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearfield.engine.dense import instance_masks, scenes
from nearfield.engine.dense.coco import CocoSet, collate
from nearfield.engine.errors import DataError
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from torchvision import tv_tensors

HEIGHT, WIDTH = 40, 60
TRIANGLE = [[5.0, 4.0, 25.5, 6.0, 12.0, 22.0]]
TWO_PARTS = [[30.0, 5, 45, 5, 45, 20, 30, 20], [48.5, 8, 55, 8.5, 52, 15.25]]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed counts, down the columns, zeros first."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return runs if flat[0] == 0 else [0, *runs]


CROWD = np.zeros((HEIGHT, WIDTH), np.uint8)
CROWD[20:36, 3:50] = 1
CROWD[25:30, 10:14] = 0


def annotation(identity: int, image: int, category: int, box: list[float], segmentation: Any, **more: Any) -> Any:
    entry = {"id": identity, "image_id": image, "category_id": category, "bbox": box, "segmentation": segmentation}
    return {**entry, "area": 100.0, "iscrowd": 0, **more}


CONTENT: dict[str, Any] = {
    "images": [
        {"id": 11, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        {"id": 40, "file_name": "deep/c.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        annotation(101, 40, 90, [5, 4, 20.5, 18], TRIANGLE),
        annotation(55, 11, 3, [30, 5, 25, 15], TWO_PARTS),
        annotation(60, 11, 18, [3, 20, 47, 16], {"size": [HEIGHT, WIDTH], "counts": run_lengths(CROWD)}, iscrowd=1),
        annotation(8, 11, 90, [5, 4, 20.5, 18], TRIANGLE),
    ],
    "categories": [{"id": 90, "name": "yak"}, {"id": 3, "name": "ant"}, {"id": 18, "name": "bee"}],
}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Images and the file of annotations, after a change to what it holds."""

    def make(change: Callable[[dict[str, Any]], None] | None = None) -> tuple[Path, Path]:
        content = copy.deepcopy(CONTENT)
        folder = tmp_path / "images"
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (image["id"], 0, 0)).save(folder / image["file_name"])
        if change is not None:
            change(content)
        (tmp_path / "objects.json").write_text(json.dumps(content))
        return folder, tmp_path / "objects.json"

    return make


Made = Callable[..., tuple[Path, Path]]


def first(content: dict[str, Any], identity: int = 55) -> dict[str, Any]:
    return next(entry for entry in content["annotations"] if entry["id"] == identity)


def test_items_are_images_and_their_objects(made: Made) -> None:
    data = CocoSet(*made(), masks=True)
    assert len(data) == 3
    assert data.image_ids == [11, 7, 40]
    image, target = data[0]
    assert isinstance(image, tv_tensors.Image)
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert image[0, 0, 0] == 11
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[30, 5, 55, 20], [3, 20, 50, 36], [5, 4, 25.5, 22]]
    assert target["iscrowd"].tolist() == [False, True, False]
    assert isinstance(target["masks"], tv_tensors.Mask)
    assert (target["masks"].dtype, target["masks"].shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert np.array_equal(target["masks"][1].numpy(), CROWD)
    assert target["image_id"] == 11
    assert data[2][1]["boxes"].tolist() == [[5, 4, 25.5, 22]]


def test_category_ids_with_gaps_become_labels_and_labels_ids(made: Made) -> None:
    data = CocoSet(*made())
    assert data.category_ids == [3, 18, 90]
    assert data.class_names == ["ant", "bee", "yak"]
    assert data.num_classes == 3
    assert data[0][1]["labels"].tolist() == [0, 1, 2]
    assert data[0][1]["labels"].dtype == torch.int64
    found = {a["id"]: a["category_id"] for a in data.ground_truth()["annotations"]}
    assert found == {55: 3, 60: 18, 8: 90, 101: 90}


def test_images_without_objects_are_kept_or_left_out(made: Made) -> None:
    image, target = CocoSet(*made(), masks=True)[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["labels"].shape == target["iscrowd"].shape == target["area"].shape == (0,)
    data = CocoSet(*made(), keep_empty=False)
    assert data.image_ids == [11, 40]
    assert data[1][1]["boxes"].tolist() == [[5, 4, 25.5, 22]]
    assert data.report["images without objects, left out"] == 1


def test_crowd_is_left_out_of_training(made: Made) -> None:
    data = CocoSet(*made(), training=True, masks=True)
    assert data[0][1]["labels"].tolist() == [0, 2]
    assert not data[0][1]["iscrowd"].any()
    assert data[0][1]["masks"].shape == (2, HEIGHT, WIDTH)
    assert data.report["crowd regions, left out"] == 1
    assert data.report["objects"] == 3

    def only_crowd(content: dict[str, Any]) -> None:
        content["annotations"] = [first(content, 60)]

    with pytest.raises(DataError, match=r"objects\.json: no object in it: nothing to train on"):
        CocoSet(*made(only_crowd), training=True)
    assert len(CocoSet(*made(only_crowd))) == 3


def test_masks_are_those_of_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    annotations: list[Any] = []
    for identity in range(1, 41):
        kind = identity % 4
        if kind < 2:
            rings = [
                (rng.uniform(-8, [WIDTH + 8, HEIGHT + 8], (int(rng.integers(3, 9)), 2))).flatten().round(2).tolist()
                for _ in range(kind + 1)
            ]
            segmentation: Any = rings
        else:
            mask = (rng.random((HEIGHT, WIDTH)) < rng.uniform(0.02, 0.98)).astype(np.uint8)
            counts: Any = run_lengths(mask)
            if kind == 3:
                counts = reference.encode(np.asfortranarray(mask))["counts"].decode()
            segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
        annotations.append(annotation(identity, 1, 1, [1, 1, 30, 30], segmentation, iscrowd=int(kind == 2)))
    (tmp_path / "i").mkdir()
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "i" / "x.png")
    image = {"id": 1, "file_name": "x.png", "width": WIDTH, "height": HEIGHT}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    target = CocoSet(tmp_path / "i", tmp_path / "a.json", masks=True)[0][1]
    truth = COCO(tmp_path / "a.json")
    for mask, entry in zip(target["masks"], annotations, strict=True):
        assert np.array_equal(mask.numpy(), truth.annToMask(truth.anns[entry["id"]])), entry["id"]


def test_the_ground_truth_says_what_the_file_says(made: Made) -> None:
    folder, path = made()
    truth = CocoSet(folder, path, masks=True).ground_truth()
    written = json.loads(path.read_text())
    assert truth["images"] == written["images"]
    assert truth["categories"] == sorted(written["categories"], key=lambda category: category["id"])
    by_id = {entry["id"]: entry for entry in truth["annotations"]}
    for entry in written["annotations"]:
        if entry["iscrowd"]:
            entry["segmentation"] = reference.frPyObjects(entry["segmentation"], HEIGHT, WIDTH)
            entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
        assert by_id.pop(entry["id"]) == entry
    assert by_id == {}
    json.dumps(truth)
    assert "segmentation" not in CocoSet(folder, path).ground_truth()["annotations"][0]


def test_masks_are_drawn_only_when_they_are_wanted(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = instance_masks.draw
    monkeypatch.setattr(instance_masks, "draw", lambda *a: drawn.append(1) or draw(*a))
    data = CocoSet(*made(), masks=True)
    assert not drawn
    assert data[0][1]["masks"].any()
    assert len(drawn) == 3
    assert "masks" not in CocoSet(*made())[0][1]
    assert len(drawn) == 3


def test_a_transform_sees_image_and_target(made: Made) -> None:
    data = CocoSet(*made(), transform=lambda image, target: (image[:1], {"boxes": target["boxes"]}))
    images, targets = collate([data[0], data[1]])
    assert [image.shape for image in images] == [(1, HEIGHT, WIDTH)] * 2
    assert [len(target["boxes"]) for target in targets] == [3, 0]


def test_loader_processes_give_the_same_items(made: Made) -> None:
    data = CocoSet(*made(), masks=True)
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, collate_fn=collate)
    targets = [target for _, batch in loader for target in batch]
    for index, target in enumerate(targets):
        assert torch.equal(target["masks"], data[index][1]["masks"])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[0][1]["masks"], data[0][1]["masks"])


# what is mended or left out, counted


ANT = [[30, 5, 55, 20]]


def drop(key: str, identity: int = 55) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        entry = first(content, identity)
        del entry[key]

    return change


def put(identity: int = 55, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: first(content, identity).update(values)


@pytest.mark.parametrize(
    ("change", "what", "case", "boxes"),
    [
        (put(bbox=[-6, 5, 20, 50]), "boxes reaching past the image, clipped", "annotation 55", [[0, 5, 14, 40]]),
        (put(bbox=[30, 5, 0, 15]), "boxes without an area, left out", "annotation 55", []),
        (put(bbox=[30, 5, 10, -3]), "boxes without an area, left out", "annotation 55", []),
        (put(bbox=[61, 5, 10, 3]), "boxes outside the image, left out", "annotation 55", []),
        (put(image_id=999), "annotations of images that are not listed, left out", "annotation 55", []),
        (put(image_id=[11]), "annotations of images that are not listed, left out", "annotation 55", []),
        (put(segmentation=[]), "annotations without a mask, left out", "annotation 55", []),
        (drop("segmentation"), "annotations without a mask, left out", "annotation 55", []),
        (put(segmentation=[[1, 2, 3, 4]]), "annotations without a polygon of three corners", "annotation 55", []),
        (
            put(segmentation=[[1, 2, 9, 9], *TWO_PARTS]),
            "polygons of fewer than three corners, left out",
            "annotation 55",
            ANT,
        ),
        (drop("area"), "annotations without an area, measured", "annotation 55", ANT),
        (put(area=float("nan")), "areas that are negative or not finite, measured", "annotation 55", ANT),
        (put(area=float("inf")), "areas that are negative or not finite, measured", "annotation 55", ANT),
        (put(area=-5), "areas that are negative or not finite, measured", "annotation 55", ANT),
        (drop("bbox"), "annotations without a bbox, given the one around their mask", "annotation 55", ANT),
        (put(8, id=55), "annotation ids that occur more than once, kept", "55", ANT),
    ],
)  # fmt: skip
def test_what_is_mended_or_left_out_is_counted_and_said_once(
    made: Made,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], None],
    what: str,
    case: str,
    boxes: list[list[float]],
) -> None:
    with caplog.at_level(logging.WARNING, "nearfield.engine"):
        data = CocoSet(*made(change), masks=True)
    assert data.report[what] == 1
    (record,) = caplog.records
    assert re.search(rf"objects\.json: (.*; )?1 {what} \(first: {case}\)", record.getMessage())
    assert "\n" not in record.getMessage()
    target = data[0][1]
    ants = target["boxes"][target["labels"] == 0]
    assert ants.tolist() == boxes
    assert target["masks"].shape[0] == len(target["labels"]) == len(boxes) + 2
    assert len(data.ground_truth()["annotations"]) == 3 + len(boxes)


def test_a_clean_file_warns_of_nothing(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nearfield.engine"):
        CocoSet(*made(), masks=True)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().endswith("3 images, 1 images without objects, 3 objects, 1 crowd regions")


@pytest.mark.parametrize(
    "segmentation",
    [
        [[5, 5, 5, 5, 5, 5]],
        [[5, 5, 30, 5, 55, 5], [61, 5, 70, 5, 70, 15]],
        [[61, 5, 70, 5, 70, 15]],
        [[5, 5.1, 55, 5.1, 55, 5.3, 5, 5.3]],
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": [60, 0, HEIGHT * WIDTH - 60]},
        {"size": [HEIGHT, WIDTH], "counts": "P[2"},
    ],
    ids=["point", "parts", "outside", "sliver", "counts", "counts of nothing", "string"],
)
def test_masks_without_a_pixel_are_counted_and_not_trained_on(
    made: Made, caplog: pytest.LogCaptureFixture, segmentation: Any
) -> None:
    what = "masks without a pixel, not trained on"
    folder, path = made(put(segmentation=segmentation))
    with caplog.at_level(logging.WARNING, "nearfield.engine"):
        train = CocoSet(folder, path, masks=True, training=True)
    (record,) = caplog.records
    assert record.getMessage().endswith(f"1 {what} (first: annotation 55)")
    assert (train.report[what], train.report["objects"]) == (1, 2)
    assert train[0][1]["labels"].tolist() == [2]
    val = CocoSet(folder, path, masks=True)
    assert (val.report[what], val.report["objects"]) == (1, 3)
    assert not val[0][1]["masks"][0].any()
    assert what not in CocoSet(folder, path, training=True).report


def test_nothing_but_masks_without_a_pixel_is_nothing_to_train_on(made: Made) -> None:
    def change(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["segmentation"] = [[5, 5, 5, 5, 5, 5]]

    with pytest.raises(DataError, match=r"no object in it that can be used \(4 masks without a pixel"):
        CocoSet(*made(change), masks=True, training=True)


def test_whether_a_mask_has_a_pixel_is_known_without_drawing_most_of_them() -> None:
    rng = np.random.default_rng(0)
    packed, sizes = [], []
    for case in range(600):
        size = (int(rng.integers(1, 50)), int(rng.integers(1, 50)))
        centre, spread = rng.uniform(-20, 70, 2), rng.choice([0.2, 1, 4, 30], 2)
        rings = [(centre + rng.uniform(-spread, spread, (4, 2))).flatten().tolist() for _ in range(1 + case % 2)]
        segmentation: Any = rings
        if case % 5 == 4:
            segmentation = {"size": list(size), "counts": run_lengths((rng.random(size) < 0.01).astype(np.uint8))}
        one = instance_masks.pack(segmentation, size)
        assert one is not None
        packed.append(one[0])
        sizes.append(size)
    expected = [not instance_masks.draw(one, size).any() for one, size in zip(packed, sizes, strict=True)]
    assert 100 < sum(expected) < 500
    assert instance_masks.empty(packed, np.array(sizes)).tolist() == expected


def test_an_area_that_is_missing_is_that_of_the_mask_or_the_box(made: Made) -> None:
    folder, path = made(drop("area"))
    mask = CocoSet(folder, path, masks=True)[0][1]
    assert mask["area"][0] == mask["masks"][0].sum()

    def bare(content: dict[str, Any]) -> None:
        drop("area")(content)
        drop("segmentation")(content)

    assert CocoSet(*made(bare))[0][1]["area"].tolist() == [25 * 15, 100, 100]


@pytest.mark.parametrize("area", [float("nan"), -5, 10**400])
def test_an_area_that_cannot_be_is_measured_like_a_missing_one(made: Made, area: float) -> None:
    missing, wrong = (CocoSet(*made(change))[0][1]["area"].tolist() for change in (drop("area"), put(area=area)))
    assert wrong == missing != [100, 100, 100]


def test_boxes_are_made_from_run_lengths_too(made: Made) -> None:
    assert CocoSet(*made(drop("bbox", 60)))[0][1]["boxes"][1].tolist() == [3, 20, 50, 36]


def test_ids_that_evaluators_cannot_do_with_are_numbered_anew(made: Made) -> None:
    for change in (put(8, id=55), put(id=0), drop("id")):
        ids = [entry["id"] for entry in CocoSet(*made(change)).ground_truth()["annotations"]]
        assert sorted(ids) == [1, 2, 3, 4]


def test_boxes_of_the_ground_truth_are_not_clipped(made: Made) -> None:
    data = CocoSet(*made(put(bbox=[-6, 5, 20, 50])))
    assert data.ground_truth()["annotations"][0]["bbox"] == [-6, 5, 20, 50]


def test_a_border_that_was_rounded_is_clipped_without_a_word(made: Made) -> None:
    data = CocoSet(*made(put(bbox=[30, 5, 30.01, 15])))
    assert data[0][1]["boxes"][0].tolist() == [30, 5, 60, 20]
    assert not any("clipped" in what for what in data.report)


def test_missing_images_refuse_the_set_or_are_left_out_by_wish(made: Made) -> None:
    folder, path = made()
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images of .*objects\.json are missing \(first: a\.png, image id 11\)"):
        CocoSet(folder, path)
    data = CocoSet(folder, path, skip_missing=True)
    assert data.image_ids == [7, 40]
    assert data.report["images missing in the folder, left out"] == 1
    assert data.report["annotations of missing images, left out"] == 3
    assert data[1][1]["labels"].tolist() == [2]
    assert {entry["image_id"] for entry in data.ground_truth()["annotations"]} == {40}
    (folder / "b.png").unlink()
    (folder / "deep" / "c.png").unlink()
    with pytest.raises(DataError, match="3 of 3 images"):
        CocoSet(folder, path, skip_missing=True)
    with pytest.raises(DataError, match="no such folder"):
        CocoSet(folder / "nowhere", path)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 10**400, "40"])
def test_sizes_that_are_missing_are_read_from_the_images(made: Made, size: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["images"][0]["width"]
        content["images"][1]["height"] = 0
        content["images"][2]["height"] = size

    data = CocoSet(*made(change))
    assert data.sizes.tolist() == [[HEIGHT, WIDTH]] * 3
    assert data.report["images without a size, measured"] == 3


def test_an_image_of_another_size_than_annotated_is_refused_when_it_is_read(made: Made) -> None:
    folder, path = made()
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    data = CocoSet(folder, path)
    with pytest.raises(DataError, match=r"a\.png: 30 x 20 pixels, but .*objects\.json says 60 x 40 \(image id 11\)"):
        data[0]
    assert data[1][0].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("stored", [(WIDTH, HEIGHT), (HEIGHT, WIDTH)])
def test_rotated_images_are_read_as_they_were_annotated(made: Made, stored: tuple[int, int]) -> None:
    """On the pixels as seen, or as stored by tools that overlook the EXIF orientation."""
    folder, path = made()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", stored).save(folder / "a.png", exif=exif)
    assert CocoSet(folder, path)[0][0].shape == (3, HEIGHT, WIDTH)


def test_broken_images_are_named(made: Made) -> None:
    folder, path = made()
    (folder / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.png: cannot read this image"):
        CocoSet(folder, path)[0]


def test_an_image_of_one_pixel_has_its_object(made: Made) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"][0].update(width=1, height=1)
        content["annotations"] = [annotation(1, 11, 3, [0, 0, 1, 1], {"size": [1, 1], "counts": [0, 1]})]

    folder, path = made(change)
    Image.new("L", (1, 1)).save(folder / "a.png")
    image, target = CocoSet(folder, path, masks=True)[0]
    assert image.shape == (3, 1, 1)
    assert target["boxes"].tolist() == [[0, 0, 1, 1]]
    assert target["masks"].tolist() == [[[1]]]


def test_no_annotation_at_all_is_a_set_to_evaluate_but_not_to_train_on(made: Made) -> None:
    folder, path = made(lambda content: content["annotations"].clear())
    data = CocoSet(folder, path, masks=True)
    assert data[0][1]["masks"].shape == (0, HEIGHT, WIDTH)
    assert data.report["images without objects"] == 3
    assert data.ground_truth()["annotations"] == []
    with pytest.raises(DataError, match="no object in it"):
        CocoSet(folder, path, training=True)


# what is refused in one line

RLE = {"size": [HEIGHT, WIDTH], "counts": "abc"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(category_id=4), "annotation 55 has the category_id 4, which is none of 3, 18, 90"),
        (put(category_id="ant"), "annotation 55 has the category_id 'ant'"),
        (drop("category_id"), "annotation 55 has no category_id"),
        (drop("image_id"), "annotation 55 has no image_id"),
        (put(bbox=[1, 2, 3]), r"annotation 55 has the bbox \[1, 2, 3\], which is not four finite numbers"),
        (put(bbox=[1, 2, 3, float("nan")]), "annotation 55 has the bbox .*not four finite numbers"),
        (put(bbox=["a", 2, 3, 4]), "annotation 55 has the bbox .*not four finite numbers"),
        (put(bbox="1 2 3 4"), "annotation 55 has the bbox .*not four finite numbers"),
        (put(area="large"), "annotation 55 has the area 'large', which is not a number"),
        (put(bbox=None, segmentation=[]), "annotation 55 has no bbox"),
        (put(segmentation=[1, 2, 3, 4, 5, 6]), "annotation 55: a polygon is a list of numbers, not 1"),
        (put(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 55: a polygon of 7 numbers: x and y come in pairs"),
        (put(segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "annotation 55: a polygon has a coordinate that is not"),
        (put(segmentation="abc"), "annotation 55: a segmentation is a list of polygons or run lengths, not 'abc'"),
        (put(segmentation={"counts": [1]}), "annotation 55: run lengths have a size and counts"),
        (put(segmentation={**RLE, "size": [WIDTH, HEIGHT]}), r"annotation 55: its mask is \[60, 40\]"),
        (
            put(segmentation={**RLE, "counts": [5, 6]}),
            "annotation 55: its run lengths cover 11 pixels, but .* has 2400",
        ),
        (put(segmentation={**RLE, "counts": [-5, 2405]}), "annotation 55: one of its run lengths is negative: -5"),
        (put(segmentation={**RLE, "counts": [float("inf")]}), "annotation 55: the counts of run lengths are"),
        (put(segmentation={**RLE, "counts": 2400}), "annotation 55: the counts of run lengths are"),
        (put(segmentation={**RLE, "counts": "\u00e9"}), "annotation 55: the counts of run lengths are"),
        (put(segmentation={**RLE, "size": None}), "annotation 55: its mask is None "),
        (put(segmentation={**RLE, "size": 5}), "annotation 55: its mask is 5 "),
        (put(area=True, bbox=None, segmentation=None), "annotation 55 has no bbox"),
        (put(iscrowd=[1]), r"annotation 55: iscrowd=\[1\] must be 0 or 1"),
        (put(area=[1, 2]), r"annotation 55 has the area \[1, 2\], which is not a number"),
        (put(segmentation=RLE, area=None), r"annotation 55: broken mask \(RLE string is malformed"),
        (put(segmentation=RLE, bbox=None), r"annotation 55: broken mask \(RLE string is malformed"),
        (put(bbox=[1, 2, 3, 10**400]), r"annotation 55 has the bbox \[1, 2, 3, 10+, which is not four finite numbers"),
        (put(segmentation=[[1, 2, 3, 4, 5, 10**400]]), "annotation 55: a polygon is a list of numbers, not "),
        (put(segmentation={**RLE, "counts": ["a"]}), "annotation 55: the counts of run lengths are"),
        (put(iscrowd="0"), "annotation 55: iscrowd='0' must be 0 or 1"),
        (put(iscrowd=2), "annotation 55: iscrowd=2 must be 0 or 1"),
        (lambda c: c["categories"].clear(), "no categories"),
        (lambda c: c["categories"].append({"id": 3}), "category id 3 occurs twice"),
        (lambda c: c["categories"].append({"name": "x"}), r"categories\[3\] has the id None: ids are whole numbers"),
        (lambda c: c["images"].clear(), "no images in it"),
        (lambda c: c["images"].append({"id": 7, "file_name": "a.png"}), "image id 7 occurs twice"),
        (lambda c: c["images"].append({"id": "x", "file_name": "a.png"}), r"images\[3\] has the id 'x'"),
        (lambda c: c["images"][0].update(id=float("nan")), r"images\[0\] has the id nan: ids are whole numbers"),
        (lambda c: c["images"][0].update(id=float("inf")), r"images\[0\] has the id inf: ids are whole numbers"),
        (lambda c: c["categories"][1].update(id=float("inf")), r"categories\[1\] has the id inf: ids are whole"),
        (lambda c: c["images"].append({"id": 9}), "image 9 has no file_name"),
        (lambda c: c["images"].append("a.png"), r"images\[3\] is 'a.png', not an entry"),
        (lambda c: c.pop("annotations"), r"no list 'annotations' \(there is: images, categories\)"),
        (lambda c: c.update(images={}), "no list 'images'"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_entry(made: Made, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"objects\.json: {message}") as caught:
        CocoSet(*made(change), masks=True)
    assert "\n" not in str(caught.value)


def test_run_lengths_that_do_not_fill_the_image_are_named_when_they_are_drawn(made: Made) -> None:
    data = CocoSet(*made(put(segmentation=RLE)), masks=True)
    with pytest.raises(DataError, match=r"objects\.json: annotation 55: broken mask \("):
        data[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"images": [', r"not JSON \(.*line 1"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"image_id": 1}]', "a list, not a COCO data set, which has images, annotations, categories"),
        (b"{}", r"no list 'images' \(there is: nothing\)"),
    ],
)
def test_files_that_hold_no_annotations_are_named(made: Made, content: bytes, message: str) -> None:
    folder, path = made()
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"objects\.json: .*{message}") as caught:
        CocoSet(folder, path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"none\.json: cannot read annotations"):
        CocoSet(folder, path.with_name("none.json"))


def test_opening_twenty_thousand_annotations_takes_less_than_two_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "i").mkdir()
    images = [{"id": 3 * n, "file_name": f"{n}.png", "width": 640, "height": 480} for n in range(3000)]
    for image in images:
        (tmp_path / "i" / image["file_name"]).touch()
    polygons = [rng.uniform(0, 400, 60).round(2).tolist() for _ in range(200)]
    annotations = [
        annotation(n, int(rng.integers(3000)) * 3, 1 + n % 80, [10.5, 20.25, 30, 40], [polygons[n % 200]])
        for n in range(20_000)
    ]
    categories = [{"id": n, "name": str(n)} for n in range(1, 81)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    seconds = []
    for _ in range(2):  # the other core of a busy machine slows one of them down
        start = time.process_time()
        data = CocoSet(tmp_path / "i", path, masks=True)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
    assert data.report["objects"] == 20_000
    boxes = CocoSet(tmp_path / "i", path)
    start = time.process_time()
    assert sum(len(boxes.target(index)["labels"]) for index in range(len(boxes))) == 20_000
    assert time.process_time() - start < 2


def test_scenes_are_a_set_of_this_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nearfield.engine"):
        root = scenes.write_scenes(tmp_path, count_train=4, count_val=3)
        data = CocoSet(root / "images" / "val", root / "annotations" / "instances_val.json", masks=True)
    assert not caplog.records
    assert data.class_names == scenes.CLASSES
    for index in range(len(data)):
        target = data[index][1]
        class_map = torch.from_numpy(
            np.array(Image.open(root / "annotations" / "val" / Path(data.filename(index)).name))
        )
        painted = (target["masks"].int() * (target["labels"].int() + 1)[:, None, None]).sum(0)
        assert torch.equal(painted, class_map.int())
