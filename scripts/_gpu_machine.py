"""What the figures of a GPU report depend on besides its code: device, driver, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KIND = "nearfield gpu report"  # what such a file says that it is


def device(kind: str) -> dict[str, Any]:
    """Of "cuda", the current device; or of "cpu".

    Raises:
        ValueError: there is no CUDA device.
    """
    import torch

    if kind == "cpu":
        return {"name": "cpu", "driver": None, "processors": os.cpu_count(), "before": None, "after": None}
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is there: run it on a machine with one, or take --device cpu for a dry run")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    before = driver()
    return {
        "name": properties.name,
        "driver": before["driver_version"] if before else None,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "before": before,
        "after": None,
    }


_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def driver() -> dict[str, str] | None:
    """What nvidia-smi says of driver, clocks (MHz), power (W) and temperature; None where it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(_FIELDS, values, strict=True)) if len(values) == len(_FIELDS) else None


def versions() -> dict[str, str | None]:
    """Of Python and the packages that matter; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "timm", "nearfield", "numpy", "natten"):
        found[name] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> dict[str, Any]:
    """Hash of the checkout and whether files differ from it; "unknown" where git does not say."""
    try:
        hash_, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"hash": "unknown", "dirty": None}
    return {"hash": hash_.strip(), "dirty": bool(changes.strip())}
