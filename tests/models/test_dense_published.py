"""mmdet's and mmseg's files: every key taken, what they compute, and what is said of what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import nearfield
import numpy as np
import pytest
import torch
from model_helpers import GOLDEN, fill, read_golden
from nearfield.checkpoints import CheckpointMismatch
from nearfield.models.dense import DenseBackbone, Detector, Segmentor
from nearfield.models.dense.published import UPERNET, BackgroundFirst, WithBackground
from nearfield.models.loading import export_state_dict
from nearfield.models.swin import UnfoldedNeighbours
from torch import Tensor
from torchvision.models.detection.roi_heads import maskrcnn_inference

TOLERANCE = 1e-5
# the small Swin of the golden files
SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4, "mlp_ratio": 2.0}
HEADS: dict[str, dict[str, Any]] = {
    "mmseg_upernet": {"head": "upernet", "channels": 16, "aux_channels": 8},
    "mmseg_fpn": {"head": "fpn", "channels": 16, "fpn_channels": 24},
}


class Golden(NamedTuple):
    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    state: dict[str, Tensor]

    def file(self, folder: Path) -> Path:
        """As mmseg writes it."""
        path = folder / f"{self.name}.pth"
        torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": self.state, "optimizer": {"state": {}}}, path)
        return path


def golden(name: str) -> Golden:
    meta, arrays, state = read_golden(GOLDEN / "dense" / f"{name}.npz")
    # without it one class would win everywhere, and boxes be thrown about
    for name, factor in meta.get("scaled", {}).items():
        for key in [key for key in state if key.endswith(name)]:
            state[key] = (state[key] - state[key].mean(1, keepdim=True)) * factor
    return Golden(name, meta, arrays, state)


def assert_same(ours: Tensor, theirs: np.ndarray) -> None:
    expected = torch.from_numpy(theirs)
    got = torch.from_numpy(fill.sample(ours, len(theirs)))
    assert (got - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("name", HEADS)
def test_a_segmentor_of_mmseg_computes_what_it_computed_there(name: str, tmp_path: Path) -> None:
    theirs = golden(name)
    model = nearfield.create_segmentor(
        "swin_tiny", num_classes=5, checkpoint_path=theirs.file(tmp_path), **HEADS[name], **SMALL
    ).eval()
    plain = nearfield.create_segmentor("swin_tiny", num_classes=5, **HEADS[name], **SMALL)
    plain.load_state_dict(torch.load(theirs.file(tmp_path), weights_only=True))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with torch.no_grad():
        for i, (height, width) in enumerate(theirs.meta["sizes"]):
            x = fill.make_structured(height, width, 1)
            assert_same(model(x), theirs.arrays[f"logits_{i}"])
            if model.aux_head is not None:
                # the auxiliary logits are given in training, where batch norms would use the batch
                model.training = True
                assert_same(model(x)["aux"], theirs.arrays[f"aux_{i}"])
                model.training = False


DETECTORS = {"mmdet_mask_rcnn": "mask_rcnn", "mmdet_cascade": "cascade_mask_rcnn"}


def _detector(head: str, **options: Any) -> Detector:
    sizes: dict[str, Any] = {"channels": 16, "box_features": 24, "mask_convs": 2, "mask_channels": 8, "num_classes": 5}
    return nearfield.create_detector("swin_tiny", head, **{**sizes, **SMALL, **options}).eval()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_of_mmdet_finds_what_it_found_there(name: str, tmp_path: Path) -> None:
    theirs = golden(name)
    height, width = theirs.meta["size"]
    unchanged = {"image_mean": (0, 0, 0), "image_std": (1, 1, 1), "min_size": height, "max_size": width}
    model = _detector(DETECTORS[name], checkpoint_path=theirs.file(tmp_path), **unchanged)
    plain = _detector(DETECTORS[name])
    plain.load_state_dict(torch.load(theirs.file(tmp_path), weights_only=True))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    x = fill.make_structured(height, width, 1)
    with torch.no_grad():
        maps = model.model.backbone(x)
        (found,) = model(x)
        regions = model.model.roi_heads
        stages = getattr(regions, "stages", [regions])
        # the masks before they are pasted, which mmdet does in another way
        cells = stages[0].mask_roi_pool(maps, [found["boxes"]], None)
        probabilities = [
            maskrcnn_inference(stage.mask_predictor(stage.mask_head(cells)), [found["labels"] + 1])[0]
            for stage in stages
        ]
    assert_same(maps["0"], theirs.arrays["pyramid"])
    assert found["labels"].tolist() == theirs.arrays["labels"].tolist()
    torch.testing.assert_close(found["scores"], torch.from_numpy(theirs.arrays["scores"]), rtol=0, atol=1e-5)
    # pixels
    torch.testing.assert_close(found["boxes"], torch.from_numpy(theirs.arrays["boxes"]), rtol=0, atol=2e-2)
    masks = torch.from_numpy(theirs.arrays["probabilities"])
    got = torch.from_numpy(fill.sample(torch.stack(probabilities).mean(0), len(masks)))
    torch.testing.assert_close(got, masks, rtol=0, atol=1e-3)


def test_the_order_of_classes_in_the_golden_file_matters() -> None:
    assert len(set(golden("mmdet_mask_rcnn").arrays["labels"].tolist())) >= 4


def test_parts_of_a_detector_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = golden("mmdet_mask_rcnn").file(tmp_path)
    whole = _detector("mask_rcnn", checkpoint_path=path).state_dict()
    assert not caplog.text
    boxes = _detector("faster_rcnn", checkpoint_path=path)
    assert "the mask head is left out" in caplog.text
    assert all(torch.equal(value, whole[key]) for key, value in boxes.state_dict().items())
    caplog.clear()
    other = _detector("mask_rcnn", num_classes=2, checkpoint_path=path).state_dict()
    assert "the classifiers, with 6 outputs in the file and 3 here, stay as drawn" in caplog.text
    differing = {key.split(".")[3] for key, value in other.items() if not torch.equal(value, whole[key])}
    assert differing == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    caplog.clear()
    points = _detector("fcos", channels=32, checkpoint_path=path)
    assert "the file has other heads" in caplog.text
    norms = {key: value for key, value in whole.items() if ".norms." in key}
    # of the last three stages
    for key, value in points.backbone.norms.state_dict().items():
        stage, leaf = key.split(".")
        assert torch.equal(value, norms[f"model.backbone.body.norms.{int(stage) + 1}.{leaf}"])
    # our own file, and into a segmentor
    torch.save(_detector("mask_rcnn", checkpoint_path=path).state_dict(), tmp_path / "ours.pth")
    again = _detector("fcos", channels=32, checkpoint_path=tmp_path / "ours.pth")
    for key, value in again.backbone.state_dict().items():
        assert torch.equal(value, points.backbone.state_dict()[key])
    caplog.clear()
    bare = _detector("mask_rcnn", out_norm="none", checkpoint_path=tmp_path / "ours.pth")
    assert "output norms of stages 0, 1, 2, 3 are left out" in caplog.text
    assert not bare.backbone.norms.state_dict()
    again = _detector("mask_rcnn", checkpoint_path=tmp_path / "ours.pth").state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in again.items())
    for file in (path, tmp_path / "ours.pth"):
        caplog.clear()
        segmentor = nearfield.create_segmentor("swin_tiny", num_classes=2, channels=8, checkpoint_path=file, **SMALL)
        assert "its backbone alone is loaded" in caplog.text
        for key, value in segmentor.backbone.state_dict().items():
            assert torch.equal(value, whole[f"model.backbone.body.{key}"])


@pytest.mark.parametrize("transform", [BackgroundFirst(), WithBackground(4), WithBackground(1)])
def test_rows_of_classes_come_back(transform: BackgroundFirst | WithBackground) -> None:
    theirs = torch.randn(12, 3)
    assert torch.equal(transform.to_theirs(transform.to_ours(theirs, None)), theirs)


def test_a_box_for_all_classes_has_no_background() -> None:
    box = torch.randn(4, 3)
    assert torch.equal(WithBackground(4).to_ours(box, torch.Size((4, 3))), box)
    assert WithBackground(4).to_ours(box, torch.Size((8, 3))).shape == (8, 3)


def _published(model: Segmentor, layout: str, norm: str) -> dict[str, Tensor]:
    """The segmentor's weights under mmseg's and the authors' names."""
    body = export_state_dict(model.backbone.body.backbone, layout)
    theirs = {f"backbone.{key}": value for key, value in body.items()}
    for key, value in model.backbone.norms.state_dict().items():
        stage, leaf = key.split(".")
        theirs[f"backbone.{norm.format(stage)}.{leaf}"] = value
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    return theirs | UPERNET.to_theirs(heads)


