"""BiFormer beyond what every family is tested for: routing and its two paddings, files that are no twins."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import nearfield
import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import on_meta
from nearfield import checkpoints
from nearfield.models import Backbone, export_state_dict, models_that_fit
from nearfield.models.biformer import BatchNorm, BiFormer, FullAttention, RoutingAttention
from torch import Tensor, nn

Small = Callable[..., Backbone]

PUBLISHED = [f"biformer_{size}" for size in ("tiny", "small", "base", "stl", "stl_nchw")]


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    x = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2, groups=conv.groups)
    return x.permute(0, 2, 3, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """(L, C), (S, C), (S, C) -> (L, C)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).transpose(0, 1).flatten(1)


def routed(attn: RoutingAttention, x: Tensor) -> Tensor:
    """Bi-level routing as published, an image and a region at a time."""
    H, W, C = x.shape[1:]
    ny, nx = attn.regions
    late = attn.pad == "keys"
    # rounded down and filled up after the projection, or padded to a multiple before it
    sy, sx = (max(H // ny, 1), max(W // nx, 1)) if late else (-(-H // ny), -(-W // nx))
    below, right = (-H % sy, -W % sx) if late else (-H % ny, -W % nx)
    padding = (0, 0, 0, right, 0, below)
    q, k, v = attn.qkv_linear(x if late else F.pad(x, padding)).chunk(3, -1)
    lepe = depthwise(attn.lepe, v)
    if late:
        real = F.pad(torch.ones(1, H, W, 1), padding)
        q, k, v = (F.pad(t, padding) for t in (q, k, v))
    else:
        real = torch.ones(1, *q.shape[1:3], 1)
    height, width = q.shape[1:3]
    cells = [(slice(y, y + sy), slice(z, z + sx)) for y, z in product(range(0, height, sy), range(0, width, sx))]
    out = torch.zeros_like(v)
    for b in range(x.shape[0]):
        means = [[t[b][c].flatten(0, 1).sum(0) / real[0][c].sum() for c in cells] for t in (q, k)]
        for i, cell in enumerate(cells):
            scores = [float(means[0][i] @ mean) for mean in means[1]]
            chosen = sorted(range(len(cells)), key=lambda j: (-scores[j], j))[: attn.topk]
            keys, values = (torch.cat([t[b][cells[j]].flatten(0, 1) for j in chosen]) for t in (k, v))
            y = attend(q[b][cell].flatten(0, 1), keys, values, attn.num_heads, C**-0.5)
            out[b][cell] = y.unflatten(0, (sy, sx))
    return attn.output_linear(out[:, :H, :W] + lepe[:, :H, :W])


@pytest.mark.parametrize("pad", ["map", "keys"])
@pytest.mark.parametrize("regions", [(4, 4), (3, 5)])
@pytest.mark.parametrize("size", [(8, 12), (12, 15), (9, 7), (11, 14), (4, 4), (3, 6), (1, 2)])
def test_routing_attention_is_the_published_one(size: tuple[int, int], regions: tuple[int, int], pad: str) -> None:
    attn = RoutingAttention(16, 2, regions, 3, pad).double()
    nn.init.normal_(attn.qkv_linear.weight, std=0.5)
    nn.init.normal_(attn.qkv_linear.bias)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), routed(attn, x))


@pytest.mark.parametrize("lepe", ["input", "value"])
def test_full_attention_is_the_published_one(lepe: str) -> None:
    attn = FullAttention(16, 2, lepe).double()
    nn.init.normal_(attn.qkv.weight)
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        qkv = attn.qkv(x)
        out = torch.stack([attend(*t.flatten(0, 1).chunk(3, -1), 2, 8**-0.5) for t in qkv]).unflatten(1, (5, 7))
        local = depthwise(attn.lepe, x if lepe == "input" else qkv.chunk(3, -1)[2])
        torch.testing.assert_close(attn(x), attn.proj(out + local))


@pytest.mark.parametrize("name", PUBLISHED)
def test_attention_is_as_published(name: str) -> None:
    model = on_meta(name)
    assert isinstance(model.norm, BatchNorm)
    assert len(model.topk) == len(model.stages) == 4
    for stage, topk in zip(model.stages, (1, 4, 16, None), strict=True):
        for block in stage.blocks:
            assert block.norm1.eps == 1e-6
            assert hasattr(block, "pos_embed") == ("stl" not in name)
            dim = block.attn.lepe.in_channels
            if topk is None:
                assert isinstance(block.attn, FullAttention)
                assert block.attn.num_heads == 8
                assert block.attn.lepe_of_value == (name == "biformer_stl_nchw")
            else:
                assert (block.attn.regions, block.attn.topk) == ((7, 7), topk)
                assert block.attn.num_heads == dim // 32
                assert block.attn.scale == dim**-0.5
                assert block.attn.pad == ("keys" if name == "biformer_stl_nchw" else "map")


