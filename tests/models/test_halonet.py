"""HaloNet beside timm's own code, its published settings, and its attention written out."""

from __future__ import annotations

from collections.abc import Callable

import nearfield
import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import on_meta, randomise
from nearfield.models import Backbone, export_state_dict, models_that_fit
from nearfield.models.halonet import HaloAttention, HaloNet
from torch import Tensor, nn

Small = Callable[..., Backbone]

TIMM = {
    "halonet_26t": "halonet26t",
    "sehalonet_33ts": "sehalonet33ts",
    "halonet_50ts": "halonet50ts",
    "eca_halonext_26ts": "eca_halonext26ts",
    "halo_regnetz_b": "haloregnetz_b",
}


def attentions(model: nn.Module) -> list[HaloAttention]:
    return [module for module in model.modules() if isinstance(module, HaloAttention)]


@pytest.mark.parametrize("name", TIMM)
def test_weights_of_timms_own_model_give_timms_maps_and_logits(name: str) -> None:
    theirs = randomise(timm.create_model(TIMM[name], num_classes=10)).eval()
    ours = nearfield.create_model(name, num_classes=10, zero_init=False).eval()
    ours.load_state_dict(theirs.state_dict())
    height, width = ours.img_size
    x = torch.randn(1, 3, height, 2 * width)
    with torch.inference_mode():
        maps, expected = ours.forward_features(x), theirs.forward_features(x).permute(0, 2, 3, 1)
        logits = theirs.forward_head(theirs.forward_features(x))
        assert (maps - expected).norm() <= 1e-5 * expected.norm()
        assert (ours(x) - logits).norm() <= 1e-5 * logits.norm()
    again = export_state_dict(ours, "timm")
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", TIMM)
def test_a_file_of_timms_is_recognised_for_what_it_is(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(TIMM[name], num_classes=3, in_chans=1).state_dict()
    assert models_that_fit(state) == [name]


@pytest.mark.parametrize("size", [(224, 224), (256, 320), (250, 333)])
def test_sizes_that_timm_refuses_are_padded_inside(size: tuple[int, int]) -> None:
    with torch.inference_mode():
        model = nearfield.create_model("halonet_26t", zero_init=False).eval()
        x = torch.randn(1, 3, *size)
        attn = model.stages[2].blocks[1].attn
        maps = model.forward_intermediates(x, [1, 2], stop_early=True, intermediates_only=True)
        assert [tuple(y.shape[2:]) for y in maps] == [tuple(-(-side // r) for side in size) for r in (8, 16)]
        y = model.stages[2].blocks[0](maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = model.stages[2].blocks[1].conv1(y)
        torch.testing.assert_close(attn(y), dense(attn, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "block", "halo", "values", "layers"),
    [
        ("halo_h0", 8, 3, 1, 50),
        ("halo_h1", 8, 3, 1, 59),
        ("halo_h2", 8, 3, 1, 62),
        ("halo_h3", 10, 3, 1, 65),
        ("halo_h4", 12, 2, 1, 65),
        ("halo_h5", 14, 2, 2.5, 98),
        ("halo_h6", 8, 4, 3, 101),
        ("halo_h7", 10, 3, 4, 107),
    ],
)
def test_the_papers_models_are_attention_throughout(
    name: str, block: int, halo: int, values: float, layers: int
) -> None:
    model = on_meta(name)
    inner = [attn for stage in model.stages for attn in attentions(stage)]
    # three layers a block, the stem and the classifier
    assert 3 * len(inner) + 2 == layers
    assert all(attn.block_size == (block, block) and attn.halo_size == (halo, halo) for attn in inner)
    assert all(attn.kv.out_channels - attn.q.out_channels == values * attn.q.in_channels for attn in inner)
    assert [attn.stride for attn in inner].count(2) == 3
    assert {tuple(attn.rel_pos_bias_y.shape) for attn in attentions(model.stages[0])} == {(2 * (block + halo) - 1, 16)}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("halonet_26t", ["2.1", "3.0", "3.1"]),
        ("sehalonet_33ts", ["1.2", "2.2", "3.0", "3.1"]),
        ("halonet_50ts", ["1.3", "2.1", "2.3", "2.5", "3.1"]),
        ("halo_regnetz_b", ["2.3", "2.7", "2.11", "3.0", "3.1"]),
    ],
)
def test_the_hybrids_have_attention_where_timms_have_it(name: str, blocks: list[str]) -> None:
    keys = [key.split(".") for key, _ in on_meta(name).named_parameters() if key.endswith("attn.rel_pos_bias_y")]
    assert [f"{key[1]}.{key[3]}" for key in keys] == blocks


def dense(attn: HaloAttention, x: Tensor) -> Tensor:
    """Halo attention of (B, C, H, W), one query at a time, as the paper and timm have it."""
    (by, bx), (hy, hx) = attn.block_size, attn.halo_size
    H, W = x.shape[2:]
    stride = attn.step
    d, dv = attn.head_dims
    q = F.conv2d(x, attn.q.weight, stride=stride).unflatten(1, (attn.num_heads, d))
    kv = F.conv2d(x, attn.kv.weight)
    # to whole blocks, then the halo: zero keys that no mask removes
    kv = F.pad(kv, (hx, -W % bx + hx, hy, -H % by + hy)).unflatten(1, (attn.num_heads, d + dv))
    wy, wx = by + 2 * hy, bx + 2 * hx
    rel_y, rel_x = (
        F.pad(t, (0, 0, 2 * w - 1 - len(t), 0)) for t, w in ((attn.rel_pos_bias_y, wy), (attn.rel_pos_bias_x, wx))
    )
    out = x.new_zeros(len(x), attn.num_heads * dv, *q.shape[3:])
    for i in range(q.shape[3]):
        for j in range(q.shape[4]):
            ay, ax = i % (by // stride), j % (bx // stride)
            top, left = i * stride // by * by, j * stride // bx * bx
            k, v = kv[..., top : top + wy, left : left + wx].split((d, dv), 2)
            query = q[..., i, j]
            scores = torch.einsum("bhd,bhdyx->bhyx", query * d**-0.5, k)
            scores = scores + torch.einsum("bhd,yd->bhy", query, rel_y[wy - 1 - ay :][:wy])[..., None]
            scores = scores + torch.einsum("bhd,xd->bhx", query, rel_x[wx - 1 - ax :][:wx])[..., None, :]
            weights = scores.flatten(2).softmax(-1)
            out[:, :, i, j] = torch.einsum("bhs,bhds->bhd", weights, v.flatten(3)).flatten(1)
    return out


@pytest.mark.parametrize("spare_rows", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("block", "halo", "size"), [((4, 4), (1, 1), (8, 8)), ((4, 2), (2, 1), (7, 9)), ((2, 6), (1, 3), (1, 5))]
)
def test_attention_is_the_written_out_one(
    block: tuple[int, int], halo: tuple[int, int], size: tuple[int, int], stride: int, spare_rows: bool
) -> None:
    attn = HaloAttention(6, 12, 3, 4, block, halo, stride, spare_rows).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(attn(x), dense(attn, x))


def test_a_block_that_two_does_not_divide_is_averaged() -> None:
    attn = HaloAttention(6, 12, 3, 4, (3, 3), (1, 1), 2).double()
    x = torch.randn(2, 6, 9, 6, dtype=torch.float64)
    y = dense(attn, x)
    torch.testing.assert_close(attn(x)[:, :, :4], F.avg_pool2d(y, 2))
    # an odd row or column is averaged by itself
    torch.testing.assert_close(attn(x)[:, :, 4:], F.avg_pool2d(y[:, :, 8:], (1, 2)))


def test_rows_that_no_displacement_reaches_change_nothing() -> None:
    full = HaloAttention(6, 12, 3, 4, (4, 4), (2, 1))
    least = HaloAttention(6, 12, 3, 4, (4, 4), (2, 1), spare_rows=False)
    assert [
        len(full.rel_pos_bias_y),
        len(full.rel_pos_bias_x),
        len(least.rel_pos_bias_y),
        len(least.rel_pos_bias_x),
    ] == [15, 11, 11, 9]
    state = full.state_dict()
    least.load_state_dict(
        {**state, "rel_pos_bias_y": state["rel_pos_bias_y"][4:], "rel_pos_bias_x": state["rel_pos_bias_x"][2:]}
    )
    x = torch.randn(2, 6, 9, 10)
    assert torch.equal(full(x), least(x))
    full(x).square().sum().backward()
    assert full.rel_pos_bias_y.grad is not None
    # weights of masked pairs may be as large as 1e-26
    assert full.rel_pos_bias_y.grad[:4].abs().max() < 1e-20
    assert full.rel_pos_bias_y.grad[4:].abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", ["halo_h1", "halonet_26t", "halo_regnetz_b"])
def test_set_input_size_resizes_the_tables_about_displacement_zero(name: str, small: Small) -> None:
    model = small(name)
    attn = attentions(model)[0]
    attn.rel_pos_bias_x.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = 2 * (attn.block_size[0] + attn.halo_size[0]) - 1
    centre, rim = attn.rel_pos_bias_y[-old:][old // 2].clone(), attn.rel_pos_bias_y[-1].clone()
    model.set_input_size(img_size=(96, 160), block_size=(5, 6), halo_size=4)
    assert model.img_size == (96, 160)
    assert {(a.block_size, a.halo_size, a.halo.block) for a in attentions(model)} == {((5, 6), (4, 4), (5, 6))}
    attn = attentions(model)[0]
    spare = 8 if attn.spare_rows else 0
    assert [len(attn.rel_pos_bias_y), len(attn.rel_pos_bias_x)] == [17 + spare, 19 + spare]
    torch.testing.assert_close(attn.rel_pos_bias_y[spare + 8], centre)
    torch.testing.assert_close(attn.rel_pos_bias_y[-1], rim)
    assert not attn.rel_pos_bias_x.requires_grad
    assert attn.rel_pos_bias_y.requires_grad
    changed = {key for key, value in model.state_dict().items() if value.shape != before[key].shape}
    assert changed
    assert all(key.endswith((".rel_pos_bias_y", ".rel_pos_bias_x")) for key in changed)
    assert model(torch.randn(1, 3, 45, 61)).shape == (1, 7)


def test_set_input_size_changes_nothing_when_refused(small: Small) -> None:
    for sizes, word in (
        ({"block_size": 0}, "block_size"),
        ({"halo_size": (1, 2, 3)}, "halo_size"),
        ({"window_size": 7}, "window_size"),
    ):
        model = small("halo_h1")
        before = {key: value.shape for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=word):
            model.set_input_size(img_size=64, **sizes)
        assert model.img_size == (256, 256)
        assert {key: value.shape for key, value in model.state_dict().items()} == before


def test_pruned_features_take_another_block() -> None:
    features = nearfield.create_model("halonet_nano", features_only=True, out_indices=(0, 1))
    features.set_input_size(img_size=64, block_size=(4, 8, 4))
    assert [a.block_size for a in attentions(features)] == [(8, 8), (8, 8)]
    assert [y.shape[-1] for y in features(torch.randn(1, 3, 64, 64))] == [32, 16]


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"block_size": 0}, "block_size"),
        ({"halo_size": (3, -1)}, "halo_size"),
        ({"num_heads": 7}, "num_heads=7"),
        ({"r_b": (1.0, 2.0, 3.0)}, "r_b"),
        ({"attention": ((), ())}, "4 stages"),
        ({"attention": ((),) * 4, "group_width": 7}, "group_width=7"),
        ({"stem_stride": 3}, "stem_stride"),
        ({"stem_pool": False}, "stem_pool"),
    ],
)
def test_impossible_arguments_are_named(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        HaloNet(**kwargs)


def test_branches_begin_at_zero_and_heads_can_be_reset() -> None:
    model = nearfield.create_model("halonet_nano", num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    assert all(block.conv3.bn.weight.abs().max() == 0 for stage in model.stages for block in stage.blocks)
    before = model.stem.conv1.conv.weight.clone()
    model.init_weights()
    assert not torch.equal(model.stem.conv1.conv.weight, before)
    assert all(block.conv3.bn.weight.abs().max() == 0 for stage in model.stages for block in stage.blocks)
    assert model.num_features == model.head.fc.in_features == 112
    assert model.prune_intermediate_layers([2], prune_norm=True, prune_head=False) == [2]
    assert model.num_features == model.feature_info[2]["num_chs"] == model(x).shape[-1]
