"""Detection and segmentation through the doors: runs, their folders, their evaluation, and mistakes in one line."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearfield import checkpoints
from nearfield.engine import door, evaluation, fit, loop, tasks
from nearfield.engine.config import EvalConfig, TaskConfig, TrainConfig, TrainerConfig
from nearfield.engine.dense import sources
from nearfield.engine.dense.scenes import write_scenes
from nearfield.engine.dense.task import DenseTask
from nearfield.engine.errors import CheckpointMismatchError, ConfigError, DataError
from nearfield.engine.optim import create_scheduler
from nearfield.models.dense import create_segmentor
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

CPU = torch.device("cpu")
FDR = ["debug=fdr", "hardware=cpu", "logger=csv"]
TASKS = ["detection", "segmentation"]


def composed(*overrides: str) -> TrainConfig:
    return door.compose("train", TrainConfig, overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The summary of a short run of each task."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    return {task: fit.train(composed(f"task={task}", *FDR, f"paths.runs={root}")) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_weights_curves_and_pictures(task: str, runs: dict[str, dict[str, Any]]) -> None:
    folder = Path(runs[task]["run_dir"])
    names = {
        "config.yaml",
        "meta.json",
        "metrics.csv",
        "curves.png",
        "predictions.png",
        "last.safetensors",
        "train.log",
    }
    assert names <= {path.name for path in folder.iterdir()}
    assert runs[task]["task"] == task
    wanted = {"detection": {"box_ap", "box_ap50", "mask_ap", "mask_ap50"}, "segmentation": {"miou", "pixel_accuracy"}}
    assert wanted[task] <= set(runs[task])
    row = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    assert 0 <= float(row["loader_wait"]) < 1
    with Image.open(folder / "predictions.png") as picture:
        assert min(picture.size) > 200
    assert (
        len(json.loads((folder / "meta.json").read_text())["class_names"])
        == {"detection": 10, "segmentation": 11}[task]
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_evaluated_again_with_the_same_numbers(
    task: str, runs: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the scenes of the run are found from wherever
    results = tmp_path / "results.csv"
    config = door.compose("eval", EvalConfig, [f"run={runs[task]['run_dir']}", f"paths.results={results}"])
    summary = evaluation.evaluate(config, ["run", "paths.results"])
    primary = {"detection": "box_ap", "segmentation": "miou"}[task]
    assert summary[primary] == pytest.approx(runs[task][primary], abs=1e-4)
    rows = list(csv.DictReader(results.with_stem(f"results_{task}").open()))
    assert float(rows[0][primary]) == pytest.approx(summary[primary], abs=1e-4)
    assert not (tmp_path / "runs" / "scenes").exists()


@pytest.mark.parametrize("spelling", ["task.kwargs.score_threshold=0.1", "task.kwargs={score_threshold: 0.1}"])
def test_an_argument_set_by_hand_lies_beside_those_of_the_run(
    spelling: str, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    overrides = [f"run={runs['detection']['run_dir']}", spelling, "+model.kwargs.mlp_ratio=3"]
    config = evaluation.of_run(door.compose("eval", EvalConfig, overrides), door.touched(overrides))
    trained = composed("task=detection").task.kwargs
    assert config.task.kwargs == {**trained, "score_threshold": 0.1}
    assert config.model.kwargs == {"mlp_ratio": 3}
    whole = [*overrides, "task=detection"]
    config = evaluation.of_run(door.compose("eval", EvalConfig, whole), door.touched(whole))
    assert config.task.kwargs == {"score_threshold": 0.1}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compile=true on a CPU needs g++, which is not installed")
@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_compiled(task: str, runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """In training, which writes plain keys, and in evaluation."""
    counters["stats"].clear()
    compiled = fit.train(composed(f"task={task}", *FDR, "compile=true", f"paths.runs={tmp_path}"))
    assert counters["stats"].pop("unique_graphs") == 1
    keys = [set(checkpoints.read(Path(run["run_dir"]) / "last.safetensors")) for run in (compiled, runs[task])]
    assert keys[0] == keys[1]
    overrides = [f"run={runs[task]['run_dir']}", "compile=true", f"paths.results={tmp_path / 'results.csv'}"]
    summary = evaluation.evaluate(door.compose("eval", EvalConfig, overrides), ["run", "compile", "paths.results"])
    assert counters["stats"].pop("unique_graphs") >= 1
    primary = {"detection": "box_ap", "segmentation": "miou"}[task]
    assert summary[primary] == pytest.approx(runs[task][primary], abs=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_images_of_many_sizes_are_evaluated_by_two_graphs(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the first size, one of all others; in training each has its own."""
    counter, compile_module = CompileCounterWithBackend("eager"), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_module(module, backend=counter, **how))
    model = create_segmentor("nat_nano_128", "fpn", num_classes=3, aux=False).train(training)
    forward = DenseTask(TaskConfig(), None).compile(model, training=training)
    sizes = [(64 + 8 * i, 128 - 12 * i) for i in range(3 if training else 6)]
    with torch.set_grad_enabled(training):
        for size in sizes:
            forward(torch.randn(2, 3, *size))
    assert counter.frame_count == (len(sizes) if training else 2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.head=cascade_mask_rcnn"], r"is no cascade_mask_rcnn on nat_nano_128 with 10 classes: "),
        (["task.kwargs.channels=32"], r"is no mask_rcnn .* size mismatch"),
        (["model=nat_nano"], r"is no mask_rcnn on nat_nano with 10 classes"),
    ],
)
def test_only_whole_models_are_evaluated(overrides: list[str], words: str, runs: dict[str, dict[str, Any]]) -> None:
    """A head that was drawn at random has no numbers."""
    run = [f"run={runs['detection']['run_dir']}", *overrides]
    config = door.compose("eval", EvalConfig, run)
    with pytest.raises(CheckpointMismatchError, match=words) as caught:
        evaluation.evaluate(config, door.touched(run))
    assert "\n" not in str(caught.value)


