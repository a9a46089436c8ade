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
from nearfield.engine.config import EvalConfig

CLASSIFICATION, DETECTION, SEGMENTATION = TASKS = ("classification", "detection", "segmentation")
SEGMENTATION_HEADS = ("upernet", "fpn")
DEFAULT_HEAD = {DETECTION: "mask_rcnn", SEGMENTATION: "upernet"}
IMAGENET = 1000  # classes
ADE20K = (2048, 512)  # pixels: (longest, shortest) side that pictures are fitted into, as the published segmentors are


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
        how: how a picture becomes an input; None for detectors, which do it themselves.
        views: arguments of `engine.dense.inference.predict`: size, scales and windows of segmentation.
    """

    task: str
    name: str
    checkpoint: str
    model: Any
    names: list[str] | None
    channels: int
    how: data.Preparation | None
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
    for flag, given, own in (("model", options.model, config.model.name), ("task", options.task, config.task.name)):
        if given and given != own:
            raise ValueError(f"--{flag} {given}: the run in {folder} is of {own}: leave --{flag} out")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    channels, classes = int(meta["in_chans"]), int(meta["num_classes"])
    names = names_of_classes(options.names, classes) or meta.get("class_names")
    how = data.Preparation(**{key: meta["preparation"][key] for key in data.Preparation.__dataclass_fields__})
    task, name, source = config.task, config.model.name, str(config.model.checkpoint)
    if task.name == CLASSIFICATION:
        model = network.build(config.model, num_classes=classes, in_chans=channels, class_names=names)
        how = dataclasses.replace(how, size=options.size or how.size)
        return Loaded(task.name, name, source, model, names, channels, how)
    more: dict[str, Any] = {"in_chans": channels, "out_norm": task.out_norm, **config.model.kwargs, **task.kwargs}
    if task.name == DETECTION:
        more |= {"min_size": task.min_size, "max_size": task.max_size, "image_mean": how.mean, "image_std": how.std}
    model = _dense(options, task.name, name, task.head, classes, source, more)
    if task.name == DETECTION:
        return Loaded(task.name, name, source, model, names, channels, None)
    views = {"scale": task.fit, "ratios": task.ratios, "flip": task.flip, "crop": task.crop, "stride": task.stride}
    return Loaded(task.name, name, source, model, names, channels, how, views)


def _of_file(options: argparse.Namespace) -> Loaded:
    task = options.task or _task_of(options.head)
    name = options.model or _named(options.checkpoint)
    network.check_name(name)
    if not options.checkpoint and not (options.pretrained and task == CLASSIFICATION):
        published = ", or --pretrained" if task == CLASSIFICATION else ": nothing is published as a whole by name"
        raise ValueError(f"{name} without weights knows nothing: give --checkpoint FILE or a run folder{published}")
    if task == CLASSIFICATION:
        return _classifier(options, name)
    return _of_file_dense(options, task, name)


def _task_of(head: str | None) -> str:
    if head is None:
        return CLASSIFICATION
    return SEGMENTATION if head in SEGMENTATION_HEADS else DETECTION


def _named(checkpoint: str | None) -> str:
    """The model that a file of this package says it is of."""
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
    published = options.pretrained or checkpoints.find(Path(options.checkpoint).name) is not None
    if names is None and published and model.num_classes == IMAGENET:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        names = [info.index_to_description(index) for index in range(IMAGENET)]
    source = options.checkpoint or f"{name}: published"
    return Loaded(CLASSIFICATION, name, source, model, names, channels, preparation(model, options.size, channels))


def _of_file_dense(options: argparse.Namespace, task: str, name: str) -> Loaded:
    names = names_of_classes(options.names, options.num_classes)
    count = options.num_classes or (len(names) if names else None)
    if count is None:
        raise ValueError(f"--task {task} with a file that is in no run folder: say --num-classes N or --names FILE")
    model = _dense(options, task, name, options.head, count, options.checkpoint, {})
    if task == DETECTION:
        return Loaded(task, name, options.checkpoint, model, names, 3, None)
    how = preparation(model, None, 3)
    return Loaded(task, name, options.checkpoint, model, names, 3, how, {"scale": ADE20K})


def _dense(
    options: argparse.Namespace, task: str, name: str, head: str | None, classes: int, source: str, more: dict[str, Any]
) -> Any:
    """A detector or segmentor with the weights of a file, every one of them."""
    make: Any
    if task == DETECTION:
        from nearfield.models.dense.detection import create_detector as make
    else:
        from nearfield.models.dense.segmentation import create_segmentor as make
    if options.size is not None and task == DETECTION:
        more = {**more, "min_size": min(options.size)}
    model = make(name, head or DEFAULT_HEAD[task], num_classes=classes, **more)
    try:
        model.load_state_dict(checkpoints.read(checkpoints.resolve(source)))
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the {head or DEFAULT_HEAD[task]} on {name}: {error}") from error
    return model
