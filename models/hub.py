"""Whole models as folders and as repositories of the Hugging Face hub: weights, configuration and a model card.

A folder holds ``model.safetensors``, ``config.json`` in timm's form and ``README.md``, so that timm reads it too, after
``import nearfield``: ``timm.create_model("hf-hub:OWNER/NAME", pretrained=True)``, ``"local-dir:FOLDER"``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import nn

from .. import checkpoints
from ..checkpoints.hub import hub_download, hub_upload, is_hub
from ..checkpoints.load import write_whole
from . import catalog
from .backbone import Backbone
from .registry import create_model

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# they say where the published weights of this architecture come from, which these need not be
_OF_OTHER_WEIGHTS = ("tag", "license", "notes", "origin_url", "paper_ids")


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    repo: str | None = None,
    licence: str | None = None,
    description: str = "",
    dataset: str | None = None,
    results: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write a model into a folder, for ``from_pretrained``; each file is written whole or not at all.

    Args:
        model: made by ``create_model`` (or timm's), without ``features_only``.
        folder: is made when it does not exist; a README.md that is there stays as it is.
        repo: ``owner/name`` that it is to have on the hub, for the card.
        licence: of the weights, as the hub spells it (``mit``); left open when it is not given.
        description: what the card says of them, Markdown.
        dataset: what they were trained on, as the hub names it.
        results: figures for the card, by what they are (``{"ImageNet-1k top-1": 81.8}``); they are not checked.
        class_names: one for each class, in the order of the outputs.

    Raises:
        ValueError: not such a model, an argument of it that JSON cannot hold, another number of class names.
        CheckpointError: the folder cannot be written.
    """
    if not isinstance(model, Backbone) or not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} is no model of create_model: save the classifier itself, "
            "features_only=True is for from_pretrained"
        )
    if len(model.stages) < len(model.feature_info):
        raise ValueError(
            f"{type(model).__name__} was pruned to {len(model.stages)} of {len(model.feature_info)} stages, which its "
            "configuration does not say: save the whole model, from_pretrained(..., features_only=True) prunes it"
        )
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class_names are given, the model has {model.num_classes} classes")
    folder = Path(folder)
    config = _config(model, licence, class_names)
    write_whole(folder / CONFIG, lambda part: _write(part, json.dumps(config, indent=2) + "\n"))
    if not (folder / CARD).exists():
        card = _card(
            model, config, folder.resolve().name if repo is None else repo, repo, licence, description, dataset, results
        )
        write_whole(folder / CARD, lambda part: _write(part, card))
    checkpoints.save(model.state_dict(), folder / WEIGHTS, {"model": config["architecture"]})
    return folder


def push_to_hub(
    model: nn.Module,
    repo: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add model",
    **card: Any,
) -> str:
    """Upload a model to the Hugging Face hub and return the address of its repository.

    Args:
        model: as in ``save_pretrained``.
        repo: ``owner/name``; made when it does not exist. A README.md that is there stays as it is.
        token: default the one that ``hf auth login`` keeps.
        private: whether a new repository is.
        revision: another branch than the main one.
        message: of the commit.
        **card: ``licence``, ``description``, ``dataset``, ``results`` and ``class_names`` of
            ``save_pretrained``.

    Raises:
        ValueError: as ``save_pretrained``.
        CheckpointError: offline, no such owner, no permission, no connection.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, repo=repo, **card)
        return hub_upload(folder, repo, token=token, private=private, revision=revision, message=message, keep=(CARD,))


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model that ``save_pretrained`` or ``push_to_hub`` wrote, with its weights.

    Args:
        source: a folder; ``owner/name`` or ``owner/name@revision`` on the hub, with or without ``hf-hub:`` before it. A
            folder of that name wins.
        cache_dir, offline: for the hub, as in ``checkpoints.resolve``.
        **kwargs: as in ``create_model``, over the arguments that the model was saved with: ``num_classes``,
            ``features_only``, ``drop_path_rate``, ...

    Raises:
        ValueError: the configuration is missing, broken, or that of a model which is not of this package.
        CheckpointError: the weights cannot be had, or do not fit.
    """
    folder = Path(source)
    if not is_hub(os.fspath(source)) and (folder.is_dir() or not isinstance(source, str)):
        weights = next((path for name in (WEIGHTS, "pytorch_model.bin") if (path := folder / name).is_file()), None)
        if weights is None or not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} holds no {CONFIG} and {WEIGHTS}: save_pretrained writes them")
    elif not is_hub(os.fspath(source)) and "/" not in os.fspath(source):
        raise ValueError(f"{source} is no folder here, nor owner/name of a repository on the hub")
    else:
        folder = hub_download(str(source), CONFIG, cache_dir=cache_dir, offline=offline).parent
        weights = hub_download(str(source), cache_dir=cache_dir, offline=offline)
    try:
        cfg, name, args = load_model_config_from_path(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is no configuration of a model ({error})") from None
    if catalog.get(name) is None:
        raise ValueError(f"{source} is a {name}, which is no model of this package: timm.create_model may know it")
    cfg = {key: value for key, value in cfg.items() if key not in ("file", "source")}
    return create_model(name, checkpoint_path=weights, **{**args, "pretrained_cfg": cfg, **kwargs})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _config(model: Backbone, licence: str | None, class_names: Sequence[str] | None) -> dict[str, Any]:
    """The configuration as timm writes it, without what it says of other weights."""
    given: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(model, str(path), model_config=given)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cfg = config["pretrained_cfg"]
    config["pretrained_cfg"] = {key: value for key, value in cfg.items() if key not in _OF_OTHER_WEIGHTS}
    if licence:
        config["pretrained_cfg"]["license"] = licence
    return config


def _card(
    model: Backbone,
    config: Mapping[str, Any],
    title: str,
    repo: str | None,
    licence: str | None,
    description: str,
    dataset: str | None,
    results: Mapping[str, Any] | None,
) -> str:
    """The model card; whatever nobody said is not in it."""
    cfg, name = config["pretrained_cfg"], config["architecture"]
    kind = "image-classification" if model.num_classes else "image-feature-extraction"
    # a string of JSON is one of YAML
    head = [f"library_name: nearfield\npipeline_tag: {kind}\ntags: [{kind}, nearfield, timm]"]
    head += [f"license: {json.dumps(licence)}"] if licence else []
    head += [f"datasets: [{json.dumps(dataset)}]"] if dataset else []
    family = (type(model).__doc__ or "").strip().split("\n")[0].split(";")[0].rstrip(".")
    input_size = " x ".join(map(str, cfg["input_size"]))
    rows = {
        "model": f"`{name}`: {family}",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "classes": model.num_classes or "none: pooled features",
        "input": f"{input_size}, {cfg['interpolation']}, {cfg['crop_mode']} crop of {cfg['crop_pct']}",
        "mean, std": f"{_numbers(cfg['mean'])}; {_numbers(cfg['std'])}",
    }
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {title}",
        description.strip(),
        _table("", "", rows),
        f"```python\nimport nearfield\n\nmodel = nearfield.from_pretrained({json.dumps(repo or 'FOLDER')}).eval()\n```",
        "" if not results else _table("figure of whoever made this file", "", results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    return "\n".join((f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())))
