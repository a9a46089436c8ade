"""Batches of images with objects or class maps, from a data set and its transform."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig, TrainConfig
from ..data import Batch, Batches, leave_interrupts, workers
from ..errors import ConfigError

Collate = Callable[[Sequence[tuple[Any, Any]]], Batch]


def lists(items: Sequence[tuple[Any, Any]]) -> Batch:
    """Images of any sizes and their targets, each as a list."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def stacks(items: Sequence[tuple[Any, Any]]) -> Batch:
    """Images and class maps of one size, each stacked."""
    images, masks = lists(items)
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise ConfigError(
            f"images of {' and '.join('x'.join(map(str, size)) for size in sorted(sizes)[:2])} make no batch: "
            "aug.policy=random_crop cuts them to one size, data.batch_size=1 takes them as they are"
        )
    return torch.stack([plain(image) for image in images]), torch.stack([plain(mask) for mask in masks])


def plain(value: Any) -> Any:
    """A tensor of torchvision's as a tensor; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


class DeviceLoader:
    """A DataLoader whose batches arrive on the device, tensors inside lists and mappings too."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.sampler, self.dataset = loader.sampler, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self.loader:
            yield self._moved(inputs), self._moved(targets)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value).to(self.device, non_blocking=True)
        if isinstance(value, dict):
            return {key: self._moved(part) for key, part in value.items()}
        return [self._moved(part) for part in value] if isinstance(value, list) else value


def policy_of(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Name and options of the augmentation: none where it is off, where batches are overfitted, in a debug run."""
    if "name" in config.aug.kwargs:
        raise ConfigError("aug.kwargs.name: it has a key of its own: use aug.policy")
    off = config.aug.no_aug or bool(config.data.overfit_batches) or config.data.name == "synthetic"
    return ("none", {}) if off else (config.aug.policy, config.aug.kwargs)


def batches(config: DataConfig, dataset: Any, device: torch.device, *, collate: Collate, training: bool) -> Batches:
    """Batches of `dataset`: in training shuffled and full (or the few to overfit), otherwise all images in their order.

    Order and augmentation follow torch's global generator.
    """
    batch_size = config.batch_size if training else config.eval_batch_size or config.batch_size
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=workers(config),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_interrupts,
        persistent_workers=workers(config) > 0,
    )
    loader = DeviceLoader(loader, device)
    if training and config.overfit_batches:
        return Batches(list(itertools.islice(loader, config.overfit_batches)))
    return Batches(loader, config.limit_train_batches if training else config.limit_val_batches)
