"""train.py and eval.py from the outside: what they print, what they write, how they fail."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from nearfield.checkpoints import read
from nearfield.engine import door, fit
from nearfield.engine.config import EvalConfig, TrainConfig
from PIL import Image

ROOT = Path(door.__file__).resolve().parents[1]
FDR = ["debug=fdr", "hardware=cpu", "trainer.plots=false"]
Main = Callable[..., tuple[int, str, str]]


def command(*arguments: str, cwd: Path, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Main:
    """Calls a door in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *arguments: str) -> tuple[int, str, str]:
        import nearfield.eval
        import nearfield.train

        module = {"train": nearfield.train, "eval": nearfield.eval}[script]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            module.main()
        out, err = capfd.readouterr()
        return left.value.code or 0, out, err

    return call


def pictures(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, splits: tuple[str, ...] = ("train", "val")
) -> Path:
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (60 * number, 20 * index, 90)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, object], subprocess.CompletedProcess[str]]:
    """A run of two epochs through the real train.py: its folder, its summary, its output."""
    cwd = tmp_path_factory.mktemp("run")
    done = command(
        "debug=fdr", "trainer.epochs=2", "hardware=cpu", "data.num_images=24", "data.limit_val_batches=null", cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    return cwd / summary["run_dir"], summary, done


def test_a_run_writes_one_folder_and_nothing_else(finished: tuple) -> None:
    folder, _, done = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml", "meta.json", "metrics.csv", "curves.png", "last.safetensors", "best.safetensors", "train.log"
    }  # fmt: skip
    cwd = folder.parents[2]
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    assert folder.parent == cwd / "runs" / "classification"
    assert done.stderr == ""
    assert str(Path("runs") / "classification") in done.stdout.splitlines()[0]


def test_the_last_line_is_json_with_the_metrics_of_the_last_epoch(finished: tuple) -> None:
    folder, summary, _ = finished
    assert summary["task"] == "classification"
    assert summary["model"] == "nat_nano"
    assert summary["seconds"] > 0
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["top1"]) == pytest.approx(summary["top1"], abs=1e-3)
    assert float(rows[-1]["loss"]) == pytest.approx(summary["loss"], rel=1e-3)


def test_the_run_says_what_it_was(finished: tuple) -> None:
    folder, summary, _ = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["name"] == "nat_nano"
    assert config["trainer"]["epochs"] == 2
    assert config["model"]["in_chans"] == 3
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"][:3] == ["train.py", "debug=fdr", "trainer.epochs=2"]
    assert {"torch", "timm", "nearfield"} <= set(meta["versions"])
    assert meta["device"].startswith("cpu")
    assert meta["result"] == summary


def test_the_curves_are_a_readable_picture(finished: tuple) -> None:
    with Image.open(finished[0] / "curves.png") as picture:
        assert picture.width >= 1000
        assert picture.height >= 400
        assert len(picture.convert("L").getcolors(10**6) or []) > 20


@pytest.mark.parametrize("how", ["run", "checkpoint", "file"])
def test_eval_of_a_run_gives_its_numbers_again(finished: tuple, main: Main, how: str, tmp_path: Path) -> None:
    folder, summary, _ = finished
    given = {
        "run": f"run={folder}",
        "checkpoint": f"checkpoint={folder}",
        "file": f"checkpoint={folder}/last.safetensors",
    }[how]
    code, out, err = main("eval", given, "hardware=cpu")
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    for key in ("top1", "top5", "loss", "n", "model"):
        assert result[key] == summary[key], key
    row = next(csv.DictReader((tmp_path / "runs" / "results.csv").open()))
    assert float(row["top1"]) == pytest.approx(summary["top1"], abs=1e-3)
    columns = "model checkpoint data split n top1 top5 loss img_size crop_pct interpolation dtype device seconds"
    assert list(row) == [*columns.split(), "versions", "date"]


def test_eval_of_a_run_takes_what_is_set_by_hand(finished: tuple, main: Main) -> None:
    folder, summary, _ = finished
    code, out, _ = main("eval", f"run={folder}", "data.num_images=48", "weights=best", "hardware=cpu")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["n"] == 24 != summary["n"]
    assert result["checkpoint"].endswith("best.safetensors")


