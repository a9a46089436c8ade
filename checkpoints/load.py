"""Weight files on disk: find them by any name a user may give, read them without running their code, write them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import secrets
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import index
from .download import cache_dir as default_cache_dir
from .download import download
from .errors import CheckpointError, DownloadError, UnsafeCheckpoint
from .hub import hub_download, is_hub
from .wrappers import unwrap

_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".safetensors")
_EXPECTED = "a checkpoint is a file of torch.save (.pth, .pt, .bin, .ckpt) or safetensors"
_DAMAGED = "is damaged or incomplete: fetch or write it again"
_CHUNK = 1 << 20
# what trainers keep beside the weights: best scores (mmcv), palettes, mmengine's record of losses
_DROPPED = (
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


def read(path: str | os.PathLike[str], *, ema: bool = False, backbone: bool = True) -> dict[str, Tensor]:
    """Read a state dict from a ``torch.save`` or safetensors file, on the CPU, without running code from it.

    The format is told by the content, not by the name. Wrappers and prefixes are taken off (``unwrap``, which explains
    ``ema`` and ``backbone``).

    Raises:
        UnsafeCheckpoint: only unpickling arbitrary objects would read it.
        CheckpointError: no such file, a folder, an empty or damaged file, another format, or no tensors inside.
    """
    path = Path(path)
    if path.is_dir():
        raise _folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if not start:
        raise CheckpointError(f"{path} is empty: fetch or write it again")
    if _is_safetensors(start) or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
        obj: object = _read_safetensors(path)
    elif start.startswith(b"PK"):
        _check_archive(path)
        obj = _read_torch(path)
    elif start[:2] == b"\x80\x02":
        obj = _read_torch(path)
    else:
        raise _not_a_checkpoint(path, start)
    try:
        return unwrap(obj, ema=ema, backbone=backbone)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _is_safetensors(start: bytes) -> bool:
    # eight bytes of little-endian header length, then a JSON object
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def _not_a_checkpoint(path: Path, start: bytes) -> CheckpointError:
    if start[:1] == b"\x80" and start[1:2] in (b"\x03", b"\x04", b"\x05"):
        return UnsafeCheckpoint(f"{path} is a Python pickle, which may run any code: re-save its weights by torch.save")
    if start.lstrip()[:1] == b"<":
        found = "a web page"
    elif start.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer (git lfs pull fetches the file)"
    elif start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z")) or start[257:262] == b"ustar":
        found = "a packed archive (unpack it)"
    elif path.suffix in _SUFFIXES:
        found = "something else, or a damaged file"
    else:
        found = f"a {path.suffix} file" if path.suffix else "something else"
    return CheckpointError(f"{path} is not a checkpoint but {found}; {_EXPECTED}")


def _check_archive(path: Path) -> None:
    """What torch.load does not check: that the archive is torch's, complete, and as its checksums say."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for record in archive.infolist():
                if record.CRC:  # zero when it was written with checksums switched off
                    with archive.open(record) as stream:
                        while stream.read(_CHUNK):
                            pass
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path} {_DAMAGED} ({_line(error)})") from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive ({', '.join(names[:3])}), not a checkpoint; {_EXPECTED}")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnsafeCheckpoint(f"{path} is a TorchScript program: save the state_dict() of its module instead")


def _read_torch(path: Path) -> object:
    try:
        # timm and BiFormer keep their command line in the file
        known: list[Any] = [argparse.Namespace, *((_Dropped, name) for name in _DROPPED)]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        named = re.search(r"GLOBAL ([\w.]+)", text)
        if named or "nsupported class" in text or "not an allowed" in text or "llowlist" in text:
            what = f" ({named[1]})" if named else ""
            raise UnsafeCheckpoint(
                f"{path} holds Python objects{what} that only running code from the file would restore: "
                "if you trust it, load it yourself and save its state dict alone"
            ) from None
        raise CheckpointError(f"{path} {_DAMAGED} (its pickle stream is broken)") from None
    except Exception as error:  # torch.load raises nearly anything on broken input
        raise CheckpointError(f"{path} {_DAMAGED} ({_line(error)})") from None


