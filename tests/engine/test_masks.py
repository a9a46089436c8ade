"""Segmentation sets: every layout, what stored values mean, and each bad file said in one line."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearfield.engine.dense import classes, masks
from nearfield.engine.dense.masks import MaskSet
from nearfield.engine.dense.pairs import ENDINGS, LAYOUTS, MASK_FOLDERS
from nearfield.engine.dense.scenes import MAP_CLASSES, write_scenes
from nearfield.engine.errors import ConfigError, DataError
from PIL import Image
from torchvision import tv_tensors

SIZE = (20, 31)  # height, width


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def labels(path: Path, values: Any, mode: str = "L") -> np.ndarray:
    """A mask whose columns go through `values`; what was stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.resize(np.array(values), SIZE)
    image = Image.fromarray(stored.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path)
    return stored


def folder(root: Path, values: Any = (0, 1, 2, 255), count: int = 3, split: str = "train") -> Path:
    for index in range(count):
        picture(root / "images" / split / f"{index}.png", seed=index)
        labels(root / "masks" / split / f"{index}.png", np.roll(values, index))
    return root


def one_line(error: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value), str(error.value)


def ade20k(root: Path) -> Path:
    for split, count in (("training", 3), ("validation", 1)):
        for index in range(count):
            name = f"ADE_{split[:-3]}_{index:08d}"
            picture(root / "images" / split / f"{name}.jpg")
            labels(root / "annotations" / split / f"{name}.png", (0, 1, 2, 150))
    (root / "objectInfo150.txt").touch()
    return root


def cityscapes(root: Path, kind: str = "labelIds", values: Any = (0, 6, 7, 8, 33, 29)) -> Path:
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        picture(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        labels(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", values)
        labels(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", (26001,), "I;16")
        picture(root / "gtFine" / split / city / f"{stem}_gtFine_color.png")
    return root


def voc(root: Path) -> Path:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, ids in (("train", ("2007_1", "2007_2")), ("val", ("2007_3",))):
        (lists / f"{name}.txt").write_text("\n".join(ids) + "\n")
        for stem in ids:
            picture(root / "JPEGImages" / f"{stem}.jpg")
            labels(root / "SegmentationClass" / f"{stem}.png", (0, 1, 20, 255), "P")
    picture(root / "JPEGImages" / "2008_9.jpg")  # an image of the detection task
    return root


def test_the_names_are_those_of_the_sets() -> None:
    from torchvision.datasets import Cityscapes
    from torchvision.models._meta import _VOC_CATEGORIES

    evaluated = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 19), key=lambda c: c.train_id)
    assert [c.name for c in evaluated] == list(classes.CITYSCAPES)
    assert tuple(c.id for c in evaluated) == classes.CITYSCAPES_IDS
    assert list(classes.VOC) == ["background", *_VOC_CATEGORIES[1:]]
    assert len(set(classes.ADE20K)) == 150
    assert [classes.ADE20K[i] for i in (0, 7, 12, 20, 115, 127, 149)] == [
        "wall", "bed", "person", "car", "bag", "bicycle", "flag",
    ]  # fmt: skip


@pytest.mark.parametrize("above", [False, True])
def test_ade20k(tmp_path: Path, above: bool) -> None:
    ade20k(tmp_path / "ADEChallengeData2016")
    root = tmp_path if above else tmp_path / "ADEChallengeData2016"
    train, val = MaskSet(root, "train", layout="ade20k"), MaskSet(root, "val", layout="ade20k")
    assert (len(train), len(val), train.num_classes) == (3, 1, 150)
    assert train.class_names is not None
    assert train.class_names[149] == "flag"
    image, mask = train[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert (image.shape, image.dtype) == ((3, *SIZE), torch.uint8)
    assert (mask.shape, mask.dtype) == (SIZE, torch.int64)
    assert mask[0, :4].tolist() == [255, 0, 1, 149]


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("labelIds", (0, 6, 7, 8, 33, 29), [255, 255, 0, 1, 18, 255]),
        ("labelTrainIds", (255, 0, 1, 18), [255, 0, 1, 18]),
    ],
)
def test_cityscapes(tmp_path: Path, kind: str, stored: tuple[int, ...], expected: list[int]) -> None:
    cityscapes(tmp_path, kind, stored)
    train = MaskSet(tmp_path, "train", layout="cityscapes")
    assert (len(train), len(MaskSet(tmp_path, "validation", layout="cityscapes"))) == (2, 1)
    assert train.num_classes == 19
    assert train.report == {"images": 2, "images without a mask": 0, "masks without an image": 0}
    assert train[1][1][0, : len(expected)].tolist() == expected


