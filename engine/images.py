"""Data sets of image files: class folders, tar files, and whatever else timm.data reads; opened and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .config import DataConfig
from .dense.decode import as_mode, open_picture, unreadable
from .errors import ConfigError, DataError, listing

TRAIN = ("train", "training")
VAL = ("val", "validation", "valid", "eval", "test")


class Images(torch.utils.data.Dataset):
    """A data set of timm or torchvision that gives PIL images of one colour mode and names the file it cannot read."""

    def __init__(self, inner: Any, mode: str) -> None:
        self.inner, self.mode = inner, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            if hasattr(self.inner, "reader"):
                handle, label, *_ = self.inner.reader[index]
                with handle:
                    # not turned by EXIF: published accuracies are measured on the pixels as they are stored
                    image = open_picture(handle, self.mode, upright=False)
            else:
                image, label = self.inner[index]
                image = as_mode(image, self.mode)
        except Exception as error:  # PIL and the readers raise nearly everything
            raise unreadable(self.filename(index), error) from error
        return (image if self.transform is None else self.transform(image)), int(label)

    def filename(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        try:
            return str(self.inner.filename(index, absolute=True))
        except Exception:
            return f"image {index} of {type(self.inner).__name__}"


def open_images(config: DataConfig, split: str, mode: str, *, training: bool) -> Any:
    """The images of a split (`train` or `val`) as a map-style or iterable data set without a transform.

    Raises:
        DataError: a folder, file or package is missing, a class has no image, the reader cannot open it.
    """
    from timm.data import create_dataset

    name = config.name
    wanted = config.train_split if split == "train" else config.val_split
    options: dict[str, Any] = {"input_img_mode": mode, "class_map": config.class_map, "split": wanted}
    root = config.root
    if name in ("folder", ""):
        name, root = "", str(_locate(config, split, training=training))
        if Path(root).is_dir() and not config.class_map:
            _check_classes(Path(root))
    elif "/" not in name:
        raise ConfigError(
            f"data.name: {name!r} is not a data set; allowed: digits, synthetic, folder, or a name of "
            "timm.data.create_dataset: wds/..., hfds/..., hfids/..., tfds/..., torch/..."
        )
    elif name.lower().startswith("torch/"):
        Path(root or "").mkdir(parents=True, exist_ok=True) if config.download and root else None
        options = {"split": wanted, "download": config.download}
    else:
        samples = config.train_samples if split == "train" else config.val_samples
        options |= {"download": config.download, "num_samples": samples, "batch_size": config.batch_size}
    try:
        inner = create_dataset(name, root=root, is_training=training and split == "train", **options)
    except (ImportError, NameError) as error:
        package = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}.get(name.split("/")[0].lower(), "")
        raise DataError(f"data.name={name}: {error}: pip install {package or 'what it needs'}") from error
    except Exception as error:
        raise DataError(f"data.name={config.name} data.root={root}: cannot open the {split} set: {error}") from error
    if isinstance(inner, torch.utils.data.IterableDataset):
        return inner
    return Images(inner, mode)


def class_names(dataset: Any) -> list[str] | None:
    """The classes of a data set in the order of their labels; None when it does not say."""
    inner = getattr(dataset, "inner", dataset)
    reader = getattr(inner, "reader", inner)
    for owner in (reader, inner):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            table = getattr(owner, attribute, None)
            if isinstance(table, Mapping) and table:
                return [str(name) for name, _ in sorted(table.items(), key=lambda item: item[1])]
    if getattr(inner, "classes", None):
        return [str(name) for name in inner.classes]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    names = getattr(features.get(getattr(reader, "label_key", "label")), "names", None)
    return [str(name) for name in names] if names else None


def _locate(config: DataConfig, split: str, *, training: bool) -> Path:
    if not config.root:
        raise DataError("data.root is not set: data.root=FOLDER with train/ and val/, one subfolder per class")
    root = Path(config.root).expanduser()
    if not root.exists():
        raise DataError(f"data.root={root}: no such folder")
    wanted, synonyms = (config.train_split, TRAIN) if split == "train" else (config.val_split, VAL)
    for name in dict.fromkeys((wanted, *(synonyms if wanted in synonyms else ()))):
        for candidate in (root / name, root / f"{name}.tar"):
            if candidate.exists():
                return candidate
    inside = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    # a folder of class folders, or a tar file, is enough when there is only something to evaluate
    if not training and not {*TRAIN, *VAL} & {name.removesuffix(".tar") for name in inside}:
        return root
    raise DataError(
        f"data.root={root}: no {wanted}/ or {wanted}.tar in it (there is: {listing(inside, limit=6) or 'nothing'})"
    )


def _check_classes(root: Path) -> None:
    from timm.data.readers.img_extensions import get_img_extensions

    endings = tuple(get_img_extensions())
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    if not folders:
        raise DataError(f"{root}: no class folders in it; expected one subfolder of images per class")
    for folder in folders:
        if not any(
            name.lower().endswith(endings) for _, _, names in os.walk(folder, followlinks=True) for name in names
        ):
            raise DataError(
                f"{folder}: this class folder holds no image ({listing(sorted(endings))}): fill or remove it"
            )
