"""MaxViT against timm's code, against its definition at sizes that timm refuses, and its published settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import timm
import torch
from model_helpers import multiply_adds, on_meta, randomise
from nearfield.checkpoints import CheckpointMismatch
from nearfield.models import Backbone, catalog, export_state_dict, models_that_fit
from nearfield.models.maxvit import HeadsFirst, LogMlpAttention, MaxViT, MBConv, PartitionAttention
from nearfield.ops import Grid, Window, resize_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Small = Callable[..., Backbone]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("maxvit_tiny", "maxvit_tiny_tf_224"),
        ("maxvit_tiny_512", "maxvit_tiny_tf_512"),
        ("maxvit_nano_rw", "maxvit_nano_rw_256"),
        ("maxvit_rmlp_small_rw", "maxvit_rmlp_small_rw_224"),
    ],
)
def test_flops_are_those_of_timms_model_by_the_same_counter(name: str, theirs: str) -> None:
    ours = on_meta(name)
    with torch.device("meta"):
        model = timm.create_model(theirs).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *ours.img_size, device="meta"))
    work = multiply_adds(ours)
    assert 2 * (work["products"] + work["look-ups"]) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "size", "dims", "depths", "stem"),
    [
        ("maxvit_tiny", 7, (64, 128, 256, 512), (2, 2, 5, 2), (64, 64)),
        ("maxvit_small_384", 12, (96, 192, 384, 768), (2, 2, 5, 2), (64, 64)),
        ("maxvit_base_512", 16, (96, 192, 384, 768), (2, 6, 14, 2), (64, 64)),
        ("maxvit_large", 7, (128, 256, 512, 1024), (2, 6, 14, 2), (128, 128)),
        ("maxvit_xlarge", 7, (192, 384, 768, 1536), (2, 6, 14, 2), (192, 192)),
        ("maxvit_rmlp_pico_rw", 8, (32, 64, 128, 256), (2, 2, 5, 2), (24, 32)),
        ("maxvit_rmlp_base_384_rw", 12, (96, 192, 384, 768), (2, 6, 14, 2), (32, 64)),
    ],
)
def test_shapes_are_the_published_ones(
    name: str, size: int, dims: tuple[int, ...], depths: tuple[int, ...], stem: tuple[int, int]
) -> None:
    model = on_meta(name)
    assert [info["num_chs"] for info in model.feature_info] == list(dims)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert [len(stage.blocks) for stage in model.stages] == list(depths)
    assert (model.stem.conv1.out_channels, model.stem.conv2.out_channels) == stem
    attentions = [m for m in model.modules() if isinstance(m, PartitionAttention)]
    assert len(attentions) == 2 * sum(depths)
    assert {attn.size for attn in attentions} == {(size, size)}
    assert all(attn.qkv.in_features == 32 * attn.num_heads for attn in attentions)


# timm's models, as small as they get

SMALL = {"depths": (1, 2, 1), "num_classes": 5}
PAIRS = [
    ("maxvit_tiny", "maxvit_tiny_tf_224", 16, {"head_hidden_size": 128}),
    ("maxvit_tiny_rw", "maxvit_tiny_rw_224", (16, 24), {}),
    ("maxvit_rmlp_tiny_rw", "maxvit_rmlp_tiny_rw_256", (16, 32), {}),
    ("maxvit_rmlp_small_rw", "maxvit_rmlp_small_rw_224", (16, 32), {}),
    ("maxvit_rmlp_base_rw", "maxvit_rmlp_base_rw_224", (16, 32), {"head_hidden_size": 128}),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[0])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of timm with random weights, and ours with none yet."""
    name, theirs, stem, options = request.param
    options = options | {"embed_dim": (32, 64, 128), "stem_width": stem, "img_size": (96, 64), **SMALL}
    model = randomise(timm.create_model(theirs, **options)).eval()
    return model, nearfield.create_model(name, embed_dim=32, stem_width=stem, img_size=(96, 64), **SMALL).eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert theirs.std() > 0.01


def test_weights_of_timms_models_give_timms_logits(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 96, 192)
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))
        assert_close(ours.forward_features(x).permute(0, 3, 1, 2), theirs.forward_features(x))
    back = export_state_dict(ours, "timm")
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())
    if not hasattr(ours.stages[0].blocks[0].grid.attn, "rel_pos_mlp"):
        return
    # other sizes of windows, for which the tables are made anew
    for model in (ours, theirs):
        model.set_input_size(img_size=(128, 160))
    x = torch.randn(1, 3, 128, 160)
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))


