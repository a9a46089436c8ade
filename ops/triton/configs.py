"""Launch configurations: a shipped table, overlaid by what `scripts/tune.py` measured on this machine.

Looked up, never searched for, at a call: the same inputs take the same kernel every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..cache import SCHEDULES
from .schedule import SLOT_UNIT

__all__ = [
    "SHIPPED",
    "Config",
    "architecture",
    "cache_file",
    "choose",
    "known",
    "override",
    "precision_name",
    "read_table",
]

SHIPPED = Path(__file__).parent / "configs.json"


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


def read_table(file: Path) -> dict[str, Config]:
    """Rows of a table: {"configs": {"OP ARCH PRECISION BLOCK_D FAMILY": [the fields of a Config]}}.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["configs"].items()
        if wrong := next((key for key, row in rows if not _usable(key, row)), None):
            raise ValueError(f"no kernel takes the row {wrong!r}")
        return {key: Config(*row) for key, row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no table of launch configurations ({type(error).__name__}: {error}): "
            "delete it, and write it anew by python scripts/tune.py"
        ) from error


def _usable(key: str, row: list[int]) -> bool:
    """Whether a row has its five fields, and blocks that kernels take: others would read beyond their slots."""
    if len(key.split()) != 5 or len(row) != 5 or not all(type(n) is int and n > 0 for n in row):
        return False
    if any(n & (n - 1) for n in row[:3]):
        return False
    return not key.startswith("neighborhood.") or SLOT_UNIT % row[1] == 0


@lru_cache(maxsize=2)
def _table(tuned: Path | None) -> dict[str, Config]:
    return read_table(SHIPPED) | (read_table(tuned) if tuned is not None else {})


_overlay: dict[str, Config] = {}


@contextmanager
def override(rows: Mapping[str, Config]) -> Iterator[None]:
    """Inside the block these rows go before those of both tables, in all threads; for measurements."""
    before = dict(_overlay)
    _overlay.update(rows)
    _forget()
    try:
        yield
    finally:
        _overlay.clear()
        _overlay.update(before)
        _forget()


def _forget() -> None:
    choose.cache_clear()
    known.cache_clear()
    _table.cache_clear()
    SCHEDULES.clear()  # what calls were made ready for is kept there


@lru_cache(maxsize=1024)
def known(op: str, arch: str, precision: str, block_d: int, family: str) -> bool:
    """Whether there is a row that `choose` would find."""
    return _find(op, arch, precision, block_d, family) is not None


def _find(op: str, arch: str, precision: str, block_d: int, family: str) -> Config | None:
    tuned = cache_file()
    table = _table(tuned if tuned.is_file() else None) | _overlay
    rows = (table.get(f"{op} {place} {precision} {block_d} {family}") for place in (arch, "*"))
    return next((row for row in rows if row is not None), None)


@lru_cache(maxsize=1024)
def choose(op: str, arch: str, precision: str, block_d: int, family: str) -> Config:
    """Configuration of a kernel: the row of this architecture, else the row of any architecture ("*").

    Args:
        op: "window.forward", "neighborhood.query" and so on. block_d: head_dim rounded up to a power of two.
        family: what kind of tiles: "plane", "curve", "lookup" (see `Site.families`), or "cell" or "region" with its
            slots, as in "cell64".

    Raises:
        ValueError: there is no such row, or the tuned table is damaged.
    """
    found = _find(op, arch, precision, block_d, family)
    if found is not None:
        return found
    raise ValueError(f"no launch configuration for {op} {arch} {precision} {block_d} {family}")
