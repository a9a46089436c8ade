"""What can go wrong with a checkpoint. Every message is one line: what, where, what to do."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used: file missing, damaged, of another kind, or unknown by that name."""


class CheckpointMismatch(CheckpointError):  # noqa: N818 (names of the public API)
    """The file is sound, but its keys or shapes do not fit the model."""


class DownloadError(CheckpointError):
    """A published file could not be fetched; the message says where to put it by hand."""


class UnsafeCheckpoint(CheckpointError):  # noqa: N818 (names of the public API)
    """The file holds pickled Python objects that only arbitrary code execution would restore."""
