"""Prediction by windows, scales and mirror images: against definitions written a second time, plainly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nearfield.engine.dense.inference import RATIOS, filled_up, predict, slide
from torch import Tensor, nn


def pointwise(images: Tensor) -> Tensor:
    """Logits of 4 classes that depend on a pixel alone."""
    weights = torch.linspace(-2, 3, 12).view(4, 3, 1, 1)
    return F.conv2d(images, weights.to(images))


def contextual() -> nn.Module:
    """Logits that depend on all of the image that is seen, at a quarter of its size."""
    torch.manual_seed(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 5, stride=4, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x.mean((1, 2, 3)).view(-1, 1, 1, 1) * torch.arange(4.0).view(-1, 1, 1)

    return Net().eval()


def plain_slide(
    model: Callable[[Tensor], Tensor], images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """mmseg's definition: a grid of strides; a window that would leave the image is moved back inside."""
    height, width = images.shape[-2:]
    sums = torch.zeros(len(images), 4, height, width, dtype=torch.float64)
    counts = torch.zeros(height, width, dtype=torch.float64)
    y = 0
    while True:
        bottom = min(y + crop[0], height)
        top = max(bottom - crop[0], 0)
        x = 0
        while True:
            right = min(x + crop[1], width)
            left = max(right - crop[1], 0)
            part = images[..., top:bottom, left:right]
            logits = F.interpolate(model(part), part.shape[-2:], mode="bilinear", align_corners=False)
            sums[..., top:bottom, left:right] += logits.double()
            counts[top:bottom, left:right] += 1
            if x + crop[1] >= width:
                break
            x += stride[1]
        if y + crop[0] >= height:
            break
        y += stride[0]
    return sums / counts


SHAPES = [
    ((32, 48), (16, 16), (16, 16)),
    ((37, 53), (16, 20), (11, 13)),
    ((37, 53), (16, 20), (1, 20)),
    ((15, 61), (16, 16), (10, 10)),
    ((8, 9), (32, 32), (21, 21)),
    ((17, 16), (16, 16), (16, 16)),
    ((1, 5), (4, 4), (3, 3)),
]


@pytest.mark.parametrize(("size", "crop", "stride"), SHAPES)
def test_slide_is_the_mean_over_windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> None:
    images, model = torch.randn(2, 3, *size), contextual()
    with torch.no_grad():
        expected = plain_slide(model, images, crop, stride)
    result = slide(model, images, crop=crop, stride=stride)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "crop", "stride"), SHAPES)
