"""Names: registration of the families' variants, here and with timm, and ``create_model``."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from .. import checkpoints
from ..checkpoints import describe_mismatch
from . import catalog
from .backbone import Backbone, take_stages
from .features import Features
from .layers import to_pair
from .loading import (
    CLASSIFIER,
    StateDictMismatch,
    adapt_state_dict,
    bare_backbone,
    checkpoint_filter_fn,
    fit_state_dict,
    mismatch,
    published_options,
    shapes_of,
)

_logger = logging.getLogger("nearfield.models")

_NOT_SAVED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_OF_FEATURES = ("out_indices", "output_fmt", "norm")
# as in timm, where no argument of a configuration can be left out
_OWN_WHERE_NONE = ("img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate")

_ENTRYPOINTS: dict[str, Callable[..., nn.Module]] = {}

not_in_timm: list[str] = []
"""Names that timm had already when this package was imported: timm keeps its own models under them."""


class UnknownArgument(ValueError, TypeError):  # noqa: N818 - says what it is
    """A model was asked for with an argument that its family does not take; a TypeError too, as Python raises."""


def register(
    module_name: str,
    family: type[Backbone],
    variants: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> None:
    """Register a family's variants with this package and with timm.

    For every name the family's module gets a function of that name, ``name(pretrained=False, **kwargs)``, and its
    entry in ``default_cfgs``, as timm's own files have them.

    Args:
        module_name: ``__name__`` of the family's file.
        family: backbone class.
        variants: constructor arguments of each variant, by name.
        tasks: by name, what a variant is made with instead for ``detection`` or ``segmentation``.
    """
    module = sys.modules[module_name]
    module.__dict__.setdefault("default_cfgs", {}).update(
        generate_default_cfgs(
            {key: cfg for name in variants for key, cfg in _cfgs(name, family, variants[name]).items()}
        )
    )
    for name, kwargs in variants.items():
        variant = catalog.Variant(name, family, kwargs, (tasks or {}).get(name, {}))
        catalog.add(variant)
        entrypoint = _entrypoint(variant, module_name)
        setattr(module, name, entrypoint)
        _ENTRYPOINTS[name] = entrypoint
        if timm.is_model(name) and not timm.model_entrypoint(name).__module__.startswith(f"{__package__}."):
            not_in_timm.append(name)
        else:
            timm.models.register_model(entrypoint)


def warn_about_names() -> None:
    """Say once which names timm keeps for itself."""
    if not_in_timm:
        _logger.warning(
            "timm has models of its own named %s: timm.create_model makes timm's, nearfield.create_model makes these",
            ", ".join(not_in_timm),
        )


def _cfgs(name: str, family: type[Backbone], kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """timm's pretrained cfgs of a variant by ``name.tag``; one without weights where nothing is published."""
    names = {"first_conv": family.first_conv, "classifier": CLASSIFIER}
    published = {f"{name}.{entry.tag}": {**entry.pretrained_cfg(), **names} for entry in checkpoints.entries(name)}
    size = to_pair("img_size", kwargs.get("img_size", 224))
    return published or {name: {"input_size": (3, *size), "crop_pct": 0.9, **names}}


def _entrypoint(variant: catalog.Variant, module: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        task = kwargs.pop("task", None)
        features = _feature_options(variant, kwargs)
        state = _read_for_timm(variant.name, kwargs) if pretrained else None
        try:
            model = build_model_with_cfg(
                variant.family,
                variant.name,
                pretrained and state is None,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg=features,
                **{**variant.for_task(task), **kwargs},
            )
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            names = _arguments(variant.family)
            close = difflib.get_close_matches(unknown[1], names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(names))}"
            raise UnknownArgument(f"{variant.name} takes no argument {unknown[1]!r}: {hint}") from error
        if state is not None:
            load_weights(model, state)
        return model

    create.__name__ = create.__qualname__ = variant.name
    create.__module__ = module
    create.__doc__ = (
        f"{variant.family.__name__}: {', '.join(f'{key}={value}' for key, value in variant.kwargs.items())}."
    )
    return create


