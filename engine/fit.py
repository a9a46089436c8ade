"""A training run from its configuration to its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import data, hardware, loop, optim, plots, reads, runs, tasks
from .config import TrainConfig
from .errors import DataError, Interrupted
from .loggers import Logger, create_loggers
from .metrics import Mean
from .progress import Progress
from .state import TrainState, seed_everything
from .task import How, Task

_logger = logging.getLogger("nearfield.engine")


def train(config: TrainConfig, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train as `config` says and return the summary that the door prints.

    Everything that can be wrong is looked at before the run folder is made.

    Args:
        config: of the run.
        overrides: keys and groups that were set by hand.

    Returns:
        task, model, run_dir, seconds (training with its evaluations), epochs, the metrics of the last evaluation, and
        the best one with its epoch.

    Raises:
        UserError: see `errors`; Interrupted when asked to stop, after saving.
    """
    reads.check(config, overrides)
    device = hardware.setup(config.hardware)
    dtype = hardware.precision(config.hardware, device)
    seed_everything(config.seed)
    prepared = tasks.prepare(config, device)
    assert prepared.train is not None
    task = prepared.task
    state, epochs = create_state(config, prepared.model, len(prepared.train), dtype, device)

    folder = runs.RunFolder.create(config.paths.runs, task.name, config.model.name)
    try:
        run = _Run(config, folder, state, task, epochs)
        run.begin(device, dtype, prepared.source, prepared.how)
        seconds = run.fit(prepared.train, prepared.val, device, dtype)
        return run.finish(seconds, device)
    except Exception:
        _logger.exception("the run ended with an error")
        raise
    finally:
        folder.close()


def create_state(
    config: TrainConfig, model: nn.Module, batches_per_epoch: int, dtype: torch.dtype, device: torch.device
) -> tuple[TrainState, int]:
    """The state at the start of training, and the number of epochs."""
    if batches_per_epoch == 0:
        raise DataError(f"data.name={config.data.name}: no full batch of {config.data.batch_size} images to train on")
    global_batch = config.data.batch_size * config.trainer.accumulate
    optimizer = optim.create_optimizer(config.optim, model, global_batch=global_batch)
    scheduler, epochs = optim.create_scheduler(
        config.sched,
        config.optim,
        config.trainer,
        optimizer,
        updates_per_epoch=math.ceil(batches_per_epoch / config.trainer.accumulate),
        global_batch=global_batch,
    )
    ema = None
    if config.trainer.ema:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.trainer.ema_decay, use_warmup=config.trainer.ema_warmup)
    return TrainState(model, optimizer, scheduler, hardware.scaler_for(dtype, device), ema), epochs


