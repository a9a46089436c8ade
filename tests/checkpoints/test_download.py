"""Downloads against a local server that misbehaves in every way that real ones do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import io
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nearfield.checkpoints.lock as lock_module
import pytest
from nearfield.checkpoints import DownloadError, cache_dir
from nearfield.checkpoints.download import _SameOrSafer, download
from nearfield.checkpoints.lock import locked

CONTENT = hashlib.shake_256(b"weights").digest(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
FORK = multiprocessing.get_context("fork")


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what the tests are about."""


class Server:
    """A file server on a free port of this machine; ``answer`` decides what each request gets."""

    def __init__(self) -> None:
        self.ranges: list[str | None] = []
        self.answer: Callable[[BaseHTTPRequestHandler, int], None] = serve
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.ranges.append(self.headers.get("Range"))
                owner.answer(self, len(owner.ranges))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/file.pth"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def serve(
    request: BaseHTTPRequestHandler,
    count: int = 1,
    *,
    resume: bool = True,
    etag: str = '"v1"',
    content: bytes = CONTENT,
    cut: int | None = None,
    pause: float = 0.0,
) -> None:
    """Answer as a good server, with the given shortcomings."""
    wanted = request.headers.get("Range")
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and resume else 0
    if request.headers.get("If-Range") not in (None, etag):
        start = 0
    if start >= len(content):
        request.send_response(416)
        request.send_header("Content-Range", f"bytes */{len(content)}")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    body = content[start:]
    request.send_response(206 if start else 200)
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("Content-Length", str(len(body)))
    if etag:
        request.send_header("ETag", etag)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.end_headers()
    sent = body if cut is None else body[: max(cut - start, 0)]
    for begin in range(0, len(sent), 1 << 18):
        request.wfile.write(sent[begin : begin + (1 << 18)])
        time.sleep(pause)


def refuse(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler, int], None]:
    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file.pth"


def fetch(server: Server, destination: Path, **options: Any) -> Path:
    return download(server.url, destination, **{"offline": False, "timeout": 5.0, "backoff": 0.01, **options})


def folder(destination: Path) -> list[str]:
    return sorted(os.listdir(destination.parent))


def leave_part(destination: Path, content: bytes, version: str | None = None) -> None:
    destination.parent.mkdir(parents=True)
    destination.with_name("file.pth.part").write_bytes(content)
    if version:
        destination.with_name("file.pth.part.version").write_text(version)


def fails(server: Server, destination: Path, match: str, **options: Any) -> str:
    with pytest.raises(DownloadError, match=match) as error:
        fetch(server, destination, **options)
    assert "\n" not in str(error.value)
    assert not destination.exists()
    return str(error.value)


def test_a_file_is_fetched_once_and_nothing_else_stays(server: Server, destination: Path) -> None:
    assert fetch(server, destination, sha256=SHA256) == destination
    assert destination.read_bytes() == CONTENT
    assert folder(destination) == ["file.pth"]
    fetch(server, destination, sha256=SHA256.upper())
    assert server.ranges == [None]


def test_a_partial_file_is_resumed(server: Server, destination: Path) -> None:
    leave_part(destination, CONTENT[:HALF])
    fetch(server, destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]
    assert folder(destination) == ["file.pth"]


def test_a_server_that_ignores_ranges_restarts_cleanly(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, resume=False)
    leave_part(destination, b"x" * HALF)
    fetch(server, destination)
    assert destination.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, etag='"v2"')
    leave_part(destination, b"x" * HALF, version='"v1"')
    fetch(server, destination)
    assert destination.read_bytes() == CONTENT


