"""Where the numbers go: metrics.csv, the results file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from nearfield.engine import door, fit
from nearfield.engine.config import LoggerConfig, TrainConfig
from nearfield.engine.errors import ConfigError
from nearfield.engine.loggers import CsvLogger, append_row, create_loggers
from nearfield.engine.plots import plot_curves
from nearfield.engine.progress import Progress
from nearfield.engine.tasks.classification import Classification


def test_metrics_are_on_disk_after_every_row_and_take_new_columns(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log(1, {"epoch": 1, "train_loss": 2.0})
    assert list(csv.DictReader((tmp_path / "metrics.csv").open())) == [{"epoch": "1", "train_loss": "2"}]
    logger.log(2, {"epoch": 2, "train_loss": 1.5, "top1": 50.0})
    logger.log(3, {"epoch": 3, "train_loss": 1.25})
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["train_loss"] for row in rows] == ["2", "1.5", "1.25"]
    assert [row["top1"] for row in rows] == ["", "50", ""]


def test_metrics_survive_a_new_column_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log(1, {"epoch": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.log(2, {"epoch": 2, "top1": 50.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch", "1"]


def append_many(file: Path, who: int) -> None:
    for i in range(100):
        append_row(file, {"who": who, "text": 'a, "b"' * 50, "i": i})


def test_results_of_many_programs_end_up_in_one_file_with_one_header(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.csv"
    context = multiprocessing.get_context("fork")
    programs = [context.Process(target=append_many, args=(file, who)) for who in range(4)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    assert [program.exitcode for program in programs] == [0] * 4
    rows = list(csv.DictReader(file.open(newline="")))
    assert len(rows) == 400
    assert {(int(row["who"]), int(row["i"])) for row in rows} == {(who, i) for who in range(4) for i in range(100)}
    assert all(row["text"] == 'a, "b"' * 50 for row in rows)


def test_a_results_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    append_row(file, {"a": 1, "b": 0.123456789})
    before = file.read_text()
    assert before == "a,b\n1,0.123457\n"
    with pytest.raises(ConfigError, match=r"its columns are a,b, not a,c"):
        append_row(file, {"a": 1, "c": 2})
    assert file.read_text() == before
    with pytest.raises(ConfigError, match="cannot write there"):
        append_row(Path("/dev/null/results.csv"), {"a": 1})


def run(tmp_path: Path, *overrides: str) -> Path:
    base = ["debug=fdr", "hardware=cpu", "trainer.plots=false", f"paths.runs={tmp_path}"]
    return Path(fit.train(door.compose("train", TrainConfig, [*base, *overrides]))["run_dir"])


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = run(tmp_path, "logger.names=[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train_loss", "top1", "loss", "lr"} <= set(events.Tags()["scalars"])
    row = next(csv.DictReader((folder / "metrics.csv").open()))
    assert events.Scalars("train_loss")[-1].value == pytest.approx(float(row["train_loss"]), rel=1e-4)


def test_wandb_works_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = run(tmp_path, "logger.names=[wandb]")
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_online_without_a_key_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = run(tmp_path, "logger.names=[wandb]", "logger.wandb.mode=online")
    assert list((folder / "wandb").glob("offline-run-*"))
    assert "logging offline" in caplog.text


def test_wandb_that_cannot_connect_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    real = wandb.init
    modes = []

    def init(**arguments: object) -> object:
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    folder = run(tmp_path, "logger.names=[wandb]", "logger.wandb.mode=online")
    assert modes == ["online", "offline"]
    assert "no route to host" in caplog.text
    assert list((folder / "wandb").glob("offline-run-*"))


def test_loggers_are_imported_only_when_chosen(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('wandb', 'tensorboard', 'torch.utils.tensorboard'): sys.modules[name] = None\n"
        "from nearfield.engine import door, fit\n"
        "from nearfield.engine.config import TrainConfig\n"
        f"base = ['debug=fdr', 'trainer.plots=false', 'paths.runs={tmp_path}', 'hardware=cpu']\n"
        "fit.train(door.compose('train', TrainConfig, base))\n"
        "for name in ('wandb', 'tensorboard'):\n"
        "    try: fit.train(door.compose('train', TrainConfig, [*base, f'logger.names=[{name}]']))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any(line.startswith("ConfigError logger: wandb is not installed") for line in lines)
    assert any(line.startswith("ConfigError logger: tensorboard is not installed") for line in lines)


def test_csv_is_always_there(tmp_path: Path) -> None:
    assert [type(logger) for logger in create_loggers(LoggerConfig(), tmp_path, {})] == [CsvLogger]


def test_curves_take_runs_of_one_epoch_and_missing_evaluations(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log(1, {"epoch": 1, "train_loss": 2.0})
    plot_curves(tmp_path / "metrics.csv", tmp_path / "one.png", title="one epoch", curves=Classification.curves)
    for epoch in range(2, 9):
        evaluated = {"loss": 2 / epoch, "top1": 90.0 + epoch, "top5": 99.0} if epoch % 2 else {}
        logger.log(epoch, {"epoch": epoch, "train_loss": 3 / epoch, **evaluated})
    plot_curves(tmp_path / "metrics.csv", tmp_path / "more.png", title="more", curves=Classification.curves)
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert (tmp_path / "more.png").stat().st_size > (tmp_path / "one.png").stat().st_size


def test_progress_is_plain_lines_off_a_terminal_and_silent_on_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(10, every=0.0, terminal=False) as progress:
        progress.step(3, "epoch 1/2", "loss 1.0")
        progress.line("done")
    out, err = capsys.readouterr()
    assert out == "epoch 1/2  3/10  loss 1.0\ndone\n"
    assert err == ""
    monkeypatch.setenv("RANK", "1")
    with Progress(10, every=0.0, terminal=True) as progress:
        progress.step(3, "epoch 1/2", "loss 1.0")
        progress.line("done")
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, terminal=True) as progress:
        progress.step(5, "epoch 1/2", "loss 1.0")
        progress.line("top1 50.00 %")
    out, err = capsys.readouterr()
    assert out == ""
    assert "top1 50.00 %" in err
