"""SwinV2 beyond the contract: cosine attention and its table written out, timm's logits, what is kept, its windows."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import on_meta, randomise
from nearfield.models import Backbone, export_state_dict
from nearfield.models.swin_v2 import CosineWindowAttention, SwinV2, unit
from torch import Tensor, nn

Small = Callable[..., Backbone]

TIMM = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 5}


def attention(window: tuple[int, int] = (4, 4), shifted: bool = True, **options: Any) -> CosineWindowAttention:
    return randomise(CosineWindowAttention(16, 2, window, shifted, **options))


def written_out(attn: CosineWindowAttention, x: Tensor) -> Tensor:
    """The attention over all pairs of tokens, as the paper and the published code have it."""
    B, H, W, C = x.shape
    ys, xs = (t.flatten() for t in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    wy, wx = attn.window_size
    ny, nx = attn.pretrained_window_size or attn.window_size
    zero = torch.zeros_like(attn.q_bias)
    qkv = x.flatten(1, 2) @ attn.qkv.weight.T + torch.cat((attn.q_bias, zero, attn.v_bias))
    q, k, v = qkv.reshape(B, H * W, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    scores = scores * attn.logit_scale.clamp(max=math.log(100)).exp()

    def spaced(i: Tensor, normaliser: int) -> Tensor:
        d = 8 * (i[:, None] - i[None]).to(x.dtype) / max(normaliser - 1, 1)
        return d.sign() * torch.log2(d.abs() + 1) / math.log2(8)

    scores = scores + 16 * attn.cpb_mlp(torch.stack((spaced(ys, ny), spaced(xs, nx)), -1)).sigmoid().permute(2, 0, 1)

    # the published rule for the multiples that it is defined on: min(input_resolution) <= window_size
    still = H % wy == 0 and W % wx == 0 and (wy >= H or wx >= W)

    def cell(i: Tensor, window: int, n: int) -> Tensor:
        return (i + (window - window // 2 if attn.shifted and n > window and not still else 0)) // window

    allowed = torch.ones(H * W, H * W, dtype=torch.bool)
    for i, window, n in ((ys, wy, H), (xs, wx, W)):
        cells = cell(i, window, n)
        allowed &= cells[:, None] == cells[None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("window", "pretrained"), [((4, 4), None), ((3, 5), (4, 2)), ((1, 4), (1, 1))])
@pytest.mark.parametrize("size", [(8, 12), (9, 7), (4, 11), (3, 5), (1, 1), (4, 8)])
def test_attention_and_its_gradients_are_those_written_out(
    size: tuple[int, int], window: tuple[int, int], pretrained: tuple[int, int] | None, shifted: bool
) -> None:
    attn = attention(window, shifted, pretrained_window_size=pretrained).double()
    with torch.no_grad():
        # one head beyond the clamp
        attn.logit_scale.copy_(torch.tensor([4.7, 1.1])[:, None, None])
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, *size, 16, dtype=torch.float64)
    results = []
    for y in (attn(x), written_out(attn, x)):
        inputs = [x, *attn.parameters()]
        results.append([y, *torch.autograd.grad((y * direction).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_key_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, dtype=torch.float16, requires_grad=True)
    y = unit(x)
    assert y.dtype == torch.float32
    assert not y.any()
    (1e3 * y).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_without_qkv_bias_there_is_none() -> None:
    attn = attention(qkv_bias=False)
    assert not any(name.startswith(("q_", "v_", "qkv.bias")) for name in attn.state_dict())
    assert attn(torch.randn(1, 5, 6, 16)).shape == (1, 5, 6, 16)


@pytest.mark.parametrize("options", [{}, {"window_size": 8, "pretrained_window_sizes": (4, 6)}])
def test_weights_of_timms_own_swin_v2_give_timms_logits(options: dict[str, Any]) -> None:
    theirs = randomise(timm.create_model("swinv2_tiny_window8_256", **TIMM | options)).eval()
    ours = nearfield.create_model("swinv2_tiny_window8", **TIMM | options).eval()
    ours.load_state_dict(theirs.state_dict())
    resized = nearfield.create_model("swinv2_tiny_window8", **TIMM | {"img_size": 32, "window_size": 2}).eval()
    resized.load_state_dict(theirs.state_dict())
    resized.set_input_size(64, **{"window_size": 4} | options)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(x)
        for model in (ours, resized):
            got = model(x)
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_microsofts_files_load_with_their_buffers_and_go_back() -> None:
    theirs = randomise(timm.create_model("swinv2_tiny_window8_256", **TIMM))
    file = {}
    for key, value in theirs.state_dict().items():
        # the downsampler stands at the end of the stage before, the classifier is the head itself
        if key.startswith("layers.1.downsample"):
            key = key.replace("layers.1", "layers.0")
        file[key.replace("head.fc", "head")] = value
    buffers = {}
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        block = f"layers.{i}.blocks.{j}"
        buffers[f"{block}.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
        buffers[f"{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    buffers["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    ours = nearfield.create_model("swinv2_tiny_window8", **TIMM)
    ours.load_state_dict({"model": {**file, **buffers}})
    for layout, expected in (("microsoft", file), ("timm", theirs.state_dict())):
        back = export_state_dict(ours, layout)
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], expected[key]) for key in back)


def test_windows_grow_as_the_authors_fine_tuning_has_it() -> None:
    """12 at 192 to 16 at 256: the network sees the displacements of before, and further ones."""
    kwargs = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": 2, "num_classes": 7}
    model = nearfield.create_model("swinv2_base_window12_22k", **kwargs).eval()
    tables = [stage.blocks[0].attn.bias_table() for stage in model.stages]
    assert [tuple(table.shape) for table in tables] == [(2, 23, 23)] * 3 + [(2, 11, 11)]
    model.set_input_size(256, window_size=16)
    finetuned = nearfield.create_model("swinv2_base_window16_22k", **kwargs).eval()
    finetuned.load_state_dict(model.state_dict())
    for before, stage, other in zip(tables, model.stages, finetuned.stages, strict=True):
        after = stage.blocks[0].attn.bias_table()
        wider = (after.shape[1] - before.shape[1]) // 2
        assert wider in (4, 2)
        torch.testing.assert_close(after[:, wider:-wider, wider:-wider], before)
        torch.testing.assert_close(after, other.blocks[0].attn.bias_table())
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(model(x), finetuned(x))


def test_set_input_size_changes_windows_and_no_weight(small: Small) -> None:
    model = small("swinv2_tiny_window8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(img_size=(64, 96), window_size=(4, 6))
    assert [stage.blocks[1].attn.window_size for stage in model.stages] == [(4, 6), (4, 6), (4, 6), (2, 3)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    built = small("swinv2_tiny_window8", img_size=(64, 96), window_size=(4, 6))
    assert all(
        a.blocks[0].attn.window_size == b.blocks[0].attn.window_size
        for a, b in zip(model.stages, built.stages, strict=True)
    )
    for sizes, word in (
        ({"window_size": 0}, "window_size"),
        ({"pretrained_window_sizes": (8, 8, 8, -1)}, "pretrained_window_sizes"),
        ({"kernel_size": 5}, "kernel_size"),
    ):
        with pytest.raises(ValueError, match=word):
            model.set_input_size(img_size=32, **sizes)
        assert model.img_size == (64, 96)
        assert model.stages[0].blocks[0].attn.window_size == (4, 6)


def test_the_table_is_kept_only_while_it_is_true() -> None:
    attn = attention().eval()

    def step_that_nobody_counts() -> None:
        attn.train().cpb_mlp[0].bias.data.add_(1.0)
        attn.eval()

    with torch.inference_mode():
        first = attn.bias_table()
        assert attn.bias_table() is first
    # kept in inference mode, and yet good for training
    assert not first.is_inference()
    assert attn.bias_table().requires_grad
    with torch.no_grad():
        assert attn.bias_table() is first
        for change in (
            lambda: attn.cpb_mlp[2].weight.mul_(1.5),
            lambda: attn.load_state_dict(attention().state_dict()),
            lambda: attn.load_state_dict(attention().state_dict(), assign=True),
            lambda: attn.set_window((3, 5), None),
            lambda: attn.set_window((3, 5), (4, 4)),
            lambda: attn.double(),
            step_that_nobody_counts,
        ):
            before = attn.bias_table()
            change()
            after = attn.bias_table()
            assert after is not before
            assert torch.equal(after, attn._table())
            assert attn.bias_table() is after
    attn.train()
    with torch.no_grad():
        assert attn.bias_table() is not attn.bias_table()


def test_copies_do_not_share_what_is_kept() -> None:
    attn = attention().eval()
    with torch.no_grad():
        kept = attn.bias_table()
        for other in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
            randomise(other)
            assert torch.equal(other.bias_table(), other._table())
            assert not torch.equal(other.bias_table(), kept)
        swapped = {key: torch.randn_like(value) for key, value in attn.state_dict().items()}
        x = torch.randn(1, 4, 4, 16)
        other = attention().eval()
        other.load_state_dict(swapped)
        assert torch.equal(torch.func.functional_call(attn, swapped, (x,)), other(x))
        assert attn.bias_table() is kept


def test_the_table_stays_single_precision() -> None:
    attn = attention().eval()
    with torch.no_grad():
        exact = attn.bias_table()
        attn.train()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attn.bias_table(), exact)
        assert attn.bfloat16().bias_table().dtype == torch.float32
        assert attn.double().bias_table().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype: torch.dtype) -> None:
    attn = attention((8, 8)).eval()
    with torch.no_grad():
        attn.logit_scale.fill_(math.log(10))
        x = torch.randn(2, 16, 16, 16)
        expected = attn(x)
        with torch.autocast("cpu", dtype):
            mixed = attn(x)
        half = attn.to(dtype)(x.to(dtype))
    # operands of cosines are rounded to eps / 2 and multiplied by 10; the rest is sums of a few rounded terms
    limit = 20 * torch.finfo(dtype).eps
    for got in (mixed, half):
        assert got.dtype == dtype
        assert (got.float() - expected).norm() <= limit * expected.norm()


def test_weights_begin_as_published(small: Small) -> None:
    model = small("swinv2_tiny_window8")
    with torch.device("meta"):
        other = small("swinv2_tiny_window8")
    other.to_empty(device="cpu")
    for p in other.parameters():
        nn.init.constant_(p, float("nan"))
    other.init_weights()
    for one in (model, other):
        for name, p in one.named_parameters():
            if name.endswith("logit_scale"):
                assert torch.equal(p, torch.full_like(p, math.log(10))), name
            elif name == "stem.proj.bias":
                continue
            elif name.endswith("bias") or (".blocks." in name and "norm" in name):
                assert not p.any(), name
            elif "norm" in name:
                assert (p == 1).all(), name
            elif name != "stem.proj.weight":
                assert 0.01 < p.std() < 0.03, name


def test_networks_and_scales_take_no_decay(small: Small) -> None:
    model = small("swinv2_tiny_window8")
    named = model.no_weight_decay()
    parts = {name.partition(".attn.")[2] for name in named}
    assert parts == {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"}
    assert len(named) == 4 * sum(len(stage.blocks) for stage in model.stages)


@pytest.mark.parametrize(
    ("window", "windows"), [(8, (8, 8, 8, 8)), (12, (12, 12, 12, 6)), (16, (16, 16, 16, 8)), (24, (24, 24, 24, 12))]
)
def test_windows_are_the_published_ones(window: int, windows: tuple[int, ...]) -> None:
    names = nearfield.list_models(f"swinv2_*_window{window}*")
    assert names
    for name in names:
        for stage, size in zip(on_meta(name).stages, windows, strict=True):
            assert {block.attn.window_size for block in stage.blocks} == {(size, size)}


@pytest.mark.parametrize("name", nearfield.list_models("swinv2_*_22k"))
def test_networks_of_22k_models_are_normalised_to_their_pre_training(name: str) -> None:
    with torch.device("meta"):
        model = nearfield.create_model(name)
    blocks = [stage.blocks[1].attn.pretrained_window_size for stage in model.stages]
    assert blocks == [(12, 12), (12, 12), (12, 12), (6, 6)]


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"window_size": -7}, "window_size"),
        ({"window_size": (8, 8, 8)}, "window_size"),
        ({"pretrained_window_sizes": (12, 12, 6)}, "pretrained_window_sizes"),
        ({"num_heads": 5}, "num_heads=5"),
    ],
)
def test_impossible_arguments_are_named(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        SwinV2(**kwargs)


def test_projections_are_called_as_modules() -> None:
    """So that hooks, adapters and quantised layers in their place take part."""
    attn, seen = attention().eval(), []
    for module in (attn.qkv, attn.proj, attn.cpb_mlp, attn.cpb_mlp[0]):
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        attn(torch.randn(1, 8, 8, 16))
    assert set(seen) == {attn.qkv, attn.proj, attn.cpb_mlp, attn.cpb_mlp[0]}
