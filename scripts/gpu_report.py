"""How fast Nearfield is on a GPU: its GPU tests, operators and models against what one would use without it, tuning.

    python scripts/gpu_report.py                            everything, in less than nine minutes
    python scripts/gpu_report.py --only ops,models          some sections
    python scripts/gpu_report.py --only ops --case 'na7*'   some comparisons
    python scripts/gpu_report.py --device cpu               a dry run on small shapes: does all of it run

Writes docs/results/DATE-DEVICE.json, after every comparison anew, and a table beside it as Markdown; prints short lines
and a last line of JSON. `python scripts/performance.py` makes docs/performance.md of such files. What raises is
recorded with its error, what does not fit the time with that reason; nothing stops the report.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _gpu_machine as machine
from _gpu_commands import run_tests, run_tune
from _gpu_measuring import Measuring, Section, measured
from _gpu_rows import Row, counted, failed, markdown_table, plain_lines

# Sections in the order of their importance, with their shares of the time; what one leaves is for those after it.
SHARES = {"ops": 0.5, "models": 0.2, "tests": 0.18, "tune": 0.12}
MOST_TUNING_S = 120.0  # a device is lent for minutes: who wants more tunes by scripts/tune.py itself
RESULTS = machine.ROOT / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report; 0, or 2 where it cannot be made."""
    options = _parsed(argv)
    try:
        device = machine.device(options.device)
    except ValueError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    report = _Report(options, device)
    sections = [name for name in SHARES if name in options.only]
    for i, name in enumerate(sections):
        left = options.seconds - (time.monotonic() - started)
        seconds = left * SHARES[name] / sum(SHARES[later] for later in sections[i:])
        print(f"{name}: {max(seconds, 0.0):.0f} s", file=sys.stderr, flush=True)
        report.add(name, _section(name, options, seconds, report))
    report.result["seconds"] = round(time.monotonic() - started, 1)
    report.result["device"]["after"] = machine.driver()
    report.write()
    print("\n".join(plain_lines(report.rows())))
    print(json.dumps(report.summary()))
    return 0


def _section(name: str, options: argparse.Namespace, seconds: float, report: _Report) -> Section:
    if name == "tests":
        return run_tests(seconds)
    if name == "tune":
        write = report.path.with_suffix(".configs.json")
        return run_tune(min(seconds, MOST_TUNING_S) if options.device == "cuda" else 0.0, write)
    how = Measuring(options.device, options.backend, options.rounds, options.warm, tuple(options.case))

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    return measured(name, how, seconds, say, lambda rows: report.add(name, Section(rows)))


class _Report:
    """The report as it grows, and the files that it is in."""

    def __init__(self, options: argparse.Namespace, device: dict[str, Any]) -> None:
        date = datetime.datetime.now(datetime.timezone.utc)
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        # a dry run is no result
        folder = Path() if options.device == "cpu" else RESULTS
        self.path: Path = options.out or _free(folder, f"{date:%Y-%m-%d}-{slug}")
        self.result: dict[str, Any] = {
            "kind": machine.KIND,
            "date": f"{date:%Y-%m-%d %H:%M} UTC",
            "command": " ".join(["python", "scripts/gpu_report.py", *sys.argv[1:]]),
            "measured_on_gpu": options.device == "cuda",
            "backend": options.backend,
            "cold_cache": not options.warm,
            "device": device,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "settings": {key: value for key, value in sorted(os.environ.items()) if key.startswith("NEARFIELD_")},
            "seconds": None,
            "sections": {},
        }

    def add(self, name: str, section: Section) -> None:
        """Put what is there of a section into the file."""
        self.result["sections"][name] = {
            "rows": section.rows,
            "seconds": section.seconds,
            "trouble": section.trouble,
        }
        self.write()

    def rows(self) -> list[Row]:
        """Of all sections."""
        return [row for section in self.result["sections"].values() for row in section["rows"]]

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, json.dumps(self.result, indent=1) + "\n")
        _write(self.path.with_suffix(".md"), _document(self.result, self.rows()))

    def summary(self) -> dict[str, Any]:
        """The last line."""
        rows = self.rows()
        reached, missed, open_ = counted(rows)
        return {
            "report": str(self.path),
            "table": str(self.path.with_suffix(".md")),
            "device": self.result["device"]["name"],
            "measured_on_gpu": self.result["measured_on_gpu"],
            "rows": len(rows),
            "targets": {"reached": reached, "missed": missed, "not measured": open_},
            "failed": sum(failed(row) for row in rows),
            "trouble": [line for section in self.result["sections"].values() for line in section["trouble"]],
            "seconds": self.result["seconds"],
        }


def _free(folder: Path, stem: str) -> Path:
    """A name that no earlier report of the day has."""
    names = (f"{stem}{f'-{i}' if i > 1 else ''}.json" for i in range(1, 1000))
    return next(path for path in (folder / name for name in names) if not path.exists())


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _document(result: dict[str, Any], rows: list[Row]) -> str:
    device, versions = result["device"], result["versions"]
    where = device["name"] if result["measured_on_gpu"] else f"{device['name']}, a dry run: its times mean nothing"
    of = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = result["commit"]["hash"] + (" with changes" if result["commit"]["dirty"] else "")
    return f"""# GPU report, {result["date"]}

Written by `{result["command"]}` on {where}; driver {device["driver"] or "unknown"}, {of}; commit {commit}.

{markdown_table(rows)}
"""


# --- the command line -----------------------------------------------------------------------------------------------


def _sections(text: str) -> list[str]:
    names = [name for name in re.split(r"[,|]", text) if name]
    unknown = [name for name in names if name not in SHARES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose among {', '.join(SHARES)}")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", type=_sections, default=list(SHARES), metavar="NAMES", help=f"of {','.join(SHARES)}")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="some ops or models, repeatable")
    parser.add_argument("--seconds", type=_positive, default=500, help="for all of it (default 500)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="instead of docs/results/DATE-DEVICE.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--backend", help="of Nearfield's operators (default triton, in a dry run torch)")
    parser.add_argument("--rounds", type=_positive, help="of a comparison (default 30, in a dry run 3)")
    parser.add_argument("--warm", action="store_true", help="leave the cache as the call before left it")
    options = parser.parse_args(argv)
    dry = options.device == "cpu"
    options.backend = options.backend or ("torch" if dry else "triton")
    options.rounds = options.rounds or (3 if dry else 30)
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    return options


if __name__ == "__main__":
    sys.exit(main())
