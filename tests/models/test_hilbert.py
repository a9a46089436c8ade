"""HWT and HNT: attention along the curve against its definition, tables that follow the map, published settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nearfield
import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import on_meta, randomise
from nearfield.checkpoints import CheckpointMismatch, DownloadError
from nearfield.models import Backbone, catalog, export_state_dict, models_that_fit
from nearfield.models.hnt import HNT, HilbertNeighborhoodAttention
from nearfield.models.hwt import HWT, HilbertWindowAttention
from nearfield.models.layers import LocalAttention
from nearfield.ops import hilbert_order, resize_table
from torch import Tensor

Small = Callable[..., Backbone]
Attention = HilbertWindowAttention | HilbertNeighborhoodAttention


def heads_of(attn: LocalAttention, x: Tensor) -> Tensor:
    """Tokens (..., N, C) as (3, ..., heads, N, head_dim), q scaled."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
    return torch.cat([qkv[:1] * qkv.shape[-1] ** -0.5, qkv[1:]])


def rolled_windows(attn: HilbertWindowAttention, x: Tensor) -> Tensor:
    """HWT as released: order, roll, cut, global table by query minus key, mask in window 0, roll back, order back."""
    H, W = x.shape[1:3]
    side = min(H, W, attn.window_size)
    length = side * side
    shift = length // 2 if attn.shifted and min(H, W) > attn.window_size else 0
    order = hilbert_order(H, W)
    tokens = x.flatten(1, 2)[:, order].roll(shift, 1).unflatten(1, (-1, length))
    q, k, v = heads_of(attn, tokens)  # (B, windows, heads, length, head_dim)
    y, z = (c.roll(shift).unflatten(0, (-1, length)) for c in (order // W, order % W))
    table = attn.rel_pos_bias.flip(1, 2)  # query minus key
    bias = table[:, y[:, :, None] - y[:, None] + H - 1, z[:, :, None] - z[:, None] + W - 1].transpose(0, 1)
    scores = q @ k.transpose(-1, -2) + bias
    late = torch.arange(length) < shift  # the end of the curve, rolled to the front
    scores[:, 0] = scores[:, 0].masked_fill(late[:, None] != late, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(1, 2).roll(-shift, 1)
    return attn.proj(out)[:, order.argsort()].unflatten(1, (H, W))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"), [((6, 6), 3), ((6, 9), 3), ((12, 3), 3), ((8, 12), 4), ((4, 4), 4), ((2, 6), 5), ((1, 4), 2)]
)
def test_hilbert_windows_are_the_published_roll_and_mask(size: tuple[int, int], window: int, shifted: bool) -> None:
    attn = randomise(HilbertWindowAttention(16, 2, size, window, shifted).double())
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(attn(x), rolled_windows(attn, x))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (7, 7), (4, 11), (13, 3)])
def test_tokens_beyond_the_last_whole_window_form_a_shorter_one(size: tuple[int, int], shifted: bool) -> None:
    attn = randomise(HilbertWindowAttention(16, 2, size, 3, shifted).double())
    H, W = size
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    order = hilbert_order(H, W)
    place = (torch.arange(H * W) + (4 if shifted and min(size) > 3 else 0)) // 9
    q, k, v = heads_of(attn, x.flatten(1, 2)[:, order])
    y, z = order // W, order % W
    scores = q @ k.transpose(-1, -2) + attn.rel_pos_bias[:, y - y[:, None] + H - 1, z - z[:, None] + W - 1]
    weights = scores.masked_fill(place[:, None] != place, float("-inf")).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))[:, order.argsort()].unflatten(1, size)
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("size", [(4, 5), (5, 4), (3, 3), (2, 4), (1, 3), (5, 1), (1, 1)])
def test_neighborhoods_on_the_curve_pad_a_short_one_at_its_end(size: tuple[int, int]) -> None:
    length = 9
    attn = randomise(HilbertNeighborhoodAttention(16, 2, length).double())
    H, W = size
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    order, n = hilbert_order(H, W), max(H * W, length)
    q, k, v = heads_of(attn, F.pad(x.flatten(1, 2)[:, order], (0, 0, 0, n - H * W)))
    i = torch.arange(n)
    first = (i - length // 2).clamp(0, n - length)[:, None]
    step = (i - i[:, None] + length - 1).clamp(0, 2 * length - 2)
    scores = q @ k.transpose(-1, -2) + attn.rel_pos_bias[:, 0, step]
    weights = scores.masked_fill((i < first) | (i >= first + length), float("-inf")).softmax(-1)
    out = attn.proj((weights @ v).transpose(1, 2).flatten(2))[:, : H * W]
    torch.testing.assert_close(attn(x), out[:, order.argsort()].unflatten(1, size))


@pytest.mark.parametrize(
    ("name", "sizes"), [("hnt_nano", {"kernel_size": 49}), pytest.param("hwt_nano", {}, marks=pytest.mark.slow)]
)
def test_one_model_compiles_for_every_size_and_exports(name: str, sizes: dict[str, int]) -> None:
    model = nearfield.create_model(name, num_classes=5, depths=(1, 1, 1), **sizes).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        # at the second size the sides are symbols; the curve of the last stage is short
        for size in ((40, 44), (33, 48)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", ["hwt_tiny", "hwt_nano"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (75, 33), (32, 200)])
def test_another_image_size_gives_what_resized_tables_give(name: str, size: tuple[int, int], small: Small) -> None:
    model, x = small(name), torch.randn(1, 3, *size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(x)
    model.set_input_size(size)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert model.img_size == size
    for i, stage in enumerate(model.stages):
        reduction = model.feature_info[i]["reduction"]
        height, width = (-(-side // reduction) for side in size)
        for j, block in enumerate(stage.blocks):
            table = before[f"stages.{i}.blocks.{j}.attn.rel_pos_bias"]
            assert torch.equal(block.attn.rel_pos_bias, resize_table(table, (2 * height - 1, 2 * width - 1)))
    # a size given at construction makes the same tables
    built = small(name, img_size=size)
    built.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(built(x), expected)


def test_the_table_learns_at_every_size() -> None:
    attn = randomise(HilbertWindowAttention(8, 2, (6, 6), 3, True).double())
    x = torch.randn(1, 5, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(attn(x).square().sum(), attn.rel_pos_bias)
    step = torch.randn_like(attn.rel_pos_bias)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            attn.rel_pos_bias += sign * 1e-5 * step
            ends.append(attn(x).square().sum())
            attn.rel_pos_bias -= sign * 1e-5 * step
    torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_sizes_of_attention_are_set_after_construction(small: Small) -> None:
    hwt = small("hwt_tiny")
    hwt.set_input_size(256, window_size=8)
    assert {block.attn.window_size for stage in hwt.stages for block in stage.blocks} == {8}
    assert hwt.stages[0].blocks[0].attn.rel_pos_bias.shape[1:] == (127, 127)
    assert {key: v.shape for key, v in hwt.state_dict().items()} == {
        key: v.shape for key, v in small("hwt_tiny_256").state_dict().items()
    }
    hwt.set_input_size(window_size=(7, 7, 7, 4))
    assert hwt.img_size == (256, 256)
    assert hwt.stages[3].blocks[0].attn.window_size == 4
    hnt = small("hnt_mini")
    hnt.set_input_size(64, kernel_size=(49, 49, 25, 9))
    assert [stage.blocks[0].attn.rel_pos_bias.shape[1:] for stage in hnt.stages] == [(1, 97), (1, 97), (1, 49), (1, 17)]
    for model in (hwt, hnt):
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    features = nearfield.create_model("hwt_nano", features_only=True, out_indices=(0, 1))
    features.set_input_size(48, window_size=(4, 3, 2))
    assert features.backbone.stages[1].blocks[0].attn.window_size == 3
    assert features.backbone.stages[1].blocks[0].attn.rel_pos_bias.shape[1:] == (23, 23)


@pytest.mark.parametrize(
    ("family", "sizes", "word"),
    [
        (HWT, {"window_size": 0}, "window_size"),
        (HWT, {"window_size": (7, 7)}, "window_size"),
        (HWT, {"window_size": (7, 7, 7)}, "window_size"),
        (HNT, {"kernel_size": -1}, "kernel_size"),
        (HNT, {"kernel_size": (7, 7)}, "kernel_size"),
        (HNT, {"kernel_size": ((7, 7),) * 4}, "kernel_size"),
    ],
)
def test_impossible_sizes_are_named_and_change_nothing(
    family: type[Backbone], sizes: dict[str, object], word: str, small: Small
) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        family(**sizes)
    model = small("hwt_tiny" if family is HWT else "hnt_mini")
    before = {key: value.shape for key, value in model.state_dict().items()}
    for wrong in (sizes, {"dilations": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.set_input_size(img_size=64, **wrong)
    assert model.img_size == (224, 224)
    assert {key: value.shape for key, value in model.state_dict().items()} == before


# --- published settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body"),
    [
        *((f"hwt_{size}{tail}", f"swin_{size}") for size in ("tiny", "small", "base") for tail in ("", "_256")),
        *((f"hnt_{size}", f"nat_{size}") for size in ("mini", "tiny", "small", "base")),
    ],
)
def test_only_the_tables_differ_from_the_body_that_it_is_made_of(name: str, body: str) -> None:
    ours, theirs = ({key: p.shape for key, p in on_meta(which).named_parameters()} for which in (name, body))
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == theirs[key] for key in ours if not key.endswith("rel_pos_bias"))


@pytest.mark.parametrize(
    ("name", "window", "maps"), [("hwt_tiny", 7, (56, 28, 14, 7)), ("hwt_base_256", 8, (64, 32, 16, 8))]
)
def test_windows_shifts_and_tables_are_the_published_ones(name: str, window: int, maps: tuple[int, ...]) -> None:
    for size, stage in zip(maps, on_meta(name).stages, strict=True):
        for j, block in enumerate(stage.blocks):
            assert block.attn.rel_pos_bias.shape[1:] == (2 * size - 1, 2 * size - 1)
            pattern = block.attn.pattern(size, size)
            area = window**2
            # rolled by half a window to higher places: the windows begin half a window earlier
            shift = area - area // 2 if j % 2 == 1 and size > window else 0
            assert (pattern.length, pattern.shift) == (area, shift)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_told_from_those_of_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("hwt_tiny", "hwt_tiny_256", "hnt_mini", "swin_tiny", "nat_mini")
    monkeypatch.setattr(catalog, "variants", lambda: [catalog.get(name) for name in (*names, "dinat_mini")])
    for name in names:
        model = on_meta(name)
        twins = ["nat_mini", "dinat_mini"] if name == "nat_mini" else [name]
        assert sorted(models_that_fit(export_state_dict(model, model.layouts[0].name))) == sorted(twins)


def test_the_file_of_another_resolution_is_resized(caplog: pytest.LogCaptureFixture, small: Small) -> None:
    other = small("hwt_tiny_256")
    for p in other.parameters():
        torch.nn.init.normal_(p)
    model = small("hwt_tiny")
    model.load_state_dict(export_state_dict(other, "hilbert"))
    assert "from 127x127 to 111x111" in caplog.text
    key = "stages.1.blocks.0.attn.rel_pos_bias"
    assert torch.equal(model.state_dict()[key], resize_table(other.state_dict()[key], (55, 55)))


@pytest.mark.parametrize("create", [nearfield.create_model, timm.create_model])
def test_pretrained_offline_says_where_a_person_finds_the_file(
    create: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFIELD_CACHE", str(tmp_path))
    monkeypatch.setenv("NEARFIELD_OFFLINE", "1")
    page = "https://drive.google.com/file/d/1WYLXTQNh9d27EJ_fBZaq1a2Nq0ltv_A-/view"
    for overlay in (None, {"crop_pct": 1.0}):
        with pytest.raises(DownloadError, match=re.escape(page)) as error:
            create("hwt_tiny_256", pretrained=True, pretrained_cfg_overlay=overlay)
        assert str(tmp_path / "hwt_tiny_256.pth") in str(error.value)
    # weights that are named otherwise are not looked for there
    path = tmp_path / "own.pth"
    with torch.device("meta"):
        state = nearfield.create_model("hwt_nano").state_dict()
    torch.save({key: torch.zeros(value.shape) for key, value in state.items()}, path)
    model = create("hwt_nano", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert not any(value.any() for value in model.state_dict().values())


def test_files_of_nat_and_hnt_are_not_mixed_up() -> None:
    hnt, nat = nearfield.create_model("hnt_mini"), nearfield.create_model("nat_mini")
    with pytest.raises(CheckpointMismatch, match="it fits hnt_mini"):
        nat.load_state_dict(export_state_dict(hnt, "hilbert"))
    with pytest.raises(CheckpointMismatch, match="2-D neighborhoods, as NAT has"):
        hnt.load_state_dict(export_state_dict(nat, "shi-labs"))
