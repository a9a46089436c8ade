"""How fast Nearfield is on a GPU: its GPU tests, operators and models against what one would use without it, tuning.

    python scripts/gpu_report.py                            everything, in less than nine minutes
    python scripts/gpu_report.py --only ops,models          some sections
    python scripts/gpu_report.py --only ops --case 'na7*'   some comparisons
    python scripts/gpu_report.py --device cpu               a dry run on small shapes: does all of it run

Writes docs/results/DATE-DEVICE.json, after every comparison anew, and a table beside it as Markdown; prints the table
and a last line of JSON. `python scripts/performance.py` makes docs/performance.md of such files. What raises is
recorded with its error, what does not fit the time with that reason; nothing stops the report.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from _gpu_commands import run_tests, run_tune
from _gpu_measuring import ROOT, Measuring, Section, measured
from _gpu_rows import Row, counted, failed, markdown_table

# Sections in the order of their importance, with their shares of the time; what one leaves is for those after it.
SHARES = {"ops": 0.46, "models": 0.22, "tests": 0.2, "tune": 0.12}
RESULTS = ROOT / "docs" / "results"
KIND = "nearfield gpu report"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report; 0, or 2 where it cannot be made."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        device = _device(options.device)
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
    report.result["device"]["after"] = _driver()
    report.write()
    rows = report.rows()
    print(markdown_table(rows))
    print(json.dumps(report.summary()))
    return 0


def _section(name: str, options: argparse.Namespace, seconds: float, report: _Report) -> Section:
    if name == "tests":
        return run_tests(seconds)
    if name == "tune":
        return run_tune(seconds, report.path.with_suffix(".configs.json"))
    cases = tuple(options.case) if name == "ops" else ()
    how = Measuring(options.device, options.backend, options.rounds, options.warm, cases)

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    return measured(name, how, seconds, say, lambda rows: report.add(name, Section(rows)))


class _Report:
    """The report as it grows, and the files that it is in."""

    def __init__(self, options: argparse.Namespace, device: dict[str, Any]) -> None:
        date = datetime.datetime.now(datetime.timezone.utc)
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        default = RESULTS / f"{date:%Y-%m-%d}-{slug}.json"
        self.path: Path = options.out or (Path(f"gpu-report-{slug}.json") if options.device == "cpu" else default)
        self.result: dict[str, Any] = {
            "kind": KIND,
            "date": f"{date:%Y-%m-%d %H:%M} UTC",
            "command": " ".join(["python", "scripts/gpu_report.py", *sys.argv[1:]]),
            "measured_on_gpu": options.device == "cuda",
            "backend": options.backend,
            "cold_cache": not options.warm,
            "device": device,
            "versions": _versions(),
            "commit": _commit(),
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
    return f"""# GPU report, {result["date"]}

Written by `{result["command"]}` on {where}; driver {device["driver"] or "unknown"}, {of}, commit {result["commit"]["hash"]}.

{markdown_table(rows)}
"""


# --- what the figures depend on -------------------------------------------------------------------------------------


def _device(kind: str) -> dict[str, Any]:
    import torch

    if kind == "cpu":
        return {"name": "cpu", "driver": None, "processors": os.cpu_count(), "before": None, "after": None}
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is there: run it on a machine with one, or take --device cpu for a dry run")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    before = _driver()
    return {
        "name": properties.name,
        "driver": before["driver_version"] if before else None,
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "before": before,
        "after": None,
    }


_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def _driver() -> dict[str, str] | None:
    """What nvidia-smi says of driver, clocks (MHz), power (W) and temperature; None where it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(_FIELDS, values, strict=True)) if len(values) == len(_FIELDS) else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "timm", "nearfield", "numpy", "natten"):
        found[name] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> dict[str, Any]:
    """Hash of the checkout and whether files differ from it; "unknown" where git does not say."""
    try:
        hash_, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"hash": "unknown", "dirty": None}
    return {"hash": hash_.strip(), "dirty": bool(changes.strip())}


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


class _Defaults(argparse.Action):
    """Nothing yet."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only", type=_sections, nargs="+", action="extend", metavar="NAMES", help=f"some of {','.join(SHARES)}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