def test_cityscapes_takes_train_ids_where_both_are(tmp_path: Path) -> None:
    cityscapes(tmp_path, "labelIds", (7,))
    cityscapes(tmp_path, "labelTrainIds", (5,))
    assert MaskSet(tmp_path, layout="cityscapes")[0][1].unique().tolist() == [5]


@pytest.mark.parametrize("place", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path: Path, place: str) -> None:
    voc(tmp_path / place)
    train = MaskSet(tmp_path, "train", layout="voc")
    assert (len(train), len(MaskSet(tmp_path, "val", layout="voc")), train.num_classes) == (2, 1, 21)
    assert train[0][1][0, :4].tolist() == [0, 1, 20, 255]  # palette indices, not colours


@pytest.mark.parametrize("form", ["trainaug", "aug", "paths"])
def test_voc_trains_on_the_augmented_list_where_it_is(tmp_path: Path, form: str) -> None:
    lists = voc(tmp_path) / "ImageSets" / "Segmentation"
    labels(tmp_path / "SegmentationClassAug" / "2008_9.png", (3,))
    text = {
        "trainaug": "2007_1\n2007_2\n2008_9\n",
        "aug": "2008_9\n",
        "paths": "".join(
            f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png\n" for stem in ("2007_1", "2007_2", "2008_9")
        ),
    }[form]
    (lists / ("aug.txt" if form == "aug" else "trainaug.txt")).write_text(text)
    train = MaskSet(tmp_path, "train", layout="voc")
    assert [Path(train.filename(i)).stem for i in range(len(train))] == ["2007_1", "2007_2", "2008_9"]
    assert train[2][1].unique().tolist() == [3]
    assert len(MaskSet(tmp_path, "train.txt", layout="voc")) == 2
    assert len(MaskSet(tmp_path, "val", layout="voc")) == 1


@pytest.mark.parametrize("parent", ["masks", "labels", "annotations"])
@pytest.mark.parametrize("split", ["train", "training"])
def test_a_plain_folder(tmp_path: Path, parent: str, split: str) -> None:
    for name, ending in (("b", "jpg"), ("a", "png"), ("sub/a", "webp")):
        picture(tmp_path / "images" / split / f"{name}.{ending}")
        labels(tmp_path / parent / "train" / f"{name}.png", (0, 4, 255))
    (tmp_path / "images" / split / ".DS_Store").touch()
    (tmp_path / "images" / split / "._b.jpg").touch()
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\ntree\nperson\n")
    data = MaskSet(tmp_path, "train")
    assert data.class_names == ["road", "car", "sky", "tree", "person"]
    assert [Path(data.filename(i)).name for i in range(len(data))] == ["a.png", "b.jpg", "a.webp"]
    assert data[0][1][0, :3].tolist() == [0, 4, 255]


def test_splits_outside_and_suffixes(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "images" / "a.jpg")
    stored = labels(tmp_path / "train" / "masks" / "a_mask.gif", (0, 1, 2), "P")
    data = MaskSet(tmp_path, "train", num_classes=3, mask_suffix="_mask")
    assert np.array_equal(data[0][1].numpy(), stored)
    with pytest.raises(DataError) as error:
        MaskSet(tmp_path, "train", num_classes=3)
    one_line(error, "a.jpg: no mask", "a.png", "there is a_mask.gif", "1 of 1", "skip_missing")


@pytest.mark.parametrize(
    ("label_map", "stored", "expected"),
    [
        ({0: 0, 255: 1}, (0, 255), [0, 1]),
        ({"10": 1, "20": 0, "0": 255}, (0, 10, 20), [255, 1, 0]),
    ],
)
def test_stored_values_are_mapped(tmp_path: Path, label_map: Any, stored: Any, expected: list[int]) -> None:
    data = MaskSet(folder(tmp_path, stored, count=1), num_classes=2, label_map=label_map)
    assert data[0][1][0, : len(expected)].tolist() == expected


