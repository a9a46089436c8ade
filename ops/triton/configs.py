"""Launch configurations: a shipped table, overlaid by what `scripts/tune.py` measured on this machine.

Looked up, never searched for, at a call: the same inputs take the same kernel every time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["Config", "architecture", "cache_file", "choose", "precision_name"]


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        block_m, block_n: resident and streamed tokens of a tile.
        num_warps, num_stages: Triton's options.
        run: tiles or images that one program takes after each other.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    run: int


def cache_file() -> Path:
    """The table that `scripts/tune.py` writes: NEARFIELD_TUNED, or tuned.json in the user's cache folder."""
    named = os.environ.get("NEARFIELD_TUNED")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearfield" / "tuned.json"


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" on AMD, "cpu" in the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def precision_name(dtype: torch.dtype) -> str:
    """Dtypes that are launched alike share a name: "half" or "float"."""
    return "float" if dtype == torch.float32 else "half"


@lru_cache(maxsize=2)
def _table(tuned: Path | None) -> dict[str, Config]:
    shipped = json.loads((Path(__file__).parent / "configs.json").read_text(encoding="utf-8"))
    rows = dict(shipped["configs"])
    if tuned is not None:
        rows |= json.loads(tuned.read_text(encoding="utf-8"))["configs"]
    return {key: Config(*values) for key, values in rows.items()}


@lru_cache(maxsize=1024)
def choose(op: str, arch: str, precision: str, block_d: int, family: str) -> Config:
    """Configuration of a kernel: the row of this architecture, else the row of any architecture ("*").

    Args:
        op: "window.forward", "neighborhood.query" and so on. block_d: head_dim rounded up to a power of two.
        family: what kind of tiles: "plane", "curve", "region", or "cell" with its slots, as in "cell64".
    """
    tuned = cache_file()
    table = _table(tuned if tuned.is_file() else None)
    for place in (arch, "*"):
        found = table.get(f"{op} {place} {precision} {block_d} {family}")
        if found is not None:
            return found
    raise ValueError(f"no launch configuration for {op} {arch} {precision} {block_d} {family}")
