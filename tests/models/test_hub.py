"""Models as folders and hub repositories: written, read here and by timm; a hub is a folder of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nearfield
import pytest
import timm
import torch
import yaml
from nearfield import checkpoints
from nearfield.checkpoints import CheckpointError
from nearfield.models import Backbone

Kwargs = Callable[[str], dict[str, Any]]
REPOSITORY = "someone/nat-of-digits"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return nearfield.create_model("nat_nano", num_classes=3, in_chans=1).eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The hub's client with a folder in place of the network; what is uploaded lies in a cache as downloads do."""
    cache, calls = tmp_path / "cache", []
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
            calls.append(("create", repo_id, private))
            return f"https://huggingface.co/{repo_id}"

        def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
            calls.append(("branch", branch))

        def file_exists(self, repo_id: str, file: str, revision: str | None) -> bool:
            return (snapshot / file).exists()

        def upload_folder(
            self,
            repo_id: str,
            folder_path: Path,
            revision: str | None,
            commit_message: str,
            ignore_patterns: list[str] | None,
        ) -> None:
            ignore = shutil.ignore_patterns(*(ignore_patterns or ()))
            shutil.copytree(folder_path, snapshot, ignore=ignore, dirs_exist_ok=True)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / (revision or "main")).write_text("0" * 40)
            calls.append(("upload", repo_id, commit_message))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("NEARFIELD_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return SimpleNamespace(cache=cache, calls=calls, files=snapshot)


def same(a: Any, b: Any) -> bool:
    x = torch.randn(2, a.in_chans, 32, 32)
    with torch.inference_mode():
        return torch.equal(a(x), b(x))


def test_a_folder_gives_the_model_back_here_and_through_timm(model: Any, tmp_path: Path) -> None:
    folder = nearfield.save_pretrained(model, tmp_path / "saved", class_names=["one", "two", "three"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert checkpoints.read_metadata(folder / "model.safetensors")["model"] == "nat_nano"
    again = nearfield.from_pretrained(folder).eval()
    assert same(model, again)
    assert again.pretrained_cfg["label_names"] == ["one", "two", "three"]
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(by_timm) is type(model)
    assert same(model, by_timm)


def test_every_member_comes_back(member: str, small_kwargs: Kwargs, tmp_path: Path) -> None:
    model = nearfield.create_model(member, **{**small_kwargs(member), "img_size": 64}).eval()
    again = nearfield.from_pretrained(nearfield.save_pretrained(model, tmp_path)).eval()
    assert type(again) is type(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), again(x))


def test_arguments_go_over_those_that_were_saved(model: Any, tmp_path: Path) -> None:
    folder = nearfield.save_pretrained(model, tmp_path)
    assert nearfield.from_pretrained(folder, num_classes=7).num_classes == 7
    features = nearfield.from_pretrained(str(folder), features_only=True, out_indices=(0, 2)).eval()
    x = torch.randn(1, 1, 32, 40)
    with torch.inference_mode():
        for mine, theirs in zip(model.forward_intermediates(x, [0, 2])[1], features(x), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_sizes_set_later_are_saved(tmp_path: Path) -> None:
    model: Any = nearfield.create_model("swin_nano", num_classes=2).eval()
    model.set_input_size(img_size=(96, 64), window_size=3)
    again: Any = nearfield.from_pretrained(nearfield.save_pretrained(model, tmp_path))
    assert again.img_size == (96, 64)
    assert same(model, again.eval())


def test_the_card_says_what_is_known_and_nothing_else(model: Any, tmp_path: Path) -> None:
    bare = (nearfield.save_pretrained(model, tmp_path / "bare") / "README.md").read_text()
    front = yaml.safe_load(bare.split("---")[1])
    assert front == {
        "library_name": "nearfield",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "nearfield", "timm"],
    }
    assert "`nat_nano`" in bare
    assert "1 x 32 x 32" in bare
    assert "figure" not in bare
    told = nearfield.save_pretrained(
        model,
        tmp_path / "told",
        repo=REPOSITORY,
        licence="mit",
        description="Reads digits: 'all' of them.",
        dataset="sklearn/digits",
        results={"held-out top-1": 98.9},
    )
    card = (told / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["datasets"]) == ("mit", ["sklearn/digits"])
    assert f'nearfield.from_pretrained("{REPOSITORY}")' in card
    assert "Reads digits: 'all' of them." in card
    assert "| held-out top-1 | 98.9 |" in card


def test_nothing_is_claimed_of_published_weights(tmp_path: Path, small_kwargs: Kwargs) -> None:
    model = nearfield.create_model("swin_tiny", **small_kwargs("swin_tiny"))
    assert model.pretrained_cfg["license"] == "mit"
    config = json.loads((nearfield.save_pretrained(model, tmp_path) / "config.json").read_text())
    assert not {"tag", "license", "url", "hf_hub_id", "notes"} & config["pretrained_cfg"].keys()


def test_a_card_that_is_there_stays(model: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    nearfield.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_pushed_and_fetched(model: Any, hub: SimpleNamespace) -> None:
    address = nearfield.push_to_hub(model, REPOSITORY, token="t", private=True, licence="mit")
    assert address == f"https://huggingface.co/{REPOSITORY}"
    assert hub.calls == [("token", "t"), ("create", REPOSITORY, True), ("upload", REPOSITORY, "Add model")]
    assert f"# {REPOSITORY}" in (hub.files / "README.md").read_text()
    for source in (REPOSITORY, f"hf-hub:{REPOSITORY}"):
        assert same(model, nearfield.from_pretrained(source, cache_dir=hub.cache, offline=True).eval())
    (hub.files / "README.md").write_text("edited there")
    nearfield.push_to_hub(model, f"{REPOSITORY}@trial", message="Again")
    assert ("branch", "trial") in hub.calls
    assert (hub.files / "README.md").read_text() == "edited there"
    assert same(model, nearfield.from_pretrained(f"{REPOSITORY}@trial", cache_dir=hub.cache, offline=True).eval())


def test_what_the_hub_refuses_is_one_line(model: Any, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("401\nnot yours")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(CheckpointError, match=f"{REPOSITORY} cannot be written: 401 not yours"):
        nearfield.push_to_hub(model, REPOSITORY)
    with pytest.raises(CheckpointError, match="owner/name"):
        nearfield.push_to_hub(model, "no-owner")
    monkeypatch.setenv("NEARFIELD_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="offline"):
        nearfield.push_to_hub(model, REPOSITORY)


def test_what_cannot_be_saved_or_read_says_so(model: Any, small: Callable[..., Backbone], tmp_path: Path) -> None:
    features = nearfield.create_model("nat_nano", features_only=True)
    for other in (features, torch.nn.Linear(2, 2), small("nat_tiny")):
        with pytest.raises(ValueError, match="no model of create_model"):
            nearfield.save_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="2 class_names are given, the model has 3"):
        nearfield.save_pretrained(model, tmp_path, class_names=["a", "b"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        nearfield.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="offline"):
        nearfield.from_pretrained("someone/nothing", cache_dir=tmp_path)
    nearfield.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "resnet18"}))
    with pytest.raises(ValueError, match="is a resnet18, which is no model of this package"):
        nearfield.from_pretrained(tmp_path)
    for broken in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="no configuration of a model"):
            nearfield.from_pretrained(tmp_path)


def test_what_a_configuration_cannot_say_is_not_saved(tmp_path: Path) -> None:
    pruned: Any = nearfield.create_model("biformer_nano")
    pruned.prune_intermediate_layers((1,))
    with pytest.raises(ValueError, match=r"^BiFormer was pruned to 2 of 3 stages, which its configuration"):
        nearfield.save_pretrained(pruned, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_name_that_is_neither_folder_nor_repository_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^nofolder is no folder here, nor owner/name of a repository on the hub$"):
        nearfield.from_pretrained("nofolder")


def test_a_model_without_a_classifier_comes_back_with_one(tmp_path: Path) -> None:
    nearfield.save_pretrained(nearfield.create_model("hwt_nano", num_classes=0), tmp_path)
    assert nearfield.from_pretrained(tmp_path).num_classes == 0
    assert nearfield.from_pretrained(tmp_path, num_classes=5).get_classifier().out_features == 5