@pytest.mark.parametrize("key", [lambda colour: colour, lambda colour: ",".join(map(str, colour))])
def test_colours_are_mapped(tmp_path: Path, key: Any) -> None:
    picture(tmp_path / "images" / "train" / "a.png")
    colours = np.array([(0, 0, 0), (128, 64, 128), (255, 0, 1)], dtype=np.uint8)
    index = np.resize(np.arange(3), SIZE)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    Image.fromarray(colours[index]).save(tmp_path / "masks" / "train" / "a.png")
    with pytest.raises(DataError) as error:
        MaskSet(tmp_path, num_classes=2)
    one_line(error, "masks/train/a.png", "RGB", "label_map={(R, G, B): class")
    label_map = {key((0, 0, 0)): 255, key((255, 0, 1)): 0, key((128, 64, 128)): 1}
    data = MaskSet(tmp_path, num_classes=2, label_map=label_map)
    assert torch.equal(data[0][1], torch.tensor([255, 1, 0])[torch.from_numpy(index)])
    del label_map[key((255, 0, 1))]
    with pytest.raises(DataError) as error:
        MaskSet(tmp_path, num_classes=2, label_map=label_map)
    one_line(error, "a.png: colour (255, 0, 1) at row 0, column 2", "label_map")


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    data = MaskSet(folder(tmp_path, count=12), num_classes=3)
    labels(data.pairs[7].mask, (0, 1, 2, 3))
    with pytest.raises(DataError) as error:
        data[7]
    one_line(error, data.pairs[7].mask, "label 3 at row 0, column 3", "0..2, 255", "3 classes")
    labels(data.pairs[0].mask, (0, 700), "I;16")
    with pytest.raises(DataError) as error:
        MaskSet(tmp_path, num_classes=3)
    one_line(error, data.pairs[0].mask, "label 700 at row 0, column 1")
    labels(data.pairs[0].mask, (0, 2, 255), "I;16")
    assert data[0][1][0, :3].tolist() == [0, 2, 255]


def test_ade20k_s_labels_end_at_150_and_cityscapes_ids_at_33(tmp_path: Path) -> None:
    root = ade20k(tmp_path / "ade")
    labels(next((root / "annotations" / "validation").glob("*.png")), (151,))
    with pytest.raises(DataError) as error:
        MaskSet(root, "val", layout="ade20k")
    one_line(error, "ADE_validat_00000000.png: label 151", "0..150, 255")
    with pytest.raises(DataError) as error:
        MaskSet(cityscapes(tmp_path / "city", values=(34,)), layout="cityscapes")
    one_line(error, "label 34", "0..33, 255")


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    data = MaskSet(folder(tmp_path), num_classes=3)
    picture(data.pairs[1].image, (10, 12))
    with pytest.raises(DataError) as error:
        data[1]
    one_line(error, data.pairs[1].image, data.pairs[1].mask, "31x20", "12x10")


