"""What is published: one row per weight file, read from ``index.yaml`` on first use."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class Entry:
    """One published weight file.

    Attributes:
        file: its name (on a hub, the name inside the repository).
        model: our model name.
        tag: what stands after the dot, ``swin_base.ms_in22k_ft_in1k``; unique for a model.
        url: where it is, or None when it lies on the Hugging Face hub.
        hub: the hub repository (``owner/name``), or None.
        page: where a person can download it in a browser, for hosts that may refuse programs; None elsewhere.
        layout: name of its key layout (``shi-labs``, ``microsoft``, ``timm``).
        licence: licence of the weights.
        num_classes: outputs of its head; None when the authors do not say.
        input_size: (channels, height, width) of the evaluation.
        crop_pct, crop_mode, interpolation, mean, std: preprocessing of the evaluation, as timm names it.
        top1: published ImageNet-1k top-1 in percent, None when there is none.
        sha256: published hash of the file, None when there is none.
        source: where these figures stand.
        note: what else one should know.
    """

    file: str
    model: str
    tag: str
    url: str | None
    hub: str | None
    page: str | None
    layout: str
    licence: str
    num_classes: int | None
    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float | None
    sha256: str | None
    source: str
    note: str

    @property
    def name(self) -> str:
        """``model.tag``."""
        return f"{self.model}.{self.tag}"

    def pretrained_cfg(self) -> dict[str, Any]:
        """The row under the keys of timm's ``PretrainedCfg``; the model adds ``first_conv`` and ``classifier``."""
        return {
            "url": self.url or "",
            "hf_hub_id": self.hub,
            "architecture": self.model,
            "tag": self.tag,
            "num_classes": self.num_classes,
            "input_size": self.input_size,
            "fixed_input_size": False,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "license": self.licence.lower(),
            "notes": (self.note,) if self.note else (),
        }


@functools.cache
def _rows() -> tuple[Entry, ...]:
    import yaml  # not needed until somebody asks for a published file

    text = resources.files(__package__).joinpath("index.yaml").read_text(encoding="utf-8")
    families = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(_entry({**family["defaults"], **row}) for family in families.values() for row in family["files"])


def _entry(row: dict[str, Any]) -> Entry:
    row = {"hub": None, "url": None, "page": None, "top1": None, "sha256": None, "note": "", **row}
    folder = row.pop("folder", None)
    row["url"] = None if row["hub"] else row["url"] or folder + row["file"]
    for key in ("input_size", "mean", "std"):
        row[key] = tuple(row[key])
    return Entry(**row)


def entries(model: str | None = None) -> list[Entry]:
    """All rows, or those of one model with its default first; empty for a model nothing is published for."""
    return [entry for entry in _rows() if model is None or entry.model == model]


def find(text: str) -> Entry | None:
    """The row meant by a file name (or a path to one), a URL, ``model``, ``model.tag`` or a hub id; None if none is."""
    for prefix in _HUB_PREFIXES:
        if text.startswith(prefix):
            return next((entry for entry in _rows() if entry.hub == text.removeprefix(prefix)), None)
    if "://" in text:
        page = text.partition("?")[0]
        return next((entry for entry in _rows() if entry.url == text or entry.page == page), None)
    name = text.replace("\\", "/").rsplit("/", 1)[-1]
    for entry in _rows():
        if (entry.url and entry.file == name) or text in (entry.model, entry.name, entry.hub):
            return entry
    return None


def near_matches(text: str, limit: int = 5) -> list[str]:
    """Names and files of the index that look like ``text``, the most similar first."""
    known: dict[str, None] = {}
    for entry in _rows():
        known.update(dict.fromkeys((entry.model, entry.name)))
        if entry.url:
            known[entry.file] = None
    return difflib.get_close_matches(text.replace("\\", "/").rsplit("/", 1)[-1], list(known), n=limit, cutoff=0.6)
