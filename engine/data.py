"""From a configuration to batches: which set it is, how many classes it has, how its images are prepared."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import images, memory
from .config import AugConfig, DataConfig
from .dense.decode import MODES
from .errors import ConfigError, DataError, listing
from .hardware import cores

_logger = logging.getLogger("nearfield.engine")
Batch = tuple[Any, Any]  # inputs and targets; tensors, or lists with one entry an image


@dataclass
class Source:
    """Data sets that are opened and counted, not yet made into batches."""

    train: Any
    val: Any
    num_classes: int
    in_chans: int
    class_names: list[str] | None = None
    root: str | None = None  # where they were found or made, when the configuration leaves that open
    reports: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # per split, what was counted when opened

    def lines(self) -> list[str]:
        """The reports for people: a line a split, without what there is none of."""
        return [
            f"{split}: {', '.join(f'{count} {what}' for what, count in report.items() if count)}"
            for split, report in self.reports.items()
        ]


@dataclass
class Preparation:
    """How an image becomes an input: pixels, per-channel mean and std of images in [0, 1], resizing for evaluation."""

    size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def columns(self) -> dict[str, Any]:
        """What a row of evaluation results says of it."""
        size = "x".join(map(str, self.size))
        return {"img_size": size, "crop_pct": self.crop_pct, "interpolation": self.interpolation}


def open_source(config: DataConfig, *, splits: Iterable[str] = ("train", "val"), in_chans: int | None = None) -> Source:
    """Open the splits that are needed and count the classes.

    Args:
        config: the `data` group.
        splits: of `train` and `val`.
        in_chans: channels that the model wants; None leaves it to the data (1 for digits, 3 otherwise).

    Raises:
        DataError: something is missing, empty, or differs between the splits.
        ConfigError: `data.num_classes` is not what the data has, or a stream needs it.
    """
    splits = tuple(splits)
    names: list[str] | None
    if config.name in ("digits", "synthetic"):
        channels = in_chans or (1 if config.name == "digits" else 3)
        train, val = memory.digits(config) if config.name == "digits" else memory.synthetic(config, channels)
        for part in (train, val):
            part.images = part.images.expand(-1, channels, -1, -1)
        names = [str(digit) for digit in range(10)] if config.name == "digits" else None
        counted = 10 if names else config.num_classes or 10
        check_count(config, counted, names)
        return Source(train, val, counted, channels, names)
    channels = file_channels(in_chans)
    mode = MODES[channels]
    opened = {s: images.open_images(config, s, mode, training="train" in splits) for s in splits}
    classes = {split: images.class_names(dataset) for split, dataset in opened.items()}
    names = next(iter(classes.values()))
    if len(splits) == 2 and None not in classes.values() and classes["train"] != classes["val"]:
        train_names, val_names = set(classes["train"] or ()), set(classes["val"] or ())
        missing = "; ".join(
            f"{split} has no {listing(sorted(gone), limit=5)}"
            for split, gone in (("val", train_names - val_names), ("train", val_names - train_names))
            if gone
        )
        raise DataError(
            f"data.root={config.root}: the classes of train and val differ ({missing}): labels would not match"
        )
    count = len(names) if names else config.num_classes
    if count is None:
        raise ConfigError(f"data.num_classes is not set, and the classes of {config.name} cannot be counted: set it")
    if names:
        check_count(config, count, names)
    return Source(opened.get("train"), opened.get("val"), count, channels, names)


def file_channels(in_chans: int | None) -> int:
    """The channels that image files are read with, 3 unless the model wants others; ConfigError if none have them."""
    channels = in_chans or 3
    if channels not in MODES:
        raise ConfigError(f"model.in_chans={channels}: image files have 1, 3 or 4 channels")
    return channels


def check_count(config: DataConfig, count: int, names: list[str] | None) -> None:
    """ConfigError if `data.num_classes` is not what the data has."""
    if config.num_classes is not None and config.num_classes != count:
        which = f" ({listing(names, limit=5)})" if names else ""
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but the data has {count} classes{which}: "
            f"remove it or set data.num_classes={count}"
        )


def prepare(config: DataConfig, model: Any, *, img_size: tuple[int, int] | None, in_chans: int) -> Preparation:
    """The preparation that the model's pretrained_cfg asks for, unless the configuration says otherwise."""
    from timm.data import resolve_data_config

    arguments = {
        "input_size": None if img_size is None else (in_chans, *img_size),
        "in_chans": in_chans,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
        "interpolation": config.interpolation,
    }
    # the pretrained_cfg of a torchvision-like or custom model may be missing: timm's defaults then
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    resolved = resolve_data_config({k: v for k, v in arguments.items() if v is not None}, pretrained_cfg=dict(cfg))
    own = {"mean": [0.5], "std": [0.5]} if config.name in ("digits", "synthetic") else resolved
    mean, std = mean_and_std(config, own, in_chans)
    size = tuple(int(side) for side in resolved["input_size"][-2:])
    return Preparation(
        (size[0], size[1]),
        mean,
        std,
        resolved["interpolation"],
        resolved["crop_pct"],
        resolved["crop_mode"],
    )