@pytest.mark.parametrize("upright", [True, False])
def test_masks_of_turned_photographs_fit_as_seen_or_as_stored(tmp_path: Path, upright: bool) -> None:
    root = folder(tmp_path, (0, 1, 2), count=1)
    values = np.zeros((*SIZE, 3), np.uint8)
    values[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # seen after a quarter turn clockwise
    Image.fromarray(values).save(root / "images" / "train" / "0.png", exif=exif)
    if upright:
        Image.fromarray(np.zeros(SIZE[::-1], np.uint8)).save(root / "masks" / "train" / "0.png")
    image, mask = MaskSet(root, num_classes=3)[0]
    assert image.shape[-2:] == mask.shape == (SIZE[::-1] if upright else SIZE)
    assert image[0].nonzero().tolist() == ([[0, SIZE[0] - 1]] if upright else [[0, 0]])


def test_broken_files_are_named(tmp_path: Path) -> None:
    data = MaskSet(folder(tmp_path), num_classes=3)
    data.pairs[1].mask.write_bytes(data.pairs[1].mask.read_bytes()[:60])
    data.pairs[2].image.write_bytes(b"")
    for index, path in ((1, data.pairs[1].mask), (2, data.pairs[2].image)):
        with pytest.raises(DataError) as error:
            data[index]
        one_line(error, f"{path}: cannot read this")
    image = Image.fromarray(np.zeros(SIZE, np.uint8))
    image.save(data.pairs[0].mask, "JPEG")
    with pytest.raises(DataError) as error:
        data[0]
    one_line(error, data.pairs[0].mask, "JPEG", "png")


def test_missing_partners_are_named_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, count=5)
    (tmp_path / "masks" / "train" / "1.png").unlink()
    (tmp_path / "masks" / "train" / "3.png").unlink()
    (tmp_path / "images" / "train" / "4.png").unlink()
    with pytest.raises(DataError) as error:
        MaskSet(tmp_path, num_classes=3)
    one_line(error, "images/train/1.png: no mask", "masks/train/1.png", "2 of 4 images")
    with caplog.at_level(logging.INFO):
        data = MaskSet(tmp_path, num_classes=3, skip_missing=True)
    assert len(data) == 2
    assert data.report == {"images": 2, "images without a mask": 2, "masks without an image": 1}
    assert sum("2 images without a mask, left out" in line for line in caplog.messages) == 1
    assert sum("1 masks without an image" in line for line in caplog.messages) == 1
    assert sum("2 images, 3 classes" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes", "voc", "folder"])
def test_a_mask_that_is_gone_is_named_in_every_layout(tmp_path: Path, layout: str) -> None:
    root = {"ade20k": ade20k, "cityscapes": cityscapes, "voc": voc, "folder": folder}[layout](tmp_path)
    arguments: dict[str, Any] = {"layout": layout, "num_classes": 3 if layout == "folder" else None}
    data = MaskSet(root, **arguments)
    data.pairs[0].mask.unlink()
    with pytest.raises(DataError) as error:
        MaskSet(root, **arguments)
    one_line(error, data.pairs[0].image, data.pairs[0].mask, f"1 of {len(data)}")
    assert len(MaskSet(root, skip_missing=True, **arguments)) == len(data) - 1


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    def fails(*parts: object, root: Path = tmp_path, split: str = "train", **arguments: Any) -> None:
        with pytest.raises(DataError) as error:
            MaskSet(root, split, **arguments)
        one_line(error, *parts)

    fails("nowhere: no such folder", root=tmp_path / "nowhere")
    fails("ade20k has images/training", "nothing", layout="ade20k")
    fails("leftImg8bit: no such folder", layout="cityscapes")
    fails("voc has JPEGImages", layout="voc")
    fails("no folder train", num_classes=2)
    (tmp_path / "images" / "train").mkdir(parents=True)
    fails("no folder of masks", "masks/train", num_classes=2)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    fails("no images in it", num_classes=2)
    fails("no folder val", "there is: train", split="val", num_classes=2)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    fails("could all be the masks", num_classes=2)
    (tmp_path / "full" / "images" / "ADE").mkdir(parents=True)
    fails("full ADE20K", "ADEChallengeData2016", root=tmp_path / "full", layout="ade20k")
    lists = voc(tmp_path / "voc") / "ImageSets" / "Segmentation"
    fails("test.txt: no such list", "train, val", root=tmp_path / "voc", split="test", layout="voc")
    (lists / "val.txt").write_text("2007_3\n2007_4\n")
    fails("2007_4.jpg: no such file", "val.txt", root=tmp_path / "voc", split="val", layout="voc")


def test_names_that_could_be_two_files_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path)
    labels(root / "masks" / "train" / "1.bmp", (0,))
    with pytest.raises(DataError) as error:
        MaskSet(root, num_classes=3)
    one_line(error, "1.png: 1.bmp has the same name")
    (root / "masks" / "train" / "1.bmp").unlink()
    shutil.copy(root / "images" / "train" / "1.png", root / "images" / "train" / "1.bmp")
    with pytest.raises(DataError) as error:
        MaskSet(root, num_classes=3)
    one_line(error, "1.png: another image of this name")


