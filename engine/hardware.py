"""The device, its arithmetic, and the precision of a forward pass."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import HardwareConfig
from .errors import ConfigError, DeviceError


def cores() -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def setup(config: HardwareConfig) -> torch.device:
    """Apply the `hardware` group and return the device.

    Raises:
        DeviceError: the device is not there.
    """
    # torch does not see a container's quota, and more threads than it allows stand in each other's way
    threads = config.threads or min(torch.get_num_threads(), cores())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"hardware.device: {name!r} is no device; allowed: auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"only {count} of them" if count else "no usable CUDA GPU here"
            raise DeviceError(f"hardware.device={name}: {have}; use hardware.device=cpu or auto")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"hardware.device={name}: no such device here; use hardware.device=cpu or auto")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"hardware.device: {name!r} is not supported; allowed: auto, cpu, cuda, cuda:N, mps")
    return device


def precision(config: HardwareConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products in the forward pass."""
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError("hardware.amp=fp16 is for GPUs: use bf16 or none on a CPU")
    return {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast_in(dtype: torch.dtype, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A factory of contexts for the forward pass."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def scaler_for(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler that works for float16 and does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
