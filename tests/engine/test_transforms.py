"""Detection policies: boxes, masks and labels agree after each of them, and each does what its recipe says."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearfield.engine.dense import scenes, transforms
from nearfield.engine.dense.coco import CocoSet
from nearfield.engine.errors import ConfigError
from torch import Tensor
from torchvision import tv_tensors

SMALL = {"short_sides": (48, 64, 90), "max_size": 120}
POLICIES = {
    "none": transforms.unchanged(),
    "multi_scale": transforms.multi_scale(**SMALL),
    # windows are not enlarged: what the first resize rounds would grow in the second
    "multi_scale_crop": transforms.multi_scale_crop(
        short_sides=(40, 48), max_size=120, crop_short_sides=(60, 70), crop_range=(48, 65), crop_prob=1.0
    ),
    "jitter": transforms.jitter(size=(64, 80), scale=(0.5, 2.0), hflip=0.5),
    "coloured": transforms.multi_scale(**SMALL, color_jitter=0.4),
}


def example(height: int, width: int, objects: list[tuple[float, float, float, float]]) -> tuple[Any, dict[str, Any]]:
    """An image and objects that fill ellipses; the image and the label say which object a pixel belongs to."""
    rows = torch.arange(height)[:, None] + 0.5
    columns = torch.arange(width)[None] + 0.5
    masks, image = [], torch.zeros(3, height, width)
    for index, (x, y, w, h) in enumerate(objects):
        mask = ((columns - x) / w) ** 2 + ((rows - y) / h) ** 2 <= 1
        masks.append(mask)
        image[:, mask] = 40.0 * (index + 1)
    stack = torch.stack(masks).byte() if masks else torch.zeros(0, height, width, dtype=torch.uint8)
    kept = stack.flatten(1).any(1).bool()
    labels = torch.arange(len(objects))[kept]
    target = {
        "image_id": 3,
        "boxes": tv_tensors.BoundingBoxes(
            transforms.boxes_around(stack[kept]), format="XYXY", canvas_size=(height, width)
        ),
        "labels": labels,
        "masks": tv_tensors.Mask(stack[kept]),
        "iscrowd": labels > 2,
        "area": labels.float(),
    }
    return tv_tensors.Image(image.byte()), target


def assert_agree(image: Tensor, target: dict[str, Any], slack: float = 1.0) -> None:
    height, width = image.shape[-2:]
    boxes, masks, count = target["boxes"], target["masks"], len(target["labels"])
    assert boxes.shape == (count, 4)
    assert masks.shape == (count, height, width)
    assert target["iscrowd"].shape == (count,)
    assert torch.equal(target["iscrowd"], target["labels"] > 2)
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert masks.flatten(1).any(1).all()
    around = transforms.boxes_around(masks)
    assert (around[:, :2] >= boxes[:, :2] - slack).all()
    assert (around[:, 2:] <= boxes[:, 2:] + slack).all()
    assert {type(value) for value in (image, boxes, masks, target["labels"])} == {Tensor}


number = st.floats(0.05, 0.95)
ellipses = st.lists(st.tuples(number, number, st.floats(0.02, 0.5), st.floats(0.02, 0.5)), max_size=5)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(height=st.integers(3, 150), width=st.integers(3, 150), shapes=ellipses, seed=st.integers(0, 1000))
def test_boxes_masks_and_labels_agree(name: str, height: int, width: int, shapes: list[Any], seed: int) -> None:
    torch.manual_seed(seed)
    objects = [(x * width, y * height, w * width, h * height) for x, y, w, h in shapes]
    image, target = example(height, width, objects)
    # a resize rounds masks to whole pixels, boxes stay as they are; of a thin image the second one enlarges what the
    # first has rounded, a window of at least 48 pixels to at most 120
    assert_agree(*POLICIES[name](image, target), slack=1 + 120 / 48 if name == "multi_scale_crop" else 1)


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"coloured"}))
def test_what_is_under_a_mask_is_what_its_label_says(name: str) -> None:
    """Each object has its own gray, so a label or mask that went to another object shows."""
    image, target = example(96, 128, [(30, 30, 20, 18), (95, 28, 22, 14), (36, 74, 25, 15), (92, 70, 20, 20)])
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, found = POLICIES[name](image, copy.copy(target))
        for mask, label in zip(found["masks"], found["labels"], strict=True):
            median = pixels[0][mask.bool()].median() * 255
            assert mask.sum() < 100 or abs(median - 40 * (int(label) + 1)) < 8, (seed, int(label))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (40, 1)])
def test_images_of_a_pixel_and_without_objects_pass(name: str, size: tuple[int, int]) -> None:
    pixels, target = POLICIES[name](*example(*size, []))
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *pixels.shape[-2:])
    assert target["image_id"] == 3


@pytest.mark.parametrize("name", POLICIES)
def test_targets_without_masks_pass(name: str) -> None:
    image, target = example(96, 128, [(30, 30, 20, 18), (95, 28, 22, 14)])
    del target["masks"]
    torch.manual_seed(0)
    _, found = POLICIES[name](image, target)
    assert "masks" not in found
    assert len(found["boxes"]) == len(found["labels"]) == len(found["iscrowd"])


def test_for_evaluation_nothing_changes() -> None:
    image, target = example(20, 30, [(10, 10, 5, 5)])
    target["boxes"] = tv_tensors.BoundingBoxes([[4.0, 4, 4.5, 4.5]], format="XYXY", canvas_size=(20, 30))
    pixels, found = POLICIES["none"](image, target)
    assert torch.equal((pixels * 255).round().byte(), image.as_subclass(Tensor))
    assert found["boxes"].tolist() == [[4, 4, 4.5, 4.5]]
    assert set(found) == set(target)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (200, 1000), (375, 500)])
def test_the_short_side_is_one_of_the_recipe_and_the_long_one_has_its_limit(size: tuple[int, int]) -> None:
    policy = transforms.multi_scale()
    image, target = example(*size, [(100, 100, 30, 30)])
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        pixels, found = policy(image, target)
        low, high = sorted(pixels.shape[-2:])
        assert high <= 1333
        assert low in transforms.SHORT_SIDES or high >= 1332
        assert abs(pixels.shape[-2] / pixels.shape[-1] - size[0] / size[1]) < 0.01 * max(1, size[0] / size[1])
        assert len(found["boxes"]) == 1
        seen.add(low)
    assert len(seen) > 3 or size == (200, 1000)


def test_half_of_the_images_are_flipped() -> None:
    image, target = example(60, 80, [(10, 30, 8, 8)])
    torch.manual_seed(0)
    policy = transforms.multi_scale(short_sides=[60], max_size=80)
    lefts = [policy(image, target)[1]["boxes"][0, 0].item() for _ in range(100)]
    assert set(lefts) == {2.0, 62.0}
    assert 35 <= lefts.count(62.0) <= 65
    never = transforms.multi_scale(short_sides=[60], max_size=80, hflip=0)
    assert {never(image, target)[1]["boxes"][0, 0].item() for _ in range(20)} == {2.0}


def test_windows_are_as_large_as_the_recipe_says() -> None:
    window = transforms.RandomWindow(384, 600)
    torch.manual_seed(0)
    for height, width in ((700, 900), (400, 500), (100, 650)):
        sizes = [tuple(window(torch.zeros(1, height, width)).shape[-2:]) for _ in range(60)]
        for side, drawn in zip((height, width), zip(*sizes, strict=True), strict=True):
            assert min(drawn) >= min(side, 384)
            assert max(drawn) <= min(side, 600)
            assert len(set(drawn)) > 15 or side <= 384


def test_cropping_happens_as_often_as_is_said() -> None:
    image, target = example(300, 400, [(200, 150, 100, 100)])
    policy = transforms.multi_scale_crop(
        short_sides=[300], max_size=400, crop_short_sides=[300], crop_range=(100, 150), hflip=0
    )
    torch.manual_seed(0)
    whole = [policy(image, target)[0].shape[-2:] == (300, 400) for _ in range(60)]
    assert 18 <= sum(whole) <= 42


def test_objects_that_a_crop_leaves_outside_are_gone_and_cut_ones_are_cut() -> None:
    image, target = example(100, 100, [(20, 50, 10, 10), (80, 50, 10, 10)])
    halved = transforms.Policy([_Left(20)])
    _, found = halved(image, copy.copy(target))
    assert found["labels"].tolist() == [0]
    assert found["boxes"].tolist() == [[10, 40, 20, 60]]
    assert found["masks"].shape == (1, 100, 20)
    assert "area" not in found
    _, found = transforms.Policy([_Left(12)], tight=True)(image, copy.copy(target))
    top, bottom = found["boxes"][0, [1, 3]].tolist()
    assert 40 < top < bottom < 60
    assert torch.equal(found["boxes"], transforms.boxes_around(found["masks"]))


class _Left(transforms.RandomWindow):
    """The left `width` columns."""

    def __init__(self, width: int) -> None:
        super().__init__(1, 1)
        self.width = width

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"top": 0, "left": 0, "height": 100, "width": self.width}


def test_boxes_around_masks_end_behind_the_last_pixel() -> None:
    masks = torch.zeros(3, 6, 9, dtype=torch.uint8)
    masks[0, 2:4, 3:8] = 1
    masks[1, 0, 0] = 1
    masks[2] = 1
    assert transforms.boxes_around(masks).tolist() == [[3, 2, 8, 4], [0, 0, 1, 1], [0, 0, 9, 6]]
    assert transforms.boxes_around(masks[:0]).shape == (0, 4)


def test_jitter_gives_one_size_and_pads_with_its_fill() -> None:
    image, target = example(128, 128, [(64, 64, 60, 60)])
    image = tv_tensors.Image(torch.full((3, 128, 128), 200, dtype=torch.uint8))
    torch.manual_seed(0)
    for scale in ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0)):
        pixels, found = transforms.jitter(scale=scale, fill=51)(image, copy.copy(target))
        assert pixels.shape == (3, 128, 128)
        part = min(1.0, scale[0] ** 2)
        assert pixels.mean().item() == pytest.approx((200 * part + 51 * (1 - part)) / 255, abs=0.005)
        assert_agree(pixels, found)


def test_the_same_seed_gives_the_same_view() -> None:
    image, target = example(60, 80, [(30, 30, 20, 18)])
    for policy in POLICIES.values():
        views = []
        for _ in range(2):
            torch.manual_seed(5)
            views.append(pickle.loads(pickle.dumps(policy))(image, copy.copy(target)))
        assert torch.equal(views[0][0], views[1][0])
        assert torch.equal(views[0][1]["boxes"], views[1][1]["boxes"])


def test_a_set_of_scenes_is_read_through_a_policy(tmp_path: Path) -> None:
    root = scenes.write_scenes(tmp_path, count_train=6, count_val=1)
    data = CocoSet(
        root / "images" / "train",
        root / "annotations" / "instances_train.json",
        training=True,
        masks=True,
        transform=transforms.detection_policy("jitter", {"scale": [0.8, 1.25]}),
    )
    for index in range(len(data)):
        pixels, target = data[index]
        assert pixels.shape == (3, 128, 128)
        around = transforms.boxes_around(target["masks"])
        assert (around[:, :2] >= target["boxes"][:, :2] - 1).all()
        assert (around[:, 2:] <= target["boxes"][:, 2:] + 1).all()


def test_policies_are_made_from_names_and_options() -> None:
    assert set(transforms.POLICIES) == {"none", "multi_scale", "multi_scale_crop", "jitter"}
    for name in transforms.POLICIES:
        assert isinstance(transforms.detection_policy(name), transforms.Policy)
    for call, message in (
        (lambda: transforms.detection_policy("multiscale"), "aug.policy=multiscale: no such policy"),
        (lambda: transforms.detection_policy("jitter", {"sizes": 3}), "policy jitter has no option 'sizes' (did"),
        (lambda: transforms.detection_policy("none", {"hflip": 1}), "policy none has no option 'hflip'; it takes none"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_scale", {"short_sides": []}, "short_sides=[]: one or more sides in pixels, at most max_size=1333"),
        ("multi_scale", {"short_sides": 800}, "short_sides=800: one or more sides in pixels"),
        ("multi_scale", {"short_sides": "800"}, "short_sides='800': one or more sides in pixels"),
        ("multi_scale", {"short_sides": [800.5]}, "short_sides=[800.5]: one or more sides in pixels"),
        ("multi_scale", {"short_sides": [900], "max_size": 800}, "short_sides=[900]: one or more sides in pixels, at"),
        ("multi_scale", {"max_size": "big"}, "max_size='big': a side in pixels"),
        ("multi_scale", {"hflip": "often"}, "hflip='often': a number from 0 to 1"),
        ("multi_scale", {"hflip": 1.5}, "hflip=1.5: a number from 0 to 1"),
        ("multi_scale", {"color_jitter": -1}, "color_jitter=-1: a number, at least 0"),
        ("multi_scale", {"color_jitter": [0.4]}, "color_jitter=[0.4]: a number, at least 0"),
        ("multi_scale_crop", {"crop_prob": None}, "crop_prob=None: a number from 0 to 1"),
        ("multi_scale_crop", {"crop_short_sides": ["a"]}, "crop_short_sides=['a']: one or more sides in pixels"),
        ("multi_scale_crop", {"crop_range": [600, 384]}, "crop_range=[600, 384]: the least and the largest side"),
        ("multi_scale_crop", {"crop_range": "big"}, "crop_range='big': the least and the largest side"),
        ("multi_scale_crop", {"crop_range": 5}, "crop_range=5: the least and the largest side"),
        ("jitter", {"size": "big"}, "size='big': height and width in pixels"),
        ("jitter", {"size": 128}, "size=128: height and width in pixels"),
        ("jitter", {"size": [0, 5]}, "size=[0, 5]: height and width in pixels"),
        ("jitter", {"scale": [2, 1]}, "scale=[2, 1]: the least and the largest, both above 0"),
        ("jitter", {"scale": 2}, "scale=2: the least and the largest, both above 0"),
        ("jitter", {"fill": 300}, "fill=300: a number from 0 to 255"),
        ("jitter", {"fill": float("nan")}, "fill=nan: a number from 0 to 255"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"aug.kwargs: policy {name}: {message}")) as caught:
        transforms.detection_policy(name, options)
    assert "\n" not in str(caught.value)
