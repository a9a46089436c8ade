"""The model that a configuration asks for, with its errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import timm
from torch import nn

from .. import create_detector, create_model, create_segmentor, list_models
from ..checkpoints.errors import CheckpointError
from ..models.dense.detection import HEADS as DETECTORS
from ..models.dense.options import NAMES as OF_HEADS
from ..models.dense.segmentation import HEADS as SEGMENTORS
from .config import ModelConfig, TaskConfig
from .errors import CheckpointMismatchError, ConfigError, listing, nearest

_logger = logging.getLogger("nearfield.engine")
HEADS = {"detection": DETECTORS, "segmentation": SEGMENTORS}
# arguments that have a key of their own, behind whose back they would go as kwargs
OWN_KEY = {
    **dict.fromkeys(("name", "model_name", "backbone", "backbone_name"), "model.name"),
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.checkpoint",
    "num_classes": "data.num_classes, or leave it out: they are counted",
    **{name: f"model.{name}" for name in ("in_chans", "img_size", "drop_rate", "drop_path_rate")},
}
OWN_KEY_DENSE = OWN_KEY | {name: f"task.{name}" for name in ("head", "out_norm", "min_size", "max_size")}


def check(config: ModelConfig, task: TaskConfig) -> None:
    """ConfigError for what is wrong with the names and arguments of a model, told before data are opened."""
    check_name(config.name)
    heads = HEADS.get(task.name)
    if heads and task.head is not None and task.head not in heads:
        close = nearest(task.head, heads, count=1)
        raise ConfigError(f"task.head={task.head}: no such head of task={task.name}{close}; it has {listing(heads)}")
    own_key = OWN_KEY_DENSE if heads else OWN_KEY
    for group, kwargs in (("model", config.kwargs), ("task", task.kwargs)):
        for name in kwargs:
            if name in own_key:
                raise ConfigError(f"{group}.kwargs.{name}: it has a key of its own: use {own_key[name]}")


def build(
    config: ModelConfig,
    *,
    num_classes: int,
    in_chans: int,
    class_names: list[str] | None = None,
    strict_head: bool = True,
) -> nn.Module:
    """Make the model for data with `num_classes` classes and `in_chans` channels.

    Args:
        config: the `model` group; its checkpoint, or else its published weights, are loaded.
        num_classes: classes of the data.
        in_chans: channels of the data.
        class_names: for messages.
        strict_head: a classifier of another size in the checkpoint is an error; otherwise a new one is drawn.

    Raises:
        ConfigError: unknown model, an argument it does not take, another number of classes than the data.
        CheckpointMismatchError: the checkpoint is missing or belongs to another model, or its head to other classes.
    """
    check_name(config.name)
    if config.num_classes is not None and config.num_classes != num_classes:
        which = f" ({listing(class_names, limit=5)})" if class_names else ""
        raise ConfigError(
            f"model.num_classes={config.num_classes}, but the data has {num_classes} classes{which}: "
            f"remove it or set model.num_classes={num_classes}"
        )
    options: dict[str, Any] = {
        "in_chans": in_chans,
        "img_size": image_size(config),
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
    }
    options = {key: value for key, value in options.items() if value is not None} | config.kwargs
    loads = bool(config.checkpoint or config.pretrained)
    # with a file, its own head comes first: what it was trained for decides whether the data fits (timm's own models
    # are strict about it themselves)
    if not (loads and strict_head and is_ours(config.name)):
        options["num_classes"] = num_classes
    with errors_in_one_line(config):
        model = create_model(
            config.name,
            pretrained=config.pretrained and not config.checkpoint,
            checkpoint_path=config.checkpoint,
            **options,
        )
    has = getattr(model, "num_classes", num_classes)
    if has != num_classes:
        which = (
            f"model.checkpoint={config.checkpoint}" if config.checkpoint else f"the published weights of {config.name}"
        )
        head = f"a head of {has} classes" if has else "no classifier"
        raise CheckpointMismatchError(
            f"{which}: {head}, but the data has {num_classes} classes: give the data of that checkpoint, "
            "or fine-tune with train.py model.new_head=true"
        )
    checkpoint_activations(config, model)
    return model


def build_detector(config: ModelConfig, task: TaskConfig, head: str, *, num_classes: int, whole: bool = False) -> Any:
    """`nearfield.create_detector` as `model` and `task` say it.

    Args:
        config: a checkpoint may hold a backbone alone, or everything.
        task: the options of the detector.
        head: its name.
        num_classes: classes, without background.
        whole: the checkpoint must hold everything: with heads drawn at random there is nothing to evaluate.

    Raises:
        ConfigError: an unknown head or model, an argument that one of them does not take.
        CheckpointMismatchError: the checkpoint is missing or does not fit.
    """
    sizes = {"min_size": task.min_size, "max_size": task.max_size}
    return _build_dense(create_detector, config, task, head, {**sizes, "num_classes": num_classes}, whole)


def build_segmentor(config: ModelConfig, task: TaskConfig, head: str, *, num_classes: int, whole: bool = False) -> Any:
    """`nearfield.create_segmentor` as `model` and `task` say it; as `build_detector`."""
    return _build_dense(create_segmentor, config, task, head, {"num_classes": num_classes}, whole)


def _build_dense(
    create: Callable[..., Any], config: ModelConfig, task: TaskConfig, head: str, sizes: dict[str, Any], whole: bool
) -> Any:
    if config.num_classes is not None and config.num_classes != sizes["num_classes"]:
        raise ConfigError(
            f"model.num_classes={config.num_classes}, but the data has {sizes['num_classes']} classes: remove it"
        )
    options: dict[str, Any] = {
        "img_size": image_size(config),
        "in_chans": config.in_chans,
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
    }
    options = {key: value for key, value in options.items() if value is not None}
    with errors_in_one_line(config):
        try:
            model = create(
                config.name,
                head,
                pretrained=config.pretrained and not config.checkpoint,
                checkpoint_path=None if whole else config.checkpoint,
                out_norm=task.out_norm,
                **{**sizes, **options, **config.kwargs, **task.kwargs},
            )
        except TypeError as error:
            raise _unknown_option(error, task, create, config.name) or error from error
    if whole:
        _load_whole(model, str(config.checkpoint), f"{head} on {config.name} with {sizes['num_classes']} classes")
    checkpoint_activations(config, model)
    return model


def _unknown_option(error: TypeError, task: TaskConfig, create: Callable[..., Any], name: str) -> ConfigError | None:
    """What to say if `error` is about one of `task.kwargs`, which is first an argument of `create`."""
    wrong = next((key for key in task.kwargs if repr(key) in str(error)), None)
    if wrong is None:
        return None
    parameters = inspect.signature(create).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in OWN_KEY_DENSE]
    names += sorted(OF_HEADS) if create is create_detector else []
    close = nearest(wrong, names, count=1) or f"; {create.__name__} takes {listing(names, limit=30)}"
    return ConfigError(f"task.kwargs.{wrong}: neither {create.__name__} nor {name} takes it{close}")


def _load_whole(model: Any, source: str, what: str) -> None:
    """Every weight of a detector or segmentor from a file; only a head that evaluation does not use may be missing."""
    from ..models.dense.loading import read_dense

    try:
        state = read_dense(source)
        if state is None:
            raise CheckpointMismatchError(f"model.checkpoint={source} is a backbone alone, no {what}: train it first")
        found = model.load_state_dict(state, strict=False)
    except CheckpointError as error:
        raise CheckpointMismatchError(f"model.checkpoint={source}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointMismatchError(f"model.checkpoint={source}: no such file") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointMismatchError(f"model.checkpoint={source} is no {what}: {reason}") from error
    missing = [key for key in found.missing_keys if not key.startswith("aux_head.")]
    spare = [key for key in found.unexpected_keys if not any(p.match(key) for p in model.optional.values())]
    if missing or spare:
        parts = {"it lacks": missing, "the model has no": spare}
        wrong = "; ".join(f"{text} {listing(keys, limit=3)}" for text, keys in parts.items() if keys)
        raise CheckpointMismatchError(f"model.checkpoint={source} is no {what}: {wrong}")


@contextlib.contextmanager
def errors_in_one_line(config: ModelConfig) -> Iterator[None]:
    """What making a model from `config` can raise, as errors of the engine."""
    loads = bool(config.checkpoint or config.pretrained)
    try:
        yield
    except CheckpointError as error:
        raise CheckpointMismatchError(
            f"model.checkpoint={config.checkpoint}: {error}" if config.checkpoint else str(error)
        ) from error
    except FileNotFoundError as error:
        raise CheckpointMismatchError(f"model.checkpoint={config.checkpoint}: no such file") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.name={config.name}: {error}") from error
    except RuntimeError as error:
        if not loads:
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointMismatchError(
            f"model.checkpoint={config.checkpoint} does not fit {config.name}: {reason}"
        ) from error


def checkpoint_activations(config: ModelConfig, model: nn.Module) -> None:
    """Switch gradient checkpointing on if `config` asks for it; ConfigError if the model has none."""
    if config.grad_checkpointing:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise ConfigError(f"model.grad_checkpointing: {config.name} has none")
        switch(True)


def image_size(config: ModelConfig) -> tuple[int, int] | None:
    """`model.img_size` as (height, width) in pixels; None leaves it to the model."""
    size = config.img_size
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    if len(size) != 2:
        raise ConfigError(f"model.img_size={size}: give one number of pixels, or two: [height, width]")
    return size[0], size[1]


def check_name(name: str) -> None:
    """Raise a ConfigError that names the nearest models if neither this package nor timm has `name`."""
    if not name:
        published = list_models("*_tiny", pretrained=True)[-1].split(".")[0]
        raise ConfigError(
            "model.name is not set: model=NAME, one of nearfield.list_models() or timm.list_models(), "
            f"as in model={published} model.pretrained=true"
        )
    base = name.split(".")[0]
    if ":" not in name and not timm.is_model(base) and not is_ours(name):
        ours = list_models()
        raise ConfigError(
            f"model.name: there is no model {name!r}{nearest(base, dict.fromkeys([*ours, *timm.list_models()]))}; "
            f"nearfield.list_models() names ours: {listing(ours, limit=6)}"
        )


def is_ours(name: str) -> bool:
    """Whether this package makes the model (rather than timm)."""
    return name.split(".")[0] in {known.split(".")[0] for known in list_models()}
