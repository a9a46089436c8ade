"""Scenes of digits: what is written, that boxes, masks and maps agree, and that it is written once and whole."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearfield.engine.dense import scenes
from nearfield.engine.errors import DataError
from PIL import Image
from pycocotools.mask import decode

SMALL = {"count_train": 8, "count_val": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.write_scenes(tmp_path_factory.mktemp("scenes"), **SMALL)


def annotations(folder: Path, split: str = "train") -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_are_pictures_maps_and_annotations_of_both_splits(folder: Path) -> None:
    for split, count in (("train", 8), ("val", 4)):
        names = [f"{index:06d}.png" for index in range(count)]
        assert sorted(path.name for path in (folder / "images" / split).iterdir()) == names
        assert sorted(path.name for path in (folder / "annotations" / split).iterdir()) == names
        assert [image["file_name"] for image in annotations(folder, split)["images"]] == names
    assert (folder / "classes.txt").read_text().split() == scenes.MAP_CLASSES
    picture = Image.open(folder / "images" / "train" / "000000.png")
    assert (picture.mode, picture.size) == ("RGB", (128, 128))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_masks_and_masks_make_the_map(folder: Path, split: str) -> None:
    content = annotations(folder, split)
    assert [category["name"] for category in content["categories"]] == scenes.CLASSES
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        expected = np.zeros((128, 128), np.uint8)
        taken = np.zeros((128, 128), int)
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert 1 <= len(own) <= 6
        for annotation in own:
            mask = decode(annotation["segmentation"]).astype(bool)
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + width, y + height)
            assert annotation["area"] == mask.sum() >= 40
            assert max(width, height) <= 60
            expected[mask] = annotation["category_id"]
            taken += mask
        assert taken.max() == 1  # what is covered belongs to what covers it
        class_map = np.asarray(Image.open(folder / "annotations" / split / image["file_name"]))
        assert np.array_equal(class_map, expected)


def test_digits_stand_out_from_the_background(folder: Path) -> None:
    content = annotations(folder)
    for image in content["images"]:
        gray = np.asarray(Image.open(folder / "images" / "train" / image["file_name"]).convert("L"), float)
        ink = np.asarray(Image.open(folder / "annotations" / "train" / image["file_name"])) > 0
        assert gray[ink].mean() - gray[~ink].mean() > 2 * gray[~ink].std()


def test_held_out_scenes_show_held_out_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    draw = scenes._scene
    monkeypatch.setattr(scenes, "_scene", lambda rng, source, size: seen.append(source) or draw(rng, source, size))
    scenes.write_scenes(tmp_path, count_train=1, count_val=1)
    assert [len(source) for source in seen] == [1437, 360]


def test_the_same_bytes_come_again_and_other_seeds_differ(folder: Path, tmp_path: Path) -> None:
    again = scenes.write_scenes(tmp_path, **SMALL)
    assert digest(again) == digest(folder)
    other = scenes.write_scenes(tmp_path, **SMALL, seed=1)
    assert other != again
    pictures = {name for name in digest(again) if name.startswith("images")}
    assert all(digest(other)[name] != digest(again)[name] for name in pictures)
    more = scenes.write_scenes(tmp_path, count_train=9, count_val=4)
    assert digest(more).items() >= {(name, sum_) for name, sum_ in digest(again).items() if name in pictures}


def test_complete_scenes_are_used_and_not_drawn_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(scenes, "_draw", refuse)
    assert scenes.write_scenes(folder.parent, **SMALL) == folder


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = scenes._draw

    def interrupted(part: Path, wanted: Any) -> None:
        draw(part, wanted)
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_start_together_end_with_one_whole_set(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=scenes.write_scenes, args=(tmp_path,), kwargs=SMALL) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert digest(tmp_path / folder.name) == digest(folder)


def test_the_size_of_the_canvas_decides_how_many_digits_it_takes(tmp_path: Path) -> None:
    counts = {}
    for size in (64, 128, 256):
        content = annotations(scenes.write_scenes(tmp_path, count_train=6, count_val=1, size=size))
        counts[size] = len(content["annotations"])
        assert all(image["width"] == image["height"] == size for image in content["images"])
    assert counts[64] < counts[128] < counts[256]


def test_what_cannot_be_written_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"count_val=0.*at least 1"):
        scenes.write_scenes(tmp_path, count_val=0)
    with pytest.raises(ValueError, match="size=32"):
        scenes.write_scenes(tmp_path, size=32)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write scenes here"):
        scenes.write_scenes(tmp_path / "file", **SMALL)
    other = tmp_path / folder.name
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match=rf"{folder.name}: cannot write scenes there .*remove it"):
        scenes.write_scenes(tmp_path, **SMALL)
    assert (other / "mine.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", folder.name])