def _varied(model: Segmentor) -> Segmentor:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def _nano(backbone: str, **options: Any) -> Segmentor:
    sizes = {"num_classes": 3, "channels": 16, "aux_channels": 8}
    return nearfield.create_segmentor(backbone, **{**sizes, **options})


FAMILIES = pytest.mark.parametrize(
    ("backbone", "layout", "norm"),
    [
        ("nat_nano", "shi-labs", "norm{}"),
        ("dinat_nano", "shi-labs", "norm{}"),
        ("swin_nano", "microsoft", "norm{}"),
        ("biformer_nano", "rayleizhu", "extra_norms.{}"),
    ],
)


@FAMILIES
def test_the_authors_names_come_in_whole(backbone: str, layout: str, norm: str, tmp_path: Path) -> None:
    model = _varied(_nano(backbone))
    theirs = _published(model, layout, norm)
    assert not theirs.keys() & model.state_dict().keys()
    assert f"backbone.{norm.format(2)}.weight" in theirs
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    made = _nano(backbone, checkpoint_path=tmp_path / "theirs.pth").eval()
    x = torch.randn(2, 3, 40, 56)
    assert torch.equal(made(x), model(x))
    # and our own file, by the same door
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    assert torch.equal(_nano(backbone, checkpoint_path=tmp_path / "ours.pth").eval()(x), model(x))