def test_a_run_is_not_measured_on_classes_of_other_names(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, count_train=2, count_val=2)
    for split in ("train", "val"):
        path = folder / "annotations" / f"instances_{split}.json"
        values = json.loads(path.read_text())
        values["categories"][3]["name"] = "drei"
        path.write_text(json.dumps(values))
    overrides = [f"run={runs['detection']['run_dir']}", "data=coco", f"data.root={folder}", "data.workers=0"]
    with pytest.raises(DataError, match=r"trained on the classes 0, 1, 2, 3, .*'3' there, 'drei' here"):
        evaluation.evaluate(door.compose("eval", EvalConfig, overrides), door.touched(overrides))


def test_a_limit_of_training_is_none_of_the_evaluation(tmp_path: Path) -> None:
    overrides = [
        "data=synthetic",
        "data.num_images=16",
        "data.limit_val_batches=1",
        "debug=fdr",
        f"paths.runs={tmp_path}",
    ]
    run = fit.train(composed(*overrides, "data.batch_size=2", "data.eval_batch_size=2", "trainer.plots=false"))
    config = evaluation.of_run(door.compose("eval", EvalConfig, [f"run={run['run_dir']}"]), ["run"])
    assert config.data.limit_val_batches is None


def test_a_classifier_is_no_detector(tmp_path: Path) -> None:
    import nearfield
    from nearfield import checkpoints

    weights = tmp_path / "nat_nano_128.safetensors"
    checkpoints.save(nearfield.create_model("nat_nano_128", num_classes=10).state_dict(), weights, {})
    run = ["task=detection", "data=scenes", "model=nat_nano_128", f"checkpoint={weights}", f"paths.runs={tmp_path}"]
    with pytest.raises(CheckpointMismatchError, match=r"is a backbone alone, no mask_rcnn"):
        evaluation.evaluate(door.compose("eval", EvalConfig, [*run, "data.num_images=4"]), door.touched(run))


@pytest.mark.parametrize("head", ["faster_rcnn", "retinanet", "fcos", "cascade_mask_rcnn"])
def test_every_detector_goes_through_a_run(head: str, tmp_path: Path) -> None:
    small = {
        "faster_rcnn": ["task.kwargs.mask_convs=1"],
        "retinanet": ["task.kwargs.anchor_sizes=null"],
        "fcos": ["task.kwargs.anchor_sizes=null"],
        "cascade_mask_rcnn": [],
    }[head]
    summary = fit.train(
        composed("task=detection", *FDR, f"task.head={head}", *small, f"paths.runs={tmp_path}", "trainer.plots=false")
    )
    assert "box_ap" in summary or summary["n"] == 2
    assert ("mask_ap" in summary) <= ("mask" in head)


