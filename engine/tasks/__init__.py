"""The tasks, one file each: what is opened, built and measured for it."""

from __future__ import annotations

import importlib

import torch

from ..config import EvalConfig, TrainConfig
from ..task import Prepared


def prepare(config: TrainConfig | EvalConfig, device: torch.device) -> Prepared:
    """Data, model, loss and metrics of `config.task.name`, for training or for the evaluation of a split.

    Raises:
        UserError: anything that can be wrong before the first batch.
    """
    module = importlib.import_module(f".{config.task.name}", __package__)
    prepared: Prepared = module.prepare(config, device)
    return prepared
