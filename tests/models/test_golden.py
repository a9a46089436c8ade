"""The authors' own keys and logits, by every way in (tests/golden: made by running their code)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nearfield
import numpy as np
import pytest
import timm
import torch
from model_helpers import GOLDEN, fill, read_golden
from nearfield import checkpoints
from torch import Tensor, nn

TOLERANCE = 1e-5

# where the authors' name is not ours
NAMES = {
    "hwt_tiny_224": "hwt_tiny",
    "hwt_tiny_224x448": "hwt_tiny",
    "swin_tiny_patch4_window7_224": "swin_tiny",
    "swinv2_tiny_window8_256": "swinv2_tiny_window8",
    "halonet26t": "halonet_26t",
    "sehalonet33ts": "sehalonet_33ts",
    "maxvit_tiny_tf_224": "maxvit_tiny",
}
# what the file's model is made with besides
KWARGS: dict[str, dict[str, Any]] = {"hwt_tiny_224x448": {"img_size": (224, 448)}}
FILES = sorted(GOLDEN.glob("*.npz"))
WRAPPERS = [None, "model", "state_dict"]


class Golden(NamedTuple):
    name: str
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    state: dict[str, Tensor]


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    meta, arrays, state = read_golden(request.param)
    stem = request.param.stem
    return Golden(NAMES.get(stem, stem), KWARGS.get(stem, {}), meta, arrays, state)


@pytest.fixture(scope="module")
def files(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for wrapper in WRAPPERS:
        paths[wrapper] = folder / f"{wrapper}.pth"
        torch.save(golden.state if wrapper is None else {wrapper: golden.state, "epoch": 3}, paths[wrapper])
    return paths


@pytest.fixture(scope="module")
def loaded(golden: Golden, files: dict[str | None, Path]) -> nn.Module:
    return nearfield.create_model(golden.name, checkpoint_path=files["model"], **golden.kwargs).eval()


@pytest.fixture(scope="module", autouse=True)
def _no_random_weights() -> Iterator[None]:
    """Drawing weights that are overwritten would be most of the work; zeros show what was not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearfield.models.backbone.trunc_normal_", lambda tensor, std: nn.init.zeros_(tensor))
        patch.setattr("nearfield.models.layers.trunc_normal_", lambda tensor, std: nn.init.zeros_(tensor))
        yield


def error(got: Tensor, expected: np.ndarray) -> float:
    """Relative L2 error."""
    reference = torch.from_numpy(expected).double()
    return float((got.double() - reference).norm() / reference.norm())


def test_golden_files_cover_the_families() -> None:
    names = {"nat_mini", "dinat_mini", "dinat_s_tiny", "biformer_tiny", "biformer_stl_nchw", "hnt_mini", *NAMES}
    assert names <= {path.stem for path in FILES}


def test_parameters_are_the_authors(golden: Golden, loaded: nn.Module) -> None:
    assert sum(p.numel() for p in loaded.parameters()) == golden.meta["params"]


def test_logits_and_features_are_the_authors(golden: Golden, loaded: Any) -> None:
    inputs = golden.meta["inputs"]
    height, width = inputs[0][2:]
    with torch.inference_mode():
        for i, (_, _, h, w) in enumerate(inputs):
            assert error(loaded(fill.make_input(h, w)), golden.arrays[f"logits_{i}"]) <= TOLERANCE
        assert error(loaded(fill.make_structured(height, width)), golden.arrays["logits_s"]) <= TOLERANCE
        maps = loaded.forward_intermediates(fill.make_input(height, width), intermediates_only=True)
    for stage, y in zip(golden.meta["stages"], maps, strict=True):
        assert list(y.shape) == stage["shape_nchw"]
        assert error(torch.from_numpy(fill.sample(y)), golden.arrays[f"stage_{stage['stage']}"]) <= TOLERANCE


