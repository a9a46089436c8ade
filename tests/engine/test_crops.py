"""Segmentation policies: image and mask stay on each other, what is drawn follows torch's generator."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from nearfield.engine.dense import crops
from nearfield.engine.dense.classes import IGNORED
from nearfield.engine.errors import ConfigError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

ZERO, ONE = [0.0] * 3, [1.0] * 3


def blobs(height: int = 61, width: int = 83, channels: int = 3) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A mask of three classes in large shapes and an image that shows it: gray 40, 120, 200."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = (x > 0.3 * width).long() + ((y - height / 2) ** 2 + (x - 0.7 * width) ** 2 < (height / 4) ** 2).long()
    image = (40 + 80 * mask).to(torch.uint8).expand(channels, -1, -1)
    return tv_tensors.Image(image.contiguous()), tv_tensors.Mask(mask.to(torch.uint8))


def classes_of(image: Tensor) -> Tensor:
    """The class that an image of `blobs` shows at each pixel, from floats in [0, 1]."""
    return ((image[0] * 255 - 40) / 80).round()


@pytest.mark.parametrize("antialias", [True, False])
def test_image_and_mask_stay_on_each_other(antialias: bool) -> None:
    policy = crops.train_transform(
        crop=(48, 64), scale=(110, 70), photometric=False, mean=ZERO, std=ONE, antialias=antialias
    )
    image, mask = blobs()
    shares = []
    for _ in range(40):
        seen, labels = policy(image, mask)
        assert seen.shape == (3, 48, 64)
        assert labels.shape == (48, 64)
        inside = labels != IGNORED
        assert (seen[:, ~inside] == 0).all()
        shares.append(float((classes_of(seen) != labels)[inside].float().mean()))
    # pixels on an edge may round either way
    assert max(shares) < 0.04
    assert sum(shares) / len(shares) < 0.02


def test_an_edge_does_not_move() -> None:
    """Halves stay halves: the centre of the labels is the centre of the image at any size."""
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:, 16:] = 200
    image = tv_tensors.Image(mask.expand(3, -1, -1))
    for size in ((32, 7), (9, 31), (64, 64), (100, 50), (1, 1)):
        small = crops.resize(tv_tensors.Mask(mask), size)
        shown = crops.resize(image, size)
        assert isinstance(small, tv_tensors.Mask)
        assert small.dtype == torch.uint8
        assert small.shape == size
        assert set(small.unique().tolist()) <= {0, 200}
        if size[1] % 2 == 0:
            assert (small == 200).float().mean() == 0.5
        clear = (shown[0] < 60) | (shown[0] > 140)
        assert torch.equal((small == 200)[clear], (shown[0] > 100)[clear])


def test_nearest_is_torch_s_nearest_exact() -> None:
    mask = torch.randint(0, 9, (17, 23), dtype=torch.uint8)
    for size in ((17, 23), (5, 40), (33, 11), (1, 2)):
        expected = torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0]
        assert torch.equal(crops.resize(tv_tensors.Mask(mask), size), expected.to(torch.uint8))


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((1024, 2048), (2048, 512), 1.0, (512, 1024)),
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the longest side decides
        ((300, 200), (2048, 512), 0.5, (384, 256)),
        ((300, 200), (2048, 512), 1.75, (1344, 896)),
        ((61, 83), None, 1.0, (61, 83)),
        ((61, 83), None, 0.5, (31, 42)),
        ((1, 900), None, 0.1, (1, 90)),
        ((1, 1), (2048, 512), 1.0, (512, 512)),
    ],
)
def test_sizes_keep_the_shape(size: Any, scale: Any, ratio: float, expected: tuple[int, int]) -> None:
    assert crops.fitted_size(size, scale, ratio) == expected


def test_everything_follows_torch_s_generator() -> None:
    policy = crops.train_transform(crop=32, scale=(90, 50), mean=[0.5] * 3, std=[0.2] * 3)
    image, mask = blobs()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append([policy(image, mask) for _ in range(4)])
    for (a, b), (c, d) in zip(runs[0], runs[1], strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(runs[0][0][0], runs[2][0][0])
    assert len({float(a.sum()) for a, _ in runs[0]}) == 4


def test_ratios_are_spread_over_their_range() -> None:
    step = crops.RandomRescale((200, 100), (0.5, 2.0))
    image, mask = blobs(100, 150)
    heights = [step(image, mask)[1].shape[0] for _ in range(200)]
    assert min(heights) in range(50, 60)
    assert max(heights) in range(185, 201)
    assert abs(sum(heights) / 200 - 125) < 10


def test_small_images_are_padded_with_the_mean_and_ignored() -> None:
    policy = crops.light_transform(crop=64, mean=[0.4, 0.5, 0.6], std=[0.2] * 3)
    image, mask = blobs(10, 21)
    seen, labels = policy(image, mask)
    assert seen.shape == (3, 64, 64)
    assert labels.shape == (64, 64)
    filled = labels == IGNORED
    assert filled[13:].all()
    assert filled[:, 28:].all()
    assert not filled[:8, :17].any()
    assert (seen[:, filled] == 0).all()
    one = policy(tv_tensors.Image(torch.full((3, 1, 1), 9, dtype=torch.uint8)), tv_tensors.Mask(torch.zeros(1, 1)))
    assert one[1].shape == (64, 64)


def test_the_light_policy_mirrors_nothing() -> None:
    policy = crops.light_transform(crop=64, mean=ZERO, std=ONE)
    image = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64) * 3
    for _ in range(20):
        seen, labels = policy(tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(64, 64, dtype=torch.uint8)))
        row = seen[0, 0][labels[0] != IGNORED]
        assert (row.diff() >= 0).all()


def test_a_class_that_fills_a_crop_is_avoided() -> None:
    mask = torch.zeros(40, 400, dtype=torch.uint8)
    mask[:, 380:] = 1
    mask[:20, :200] = IGNORED
    image = torch.zeros(3, 40, 400, dtype=torch.uint8)

    def mixed(ratio: float, tries: int) -> float:
        torch.manual_seed(0)
        step = crops.RandomCrop(40, ratio, tries=tries)
        cut = [step(tv_tensors.Image(image), tv_tensors.Mask(mask))[1] for _ in range(200)]
        assert all(part.shape == (40, 40) for part in cut)
        counts = torch.stack([part.flatten().long().bincount(minlength=256)[:2] for part in cut])
        return float((counts.amax(1) < 0.75 * counts.sum(1)).float().mean())

    # 10 of 361 places satisfy 0.75: one draw finds 2.8 %, eleven find 27 %
    assert 0.005 < mixed(1.0, 10) < 0.07
    assert 0.18 < mixed(0.75, 10) < 0.36
    assert mixed(0.75, 1000) == 1.0


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    step = crops.RandomCrop(4, 0.75)
    mask = torch.full((4, 4), IGNORED, dtype=torch.uint8)
    assert step._filled(mask)
    mask[0, :3] = torch.tensor([0, 1, 2])
    assert not step._filled(mask)
    mask[1] = 2
    assert not step._filled(mask)  # five of seven labelled pixels
    mask[2, 0] = 2
    assert step._filled(mask)  # six of eight


def test_distortion_changes_colours_and_never_labels() -> None:
    step = crops.PhotometricDistortion()
    image, mask = blobs()
    image = tv_tensors.Image(torch.randint(0, 256, image.shape, dtype=torch.uint8))
    changed = []
    for _ in range(40):
        seen, labels = step(image, mask)
        assert isinstance(seen, tv_tensors.Image)
        assert seen.dtype == torch.uint8
        assert labels is mask
        changed.append(float((seen.float() - image.float()).abs().mean()))
    assert 0 < sum(change == 0 for change in changed) < 15  # each of the four steps is left out half of the time
    assert max(changed) > 15
    gray, _ = step(tv_tensors.Image(image[:1]), mask)
    assert gray.shape == (1, *mask.shape)


def test_saturation_is_that_of_hsv() -> None:
    import colorsys

    image = torch.rand(3, 6, 7)
    image[:, 0, 0] = 0.0
    image[:, 0, 1] = 0.3
    for factor in (0.5, 1.0, 1.5):
        seen = crops.saturated(image, factor)
        for y in range(6):
            for x in range(7):
                hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
                expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
                torch.testing.assert_close(seen[:, y, x], torch.tensor(expected), atol=1e-5, rtol=0)


def test_brightness_contrast_and_hue_are_as_published() -> None:
    step = crops.PhotometricDistortion()
    image = tv_tensors.Image(torch.tensor([10, 100, 250], dtype=torch.uint8).view(3, 1, 1))
    nothing = {"brightness": None, "contrast": None, "saturation": None, "hue": None, "contrast_first": True}

    def seen(**params: Any) -> list[int]:
        return step.transform(image, nothing | params).flatten().tolist()

    assert seen() == [10, 100, 250]
    assert seen(brightness=20 / 255) == [30, 120, 255]
    assert seen(contrast=0.5) == [5, 50, 125]
    assert seen(contrast=1.5, contrast_first=False) == [15, 150, 255]
    assert seen(hue=1 / 3) == pytest.approx([250, 10, 100], abs=1)
    drawn = [step.make_params([]) for _ in range(400)]
    for name, low, high in (("brightness", -32 / 255, 32 / 255), ("contrast", 0.5, 1.5), ("hue", -0.1, 0.1)):
        values = [params[name] for params in drawn if params[name] is not None]
        assert 150 < len(values) < 250
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high


def test_evaluation_resizes_the_image_alone() -> None:
    policy = crops.eval_transform(scale=(100, 40), mean=[0.5] * 3, std=[0.25] * 3)
    image, mask = blobs()
    seen, labels = policy(image, mask)
    assert seen.shape == (3, 40, 54)
    assert labels is mask
    plain = crops.eval_transform(scale=None, mean=[0.5] * 3, std=[0.25] * 3)(image, mask)[0]
    torch.testing.assert_close(plain.as_subclass(Tensor), (image.as_subclass(Tensor) / 255 - 0.5) / 0.25)


def test_masks_keep_their_dtype_and_batches_collate() -> None:
    policy = crops.train_transform(crop=16, scale=None, mean=ZERO, std=ONE)
    image, mask = blobs()
    for dtype in (torch.uint8, torch.int64):
        assert policy(image, tv_tensors.Mask(mask.to(dtype)))[1].dtype == dtype
    images, masks = torch.utils.data.default_collate([policy(image, mask) for _ in range(3)])
    assert images.shape == (3, 3, 16, 16)
    assert masks.shape == (3, 16, 16)


def test_policies_of_one_channel() -> None:
    image, mask = blobs(channels=1)
    seen, _ = crops.train_transform(crop=32, mean=[0.5], std=[0.5])(image, mask)
    assert seen.shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crops.RandomRescale((512, 2048)), "longest, shortest"),
        (lambda: crops.RandomRescale(None, (0.0, 1.0)), "ratio"),
        (lambda: crops.RandomRescale(None, (2.0, 1.0)), "ratio"),
        (lambda: crops.RandomCrop(0), "crop=0"),
        (lambda: crops.RandomCrop(8, 0.0), "cat_max_ratio"),
    ],
)
def test_impossible_policies_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random_crop", {"crop": "big"}, "crop='big': a side, or (height, width), in pixels"),
        ("random_crop", {"crop": [512]}, "crop=[512]: a side, or (height, width), in pixels"),
        ("random_crop", {"crop": [5, "6"]}, "crop=[5, '6']: a side, or (height, width), in pixels"),
        ("random_crop", {"crop": 0.5}, "crop=0.5: a side, or (height, width), in pixels"),
        ("random_crop", {"crop": None}, "crop=None: a side, or (height, width), in pixels"),
        ("random_crop", {"scale": 512}, "scale=512: (longest, shortest) side in pixels"),
        ("random_crop", {"scale": "big"}, "scale='big': (longest, shortest) side in pixels"),
        ("random_crop", {"scale": [512, 2048]}, "scale=[512, 2048]: (longest, shortest) side in pixels"),
        ("random_crop", {"ratio": 2}, "ratio=2: the least and the largest, both above 0"),
        ("random_crop", {"ratio": ["a", "b"]}, "ratio=['a', 'b']: the least and the largest, both above 0"),
        ("random_crop", {"cat_max_ratio": "all"}, "cat_max_ratio='all': a share above 0, at most 1, which takes any"),
        ("random_crop", {"hflip": "often"}, "hflip='often': a number from 0 to 1"),
        ("random_crop", {"hflip": 2}, "hflip=2: a number from 0 to 1"),
        ("random_crop", {"photometric": "no"}, "photometric='no': true or false"),
        ("random_crop", {"antialias": 3}, "antialias=3: true or false"),
        ("light", {"crop": "big"}, "crop='big': a side, or (height, width), in pixels"),
        ("light", {"crop": 8, "ratio": [0, 1]}, "ratio=[0, 1]: the least and the largest, both above 0"),
        ("light", {}, "crop is missing"),
        ("light", {"crop": 8, "mean": [0.5]}, "mean and std are those of the data: data.mean=, data.std="),
    ],
)
def test_a_value_that_an_option_does_not_take_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"aug.kwargs: policy {name}: {message}")) as caught:
        crops.segmentation_policy(name, options, mean=ZERO, std=ONE)
    assert "\n" not in str(caught.value)


def test_an_option_that_no_policy_takes_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("policy light has no option 'hflip'; it takes crop, ratio")):
        crops.segmentation_policy("light", {"hflip": 0.5}, mean=ZERO, std=ONE)


def test_steps_are_torchvision_s() -> None:
    policy = crops.train_transform(mean=ZERO, std=ONE)
    assert all(isinstance(step, v2.Transform) for step in policy.transforms)
    assert "RandomRescale" in repr(policy)
