"""scripts/predict.py: the three tasks on files, folders and patterns, and the command's manners."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nearfield
import numpy as np
import pytest
import torch
import yaml
from nearfield import checkpoints
from nearfield.engine import network
from nearfield.engine.config import ModelConfig, TaskConfig, TrainConfig
from nearfield.engine.dense import inference
from nearfield.engine.dense.decode import read_image
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import normalize, to_dtype, to_pil_image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
Run = Callable[..., dict[str, Any]]
NAMES = ["ant", "bee", "cow", "dog"]
SMALL = {"channels": 32, "box_features": 32, "mask_convs": 1, "mask_channels": 16, "proposals": 50, "detections": 10}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The module of the command; scripts find one another in their own folder."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("predict")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def run(script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; what its last line holds, its text, its errors, and its exit code under ``code``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> dict[str, Any]:
        code = script.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        last = printed.out.splitlines()[-1:] or ["{}"]
        return {**json.loads(last[0]), "code": code, "text": printed.out, "err": printed.err}

    return call


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = nearfield.create_model("nat_nano", num_classes=len(NAMES)).eval()
    path = tmp_path_factory.mktemp("file") / "nat.safetensors"
    return model, checkpoints.save(model.state_dict(), path, {"model": "nat_nano"})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of small pictures: one of them below it, one broken, and a file that is no picture."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (50, 60)), ("b.jpg", (90, 40)), ("more/a.png", (64, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    return folder


def run_folder(path: Path, config: TrainConfig, model: nn.Module, preparation: dict[str, Any]) -> Path:
    """A folder as train.py leaves it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    meta = {"num_classes": len(NAMES), "in_chans": 3, "class_names": NAMES, "preparation": preparation}
    (path / "meta.json").write_text(json.dumps(meta))
    checkpoints.save(model.state_dict(), path / "last.safetensors", {"model": config.model.name})
    return path