class _Dropped:
    """Stands for an object that is not restored; only tensors are wanted of a file."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} {_DAMAGED} ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def save(state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a state dict as safetensors, all of it or nothing.

    The file is written beside its destination, flushed to disk, then renamed, so a reader never sees half of it and a
    crash leaves the old one. Tensors that share memory are written apart.

    Args:
        state: tensors by key, on any device.
        path: destination, ends in ``.safetensors``; its folder is made when it does not exist.
        metadata: strings to keep in the header.

    Raises:
        CheckpointError: another suffix, nothing to write, a value that is no tensor or string, no space, no permission.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors")
    if not state:
        raise CheckpointError(f"{path}: there is nothing to save, the state dict is empty")
    wrong = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong} is of type {type(state[wrong]).__name__}, only tensors can be saved")
    if metadata is not None and not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError(f"{path}: metadata must map strings to strings")
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    write_whole(path, lambda part: save_file(tensors, part, {"format": "pt", **(metadata or {})}))
    return path


def save_torch(state: Mapping[str, Tensor], path: str | os.PathLike[str], under: str | None = None) -> Path:
    """Write a state dict by ``torch.save``, all of it or nothing, for programs that read nothing else.

    Args:
        state: tensors by key, on any device.
        path: destination; its folder is made when it does not exist.
        under: a key that holds the state dict in the file (``model``, ``state_dict``); None for a plain one.

    Raises:
        CheckpointError: nothing to write, no space, no permission.
    """
    path = Path(path)
    if not state:
        raise CheckpointError(f"{path}: there is nothing to save, the state dict is empty")
    # copies: a view would take all of its storage into the file
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_whole(path, lambda part: torch.save({under: tensors} if under else tensors, part))
    return path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place in one step."""
    from safetensors import SafetensorError

    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:  # for the permissions that a new file of this user has
            mode = os.fstat(file.fileno()).st_mode & 0o777
        write(part)
        part.chmod(mode)
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that ``save`` put into the header of a safetensors file; CheckpointError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} has no readable safetensors header ({_line(error)})") from None


def _flush(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def resolve(
    source: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None, offline: bool | None = None
) -> Path:
    """The local file that ``source`` means, fetched into the cache when it is not there yet.

    Args:
        source: a path; a URL (https, http, file); ``hf-hub:owner/name[@revision]``; or, from the index, a file name, a
            model (its default tag) or ``model.tag``. A file that exists wins over the index.
        cache_dir: where downloads are kept; default ``$NEARFIELD_CACHE`` or torch.hub's folder, and the Hugging Face
            cache for its hub.
        offline: use the cache only; default from ``NEARFIELD_OFFLINE`` or ``HF_HUB_OFFLINE``.

    Raises:
        CheckpointError: nothing is called that; the message lists what is called similarly.
        DownloadError: it is not in the cache and cannot be fetched.
    """
    text = os.fspath(source)
    if not text:
        raise CheckpointError("the name of the checkpoint is empty: give a path, a URL, or a model name")
    if is_hub(text):
        return hub_download(text, cache_dir=cache_dir, offline=offline)
    if "://" in text:
        return _resolve_url(text, cache_dir, offline)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    entry = index.find(text) if isinstance(source, str) and "/" not in text and "\\" not in text else None
    if entry is not None:
        return _resolve_entry(entry, cache_dir, offline)
    if path.is_dir():
        raise _folder(path)
    near = index.near_matches(text)
    hint = f"similar: {', '.join(near)}" if near else "nothing published has a similar name"
    raise CheckpointError(f"{text!r} is neither a file nor a published checkpoint; {hint}")


def _folder(path: Path) -> CheckpointError:
    inside = sorted(item.name for item in path.iterdir() if item.suffix in _SUFFIXES)
    hint = f"name one of its files: {', '.join(inside[:5])}" if inside else "there is no checkpoint file in it"
    return CheckpointError(f"{path} is a folder; {hint}")


def _resolve_entry(entry: index.Entry, cache_dir: str | os.PathLike[str] | None, offline: bool | None) -> Path:
    if entry.hub:
        return hub_download(entry.hub, entry.file, cache_dir=cache_dir, offline=offline)
    assert entry.url is not None, entry.name
    destination = Path(cache_dir or default_cache_dir()).expanduser() / entry.file
    try:
        return download(entry.url, destination, sha256=entry.sha256, offline=offline)
    except DownloadError as error:
        if entry.page is None:
            raise
        raise DownloadError(f"{error}; in a browser it is at {entry.page}") from None


def _resolve_url(url: str, cache_dir: str | os.PathLike[str] | None, offline: bool | None) -> Path:
    entry = index.find(url)
    if entry is not None:
        return _resolve_entry(entry, cache_dir, offline)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise CheckpointError(f"{url}: {path} does not exist")
        return path
    name = urllib.parse.unquote(parts.path).rsplit("/", 1)[-1]
    if not name or name in (".", ".."):
        raise CheckpointError(f"{url} does not end in a file name")
    # Many strangers call their file model.pth: each URL has a folder of its own.
    folder = Path(cache_dir or default_cache_dir()).expanduser() / hashlib.sha256(url.encode()).hexdigest()[:12]
    return download(url, folder / name, offline=offline)
