"""Errors that are the user's to mend: one line saying what, where and what to do, and the exit code of each kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OK = 0
FAILED = 1
INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend. The message is one line; `exit_code` is what the doors leave with."""

    exit_code = FAILED

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands its exception over as text with the worker's traceback around it.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].split(": ", 1)[-1]
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A key, value or override that is not allowed."""

    exit_code = 2


class DataError(UserError):
    """A folder, file or class that is missing, empty or broken."""

    exit_code = 3


class CheckpointMismatchError(UserError):
    """A checkpoint that is missing, unreadable or belongs to another model."""

    exit_code = 4


class DeviceError(UserError):
    """A device, kernel or compiler that is not available here, or whose memory is full."""

    exit_code = 5


class DivergedError(UserError):
    """The loss or the gradients stopped being finite."""

    exit_code = FAILED


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved what it had. No Exception: a sweep stops too."""


def nearest(word: str, words: Iterable[str], *, count: int = 3) -> str:
    """` (did you mean 'a', 'b'?)` with the entries of `words` nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=count, cutoff=0.5)
    return f" (did you mean {', '.join(repr(c) for c in close)}?)" if close else ""


def listing(words: Iterable[object], *, limit: int = 12) -> str:
    """The words joined by commas, cut after `limit`."""
    texts = [str(word) for word in words]
    rest = f", ... ({len(texts) - limit} more)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
