"""An evaluation from its configuration to its row in the results file."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import check, hardware, loop, reads, runs, tasks
from .config import EvalConfig
from .data import Source
from .errors import CheckpointMismatchError, ConfigError, DataError, listing
from .loggers import append_row
from .progress import Progress, is_main_process
from .state import seed_everything


def evaluate(config: EvalConfig, overrides: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint, append a row to `paths.results` and return the summary that the door prints.

    Args:
        config: with `run`, or a `checkpoint` inside a run folder, the model and data of that run are taken.
        overrides: keys and groups that were set by hand; they win over the run's own.

    Raises:
        UserError: see `errors`.
    """
    config = of_run(config, overrides or [])
    reads.check(config, overrides)
    device = hardware.setup(config.hardware)
    dtype = hardware.precision(config.hardware, device)
    seed_everything(config.seed)
    if not config.model.checkpoint and not config.model.pretrained:
        raise ConfigError("nothing to evaluate: give run=FOLDER, checkpoint=FILE, or model.pretrained=true")
    if config.data.overfit_batches:
        raise ConfigError(
            "data.overfit_batches is for training: data.limit_val_batches=N evaluates the first N batches"
        )
    if config.task.name != "classification" and not config.model.checkpoint:
        raise ConfigError(
            f"task={config.task.name}: no published file has its heads: give run=FOLDER or checkpoint=FILE"
        )
    split = config.split
    prepared = tasks.prepare(config, device)
    _check_classes(Path(config.model.checkpoint or ""), prepared.source)
    task, model, how, batches = prepared.task, prepared.model, prepared.how, prepared.val
    forward = task.compile(model, training=False) if config.compile else None
    started = time.perf_counter()
    with Progress(len(batches)) as progress:
        for counted in prepared.source.lines():
            progress.line(counted)
        metrics = loop.evaluate(
            model,
            task,
            batches,
            autocast=hardware.autocast_in(dtype, device),
            forward=forward,
            on_batch=lambda done: progress.step(done, "evaluating", ""),
        )
    seconds = time.perf_counter() - started
    checkpoint = config.model.checkpoint or f"{config.model.name}: published"
    where = config.data.name + (f":{config.data.root}" if config.data.root else "")
    if is_main_process():
        results = Path(config.paths.results).expanduser()
        if task.name != "classification":  # whose rows have other columns
            results = results.with_stem(f"{results.stem}_{task.name}")
        row = {
            "model": config.model.name,
            "checkpoint": checkpoint,
            "data": where,
            "split": split,
            "n": metrics["n"],
            **{key: metrics.get(key, "") for key in task.columns},
            **how.columns(),
            "dtype": str(dtype).removeprefix("torch."),
            "device": runs.device_name(device),
            "seconds": seconds,
            "versions": " ".join(f"{name} {number}" for name, number in runs.versions().items()),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        append_row(results, row)
        progress.line(f"{config.model.name} on {where} ({split}, {metrics['n']} images): {task.describe(metrics)}")
        progress.line(f"checkpoint {checkpoint}; row added to {results}")
    return {
        "task": task.name,
        "model": config.model.name,
        "checkpoint": checkpoint,
        "data": where,
        "split": split,
        "seconds": round(seconds, 2),
        **{key: round(value, 4) for key, value in metrics.items()},
    }


def _check_classes(checkpoint: Path, source: Source) -> None:
    """DataError if the weights are those of a run whose classes have other names than the data's."""
    names = runs.class_names_of(checkpoint.parent)
    if names and source.class_names and names != source.class_names:
        odd = next((a, b) for a, b in itertools.zip_longest(names, source.class_names) if a != b)
        raise DataError(
            f"{checkpoint}: trained on the classes {listing(names, limit=4)}; those of the data differ "
            f"({odd[0]!r} there, {odd[1]!r} here): labels would not match"
        )


def of_run(config: EvalConfig, overrides: list[str]) -> EvalConfig:
    """`config` with the model, data, task and precision of the run that `run` or `checkpoint` belongs to, if any.

    What `overrides` name (a key like data.root or task.kwargs.detections, or a whole group like data) stays as it is in
    `config`.
    """
    if config.run and config.checkpoint:
        raise ConfigError(
            "run and checkpoint are both given: give one (checkpoint=FILE inside the run folder works too)"
        )
    given = config.run or config.checkpoint
    if not given:
        return config
    path = Path(given).expanduser()
    if config.run and not path.is_dir():
        raise CheckpointMismatchError(f"run={config.run}: no such folder")
    folder = path if path.is_dir() else path.parent
    values = runs.config_of(folder)
    if path.is_dir():
        if values is None:
            raise CheckpointMismatchError(
                f"{given}: no run folder of train.py: no config.yaml and meta.json of a run in it"
            )
        path = folder / f"{config.weights}.safetensors"
        if not path.is_file():
            raise CheckpointMismatchError(f"{given}: no {path.name} in it; the run saved nothing yet")
    merged = dataclasses.asdict(config)
    if values is not None:
        own = dataclasses.asdict(config)
        for group in ("model", "data", "task"):
            merged[group] |= values[group]
        merged["hardware"]["amp"] = values["hardware"].get("amp", own["hardware"]["amp"])
        merged["model"] |= {"pretrained": False, "new_head": False}
        # tricks of training: what is evaluated is the split, all of it
        merged["data"] |= {"overfit_batches": None, "limit_train_batches": None, "limit_val_batches": None}
        for key in overrides:
            _take(merged, own, key.split("."))
    merged["model"]["checkpoint"] = str(path) if path.exists() else given
    return check.build(EvalConfig, merged)


def _take(merged: dict[str, Any], own: Mapping[str, Any], path: Sequence[str]) -> None:
    """Put what `own` has at `path` into `merged`; arguments (`kwargs`) beside those that are there, as Hydra does."""
    *parents, name = path
    for parent in parents:
        if not isinstance(own.get(parent), Mapping):
            return
        own, merged[parent] = own[parent], dict(merged.get(parent) or {})
        merged = merged[parent]
    if name in own:
        both = name == "kwargs" and isinstance(merged.get(name), dict)
        merged[name] = merged[name] | own[name] if both else own[name]
