"""Which keys a task reads: a key that was set and is read by nobody is refused instead of forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from .config import AugConfig, EvalConfig, ModelConfig, TrainConfig
from .errors import ConfigError, listing

TASKS: dict[str, tuple[str, ...]] = {
    "classification": ("loss", "smoothing"),
    "detection": ("head", "out_norm", "kwargs", "min_size", "max_size", "threshold", "pictures"),
    "segmentation": (
        *("head", "out_norm", "kwargs", "pictures", "aux_weight"),
        *("fit", "ratios", "flip", "crop", "stride"),
    ),
}
_POLICY = ("policy", "kwargs", "no_aug")
AUG = {
    "classification": tuple(f.name for f in dataclasses.fields(AugConfig) if f.name not in ("policy", "kwargs")),
    "detection": _POLICY,
    "segmentation": _POLICY,
}
_MODEL = tuple(f.name for f in dataclasses.fields(ModelConfig))
# heads for another number of classes are drawn anew in any case
_DENSE_MODEL = tuple(key for key in _MODEL if key != "new_head")
MODELS = {"classification": _MODEL, "detection": _DENSE_MODEL, "segmentation": _DENSE_MODEL}

# of every data set
_BATCHES = (
    *("num_classes", "batch_size", "eval_batch_size", "workers"),
    *("limit_train_batches", "limit_val_batches", "overfit_batches"),
)
_COLOURS = ("mean", "std")
_SPLITS = ("root", "train_split", "val_split")
_PREPARED = ("crop_pct", "crop_mode", "interpolation", *_COLOURS)
_OF_SCENES = ("root", "num_images", "scene_size", "split_seed")
_MAPS = (*_SPLITS, "class_names", "label_map", "skip_missing", *_COLOURS)
# by the name of a data set, or of all with that beginning; "" are all others of timm
DATA: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "digits": ("held_out", "split_seed", *_COLOURS),
        "folder": (*_SPLITS, "class_map", *_PREPARED),
        "torch/": (*_SPLITS, "download", *_PREPARED),
        "": (*_SPLITS, "train_samples", "val_samples", "class_map", "download", *_PREPARED),
    },
    "detection": {
        "scenes": (*_OF_SCENES, "keep_empty"),
        "coco": (
            *("root", "train_images", "val_images", "train_annotations", "val_annotations"),
            *("keep_empty", "skip_missing"),
        ),
    },
    "segmentation": {
        "scenes": (*_OF_SCENES, "train_split", "val_split", *_COLOURS),
        "ade20k": _MAPS,
        "cityscapes": _MAPS,
        "voc": _MAPS,
        "masks": ("mask_suffix", *_MAPS),
    },
}
SYNTHETIC = ("num_images", "split_seed")
# what is taken where no data are named, none of it the user's
DRAWN = ("digits", "scenes", "synthetic")
NAMED = {
    "classification": "one of folder, imagenet, torch, wds, hfds",
    "detection": "coco for COCO's format (or scenes, to draw digit scenes there)",
    "segmentation": "one of ade20k, cityscapes, voc, masks (or scenes, to draw digit scenes there)",
}
# what debug groups say whatever the task is
OF_DEBUG = {"task.min_size": 128, "task.max_size": 256, "task.smoothing": 0.0}
INSTEAD = {
    ("detection", "data.mean"): "use task.kwargs.image_mean=",
    ("detection", "data.std"): "use task.kwargs.image_std=",
    ("detection", "model.new_head"): "heads for other classes are drawn anew without it",
    ("segmentation", "model.new_head"): "heads for other classes are drawn anew without it",
    ("detection", "aug"): "aug=multi_scale, multi_scale_crop, scenes or none",
    ("segmentation", "aug"): "aug=ade20k, cityscapes, scenes_maps or none",
}


def check(config: TrainConfig | EvalConfig, overrides: Collection[str] | None = None) -> None:
    """ConfigError if the task has no such data, or a key is set, other than by default, that is not read with them.

    Args:
        config: of a training or of an evaluation. Of an evaluation only `overrides` count: the rest is of its run.
        overrides: keys and groups that were set by hand, as `door.touched` gives them.
    """
    task, data, given = config.task.name, config.data.name, set(overrides or ())
    # the scenes of a run may have been moved
    moved = isinstance(config, EvalConfig) and data == "scenes" and bool(config.run or config.checkpoint)
    if "data.root" in given and data in DRAWN and not (given & {"data", "data.name", "experiment"} or moved):
        raise ConfigError(f"data.root={config.data.root}, but no data are named: add data=NAME, {NAMED[task]}")
    by_hand = {".".join(key.split(".")[:2]) for key in given}
    groups: list[tuple[str, Any, tuple[str, ...]]] = [
        ("task", config.task, TASKS[task]),
        ("data", config.data, _of_data(task, data)),
        ("model", config.model, MODELS[task]),
    ]
    if isinstance(config, TrainConfig) and not config.aug.no_aug:
        groups.append(("aug", config.aug, AUG[task]))
    for group, values, read in groups:
        for key in _set(values):
            path, value = f"{group}.{key}", getattr(values, key)
            if key in ("name", *read) or OF_DEBUG.get(path) == value:
                continue
            if path == "data.root" and data in DRAWN and path not in by_hand:  # of configs/local
                continue
            if isinstance(config, TrainConfig) or path in by_hand:
                raise _unread(path, value, task, data, read)


def _of_data(task: str, data: str) -> tuple[str, ...]:
    """The keys of `data` that are read; ConfigError for a set that the task does not have."""
    sets = DATA[task]
    if data == "synthetic":  # stands in for any of them
        return (*_BATCHES, *SYNTHETIC, *(key for keys in sets.values() for key in keys))
    start = next((name for name in sets if name == data or (name.endswith("/") and data.lower().startswith(name))), "")
    if start not in sets:
        what = {"detection": "boxes", "segmentation": "class maps"}[task]
        raise ConfigError(f"data.name: {data!r} has no {what}; task={task} takes {listing(sets)}")
    return (*sets[start], *_BATCHES)


def _set(values: Any) -> list[str]:
    """The keys of a group that are not as they are by default."""
    default = type(values)()
    return [f.name for f in dataclasses.fields(values) if getattr(values, f.name) != getattr(default, f.name)]


def _unread(path: str, value: Any, task: str, data: str, read: tuple[str, ...]) -> ConfigError:
    group = path.split(".")[0]
    where = f"task={task}" + (f" data={data}" if group == "data" else "")
    advice = INSTEAD.get((task, path)) or INSTEAD.get((task, group))
    there = f"it reads {group}.{{{listing(read, limit=30)}}}"
    return ConfigError(f"{path}={value}: not read by {where}: {advice or there}")