def test_the_weights_are_those_of_the_model(finished: tuple) -> None:
    state = read(finished[0] / "last.safetensors")
    assert "head.fc.weight" in state
    assert all(torch.isfinite(value).all() for value in state.values())


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    from nearfield.engine.runs import RunFolder

    first, second = (RunFolder.create(str(tmp_path), "classification", "nat/x") for _ in range(2))
    for folder in (first, second):
        folder.close()
    assert first.path != second.path
    assert second.path.parent == tmp_path / "classification"


def test_logging_is_left_as_it_was_found(main: Main) -> None:
    def found() -> list[tuple[int, list[logging.Handler]]]:
        names = ("nearfield", "nearfield.engine", "timm", "py.warnings")
        return [(logger.level, list(logger.handlers)) for logger in map(logging.getLogger, names)]

    before, show = found(), warnings.showwarning
    for arguments, expected in ((FDR, 0), (["data=folder", "data.root=nowhere"], 3)):
        code, _, err = main("train", *arguments)
        assert code == expected, err
        assert (found(), warnings.showwarning) == (before, show)


def test_a_sweep_runs_every_combination(main: Main, tmp_path: Path) -> None:
    code, out, err = main("train", "-m", *FDR, "seed=0,1", "trainer.ema=false")
    assert (code, err) == (0, "")
    summaries = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len({summary["run_dir"] for summary in summaries}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_flags_may_follow_the_overrides(main: Main) -> None:
    code, out, err = main("train", *FDR, "model=nat_nano,swin_nano", "-m")
    assert (code, err) == (0, "")
    summaries = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [summary["model"] for summary in summaries] == ["nat_nano", "swin_nano"]


def test_an_error_during_a_run_is_one_line_and_its_traceback_is_in_the_log(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(fit.loop, "train_epoch", broken)
    code, out, err = main("train", *FDR)
    assert (code, err) == (1, "train: error: RuntimeError: boom (traceback=true shows where)\n")
    assert "error" not in out
    assert "Traceback" in next(tmp_path.glob("runs/*/*/train.log")).read_text()


def test_a_rectangle_is_trained_on_and_evaluated(main: Main, tmp_path: Path) -> None:
    code, out, err = main("train", *FDR, "model.img_size=[32,48]")
    assert (code, err) == (0, "")
    summary = json.loads(out.splitlines()[-1])
    code, out, err = main("eval", f"run={summary['run_dir']}", "hardware=cpu")
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["loss"] == summary["loss"]
    assert next(csv.DictReader((tmp_path / "runs" / "results.csv").open()))["img_size"] == "32x48"


def test_a_foreign_config_beside_a_checkpoint_is_not_read(finished: tuple, main: Main, tmp_path: Path) -> None:
    weights = tmp_path / "other" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes((finished[0] / "last.safetensors").read_bytes())
    (weights.parent / "config.yaml").write_text("model: resnet\ndata: [1, 2]\n")
    given = [f"checkpoint={weights}", "model=nat_nano", "model.in_chans=3", "data=synthetic", "hardware=cpu"]
    assert main("eval", *given)[0] == 0
    for meta, config in (("{}", "model: resnet\ndata: [1, 2]\n"), ("{}", "a: [")):
        (weights.parent / "meta.json").write_text(meta)
        (weights.parent / "config.yaml").write_text(config)
        assert main("eval", *given)[0] == 0
        code, _, err = main("eval", f"run={weights.parent}")
        assert (code, err.count("\n")) == (4, 1)
        assert "no run folder" in err


def test_eval_of_a_run_that_overfitted_scores_the_whole_split(main: Main) -> None:
    code, out, _ = main("train", *FDR, "data.num_images=40", "data.limit_val_batches=null", "data.overfit_batches=1")
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    code, out, _ = main("eval", f"run={summary['run_dir']}", "hardware=cpu")
    assert code == 0
    assert (summary["n"], json.loads(out.splitlines()[-1])["n"]) == (4, 20)
    code, _, err = main("eval", f"run={summary['run_dir']}", "data.overfit_batches=1")
    assert code == 2
    assert "data.limit_val_batches" in err


def test_cfg_prints_the_whole_configuration_and_runs_nothing(main: Main, tmp_path: Path) -> None:
    code, out, _ = main("train", "--cfg", "job", "trainer.epochs=7")
    assert code == 0
    assert yaml.safe_load(out)["trainer"]["epochs"] == 7
    assert set(yaml.safe_load(out)["optim"]) == set(TrainConfig().optim.__dict__)
    assert not (tmp_path / "runs").exists()


def test_help_lists_the_groups(main: Main) -> None:
    code, out, _ = main("train", "--help")
    assert code == 0
    for group in ("model", "data", "optim", "sched", "aug", "trainer", "logger", "hardware", "experiment", "debug"):
        assert f"{group}:" in out
    assert "nat_tiny_imagenet" in out


def test_help_of_eval_lists_its_own_groups(main: Main) -> None:
    code, out, _ = main("eval", "--help")
    assert code == 0
    listed = out.split("model=NAME")[0].splitlines()[4:]
    assert [line.split(":")[0] for line in listed if line] == ["data", "hardware", "model", "paths", "task"]


BAD_CONFIG = {
    "unknown key": (["trainer.epochss=3"], ["trainer.epochss", "'epochs'"]),
    "wrong type": (["trainer.epochs=x"], ["trainer.epochs", "whole number"]),
    "unknown group": (["debgu=fdr"], ["'debug'"]),
    "unknown flag": (["--halp"], ["--halp", "'--help'"]),
    "flag without its value": (["trainer.epochs=1", "-cd"], ["-cd", "value"]),
    "three sides": (["model.img_size=[32,32,32]"], ["model.img_size", "[height, width]"]),
    "odd batch to mix": (["aug.mixup=0.8", "data.batch_size=15"], ["data.batch_size=15", "even"]),
    "unknown option": (["data=imagnet"], ["'imagenet'"]),
    "broken override": (["trainer.epochs=[1"], ["override 'trainer.epochs=[1'"]),
    "unknown model": (["model=nat_tinny"], ["nat_tinny", "'nat_tiny'"]),
    "class count": (["model.num_classes=7"], ["7", "10 classes", "model.num_classes=10"]),
    "batch too large": (["data.batch_size=5000"], ["5000", "1437"]),
    "argument of the model": (["model.kwargs.nonsense=1"], ["nonsense"]),
    "optimizer": (["optim.name=adamww"], ["adamww", "'adamw'"]),
    "argument of the optimizer": (["optim.kwargs.nonsense=1"], ["nonsense"]),
    "warm-up": (["sched.warmup_epochs=40"], ["sched.warmup_epochs=40", "trainer.epochs=12"]),
    "unwritable": (["paths.runs=/dev/null/x"], ["paths.runs=/dev/null/x", "cannot write"]),
    "half precision on a cpu": (["hardware.amp=fp16", "hardware.device=cpu"], ["fp16", "bf16"]),
    "device name": (["hardware.device=gpu"], ["'gpu'", "cuda"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_a_bad_configuration_is_one_line_and_exit_code_2(case: str, main: Main, tmp_path: Path) -> None:
    overrides, parts = BAD_CONFIG[case]
    code, _, err = main("train", *overrides)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("train: error: ")
    for part in parts:
        assert part in err
    assert not (tmp_path / "runs" / "classification").exists()


def test_nothing_to_evaluate_is_exit_code_2(main: Main) -> None:
    code, _, err = main("eval")
    assert code == 2
    assert "run=FOLDER" in err
    assert main("eval", "run=a", "checkpoint=b")[0] == 2


def missing_data(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    empty = pictures(root / "empty")
    (empty / "train" / "emu").mkdir()
    broken = pictures(root / "broken")
    (broken / "train" / "cat" / "2.png").write_bytes(b"\x89PNG not really")
    differ = pictures(root / "differ")
    (differ / "val" / "cat").rename(differ / "val" / "cow")
    flat = pictures(root / "flat", splits=("train",))
    (root / "bare" / "train").mkdir(parents=True)
    folder = ["data=folder", "data.batch_size=2", "data.workers=0"]
    return {
        "no root": ([*folder], ["data.root is not set"]),
        "no such folder": ([*folder, f"data.root={root}/nope"], [f"{root}/nope", "no such folder"]),
        "no split": ([*folder, f"data.root={flat}"], ["no validation/", "train"]),
        "no classes": ([*folder, f"data.root={root}/bare"], ["no class folders"]),
        "empty class": ([*folder, f"data.root={empty}"], ["train/emu", "holds no image"]),
        "broken image": ([*folder, f"data.root={broken}"], ["train/cat/2.png", "cannot read this image"]),
        "broken image in a worker": (
            ["data=folder", "data.batch_size=2", "data.workers=1", f"data.root={broken}"],
            ["train/cat/2.png", "cannot read this image"],
        ),
        "classes differ": ([*folder, f"data.root={differ}"], ["cow", "cat"]),
        "reader": (["data=wds", f"data.root={root}/nope", "data.num_classes=3"], ["wds"]),
    }


@pytest.mark.parametrize(
    "case",
    ["no root", "no such folder", "no split", "no classes", "empty class", "broken image", "broken image in a worker",
     "classes differ", "reader"],
)  # fmt: skip
def test_missing_or_broken_data_is_one_line_and_exit_code_3(case: str, main: Main, tmp_path: Path) -> None:
    overrides, parts = missing_data(tmp_path / "sets")[case]
    code, _, err = main(
        "train",
        *overrides,
        "trainer.epochs=1",
        "sched.warmup_epochs=0",
        "aug=none",
        "hardware=cpu",
        "trainer.plots=false",
    )
    assert code == 3, err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_checkpoints_that_do_not_fit_are_one_line_and_exit_code_4(finished: tuple, main: Main, tmp_path: Path) -> None:
    last = finished[0] / "last.safetensors"
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "void").mkdir()
    cases = {
        "another model": (["eval", f"checkpoint={last}", "model=swin_nano"], ["swin_nano", "lacks"]),
        "another head": (["eval", f"checkpoint={last}", "data=synthetic", "data.num_classes=7"], ["10 classes", "7"]),
        "no such file": (["eval", "checkpoint=nope.pth"], ["nope.pth"]),
        "no checkpoint": (["eval", "checkpoint=junk.pth"], ["junk.pth"]),
        "no such run": (["eval", "run=nope"], ["run=nope", "no such folder"]),
        "no run folder": (["eval", "run=void"], ["no run folder"]),
        "training from another model": (["train", f"model.checkpoint={last}", "model=dinat_mini"], ["does not fit"]),
        "training from another head": (
            ["train", f"model.checkpoint={last}", "data=synthetic", "data.num_classes=7"],
            ["10 classes", "model.new_head=true"],
        ),
    }
    for case, (arguments, parts) in cases.items():
        code, _, err = main(*arguments)
        assert code == 4, (case, err)
        assert err.count("\n") == 1, case
        for part in parts:
            assert part in err, case


def test_training_goes_on_from_a_checkpoint_with_a_new_head(finished: tuple, main: Main) -> None:
    last = finished[0] / "last.safetensors"
    code, out, err = main("train", *FDR, "data.num_classes=7", "model.new_head=true", f"+model.checkpoint={last}")
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["top5"] >= 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_exit_code_5(main: Main) -> None:
    for script in ("train", "eval"):
        arguments = ["hardware=cuda"] + (["model.pretrained=true"] if script == "eval" else [])
        code, _, err = main(script, *arguments)
        assert code == 5
        assert err.count("\n") == 1
        assert "hardware.device=cpu" in err


def test_a_traceback_comes_only_when_asked_for(tmp_path: Path) -> None:
    quiet = command("trainer.epochss=3", cwd=tmp_path)
    assert (quiet.returncode, quiet.stderr.count("\n"), quiet.stdout) == (2, 1, "")
    loud = command("trainer.epochs=0", "traceback=true", cwd=tmp_path)
    assert loud.returncode == 2
    assert "Traceback (most recent call last)" in loud.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_weights_and_leaves_with_130(number: signal.Signals, tmp_path: Path) -> None:
    overrides = [
        "data=synthetic",
        "trainer.epochs=1000",
        "hardware=cpu",
        "trainer.plots=false",
        "data.limit_val_batches=1",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "train loss" in line:
            break
    os.kill(process.pid, number)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - started < 30
    assert "Traceback" not in err
    assert number.name in err
    folder = next((tmp_path / "runs" / "classification").iterdir())
    assert read(folder / "last.safetensors")
    assert (folder / "metrics.csv").is_file()


def test_the_doors_work_from_another_folder_without_the_repository_on_the_path(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['nearfield-train', '--cfg', 'job']; import nearfield.train; nearfield.train.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["model"]["name"] == "nat_nano"


def test_a_config_folder_of_ones_own_adds_options(main: Main, tmp_path: Path) -> None:
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "long.yaml").write_text("epochs: 77\n")
    code, out, _ = main("train", "--config-dir", str(tmp_path / "mine"), "trainer=long", "--cfg", "job")
    assert code == 0
    assert yaml.safe_load(out)["trainer"]["epochs"] == 77


def test_compose_gives_what_the_command_line_gives() -> None:
    assert door.compose("eval", EvalConfig, ["model=nat_tiny", "checkpoint=x"]).checkpoint == "x"