def test_gradients_are_timms(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 64)
    for model in pair:
        model(x).square().sum().backward()
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    got = type(ours).layouts[0].to_theirs({key: p.grad for key, p in ours.named_parameters()})
    assert got.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    for key, gradient in expected.items():
        assert (got[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * scale, key


def test_the_two_lines_are_told_apart_by_their_keys() -> None:
    with torch.device("meta"):
        tf, rw = (timm.create_model(name).state_dict() for name in ("maxvit_tiny_tf_224", "maxvit_tiny_rw_224"))
    assert models_that_fit(tf) == ["maxvit_tiny"]
    assert models_that_fit(rw) == ["maxvit_tiny_rw"]
    without_head = {key: value for key, value in rw.items() if not key.startswith("head.")}
    assert models_that_fit(without_head) == ["maxvit_tiny_rw"]
    with pytest.raises(CheckpointMismatch, match="it fits maxvit_tiny made with"), torch.device("meta"):
        nearfield.create_model("maxvit_tiny_rw").load_state_dict(tf)


def test_heads_first_moves_every_row_and_back() -> None:
    heads, dim = 3, 4
    theirs = torch.arange(3 * heads * dim)[:, None] * torch.ones(1, 2)
    ours = HeadsFirst(dim).to_ours(theirs, None)
    for part in range(3):
        for head in range(heads):
            for channel in range(dim):
                row = (part * heads + head) * dim + channel
                assert torch.equal(ours[row], theirs[(head * 3 + part) * dim + channel])
    assert torch.equal(HeadsFirst(dim).to_theirs(ours), theirs)
    for shape in ((10, 2), (0, 2), ()):
        with pytest.raises(CheckpointMismatch, match="3 x 4"):
            HeadsFirst(dim).to_ours(torch.zeros(shape), None)


# sizes that timm refuses


def cells(n: int, size: int, partition: type) -> Tensor:
    """The cell of each of n coordinates, written from section 3.2: of the map padded to a multiple, padding masked."""
    number = -(-n // size)
    i = torch.arange(n)
    return i // size if partition is Window else i % number


def steps(n: int, size: int, partition: type) -> Tensor:
    """Place of each coordinate inside its cell."""
    i = torch.arange(n)
    return i % size if partition is Window else i // -(-n // size)


@pytest.mark.parametrize("kind", [PartitionAttention, LogMlpAttention])
@pytest.mark.parametrize("partition", [Window, Grid])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (5, 4), (3, 13), (1, 1)])
def test_attention_at_any_size_is_padded_and_masked(size: tuple[int, int], partition: type, kind: type) -> None:
    attn = kind(16, 2, partition, (4, 3)).double().eval()
    nn.init.normal_(attn.qkv.bias)
    if kind is PartitionAttention:
        nn.init.normal_(attn.rel_pos_bias)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    H, W = size
    coordinates = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    same, places = [], []
    for axis, (n, cell) in enumerate(zip(size, (4, 3), strict=True)):
        where = coordinates[:, axis]
        group = cells(n, cell, partition)[where]
        same.append(group[None] == group[:, None])
        place = steps(n, cell, partition)[where]
        places.append((place[None] - place[:, None] + cell - 1).clamp(0, 2 * cell - 2))
    bias = attn.position_bias(H, W)[:, places[0], places[1]]
    q, k, v = attn.qkv(x).reshape(2, H * W, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * 8**-0.5 + bias).masked_fill(~(same[0] & same[1]), float("-inf"))
    expected = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, H, W, 16))
    torch.testing.assert_close(attn(x), expected)


def test_the_mlps_table_is_odd_in_nothing_but_the_logarithm_of_the_displacement() -> None:
    attn = LogMlpAttention(32, 2, Window, (3, 5)).eval()
    table = attn.position_bias(3, 5)
    assert table.shape == (2, 5, 9)
    for dy, dx in ((0, 0), (2, -4), (-1, 3)):
        point = torch.tensor([-dy, -dx], dtype=torch.float32)
        expected = attn.rel_pos_mlp(point.sign() * point.abs().log1p())
        torch.testing.assert_close(table[:, dy + 2, dx + 4], expected)


