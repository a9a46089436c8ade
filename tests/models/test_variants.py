"""The published settings of variants: dilations, kernels, windows, layer scale."""

from __future__ import annotations

import nearfield
import pytest
from model_helpers import is_nano, on_meta
from nearfield.models import catalog
from nearfield.models.layers import LayerScale

FAMILIES = ("nat_*", "dinat_*", "swin_*", "swinv2_*", "biformer_*")
TRANSFORMERS = [name for family in FAMILIES for name in nearfield.list_models(family) if not is_nano(name)]
SCALED = {"nat_small", "nat_base", "dinat_base"}


@pytest.mark.parametrize("name", TRANSFORMERS)
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
