"""What the families' attention does beyond the operator: padding, shift, sizes that change."""

from __future__ import annotations

from collections.abc import Callable

import nearfield
import pytest
import torch
import torch.nn.functional as F
from nearfield.models import Backbone
from nearfield.models.nat import NAT, NeighborhoodAttention
from nearfield.models.swin import Swin, WindowAttention
from torch import Tensor

Small = Callable[..., Backbone]


def dense(attn: NeighborhoodAttention | WindowAttention, x: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """Attention of tokens (B, N, C) under an N x N mask and a (heads, N, N) bias, written out."""
    B, N, C = x.shape
    heads = attn.num_heads
    q, k, v = attn.qkv(x).reshape(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = (q * (C // heads) ** -0.5) @ k.transpose(-1, -2) + bias
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


def shifted_window_attention(attn: WindowAttention, x: Tensor) -> Tensor:
    """Swin as published: pad, roll by -shift, cut into windows, mask by region, roll back, crop."""
    H, W = x.shape[1:3]
    wy, wx = attn.window_size
    x = F.pad(x, (0, 0, 0, -W % wx, 0, -H % wy))
    height, width = x.shape[1:3]
    sy, sx = ((w // 2 if attn.shifted and n > w else 0) for w, n in ((wy, height), (wx, width)))
    if (height, width) == (H, W) and (height <= wy or width <= wx):
        sy = sx = 0  # the classifier's rule: min(input_resolution) <= window_size
    region = torch.zeros(height, width)
    for i, y in enumerate((slice(0, -wy), slice(-wy, -sy or None), slice(-sy, None) if sy else slice(0, 0))):
        for j, z in enumerate((slice(0, -wx), slice(-wx, -sx or None), slice(-sx, None) if sx else slice(0, 0))):
            region[y, z] = 3 * i + j
    rolled = torch.roll(x, (-sy, -sx), (1, 2))
    out = torch.zeros_like(rolled)
    ys, xs = torch.meshgrid(torch.arange(wy), torch.arange(wx), indexing="ij")
    ys, xs = ys.flatten(), xs.flatten()
    # row [query, key] of the key-minus-query table
    bias = attn.rel_pos_bias[:, ys[None] - ys[:, None] + wy - 1, xs[None] - xs[:, None] + wx - 1]
    for top in range(0, height, wy):
        for left in range(0, width, wx):
            cell = (slice(None), slice(top, top + wy), slice(left, left + wx))
            labels = region[cell[1:]].flatten()
            y = dense(attn, rolled[cell].flatten(1, 2), labels[None] == labels[:, None], bias)
            out[cell] = y.unflatten(1, (wy, wx))
    return torch.roll(out, (sy, sx), (1, 2))[:, :H, :W]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [(4, 4), (3, 5)])
@pytest.mark.parametrize("size", [(8, 12), (12, 15), (9, 7), (4, 11), (3, 5), (1, 1), (2, 16), (4, 8), (3, 10)])
def test_window_attention_is_the_published_roll_and_mask(
    size: tuple[int, int], window: tuple[int, int], shifted: bool
) -> None:
    attn = WindowAttention(16, 2, window, shifted).double()
    torch.nn.init.normal_(attn.rel_pos_bias)
    torch.nn.init.normal_(attn.qkv.bias)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(attn(x), shifted_window_attention(attn, x))


@pytest.mark.parametrize("size", [(9, 11), (6, 6), (5, 9), (4, 4), (1, 13)])
def test_neighborhood_attention_pads_a_small_map_before_qkv(size: tuple[int, int]) -> None:
    attn = NeighborhoodAttention(16, 2, (3, 3), (2, 2)).double()
    torch.nn.init.normal_(attn.rel_pos_bias)
    torch.nn.init.normal_(attn.qkv.bias)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    H, W = size
    height, width = max(H, 6), max(W, 6)
    ys, xs = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))

    def axis(i: Tensor, n: int) -> Tensor:
        # three members of the residue class of i, moved inward at its ends
        length = (n - i % 2 + 1) // 2
        first = torch.minimum((i // 2 - 1).clamp(min=0), length - 3)
        j = i[None]
        return (j % 2 == i[:, None] % 2) & (j // 2 >= first[:, None]) & (j // 2 < first[:, None] + 3)

    def steps(i: Tensor) -> Tensor:
        return ((i[None] - i[:, None]).div(2, rounding_mode="floor") + 2).clamp(0, 4)

    allowed = axis(ys, height) & axis(xs, width)
    bias = attn.rel_pos_bias[:, steps(ys), steps(xs)]
    padded = F.pad(x, (0, 0, 0, width - W, 0, height - H))
    expected = dense(attn, padded.flatten(1, 2), allowed, bias).unflatten(1, (height, width))[:, :H, :W]
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("member_of", ["swin_tiny", "dinat_s_tiny", "nat_tiny"])
def test_an_image_alone_and_in_a_batch_give_the_same(member_of: str, small: Small) -> None:
    model, x = small(member_of), torch.randn(3, 3, 50, 70)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize(
    ("img_size", "window", "expected"),
    [
        (224, 7, [(7, 7)] * 4),
        (160, 7, [(7, 7), (7, 7), (7, 7), (5, 5)]),
        ((160, 448), 7, [(7, 7), (7, 7), (7, 7), (5, 5)]),
        ((160, 448), (7, 14), [(7, 14), (7, 14), (7, 14), (5, 14)]),
        (32, 7, [(7, 7), (4, 4), (2, 2), (1, 1)]),
        (256, (8, 8, 8, 4), [(8, 8), (8, 8), (8, 8), (4, 4)]),
    ],
)
def test_swin_window_is_no_larger_than_the_map_at_the_nominal_size(
    img_size: int | tuple[int, int],
    window: int | tuple[int, ...],
    expected: list[tuple[int, int]],
    small: Small,
) -> None:
    built = small("swin_tiny", img_size=img_size, window_size=window)
    resized = small("swin_tiny")
    resized.set_input_size(img_size=img_size, window_size=window)
    for model in (built, resized):
        assert [stage.blocks[1].attn.window_size for stage in model.stages] == expected
        for (y, x), stage in zip(expected, model.stages, strict=True):
            assert stage.blocks[0].attn.rel_pos_bias.shape[1:] == (2 * y - 1, 2 * x - 1)
        assert model(torch.randn(1, 3, 36, 44)).shape == (1, 7)


def test_set_input_size_resizes_tables_bicubically_and_keeps_the_rest(small: Small) -> None:
    model = small("swin_tiny")
    for p in model.parameters():
        torch.nn.init.normal_(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.stages[0].blocks[0].attn.rel_pos_bias.requires_grad_(False)
    model.set_input_size(window_size=12, img_size=384)
    assert model.img_size == (384, 384)
    for key, value in model.state_dict().items():
        if key.endswith("rel_pos_bias"):
            assert torch.equal(value, nearfield.ops.resize_table(before[key], (23, 23)))
        else:
            assert torch.equal(value, before[key])
    assert not model.stages[0].blocks[0].attn.rel_pos_bias.requires_grad
    assert model.stages[0].blocks[1].attn.rel_pos_bias.requires_grad


def test_set_input_size_of_nat_takes_kernel_and_dilations(small: Small) -> None:
    model = small("dinat_mini")
    dilations = [[block.attn.dilation for block in stage.blocks] for stage in model.stages]
    model.set_input_size(img_size=(64, 96), kernel_size=5)
    assert [[block.attn.dilation for block in stage.blocks] for stage in model.stages] == dilations
    assert {block.attn.rel_pos_bias.shape[1:] for stage in model.stages for block in stage.blocks} == {(9, 9)}
    model.set_input_size(dilations=(1, (1, 2), 1, 1))
    assert [block.attn.dilation for block in model.stages[1].blocks] == [(1, 1), (2, 2)]
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 7)


def test_set_input_size_changes_nothing_when_refused(small: Small) -> None:
    for name, sizes, word in (
        ("swin_tiny", {"window_size": (7, 7, 7)}, "window_size"),
        ("swin_tiny", {"window_size": 0}, "window_size"),
        ("swin_tiny", {"kernel_size": 5}, "kernel_size"),
        ("nat_mini", {"kernel_size": (7, 7, 7, -1)}, "kernel_size"),
        ("nat_mini", {"dilations": (1, 1)}, "dilations"),
        ("nat_mini", {"window_size": 5}, "window_size"),
    ):
        model = small(name)
        before = {key: value.shape for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=word):
            model.set_input_size(img_size=64, **sizes)
        assert model.img_size == (224, 224)
        assert {key: value.shape for key, value in model.state_dict().items()} == before


def test_input_size_of_features_is_set_through_the_wrapper() -> None:
    model = nearfield.create_model("swin_nano", features_only=True, out_indices=(0, 1))
    model.set_input_size(img_size=64, window_size=8)
    assert {block.attn.window_size for stage in model.backbone.stages for block in stage.blocks} == {(8, 8)}
    assert [y.shape[-1] for y in model(torch.randn(1, 3, 64, 64))] == [32, 16]
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.stages)
    assert {"model.stages.0.blocks.0.attn.rel_pos_bias"} < model.no_weight_decay() < set(model.state_dict())


@pytest.mark.parametrize(
    ("family", "kwargs", "word"),
    [
        (NAT, {"dilations": (1, 1, 1)}, "4 stages"),
        (NAT, {"dilations": (1, (1, 2), 1, 1)}, r"dilations\[1\]"),
        (NAT, {"dilations": (0, 1, 1, 1)}, r"dilations\[0\]"),
        (NAT, {"kernel_size": 0}, "kernel_size"),
        (NAT, {"kernel_size": (7, 7, 7)}, "kernel_size"),
        (NAT, {"num_heads": (2, 4, 8)}, "num_heads"),
        (NAT, {"num_heads": 5}, "num_heads=5"),
        (NAT, {"stem_stride": 8}, "stem_stride"),
        (Swin, {"window_size": -7}, "window_size"),
        (Swin, {"img_size": (224, 224, 3)}, "img_size"),
    ],
)
def test_impossible_arguments_are_named(family: type[Backbone], kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        family(**kwargs)


def test_dilation_and_kernel_per_axis_are_taken(small: Small) -> None:
    model = small("nat_mini", kernel_size=((3, 5), 3, 3, 3), dilations=(((2, 1), 1), 1, 1, 1))
    first = model.stages[0].blocks[0].attn
    assert (first.kernel_size, first.dilation) == ((3, 5), (2, 1))
    assert first.rel_pos_bias.shape == (1, 5, 9)
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 7)
