"""Programs that take timm's backbones take ours: timm's feature wrappers, segmentation_models_pytorch, torchvision."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nearfield
import pytest
import timm
import torch
from model_helpers import is_nano
from nearfield.models import Backbone, catalog, export_state_dict
from nearfield.models.dense.backbone import DenseBackbone
from timm.models._features import FeatureGetterNet, FeatureHookNet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

Small = Callable[..., Backbone]
Kwargs = Callable[[str], dict[str, Any]]
needs_smp = pytest.mark.skipif(
    find_spec("segmentation_models_pytorch") is None,
    reason="needs segmentation_models_pytorch: pip install -e .[segmentation]",
)


def _first_of_each_family() -> list[str]:
    """Names, one for each class, without those for small images."""
    first: dict[type, str] = {}
    for variant in catalog.variants():
        if not is_nano(variant.name):
            first.setdefault(variant.family, variant.name)
    return list(first.values())


each_family = pytest.mark.parametrize("name", _first_of_each_family())


# --- timm -------------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize(("cls", "kind"), [("getter", FeatureGetterNet), ("hook", FeatureHookNet)])
def test_timms_own_feature_wrappers_take_every_family(name: str, cls: str, kind: type, small_kwargs: Kwargs) -> None:
    options = {**small_kwargs(name), "features_only": True, "out_indices": (1, 2)}
    torch.manual_seed(0)
    ours = timm.create_model(name, **options).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(name, feature_cls=cls, **options).eval()
    assert type(theirs) is kind
    assert theirs.feature_info.channels() == ours.feature_info.channels()
    assert theirs.feature_info.reduction() == ours.feature_info.reduction()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        for mine, other in zip(ours(x), theirs(x), strict=True):
            # hooks see a stage's own layout, channels last
            torch.testing.assert_close(other.permute(0, 3, 1, 2) if cls == "hook" else other, mine)


# --- segmentation_models_pytorch --------------------------------------------------------------------------------------


@needs_smp
@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet"])
@each_family
def test_segmentation_models_train_on_every_family(name: str, decoder: str, small_kwargs: Kwargs) -> None:
    import segmentation_models_pytorch as smp

    options = small_kwargs(name) | {"num_classes": 0}
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, in_channels=4, classes=2, **options)
    images = torch.randn(2, 4, 64, 96)
    out = model(images)
    assert out.shape == (2, 2, 64, 96)
    out.square().mean().backward()
    encoder = {key: p.grad for key, p in model.encoder.named_parameters()}
    assert encoder
    assert [key for key, gradient in encoder.items() if gradient is None] == []


@needs_smp
def test_segmentation_models_load_published_weights(small: Small, small_kwargs: Kwargs, tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    backbone = small("nat_tiny")
    path = tmp_path / "published.pth"
    torch.save(export_state_dict(backbone, "shi-labs"), path)
    model = smp.Unet(
        "tu-nat_tiny", encoder_weights=True, pretrained_cfg_overlay={"file": str(path)}, **small_kwargs("nat_tiny")
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        last = backbone.forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(model.encoder(x)[-1], last)


# --- torchvision's detectors ------------------------------------------------------------------------------------------


class PyramidBackbone(nn.Module):
    """What torchvision's ``BackboneWithFPN`` is, around a model made with ``features_only=True``."""

    def __init__(self, name: str, extra: Any, out_channels: int = 32, **options: Any) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, extra_blocks=extra)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
        return maps


def faster_rcnn(name: str, **options: Any) -> nn.Module:
    backbone = PyramidBackbone(name, LastLevelMaxPool(), **options)
    levels = len(backbone.body.feature_info.channels())
    return FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(
            tuple((8 * 2**i,) for i in range(levels + 1)), ((0.5, 1.0, 2.0),) * (levels + 1)
        ),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(levels)], output_size=7, sampling_ratio=2),
        min_size=64,
        max_size=128,
    )


