"""Data: the digits' split, class folders, tar files, transforms, augmentation."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nearfield
import numpy as np
import pytest
import torch
from nearfield.engine import data, door, fit, memory
from nearfield.engine.config import AugConfig, DataConfig, TrainConfig
from nearfield.engine.errors import ConfigError, DataError
from PIL import Image

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cow")


def picture(label: int, index: int) -> Image.Image:
    noise = np.random.default_rng(100 * label + index).integers(0, 60, (40, 48, 3))
    noise[..., label] += 180
    return Image.fromarray(noise.astype(np.uint8))


def make_folder(root: Path, val: str = "val", count: int = 6) -> Path:
    for split in ("train", val):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture(label, index).save(folder / f"{index}.png")
    return root


def make_tars(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for label, name in enumerate(CLASSES):
                for index in range(6):
                    buffer = io.BytesIO()
                    picture(label, index).save(buffer, "PNG")
                    info = tarfile.TarInfo(f"{name}/{index}.png")
                    info.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(info, buffer)
    return root


def loaders(
    config: DataConfig, aug: AugConfig | None = None, **model: Any
) -> tuple[data.Source, data.Batches, data.Batches]:
    source = data.open_source(config)
    net = nearfield.create_model("nat_nano", num_classes=source.num_classes, in_chans=source.in_chans, **model)
    how = data.prepare(config, net, img_size=None, in_chans=source.in_chans)
    train = data.train_batches(config, aug or AugConfig(no_aug=True), source, how, CPU)
    return source, train, data.eval_batches(config, source, how, CPU, split="val")


def test_the_digits_are_split_once_and_for_all() -> None:
    train, held_out = memory.digits(DataConfig())
    torch.manual_seed(123)
    again, held_out_again = memory.digits(DataConfig())
    assert (len(train), len(held_out)) == (1437, 360)
    assert torch.equal(held_out.images, held_out_again.images)
    assert torch.equal(train.labels, again.labels)
    counts = held_out.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 38
    seen = {tuple(image.flatten().tolist()) for image in train.images}
    assert sum(tuple(image.flatten().tolist()) in seen for image in held_out.images) == 0
    other = memory.digits(DataConfig(split_seed=1))[1]
    assert not torch.equal(other.images, held_out.images)


def test_digits_come_at_the_size_and_channels_of_the_model() -> None:
    source, train, val = loaders(DataConfig(batch_size=50, eval_batch_size=100))
    assert (source.num_classes, source.in_chans) == (10, 1)
    assert len(train) == 28
    assert [len(y) for _, y in val] == [100, 100, 100, 60]
    inputs, _ = next(iter(val))
    assert inputs.shape == (100, 1, 32, 32)
    assert inputs.min() >= -1
    assert inputs.max() <= 1
    assert data.open_source(DataConfig(), in_chans=3).train.images.shape[1] == 3


def test_augmentation_moves_each_image_on_its_own_and_identity_is_identity() -> None:
    images = torch.rand(6, 1, 16, 16)
    still = AugConfig(rotate=0, translate=0, zoom=0, hflip=0)
    torch.testing.assert_close(memory.augment(images, still), images)
    moved = memory.augment(images[:1].repeat(6, 1, 1, 1), AugConfig(rotate=20, translate=0.1, zoom=0.1, hflip=0))
    assert moved.shape == images.shape
    assert len({round(float(image.sum()), 3) for image in moved}) == 6
    flipped = memory.augment(images, AugConfig(rotate=0, translate=0, zoom=0, hflip=1.0))
    torch.testing.assert_close(flipped, images.flip(-1))


def test_a_quarter_turn_keeps_squares_square() -> None:
    image = torch.zeros(1, 1, 17, 17)
    image[..., 2:15, 8] = 1.0
    torch.manual_seed(0)
    turned = memory.augment(image.repeat(64, 1, 1, 1), AugConfig(rotate=90, hflip=0))
    assert turned.sum((1, 2, 3)).min() > 0.8 * image.sum()


@pytest.mark.parametrize("val", ["val", "validation"])
def test_class_folders_are_read_with_the_model_s_transform(tmp_path: Path, val: str) -> None:
    config = DataConfig(name="folder", root=str(make_folder(tmp_path, val)), batch_size=4, eval_batch_size=5)
    source, train, batches = loaders(
        config, AugConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.5)
    )
    assert source.class_names == list(CLASSES)
    assert len(train) == 4
    assert [x.shape for x, _ in train] == [(4, 3, 32, 32)] * 4
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    inputs = torch.cat([x for x, _ in batches])
    assert inputs.mean((2, 3)).argmax(1).tolist() == labels.tolist()


def test_every_operation_of_the_published_augmentation_runs_at_every_magnitude() -> None:
    """Pillow 13 refuses the strongest posterize of timm's RandAugment, which a run draws only now and then."""
    from timm.data.auto_augment import rand_augment_transform

    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 10, "img_mean": (128, 128, 128)})
    for operation in policy.ops:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        for magnitude in range(11):
            operation.magnitude = magnitude
            assert operation(picture(0, 0)).size == (48, 40), (operation.name, magnitude)


