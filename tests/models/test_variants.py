"""The published figures of every variant: parameters, dilations, kernels, layer scale."""

from __future__ import annotations

from functools import cache

import nearfield
import pytest
import torch
from nearfield.models import catalog
from nearfield.models.layers import LayerScale

# millions of parameters as printed in the papers and repositories
MILLIONS = {
    "nat_mini": "19.98",
    "nat_tiny": "27.90",
    "nat_small": "50.74",
    "nat_base": "89.77",
    "dinat_mini": "20",
    "dinat_tiny": "28",
    "dinat_small": "51",
    "dinat_base": "90",
    "dinat_large": "200.9",
    "dinat_large_384": "201",
    "dinat_large_384_11x11": "201",
    "dinat_s_tiny": "28",
    "dinat_s_small": "50",
    "dinat_s_base": "88",
    "dinat_s_large": "197",
    "dinat_s_large_384": "197",
    "swin_tiny": "28",
    "swin_small": "50",
    "swin_base": "88",
    "swin_base_384": "88",
    "swin_large": "197",
    "swin_large_384": "197",
    "swinv2_tiny_window8": "28",
    "swinv2_tiny_window16": "28",
    "swinv2_small_window8": "50",
    "swinv2_small_window16": "50",
    "swinv2_base_window8": "88",
    "swinv2_base_window16": "88",
    "swinv2_base_window12_22k": "88",
    "swinv2_base_window16_22k": "88",
    "swinv2_base_window24_22k": "88",
    "swinv2_large_window12_22k": "197",
    "swinv2_large_window16_22k": "197",
    "swinv2_large_window24_22k": "197",
    "biformer_tiny": "13.1",
    "biformer_small": "25.5",
    "biformer_base": "56.8",
    "biformer_stl": "28.4",
    "biformer_stl_nchw": "28.4",
}
SCALED = {"nat_small", "nat_base", "dinat_base"}


@cache
def on_meta(name: str) -> nearfield.models.Backbone:
    with torch.device("meta"):
        return nearfield.create_model(name, num_classes=1000)


def test_every_published_model_has_a_figure() -> None:
    families = ("nat_", "dinat_", "swin_", "swinv2_", "biformer_")
    assert set(MILLIONS) == {n for n in nearfield.list_models() if n.startswith(families) and not n.endswith("_nano")}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    count = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    digits = len(MILLIONS[name].partition(".")[2])
    assert f"{count:.{digits}f}" == MILLIONS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_layer_scale_only_where_published(name: str) -> None:
    scales = [module for module in on_meta(name).modules() if isinstance(module, LayerScale)]
    blocks = sum(catalog.get(name).kwargs["depths"])
    assert len(scales) == (2 * blocks if name in SCALED else 0)
    assert all(scale.init_values == 1e-5 for scale in scales)


@pytest.mark.parametrize(
    ("name", "dilations", "kernel"),
    [
        ("nat_tiny", ([1] * 3, [1] * 4, [1] * 18, [1] * 5), 7),
        ("dinat_mini", ([1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5), 7),
        ("dinat_tiny", ([1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5), 7),
        ("dinat_large_384", ([1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5), 7),
        ("dinat_large_384_11x11", ([1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5), 11),
        ("dinat_s_tiny", ([1, 8], [1, 4], [1, 2] * 3, [1, 1]), 7),
        ("dinat_s_large", ([1, 8], [1, 4], [1, 2] * 9, [1, 1]), 7),
        ("dinat_s_large_384", ([1, 13], [1, 6], [1, 3] * 9, [1, 1]), 7),
    ],
)
def test_dilations_and_kernel_are_the_published_ones(name: str, dilations: tuple[list[int], ...], kernel: int) -> None:
    model = on_meta(name)
    attention = [[block.attn for block in stage.blocks] for stage in model.stages]
    assert [[a.dilation for a in stage] for stage in attention] == [[(d, d) for d in stage] for stage in dilations]
    assert {a.kernel_size for stage in attention for a in stage} == {(kernel, kernel)}
    assert {tuple(a.rel_pos_bias.shape[1:]) for stage in attention for a in stage} == {(2 * kernel - 1,) * 2}


@pytest.mark.parametrize(("name", "window"), [("swin_tiny", 7), ("swin_base_384", 12)])
def test_swin_windows_and_shifts_are_the_published_ones(name: str, window: int) -> None:
    for stage in on_meta(name).stages:
        assert [block.attn.window_size for block in stage.blocks] == [(window, window)] * len(stage.blocks)
        assert [block.attn.shifted for block in stage.blocks] == [j % 2 == 1 for j in range(len(stage.blocks))]
