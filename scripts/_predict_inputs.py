"""Which pictures were asked for: files, folders, patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from nearfield.engine.dense.pairs import ENDINGS


def gather(arguments: Iterable[str]) -> tuple[list[Path], dict[str, str]]:
    """The files in the order of the arguments, each once; and what is wrong with an argument, by the argument.

    A folder stands for the pictures in and below it (by their endings, hidden ones left out), a pattern such as
    `photos/**/*.jpg` for the files that match it. A name that exists is never a pattern.
    """
    found: dict[Path, None] = {}
    wrong: dict[str, str] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_picture(file.relative_to(path)) and file.is_file()]
            if not files:
                wrong[argument] = f"{argument}: no picture in this folder ({', '.join(ENDINGS)})"
        elif path.exists() or not glob.has_magic(argument):
            files = [path]  # one that is not there is said by whoever opens it
        else:
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not Path(name).is_dir()]
            if not files:
                wrong[argument] = f"{argument}: no file matches this pattern"
        found.update(dict.fromkeys(files))
    return list(found), wrong


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not any(part.startswith(".") for part in path.parts)
