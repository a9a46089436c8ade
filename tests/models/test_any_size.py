"""Images of sizes at which timm's models fail, or for which they are made anew: every family takes them as they are.

Measured with timm 1.0.31: swin_tiny_patch4_window7_224 refuses 512 ("doesn't match model (224)") and, not strict about
the size, 250x333 ("divisible by patch size"); halonet26t at 224 and 256x320 and halonet50ts at 224 are an assertion
without a text; maxvit_tiny_tf_224 at 256 is "height (64) must be divisible by window (7)"; and nat_tiny is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import timm
import torch
from nearfield.models import Backbone

Kwargs = Callable[[str], dict[str, Any]]

# one of each family, with the windows, kernels and blocks of the published model
FAMILIES = (
    "nat_tiny",
    "dinat_tiny",
    "dinat_s_tiny",
    "swin_tiny",
    "swinv2_tiny_window8",
    "halo_h0",
    "halonet_26t",
    "halo_regnetz_b",
    "maxvit_tiny",
    "maxvit_rmlp_tiny_rw",
    "biformer_tiny",
    "biformer_stl_nchw",
    "hwt_tiny",
    "hnt_tiny",
)
SIZES = ((512, 512), (250, 333), (224, 224), (256, 320), (256, 256), (384, 384), (33, 47))


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, 3, *size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny", (512, 512)),
        ("swin_tiny", (250, 333)),
        ("halonet_26t", (224, 224)),
        ("halonet_26t", (256, 320)),
        ("halonet_50ts", (224, 224)),
        ("maxvit_tiny", (256, 256)),
        ("nat_tiny", (224, 224)),
    ],
)
def test_the_calls_at_which_timm_fails(name: str, size: tuple[int, int], small_kwargs: Kwargs) -> None:
    model = timm.create_model(name, **{**small_kwargs(name), "img_size": nearfield.create_model(name).img_size}).eval()
    assert type(model).__module__.startswith("nearfield.")
    with torch.inference_mode():
        logits = model(images(size))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


def test_no_size_is_strict_so_that_the_argument_which_says_so_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"^swin_tiny takes no argument 'strict_img_size': did you mean img_size\?$"
    ) as caught:
        timm.create_model("swin_tiny", strict_img_size=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_model_takes_every_size(name: str, small: Callable[..., Backbone]) -> None:
    model = small(name)
    with torch.inference_mode():
        for size in SIZES:
            logits = model(images(size))
            assert logits.shape == (1, 7), size
            assert logits.isfinite().all(), size


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_every_size_are_the_image_over_their_reduction_rounded_up(name: str, small_kwargs: Kwargs) -> None:
    model = timm.create_model(name, features_only=True, **small_kwargs(name)).eval()
    with torch.inference_mode():
        for height, width in SIZES:
            maps = model(images((height, width)))
            for y, channels, reduction in zip(
                maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
            ):
                assert y.shape == (1, channels, -(-height // reduction), -(-width // reduction)), (height, width)
                assert y.isfinite().all(), (height, width)


@pytest.mark.parametrize("size", [(31, 64), (64, 31)])
def test_an_image_below_the_least_size_is_one_clear_line(size: tuple[int, int], small: Callable[..., Backbone]) -> None:
    for name in FAMILIES:
        with pytest.raises(ValueError, match=rf"^image {size[0]}x{size[1]} is smaller than 32x32: ") as caught:
            small(name)(images(size))
        assert "\n" not in str(caught.value)
