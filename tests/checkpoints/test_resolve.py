"""Every way to name a checkpoint ends in one local file or one clear line."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import nearfield.checkpoints
import pytest
from nearfield.checkpoints import CheckpointError, DownloadError, entries, resolve

REPOSITORY = "timm/swin_tiny_patch4_window7_224.ms_in1k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEARFIELD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NEARFIELD_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "source",
    [
        "nat_mini",
        "nat_mini.in1k",
        "nat_mini.pth",
        "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth",
    ],
)
def test_every_name_of_a_row_is_its_cached_file(cache: Path, source: str) -> None:
    (cache / "nat_mini.pth").write_bytes(b"x")
    assert resolve(source) == cache / "nat_mini.pth"


def test_tags_choose_among_the_files_of_a_model(cache: Path) -> None:
    for entry in entries("swin_base"):
        if entry.url:
            (cache / entry.file).touch()
            assert resolve(entry.name) == cache / entry.file
    assert resolve("swin_base") == cache / entries("swin_base")[0].file


@pytest.mark.parametrize("source", ["dinat_tiny", "dinat_tiny_in1k_224.pth"])
def test_what_is_not_cached_offline_says_what_to_put_where(cache: Path, source: str) -> None:
    with pytest.raises(DownloadError) as error:
        resolve(source)
    text = str(error.value)
    assert "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth" in text
    assert str(cache / "dinat_tiny_in1k_224.pth") in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "source", ["hnt_tiny", "https://drive.google.com/file/d/1j-JlRj4D9gqx1lMyBp5sB8nThS7LCykS/view"]
)
def test_a_file_of_a_host_that_may_refuse_has_a_manual_step(cache: Path, source: str) -> None:
    (entry,) = entries("hnt_tiny")
    with pytest.raises(DownloadError) as error:
        resolve(source)
    text = str(error.value)
    assert text.endswith(f"put it at {cache / 'hnt_tiny_224.pth'}; in a browser it is at {entry.page}")
    assert "\n" not in text
    (cache / "hnt_tiny_224.pth").touch()
    assert resolve(source) == cache / "hnt_tiny_224.pth"


def test_another_cache_may_be_given(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "nat_mini.pth").touch()
    assert resolve("nat_mini", cache_dir=tmp_path / "other") == tmp_path / "other" / "nat_mini.pth"


def test_a_local_file_wins_over_the_index(cache: Path, tmp_path: Path) -> None:
    (cache / "nat_mini.pth").touch()
    (tmp_path / "nat_mini.pth").touch()
    assert resolve("nat_mini.pth") == Path("nat_mini.pth")
    assert resolve(tmp_path / "nat_mini.pth") == tmp_path / "nat_mini.pth"


def test_a_folder_of_a_models_name_does_not_hide_the_model(cache: Path, tmp_path: Path) -> None:
    (cache / "nat_mini.pth").touch()
    (tmp_path / "nat_mini").mkdir()
    assert resolve("nat_mini") == cache / "nat_mini.pth"


def test_home_is_expanded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").touch()
    assert resolve("~/mine.pth") == tmp_path / "mine.pth"


def test_file_urls_are_their_files(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "with space.pth"
    path.touch()
    assert resolve(path.as_uri()) == path
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve((tmp_path / "nothing.pth").as_uri())


def test_other_urls_have_a_folder_of_their_own_each(cache: Path) -> None:
    paths = []
    for url in ("https://example.org/a/my%20model.pth?download=1", "https://example.org/b/my%20model.pth"):
        with pytest.raises(CheckpointError, match=r"put it at .*my model\.pth") as error:
            resolve(url)
        path = Path(str(error.value).partition("put it at ")[2])
        assert path.parent.parent == cache
        path.parent.mkdir()
        path.touch()
        assert resolve(url) == path
        paths.append(path)
    assert paths[0] != paths[1]
    for bad in ("https://example.org/", "https://example.org/a/..", "https://example.org/%2E%2E"):
        with pytest.raises(CheckpointError, match="file name"):
            resolve(bad)


@pytest.mark.parametrize(
    ("source", "similar"),
    [
        ("nat_mni", "nat_mini"),
        ("swin_base.ms_in22k_ft", "swin_base.ms_in22k_ft_in1k"),
        ("weights/dinat_mini_in1k_244.pth", "dinat_mini_in1k_224.pth"),
        (Path("nat_mini.pth"), "nat_mini.pth"),
    ],
)
def test_unknown_names_list_similar_ones(cache: Path, source: str | Path, similar: str) -> None:
    with pytest.raises(CheckpointError, match="neither a file nor a published checkpoint") as error:
        resolve(source)
    assert similar in str(error.value)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "match"), [("", "empty"), ("qqqqqqqqq", "nothing published"), ("cache", "is a folder")]
)
def test_what_means_nothing_is_one_line(cache: Path, source: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        resolve(source)


# the hub


def put_into_hub_cache(root: Path, file: str, revision: str = "main") -> Path:
    repository = root / f"models--{REPOSITORY.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    (snapshot / file).write_bytes(b"x")
    return snapshot / file


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_hub_ids_are_found_in_the_hubs_cache(cache: Path, tmp_path: Path, prefix: str, file: str) -> None:
    path = put_into_hub_cache(tmp_path / "hub", file)
    assert resolve(prefix + REPOSITORY, cache_dir=tmp_path / "hub") == path


def test_hub_revisions_are_honoured(cache: Path, tmp_path: Path) -> None:
    path = put_into_hub_cache(tmp_path / "hub", "model.safetensors", revision="v2")
    assert resolve(f"hf-hub:{REPOSITORY}@v2", cache_dir=tmp_path / "hub") == path
    with pytest.raises(DownloadError):
        resolve(f"hf-hub:{REPOSITORY}", cache_dir=tmp_path / "hub")


def test_rows_on_the_hub_are_found_in_its_cache(cache: Path, tmp_path: Path) -> None:
    path = put_into_hub_cache(tmp_path / "hub", "model.safetensors")
    assert resolve("swin_tiny.timm_in1k", cache_dir=tmp_path / "hub") == path


def test_a_hub_file_that_is_not_cached_offline_is_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="offline") as error:
        resolve(f"hf-hub:{REPOSITORY}", cache_dir=tmp_path / "hub")
    assert REPOSITORY in str(error.value)
    assert "model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:a b/c"])
def test_malformed_hub_ids_are_refused(cache: Path, source: str) -> None:
    with pytest.raises(DownloadError, match="owner/name"):
        resolve(source)


def test_failures_of_the_hub_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(DownloadError, match="cannot be fetched: first line second line"):
        resolve(f"hf-hub:{REPOSITORY}", offline=False)


# the package


def test_importing_the_package_needs_torch_and_nothing_else() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    folder = Path(os.fspath(nearfield.checkpoints.__file__)).parent
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path


def test_every_public_name_exists() -> None:
    assert all(hasattr(nearfield.checkpoints, name) for name in nearfield.checkpoints.__all__)
