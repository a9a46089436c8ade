"""Published checkpoints: what exists, how to fetch it, how to read it, how to bring its keys into our layout."""

from __future__ import annotations

from .download import cache_dir
from .errors import CheckpointError, CheckpointMismatch, DownloadError, UnsafeCheckpoint
from .index import Entry, entries, find
from .layouts import COUNTER, FlippedTable, Layout, Rule, Transform, convert, describe_mismatch
from .load import read, read_metadata, resolve, save, save_torch
from .wrappers import unwrap

__all__ = [
    "COUNTER",
    "CheckpointError",
    "CheckpointMismatch",
    "DownloadError",
    "Entry",
    "FlippedTable",
    "Layout",
    "Rule",
    "Transform",
    "UnsafeCheckpoint",
    "cache_dir",
    "convert",
    "describe_mismatch",
    "entries",
    "find",
    "read",
    "read_metadata",
    "resolve",
    "save",
    "save_torch",
    "unwrap",
]