def _mmdet(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Segmentor]:
    """A detector's file with the backbone of a segmentor."""
    model = _varied(_nano("nat_nano"))
    state = {k: v for k, v in _published(model, "shi-labs", "norm{}").items() if k.startswith("backbone.")}
    for head in ("neck.fpn_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.weight"):
        state[head] = torch.zeros(2, 2)
    path = tmp_path / "mmdet.pth"
    torch.save({"state_dict": state}, path)
    return path, state, model


def test_the_backbone_of_a_detector_comes_with_its_norms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _, model = _mmdet(tmp_path)
    x = torch.randn(1, 3, 36, 44)
    expected = model.backbone(x)
    with caplog.at_level(logging.INFO):
        backbone = DenseBackbone("nat_nano", checkpoint_path=path).eval()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "neck, roi_head, rpn_head" in told[0]
    for a, b in zip(backbone(x), expected, strict=True):
        assert torch.equal(a, b)
    # some of the maps: norms go by the stage
    some = DenseBackbone("nat_nano", checkpoint_path=path, out_indices=(0, 2)).eval()
    for a, b in zip(some(x), expected[::2], strict=True):
        assert torch.equal(a, b)
    caplog.clear()
    DenseBackbone("nat_nano", checkpoint_path=path, out_norm="none")
    assert "output norms of stages 0, 1, 2 are left out" in caplog.text
    caplog.clear()
    segmentor = _nano("nat_nano", checkpoint_path=path).eval()
    assert "the file has other heads (neck, roi_head, rpn_head): its backbone alone is loaded" in caplog.text
    for a, b in zip(segmentor.backbone(x), expected, strict=True):
        assert torch.equal(a, b)


def test_the_backbone_of_a_detector_comes_without_its_norms_into_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _, model = _mmdet(tmp_path)
    features = nearfield.create_model("nat_nano", features_only=True, checkpoint_path=path).eval()
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "norm0.weight" in told
    assert "DenseBackbone" in told
    x = torch.randn(1, 3, 36, 44)
    for a, b in zip(features(x), model.backbone.body(x), strict=True):
        assert torch.equal(a, b.permute(0, 3, 1, 2))
    with pytest.raises(
        CheckpointMismatch, match="backbone of a detector or segmentor: make the model with features_only"
    ):
        nearfield.create_model("nat_nano", checkpoint_path=path)