def test_all_windows_are_of_one_size(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def model(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return pointwise(images)

    images = torch.randn(1, 3, *size)
    result = slide(model, images, crop=crop, stride=stride)
    assert set(seen) == {tuple(min(pair) for pair in zip(size, crop, strict=True))}
    # what depends on a pixel alone does not care for windows
    torch.testing.assert_close(result, pointwise(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("crop", [40, (37, 53), 512])
def test_a_crop_that_holds_the_image_is_the_whole_image(crop: int | tuple[int, int]) -> None:
    images, model = torch.randn(2, 3, 37, 40), contextual()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(predict(model, images, crop=crop), predict(model, images))
    assert len(calls) == 2


def test_published_stride_is_two_thirds_of_the_crop() -> None:
    seen: list[int] = []

    def model(images: Tensor) -> Tensor:
        seen.append(int(images[0, 0, 0, 0]))
        return pointwise(images)

    columns = torch.arange(1300.0).expand(1, 3, 4, 1300)
    slide(model, columns, crop=(4, 512))
    assert seen == [0, 341, 682, 788]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, 16])
def test_views_are_averaged_as_probabilities(flip: bool, crop: int | None) -> None:
    images, model = torch.randn(2, 3, 33, 47), contextual()
    ratios, scale, out_size = (0.5, 1.0, 1.75), (60, 40), (50, 71)
    views = []
    with torch.no_grad():
        for size in ((20, 28), (40, 57), (70, 100)):  # (60, 40) times the ratio: the shortest side decides
            view = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
            for mirrored in (False, True) if flip else (False,):
                shown = view.flip(-1) if mirrored else view
                if crop:
                    logits = plain_slide(model, shown, (crop, crop), (10, 10)).float()
                else:
                    logits = F.interpolate(model(shown), size, mode="bilinear", align_corners=False)
                logits = logits.flip(-1) if mirrored else logits
                views.append(F.interpolate(logits, out_size, mode="bilinear", align_corners=False).softmax(1))
    result = predict(
        model, images, out_size=out_size, scale=scale, ratios=ratios, flip=flip, crop=crop, stride=crop and 10
    )
    assert result.shape == (2, 4, *out_size)
    torch.testing.assert_close(result, torch.stack(views).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.sum(1), torch.ones(2, *out_size))


def test_a_constant_model_gives_a_constant() -> None:
    def model(images: Tensor) -> Tensor:
        return torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1).expand(len(images), 3, 2, 2)

    result = predict(model, torch.randn(1, 3, 45, 31), ratios=RATIOS, flip=True, crop=16, out_size=(90, 62))
    expected = torch.tensor([1.0, -2.0, 0.5]).softmax(0).view(1, 3, 1, 1).expand(1, 3, 90, 62)
    torch.testing.assert_close(result, expected)


def test_a_mirror_image_gets_the_mirrored_result() -> None:
    images, model = torch.randn(1, 3, 21, 35), contextual()
    result = predict(model, images, flip=True)
    torch.testing.assert_close(predict(model, images.flip(-1), flip=True), result.flip(-1), atol=1e-6, rtol=1e-5)
    assert (predict(model, images) - result).abs().max() > 1e-3


def test_half_precision_models_are_summed_in_float32() -> None:
    images = torch.randn(1, 3, 30, 30)
    result = predict(lambda x: pointwise(x).bfloat16(), images, crop=8, stride=3)
    assert result.dtype == torch.float32
    expected = pointwise(images).bfloat16().float().softmax(1)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_inference_mode_and_gradients() -> None:
    images, model = torch.randn(1, 3, 20, 20), contextual()
    expected = predict(model, images, ratios=(1.0, 2.0), crop=12)
    assert not expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(predict(model, images, ratios=(1.0, 2.0), crop=12), expected)


def test_memory_does_not_grow_with_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more maps of the result's size are alive at once for twelve views than for two."""
    import weakref

    def most(ratios: tuple[float, ...]) -> int:
        alive: list[weakref.ref[Tensor]] = []
        peak = 0

        def softmax(self: Tensor, dim: int) -> Tensor:
            nonlocal peak
            result = torch.softmax(self, dim)
            alive.append(weakref.ref(result))
            peak = max(peak, sum(ref() is not None for ref in alive))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "softmax", softmax)
            predict(pointwise, torch.randn(1, 3, 16, 16), ratios=ratios, flip=True)
        assert len(alive) == 2 * len(ratios)
        return peak

    assert most((1.0,)) == most(RATIOS) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: slide(pointwise, x, crop=8, stride=9), "stride=9 is larger than crop=8"),
        (lambda x: slide(pointwise, x, crop=0), "crop=0"),
        (lambda x: slide(pointwise, x, crop=8, stride=0), "stride=0"),
        (lambda x: predict(pointwise, x, ratios=()), "ratios"),
        (lambda x: predict(pointwise, x, ratios=(1.0, -1.0)), "ratios"),
        (lambda x: predict(lambda y: {"out": y}, x), "gave dict; expected logits"),
        (lambda x: predict(lambda y: y.mean((2, 3)), x), r"shape \(1, 3\)"),
    ],
)
def test_what_cannot_work_is_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(torch.randn(1, 3, 16, 16))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1, 1), (40, 8), (33, 64)])
def test_small_images_are_filled_up_for_the_model(size: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def model(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return F.avg_pool2d(pointwise(images), 4)

    images = torch.randn(2, 3, *size)
    result = predict(filled_up(model, 32), images, ratios=(1.0, 0.5))
    assert result.shape == (2, 4, *size)
    assert all(min(side) >= 32 for side in seen)
    exact = predict(filled_up(pointwise, 32), images)
    torch.testing.assert_close(exact, pointwise(images).softmax(1))
