"""The maps that detectors and segmentors take: shapes, output norms, arguments by task, weights, layer groups."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import nearfield
import pytest
import timm
import torch
from nearfield.checkpoints import CheckpointMismatch
from nearfield.models import catalog
from nearfield.models.dense import DenseBackbone
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

OURS = ["nat_nano", "dinat_nano", "swin_nano", "biformer_nano", "hwt_nano", "hnt_nano"]


def test_the_nano_models_are_there() -> None:
    assert set(OURS) <= set(nearfield.list_models())


@pytest.mark.parametrize("name", [*OURS, "test_resnet", "test_convnext"])
def test_maps_have_the_channels_and_strides_that_are_said(name: str) -> None:
    backbone = DenseBackbone(name)
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(y.shape) for y in maps] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert all(b == 2 * a for a, b in zip(backbone.strides, backbone.strides[1:], strict=False))
    sum(y.square().sum() for y in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", OURS)
def test_odd_sizes_are_taken(name: str) -> None:
    backbone = DenseBackbone(name)
    maps = backbone(torch.randn(1, 3, 45, 67))
    assert [tuple(y.shape[2:]) for y in maps] == [(-(-45 // s), -(-67 // s)) for s in backbone.strides]


def test_without_norms_the_maps_are_those_of_the_model_and_with_them_they_are_normed() -> None:
    image = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    plain = DenseBackbone("nat_nano", out_norm="none")
    torch.manual_seed(0)
    features = nearfield.create_model("nat_nano", features_only=True)
    features.load_state_dict(plain.body.state_dict())
    normed = DenseBackbone("nat_nano", out_norm="layer")
    normed.body.load_state_dict(plain.body.state_dict())
    for ours, theirs, y in zip(plain(image), features(image), normed(image), strict=True):
        torch.testing.assert_close(ours, theirs)
        wanted = nn.functional.layer_norm(theirs.permute(0, 2, 3, 1), theirs.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        # detection/nat.py, detection/dinats.py of SHI-Labs; Swin-Transformer-Object-Detection; the HWT made from them
        *((name, 1e-5) for name in ("nat_tiny", "dinat_tiny", "dinat_s_tiny", "swin_tiny", "hwt_tiny", "hnt_tiny")),
        # LayerNorm2d of timm in object_detection/models_mm/biformer_mm.py
        ("biformer_tiny", 1e-6),
        ("biformer_stl", 1e-6),
        ("maxvit_tiny", None),
        ("halonet_26t", None),
        ("resnet18", None),
    ],
)
def test_every_family_has_the_norms_of_its_published_detectors(name: str, eps: float | None) -> None:
    with torch.device("meta"):
        backbone = DenseBackbone(name)
        none = DenseBackbone(name, out_norm="none")
        layer = DenseBackbone(name, out_norm="layer")
    assert all(isinstance(norm, nn.Identity) for norm in none.norms)
    assert [norm.normalized_shape for norm in layer.norms] == [(channels,) for channels in layer.channels]
    if eps is None:
        assert all(isinstance(norm, nn.Identity) for norm in backbone.norms)
    else:
        assert [norm.eps for norm in backbone.norms] == [eps] * len(backbone.channels)
        assert all(isinstance(norm, nn.LayerNorm) for norm in backbone.norms)


def dilations(model: nn.Module) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]


# as in the authors' files: detection/configs/dinat/mask_rcnn_dinat_{mini,tiny}_3x_coco.py,
# dinat_s/mask_rcnn_dinat_s_tiny_3x_coco.py, segmentation/configs/dinat/upernet_dinat_{tiny,large}_*.py
PUBLISHED = {
    ("dinat_mini", "detection"): [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
    ("dinat_tiny", "detection"): [
        [1, 28, 1],
        [1, 7, 1, 14],
        [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7],
        [1, 3, 1, 3, 1],
    ],
    ("dinat_s_tiny", "detection"): [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
    ("dinat_tiny", "segmentation"): [
        [1, 16, 1],
        [1, 4, 1, 8],
        [1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4],
        [1, 2, 1, 2, 1],
    ],
    ("dinat_large", "segmentation"): [
        [1, 20, 1],
        [1, 5, 1, 10],
        [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
        [1, 2, 1, 2, 1],
    ],
    ("dinat_s_small", "segmentation"): [
        [1, 16],
        [1, 8],
        [1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4],
        [1, 2],
    ],
}


@pytest.mark.parametrize(("name", "task"), PUBLISHED)
def test_dilations_of_a_task_are_the_published_ones(name: str, task: str) -> None:
    with torch.device("meta"):
        assert dilations(nearfield.create_model(name, task=task)) == PUBLISHED[name, task]
        assert dilations(timm.create_model(name, task=task)) == PUBLISHED[name, task]
        assert dilations(DenseBackbone(name, task=task).body.backbone) == PUBLISHED[name, task]


def test_regions_of_a_task_are_the_published_ones() -> None:
    for task, regions in (("detection", 16), ("segmentation", 8), ("classification", 7), (None, 7)):
        with torch.device("meta"):
            model: Any = nearfield.create_model("biformer_small", task=task)
        assert model.stages[0].blocks[0].attn.regions == (regions, regions)


def test_the_dilations_of_every_task_fit_the_depths() -> None:
    tasks = [(variant.name, variant.for_task(task)) for variant in catalog.variants() for task in variant.tasks]
    assert len(tasks) == 2 * 16
    for name, kwargs in tasks:
        if "dilations" in kwargs:
            assert tuple(map(len, kwargs["dilations"])) == kwargs["depths"], name


def test_a_task_changes_nothing_else_and_an_argument_wins_over_it() -> None:
    with torch.device("meta"):
        plain, tasked = (nearfield.create_model("nat_nano", task=task) for task in (None, "detection"))
        assert {k: v.shape for k, v in plain.state_dict().items()} == {
            k: v.shape for k, v in tasked.state_dict().items()
        }
        ones = ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5)
        model = nearfield.create_model("dinat_mini", task="detection", dilations=ones)
        nearfield.create_model("test_resnet", task="detection")
    assert dilations(model) == [list(stage) for stage in ones]
    with pytest.raises(ValueError, match=r"^task='pose' must be one of classification, detection, segmentation$"):
        nearfield.create_model("nat_nano", task="pose")
    with pytest.raises(ValueError, match=r"^task='pose' must be one of classification, detection, segmentation$"):
        nearfield.create_model("test_resnet", task="pose")


def test_a_saved_model_remembers_its_task(tmp_path: Path) -> None:
    small = {"embed_dim": 8, "num_heads": 1, "num_classes": 2, "task": "detection"}
    model = nearfield.create_model("dinat_s_tiny", **small)
    nearfield.save_pretrained(model, tmp_path)
    assert dilations(nearfield.from_pretrained(tmp_path)) == PUBLISHED["dinat_s_tiny", "detection"]


@pytest.mark.parametrize("name", ["nat_nano", "test_resnet"])
def test_the_file_of_a_classifier_is_taken(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifier: Any = nearfield.create_model(name, num_classes=5).eval()
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    with caplog.at_level(logging.WARNING, "nearfield"):
        backbone = DenseBackbone(name, checkpoint_path=tmp_path / "classifier.pth", out_norm="none").eval()
    if name == "nat_nano":
        assert [r.getMessage() for r in caplog.records] == ["the classifier of 5 classes in the file is left out"]
    image = torch.randn(1, 3, 64, 64)
    wanted = classifier.forward_intermediates(image, intermediates_only=True)
    for y, want in zip(backbone(image), wanted[-len(backbone.channels) :], strict=True):
        torch.testing.assert_close(y, want)


def test_other_channels_and_a_choice_of_stages() -> None:
    backbone = DenseBackbone("swin_nano", in_chans=1, out_indices=(-2, -1))
    assert backbone.strides == [4, 8]
    assert [tuple(y.shape) for y in backbone(torch.randn(1, 1, 32, 32))] == [(1, 48, 8, 8), (1, 96, 4, 4)]


@pytest.mark.parametrize("name", ["nat_nano", "swin_nano", "test_resnet", "test_convnext"])
def test_layer_groups_are_those_of_the_model_and_norms_come_last(name: str) -> None:
    backbone = DenseBackbone(name, out_norm="layer")
    groups = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    inner, prefix = backbone._inner()
    theirs = group_parameters(inner, inner.group_matcher(), reverse=True)
    assert {key.removeprefix(prefix): group for key, group in groups.items() if key.startswith(prefix)} == theirs
    assert {groups[key] for key in groups if key.startswith("norms")} == {max(theirs.values()) + 1}
    coarse = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)
    stages = len(backbone.channels) if name in OURS else max(coarse.values()) - 1
    assert max(coarse.values()) == 1 + stages <= max(groups.values())
    decayed = param_groups_layer_decay(
        backbone, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=backbone.no_weight_decay()
    )
    assert {group["lr_scale"] for group in decayed} == {0.5**i for i in range(max(groups.values()) + 1)}


def test_the_names_without_weight_decay_are_those_of_tables() -> None:
    backbone = DenseBackbone("nat_nano")
    names = {name for name, _ in backbone.named_parameters()}
    assert backbone.no_weight_decay() == {name for name in names if name.endswith("rel_pos_bias")} != set()


def test_batch_norms_can_keep_their_statistics() -> None:
    backbone = DenseBackbone("biformer_nano", norm_eval=True)
    free = DenseBackbone("biformer_nano")
    free.load_state_dict(backbone.state_dict())
    before = copy.deepcopy(backbone.state_dict())
    image = torch.randn(2, 3, 32, 32)
    backbone.train()(image)
    free.train()(image)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in free.state_dict().items())
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["swin_nano", "test_convnext"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    backbone = DenseBackbone(name)
    image = torch.randn(1, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        loss = sum(y.square().mean() for y in backbone(image))
        return list(torch.autograd.grad(loss, list(backbone.parameters())))

    wanted = gradients()
    backbone.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), wanted)


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^out_norm='batch' must be one of auto, layer, none$"):
        DenseBackbone("nat_nano", out_norm="batch")
    with pytest.raises(ValueError, match="unknown model 'nat_nanoo'"):
        DenseBackbone("nat_nanoo")
    with pytest.raises(ValueError, match="takes no argument 'windows'"):
        DenseBackbone("swin_nano", windows=3)


SMALL = {"channels": 16, "box_features": 16, "mask_convs": 1, "mask_channels": 16}


@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_the_backbone_of_our_own_files_is_taken(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole: Any
    if kind == "detector":
        whole = nearfield.create_detector("nat_nano", num_classes=3, **SMALL)
    else:
        whole = nearfield.create_segmentor("nat_nano", num_classes=3, channels=16, aux_channels=16)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "whole.pth")
    backbone = DenseBackbone("nat_nano", checkpoint_path=tmp_path / "whole.pth")
    ours, theirs = backbone.state_dict(), whole.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert not caplog.text
    features = nearfield.create_model("nat_nano", features_only=True, checkpoint_path=tmp_path / "whole.pth")
    assert "left out the norms" in caplog.text
    image = torch.randn(1, 3, 64, 64)
    bare = DenseBackbone("nat_nano", out_norm="none")
    bare.body.load_state_dict(whole.backbone.body.state_dict())
    torch.testing.assert_close(features.eval()(image), bare.eval()(image))
    with pytest.raises(CheckpointMismatch, match=r"make the model with features_only=True$"):
        nearfield.create_model("nat_nano", checkpoint_path=tmp_path / "whole.pth")


def test_another_models_file_is_refused_for_a_model_of_timm(tmp_path: Path) -> None:
    torch.save(nearfield.create_model("nat_nano").state_dict(), tmp_path / "nat.pth")
    with pytest.raises(CheckpointMismatch, match=r"^the file is of another model than test_resnet: it lacks conv1"):
        DenseBackbone("test_resnet", checkpoint_path=tmp_path / "nat.pth")
    wide = timm.create_model("test_convnext", num_classes=3, in_chans=1)
    torch.save(wide.state_dict(), tmp_path / "gray.pth")
    assert DenseBackbone("test_convnext", checkpoint_path=tmp_path / "gray.pth", in_chans=1).channels
    with pytest.raises(CheckpointMismatch, match="differ"):
        DenseBackbone("test_convnext2", checkpoint_path=tmp_path / "gray.pth")


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.", "module."])
def test_wrapped_files_load_into_models_of_timm(prefix: str, tmp_path: Path) -> None:
    """The extractor needs neither the classifier nor the norm before it; its options are its own."""
    model = timm.create_model("test_convnext", depths=(1, 1, 1, 1))
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    torch.save({"state_dict": {prefix + key: value for key, value in weights.items()}}, tmp_path / "body.pth")
    backbone = DenseBackbone("test_convnext", checkpoint_path=tmp_path / "body.pth", depths=(1, 1, 1, 1))
    loaded = backbone.body.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items() if key in loaded)
    assert "state_dict" not in backbone.pretrained_cfg


@pytest.mark.parametrize("name", ["nat_nano", "test_convnext"])
def test_maps_come_finest_first(name: str) -> None:
    strides = DenseBackbone(name, out_indices=(2, 0)).strides
    assert strides == sorted(strides)