def retina_net(name: str, **options: Any) -> nn.Module:
    backbone = PyramidBackbone(name, LastLevelP6P7(32, 32), **options)
    levels = len(backbone.body.feature_info.channels()) + 2
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(levels)), ((0.5, 1.0, 2.0),) * levels)
    return RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=64, max_size=128)


@pytest.mark.parametrize("detector", [faster_rcnn, retina_net])
@each_family
def test_torchvisions_detectors_train_on_every_family(
    name: str, detector: Callable[..., nn.Module], small_kwargs: Kwargs
) -> None:
    model = detector(name, **small_kwargs(name))
    images = [torch.rand(3, 70, 90), torch.rand(3, 64, 53)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0], [10.0, 20.0, 50.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    losses = model.train()(images, targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    body = dict(model.backbone.body.named_parameters())
    assert [key for key, p in body.items() if p.grad is None] == []
    with torch.inference_mode():
        found = model.eval()(images)
    assert len(found) == 2
    assert all({"boxes", "labels", "scores"} <= one.keys() for one in found)


def test_a_detectors_backbone_loads_published_weights(small: Small, small_kwargs: Kwargs) -> None:
    backbone = small("swin_tiny")
    model = faster_rcnn("swin_tiny", **small_kwargs("swin_tiny"))
    model.backbone.body.load_state_dict(export_state_dict(backbone, "microsoft"))
    x = torch.randn(1, 3, 64, 80)
    with torch.inference_mode():
        maps = backbone.forward_intermediates(x, intermediates_only=True)
        for mine, theirs in zip(maps, model.eval().backbone.body(x), strict=True):
            torch.testing.assert_close(theirs, mine)


# --- docs/adapters.md -------------------------------------------------------------------------------------------------

ADAPTERS = re.findall(
    r"```python\n(.*?)```",
    (Path(nearfield.__file__).parent / "docs/adapters.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


def _configurations() -> list[dict[str, Any]]:
    """Those of mmdetection and mmsegmentation in docs/adapters.md."""
    found: list[dict[str, Any]] = []
    for block in ADAPTERS:
        if "model = dict(" in block:
            values: dict[str, Any] = {}
            exec(block, values)
            found.append(values)
    return found


def _timm_backbone(
    *, model_name: str, features_only: bool, pretrained: bool, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """What TIMMBackbone of mmsegmentation 1.2.2 and of mmpretrain 1.2.0 does with its arguments, without weights."""
    assert pretrained
    return timm.create_model(
        model_name=model_name,
        features_only=features_only,
        pretrained=False,
        in_chans=in_channels,
        checkpoint_path="",
        **kwargs,
    )


def test_the_documented_configurations_make_the_maps_that_their_heads_take() -> None:
    kinds = []
    for values in _configurations():
        model = values["model"]
        options = {key: value for key, value in model["backbone"].items() if key != "_delete_"}
        kinds.append(options.pop("type"))
        if kinds[-1] == "DenseBackbone":
            backbone: nn.Module = DenseBackbone(**{**options, "pretrained": False})
        else:
            backbone = _timm_backbone(**options)
            assert "nearfield" in values["custom_imports"]["imports"]
        with torch.inference_mode():
            channels = [one.shape[1] for one in backbone.eval()(torch.randn(1, 3, 64, 96))]
        assert channels == model.get("decode_head", model.get("neck"))["in_channels"]
        assert model.get("auxiliary_head", {"in_channels": channels[2]})["in_channels"] == channels[2]
    assert kinds == ["TIMMBackbone", "mmpretrain.TIMMBackbone", "DenseBackbone"]


def test_what_a_wrapper_hands_on_reaches_the_model() -> None:
    model = _timm_backbone(model_name="dinat_mini", features_only=True, pretrained=True, task="detection")
    plain = timm.create_model("dinat_mini", features_only=True)
    dilations = [
        [m.dilation for m in made.modules() if hasattr(m, "dilation") and hasattr(m, "qkv")] for made in (model, plain)
    ]
    assert dilations[0] != dilations[1]
    with pytest.raises(TypeError, match="no argument 'tusk'"):
        _timm_backbone(model_name="nat_mini", features_only=True, pretrained=True, tusk="detection")