def _feature_options(variant: catalog.Variant, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What features are made with: timm's ``feature_cfg``. Takes from ``kwargs`` what is meant for them.

    Raises:
        ValueError: a ``feature_cls`` that cannot wrap these models.
    """
    if not kwargs.get("features_only"):
        return {}
    options = {**(kwargs.pop("feature_cfg", None) or {})}
    options |= {name: kwargs.pop(name) for name in (*_OF_FEATURES, "feature_cls") if name in kwargs}
    made_by = options.setdefault("feature_cls", Features)
    if made_by not in ("getter", "hook") and not isinstance(made_by, type):
        raise ValueError(f"feature_cls={made_by!r}: these models take 'getter', 'hook' or a class, best none")
    if made_by is not Features:
        if "norm" in options and made_by == "hook":
            raise ValueError("norm= is not for feature_cls='hook': leave out one of them")
        # where nothing is said timm would take five
        stages = len(cast(Backbone, variant.skeleton()).feature_info)
        options["out_indices"] = tuple(take_stages(options.get("out_indices"), stages, "out_indices"))
    else:
        options.setdefault("out_indices", None)
    return options


def _read_for_timm(name: str, kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The published weights where timm would go wrong: it keeps a file under the last part of its URL.

    Five files behind URLs that all end in ``/content`` would be one to it.
    """
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    entry = checkpoints.find(cfg.url) if isinstance(cfg.url, str) and cfg.url else None
    if entry is None or cfg.file or cfg.state_dict or str(cfg.url).endswith(f"/{entry.file}"):
        return None
    return checkpoints.read(checkpoints.resolve(str(cfg.url), cache_dir=kwargs.get("cache_dir")))


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a file's weights, adapted to the classes and channels of the model; CheckpointMismatch if they differ."""
    backbone = model.backbone if isinstance(model, Features) else model
    assert isinstance(backbone, Backbone)
    try:
        model.load_state_dict(adapt_state_dict(state, backbone))
    except StateDictMismatch as error:
        # in terms of the file as it is, not as it was adapted to a model that it does not fit
        difference = describe_mismatch(fit_state_dict(state, backbone), shapes_of(backbone))
        raise mismatch(difference, state, backbone) from error


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a model by name, with published weights if asked for.

    Args:
        name: one of ``list_models()``, optionally with a tag after a dot that chooses among its published files (the
            first is the default); or any name that only timm has.
        pretrained: load the published file, downloaded once or found in the cache.
        checkpoint_path: load this file instead: a path, URL, ``hf-hub:owner/name`` or index name, in any published
            layout or this package's, plain or wrapped in a training checkpoint.
        img_size: nominal image size, an int or (height, width); every model runs on other sizes too.
        **kwargs: arguments of the family's class; ``task`` (``detection``, ``segmentation``), which gives those
            that depend on the size of images (dilations, regions) the values published for it; and timm's
            ``features_only`` with ``out_indices``, ``output_fmt``, ``norm`` (see ``Features``) and ``feature_cls``
            (``hook``, or a class, to make the maps in another way), ``pretrained_cfg``, ``pretrained_cfg_overlay``,
            ``cache_dir``. ``num_classes`` and ``in_chans`` default to what the file has; another number of classes
            draws a new classifier, another number of channels adapts the first convolution, and each says so in the
            log. None is the value None where the family's argument may have it (``topk``, ``attention``,
            ``layer_scale``, ...); for ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate``,
            ``drop_path_rate`` and what is no argument of the family it is as if left out. ``timm.create_model`` leaves
            out every None.

    Raises:
        ValueError: unknown name or tag, nothing published, an argument out of range.
        CheckpointError: the file cannot be had, or does not fit (then with its keys, shapes and the models that fit).
    """
    base, _, tag = name.partition(".")
    variant = catalog.get(base)
    admits_none = {} if variant is None else _arguments(variant.family)
    for key in [key for key, value in kwargs.items() if value is None]:
        if key in _OWN_WHERE_NONE or key not in admits_none:
            del kwargs[key]
        elif not admits_none[key]:
            raise ValueError(f"{base} takes no {key}=None: leave it out for the model's own")
    if img_size is not None:
        kwargs["img_size"] = img_size
    if variant is None:
        # timm's models have no arguments by task
        catalog.check_task(kwargs.pop("task", None))
        if timm.is_model(base) or ":" in name:
            return timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
        raise ValueError(f"unknown model {name!r}{_nearest(base, [*list_models(), *timm.list_models()])}")

    source: str | Path | None = checkpoint_path
    by_timm = False
    if isinstance(kwargs.get("pretrained_cfg"), str):  # a tag
        kwargs["pretrained_cfg"] = _default_cfg(base, kwargs["pretrained_cfg"])
    if not source and pretrained:
        by_timm = bool(kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"})
        if not by_timm and not checkpoints.entries(base):
            raise ValueError(f"nothing is published for {base}: use pretrained=False, or checkpoint_path= with a file")
        source = None if by_timm else name
    kwargs.setdefault("pretrained_cfg", _default_cfg(base, tag))
    state = None
    if source:
        state = read_weights(source, base, cache_dir=kwargs.get("cache_dir"))
        if kwargs.get("features_only"):
            state = bare_backbone(state)
        kwargs = {**published_options(state, variant.family), **kwargs}
    if state is not None and "feature_cls" in kwargs:
        # a wrapper of timm's renames what it wraps: timm loads the weights before
        overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": state}
        kwargs["pretrained_cfg_overlay"], by_timm, state = overlay, True, None
    model = _ENTRYPOINTS[base](pretrained=by_timm, **kwargs)
    forget_state_dict(model)
    # timm writes these beside exported weights
    args = {key: value for key, value in kwargs.items() if key not in _NOT_SAVED}
    vars(model)["_model_args"] = args
    if state is not None:
        load_weights(model, state)
    return model


def forget_state_dict(model: Any) -> None:
    """Take the weights that timm loaded from memory out of a model's configuration, where timm leaves them."""
    for module in (model, getattr(model, "model", model)):
        module.pretrained_cfg.pop("state_dict", None)