def test_stl_files_of_the_two_codes_are_told_apart() -> None:
    with torch.device("meta"):
        models = {name: nearfield.create_model(name) for name in PUBLISHED}
        for name, model in models.items():
            assert models_that_fit(export_state_dict(model, "rayleizhu")) == [name]
        # in our names they are twins
        assert models_that_fit(models["biformer_stl"].state_dict()) == ["biformer_stl", "biformer_stl_nchw"]


def test_a_file_of_the_other_code_is_refused_by_name() -> None:
    kwargs = {"num_classes": 1000, "in_chans": 3}
    state = export_state_dict(nearfield.create_model("biformer_stl_nchw", **kwargs), "rayleizhu")
    with pytest.raises(checkpoints.CheckpointMismatch, match="it fits biformer_stl_nchw"):
        nearfield.create_model("biformer_stl", **kwargs).load_state_dict(state)
    state["stages.0.blocks.0.mlp.0.weight"] = torch.zeros(384, 96, 3, 3)
    with pytest.raises(checkpoints.CheckpointMismatch, match=r"mlp\.0\.weight.*\(384, 96, 3, 3\)"):
        nearfield.create_model("biformer_stl_nchw", **kwargs).load_state_dict(state)


@pytest.mark.parametrize("create", [nearfield.create_model, timm.create_model])
def test_files_that_cannot_be_fetched_have_a_place_of_their_own(
    create: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFIELD_CACHE", str(tmp_path))
    monkeypatch.setenv("NEARFIELD_OFFLINE", "1")
    for name in ("biformer_tiny", "biformer_stl"):
        with pytest.raises(checkpoints.CheckpointError) as caught:
            create(name, pretrained=True)
        assert str(tmp_path / f"{name}_in1k.pth") in str(caught.value)
        assert "https://api.onedrive.com/v1.0/shares/" in str(caught.value)


def test_regions_are_set_for_dense_tasks(small: Small) -> None:
    model = small("biformer_tiny")
    model.set_input_size(img_size=(256, 320), regions=16)
    assert model.img_size == (256, 320)
    assert [block.attn.regions for stage in model.stages[:3] for block in stage.blocks] == [(16, 16)] * 6
    assert model(torch.randn(1, 3, 64, 80)).shape == (1, 7)
    model.set_input_size(regions=((8, 4), 8, (4, 8), 1))
    assert [stage.blocks[0].attn.regions for stage in model.stages[:3]] == [(8, 4), (8, 8), (4, 8)]
    features = nearfield.create_model("biformer_nano", features_only=True, out_indices=(0,))
    features.set_input_size(regions=(8, 4, 1))
    assert features.backbone.stages[0].blocks[0].attn.regions == (8, 8)


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ({"regions": 3}, "topk=16"),
        ({"regions": 0}, "regions"),
        ({"regions": (7, 7, 7)}, "regions"),
        ({"window": 7}, "window"),
    ],
)
def test_regions_that_are_refused_change_nothing(sizes: dict[str, object], word: str, small: Small) -> None:
    model = small("biformer_tiny")
    with pytest.raises(ValueError, match=word):
        model.set_input_size(img_size=64, **sizes)
    assert model.img_size == (224, 224)
    assert model.stages[0].blocks[0].attn.regions == (7, 7)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"topk": (1, 4, 50, None)}, "topk=50"),
        ({"topk": (0, 4, 16, None)}, "topk=0"),
        ({"topk": (1, 4, 16)}, "4 stages"),
        ({"regions": -1}, "regions"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"topk": None, "num_heads": 5}, "num_heads=5"),
    ],
)
def test_impossible_arguments_are_named(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        BiFormer(**kwargs)


def test_batch_norms_learn_their_statistics_and_keep_them(small: Small) -> None:
    model = small("biformer_stl").train()
    model(torch.randn(2, 3, 64, 64))
    assert int(model.norm.num_batches_tracked) == int(model.stem.norm.num_batches_tracked) == 1
    theirs = export_state_dict(model, "rayleizhu")
    assert torch.equal(theirs["norm.running_mean"], model.norm.running_mean)
    other = small("biformer_stl")
    other.load_state_dict(theirs)
    assert torch.equal(other.stages[1].downsample.norm.running_var, model.stages[1].downsample.norm.running_var)
