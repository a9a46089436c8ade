"""Which pictures were asked for: files, folders, patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from _predict_tasks import SUFFIXES
from nearfield.engine.dense.pairs import ENDINGS

RESULTS = "results.json"  # beside the pictures that were written


def gather(arguments: Iterable[str], output: Path) -> tuple[list[Path], dict[str, str], int]:
    """The files in the order of the arguments, each once; what is wrong, by the argument; and how many were left out.

    A folder stands for the pictures in and below it (by their endings, hidden ones left out), a pattern such as
    `photos/**/*.jpg` for the files that match it. Both leave out what this command wrote, to `output` or to another
    folder. A name that exists is never a pattern.
    """
    found: dict[Path, None] = {}
    wrong: dict[str, str] = {}
    left_out: set[Path] = set()
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_picture(file.relative_to(path)) and file.is_file()]
            nothing = f"{argument}: no picture in this folder ({', '.join(ENDINGS)})"
        elif path.exists() or not glob.has_magic(argument):
            found[path] = None  # one that is not there is said by whoever opens it
            continue
        else:
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not Path(name).is_dir()]
            nothing = f"{argument}: no file matches this pattern"
        written = {file for file in files if _is_result(file, output)}
        if len(written) == len(files):
            wrong[argument] = nothing + (" but results of this command" if written else "")
        left_out |= written
        found.update(dict.fromkeys(file for file in files if file not in written))
    return list(found), wrong, len(left_out)


def _is_result(path: Path, output: Path) -> bool:
    if not path.name.endswith(tuple(f".{suffix}.png" for suffix in SUFFIXES)):
        return False
    return (path.parent / RESULTS).is_file() or path.parent.resolve() == output.resolve()


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not any(part.startswith(".") for part in path.parts)
