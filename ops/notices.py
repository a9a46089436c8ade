"""Notices that are worth saying once a process."""

from __future__ import annotations

import warnings
from functools import cache

__all__ = ["say_once"]


@cache
def say_once(notice: str, stacklevel: int = 2) -> None:
    """Warn with `notice`, unless it was said before. stacklevel: as of `warnings.warn`, 2 being the caller's line."""
    warnings.warn(notice, stacklevel=stacklevel)