MEAN_STD = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.fixture
def detector(tmp_path: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    task = TaskConfig(name="detection", min_size=64, max_size=96, kwargs=SMALL)
    config = TrainConfig(model=ModelConfig(name="nat_nano", in_chans=3), task=task)
    model: Any = network.build_detector(config.model, task, "mask_rcnn", num_classes=len(NAMES)).eval()
    path = run_folder(tmp_path / "detection", config, model, {"min_size": 64, "max_size": 96, **MEAN_STD})
    return model, path


@pytest.fixture
def segmentor(tmp_path: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    task = TaskConfig(name="segmentation", fit=[128, 48], flip=True, kwargs={"channels": 32, "aux_channels": 16})
    config = TrainConfig(model=ModelConfig(name="nat_nano", in_chans=3), task=task)
    model: Any = network.build_segmentor(config.model, task, "upernet", num_classes=len(NAMES)).eval()
    return model, run_folder(tmp_path / "segmentation", config, model, {"fit": [128, 48], **MEAN_STD})


def test_likeliest_classes_are_those_of_the_model(run: Run, classifier: tuple[Any, Path], photos: Path) -> None:
    model, path = classifier
    names = photos / "names.txt"
    names.write_text("\n".join(NAMES))
    said = run(photos / "a.png", "--checkpoint", path, "--names", names, "--topk", 3, "--output", "out")
    assert (said["code"], said["task"], said["model"], said["images"]) == (0, "classification", "nat_nano", 1)
    (row,) = said["predictions"]

    from timm.data import create_transform, resolve_model_data_config

    picture = Image.open(photos / "a.png")
    with torch.inference_mode():
        expected = model(create_transform(**resolve_model_data_config(model))(picture)[None])[0].softmax(-1)
    shares, classes = expected.topk(3)
    assert [entry["class"] for entry in row["top"]] == classes.tolist()
    assert [entry["p"] for entry in row["top"]] == pytest.approx(shares.tolist(), abs=1e-6)
    assert [entry["name"] for entry in row["top"]] == [NAMES[number] for number in classes]
    assert NAMES[int(classes[0])] in said["text"]
    with Image.open(row["picture"]) as annotated:
        assert annotated.height > annotated.width * 50 / 60  # the bars are below the picture


def test_folders_patterns_and_files_each_once_and_what_is_broken_is_left_out(
    run: Run, classifier: tuple[Any, Path], photos: Path
) -> None:
    said = run(photos, photos / "*.jpg", photos / "a.png", photos / "none*", "--checkpoint", classifier[1])
    assert said["code"] == 0
    files = [str(photos / name) for name in ("a.png", "b.jpg", "more/a.png")]
    assert [row["file"] for row in said["predictions"]] == files
    assert (said["images"], said["failed"]) == (3, 2)
    assert [Path(error["file"]).name for error in said["errors"]] == ["none*", "broken.png"]
    assert len(said["err"].splitlines()) == 2
    assert str(photos / "broken.png") in said["err"]
    made = sorted(path.name for path in Path("predictions").iterdir())
    assert made == ["a-2.predicted.png", "a.predicted.png", "b.predicted.png", "results.json"]
    stored = json.loads(Path(said["results"]).read_text())
    assert stored == {key: value for key, value in said.items() if key not in ("code", "text", "err")}


def test_batches_do_not_change_what_is_said(run: Run, classifier: tuple[Any, Path], photos: Path) -> None:
    one = run(photos, "--checkpoint", classifier[1], "--output", "one")
    three = run(photos, "--checkpoint", classifier[1], "--output", "three", "--batch-size", 3)
    for a, b in zip(one["predictions"], three["predictions"], strict=True):
        assert [entry["class"] for entry in a["top"]] == [entry["class"] for entry in b["top"]]
        assert [entry["p"] for entry in a["top"]] == pytest.approx([entry["p"] for entry in b["top"]], abs=1e-6)


def test_a_picture_that_the_model_cannot_take_does_not_stop_its_batch(
    run: Run, classifier: tuple[Any, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = sys.modules["_predict_tasks"]
    usual = tasks._Classifier.__call__

    def picky(self: Any, images: Any) -> Any:
        if any(image.shape[-2:] == (90, 40) for image in images):
            raise RuntimeError("cannot take\nthis")
        return usual(self, images)

    monkeypatch.setattr(tasks._Classifier, "__call__", picky)
    said = run(photos, "--checkpoint", classifier[1], "--batch-size", 8)
    assert (said["code"], said["images"], said["failed"]) == (0, 2, 2)
    assert f"{photos / 'b.jpg'}: cannot take this\n" in said["err"]


@pytest.mark.parametrize("output", ["predictions", "."])
def test_the_results_of_an_earlier_run_are_no_pictures(run: Run, segmentor: tuple[Any, Path], output: str) -> None:
    for name in ("a.png", "more/own.predicted.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(name)
    asked = (".", "*", "**/*.png", "--checkpoint", segmentor[1], "--size", 32, "--output")
    first = run(*asked, output)
    assert (first["images"], first["left_out"]) == (2, 0)
    for place in (output, "elsewhere"):  # the results are known by the results.json beside them, too
        again = run(*asked, place)
        assert [row["file"] for row in again["predictions"]] == ["a.png", "more/own.predicted.png"]
        assert again["left_out"] == 4
        assert "predict: 4 pictures left out, which are results of this command" in again["err"]
    named = run("a.png", Path(output, "a.predicted.png"), *asked[3:], output)
    assert (named["images"], named["left_out"], named["err"]) == (2, 0, "")


def test_long_and_strange_names_are_done_like_any_other(run: Run, classifier: tuple[Any, Path], photos: Path) -> None:
    odd = os.fsdecode(b"odd\xff.png")
    names = [f"{'x' * 245}.png", f"{'x' * 240}yyyyy.png", f"{'ä' * 125}.png", odd, "z.png"]
    for name in names:
        (photos / name).write_bytes((photos / "a.png").read_bytes())
    said = run(*(photos / name for name in names), "--checkpoint", classifier[1])
    assert (said["code"], said["images"], said["failed"], said["err"]) == (0, 5, 0, "")
    assert len({row["picture"] for row in said["predictions"]}) == 5
    assert all(Path(row["picture"]).is_file() for row in said["predictions"])


def test_a_picture_that_cannot_be_written_is_said_and_the_rest_is_done(
    run: Run, classifier: tuple[Any, Path], photos: Path
) -> None:
    Path("predictions/a.predicted.png").mkdir(parents=True)  # a folder of the name that the first result would have
    said = run(photos, "--checkpoint", classifier[1], "--batch-size", 2)
    assert (said["code"], said["images"], said["failed"]) == (0, 2, 2)
    assert f"predict: {photos / 'a.png'}: cannot write its results" in said["err"]
    assert Path(said["results"]).is_file()


def test_a_folder_that_cannot_be_written_to_ends_the_run(
    run: Run, classifier: tuple[Any, Path], photos: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_picture", full)
    said = run(photos, "--checkpoint", classifier[1])
    assert (said["code"], said["err"]) == (2, "predict: predictions: cannot write there: No space left on device\n")


def test_results_that_cannot_be_written_are_one_line(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    classifier: tuple[Any, Path],
    photos: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    given = [str(photos / "a.png"), "--checkpoint", str(classifier[1]), "--output", str(tmp_path / "out")]
    assert script.main(given) == 2
    assert capsys.readouterr().err == f"predict: {tmp_path / 'out'}: cannot write there: Is a directory\n"


def test_nothing_that_works_is_exit_code_1_and_still_json(run: Run, classifier: tuple[Any, Path], photos: Path) -> None:
    said = run(photos / "broken.png", photos / "gone.png", "--checkpoint", classifier[1])
    assert (said["code"], said["images"], said["failed"], said["predictions"]) == (1, 0, 2, [])


def test_objects_are_those_of_the_detector(run: Run, detector: tuple[Any, Path], photos: Path) -> None:
    from faster_coco_eval.core.mask import decode

    model, path = detector
    image = read_image(photos / "more" / "a.png")
    with torch.inference_mode():
        (expected,) = model([image])
    assert len(expected["scores"]) == 10
    threshold = round(float(expected["scores"][4:6].mean()), 6)
    assert threshold < expected["scores"][4]
    said = run(photos / "more", "--checkpoint", path, "--threshold", threshold)
    (row,) = said["predictions"]
    assert said["task"] == "detection"
    assert [entry["class"] for entry in row["objects"]] == expected["labels"][:5].tolist()
    assert [entry["name"] for entry in row["objects"]] == [NAMES[label] for label in expected["labels"][:5]]
    for entry, box, score in zip(row["objects"], expected["boxes"], expected["scores"], strict=False):
        assert entry["box"] == pytest.approx(box.tolist(), abs=0.006)
        assert entry["score"] == pytest.approx(float(score), abs=1e-6)
    stored = json.loads(Path(said["results"]).read_text())["predictions"][0]["objects"]
    for entry, mask in zip(stored, expected["masks"], strict=False):
        assert (decode(entry["mask"]) == mask.numpy()).all()
    assert "mask" not in row["objects"][0]
    none = run(photos / "more", "--checkpoint", path / "last.safetensors", "--threshold", 1)
    assert (none["code"], none["predictions"][0]["objects"]) == (0, [])
    assert "nothing found" in none["text"]


def test_class_maps_are_those_of_the_run_as_it_was_evaluated(
    run: Run, segmentor: tuple[Any, Path], photos: Path
) -> None:
    model, path = segmentor
    said = run(photos, "--checkpoint", path, "--batch-size", 2)
    assert (said["code"], said["task"], said["images"]) == (0, "segmentation", 3)
    for row in said["predictions"]:
        pixels = normalize(to_dtype(read_image(row["file"]), scale=True), **MEAN_STD)[None]
        expected = inference.predict(model, pixels.as_subclass(torch.Tensor), scale=(128, 48), flip=True)[0].argmax(0)
        with Image.open(row["classes_map"]) as stored:
            assert (np.asarray(stored) == expected.numpy()).all()
        assert sum(entry["share"] for entry in row["classes"]) == pytest.approx(1)
        counts = expected.flatten().bincount(minlength=4) / expected.numel()
        assert {entry["name"]: entry["share"] for entry in row["classes"]} == pytest.approx(
            {name: float(share) for name, share in zip(NAMES, counts, strict=True) if share}
        )


def test_whole_files_outside_of_a_run_need_a_head_and_the_number_of_classes(
    run: Run, segmentor: tuple[Any, Path], detector: tuple[Any, Path], photos: Path, tmp_path: Path
) -> None:
    big = network.build_segmentor(ModelConfig(name="nat_nano"), TaskConfig(), "fpn", num_classes=3)
    path = checkpoints.save(big.state_dict(), tmp_path / "fpn.safetensors", {"model": "nat_nano"})
    said = run(photos / "a.png", "--checkpoint", path, "--head", "fpn", "--num-classes", 3, "--size", 32)
    assert (said["code"], said["task"], said["model"]) == (0, "segmentation", "nat_nano")
    found = network.build_detector(ModelConfig(name="nat_nano"), TaskConfig(), "fcos", num_classes=3)
    path = checkpoints.save(found.state_dict(), tmp_path / "fcos.safetensors")
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    more = ("--model", "nat_nano", "--head", "fcos", "--names", tmp_path / "names.txt", "--size", 64)
    said = run(photos / "a.png", "--checkpoint", path, *more)
    assert (said["code"], said["task"]) == (0, "detection")


@pytest.mark.parametrize("task", ["classifier", "detector", "segmentor"])
def test_every_kind_of_picture_can_be_looked_at(
    run: Run, task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "kinds"
    folder.mkdir()
    Image.fromarray(rng.integers(0, 255, (1, 1, 3), dtype=np.uint8)).save(folder / "pixel.png")
    Image.fromarray(rng.integers(0, 255, (40, 300), dtype=np.uint8)).save(folder / "gray.png")
    Image.fromarray(rng.integers(0, 255, (30, 30, 4), dtype=np.uint8), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (30, 30), dtype=np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(rng.integers(0, 255, (20, 30, 4), dtype=np.uint8)).quantize(8).save(folder / "palette.png")
    turned = Image.fromarray(rng.integers(0, 255, (20, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    said = run(folder, "--checkpoint", request.getfixturevalue(task)[1], "--threshold", 0)
    assert (said["images"], said["failed"], said["err"]) == (6, 0, "")
    if task == "segmentor":
        with Image.open("predictions/turned.classes.png") as stored:
            assert stored.size == (20, 50)  # as it is seen


def test_weights_published_for_imagenet_have_its_names(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints.save(
        nearfield.create_model("nat_nano", num_classes=1000).state_dict(),
        tmp_path / "x.safetensors",
        {"model": "nat_nano"},
    )
    assert run(photos / "a.png", "--checkpoint", path)["predictions"][0]["top"][0]["name"] is None
    monkeypatch.setattr(sys.modules["_predict_models"], "_is_published", lambda _: True)
    top = run(photos / "a.png", "--checkpoint", path, "--topk", 1000)["predictions"][0]["top"]
    assert {entry["class"]: entry["name"] for entry in top}[281] == "tabby, tabby cat"


def test_a_run_of_classification_is_looked_at_as_it_was_trained(
    run: Run, classifier: tuple[Any, Path], photos: Path, tmp_path: Path
) -> None:
    model, _ = classifier
    config = TrainConfig(model=ModelConfig(name="nat_nano", in_chans=3))
    how = {"size": [40, 40], **MEAN_STD, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    path = run_folder(tmp_path / "run", config, model, how)
    said = run(photos / "a.png", "--checkpoint", path)
    picture = to_pil_image(read_image(photos / "a.png")).resize((40, 40), Image.Resampling.BILINEAR)
    pixels = normalize(to_dtype(torch.from_numpy(np.array(picture)).permute(2, 0, 1), scale=True), **MEAN_STD)
    with torch.inference_mode():
        expected = model(pixels[None])[0].softmax(-1)
    top = said["predictions"][0]["top"]
    assert {entry["name"]: entry["p"] for entry in top} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5
    )


def test_an_interruption_keeps_what_was_done(
    run: Run, classifier: tuple[Any, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = sys.modules["_predict_tasks"]
    usual = tasks._Classifier.__call__

    def impatient(self: Any, images: Any) -> Any:
        if images[0].shape[-2:] == (90, 40):
            raise KeyboardInterrupt
        return usual(self, images)

    monkeypatch.setattr(tasks._Classifier, "__call__", impatient)
    said = run(photos, "--checkpoint", classifier[1])
    assert (said["code"], said["images"]) == (130, 1)
    assert said["err"].count("\n") == 1
    assert len(json.loads(Path("predictions/results.json").read_text())["predictions"]) == 1


def test_broken_weights_are_said(run: Run, classifier: tuple[Any, Path], photos: Path, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in classifier[0].state_dict().items()}
    state["norm.weight"][0] = float("nan")
    path = checkpoints.save(state, tmp_path / "nan.safetensors", {"model": "nat_nano"})
    said = run(photos / "a.png", "--checkpoint", path)
    assert said["code"] == 1
    assert "not finite" in said["err"]


def test_every_head_that_can_be_trained_can_be_asked_for(script: ModuleType) -> None:
    from nearfield.models.dense import detection, segmentation

    for task, heads in (("detection", detection.HEADS), ("segmentation", segmentation.HEADS)):
        for head in heads:
            assert script._parser().parse_args(["a.png", "--head", head]).head == head
            assert sys.modules["_predict_models"]._task_of(head) == task


def test_mistakes_are_one_line(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    classifier: tuple[Any, Path],
    detector: tuple[Any, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    weights, picture = str(classifier[1]), str(photos / "a.png")

    def fails(*arguments: object) -> str:
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed
        assert printed.err.startswith("predict: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err

    assert "PICTURE" in fails("--checkpoint", weights)
    assert "--model is missing" in fails(picture)
    assert "without weights" in fails(picture, "--model", "nat_nano")
    assert "nat_nanno" in fails(picture, "--model", "nat_nanno", "--checkpoint", weights)
    assert "neither a file" in fails(picture, "--model", "nat_nano", "--checkpoint", "gone.pth")
    dense = ("--task", "detection", "--model", "nat_nano", "--num-classes", 3)
    assert fails(picture, *dense, "--checkpoint", "gone.pth").startswith("predict: --checkpoint gone.pth: ")
    assert "no run folder" in fails(picture, "--checkpoint", photos)
    assert "both given" in fails(picture, "--checkpoint", weights, "--pretrained")
    assert "is of nat_nano" in fails(picture, "--checkpoint", detector[1], "--model", "swin_nano")
    assert "is of mask_rcnn" in fails(picture, "--checkpoint", detector[1], "--head", "fcos")
    said = fails(picture, "--checkpoint", detector[1], "--num-classes", 5)
    assert f"--num-classes 5: the run in {detector[1]} is of {len(NAMES)}: leave --num-classes out" in said
    assert "no best.safetensors" in fails(picture, "--checkpoint", detector[1], "--weights", "best")
    assert "say --num-classes" in fails(picture, "--checkpoint", weights, "--task", "detection")
    assert "no upernet" in fails(picture, "--checkpoint", weights, "--head", "upernet", "--num-classes", 4)
    assert "--threshold" in fails(picture, "--checkpoint", weights, "--threshold", 2)
    assert "--size" in fails(picture, "--checkpoint", weights, "--size", "big")
    assert "--topk" in fails(picture, "--checkpoint", weights, "--topk", 0)
    assert "--device" in fails(picture, "--checkpoint", weights, "--device", "toaster")
    (tmp_path / "names.txt").write_text("one\n")
    assert "1 lines" in fails(picture, "--checkpoint", weights, "--names", tmp_path / "names.txt")
    assert "1 lines" in fails(picture, "--checkpoint", detector[1], "--names", tmp_path / "names.txt")
    assert not (tmp_path / "predictions").exists()
