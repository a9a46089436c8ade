"""Reading never runs code and never returns half a file; writing is all or nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import stat
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from nearfield.checkpoints import CheckpointError, UnsafeCheckpoint, read, read_metadata, save
from torch import Tensor

STATE = {"stem.weight": torch.arange(6000.0).reshape(60, 100), "stages.0.bias": torch.ones(3)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def one_line(error: pytest.ExceptionInfo[CheckpointError], path: Path) -> bool:
    return str(path) in str(error.value) and "\n" not in str(error.value)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize(
    "name", ["file.pth", "file.pt", "file.bin", "file.ckpt", "file.pth.tar", "file", "file.safetensors"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_whatever_their_name(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    torch.save({"model": STATE, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path), STATE)
    assert same(read(str(path)), STATE)


@pytest.mark.parametrize("name", ["file.safetensors", "file.pth", "file"])
def test_safetensors_files_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    safetensors.torch.save_file({f"module.{key}": value for key, value in STATE.items()}, path)
    assert same(read(path), STATE)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read(path), STATE)


def test_a_command_line_in_the_file_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.1)}, path)
    assert same(read(path), STATE)


def test_options_reach_unwrapping(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    average = {key: value + 1 for key, value in STATE.items()}
    torch.save(
        {"state_dict": {f"backbone.{key}": value for key, value in STATE.items()}, "state_dict_ema": average}, path
    )
    assert same(read(path, ema=True), average)
    assert all(key.startswith("backbone.") for key in read(path, backbone=False))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "file.pth", tmp_path / "made"
    torch.save({"model": STATE, "x": Payload(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpoint, match="mkdir") as error:
        read(path)
    assert one_line(error, path)
    assert not target.exists()


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UnsafeCheckpoint, match="Linear") as error:
        read(path)
    assert one_line(error, path)


class HistoryBuffer:
    """Pickles as mmengine's does, with methods that are looked up by name."""

    __module__ = "mmengine.logging.history_buffer"

    def __init__(self) -> None:
        self.values, self.statistics = np.ones(3), {"mean": self.mean}

    def mean(self) -> float:
        return float(self.values.mean())


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_keep_beside_the_weights_is_dropped(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[HistoryBuffer.__module__], "HistoryBuffer", HistoryBuffer, raising=False)
    meta = {
        "best": np.float64(0.5),
        "step": np.int64(3),
        "PALETTE": np.zeros((2, 3), np.uint8),
        "loss": HistoryBuffer(),
    }
    path = tmp_path / "file.pth"
    torch.save({"meta": meta, "state_dict": STATE}, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path), STATE)


def test_attributes_are_not_looked_up(tmp_path: Path) -> None:
    class Lookup:
        def __reduce__(self) -> Any:
            return (getattr, (torch.ones(2), "data"))

    torch.save({"model": {**STATE, "looked.up": Lookup()}}, tmp_path / "file.pth")
    assert same(read(tmp_path / "file.pth"), STATE)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_pickles_are_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, target = tmp_path / "file.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps(Payload(target), protocol=protocol))
    with pytest.raises(UnsafeCheckpoint, match="pickle") as error:
        read(path)
    assert one_line(error, path)
    assert not target.exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("file/data.pkl", "file/constants.pkl", "file/code/x.py"):
            archive.writestr(name, "x")
    with pytest.raises(UnsafeCheckpoint, match="TorchScript") as error:
        read(path)
    assert one_line(error, path)


def torch_bytes(tmp_path: Path, zipped: bool) -> bytes:
    path = tmp_path / "whole"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, -1])
def test_truncated_torch_files_are_errors(tmp_path: Path, zipped: bool, kept: float) -> None:
    whole, path = torch_bytes(tmp_path, zipped), tmp_path / "file.pth"
    path.write_bytes(whole[: int(kept if kept < 0 else kept * len(whole))])
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert one_line(error, path)


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 100, -1])
def test_truncated_safetensors_are_errors(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"damaged|empty") as error:
        read(path)
    assert one_line(error, path)


