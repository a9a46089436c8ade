"""From a configuration to opened sets of images with objects or with class maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import DataConfig, EvalConfig, TrainConfig
from ..data import Source, check_count, file_channels
from ..errors import DataError, listing
from .coco import CocoSet
from .masks import MaskSet
from .scenes import write_scenes

# where the annotations and the images of a COCO-format set lie below its root, for each split; {} is its name
ANNOTATIONS = ("annotations/instances_{}2017.json", "annotations/instances_{}.json", "annotations/{}.json", "{}.json")
IMAGES = ("{}2017", "images/{}2017", "images/{}", "{}", "images")
LAYOUTS = {"masks": "folder", "ade20k": "ade20k", "cityscapes": "cityscapes", "voc": "voc"}
DRAWN = ("scenes", "synthetic")  # synthetic: what debug=fdr asks for, a few scenes


def detection_source(config: TrainConfig | EvalConfig, splits: Sequence[str], *, masks: bool) -> Source:
    """The COCO-format sets that `data` names, for `splits` of `train` and `val`.

    Raises:
        DataError: something is missing or broken, or train and val have other categories.
        ConfigError: `data.num_classes` or `model.in_chans` is not what the data have.
    """
    chosen, channels = _stood_in(config.data), file_channels(config.model.in_chans)
    drawn = chosen.name in DRAWN
    root = scenes(config) if drawn else _root(chosen)
    sets = {
        split: CocoSet(
            _place(chosen, root, split, "images"),
            _place(chosen, root, split, "annotations"),
            training=split == "train" and isinstance(config, TrainConfig) and not chosen.overfit_batches,
            masks=masks,
            keep_empty=chosen.keep_empty or split == "val",
            skip_missing=chosen.skip_missing,
            channels=channels,
        )
        for split in splits
    }
    names = {split: dict(zip(one.category_ids, one.class_names, strict=True)) for split, one in sets.items()}
    first = next(iter(sets.values()))
    if len(sets) == 2 and names["train"] != names["val"]:
        odd = sorted(set(names["train"].items()) ^ set(names["val"].items()))
        raise DataError(
            f"data.root={root}: categories of train and val differ ({listing(odd, limit=3)}): labels would not match"
        )
    if chosen.name != "synthetic":
        check_count(chosen, first.num_classes, first.class_names)
    return _source(sets, channels, root.parent if drawn else None)


def segmentation_source(config: TrainConfig | EvalConfig, splits: Sequence[str]) -> Source:
    """The sets of images and class maps that `data` names, for `splits` of `train` and `val`.

    Raises:
        DataError: something is missing or broken, or train and val have other classes.
        ConfigError: `model.in_chans` is not what image files have, or an option not what the set has.
    """
    chosen, channels = _stood_in(config.data), file_channels(config.model.in_chans)
    drawn = chosen.name in DRAWN
    root = scenes(config) if drawn else _root(chosen)
    names = {"train": chosen.train_split, "val": chosen.val_split}
    sets = {
        split: MaskSet(
            root,
            names[split],
            layout="folder" if drawn else LAYOUTS[chosen.name],
            num_classes=None if chosen.name == "synthetic" else chosen.num_classes,
            class_names=chosen.class_names,
            label_map=chosen.label_map,
            mask_suffix=chosen.mask_suffix,
            skip_missing=chosen.skip_missing,
            channels=channels,
        )
        for split in splits
    }
    counts = {split: one.num_classes for split, one in sets.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"data.root={root}: train has {counts['train']} classes, val {counts['val']}")
    return _source(sets, channels, root.parent if drawn else None)


def _source(sets: Mapping[str, CocoSet | MaskSet], channels: int, drawn_at: Path | None) -> Source:
    first: CocoSet | MaskSet = next(iter(sets.values()))
    place = None if drawn_at is None else str(drawn_at)
    reports = {split: one.report for split, one in sets.items()}
    return Source(sets.get("train"), sets.get("val"), first.num_classes, channels, first.class_names, place, reports)


def _stood_in(config: DataConfig) -> DataConfig:
    """`config`; where scenes stand in for other data, in a debug run, without what those are read by."""
    if config.name != "synthetic":
        return config
    own = DataConfig()
    return dataclasses.replace(
        config,
        train_images=None,
        val_images=None,
        train_annotations=None,
        val_annotations=None,
        train_split=own.train_split,
        val_split=own.val_split,
        class_names=None,
        label_map=None,
        mask_suffix=own.mask_suffix,
    )


def scenes(config: TrainConfig | EvalConfig) -> Path:
    """The folder of digit scenes, drawn on first use below `data.root` or, without one, the folder of the runs."""
    chosen = config.data
    # a debug run of other data has their root, where nothing is to be drawn; evaluated, it has that of its scenes
    theirs = chosen.name == "synthetic" and isinstance(config, TrainConfig)
    root = Path(chosen.root) if chosen.root and not theirs else Path(config.paths.runs) / "scenes"
    return write_scenes(
        root.expanduser(),
        count_train=chosen.num_images,
        count_val=max(1, chosen.num_images // 4),
        size=chosen.scene_size,
        seed=chosen.split_seed,
    )


def _root(config: DataConfig) -> Path:
    if not config.root:
        raise DataError(f"data.root is not set: data.root=FOLDER of the {config.name} set (docs/data.md)")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={root}: no such folder")
    return root


def _place(config: DataConfig, root: Path, split: str, what: str) -> Path:
    """Where the images or annotations of a split are: as configured, or the first of the usual places that exists."""
    key = f"{split}_{what}"
    given = getattr(config, key)
    if given is not None:
        place = root / given
        if not place.exists():
            raise DataError(f"data.{key}={given}: there is no {place}")
        return place
    usual = [root / pattern.format(split) for pattern in (ANNOTATIONS if what == "annotations" else IMAGES)]
    for place in usual:
        if place.is_file() if what == "annotations" else place.is_dir():
            return place
    tried = listing(str(place.relative_to(root)) for place in usual)
    raise DataError(f"data.root={root}: no {what} of {split} in it (looked for {tried}): set data.{key}")
