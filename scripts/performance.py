"""Writes docs/performance.md from the results of scripts/gpu_report.py.

    python scripts/performance.py             write the page
    python scripts/performance.py --check     only say whether it is what would be written (exit code 1 if not)

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _bench_timing import grid
from _gpu_machine import KIND, ROOT
from _gpu_rows import counted, figure, markdown_table

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"

TITLES = {"ops": "Operators", "models": "Models", "tests": "GPU tests", "tune": "Tuning"}
OPENING = """# Performance on GPUs

Written by `python scripts/performance.py` from the files in [results](results/README.md); run it again rather than edit
this. Measurements on a CPU are in [benchmarks.md](benchmarks.md).
"""

HOW_TO_READ = """## How to read the tables

- **ours** is the device's time of one call, median of rounds in which all candidates take turns, the host kept ahead of
  the device and caches cold; **call** is what a caller waits for when calls follow each other, launches included. Times
  under 50 us are also given as replayed from a CUDA graph, with warm caches.
- **floor** is computed, not measured: what the device needs at least for the bytes, products, exponentials or
  instructions of the useful scores, whichever takes longest, each number read or written once. **fraction** is floor
  over time.
- **others** are computed from the same inputs in the same process; in bold, how many times faster ours is, or, "of it",
  what ours costs in terms of theirs. FlexAttention, SDPA and NATTEN get contiguous inputs in the layout and order of
  tokens that suits them best, and may leave their output in it, for free. timm's windows are rolled and cut in timm's
  own order, before the projection, on a third of the channels; "from our layout" starts where ours starts.
- **targets** are the speeds that the project set itself before anything was measured; of competing peers the fastest
  counts.
- **error** is the largest of output and gradients against the dense definition in float64, on a smaller map, as norm of
  the difference over norm of the reference. A row that is off is not timed, and peers whose results differ are not
  compared.
"""

NOTHING = """**Not measured on a GPU yet.**
`python scripts/gpu_report.py` on a machine with a CUDA device makes the first result.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; 0, 1 where a check fails, 2 where a result is none."""
    options = _parser().parse_args(argv)
    try:
        found = results(options.results)
        text = page(found)
    except ValueError as error:
        print(f"performance: {error}", file=sys.stderr)
        return 2
    same = options.page.exists() and options.page.read_text(encoding="utf-8") == text
    if not options.check and not same:
        options.page.write_text(text, encoding="utf-8")
    print(json.dumps({"page": str(options.page), "results": len(found), "was_up_to_date": same}))
    return int(options.check and not same)


def results(folder: Path) -> list[dict[str, Any]]:
    """Reports in a folder, the newest first.

    Raises:
        ValueError: a file is no report, or one of a dry run.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".configs.json"):
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is no JSON: {error}") from error
        if not isinstance(result, dict) or result.get("kind") != KIND:
            raise ValueError(f"{path.name} was not written by scripts/gpu_report.py: move it elsewhere")
        if result.get("measured_on_gpu") is not True:
            raise ValueError(f"{path.name} is of a dry run, whose times mean nothing: remove it")
        found.append({**result, "file": path.name})
    return sorted(found, key=lambda result: (result["date"], result["file"]), reverse=True)


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The whole page; the floors alone where nothing was measured."""
    if not found:
        return "\n".join([OPENING, NOTHING, floors_table()])
    devices = list(dict.fromkeys(result["device"]["name"] for result in found))
    parts = [OPENING]
    for device in devices:
        parts.append(f"## {device}\n")
        shown: set[str] = set()
        for result in found:
            if result["device"]["name"] == device:
                parts += _report(result, shown)
    return "\n".join([*parts, HOW_TO_READ])


def _report(result: Mapping[str, Any], shown: set[str]) -> list[str]:
    """Sections of one report that no newer one of the device has."""
    sections = {
        name: section["rows"]
        for name, section in result["sections"].items()
        if name not in shown and any(row["ours"] is not None for row in section["rows"])
    }
    shown.update(sections)
    if not sections:
        return []
    parts = [_circumstances(result)]
    for name, rows in sections.items():
        reached, missed, open_ = counted(rows)
        parts.append(f"### {TITLES.get(name, name)}, {result['date'][:10]}\n")
        if reached + missed + open_:
            of = f"{reached} of {reached + missed + open_} targets are reached"
            parts.append(f"{of}{f', {open_} were not measured' if open_ else ''}.\n")
        parts.append(markdown_table(rows) + "\n")
    return parts


def _circumstances(result: Mapping[str, Any]) -> str:
    device, commit = result["device"], result["commit"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    clocks = device.get("after") or device.get("before") or {}
    clock = f", {clocks['clocks.sm']} of {clocks['clocks.max.sm']} MHz afterwards" if "clocks.sm" in clocks else ""
    changed = " with changes" if commit["dirty"] else ""
    settings = "".join(f" {name}={value}" for name, value in result["settings"].items())
    return f"""Measured {result["date"]} by `{result["command"]}`{f" with{settings}" if settings else ""} at commit
{commit["hash"]}{changed}, backend {result["backend"]}, {"cold" if result["cold_cache"] else "warm"} caches; driver
{device["driver"] or "unknown"}, {device["processors"]} multiprocessors{clock}; {packages}. All figures:
[{result["file"]}](results/{result["file"]}).
"""


def floors_table() -> str:
    """Floors of the operators that the report measures, on an H200."""
    from _floors import DEVICES
    from _gpu_floors import BACKWARD, FORWARD, floors_of
    from _gpu_ops import cases

    device = DEVICES["h200"]
    head = ("what", "shape", "forward, us", "backward, us", "targets")
    lines: list[tuple[str, ...]] = [head]
    for case in cases():
        times = []
        for what in (FORWARD, BACKWARD):
            (floor,) = floors_of(case.attention, case.shape, what, device)
            times.append(f"{figure(1e6 * floor.seconds, 3)}, {floor.bound}")
        lines.append((case.name, f"{case.shape} {case.shape.dtype_name}", *times, "<br>".join(case.wanted())))
    return f"""## Floors on an H200, computed

What the device needs at least for the bytes, products, exponentials or instructions of the useful scores, whichever
takes longest, and the targets that the project set itself. Nothing here is measured.

Rates: {device.source}.

{grid(lines, markdown=True)}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default docs/results")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE.md", help="default docs/performance.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
