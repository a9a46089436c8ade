"""Keys that nobody reads are refused, data that nobody named are not taken for the user's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from nearfield.engine import door, evaluation, fit, reads
from nearfield.engine.config import AugConfig, DataConfig, EvalConfig, ModelConfig, TaskConfig, TrainConfig
from nearfield.engine.errors import ConfigError

TASKS = ["classification", "detection", "segmentation"]
COCO = ["task=detection", "data=coco"]
MASKS = ["task=segmentation", "data=masks"]


def checked(*overrides: str) -> TrainConfig:
    config = door.compose("train", TrainConfig, overrides)
    reads.check(config, door.touched(door.expand(TrainConfig, overrides)[1]))
    return config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*COCO, "data.val_split=test"], r"data\.val_split=test: not read by task=detection data=coco: .*val_images"),
        ([*COCO, "data.mask_suffix=_m"], r"data\.mask_suffix=_m: not read"),
        ([*COCO, "data.class_names=[a,b]"], r"data\.class_names=\['a', 'b'\]: not read"),
        ([*COCO, "data.mean=[0.5]"], r"use task\.kwargs\.image_mean="),
        ([*COCO, "task.ratios=[0.5,1]"], r"task\.ratios=.* not read by task=detection: it reads task\.\{head, .*min_"),
        ([*COCO, "task.flip=true"], r"task\.flip=True: not read"),
        ([*COCO, "task.crop=512"], r"task\.crop=512: not read"),
        ([*COCO, "task.smoothing=0.2"], r"task\.smoothing=0\.2: not read"),
        ([*COCO, "model.new_head=true"], r"model\.new_head=True: not read by task=detection: .* drawn anew"),
        ([*COCO, "aug=imagenet"], r"aug\.color_jitter=0\.4: not read by task=detection: aug=multi_scale"),
        ([*MASKS, "task.loss=bce"], r"task\.loss=bce: not read by task=segmentation"),
        ([*MASKS, "task.smoothing=0.2"], r"task\.smoothing=0\.2: not read"),
        ([*MASKS, "task.min_size=600"], r"task\.min_size=600: not read"),
        ([*MASKS, "data.class_map=x"], r"data\.class_map=x: not read"),
        ([*MASKS, "data.keep_empty=false"], r"data\.keep_empty=False: not read by task=segmentation data=masks"),
        ([*MASKS, "data.train_annotations=x"], r"data\.train_annotations=x: not read"),
        ([*MASKS, "data.crop_pct=0.9"], r"data\.crop_pct=0\.9: not read"),
        ([*MASKS, "model.new_head=true"], r"model\.new_head=True: not read"),
        ([*MASKS, "aug.hflip=0"], r"aug\.hflip=0\.0: not read by task=segmentation: aug=ade20k"),
        (["task=segmentation", "data=voc", "data.mask_suffix=_m"], r"not read by task=segmentation data=voc"),
        (["task=segmentation", "data.mask_suffix=_m"], r"not read by task=segmentation data=scenes"),
        (
            ["task.head=upernet"],
            r"task\.head=upernet: not read by task=classification: it reads task\.\{loss, smoothing",
        ),
        (["task.ratios=[0.5]"], r"task\.ratios=\[0\.5\]: not read"),
        (["data.held_out=0.1", "data=folder"], r"data\.held_out=0\.1: not read by task=classification data=folder"),
        (["data.crop_pct=0.9"], r"data\.crop_pct=0\.9: not read by task=classification data=digits"),
        (["aug=ade20k"], r"aug\.policy=random_crop: not read by task=classification"),
        (["data=torch", "data.class_map=x"], r"not read by task=classification data=torch/cifar10"),
    ],
)
def test_a_key_that_is_not_read_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        checked(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("debug", ["fdr", "limit", "overfit", "profiler"])
@pytest.mark.parametrize("rest", [[], ["data=OWN", "data.root=x"]])
def test_a_debug_group_goes_with_every_task(task: str, debug: str, rest: list[str]) -> None:
    own = {"classification": "folder", "detection": "coco", "segmentation": "ade20k"}[task]
    checked(f"task={task}", f"debug={debug}", *(value.replace("OWN", own) for value in rest))


RECIPES = sorted(path.stem for path in (door.CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_nothing_in_vain(name: str) -> None:
    checked(f"experiment={name}", "data.root=x")


@pytest.mark.parametrize("path", sorted((door.CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_set_sets_nothing_in_vain(path: Path) -> None:
    name = yaml.safe_load(path.read_text())["name"]
    tasks = [task for task in TASKS if any(key == name for key in reads.DATA[task])]
    tasks = tasks or ["classification"]
    for task in tasks:
        checked(f"task={task}", f"data={path.stem}")


def test_the_table_has_every_key_and_no_other() -> None:
    """A key that no task reads would be no key."""
    groups: list[tuple[type, list[tuple[str, ...]]]] = [
        (TaskConfig, list(reads.TASKS.values())),
        (AugConfig, list(reads.AUG.values())),
        (ModelConfig, list(reads.MODELS.values())),
        (DataConfig, [reads.SYNTHETIC, reads._BATCHES, *(k for sets in reads.DATA.values() for k in sets.values())]),
    ]
    for kind, tables in groups:
        keys = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        assert keys == {key for table in tables for key in table} | {"name"} & keys


def test_of_an_evaluation_what_is_set_by_hand_counts() -> None:
    config = EvalConfig(data=DataConfig(name="coco"), task=TaskConfig(name="detection", flip=True, crop=512))
    reads.check(config, ["task.min_size"])
    with pytest.raises(ConfigError, match=r"task\.crop=512: not read by task=detection"):
        reads.check(config, ["task", "task.crop"])
    config.task.kwargs = {"detections": 3}
    reads.check(config, ["task.kwargs.detections"])
    config.task.name, config.data.name = "classification", "folder"
    with pytest.raises(ConfigError, match=r"task\.kwargs=.* not read by task=classification"):
        reads.check(config, ["task.kwargs.detections"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=detection"], "but no data are named: add data=NAME, coco for COCO's format"),
        (["task=segmentation"], "one of ade20k, cityscapes, voc, masks"),
        ([], "one of folder, imagenet"),
        (["task=detection", "debug=fdr"], "add data=NAME"),
    ],
)
def test_a_root_without_data_is_no_place_for_scenes(overrides: list[str], words: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    given = [*overrides, f"data.root={mine}", f"paths.runs={tmp_path / 'runs'}"]
    with pytest.raises(ConfigError, match=words):
        fit.train(door.compose("train", TrainConfig, given), door.touched(door.expand(TrainConfig, given)[1]))
    assert not list(tmp_path.iterdir())
    for named in ("data=scenes", "data.name=scenes", "data=synthetic", "experiment=nat_tiny_mask_rcnn_coco"):
        checked(named, *(value for value in given if "task=" not in value), "task=detection")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_debug_run_draws_nothing_where_the_data_are(task: str, tmp_path: Path) -> None:
    """And is evaluated on what it drew; what names the user's files is not looked for in it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    own: dict[str, list[str]] = {
        "detection": ["data=coco", "data.train_annotations=x.json"],
        "segmentation": ["data=masks", "data.class_names=[a,b]", "data.mask_suffix=_m", "data.train_split=other"],
    }
    small = ["task.head=fcos", "task.kwargs.channels=32"] if task == "detection" else ["task.kwargs.channels=32"]
    overrides = [f"task={task}", *own[task], f"data.root={mine}", "debug=fdr", "model=nat_nano_128", *small]
    overrides += ["hardware=cpu", "trainer.plots=false", f"paths.runs={tmp_path / 'runs'}", "task.pictures=0"]
    config = door.compose("train", TrainConfig, overrides)
    summary = fit.train(config, door.touched(door.expand(TrainConfig, overrides)[1]))
    assert not list(mine.iterdir())
    given = [f"run={summary['run_dir']}", f"paths.results={tmp_path / 'results.csv'}"]
    again: dict[str, Any] = evaluation.evaluate(door.compose("eval", EvalConfig, given), door.touched(given))
    assert again["data"] == f"synthetic:{tmp_path / 'runs' / 'scenes'}"
    assert not list(mine.iterdir())
    given.append(f"data.root={mine}")
    with pytest.raises(ConfigError, match=r"data\.root=.*mine, but no data are named"):
        evaluation.evaluate(door.compose("eval", EvalConfig, given), door.touched(given))


def test_a_root_for_all_data_of_a_machine_may_be_there(tmp_path: Path) -> None:
    """As configs/local/default.yaml sets it: what draws its images does not read it."""
    config = door.compose("train", TrainConfig, [])
    config.data.root = str(tmp_path)
    reads.check(config, ["trainer.epochs"])
    with pytest.raises(ConfigError, match=r"data\.root=.*: not read by task=classification data=digits"):
        reads.check(config, ["data", "data.root"])


def test_the_scenes_of_a_run_may_be_moved(tmp_path: Path) -> None:
    config = EvalConfig(run="x", data=DataConfig(name="scenes", root=str(tmp_path)), task=TaskConfig(name="detection"))
    reads.check(config, ["run", "data.root"])
    with pytest.raises(ConfigError, match="but no data are named"):
        reads.check(dataclasses.replace(config, run=None), ["data.root"])
