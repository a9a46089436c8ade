"""A lock beside a file, for processes that would write the same file."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from .errors import DownloadError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger("nearfield.checkpoints")

_POLL = 0.1
_BEAT = 5.0
_STALE = 30.0
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path, *, progress: Callable[[], object], patience: float) -> Iterator[None]:
    """Hold ``path`` as a lock file while the body runs; it is removed afterwards.

    Where the system has ``flock`` the kernel frees the lock of a process that died. Elsewhere the mere existence of the
    file is the lock: its holder touches it, and one that nobody touches any more is broken. Nobody waits for ever.

    Args:
        path: the lock file; its folder exists.
        progress: what the holder achieves, as any comparable value; the waiting goes on while it changes.
        patience: seconds without progress after which a waiter gives up.

    Raises:
        DownloadError: the holder lives but achieves nothing.
        OSError: the lock file cannot be made.
    """
    handle, beats = _acquire(path, progress, patience)
    stop = threading.Event()
    if beats:
        threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        # unlink first: a waiter that gets the lock then finds another file under this name and starts over
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, progress: Callable[[], object], patience: float) -> tuple[int, bool]:
    """An open handle of the held lock, and whether it must be kept alive by touching."""
    exclusive = fcntl is None
    moved, touched = _Watch(progress), _Watch(lambda: _touched(path))
    told = False
    while True:
        try:
            if exclusive:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileExistsError:
            handle = -1
        if handle >= 0:
            try:
                assert fcntl is not None
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno in _UNSUPPORTED:  # a network file system without locks
                    exclusive = True
                    with contextlib.suppress(OSError):
                        path.unlink()
                    continue
                if not isinstance(error, BlockingIOError):
                    raise
            else:
                if _same_file(handle, path):
                    return handle, False
                os.close(handle)
                continue
        if exclusive and touched.still() > _STALE:
            _log.warning("breaking the stale lock %s", path)
            with contextlib.suppress(OSError):
                path.unlink()
            touched = _Watch(lambda: _touched(path))
        if moved.still() > patience:
            raise DownloadError(
                f"another process holds {path} and has made no progress for {patience:.0f} s: end it, then try again"
            )
        if not told:
            told = True
            _log.info("waiting for the process that holds %s", path)
        time.sleep(_POLL)


class _Watch:
    """For how long a value has not changed."""

    def __init__(self, value: Callable[[], object]) -> None:
        self.value = value
        self.seen = value()
        self.since = time.monotonic()

    def still(self) -> float:
        """Seconds since the last change that was seen."""
        now = self.value()
        if now != self.seen:
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() - self.since


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
