"""Pictures of predictions: what is where in them, at every size of image and form of prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearfield.engine.dense import drawing
from PIL import Image
from torch import Tensor

NAMES = [f"kind {i}" for i in range(20)]


def gray(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def objects(boxes: list[list[float]], labels: list[int], **more: Any) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64), **more}


def has(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(-1)


def test_colours_are_told_apart_and_stay_the_same() -> None:
    assert len(set(drawing.palette(150))) == 150
    assert drawing.palette(150)[:21] == drawing.palette(21)
    pairs = [(a, b) for i, a in enumerate(drawing.palette(12)) for b in drawing.palette(12)[:i]]
    assert min(sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in pairs) > 60


def test_small_images_are_enlarged_and_boxes_with_them() -> None:
    picture = drawing.draw_objects(gray(128, 128), objects([[32, 64, 96, 112]], [3]), NAMES)
    assert picture.size == (512, 512)
    colour = drawing.palette(20)[3]
    rows, columns = np.nonzero(has(picture, colour))
    assert (columns.min(), rows.max()) == (128, 448)
    assert not has(picture, colour)[270:440, 140:370].any()  # nothing on the object itself
    assert has(picture, colour)[:256].any()  # the label is above it


@pytest.mark.parametrize("form", ["bool", "uint8", "probabilities", "four axes"])
def test_masks_of_every_form_tint_what_is_inside(form: str) -> None:
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[:, 40:60, 30:70] = True
    given = {"bool": mask, "uint8": mask.to(torch.uint8), "probabilities": mask * 0.9, "four axes": mask[:, None] * 0.9}
    found = objects([[30, 40, 70, 60]], [0], masks=given[form])
    times = 5
    changed = np.asarray(drawing.draw_objects(gray(100, 100), found, NAMES)) != 128
    assert changed[42 * times : 58 * times, 32 * times : 68 * times].any(-1).all()
    assert not changed[62 * times :].any()


def test_only_what_is_likely_enough_is_drawn() -> None:
    found = objects([[10, 10, 40, 40], [60, 60, 90, 90]], [1, 2], scores=torch.tensor([0.3, 0.8]))
    picture = drawing.draw_objects(gray(128, 128), found, NAMES, threshold=0.5)
    assert not has(picture, drawing.palette(20)[1]).any()
    assert has(picture, drawing.palette(20)[2]).any()
    none = drawing.draw_objects(gray(128, 128), found, NAMES, threshold=0.9)
    assert (np.asarray(none) == 128).all()


def test_labels_keep_off_the_objects_and_off_each_other() -> None:
    """Three objects in a column, one close below the other: no label may lie on a neighbour."""
    boxes = [[200.0, 100, 300, 195], [200, 200, 300, 295], [200, 300, 300, 395]]
    picture = drawing.draw_objects(gray(500, 500), objects(boxes, [0, 1, 2]), NAMES)
    for box in boxes:
        inner = np.asarray(picture)[int(box[1]) + 4 : int(box[3]) - 4, int(box[0]) + 4 : int(box[2]) - 4]
        assert (inner == 128).all()
    assert all(has(picture, colour).sum() > 1000 for colour in drawing.palette(3))


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (37, 53), (600, 2100)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_of_image_can_be_drawn(size: tuple[int, int], channels: int) -> None:
    image = torch.rand(channels, *size)
    found = objects(
        [[0.0, 0.0, size[1], size[0]], [5.0, 5.0, 5.0, 5.0]],
        [0, 1],
        scores=torch.ones(2),
        masks=torch.ones(2, 1, *size),
    )
    for largest in (None, 300):
        picture = drawing.draw_objects(image, found, NAMES, largest=largest)
        classes = drawing.draw_class_map(image, torch.zeros(size, dtype=torch.int64), NAMES, largest=largest)
        assert picture.size == classes.size
        assert max(picture.size) <= (largest or max(*size, drawing.MOST))
        assert largest or min(picture.size) >= min(*size, drawing.LEAST)


def test_no_object_leaves_the_image_as_it_is() -> None:
    empty = objects([], [], scores=torch.zeros(0), masks=torch.zeros(0, 1, 64, 64))
    assert (np.asarray(drawing.draw_objects(gray(64, 64), empty, NAMES)) == 128).all()


def test_class_maps_colour_all_but_background_and_hatch_what_is_ignored() -> None:
    names = ["background", "cat", "dog"]
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:50, 50:], labels[50:, :50], labels[50:, 50:] = 1, 2, 255
    picture = np.asarray(drawing.draw_class_map(gray(100, 100), labels, names, opacity=1.0)).astype(int)
    assert (picture[10:240, 10:240] == 128).all()
    for corner, colour in ((picture[10:240, 260:490], 0), (picture[260:490, 10:240], 1)):
        assert (corner == drawing.palette(3)[colour]).all()
    assert len(np.unique(picture[260:490, 260:490])) == 2  # two grays


def test_captions_are_below_the_image_and_as_long_as_the_share() -> None:
    picture = drawing.draw_caption(
        gray(100, 100), {"a cat": 0.75, "a dog with a name that is much too long " * 5: 0.25}
    )
    assert (np.asarray(picture)[:500] == 128).all()
    below = np.asarray(picture)[500:]
    bars = (below == (178, 211, 245)).all(-1)
    ends = [int(np.flatnonzero(row).max()) for row in bars if row.any()]  # of rows where no letter is over it
    assert (ends[0], ends[-1]) == (375, 125)
    assert (below[:, -5:] == 255).all()  # the long name is cut


def test_the_legend_names_the_classes_that_are_there() -> None:
    names = ["background", *NAMES]
    labels = torch.tensor([[0, 4], [4, 255]])
    strip = drawing.map_legend([labels], names, 600)
    colours = drawing.class_colours(names)
    assert strip.width == 600
    assert has(strip, colours[4]).any()
    assert has(strip, drawing.UNNAMED).any()
    assert not has(strip, colours[5]).any()
    assert drawing.map_legend([torch.arange(21)], names, 300).height > 3 * strip.height


def test_sheets_of_detections_and_class_maps(tmp_path: Path) -> None:
    images = [gray(128, 128), gray(700, 900), torch.rand(1, 40, 200)]
    truth = [objects([[1.0, 1, 30, 30]], [0], iscrowd=torch.tensor([1])) for _ in images]
    found = [{**target, "scores": torch.tensor([0.7])} for target in truth]
    path = drawing.write_detections(tmp_path / "found.png", images, found, truth, NAMES)
    with Image.open(path) as picture:
        assert picture.width > 2 * 800
        assert picture.height > 512 + 600
    maps = [torch.randint(0, 20, image.shape[1:]) for image in images]
    logits = [torch.nn.functional.one_hot(one, 20).permute(2, 0, 1).float() for one in maps]
    drawing.write_class_maps(tmp_path / "maps.png", images, maps, [one[None] for one in maps], NAMES)
    drawing.write_class_maps(tmp_path / "logits.png", images, logits, maps, NAMES)
    assert (tmp_path / "maps.png").read_bytes() == (tmp_path / "logits.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.png", "logits.png", "maps.png"]