def test_evaluation_prepares_images_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    config = DataConfig(
        name="folder", root=str(make_folder(tmp_path)), batch_size=4, crop_pct=0.8, interpolation="bilinear"
    )
    _, _, batches = loaders(config)
    model = nearfield.create_model("nat_nano")
    resolved = resolve_data_config({"crop_pct": 0.8, "interpolation": "bilinear"}, model=model)
    transform = create_transform(**resolved, is_training=False)
    wanted = transform(Image.open(tmp_path / "val" / "ant" / "0.png").convert("RGB"))
    torch.testing.assert_close(next(iter(batches))[0][0], wanted, atol=1e-5, rtol=1e-5)


def test_tar_files_are_read(tmp_path: Path) -> None:
    config = DataConfig(name="folder", root=str(make_tars(tmp_path / "tars")), batch_size=4)
    source, train, batches = loaders(config)
    assert source.class_names == list(CLASSES)
    assert sum(len(y) for _, y in batches) == 18
    assert sum(len(y) for _, y in train) == 16


def test_torchvision_data_sets_are_read_by_timm_s_names(tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    from torchvision.datasets import CIFAR10

    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        batch = {"data": rng.integers(0, 255, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        source, train, batches = loaders(DataConfig(name="torch/cifar10", root=str(tmp_path), batch_size=4))
    assert source.num_classes == 10
    assert sum(len(y) for _, y in train) == 20
    assert next(iter(batches))[0].shape == (4, 3, 32, 32)


def test_repeated_augmentation_shows_each_image_several_times(tmp_path: Path) -> None:
    config = DataConfig(name="folder", root=str(make_folder(tmp_path)), batch_size=6)
    _, train, _ = loaders(
        config, AugConfig(repeats=3, scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, interpolation="bilinear")
    )
    train.set_epoch(1)
    inputs = torch.cat([x for x, _ in train])
    assert len(inputs) == 18
    assert len({tuple(x.flatten()[:50].tolist()) for x in inputs}) == 6


def test_loader_processes_give_the_same_images(tmp_path: Path) -> None:
    root = str(make_folder(tmp_path))
    alone = loaders(DataConfig(name="folder", root=root, batch_size=5, workers=0))[2]
    helped = loaders(DataConfig(name="folder", root=root, batch_size=5, workers=1))[2]
    for (x, y), (v, w) in zip(alone, helped, strict=True):
        assert torch.equal(x, v)
        assert torch.equal(y, w)


def test_a_folder_of_pictures_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    overrides = [
        "data=folder",
        f"data.root={root}",
        "data.batch_size=6",
        "data.workers=0",
        "aug=light",
        "optim.lr=3e-3",
    ]
    overrides += [
        "trainer.epochs=12",
        "trainer.eval_every=12",
        "trainer.plots=false",
        "trainer.ema=false",
        "hardware=cpu",
    ]
    summary = fit.train(door.compose("train", TrainConfig, [*overrides, f"paths.runs={tmp_path}/runs"]))
    assert summary["n"] == 18
    assert summary["top1"] > 60


def test_limits_cut_batches() -> None:
    _, train, val = loaders(DataConfig(batch_size=10, limit_train_batches=3, limit_val_batches=2))
    assert len(train) == len(list(train)) == 3
    assert len(val) == len(list(val)) == 2


def test_overfitting_uses_the_same_batches_every_time() -> None:
    _, train, _ = loaders(DataConfig(batch_size=10, overfit_batches=2))
    first, second = list(train), list(train)
    assert len(first) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_overfitting_is_not_augmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("augmented")

    monkeypatch.setattr(memory, "augment", refuse)
    overrides = ["hardware=cpu", "trainer.epochs=1", "aug.mixup=0.8", "trainer.plots=false", f"paths.runs={tmp_path}"]
    with pytest.raises(AssertionError, match="augmented"):
        fit.train(door.compose("train", TrainConfig, overrides))
    monkeypatch.setattr("timm.data.Mixup.__call__", refuse)
    fit.train(door.compose("train", TrainConfig, [*overrides, "data.overfit_batches=1"]))


def test_no_batch_is_drawn_beyond_the_limit() -> None:
    drawn = []

    class Loader:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[data.Batch]:
            for index in range(5):
                drawn.append(index)
                yield torch.zeros(1), torch.zeros(1)

    assert len(list(data.Batches(Loader(), 2))) == 2
    assert drawn == [0, 1]


def test_rectangles_are_prepared_for_training_and_evaluation(tmp_path: Path) -> None:
    config = DataConfig(name="folder", root=str(make_folder(tmp_path)), batch_size=2)
    source = data.open_source(config)
    how = data.prepare(config, nearfield.create_model("nat_nano"), img_size=(32, 48), in_chans=3)
    for batches in (
        data.train_batches(config, AugConfig(), source, how, CPU),
        data.train_batches(config, AugConfig(no_aug=True), source, how, CPU),
        data.eval_batches(config, source, how, CPU, split="val"),
    ):
        assert next(iter(batches))[0].shape == (2, 3, 32, 48)


def test_counts_that_disagree_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"data\.num_classes=7, but the data has 10 classes"):
        data.open_source(DataConfig(num_classes=7))
    with pytest.raises(ConfigError, match="not a data set"):
        data.open_source(DataConfig(name="nonsense"))
    with pytest.raises(ConfigError, match=r"data\.mean: 2 values for 3 channels"):
        data.prepare(
            DataConfig(name="folder", mean=[0.5, 0.5]), nearfield.create_model("nat_nano"), img_size=None, in_chans=3
        )
    with pytest.raises(DataError, match=r"data\.root is not set"):
        data.open_source(DataConfig(name="folder"))


class Stream:
    """A reader as timm's for streams: no length of its own classes, no index."""

    epoch = -1

    def __iter__(self) -> Any:
        for label in range(3):
            for index in range(6):
                yield picture(label, index), label

    def __len__(self) -> int:
        return 18

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_stream_is_read_when_the_number_of_classes_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data

    asked = []

    def create_dataset(name: str, **options: Any) -> Any:
        asked.append((name, options["split"], options["is_training"]))
        return timm.data.IterableImageDataset(options["root"], reader=Stream())

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    with pytest.raises(ConfigError, match=r"data\.num_classes is not set"):
        data.open_source(DataConfig(name="wds/", root="shards"))
    _, train, batches = loaders(DataConfig(name="wds/", root="shards", num_classes=3, batch_size=4))
    assert asked[-2:] == [("wds/", "train", True), ("wds/", "validation", False)]
    assert sum(len(y) for _, y in batches) == 18
    train.set_epoch(3)
    assert train.loader.dataset.reader.epoch == 3
    assert all(x.shape == (4, 3, 32, 32) for x, _ in train)