class _Run:
    """A run with its folder: what is logged, written and printed around the loop."""

    def __init__(self, config: TrainConfig, folder: runs.RunFolder, state: TrainState, task: Task, epochs: int) -> None:
        self.config, self.folder, self.state, self.task, self.epochs = config, folder, state, task, epochs
        self.loggers: list[Logger] = []
        self.metrics: dict[str, float] = {}
        self.plotted = 0.0
        self.meta: dict[str, Any] = {}
        self.counted: list[str] = []

    def begin(self, device: torch.device, dtype: torch.dtype, source: data.Source, how: How) -> None:
        """Write down what is about to happen."""
        config = self.config
        # the data's channels and place, so that the weights are evaluated as they are, from wherever, on whatever
        model = dataclasses.replace(config.model, in_chans=source.in_chans)
        place = dataclasses.replace(config.data, root=source.root or config.data.root)
        self.folder.write_config(dataclasses.replace(config, model=model, data=place))
        self.meta = runs.describe(
            device,
            dtype=str(dtype).removeprefix("torch."),
            seed=config.seed,
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            num_classes=source.num_classes,
            in_chans=source.in_chans,
            preparation=dataclasses.asdict(how),
            class_names=source.class_names if source.class_names and len(source.class_names) <= 1000 else None,
            counted=source.reports,
        )
        self.counted = source.lines()
        self.folder.write_meta(self.meta)
        self.loggers = create_loggers(config.logger, self.folder.path, dataclasses.asdict(config))

    def fit(
        self, train_batches: data.Batches, val_batches: data.Batches, device: torch.device, dtype: torch.dtype
    ) -> float:
        """The epochs; returns their seconds. Saves what there is when asked to stop."""
        config, state, task = self.config, self.state, self.task
        autocast = hardware.autocast_in(dtype, device)
        forward = task.compile(state.model, training=True) if config.compile else None
        started = time.perf_counter()
        per_epoch = len(train_batches)
        with (
            loop.StopSignal() as stop,
            Progress(self.epochs * per_epoch, every=config.trainer.log_seconds) as progress,
            _profiler(config.trainer.profile, self.folder.path, device) as profiled,
        ):
            size = f"{self.meta['parameters'] / 1e6:.2f} M parameters"
            progress.line(
                f"{config.model.name} ({size}) on {config.data.name}, {self.epochs} epochs of {per_epoch} batches, "
                f"{self.meta['device']}, {self.meta['dtype']}; run folder {self.folder.path}"
            )
            for counted in self.counted:
                progress.line(counted)
            while state.epoch < self.epochs:
                epoch = state.epoch
                task.start_epoch(epoch, self.epochs)
                train_batches.set_epoch(epoch)

                def on_step(done: int, total: int, state: TrainState, mean: Mean, epoch: int = epoch) -> None:
                    profiled()
                    text = f"loss {mean.value:.4f}  lr {state.lr:.2e}" if mean.weight else ""
                    progress.step(epoch * total + done, f"epoch {epoch + 1}/{self.epochs}", text)

                result = loop.train_epoch(
                    state,
                    task,
                    train_batches,
                    config.trainer,
                    batch_size=config.data.batch_size,
                    autocast=autocast,
                    forward=forward,
                    until=config.trainer.updates,
                    stop=stop,
                    on_step=on_step,
                )
                self.metrics = {}  # those of an earlier epoch do not belong to these weights
                last = state.epoch == self.epochs
                if stop.asked and not result.complete:
                    self._interrupted(stop.asked)
                row: dict[str, Any] = {
                    "epoch": state.epoch,
                    "step": state.step,
                    "lr": state.lr,
                    "train_loss": result.loss,
                    "images_per_second": result.images / result.seconds,
                    "loader_wait": result.waited / result.seconds,
                    "skipped": state.skipped,
                }
                if last or state.epoch % config.trainer.eval_every == 0:

                    def on_batch(done: int, what: str = f"epoch {state.epoch}/{self.epochs}") -> None:
                        progress.step(state.epoch * per_epoch, what, f"evaluating {done}/{len(val_batches)}")

                    with self._uncompiled():
                        self.metrics = loop.evaluate(
                            state.weights, task, val_batches, autocast=autocast, on_batch=on_batch
                        )
                    row |= {key: value for key, value in self.metrics.items() if key != "n"}
                row["seconds"] = time.perf_counter() - started
                self._after_epoch(row, progress)
                if stop.asked and not last:
                    self._interrupted(stop.asked)
            seconds = time.perf_counter() - started
            progress.line(f"trained {self.epochs} epochs in {seconds:.1f} s; run folder {self.folder.path}")
        return seconds

    def _uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """For evaluations, whatever the task: their images may have any size, and averaged weights have no graph."""
        # a run that compiles nothing does not wait for the compiler's import
        return torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()

    def _after_epoch(self, row: dict[str, Any], progress: Progress) -> None:
        state, task = self.state, self.task
        for logger in self.loggers:
            logger.log(state.step, row)
        text = f"epoch {state.epoch}/{self.epochs}  train loss {row['train_loss']:.4f}"
        if task.primary in row:
            value = row[task.primary]
            if state.best is None or value > state.best:
                state.best, state.best_epoch = value, state.epoch
                self._save("best")
            text += f"  {task.describe(row)}"
        progress.line(f"{text}  {row['images_per_second']:.0f} img/s")
        self._save("last")
        # a plot takes a third of a second: long runs get one now and then, every run one at the end
        if self.config.trainer.plots and time.monotonic() - self.plotted > 60 and self.plotted:
            self._plot()
        self.plotted = self.plotted or time.monotonic()

    def _save(self, name: str) -> None:
        about = {"model": self.config.model.name, "epoch": self.state.epoch, "step": self.state.step}
        about |= {"ema": self.state.ema is not None, **self.metrics}
        self.folder.write_weights(name, self.state.weights, about)

    def _plot(self) -> None:
        self.plotted = time.monotonic()
        title = f"{self.config.model.name} on {self.config.data.name}"
        plots.plot_curves(
            self.folder.path / "metrics.csv", self.folder.path / "curves.png", title=title, curves=self.task.curves
        )

    def _interrupted(self, signal_name: str) -> None:
        self._save("last")
        self._close()
        done = f"{self.state.epoch} of {self.epochs} epochs, {self.state.step} updates"
        raise Interrupted(f"interrupted by {signal_name} after {done}; weights saved in {self.folder.path}")

    def _close(self) -> None:
        if self.config.trainer.plots and (self.folder.path / "metrics.csv").exists():
            self._plot()
        for logger in self.loggers:
            logger.close()

    def finish(self, seconds: float, device: torch.device) -> dict[str, Any]:
        """The last plot, the pictures, and the summary."""
        self._close()
        if self.config.trainer.plots:
            with self._uncompiled():
                self.task.pictures(self.state.weights, self.folder.path, device)
        state = self.state
        metrics = {key: round(value, 4) for key, value in self.metrics.items() if key != "n"}
        summary = {
            "task": self.task.name,
            "model": self.config.model.name,
            "run_dir": str(self.folder.path),
            "seconds": round(seconds, 2),
            "epochs": state.epoch,
            **metrics,
            f"best_{self.task.primary}": None if state.best is None else round(state.best, 4),
            "best_epoch": state.best_epoch,
            "n": int(self.metrics.get("n", 0)),
            "skipped": state.skipped,
        }
        self.folder.write_meta({**self.meta, "result": summary})
        return summary


@contextlib.contextmanager
def _profiler(wanted: bool, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """A torch.profiler around the training, to be told of every step; nothing if it is not wanted."""
    if not wanted:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    out = folder / "profile"
    out.mkdir()

    def save(profile: Any) -> None:
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        (out / "table.txt").write_text(profile.key_averages().table(sort_by=key, row_limit=40))
        profile.export_chrome_trace(str(out / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=4, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profile:
        yield profile.step
