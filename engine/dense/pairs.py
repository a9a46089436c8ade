"""Which mask belongs to which image: the folder layouts of ADE20K, Cityscapes, Pascal VOC and of plain folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, DataError, listing, nearest
from ..images import TRAIN, VAL
from . import classes

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
MASK_FOLDERS = ("masks", "labels", "annotations")
_SPLITS = (TRAIN, ("test", "testing"), VAL)  # the names of a split; asked for by a name of its own, test is never val
_ADE20K_LABELS = {0: classes.IGNORED, **{label: label - 1 for label in range(1, 151)}}
_CITYSCAPES_LABELS = dict.fromkeys(range(classes.CITYSCAPES_LAST_ID + 1), classes.IGNORED)
_CITYSCAPES_LABELS |= {label: index for index, label in enumerate(classes.CITYSCAPES_IDS)}


@dataclass(frozen=True)
class Pair:
    """An image, its mask, and what the values stored in the mask mean: value -> class, None for classes as they are."""

    image: Path
    mask: Path
    labels: dict[int, int] | None = None


@dataclass
class Pairs:
    """The pairs of a split, in the order of their names, and what has no partner.

    `unlabelled` are images without a mask (image, where its mask was looked for), `spare` masks without an image.
    """

    pairs: list[Pair] = field(default_factory=list)
    class_names: list[str] | None = None
    unlabelled: list[tuple[Path, Path]] = field(default_factory=list)
    spare: list[Path] = field(default_factory=list)
    note: str = ""


def find_pairs(root: Path, split: str, layout: str, *, mask_suffix: str = "") -> Pairs:
    """The images of a split and their masks, none of them opened.

    Args:
        root: the folder of the set; for ade20k and voc also the one above it.
        split: `train`, `val` or `test` in any of their usual spellings, or a folder's (voc: a list's) own name.
        layout: one of `LAYOUTS`.
        mask_suffix: what follows the image's stem in the mask's, for `folder`: `_mask` for cat.jpg and cat_mask.png.

    Raises:
        ConfigError: no such layout.
        DataError: a folder or list is missing or empty.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}{nearest(layout, LAYOUTS)}: allowed are {listing(LAYOUTS)}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder" if not root.exists() else f"{root}: not a folder")
    if layout == "folder":
        return _folder(root, split, mask_suffix)
    if mask_suffix:
        raise ConfigError(f"mask_suffix={mask_suffix!r}: only layout=folder has it, {layout} knows its own names")
    return LAYOUTS[layout](root, split)


def _ade20k(root: Path, split: str) -> Pairs:
    root = _inside(root, ("", "ADEChallengeData2016"), "images", "ade20k", "images/training and annotations/training")
    if (root / "images" / "ADE").is_dir():
        raise DataError(
            f"{root}: this is the full ADE20K, coded in colours; the benchmark of 150 classes is ADEChallengeData2016"
        )
    images = _split_folder(root / "images", split)
    masks = root / "annotations" / images.name
    return _matched(images, masks, classes.ADE20K, labels=_ADE20K_LABELS)


def _cityscapes(root: Path, split: str) -> Pairs:
    images = _split_folder(_existing(root / "leftImg8bit", "cityscapes has leftImg8bit/SPLIT/CITY/*.png"), split)
    kind = "gtFine" if (root / "gtFine" / images.name).is_dir() or not (root / "gtCoarse").is_dir() else "gtCoarse"
    masks = _existing(root / kind / images.name, "cityscapes has gtFine/SPLIT/CITY/*_gtFine_labelIds.png")
    found = Pairs(class_names=list(classes.CITYSCAPES))
    for image in _pictures(images):
        city, stem = image.parent.name, image.stem.removesuffix("_leftImg8bit")
        trained = masks / city / f"{stem}_{kind}_labelTrainIds.png"
        official = masks / city / f"{stem}_{kind}_labelIds.png"
        if trained.is_file():
            found.pairs.append(Pair(image, trained))
        elif official.is_file():
            found.pairs.append(Pair(image, official, _CITYSCAPES_LABELS))
        else:
            found.unlabelled.append((image, official))
    known = {pair.mask.name.rpartition("_")[0] for pair in found.pairs}
    found.spare = [mask for mask in _pictures(masks, "_labelIds") if mask.name.rpartition("_")[0] not in known]
    return found


