"""The model that shall look at pictures: of a run of train.py, or of a name and a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nearfield
import torch
from _classify import names_of_classes, preparation
from nearfield import checkpoints
from nearfield.engine import data, evaluation, network, runs
from nearfield.engine.config import EvalConfig, ModelConfig, TaskConfig
from nearfield.engine.dense.crops import ADE20K_SCALE
from nearfield.engine.network import HEADS
from nearfield.engine.tasks import detection, segmentation
from torch import nn

CLASSIFICATION, DETECTION, SEGMENTATION = TASKS = ("classification", "detection", "segmentation")
DEFAULT_HEAD = {DETECTION: detection.HEAD, SEGMENTATION: segmentation.HEAD}
IMAGENET = 1000  # classes


@dataclass
class Loaded:
    """A model in evaluation mode, and what is known about it.

    Attributes:
        task: one of `TASKS`.
        name: of the model or its backbone.
        checkpoint: where the weights are from, in words.
        model: on its device.
        names: of the classes, in the order of their numbers; None if nobody said.
        channels: of the pictures it takes.
        how: of a classifier, how a picture becomes an input.
        mean, std: of a segmentor, of each channel of pictures in [0, 1].
        views: of a segmentor, arguments of `engine.dense.inference.predict`: sizes, mirror images, windows.
    """

    task: str
    name: str
    checkpoint: str
    model: Any
    names: list[str] | None
    channels: int
    how: data.Preparation | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    views: dict[str, Any] = field(default_factory=dict)


def load(options: argparse.Namespace, device: torch.device) -> Loaded:
    """What the command line asks for: `checkpoint`, `model`, `pretrained`, `task`, `head`, `num_classes`, `names`, ...

    Raises:
        ValueError, UserError: one line: something is missing, contradictory or does not fit.
    """
    if options.checkpoint and options.pretrained:
        raise ValueError("--pretrained and --checkpoint are both given: give one")
    folder = _run_folder(options.checkpoint)
    loaded = _of_file(options) if folder is None else _of_run(options, folder)
    loaded.model = loaded.model.to(device).eval()
    return loaded


def _run_folder(given: str | None) -> Path | None:
    """The run folder that a checkpoint is, or lies in; None for any other file."""
    if not given:
        return None
    path = Path(given).expanduser()
    folder = path if path.is_dir() else path.parent
    # of a folder that is no run, `evaluation.of_run` says so
    return folder if path.is_dir() or runs.config_of(folder) is not None else None


def _of_run(options: argparse.Namespace, folder: Path) -> Loaded:
    config = evaluation.of_run(EvalConfig(checkpoint=options.checkpoint, weights=options.weights), [])
    task, model_config = config.task, config.model
    head = task.head or DEFAULT_HEAD.get(task.name, "no head")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    channels, classes = int(meta["in_chans"]), int(meta["num_classes"])
    own = {"model": model_config.name, "task": task.name, "head": head, "num-classes": classes}
    for flag, value in own.items():
        given = getattr(options, flag.replace("-", "_"))
        if given and given != value:
            raise ValueError(f"--{flag} {given}: the run in {folder} is of {value}: leave --{flag} out")
    names = names_of_classes(options.names, classes) or meta.get("class_names")
    source = str(model_config.checkpoint)
    if task.name == CLASSIFICATION:
        how = data.Preparation(**{**meta["preparation"], "size": options.size or tuple(meta["preparation"]["size"])})
        model = network.build(model_config, num_classes=classes, in_chans=channels, class_names=names)
        return Loaded(task.name, model_config.name, source, model, names, channels, how)
    model_config = dataclasses.replace(model_config, num_classes=None)
    loaded = _dense(options, model_config, task, classes, source, names, channels)
    loaded.mean, loaded.std = meta["preparation"]["mean"], meta["preparation"]["std"]
    return loaded


def _of_file(options: argparse.Namespace) -> Loaded:
    task = options.task or _task_of(options.head)
    name = options.model or _named(options.checkpoint)
    network.check_name(name)
    if not options.checkpoint and not (options.pretrained and task == CLASSIFICATION):
        also = ", or --pretrained" if task == CLASSIFICATION else ""
        raise ValueError(f"{name} without weights knows nothing: give --checkpoint with a file or a run folder{also}")
    if task == CLASSIFICATION:
        return _classifier(options, name)
    names = names_of_classes(options.names, options.num_classes)
    classes = options.num_classes or (len(names) if names else 0)
    if not classes:
        raise ValueError(f"--task {task} with a file that is in no run folder: say --num-classes N or --names FILE")
    # as the published ones are evaluated, by eval.py too
    wanted = TaskConfig(name=task, head=options.head, fit=list(ADE20K_SCALE))
    return _dense(options, ModelConfig(name=name), wanted, classes, options.checkpoint, names, 3)


def _task_of(head: str | None) -> str:
    if head is None:
        return CLASSIFICATION
    return next(task for task, heads in HEADS.items() if head in heads)


def _named(checkpoint: str | None) -> str:
    """The model that a file of this package, or of the index, says it is of."""
    if checkpoint:
        path = checkpoints.resolve(checkpoint)
        if path.suffix == ".safetensors" and (name := checkpoints.read_metadata(path).get("model")):
            return name
        entry = checkpoints.find(path.name)
        if entry is not None and entry.file == path.name:
            return entry.model
    raise ValueError("--model is missing: one of nearfield.list_models() or timm.list_models()")


def _classifier(options: argparse.Namespace, name: str) -> Loaded:
    model: Any = nearfield.create_model(
        name, options.pretrained, options.checkpoint, img_size=options.size, num_classes=options.num_classes
    )
    if not model.num_classes:
        raise ValueError(f"{options.checkpoint or name} has no classifier: it gives features, not classes")
    channels = getattr(model, "in_chans", 3)
    names = names_of_classes(options.names, model.num_classes)
    if names is None and model.num_classes == IMAGENET and (options.pretrained or _is_published(options.checkpoint)):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        names = [info.index_to_description(index) for index in range(IMAGENET)]
    source = options.checkpoint or f"{name}: published"
    return Loaded(CLASSIFICATION, name, source, model, names, channels, preparation(model, options.size, channels))


def _is_published(checkpoint: str) -> bool:
    entry = checkpoints.find(Path(checkpoint).name)
    return entry is not None and Path(checkpoint).name in (entry.file, entry.name)


def _dense(
    options: argparse.Namespace,
    model_config: ModelConfig,
    task: TaskConfig,
    classes: int,
    source: str,
    names: list[str] | None,
    channels: int,
) -> Loaded:
    """A detector or segmentor with all of its weights: with heads that were drawn at random it would see nonsense."""
    head = task.head or DEFAULT_HEAD[task.name]
    if options.size is not None and task.name == DETECTION:
        task = dataclasses.replace(task, min_size=min(options.size), max_size=max(task.max_size, max(options.size)))
    build = network.build_detector if task.name == DETECTION else network.build_segmentor
    model_config = dataclasses.replace(model_config, checkpoint=source)
    model: nn.Module = build(model_config, task, head, num_classes=classes, whole=True)
    loaded = Loaded(task.name, model_config.name, source, model, names, channels)
    if task.name == SEGMENTATION:
        fit = task.fit if options.size is None else [4 * min(options.size), min(options.size)]
        loaded.views = {
            "scale": fit,
            "ratios": task.ratios,
            "flip": task.flip,
            "crop": task.crop,
            "stride": task.stride,
        }
        how = preparation(model, None, channels)
        loaded.mean, loaded.std = how.mean, how.std
    return loaded