def test_a_classifier_gives_its_backbone(tmp_path: Path) -> None:
    classifier = nearfield.create_model("nat_nano", num_classes=10).eval()
    torch.save(export_state_dict(classifier, "shi-labs"), tmp_path / "classifier.pth")
    model = _nano("nat_nano", checkpoint_path=tmp_path / "classifier.pth").eval()
    x = torch.randn(1, 3, 36, 44)
    maps = classifier.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(model.backbone.body(x), maps, strict=True):
        assert torch.equal(a.permute(0, 3, 1, 2), b)


def test_a_file_without_output_norms_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _varied(_nano("nat_nano", out_norm="none"))
    torch.save(_published(model, "shi-labs", "norm{}"), tmp_path / "theirs.pth")
    _nano("nat_nano", checkpoint_path=tmp_path / "theirs.pth")
    assert "make it with out_norm='none'" in caplog.text
    caplog.clear()
    made = _nano("nat_nano", out_norm="none", checkpoint_path=tmp_path / "theirs.pth").eval()
    assert not caplog.text
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(made(x), model(x))


def test_classifiers_for_other_classes_stay_as_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _varied(_nano("nat_nano"))
    torch.save(_published(model, "shi-labs", "norm{}"), tmp_path / "theirs.pth")
    made = _nano("nat_nano", num_classes=7, checkpoint_path=tmp_path / "theirs.pth")
    assert "the classifiers, with 3 outputs in the file and 7 here, stay as drawn" in caplog.text
    differing = [k for k, v in made.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert differing == [f"{h}.classifier.conv.{leaf}" for h in ("head", "aux_head") for leaf in ("weight", "bias")]


def test_the_auxiliary_head_may_be_missing_on_either_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for there, here, told in ((True, False, "aux_head is left out"), (False, True, "aux_head is not in the file")):
        caplog.clear()
        model = _varied(_nano("nat_nano", aux=there))
        torch.save(_published(model, "shi-labs", "norm{}"), tmp_path / "theirs.pth")
        made = _nano("nat_nano", aux=here, checkpoint_path=tmp_path / "theirs.pth").eval()
        assert told in caplog.text
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(made(x), model(x))


def test_other_sizes_are_named_in_one_line(tmp_path: Path) -> None:
    torch.save(_published(_nano("nat_nano"), "shi-labs", "norm{}"), tmp_path / "theirs.pth")
    with pytest.raises(
        CheckpointMismatch, match=r"the heads in the file and in the model differ: .*16.* in the file"
    ) as error:
        _nano("nat_nano", channels=24, checkpoint_path=tmp_path / "theirs.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointMismatch, match="does not fit swin_nano") as error:
        _nano("swin_nano", checkpoint_path=tmp_path / "theirs.pth")
    assert "\n" not in str(error.value)


def test_a_model_of_timm_takes_its_own_files_alone(tmp_path: Path) -> None:
    model = _varied(_nano("resnet10t"))
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(_nano("resnet10t", checkpoint_path=tmp_path / "ours.pth").eval()(x), model(x))
    torch.save(
        {"backbone.stages.0.weight": torch.ones(2), "decode_head.conv_seg.bias": torch.ones(3)}, tmp_path / "b.pth"
    )
    with pytest.raises(CheckpointMismatch, match="the backbone in the file and in the model differ") as error:
        _nano("resnet10t", checkpoint_path=tmp_path / "b.pth")
    assert "\n" not in str(error.value)


def test_neighbours_are_reordered_both_ways() -> None:
    # a channel's four neighbours as nn.Unfold gives them: (0, 0), (0, 1), (1, 0), (1, 1)
    x = torch.arange(3 * 4).reshape(1, 3, 2, 2).float()
    unfolded = torch.nn.Unfold(2, stride=2)(x).squeeze(-1)
    ours = nearfield.models.layers.PatchMerging.neighbours(x.permute(0, 2, 3, 1)).reshape(1, -1)
    transform = UnfoldedNeighbours()
    assert torch.equal(transform.to_ours(unfolded, None), ours)
    assert torch.equal(transform.to_theirs(ours), unfolded)
