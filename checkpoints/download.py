"""Fetching published files: resumed, verified, atomic, and never by two processes at once."""

from __future__ import annotations

import email.message
import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from .._version import __version__
from .errors import DownloadError
from .lock import locked

_log = logging.getLogger("nearfield.checkpoints")

Progress = Callable[[int, int | None], None]

_CHUNK = 1 << 20
_TRUE = ("1", "on", "yes", "true")
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0


def cache_dir() -> Path:
    """Where downloads are kept: ``$NEARFIELD_CACHE``, or torch.hub's folder, where timm puts files of the same name."""
    chosen = os.environ.get("NEARFIELD_CACHE")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def is_offline(offline: bool | None = None) -> bool:
    """``offline`` if given, else what ``NEARFIELD_OFFLINE`` or ``HF_HUB_OFFLINE`` say."""
    if offline is not None:
        return offline
    return any(os.environ.get(name, "").lower() in _TRUE for name in ("NEARFIELD_OFFLINE", "HF_HUB_OFFLINE"))


def download(
    url: str,
    destination: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    offline: bool | None = None,
    timeout: float = 30.0,
    retries: int = 4,
    backoff: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Fetch ``url`` into the file ``destination`` unless it is there, and return its path.

    Bytes go to ``destination.part``, which a later call resumes; a complete, verified file is renamed in one step. A
    file that is there is never replaced or removed.

    Args:
        url: http, https or file.
        destination: the file; its folder is made.
        sha256: expected hash of the file, in hex.
        offline: use what is there, or fail; default from ``NEARFIELD_OFFLINE`` or ``HF_HUB_OFFLINE``.
        timeout: seconds without a byte after which a connection counts as dead.
        retries: how often to go on after a failure that may pass; a failure after progress does not count.
        backoff: seconds before the first retry; they double, up to 30.
        progress: called with the bytes there and the total (None when unknown); default: lines in the log.

    Raises:
        DownloadError: one line with the reason, the URL and the place where the file can be put by hand.
    """
    destination = Path(destination)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise DownloadError(f"{url}: only http, https and file URLs can be fetched")
    if destination.is_dir():
        raise DownloadError(f"{destination} is a folder, expected the path of a file")
    try:
        if destination.exists():
            _verify(
                destination, sha256, f"{destination} is there, but not the published file: remove it to fetch {url}"
            )
            return destination
    except OSError as error:
        raise DownloadError(f"{destination} cannot be read: {error.strerror or error}") from None
    if is_offline(offline) and parts.scheme != "file":
        raise DownloadError(
            f"{destination.name} is not in the cache and this is offline (NEARFIELD_OFFLINE, HF_HUB_OFFLINE): "
            f"fetch {url} and put it at {destination}"
        )
    part = destination.with_name(destination.name + ".part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = destination.with_name(destination.name + ".lock")
        # the longest that a live holder may go without a byte
        patience = (retries + 1) * (timeout + _LONGEST_WAIT)
        with locked(lock, progress=lambda: _size(part), patience=patience):
            if not destination.exists():
                fetch = _Fetch(url, destination, part, timeout, retries, backoff, progress or _Logged(destination.name))
                fetch.run(sha256)
                os.replace(part, destination)
                return destination
    except OSError as error:
        raise _local_failure(error, url, destination) from None
    _verify(destination, sha256, f"{destination} was put there meanwhile, but is not the published file")
    return destination


class _Retry(Exception):  # noqa: N818 (a signal, not an error that leaves this module)
    """This attempt failed in a way that may pass; ``anew`` when the partial file was the cause and is gone."""

    def __init__(self, reason: str, *, wait: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.anew = anew


class _Fetch:
    """One download into a ``.part`` file, over as many connections as it takes."""

    def __init__(
        self,
        url: str,
        destination: Path,
        part: Path,
        timeout: float,
        retries: int,
        backoff: float,
        progress: Progress,
    ) -> None:
        self.url = url
        self.destination = destination
        self.part = part
        # what the server called the version that the part belongs to
        self.version = part.with_name(part.name + ".version")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.progress = progress

    def run(self, sha256: str | None) -> None:
        """Complete the part file and verify it; a part of an earlier process that proves bad is fetched anew, once."""
        resumed = _size(self.part) > 0
        self._complete()
        if resumed and sha256 is not None and _sha256(self.part) != sha256.lower():
            _log.warning("%s: what an earlier download left does not fit, starting over", self.destination.name)
            self._forget()
            self._complete()
        try:
            _verify(self.part, sha256, f"{self.url} is not the published file; nothing was kept")
        except DownloadError:
            self._forget()
            raise
        self.version.unlink(missing_ok=True)
        _flush(self.part)

    def _complete(self) -> None:
        failures = 0
        anew = False
        best = _size(self.part)
        while True:
            try:
                return self._attempt()
            except _Retry as error:
                if error.anew and not anew:
                    _log.info("%s: %s", self.destination.name, error)
                    anew = True
                    continue
                if _size(self.part) >= best + _CHUNK:
                    best, failures = _size(self.part), 0
                failures += 1
                if failures > self.retries:
                    raise self._error(f"{error} (tried {failures} times; what came is kept and resumed)") from None
                wait = min(max(self.backoff * 2 ** (failures - 1), error.wait), _LONGEST_WAIT)
                _log.warning("%s: %s; again in %.1f s", self.destination.name, error, wait)
                time.sleep(wait)

    def _attempt(self) -> None:
        have = _size(self.part)
        request = urllib.request.Request(
            self.url, headers={"User-Agent": f"nearfield/{__version__}", "Accept-Encoding": "identity"}
        )
        if have:
            request.add_header("Range", f"bytes={have}-")
            if (version := _text(self.version)) is not None:
                request.add_header("If-Range", version)
        try:
            with _opener().open(request, timeout=self.timeout) as response:
                self._receive(response, have)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, have)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, http.client.InvalidURL):
                raise self._error("this is not a valid URL") from None
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise self._error(f"the server's certificate is not valid ({cause.verify_message})") from None
            if isinstance(cause, FileNotFoundError):
                raise self._error("there is no such file") from None
            raise _Retry(f"the connection failed ({_line(cause)})") from None

    def _refused(self, error: urllib.error.HTTPError, have: int) -> None:
        if error.code == 416 and have:
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if whole and int(whole[1]) == have:
                return
            self._forget()
            raise _Retry("the server cannot continue the partial file; starting over", anew=True)
        if error.code in _RETRIED:
            after = error.headers.get("Retry-After") or ""
            wait = float(after) if after.isdigit() else 0.0
            raise _Retry(f"the server answered {error.code} {error.reason}", wait=wait)
        dead = " (the link may be dead)" if error.code in (404, 410) else ""
        raise self._error(f"the server answered {error.code} {error.reason}{dead}")

    def _receive(self, response: IO[bytes], have: int) -> None:
        headers: email.message.Message = response.headers  # type: ignore[attr-defined]
        if headers.get_content_type() == "text/html" and not self.destination.suffix.startswith(".htm"):
            raise self._error("the server sent a web page instead of the file")
        if (headers.get("Content-Encoding") or "identity") != "identity":
            raise self._error(f"the server sends it packed ({headers['Content-Encoding']}), though asked not to")
        length = headers.get("Content-Length") or ""
        total = int(length) if length.isdigit() else None
        if getattr(response, "status", 200) == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range") or "")
            if span is None or int(span[1]) != have:
                self._forget()
                raise _Retry("the server sent another part than the one asked for; starting over", anew=True)
            total = int(span[2]) if span[2].isdigit() else None if total is None else have + total
        elif have:
            _log.info("%s: the server does not resume, starting over", self.destination.name)
            have = 0
        self._remember(headers)
        if total is not None and shutil.disk_usage(self.part.parent).free < total - have:
            free = shutil.disk_usage(self.part.parent).free
            raise self._error(f"{total - have} bytes are needed in {self.part.parent}, {free} are free")
        with self.part.open("ab" if have else "wb") as file:
            self.progress(have, total)
            while True:
                try:
                    block = response.read(_CHUNK)
                except (http.client.HTTPException, OSError) as error:
                    raise _Retry(f"the connection broke after {have} bytes ({_line(error)})") from None
                if not block:
                    break
                file.write(block)
                have += len(block)
                self.progress(have, total)
        if total is not None and have < total:
            raise _Retry(f"the connection broke after {have} of {total} bytes")
        if total is not None and have > total:
            self._forget()
            raise _Retry(f"{have} bytes came of a file of {total}; starting over", anew=True)

    def _remember(self, headers: email.message.Message) -> None:
        tag = headers.get("ETag") or ""
        version = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
        if version:
            self.version.write_text(version, encoding="utf-8")
        else:
            self.version.unlink(missing_ok=True)

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)

    def _error(self, reason: str) -> DownloadError:
        return DownloadError(f"{self.url}: {reason}; the file can be put by hand at {self.destination}")


class _SameOrSafer(urllib.request.HTTPRedirectHandler):
    """Follows redirects, except from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """As the base class does; a redirect to plain http from https is an error."""
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise DownloadError(f"{req.full_url}: the server redirects to an insecure address ({newurl})")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # build_opener would add ftp and data
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.FileHandler(),
        urllib.request.UnknownHandler(),
        _SameOrSafer(),
    ):
        opener.add_handler(handler)
    return opener


class _Logged:
    """Progress as lines in the log: at the start, then at most every five seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.last = -float("inf")

    def __call__(self, have: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < 5.0 and have != total:
            return
        self.last = now
        share = f" of {total / 1e6:.1f} MB ({100 * have / max(total, 1):.0f} %)" if total is not None else " MB"
        _log.info("%s: %.1f%s", self.name, have / 1e6, share)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _verify(path: Path, sha256: str | None, what: str) -> None:
    if sha256 is None:
        return
    actual = _sha256(path)
    if actual != sha256.lower():
        raise DownloadError(f"{what} (sha256 expected {sha256.lower()}, actual {actual})")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _local_failure(error: OSError, url: str, destination: Path) -> DownloadError:
    folder = destination.parent
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        reason = f"the disk of {folder} is full: free some space, or set NEARFIELD_CACHE to another folder"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"{folder} may not be written to: set NEARFIELD_CACHE to a folder of yours"
    else:
        reason = f"{error.filename or folder}: {error.strerror or error}"
    return DownloadError(f"{url} cannot be kept: {reason}")


def _line(error: object) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