def assert_same(model: nn.Module, loaded: nn.Module, drop: tuple[str, ...] = (), prefix: str = "") -> None:
    """Bit-equal weights."""
    expected = {key: value for key, value in loaded.state_dict().items() if not key.startswith(drop)}
    got = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_way_in_loads_the_same_weights(
    wrapper: str | None, golden: Golden, files: dict[str | None, Path], loaded: nn.Module
) -> None:
    path = files[wrapper]
    assert_same(nearfield.create_model(golden.name, checkpoint_path=path, **golden.kwargs), loaded)
    assert_same(timm.create_model(golden.name, checkpoint_path=path, **golden.kwargs), loaded)
    model = timm.create_model(golden.name, **golden.kwargs)
    model.load_state_dict(torch.load(path, weights_only=True))
    assert_same(model, loaded)


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(2, 2)


def test_a_backbone_inside_a_detector_loads_published_keys(golden: Golden, loaded: nn.Module) -> None:
    state = {f"backbone.{key}": value for key, value in golden.state.items()}
    detector = Detector(timm.create_model(golden.name, **golden.kwargs))
    detector.load_state_dict({**state, **{f"neck.{k}": v for k, v in detector.neck.state_dict().items()}})
    assert_same(detector.backbone, loaded)
    detector = Detector(timm.create_model(golden.name, features_only=True, out_indices=(0, 2), **golden.kwargs))
    detector.load_state_dict({**state, **{f"neck.{k}": v for k, v in detector.neck.state_dict().items()}})
    assert_same(detector.backbone, loaded, ("head", "norm", "stages.3"), "model.")


def test_features_only_takes_whole_classifier_files(
    golden: Golden, files: dict[str | None, Path], loaded: nn.Module
) -> None:
    for create in (nearfield.create_model, timm.create_model):
        model = create(golden.name, features_only=True, checkpoint_path=files["model"], **golden.kwargs)
        assert_same(model, loaded, ("head", "norm"), "model.")
        # a stage is pruned, with its downsampler
        model = create(
            golden.name, features_only=True, out_indices=(0, 2), checkpoint_path=files[None], **golden.kwargs
        )
        assert_same(model, loaded, ("head", "norm", "stages.3"), "model.")
    model = timm.create_model(golden.name, features_only=True, **golden.kwargs)
    model.load_state_dict(loaded.state_dict())
    assert_same(model, loaded, ("head", "norm"), "model.")
    model.load_state_dict(model.state_dict())


def test_pretrained_comes_from_the_cache(
    golden: Golden, loaded: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("NEARFIELD_CACHE", raising=False)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    entry = checkpoints.entries(golden.name)[0]
    if entry.hub:
        checkpoints.save(golden.state, tmp_path / entry.file)

        def download(repo_id: str, filename: str, **_: object) -> str:
            assert repo_id == entry.hub
            return str(tmp_path / filename)

        for client in ("huggingface_hub.hf_hub_download", "timm.models._hub.hf_hub_download"):
            monkeypatch.setattr(client, download)
    else:
        torch.save({"model": golden.state}, folder / entry.file)
    for create in (nearfield.create_model, timm.create_model):
        assert_same(create(golden.name, pretrained=True, **golden.kwargs), loaded)
        assert_same(create(f"{golden.name}.{entry.tag}", pretrained=True, **golden.kwargs), loaded)
        model = create(golden.name, pretrained=True, features_only=True, out_indices=(1, 2), **golden.kwargs)
        assert_same(model, loaded, ("head", "norm", "stages.3"), "model.")
        model = create(golden.name, pretrained=True, num_classes=5, in_chans=1, **golden.kwargs)
        assert model.num_classes == 5
        own, theirs = model.state_dict(), loaded.state_dict()
        first = f"{loaded.first_conv}.weight"
        assert torch.allclose(own[first], theirs[first].sum(1, keepdim=True), atol=1e-6)
        same = [key for key in own if not key.startswith("head.fc") and key != first]
        assert all(torch.equal(own[key], theirs[key]) for key in same)


def test_weights_go_back_into_the_authors_layout_bit_for_bit(golden: Golden, loaded: Any) -> None:
    layout = next(layout.name for layout in loaded.layouts if layout.recognises(golden.state))
    theirs = nearfield.models.export_state_dict(loaded, layout)
    left = set(golden.meta["left_as_constructed"])  # of which the counters of batch norms are kept
    assert theirs.keys() - left == golden.state.keys() - left
    assert all(torch.equal(theirs[key], golden.state[key]) for key in theirs)