def test_a_semantic_fpn_goes_through_a_run(tmp_path: Path) -> None:
    summary = fit.train(composed("task=segmentation", *FDR, "task.head=fpn", f"paths.runs={tmp_path}"))
    assert 0 <= summary["miou"] <= 1


def test_a_run_of_a_classifier_gives_its_backbone(tmp_path: Path) -> None:
    """Pre-trained here, fine-tuned here: the head is left out."""
    first = fit.train(composed(*FDR, "model=nat_nano_128", f"paths.runs={tmp_path}", "trainer.plots=false"))
    config = composed(
        "task=segmentation",
        *FDR,
        f"paths.runs={tmp_path}",
        f"model.checkpoint={first['run_dir']}/last.safetensors",
    )
    # the debug run takes no checkpoint: put it back
    config.model.checkpoint = f"{first['run_dir']}/last.safetensors"
    prepared = tasks.prepare(config, CPU)
    from nearfield import checkpoints

    saved = checkpoints.read(Path(config.model.checkpoint))
    ours = prepared.model.state_dict()
    pairs = {
        f"backbone.body.model.{name}": value for name, value in saved.items() if not name.startswith(("head", "norm"))
    }
    assert len(pairs) > 20
    for name, value in pairs.items():
        assert torch.equal(ours[name], value), name


def test_updates_end_a_training_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    overrides = [*FDR, f"paths.runs={tmp_path}", "trainer.plots=false", "trainer.updates=3", "sched.warmup_updates=1"]
    config = composed(*overrides)
    prepared = tasks.prepare(config, CPU)
    assert prepared.train is not None
    assert len(prepared.train) == 2
    epochs = fit.create_state(config, prepared.model, len(prepared.train), torch.float32, CPU)[1]
    assert epochs == 2
    summary = fit.train(config)
    assert summary["epochs"] == 2
    row = list(csv.DictReader((Path(summary["run_dir"]) / "metrics.csv").open()))[-1]
    assert row["step"] == "3"


def test_a_warm_up_in_updates_reaches_the_rate_after_them() -> None:
    config = composed(
        "trainer.updates=160", "sched=cosine", "sched.name=poly", "sched.decay_rate=1", "sched.warmup_updates=15"
    )
    config.sched.min_lr, config.sched.warmup_lr = 0.0, 1e-9
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, epochs = create_scheduler(
        config.sched, config.optim, config.trainer, optimizer, updates_per_epoch=50, global_batch=16
    )
    assert epochs == 4
    rates = []
    for step in range(160):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[7] == pytest.approx(7 / 15, rel=0.02)
    assert rates[100] == pytest.approx(1 - 100 / 160, abs=0.02)