def test_the_mlps_table_is_kept_only_while_it_is_true() -> None:
    attn = LogMlpAttention(32, 2, Window, (3, 5)).eval()
    with torch.inference_mode():
        first = attn.position_bias(3, 5)
        assert attn.position_bias(9, 9) is first
    assert attn.position_bias(3, 5).requires_grad
    with torch.no_grad():
        for change in (
            lambda: attn.rel_pos_mlp.fc2.weight.mul_(1.5),
            lambda: attn.set_size((4, 4)),
            lambda: attn.double(),
        ):
            before = attn.position_bias(3, 5)
            change()
            after = attn.position_bias(3, 5)
            assert after is not before
            assert torch.equal(after, attn._table())
        # its MLP has a dropout
        attn.train()
        assert attn.position_bias(3, 5) is not attn.position_bias(3, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert attn.half().eval().position_bias(3, 5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_mlps_table_is_made_in_replicas(dtype: torch.dtype) -> None:
    """Those of nn.DataParallel have weights, which are no parameters."""
    attn = LogMlpAttention(32, 2, Window, (3, 5)).to(dtype).eval()
    for layer in (attn.rel_pos_mlp.fc1, attn.rel_pos_mlp.fc2):
        for key in ("weight", "bias"):
            value = getattr(layer, key).detach()
            delattr(layer, key)
            setattr(layer, key, value)
    assert not list(attn.rel_pos_mlp.parameters())
    with torch.no_grad():
        assert attn.position_bias(3, 5).isfinite().all()


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (1, 4)])
def test_the_shortcut_takes_means_over_what_there_is(size: tuple[int, int]) -> None:
    block = MBConv(8, 8, 2, 4.0, MaxViT.conv, 0.0).eval()
    nn.init.zeros_(block.conv3.weight)
    nn.init.zeros_(block.conv3.bias)
    x = torch.randn(1, *size, 8)
    y = block(x)
    assert y.shape == (1, -(-size[0] // 2), -(-size[1] // 2), 8)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            corner = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(0, 1).mean(0)
            torch.testing.assert_close(y[0, i, j], corner)


# sizes, heads


def test_windows_and_grids_follow_the_nominal_size_unless_given(small: Small) -> None:
    def sizes(model: Any) -> set[tuple[Any, Any]]:
        return {(block.window.attn.size, block.grid.attn.size) for stage in model.stages for block in stage.blocks}

    model = small("maxvit_tiny", img_size=(224, 160))
    assert sizes(model) == {((7, 5), (7, 5))}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(img_size=384)
    assert sizes(model) == {((12, 12), (12, 12))}
    for key, value in model.state_dict().items():
        expected = resize_table(before[key], (23, 23)) if key.endswith("rel_pos_bias") else before[key]
        assert torch.equal(value, expected)
    model.set_input_size(window_size=4, grid_size=(3, 5))
    assert sizes(model) == {((4, 4), (3, 5))}
    model.set_input_size(img_size=64)
    assert sizes(model) == {((4, 4), (3, 5))}
    assert model(torch.randn(1, 3, 70, 50)).shape == (1, 7)
    assert sizes(small("maxvit_rmlp_tiny_rw", window_size=6)) == {((6, 6), (3, 3))}
    for wrong in ({"window_size": 0}, {"grid_size": (1, 2, 3)}, {"kernel_size": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.set_input_size(img_size=128, **wrong)
        assert sizes(model) == {((4, 4), (3, 5))}
        assert model.img_size == (64, 64)


def test_a_hidden_head_goes_with_pruning_and_only_then(small: Small) -> None:
    model = small("maxvit_tiny")
    model.reset_classifier(0)
    hidden = {key for key in model.state_dict() if key.startswith("head.")}
    assert {key.rsplit(".", 1)[0] for key in hidden} == {"head.norm", "head.pre_logits.fc"}
    assert not any(prefix.startswith("head.norm") or prefix == "head." for prefix in model.pruned_prefixes())
    model.prune_intermediate_layers([1])
    assert not any(key.startswith(("head.", "norm.")) for key in model.state_dict())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 8, 8, 64)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"global_pool": "catavgmax"}, "global_pool must be one of .*'catavgmax'"),
        ({"head_dim": 48}, "head_dim=48"),
        ({"stem_stride": 8}, "stem_stride"),
        ({"stem_width": 0}, "stem_width"),
        ({"window_size": -1}, "window_size"),
    ],
)
def test_impossible_arguments_are_named(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word), torch.device("meta"):
        nearfield.create_model("maxvit_tiny", **kwargs)
    if "global_pool" in kwargs:
        with pytest.raises(ValueError, match=word), torch.device("meta"):
            nearfield.create_model("maxvit_tiny").reset_classifier(3, **kwargs)


def test_an_image_alone_and_in_a_batch_give_the_same(small: Small) -> None:
    for name in ("maxvit_tiny", "maxvit_rmlp_base_rw"):
        model, x = small(name), torch.randn(3, 3, 50, 70)
        with torch.inference_mode():
            torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_stochastic_depth_is_as_published() -> None:
    rates = {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6}
    for size, rate in rates.items():
        assert catalog.get(f"maxvit_{size}").kwargs["drop_path_rate"] == rate
    model = on_meta("maxvit_tiny")
    last = model.stages[-1].blocks[-1]
    for drop in (last.mbconv.drop_path, last.window.drop_path1, last.window.drop_path2, last.grid.drop_path2):
        assert drop.drop_prob == pytest.approx(0.2)
    assert isinstance(model.stages[0].blocks[0].mbconv.drop_path, nn.Identity)


def test_heads_of_timms_line_have_32_channels() -> None:
    # the order of the rows of its projections could not be told otherwise
    with pytest.raises(ValueError, match="head_dim=16"), torch.device("meta"):
        nearfield.create_model("maxvit_tiny_rw", head_dim=16)