def test_a_complete_partial_file_is_taken(server: Server, destination: Path) -> None:
    leave_part(destination, CONTENT)
    fetch(server, destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_a_partial_file_that_is_too_long_is_fetched_anew(server: Server, destination: Path) -> None:
    leave_part(destination, b"x" * (len(CONTENT) + 1))
    fetch(server, destination, retries=0)
    assert destination.read_bytes() == CONTENT


def test_another_range_than_asked_for_is_not_appended(server: Server, destination: Path) -> None:
    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        if count > 1:
            serve(request)
        else:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {HALF - 5}-{len(CONTENT) - 6}/{len(CONTENT)}")
            request.send_header("Content-Length", str(len(CONTENT) - HALF))
            request.end_headers()
            request.wfile.write(CONTENT[HALF - 5 : -5])

    server.answer = answer
    leave_part(destination, CONTENT[:HALF])
    fetch(server, destination)
    assert destination.read_bytes() == CONTENT


def test_a_dropped_connection_goes_on_where_it_broke(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, cut=count * 1_100_000)
    fetch(server, destination, retries=1)
    assert destination.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1100000-", "bytes=2200000-"]


def test_a_connection_that_always_drops_is_given_up_and_kept(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, cut=HALF)
    text = fails(server, destination, "the connection broke after", retries=2)
    assert str(destination) in text
    assert server.url in text
    assert folder(destination) == ["file.pth.part", "file.pth.part.version"]
    server.answer = serve
    fetch(server, destination, sha256=SHA256)
    assert server.ranges[-1] == f"bytes={HALF}-"
    assert folder(destination) == ["file.pth"]


def test_errors_that_pass_are_retried(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: (
        serve(request) if count > 2 else refuse((503, 429)[count - 1], Retry_After="0")(request, count)
    )
    fetch(server, destination)
    assert destination.read_bytes() == CONTENT
    assert len(server.ranges) == 3


def test_a_server_without_a_word_times_out(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: time.sleep(0.5)
    text = fails(server, destination, "connection failed", timeout=0.1, retries=1)
    assert "tried 2 times" in text


def test_a_closed_port_is_one_line(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(DownloadError, match="connection failed") as error:
        download(f"http://127.0.0.1:{port}/file.pth", destination, offline=False, retries=1, backoff=0.01)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_not_retried(server: Server, destination: Path, status: int) -> None:
    server.answer = refuse(status)
    text = fails(server, destination, f"answered {status}")
    assert str(destination) in text
    assert len(server.ranges) == 1
    assert folder(destination) == []


def test_a_web_page_is_not_taken_for_a_file(server: Server, destination: Path) -> None:
    server.answer = refuse(200, Content_Type="text/html; charset=utf-8", Content_Length="0")
    fails(server, destination, "web page")


def test_redirects_are_followed_but_not_to_other_schemes(server: Server, destination: Path, tmp_path: Path) -> None:
    server.answer = lambda request, count: (
        serve(request) if count > 1 else refuse(302, Location="/elsewhere.pth")(request, count)
    )
    fetch(server, destination)
    assert destination.read_bytes() == CONTENT
    (tmp_path / "secret").write_bytes(b"secret")
    server.answer = refuse(302, Location=(tmp_path / "secret").as_uri())
    fails(server, destination.with_name("other.pth"), "answered 302")


def test_a_redirect_from_https_to_http_is_refused() -> None:
    request = urllib.request.Request("https://example.org/file.pth")
    headers = http.client.HTTPMessage()
    with pytest.raises(DownloadError, match="insecure"):
        _SameOrSafer().redirect_request(request, io.BytesIO(), 302, "Found", headers, "http://example.org/file.pth")
    allowed = _SameOrSafer().redirect_request(request, io.BytesIO(), 302, "Found", headers, "https://example.org/x")
    assert allowed is not None
    assert allowed.full_url == "https://example.org/x"


def test_a_packed_answer_is_refused(server: Server, destination: Path) -> None:
    server.answer = refuse(200, Content_Encoding="gzip", Content_Length="0")
    fails(server, destination, "packed")


def test_a_malformed_url_is_not_retried(server: Server, destination: Path) -> None:
    with pytest.raises(DownloadError, match="not a valid URL"):
        download(server.url + "?a b", destination, offline=False)


# hashes


def test_a_wrong_hash_keeps_nothing_and_shows_both(server: Server, destination: Path) -> None:
    text = fails(server, destination, "not the published file", sha256="0" * 64)
    assert "0" * 64 in text
    assert SHA256 in text
    assert folder(destination) == []


def test_a_file_that_is_there_is_never_removed(server: Server, destination: Path) -> None:
    destination.parent.mkdir()
    destination.write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"is there, but not.*sha256 expected") as error:
        fetch(server, destination, sha256=SHA256)
    assert hashlib.sha256(b"mine").hexdigest() in str(error.value)
    assert destination.read_bytes() == b"mine"
    assert server.ranges == []


def test_a_bad_partial_file_is_fetched_anew_once(server: Server, destination: Path) -> None:
    leave_part(destination, b"x" * HALF)
    fetch(server, destination, sha256=SHA256)
    assert destination.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-", None]


# offline, other schemes, disks


@pytest.mark.parametrize("variable", ["NEARFIELD_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_takes_the_cache_or_says_what_to_put_where(
    server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("NEARFIELD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    text = fails(server, destination, "offline", offline=None)
    assert f"fetch {server.url} and put it at {destination}" in text
    destination.parent.mkdir()
    destination.write_bytes(CONTENT)
    assert fetch(server, destination, offline=None, sha256=SHA256) == destination
    assert server.ranges == []


def test_file_urls_are_copied(destination: Path, tmp_path: Path) -> None:
    source = tmp_path / "with space.pth"
    source.write_bytes(CONTENT)
    download(source.as_uri(), destination, sha256=SHA256, offline=True)
    assert destination.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="no such file"):
        download((tmp_path / "nothing").as_uri(), destination.with_name("other"))


@pytest.mark.parametrize("url", ["ftp://example.org/file.pth", "data:,x", "file.pth", "s3://bucket/file.pth"])
def test_other_schemes_are_refused(destination: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http, https and file"):
        download(url, destination, offline=False)


def test_a_folder_as_destination_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is a folder"):
        fetch(server, tmp_path)


def test_too_little_space_is_seen_before_writing(
    server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    text = fails(server, destination, r"3000000 bytes are needed .* 1000 are free")
    assert str(destination.parent) in text


@pytest.mark.parametrize(
    ("number", "match"), [(errno.ENOSPC, "is full"), (errno.EACCES, "may not be written"), (errno.EIO, "Input/output")]
)
def test_failing_disks_are_one_line_and_keep_the_part(
    server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch, number: int, match: str
) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    text = fails(server, destination, match)
    assert str(destination.parent) in text
    assert "file.pth.part" in folder(destination)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(server, destination, sha256=SHA256)


def test_a_folder_that_cannot_be_made_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be kept") as error:
        fetch(server, tmp_path / "file" / "deeper" / "file.pth")
    assert "\n" not in str(error.value)


def test_the_cache_is_torch_hubs_unless_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NEARFIELD_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("NEARFIELD_CACHE", "~/weights")
    assert cache_dir() == Path.home() / "weights"


# progress


def test_progress_is_reported(server: Server, destination: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch(server, destination, progress=lambda have, total: seen.append((have, total)))
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    with caplog.at_level(logging.INFO, logger="nearfield"):
        fetch(server, destination.with_name("other.pth"))
    assert "other.pth: 3.0 of 3.0 MB (100 %)" in caplog.text


# several processes


def child_download(url: str, destination: str, queue: Any) -> None:
    queue.put(str(download(url, destination, offline=False, sha256=SHA256)))


def test_two_processes_fetch_one_file_once(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, pause=0.05)
    queue = FORK.Queue()
    children = [FORK.Process(target=child_download, args=(server.url, str(destination), queue)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0, 0]
    assert {queue.get(timeout=5) for _ in children} == {str(destination)}
    assert server.ranges == [None]
    assert destination.read_bytes() == CONTENT
    assert folder(destination) == ["file.pth"]


def test_a_killed_process_leaves_neither_lock_nor_half_file(server: Server, destination: Path) -> None:
    server.answer = lambda request, count: serve(request, pause=0.2)
    child = FORK.Process(target=child_download, args=(server.url, str(destination), FORK.Queue()))
    child.start()
    part = destination.with_name("file.pth.part")
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    assert not destination.exists()
    assert 0 < part.stat().st_size < len(CONTENT)
    server.answer = serve
    fetch(server, destination, sha256=SHA256)
    resumed = server.ranges[1] or "bytes=0-"
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 0
    assert destination.read_bytes() == CONTENT
    assert folder(destination) == ["file.pth"]


@pytest.fixture(params=["flock", "exclusive"])
def lock_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "exclusive":
        monkeypatch.setattr(lock_module, "fcntl", None)
    return str(request.param)


@pytest.mark.usefixtures("lock_kind")
def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(5):
            with locked(path, progress=time.monotonic, patience=10):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1]
    assert not path.exists()


@pytest.mark.usefixtures("lock_kind")
def test_a_holder_without_progress_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        locked(path, progress=lambda: 0, patience=10),
        pytest.raises(DownloadError, match="no progress"),
        locked(path, progress=lambda: 0, patience=0.3),
    ):
        pass
    assert not path.exists()


def test_a_lock_that_was_left_behind_does_not_block(
    tmp_path: Path, lock_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_STALE", 0.3)
    path = tmp_path / "lock"
    path.touch()
    with locked(path, progress=lambda: 0, patience=10):
        assert path.exists()
    assert not path.exists()


def test_a_living_exclusive_lock_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "_BEAT", 0.05)
    monkeypatch.setattr(lock_module, "_STALE", 0.4)
    path = tmp_path / "lock"
    with (
        locked(path, progress=lambda: 0, patience=10),
        pytest.raises(DownloadError, match="no progress"),
        locked(path, progress=lambda: 0, patience=1.0),
    ):
        pass


def test_a_lock_file_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    calls: list[int] = []
    real = fcntl.flock

    def removed_by_its_last_holder(handle: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(handle)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_by_its_last_holder)
    with locked(path, progress=lambda: 0, patience=1):
        assert path.exists()
    assert len(calls) == 2


def test_file_systems_without_locks_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path = tmp_path / "lock"
    with locked(path, progress=lambda: 0, patience=1):
        assert path.exists()
    assert not path.exists()