def _voc(root: Path, split: str) -> Pairs:
    root = _inside(
        root,
        ("", "VOC2012", "VOCdevkit/VOC2012"),
        "JPEGImages",
        "voc",
        "JPEGImages, SegmentationClass and ImageSets/Segmentation",
    )
    lists, augmented = root / "ImageSets" / "Segmentation", root / "SegmentationClassAug"
    _existing(lists, "voc has the names of its splits in ImageSets/Segmentation/*.txt")
    chosen = [lists / (split if split.endswith(".txt") else f"{_voc_list(split, lists)}.txt")]
    if chosen[0].name == "train.txt" and split != "train.txt" and augmented.is_dir():
        whole = (lists / "trainaug.txt", lists / "train_aug.txt", root / "ImageSets/SegmentationAug/train_aug.txt")
        rest = lists / "aug.txt"
        chosen = [path for path in whole if path.is_file()][:1] or [*chosen, *([rest] if rest.is_file() else [])]
    found = Pairs(class_names=list(classes.VOC), note=f"listed in {listing(path.name for path in chosen)}")
    for name in dict.fromkeys(name for path in chosen for name in _voc_names(path)):
        image = root / "JPEGImages" / f"{name}.jpg"
        masks = [folder / f"{name}.png" for folder in (root / "SegmentationClass", augmented)]
        if not image.is_file():
            raise DataError(f"{image}: no such file, but {listing(chosen)} names it: add it or take it off the list")
        mask = next((mask for mask in masks if mask.is_file()), None)
        if mask is None:
            found.unlabelled.append((image, masks[0]))
        else:
            found.pairs.append(Pair(image, mask))
    return found


def _voc_list(split: str, lists: Path) -> str:
    if (lists / f"{split}.txt").is_file():
        return split
    for names in _SPLITS:
        if split in names:
            return names[0]
    return split


def _voc_names(path: Path) -> list[str]:
    """The names in a list; some lists give paths of the image and of the mask instead."""
    if not path.is_file():
        there = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise DataError(f"{path}: no such list (there is: {listing(there) or 'nothing'})")
    return [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _folder(root: Path, split: str, suffix: str) -> Pairs:
    names = _class_names(root / "classes.txt")
    expected = f"expected images/{split} and masks/{split} (or labels/, annotations/), or {split}/images, {split}/masks"
    if (root / "images").is_dir():
        images = _split_folder(root / "images", split)
        there = [found for folder in MASK_FOLDERS if (found := _named_split(root / folder, split))]
    else:
        images = _existing(_split_folder(root, split) / "images", expected)
        there = [folder for name in MASK_FOLDERS if (folder := images.parent / name).is_dir()]
    if not there:
        raise DataError(f"{images}: no folder of masks for it; {expected}")
    if len(there) > 1:
        raise DataError(f"{root}: {listing(there)} could all be the masks of {images}: leave one of them")
    return _matched(images, there[0], names, suffix=suffix)


def _class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(names)) != len(names) or not names:
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"{path}: one class per line, each once (twice: {listing(twice)})" if twice else f"{path}: empty"
        )
    return names


LAYOUTS: dict[str, Callable[..., Pairs]] = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "voc": _voc,
    "folder": _folder,
}


def _matched(
    images: Path,
    masks: Path,
    names: Iterable[str] | None,
    *,
    labels: dict[int, int] | None = None,
    suffix: str = "",
) -> Pairs:
    """Images and masks of two folders by their path without ending."""
    _existing(masks, f"it should hold the masks of {images}")
    by_stem: dict[str, Path] = {}
    for mask in _pictures(masks):
        stem = str(mask.relative_to(masks).with_suffix(""))
        if stem in by_stem:
            raise DataError(f"{mask}: {by_stem[stem].name} has the same name: which is the mask? Leave one of them")
        by_stem[stem] = mask
    found = Pairs(class_names=None if names is None else list(names))
    used: set[str] = set()
    for image in _pictures(images):
        stem = str(image.relative_to(images).with_suffix("")) + suffix
        if stem in used:
            raise DataError(f"{image}: another image of this name has the mask {by_stem[stem].name}: rename one")
        if stem in by_stem:
            found.pairs.append(Pair(image, by_stem[stem], labels))
            used.add(stem)
        else:
            found.unlabelled.append((image, masks / f"{stem}.png"))
    found.spare = [mask for stem, mask in by_stem.items() if stem not in used]
    return found


def _pictures(folder: Path, stem_end: str = "") -> list[Path]:
    """Every picture below a folder, sorted; hidden files (also macOS's `._*`) are none."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() in ENDINGS and stem.endswith(stem_end) and not name.startswith("."):
                found.append(Path(parent, name))
    return sorted(found)


def _split_folder(parent: Path, split: str) -> Path:
    if found := _named_split(parent, split):
        return found
    inside = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    raise DataError(f"{parent}: no folder {split} in it (there is: {listing(inside, limit=6) or 'nothing'})")


def _named_split(parent: Path, split: str) -> Path | None:
    """The folder of a split under any of its usual names, the one that was asked for first."""
    synonyms = next((names for names in _SPLITS if split in names), ())
    return next((parent / name for name in dict.fromkeys((split, *synonyms)) if (parent / name).is_dir()), None)


def _inside(root: Path, places: tuple[str, ...], must_hold: str, layout: str, expected: str) -> Path:
    for place in places:
        if (root / place / must_hold).is_dir():
            return root / place
    inside = sorted(path.name for path in root.iterdir())
    raise DataError(f"{root}: {layout} has {expected} (there is: {listing(inside, limit=6) or 'nothing'})")


def _existing(folder: Path, expected: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {expected}")
    return folder
