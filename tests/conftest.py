"""Settings shared by every test: two threads, a fixed seed, no network."""

from __future__ import annotations

import os

os.environ.setdefault("NEARFIELD_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