def test_a_flipped_bit_in_a_weight_is_an_error(tmp_path: Path) -> None:
    whole, path = bytearray(torch_bytes(tmp_path, zipped=True)), tmp_path / "file.pth"
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged") as error:
        read(path)
    assert one_line(error, path)


def test_a_broken_pickle_stream_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(b"\x80\x02" + b"\xff" * 300)
    with pytest.raises(CheckpointError, match="damaged") as error:
        read(path)
    assert one_line(error, path)
    assert not isinstance(error.value, UnsafeCheckpoint)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("notes.txt", b"some text", r"a \.txt file"),
        ("model.onnx", b"\x08\x07\x12\x07pytorch", r"a \.onnx file"),
        ("file.pth", b"\n<!DOCTYPE html><html>", "a web page"),
        ("file.pth", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("file.pth.gz", b"\x1f\x8b\x08\x00", "unpack it"),
        ("file.tar", b"x" * 257 + b"ustar" + b"x" * 300, "unpack it"),
        ("file.pth", b"\x00\x01garbage", "something else, or a damaged file"),
        ("file.pth", b"", "is empty"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as error:
        read(path)
    assert one_line(error, path)


def test_other_zip_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(CheckpointError, match=r"zip archive \(weights\.npy\)") as error:
        read(path)
    assert one_line(error, path)


def test_a_folder_lists_its_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read(tmp_path)
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"last\.safetensors") as error:
        read(tmp_path)
    assert one_line(error, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as error:
        read(tmp_path / "nothing.pth")
    assert one_line(error, tmp_path / "nothing.pth")


@pytest.mark.parametrize("obj", [{}, {"epoch": 1}, [1, 2], torch.ones(2)], ids=["empty", "numbers", "list", "tensor"])
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, obj: Any) -> None:
    path = tmp_path / "file.pth"
    torch.save(obj, path)
    with pytest.raises(CheckpointError, match="dict of tensors") as error:
        read(path)
    assert one_line(error, path)


# writing


def test_saving_and_reading_is_bit_equal(tmp_path: Path) -> None:
    state = {
        **STATE,
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2),
        "transposed": torch.randn(4, 5).t(),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    path = save(state, tmp_path / "new" / "folder" / "file.safetensors", {"model": "nat_mini"})
    assert same(read(path), {key: value.detach() for key, value in state.items()})
    assert all(value.dtype == state[key].dtype for key, value in read(path).items())
    assert read_metadata(path)["model"] == "nat_mini"


def test_shared_memory_is_written_apart(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    state = {"a": weight, "tied": weight, "view": weight[:2]}
    assert same(read(save(state, tmp_path / "file.safetensors")), state)


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "safetensors.torch.save_file"])
def test_a_failed_save_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = save(STATE, tmp_path / "file.safetensors")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(CheckpointError, match="No space left") as error:
        save({"other": torch.ones(1)}, path)
    assert one_line(error, path)
    monkeypatch.undo()
    assert same(read(path), STATE)
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_an_interrupted_save_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(STATE, tmp_path / "file.safetensors")
    assert os.listdir(tmp_path) == []


def test_saved_files_have_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    path = save(STATE, tmp_path / "file.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize(
    ("state", "name", "metadata", "match"),
    [
        (STATE, "file.pth", None, r"must end in \.safetensors"),
        ({}, "file.safetensors", None, "nothing to save"),
        ({"a": 3}, "file.safetensors", None, "a is of type int"),
        (STATE, "file.safetensors", {"epoch": 3}, "strings"),
        (STATE, "a-file/file.safetensors", None, "cannot be written"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, name: str, metadata: Any, match: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(CheckpointError, match=match) as error:
        save(state, tmp_path / name, metadata)
    assert one_line(error, tmp_path / name)
    assert os.listdir(tmp_path) == ["a-file"]


def test_metadata_of_other_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(b"text")
    with pytest.raises(CheckpointError, match="header"):
        read_metadata(tmp_path / "file.pth")