def mean_and_std(config: DataConfig, own: Mapping[str, Any], in_chans: int) -> tuple[list[float], list[float]]:
    """Per channel, of images in [0, 1]: as configured, or else the model's own (`own`, a pretrained_cfg).

    Raises:
        ConfigError: `data.mean` or `data.std` has another number of values than there are channels.
    """
    found = []
    for key in ("mean", "std"):
        values = list(getattr(config, key) or own[key])
        if len(values) not in (1, in_chans):
            if getattr(config, key) is not None:
                raise ConfigError(f"data.{key}: {len(values)} values for {in_chans} channels; give 1 or {in_chans}")
            values = [sum(values) / len(values)]
        found.append(values * (in_chans // len(values)))
    return found[0], found[1]


def train_batches(
    config: DataConfig, aug: AugConfig, source: Source, how: Preparation, device: torch.device
) -> Batches:
    """Shuffled, augmented training batches of full size.

    Raises:
        ConfigError: the batch is larger than the set.
    """
    dataset = source.train
    check_batch_size(config, dataset)
    if isinstance(dataset, memory.MemorySet):
        loader: Any = memory.MemoryLoader(
            dataset,
            size=how.size,
            batch_size=config.batch_size,
            mean=how.mean,
            std=how.std,
            device=device,
            shuffle=True,
            aug=aug,
        )
    else:
        loader = _timm_loader(config, source, dataset, how, device, aug=aug)
    if config.overfit_batches:
        return Batches(list(itertools.islice(loader, config.overfit_batches)))
    return Batches(loader, config.limit_train_batches)


def check_batch_size(config: DataConfig, dataset: Any) -> None:
    """ConfigError if a batch is larger than the set to train on."""
    count = len(dataset)
    if 0 < count < config.batch_size:
        raise ConfigError(
            f"data.batch_size={config.batch_size} is larger than the training set ({count} images): "
            f"set data.batch_size to at most {count}"
        )


def eval_batches(config: DataConfig, source: Source, how: Preparation, device: torch.device, *, split: str) -> Batches:
    """Batches of a split (`train` or `val`) in its own order, every image once, not augmented."""
    dataset = source.train if split == "train" else source.val
    batch_size = config.eval_batch_size or config.batch_size
    if isinstance(dataset, memory.MemorySet):
        loader: Any = memory.MemoryLoader(
            dataset, size=how.size, batch_size=batch_size, mean=how.mean, std=how.std, device=device
        )
    else:
        loader = _timm_loader(config, source, dataset, how, device, aug=None)
    return Batches(loader, config.limit_val_batches)


class Batches:
    """A loader with at most `limit` batches per pass. Iterating it starts a new pass."""

    def __init__(self, loader: Any, limit: int | None = None) -> None:
        self.loader, self.limit = loader, limit

    def __len__(self) -> int:
        return len(self.loader) if self.limit is None else min(self.limit, len(self.loader))

    def __iter__(self) -> Iterator[Batch]:
        yield from itertools.islice(self.loader, self.limit)

    def set_epoch(self, epoch: int) -> None:
        """Tell whatever shuffles by epoch (streams, samplers of repeated augmentation) which one comes next."""
        for part in (getattr(self.loader, "sampler", None), getattr(self.loader, "dataset", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)


def _timm_loader(
    config: DataConfig, source: Source, dataset: Any, how: Preparation, device: torch.device, *, aug: AugConfig | None
) -> Any:
    from timm.data import create_loader

    training = aug is not None
    aug = aug or AugConfig(no_aug=True)
    loader = create_loader(
        dataset,
        input_size=(source.in_chans, *how.size),
        batch_size=config.batch_size if training else config.eval_batch_size or config.batch_size,
        is_training=training,
        no_aug=aug.no_aug,
        re_prob=0.0 if aug.no_aug else aug.re_prob,
        re_mode=aug.re_mode,
        re_count=aug.re_count,
        scale=(aug.scale[0], aug.scale[1]),
        ratio=(aug.ratio[0], aug.ratio[1]),
        hflip=aug.hflip,
        vflip=aug.vflip,
        color_jitter=aug.color_jitter,
        auto_augment=aug.auto_augment,
        interpolation=aug.interpolation if training and not aug.no_aug else how.interpolation,
        mean=tuple(how.mean),
        std=tuple(how.std),
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
        num_workers=workers(config),
        device=device,
        pin_memory=device.type == "cuda",
        worker_seeding=seed_worker,  # type: ignore[arg-type]  # a function is taken too
    )
    if training and aug.repeats and not aug.no_aug:
        loader.loader = _with_repeats(loader.loader, aug.repeats)
    return loader


def workers(config: DataConfig) -> int:
    """Loader processes: `data.workers`, but no more than there are cores."""
    count = min(config.workers, cores())
    if count < config.workers:
        _logger.info("data.workers=%d lowered to %d, the cores there are", config.workers, count)
    return count


def _with_repeats(inner: Any, repeats: int) -> Any:
    """The same DataLoader, each drawn image augmented `repeats` times (timm does so in process groups only)."""
    from timm.data.distributed_sampler import RepeatAugSampler

    count = len(inner.dataset)
    sampler = RepeatAugSampler(
        inner.dataset, num_replicas=1, rank=0, num_repeats=repeats, selected_round=256 if count >= 256 else 0
    )
    return torch.utils.data.DataLoader(
        inner.dataset,
        batch_size=inner.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
    )


def seed_worker(info: Any) -> int:
    """The seed of a loader worker of timm's."""
    leave_interrupts()
    return int(info.seed)


def leave_interrupts(_: int = 0) -> None:
    """Loader workers leave Ctrl-C to the main process, which finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