def test_a_binary_mask_of_0_and_255_is_not_taken_for_ignored(tmp_path: Path) -> None:
    root = folder(tmp_path, (0, 255))
    with pytest.raises(DataError) as error:
        MaskSet(root, num_classes=2)
    one_line(error, "label_map={0: 0, 255: 1}")
    assert MaskSet(root, num_classes=1)[0][1].unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({}, ("num_classes is not set", "classes.txt")),
        ({"num_classes": 300}, ("num_classes=300", "255")),
        ({"num_classes": 3, "class_names": ["a", "b"]}, ("num_classes=3", "2 class names")),
        ({"layout": "city", "num_classes": 3}, ("layout='city'", "did you mean 'cityscapes'")),
        ({"num_classes": 3, "label_map": {0: 3}}, ("label_map: 0: 3 is no class", "0..2")),
        ({"num_classes": 3, "label_map": {0: 1, (1, 2, 3): 1}}, ("all numbers", "all colours")),
        ({"num_classes": 3, "label_map": {"wall": 1}}, ("label_map: 'wall'",)),
        ({"num_classes": 3, "label_map": {256: 1}}, ("0..255",)),
    ],
)
def test_arguments_that_contradict_are_named(tmp_path: Path, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        MaskSet(folder(tmp_path), **arguments)
    one_line(error, *parts)


def test_class_names_of_another_number_than_the_layout_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 names, but ade20k has 150"):
        MaskSet(ade20k(tmp_path), layout="ade20k", class_names=["a", "b"])


def test_the_scenes_of_digits_are_a_plain_folder(tmp_path: Path) -> None:
    root = write_scenes(tmp_path, count_train=3, count_val=2, size=64)
    train, val = MaskSet(root, "train"), MaskSet(root, "val")
    assert (len(train), len(val), train.num_classes) == (3, 2, 11)
    assert train.class_names == MAP_CLASSES
    image, mask = train[0]
    assert image.shape == (3, 64, 64)
    assert int(mask.max()) in range(1, 11)


def test_gray_images_one_pixel_and_workers(tmp_path: Path) -> None:
    for index, size in enumerate(((1, 1), (1, 7), (5, 1))):
        picture(tmp_path / "images" / "val" / f"{index}.png", size)
        (tmp_path / "masks" / "val").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, index, np.uint8)).save(tmp_path / "masks" / "val" / f"{index}.png")
    data = MaskSet(tmp_path, "val", num_classes=3, channels=1)
    assert [image.shape for image, _ in (data[i] for i in range(3))] == [(1, 1, 1), (1, 1, 7), (1, 5, 1)]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[2][1], data[2][1])
    data.transform = lambda image, mask: (image.float(), mask[..., :1, :1])
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=0)
    assert [int(mask) for _, mask in loader] == [0, 1, 2]
    assert all(mask.dtype == torch.int64 for _, mask in loader)


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes", "voc", "folder"])
def test_tables_are_made_when_a_set_is_opened_and_not_for_every_mask(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = {"ade20k": ade20k, "cityscapes": cityscapes, "voc": voc, "folder": folder}[layout](tmp_path)
    if layout == "cityscapes":  # a split of both kinds of numbers
        city = root / "gtFine" / "train" / "ulm"
        labels(city / "ulm_000000_000019_gtFine_labelTrainIds.png", (18, 7))
    data = MaskSet(root, layout=layout, num_classes=3 if layout == "folder" else None)
    expected = [data.mask(index) for index in range(len(data))]
    if layout == "cityscapes":
        assert [mask[0, :2].tolist() for mask in expected] == [[255, 255], [18, 7]]
    again = pickle.loads(pickle.dumps(data))
    monkeypatch.setattr(masks, "_number_table", None)
    for index, mask in enumerate(expected):
        assert torch.equal(data.mask(index), mask)
        assert torch.equal(again.mask(index), mask)


def test_the_page_on_data_names_what_the_code_reads() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        assert f"### `{layout}`" in page
    for folder_name in MASK_FOLDERS:
        assert f"{folder_name}/" in page
    for ending in ENDINGS:
        assert ending.removeprefix(".") in page
    assert (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33) == classes.CITYSCAPES_IDS
    assert "7, 8, 11, 12, 13, 17, 19 .. 28, 31, 32, 33" in page
