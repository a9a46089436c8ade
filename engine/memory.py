"""Data sets that fit in memory: scikit-learn's handwritten digits and random images. Batches are made with tensors.

Images are kept small, (N, channels, 8, 8) in [0, 1], and enlarged to the model's input batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import AugConfig, DataConfig


@dataclass
class MemorySet:
    """Images (N, C, h, w), float32 in [0, 1], and their labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits(config: DataConfig) -> tuple[MemorySet, MemorySet]:
    """The 1,797 digits of scikit-learn as a training and a held-out set.

    The split is stratified and depends on `config.split_seed` and `config.held_out` alone.
    """
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    index = np.arange(len(raw.target))
    train, held_out = train_test_split(
        index, test_size=config.held_out, stratify=raw.target, random_state=config.split_seed
    )
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    return (MemorySet(images[train], labels[train]), MemorySet(images[held_out], labels[held_out]))


def synthetic(config: DataConfig, in_chans: int) -> tuple[MemorySet, MemorySet]:
    """Random images with random labels, the same at every call; the second set is half as large."""
    generator = torch.Generator().manual_seed(config.split_seed)
    classes = config.num_classes or 10

    def draw(count: int) -> MemorySet:
        images = torch.rand(count, in_chans, 8, 8, generator=generator)
        return MemorySet(images, torch.randint(classes, (count,), generator=generator))

    return draw(config.num_images), draw(max(1, config.num_images // 2))


class MemoryLoader:
    """Batches of a MemorySet: enlarged to `size`, augmented if `aug` is given, normalised, on the device.

    Yields (images (B, C, height, width) float32, labels (B,)). Order and augmentation follow torch's global generator.
    """

    def __init__(
        self,
        data: MemorySet,
        *,
        size: tuple[int, int],
        batch_size: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        shuffle: bool = False,
        aug: AugConfig | None = None,
    ) -> None:
        self.data, self.size, self.batch_size = data, size, batch_size
        self.device, self.shuffle = device, shuffle
        self.aug = None if aug is None or aug.no_aug else aug
        channels = data.images.shape[1]
        self.mean = torch.tensor(mean).expand(channels).view(1, -1, 1, 1)
        self.std = torch.tensor(std).expand(channels).view(1, -1, 1, 1)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.data), self.batch_size)
        return whole if self.shuffle or not rest else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data)) if self.shuffle else torch.arange(len(self.data))
        for step in range(len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = F.interpolate(self.data.images[index], size=self.size, mode="bilinear", antialias=False)
            if self.aug is not None:
                images = augment(images, self.aug)
            images = (images - self.mean) / self.std
            yield images.to(self.device), self.data.labels[index].to(self.device)


def augment(images: Tensor, aug: AugConfig) -> Tensor:
    """Images (B, C, H, W) turned, shifted and zoomed at random, each on its own; flipped if `aug.hflip` says so."""
    batch = len(images)
    angle = torch.empty(batch).uniform_(-1, 1) * math.radians(aug.rotate)
    scale = 1 + torch.empty(batch, 2).uniform_(-1, 1) * aug.zoom
    shift = torch.empty(batch, 2).uniform_(-2, 2) * aug.translate  # the grid spans 2
    mirror = torch.where(torch.rand(batch) < aug.hflip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([mirror * cos * scale[:, 0], -sin * scale[:, 1], shift[:, 0]], dim=1),
            torch.stack([mirror * sin * scale[:, 0], cos * scale[:, 1], shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