def read_weights(source: str | Path, name: str, *, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """The state dict of a backbone that ``source`` means (see ``checkpoints.resolve``), for the model ``name``.

    Says so when a published file is that of another model: NAT and DiNAT differ in nothing that a file stores.
    """
    entry = checkpoints.find(str(source))
    if entry is not None and entry.model != name:
        _logger.warning("%s was published for %s and is loaded into %s", entry.file, entry.model, name)
    return checkpoints.read(checkpoints.resolve(source, cache_dir=cache_dir))


def _arguments(family: type[nn.Module]) -> dict[str, bool]:
    """The constructor arguments of a family, and of its bases where it hands them what it does not know.

    By name, with whether None is among the values that the argument may have.
    """
    names: dict[str, bool] = {}
    for base in family.__mro__:
        parameters = inspect.signature(base.__init__, eval_str=True).parameters.values()  # type: ignore[misc]
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY:
                names.setdefault(p.name, type(None) in get_args(p.annotation))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _default_cfg(name: str, tag: str) -> dict[str, Any]:
    """The pretrained cfg of a model and tag, as the family's module lists it."""
    cfgs = sys.modules[_ENTRYPOINTS[name].__module__].__dict__["default_cfgs"][name]
    if tag and tag not in cfgs.cfgs:
        known = ", ".join(f"{name}.{known}" for known in cfgs.tags if known) or "no tags, as nothing is published"
        raise ValueError(f"unknown tag {tag!r} of {name}: it has {known}")
    tag = tag or cfgs.tags[0]
    return {**cfgs.cfgs[tag].to_dict(), "architecture": name, **({"tag": tag} if tag else {})}


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=4, cutoff=0.6)
    return f": did you mean {', '.join(close)}?" if close else ": nearfield.list_models() gives the names"


def list_models(filter: str | Iterable[str] = "", pretrained: bool = False) -> list[str]:
    """Names of this package's models, sorted naturally.

    Args:
        filter: shell pattern or several (``"nat*"``), matched against the name, with and without tag.
        pretrained: list what is published, as ``name.tag``.
    """
    names = list(_ENTRYPOINTS)
    if pretrained:
        names = [f"{name}.{entry.tag}" for name in names for entry in checkpoints.entries(name)]
    patterns = [filter] if isinstance(filter, str) else list(filter)
    if any(patterns):
        names = [n for n in names if any(fnmatch.fnmatch(m, p) for p in patterns for m in (n, n.partition(".")[0]))]
    return sorted(names, key=lambda n: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", n)])