def test_a_pass_that_is_cut_short_counts_its_images_and_its_loss() -> None:
    config = composed("data=synthetic", "data.num_images=32", "data.batch_size=8", "model=nat_nano", "aug=none")
    prepared = tasks.prepare(config, CPU)
    state, _ = fit.create_state(config, prepared.model, 4, torch.float32, CPU)
    assert prepared.train is not None
    result = loop.train_epoch(state, prepared.task, prepared.train, TrainerConfig(), batch_size=8, until=3)
    assert (result.images, state.step, state.epoch, result.complete) == (24, 3, 1, True)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["task=detection", "data=digits"], ConfigError, r"data\.name: 'digits' has no boxes"),
        (["task=segmentation", "data=digits"], ConfigError, r"data\.name: 'digits' has no class maps"),
        (["task=detection", "data=coco", "model=nat_tiny"], DataError, r"data\.root is not set"),
        (["task=detection", "data=coco", "data.root=/"], ConfigError, r"model\.name is not set: .*model=\w+_tiny"),
        (
            ["task=segmentation", "data=ade20k", "data.root=/nowhere/ade", "model=nat_tiny"],
            DataError,
            r"data\.root=/nowhere/ade: no such",
        ),
        (
            ["task=detection", "data.mean=[0.5]"],
            ConfigError,
            r"data\.mean=\[0.5\]: not read .* task\.kwargs\.image_mean=",
        ),
        (["task=segmentation", "data.crop_pct=0.9"], ConfigError, r"data\.crop_pct=0.9: not read by task=segmentation"),
        (
            ["task=detection", "task.head=yolo"],
            ConfigError,
            r"^task\.head=yolo: no such head of task=detection; .*mask_rcnn",
        ),
        (["task=detection", "task.head=upernet"], ConfigError, r"^task\.head=upernet: .*; it has mask_rcnn, "),
        (
            ["task=segmentation", "task.head=uppernet"],
            ConfigError,
            r"^task\.head=uppernet: .*\(did you mean 'upernet'\?\)",
        ),
        (["task=detection", "task.kwargs.chanels=3"], ConfigError, r"^task\.kwargs\.chanels: .*mean 'channels'\?"),
        (
            ["task=segmentation", "task.kwargs.fpn_chanels=3"],
            ConfigError,
            r"^task\.kwargs\.fpn_chanels: .*'fpn_channels'\?",
        ),
        (
            ["task=detection", "model=resnet18", "task.kwargs.xyzzy=3"],
            ConfigError,
            r"kwargs\.xyzzy: .*create_detector takes channels, ",
        ),
        (["task=detection", "model.kwargs.mlp_ration=3"], ConfigError, r"^model\.name=nat_nano_128: .*mlp_ratio"),
        (["task=segmentation", "task.fit=[64]"], ConfigError, r"task\.fit=\[64\]: give two numbers"),
        (["task=segmentation", "task.fit=[64,128]"], ConfigError, r"task\.fit=\[64, 128\]: .*\[longest, shortest\]"),
        (["task=segmentation", "task.ratios=[]"], ConfigError, r"task\.ratios=\[\]: give one number or more"),
        (
            ["task=segmentation", "task.stride=8"],
            ConfigError,
            r"task\.stride=8: there are no windows without task\.crop",
        ),
        (["task=segmentation", "task.crop=64", "task.stride=65"], ConfigError, r"task\.stride=65: .*task\.crop=64"),
        (
            ["task=segmentation", "aug.kwargs.mean=[0.5]"],
            ConfigError,
            r"aug\.kwargs: policy .* mean and std are those of the data: data\.mean=",
        ),
        (["task=detection", "aug.policy=mosaic"], ConfigError, r"aug\.policy=mosaic: no such policy"),
        (["task=detection", "aug.kwargs.scales=2"], ConfigError, r"policy jitter has no option 'scales'"),
        (["task=segmentation", "aug.kwargs.crop=-3"], ConfigError, r"aug\.kwargs: policy light"),
        (
            ["task=detection", "aug=imagenet"],
            ConfigError,
            r"^aug\.color_jitter=0\.4: not read by task=detection: aug=multi_scale",
        ),
        (["task=segmentation", "aug.hflip=0"], ConfigError, r"^aug\.hflip=0\.0: not read .*: aug=ade20k"),
        (
            ["task=detection", "model.in_chans=2"],
            ConfigError,
            r"model\.in_chans=2: image files have 1, 3 or 4 channels",
        ),
        (["task=detection", "model=resnext7"], ConfigError, r"there is no model 'resnext7'"),
        (["task=segmentation", "model.num_classes=7"], ConfigError, r"the data has 11 classes"),
        (["task=detection", "data.num_classes=80"], ConfigError, r"the data has 10 classes"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], error: type[Exception], words: str, tmp_path: Path) -> None:
    quick = ["data.num_images=4", "data.batch_size=2"] if not any("data=" in o for o in overrides) else []
    with pytest.raises(error, match=words) as caught:
        fit.train(composed(*overrides, *quick, f"paths.runs={tmp_path}"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/*/config.yaml"))


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("task.kwargs.num_classes=3", r"data\.num_classes"),
        ("task.kwargs.in_chans=1", r"model\.in_chans"),
        ("task.kwargs.out_norm=layer", r"task\.out_norm"),
        ("task.kwargs.pretrained=true", r"model\.pretrained"),
        ("task.kwargs.checkpoint_path=x", r"model\.checkpoint"),
        ("task.kwargs.head=fcos", r"task\.head"),
        ("task.kwargs.backbone=nat_tiny", r"model\.name"),
        ("task.kwargs.min_size=64", r"task\.min_size"),
        ("model.kwargs.num_classes=3", r"data\.num_classes"),
        ("model.kwargs.in_chans=1", r"model\.in_chans"),
        ("model.kwargs.drop_path_rate=0.1", r"model\.drop_path_rate"),
        ("model.kwargs.checkpoint_path=x", r"model\.checkpoint"),
    ],
)
@pytest.mark.parametrize("task", ["classification", *TASKS])
def test_an_argument_with_a_key_of_its_own_is_no_kwarg(task: str, key: str, own: str, tmp_path: Path) -> None:
    if task == "classification" and key.startswith("task."):
        return  # not read at all
    with pytest.raises(ConfigError, match=rf"^{re.escape(key.split('=')[0])}: .*use {own}"):
        fit.train(composed(f"task={task}", key, f"paths.runs={tmp_path}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_images_have_the_channels_that_the_model_is_asked_for(task: str, tmp_path: Path) -> None:
    summary = fit.train(composed(f"task={task}", *FDR, "model.in_chans=1", f"paths.runs={tmp_path}"))
    config = EvalConfig(run=summary["run_dir"])
    config.paths.results = str(tmp_path / "results.csv")
    again = evaluation.evaluate(config)
    key = {"detection": "box_ap", "segmentation": "miou"}[task]
    assert again[key] == summary[key]


def test_what_was_counted_and_left_out_is_seen_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        "task=detection",
        "data.num_images=5",
        "data.batch_size=2",
        "data.limit_train_batches=1",
        "data.limit_val_batches=1",
        "data.keep_empty=false",
        "trainer.epochs=1",
        f"paths.runs={tmp_path}",
    )
    path = sources.scenes(config) / "annotations" / "instances_train.json"
    values = json.loads(path.read_text())
    emptied = values["images"][0]["id"]
    values["annotations"] = [one for one in values["annotations"] if one["image_id"] != emptied]
    values["annotations"][0]["bbox"] = [500, 500, 10, 10]
    path.write_text(json.dumps(values))
    run_dir = Path(fit.train(config)["run_dir"])
    objects = len(values["annotations"])  # with the one that is left out
    counts = f"1 images without objects, left out, {objects - 1} objects, 1 boxes outside the image, left out"
    line = f"train: 4 images, {counts}"
    assert line in capsys.readouterr().out.splitlines()
    assert line in (run_dir / "train.log").read_text()
    assert json.loads((run_dir / "meta.json").read_text())["counted"]["val"]["images"] == 1


def test_what_is_evaluated_is_counted_on_the_screen(
    runs: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvalConfig(run=runs["segmentation"]["run_dir"])
    config.paths.results = str(tmp_path / "results.csv")
    evaluation.evaluate(config)
    assert "val: 2 images" in capsys.readouterr().out.splitlines()


def test_categories_of_train_and_val_must_agree(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, count_train=2, count_val=2)
    val = folder / "annotations" / "instances_val.json"
    values = json.loads(val.read_text())
    values["categories"][3]["name"] = "drei"
    val.write_text(json.dumps(values))
    more = ["model=nat_nano", f"data.root={folder}", "data.workers=0", f"paths.runs={tmp_path}"]
    with pytest.raises(DataError, match=r"categories of train and val differ .*drei"):
        fit.train(composed("task=detection", "data=coco", *more))


@pytest.mark.parametrize("crowd", [False, True])
def test_a_set_without_objects_to_measure_on_is_said_once(
    crowd: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_scenes(tmp_path, count_train=2, count_val=2)
    config = composed("task=detection", "data=scenes", "data.batch_size=2", f"paths.runs={tmp_path}")
    config.data.name, config.data.root = "coco", str(folder)
    tasks.prepare(config, CPU)
    assert "no object" not in caplog.text
    val = folder / "annotations" / "instances_val.json"
    values = json.loads(val.read_text())
    values["annotations"] = [{**one, "iscrowd": 1} for one in values["annotations"][:1]] if crowd else []
    val.write_text(json.dumps(values))
    tasks.prepare(config, CPU)
    assert caplog.text.count("no object to find in its 2 images: there will be no box_ap") == 1


def test_images_of_different_sizes_make_no_batch_of_maps(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i, side in enumerate((40, 48)):
            Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "images" / split / f"{i}.png")
            Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "masks" / split / f"{i}.png")
    overrides = ["task=segmentation", "data=masks", f"data.root={tmp_path}", "data.num_classes=2", "data.workers=0"]
    with pytest.raises(ConfigError, match=r"images of 40x40 and 48x48 make no batch: aug\.policy=random_crop"):
        fit.train(composed(*overrides, "model=nat_nano", "aug=none", f"paths.runs={tmp_path / 'runs'}"))


@pytest.mark.parametrize("task", TASKS)
def test_what_is_overfitted_is_what_is_measured(task: str, tmp_path: Path) -> None:
    config = composed(
        f"task={task}", "data.num_images=4", "data.batch_size=2", "data.overfit_batches=1", f"paths.runs={tmp_path}"
    )
    prepared = tasks.prepare(config, CPU)
    assert prepared.train is not None
    if task == "detection":
        (images, targets), (again, _) = next(iter(prepared.train)), next(iter(prepared.val))
        assert torch.equal(images[0], again[0])
        metrics = prepared.task.metrics()
        perfect = [{**t, "scores": torch.ones(len(t["labels"])), "masks": t["masks"].bool()} for t in targets]
        metrics.add(perfect, targets)
        assert metrics.result()["box_ap"] == pytest.approx(1.0)
        assert metrics.result()["mask_ap"] == pytest.approx(1.0)
    else:
        assert prepared.val is prepared.train
        fitted = tasks.prepare(dataclasses.replace(config, task=dataclasses.replace(config.task, fit=[64, 64])), CPU)
        # images as they were seen in training
        assert fitted.task.config.fit is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", TASKS)
def test_the_images_of_the_training_can_be_evaluated_too(task: str, runs: dict[str, dict[str, Any]]) -> None:
    config = door.compose("eval", EvalConfig, [f"run={runs[task]['run_dir']}", "split=train"])
    assert evaluation.evaluate(config, ["run", "split"])["n"] > 0


def test_images_below_the_least_size_are_trained_on_and_evaluated(tmp_path: Path) -> None:
    for split, sizes in (("train", [(20, 24), (5, 24)]), ("val", [(1, 1), (40, 9)])):
        for number, (height, width) in enumerate(sizes):
            for kind, mode in (("images", "RGB"), ("masks", "L")):
                folder = tmp_path / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (width, height), 1 if mode == "L" else (9, 9, 9)).save(folder / f"{number}.png")
    overrides = ["task=segmentation", "data=masks", f"data.root={tmp_path}", "data.num_classes=2", "data.workers=0"]
    small = ["model=nat_nano", "task.kwargs={channels: 16, aux_channels: 16}", "task.ratios=[0.5,1]"]
    common = [*overrides, *small, "trainer.epochs=1", f"paths.runs={tmp_path / 'runs'}"]
    for how in (["aug=none", "data.batch_size=1"], ["aug.kwargs={crop: 16, scale: [64, 32]}", "data.batch_size=2"]):
        assert fit.train(composed(*common, *how))["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "epochs", "metric", "least"), [("detection", 60, "box_ap50", 0.95), ("segmentation", 150, "miou", 0.9)]
)
def test_a_model_overfits_one_batch(task: str, epochs: int, metric: str, least: float, tmp_path: Path) -> None:
    overrides = [f"task={task}", "data.num_images=4", "data.batch_size=4", "debug=overfit", "data.overfit_batches=1"]
    summary = fit.train(composed(*overrides, f"paths.runs={tmp_path}", "optim.lr=3e-3", f"trainer.epochs={epochs}"))
    assert summary[metric] > least


def test_data_for_dense_tasks_is_counted(tmp_path: Path) -> None:
    config = composed("task=detection", "data.num_images=4", "data.batch_size=64", f"paths.runs={tmp_path}")
    with pytest.raises(ConfigError, match=r"data\.batch_size=64 is larger than the training set \(4 images\)"):
        tasks.prepare(config, CPU)
