"""Files of the Hugging Face hub, through its own client and in its own cache, where timm finds them too."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from .download import is_offline
from .errors import CheckpointError, DownloadError

_PREFIXES = ("hf-hub:", "hf_hub:")
_FILES = ("model.safetensors", "pytorch_model.bin")


def is_hub(text: str) -> bool:
    """Whether ``text`` is spelled ``hf-hub:owner/name``."""
    return text.startswith(_PREFIXES)


def hub_download(
    repo: str,
    file: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> Path:
    """Fetch a file of a hub repository unless it is cached, and return its path.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``, with or without ``hf-hub:`` before it.
        file: its name there; default the first of model.safetensors and pytorch_model.bin that exists.
        cache_dir: another cache than the hub's.
        offline: use the cache only; default from ``NEARFIELD_OFFLINE`` or ``HF_HUB_OFFLINE``.

    Raises:
        DownloadError: not in the cache while offline, no such repository or file, or no connection.
    """
    from huggingface_hub import hf_hub_download  # slow to import, and only needed here
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repo, name, revision = _parts(repo)
    only_local = is_offline(offline)
    wanted = (file,) if file else _FILES
    for candidate in wanted:
        try:
            found = hf_hub_download(
                name,
                candidate,
                revision=revision or None,
                cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
                local_files_only=only_local,
            )
            return Path(found)
        except LocalEntryNotFoundError as error:
            if not only_local:
                raise _failed(repo, error) from None
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client lets the errors of its HTTP library through
            raise _failed(repo, error) from None
    if only_local:
        raise DownloadError(
            f"hf-hub:{repo} is not in the cache and this is offline (NEARFIELD_OFFLINE, HF_HUB_OFFLINE): fetch "
            f"{' or '.join(wanted)} from https://huggingface.co/{name} and give its path instead"
        )
    raise DownloadError(f"hf-hub:{repo} has no {' or '.join(wanted)}")


def hub_upload(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str,
    keep: Collection[str] = (),
) -> str:
    """Upload the files of a folder in one commit, and return the address of the repository.

    Args:
        folder: on this machine, without folders in it.
        repo: ``owner/name`` or ``owner/name@branch``, with or without ``hf-hub:`` before it; made when there is none.
        token: default the one that the hub's client keeps.
        private: whether a new repository is.
        revision: branch, made when there is none; default the one of ``repo``, else the main one.
        message: of the commit.
        keep: files that stay as they are where the repository has them.

    Raises:
        CheckpointError: offline, not allowed, or no connection.
    """
    repo, name, branch = _parts(repo)
    revision = revision or branch or None
    if is_offline():
        raise CheckpointError(f"hf-hub:{repo} cannot be written: this is offline (NEARFIELD_OFFLINE, HF_HUB_OFFLINE)")
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        address = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = [file for file in keep if api.file_exists(name, file, revision=revision)]
        api.upload_folder(
            repo_id=name,
            folder_path=Path(folder),
            revision=revision,
            commit_message=message,
            ignore_patterns=there or None,
        )
    except Exception as error:  # as above
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"hf-hub:{repo} cannot be written: {text}") from None
    return str(address)


def _parts(repo: str) -> tuple[str, str, str]:
    """``owner/name@revision``, ``owner/name`` and the revision, which may be empty."""
    if is_hub(repo):
        repo = repo.split(":", 1)[1]
    name, _, revision = repo.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DownloadError(f"hf-hub:{repo} names no repository, expected hf-hub:owner/name[@revision]")
    return repo, name, revision


def _failed(repo: str, error: Exception) -> DownloadError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return DownloadError(f"hf-hub:{repo} cannot be fetched: {text}")
