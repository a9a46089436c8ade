"""Segmentors: published sizes, any image, training in the cases that break, groups for layer decay, errors."""

from __future__ import annotations

from typing import Any

import nearfield
import pytest
import torch
from nearfield.models.dense.convs import ConvNormReLU
from nearfield.models.dense.segmentation import Segmentor
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

heads = pytest.mark.parametrize("head", ["upernet", "fpn"])


def small(backbone: str = "nat_nano", head: str = "upernet", **options: Any) -> Segmentor:
    sizes = {"num_classes": 3, "channels": 16, "aux_channels": 8, "fpn_channels": 16}
    return nearfield.create_segmentor(backbone, head, **{**sizes, **options})


# UPerNet for 150 classes with its auxiliary head, in millions: table 3 of Swin's paper, and segmentation/NAT.md and
# DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer
@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        ("swin_tiny", 60),
        ("swin_small", 81),
        ("swin_base", 121),
        ("nat_mini", 50),
        ("nat_tiny", 58),
        ("nat_small", 82),
        ("nat_base", 123),
        ("dinat_mini", 50),
        ("dinat_s_tiny", 60),
        ("dinat_s_large", 234),
    ],
)
def test_upernet_has_the_published_number_of_parameters(backbone: str, published: int) -> None:
    with torch.device("meta"):
        model = nearfield.create_segmentor(backbone, num_classes=150)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published


@heads
@pytest.mark.parametrize("backbone", ["nat_nano", "swin_nano", "biformer_nano", "hwt_nano"])
def test_logits_have_the_size_of_the_image(backbone: str, head: str) -> None:
    model = small(backbone, head, aux=True)
    for size in ((32, 32), (33, 47), (64, 40), (37, 129)):
        x = torch.randn(2, 3, *size)
        out = model.train()(x)
        assert {key: y.shape for key, y in out.items()} == dict.fromkeys(("out", "aux"), (2, 3, *size))
        assert model.eval()(x).shape == (2, 3, *size)


def test_without_auxiliary_head_training_gives_the_logits_alone() -> None:
    x = torch.randn(2, 3, 32, 32)
    assert list(small(aux=False)(x)) == ["out"]
    assert list(small(head="fpn")(x)) == ["out"]
    assert list(small(head="fpn", aux=True)(x)) == ["out", "aux"]


def test_a_model_of_timm_is_a_backbone_too() -> None:
    model = small("resnet10t", in_chans=1)
    assert model.backbone.strides == [4, 8, 16, 32]
    assert model.eval()(torch.randn(1, 1, 45, 64)).shape == (1, 3, 45, 64)


@heads
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_image_of_one_token_trains(head: str, norm: str) -> None:
    model = small("nat_nano", head, norm=norm, aux=True, stem_stride=4, img_size=64)
    assert model.backbone.strides[-1] == 16
    out = model(torch.randn(1, 3, 32, 32))
    sum(y.square().mean() for y in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_a_single_value_per_channel_is_normed_by_the_running_statistics() -> None:
    conv = ConvNormReLU(4, 6, 1)
    x = torch.randn(1, 4, 1, 1)
    conv(torch.randn(2, 4, 3, 3))
    before = {key: value.clone() for key, value in conv.state_dict().items()}
    trained = conv(x)
    assert all(torch.equal(value, before[key]) for key, value in conv.state_dict().items())
    torch.testing.assert_close(trained, conv.eval()(x))
    # two values are enough for statistics
    conv.train()(torch.randn(2, 4, 1, 1))
    assert not torch.equal(conv.norm.get_buffer("running_mean"), before["norm.running_mean"])


@heads
def test_half_precision_trains(head: str) -> None:
    model = small(head=head, aux=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3, 40, 56))
    target = torch.randint(0, 3, (2, 40, 56))
    sum(F.cross_entropy(y.float(), target) for y in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _squares(count: int) -> tuple[Tensor, Tensor]:
    """Noise with a red and a blue square, and which pixel is which; a border is ignored."""
    images, labels = torch.randn(count, 3, 48, 64) * 0.3, torch.zeros(count, 48, 64, dtype=torch.long)
    for i in range(count):
        for label, channel in ((1, 0), (2, 2)):
            y, x = 4 + 20 * ((label + i) % 2), 8 + 24 * (label - 1)
            images[i, channel, y : y + 18, x : x + 18] += 3
            labels[i, y : y + 18, x : x + 18] = label
    labels[:, :2] = 255
    return images, labels


@heads
def test_two_images_are_learned(head: str) -> None:
    torch.manual_seed(0)
    images, labels = _squares(2)
    model = small("swin_nano", head, dropout=0.0, channels=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(30):
        losses = {key: F.cross_entropy(y, labels, ignore_index=255) for key, y in model(images).items()}
        optimizer.zero_grad()
        (losses["out"] + 0.4 * losses.get("aux", 0.0)).backward()
        optimizer.step()
    predicted = model.eval()(images).argmax(1)
    known = labels != 255
    for label in range(3):
        union = known & ((predicted == label) | (labels == label))
        both = known & (predicted == label) & (labels == label)
        assert both.sum() / union.sum() > 0.9, f"class {label}"


@heads
def test_layer_decay_takes_every_parameter_once_and_leaves_the_heads_alone(head: str) -> None:
    model = small(head=head, aux=True)
    exempt = tuple(model.no_weight_decay())
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=exempt, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert sorted(scales) == sorted(id(p) for p in named.values())
    stem = {scales[id(p)] for name, p in named.items() if ".stem." in name}
    own = {scales[id(p)] for name, p in named.items() if not name.startswith("backbone.body.")}
    assert own == {1.0}
    assert len(stem) == 1
    assert stem.pop() == min(scales.values()) < 0.1
    tables = model.no_weight_decay()
    assert tables
    assert tables <= named.keys()
    undecayed = {name for name, p in named.items() if decays[id(p)] == 0}
    assert undecayed == tables | {name for name, p in named.items() if p.ndim <= 1}
    coarse = {model.group_matcher(coarse=True)(name)[0] for name in named}
    assert len(coarse) == 3 + 2  # stages, stem, heads


def test_checkpointing_changes_nothing() -> None:
    model = small()
    x = torch.randn(2, 3, 32, 48)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(x)["out"].square().mean().backward()
        gradients.append([p.grad for p in model.backbone.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_norms_can_be_synchronised() -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    kinds = {type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert converted.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head": "deeplab"}, r"head='deeplab' is unknown: use upernet or fpn"),
        ({"num_classes": 0}, r"num_classes=0 must be at least 1"),
        ({"channels": -4}, r"channels=-4 must be at least 1"),
        ({"norm": "layer"}, r"norm='layer' is unknown: use batch or group"),
        ({"backbone": "nat_nanno"}, r"unknown model 'nat_nanno': did you mean nat_nano"),
        ({"out_indices": (2,)}, r"aux=True needs two maps, nat_nano gives one here: set aux=False or more out_indices"),
    ],
)
def test_errors_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        small(**options)
    assert "\n" not in str(error.value)


def test_an_image_below_the_least_size_is_named() -> None:
    with pytest.raises(ValueError, match="image 20x40 is smaller than 32x32"):
        small().eval()(torch.randn(1, 3, 20, 40))
