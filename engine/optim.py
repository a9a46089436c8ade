"""Optimizer and learning rate, by timm's factories."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .config import OptimConfig, SchedConfig, TrainerConfig
from .errors import ConfigError, listing, nearest


def create_optimizer(config: OptimConfig, model: nn.Module, *, global_batch: int) -> torch.optim.Optimizer:
    """timm's optimizer over the model's parameters, in groups by decay and, with layer_decay, by depth.

    Args:
        config: the `optim` group.
        model: biases, 1-D parameters and what its `no_weight_decay()` names are not decayed.
        global_batch: images per update; with `optim.lr_base_size` the rate is scaled by their ratio.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(name) for name in list_optimizers()]
    if config.name.lower() not in known:
        close = nearest(config.name, known)
        raise ConfigError(
            f"optim.name: there is no optimizer {config.name!r}{close}; timm.optim.list_optimizers() names all"
        )
    options: dict[str, Any] = dict(config.kwargs)
    if config.betas is not None:
        options["betas"] = tuple(config.betas)
    if config.eps is not None:
        options["eps"] = config.eps
    if config.decay_bias_tables:
        options["param_group_fn"] = lambda part: _groups_with_tables(config, part)
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr * lr_scale(config, global_batch),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **options,
        )
    except TypeError as error:
        given = listing(options) or "nothing more"
        raise ConfigError(f"optim.name={config.name} does not take one of {given}: {error}") from error


def lr_scale(config: OptimConfig, global_batch: int) -> float:
    """What the rates of a recipe are multiplied with: the ratio of the batch to the one they are meant for."""
    return global_batch / config.lr_base_size if config.lr_base_size else 1.0


def _groups_with_tables(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """timm's groups when relative position bias tables are decayed although the model would rather not."""
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    named: Collection[str] = getattr(model, "no_weight_decay", set)()
    tables = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "bias" in name.rsplit(".", 1)[-1] and not name.endswith(".bias")
    }
    kept = [
        name
        for name, _ in model.named_parameters()
        if name not in tables and any(fnmatch.fnmatch(name, pattern) for pattern in named)
    ]
    if config.layer_decay is not None:
        return param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=kept, layer_decay=config.layer_decay
        )
    return param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=kept)


def create_scheduler(
    config: SchedConfig,
    optim: OptimConfig,
    trainer: TrainerConfig,
    optimizer: torch.optim.Optimizer,
    *,
    updates_per_epoch: int,
    global_batch: int,
) -> tuple[Any, int]:
    """timm's scheduler, moving at every update, and the number of epochs with the cool-down.

    `trainer.epochs`, or `trainer.updates`, counts the warm-up; with `sched.warmup_prefix` the curve takes what is left
    after it. With `trainer.updates` the last epoch may be cut short.
    """
    from timm.scheduler import create_scheduler_v2

    epochs = trainer.epochs if trainer.updates is None else trainer.updates / updates_per_epoch
    warmup = config.warmup_epochs if config.warmup_updates is None else config.warmup_updates / updates_per_epoch
    if warmup >= epochs and warmup > 0:
        if config.warmup_updates is None and trainer.updates is None:
            given, whole = f"sched.warmup_epochs={warmup:g}", f"trainer.epochs={epochs}: lower it below {epochs}"
        else:
            given = f"sched: a warm-up of {warmup * updates_per_epoch:g} updates"
            whole = f"a training of {epochs * updates_per_epoch:g}: shorten it"
        raise ConfigError(f"{given} leaves nothing of {whole}")
    scale = lr_scale(optim, global_batch)
    prefix = config.warmup_prefix and config.name not in ("wsd", "rsqrt")
    curve = epochs - warmup if prefix else epochs
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=curve,  # type: ignore[arg-type]  # a fraction is fine: it is multiplied with the updates
            warmup_epochs=warmup,  # type: ignore[arg-type]
            warmup_prefix=prefix,
            warmup_lr=config.warmup_lr * scale,
            min_lr=config.min_lr * scale,
            cooldown_epochs=config.cooldown_epochs,
            decay_epochs=config.decay_epochs,
            decay_rate=config.decay_rate,
            decay_milestones=config.decay_milestones,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise ConfigError(f"sched.name={config.name}: {error}") from error
    return scheduler, math.ceil(epochs) + (config.cooldown_epochs if trainer.updates is None else 0)
