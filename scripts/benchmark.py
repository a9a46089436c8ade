"""How fast Nearfield is on a CPU, against what one would use without it; prints a table and a last line of JSON.

    python scripts/benchmark.py                                 every comparison, some minutes
    python scripts/benchmark.py --only window,models            some of them
    python scripts/benchmark.py --model nat_tiny,swin_tiny      images per second of any models, ours or timm's

float32, CPU time of this process, medians of interleaved rounds. Every candidate is checked against a reference, output
and gradients, before it is timed; no ratio is printed for a wrong one, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nearfield
import timm
import torch
from _bench_dense import dense_rows
from _bench_models import memory_rows, model_cases, scaling_rows, throughput
from _bench_ops import neighborhood_cases, window_cases
from _bench_timing import Case, Row, WrongResult, compare, grid, table

Section = Callable[[bool, int], list[Row]]


def _timed(cases: Callable[[bool], list[Case]]) -> Section:
    return lambda quick, rounds: [row for case in cases(quick) for row in compare(case, rounds)]


# Section and its usual number of rounds: fewer where a round takes seconds.
SECTIONS: dict[str, tuple[Section, int]] = {
    "neighborhood": (_timed(neighborhood_cases), 7),
    "window": (_timed(window_cases), 15),
    "models": (_timed(model_cases), 5),
    "memory": (lambda quick, rounds: memory_rows(quick), 1),
    "scaling": (scaling_rows, 3),
    "dense": (dense_rows, 5),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0, or 1 where a result was wrong."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "threads": options.threads, "quick": options.quick}
    wrong = False
    if options.model:
        try:
            found = throughput(options.model, options.backend, options.batch, options.rounds or 5)
        except ValueError as error:
            print(f"benchmark: {error}", file=sys.stderr)
            return 1 if isinstance(error, WrongResult) else 2
        head = ("model", "backend", "size", "batch", "params", "ms", "img/s")
        print(grid([head, *(_throughput_line(row) for row in found)]))
        result["models"] = found
    else:
        rows: list[Row] = []
        for name in options.only:
            section, usual = SECTIONS[name]
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += section(options.quick, options.rounds or (2 if options.quick else usual))
        # targets hold for the full shapes
        rows = [replace(row, target=None) for row in rows] if options.quick else rows
        wrong = any(row.note.startswith("wrong") for row in rows)
        result["rows"] = [{**asdict(row), "reached": row.reached} for row in rows]
        print(table(rows))
        if options.markdown:
            options.markdown.write_text(_document(rows, result, _command(options)), encoding="utf-8")
    result["machine"]["load_after"] = _load()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(wrong)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": _load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "nearfield": nearfield.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _throughput_line(row: dict[str, Any]) -> tuple[str, ...]:
    figures = (f"{row['parameters_m']} M", f"{row['ms']:.1f}", f"{row['images_per_s']:.2f}")
    return (row["model"], row["backend"], str(row["size"]), str(row["batch"]), *figures)


def _command(options: argparse.Namespace) -> str:
    """What writes the document again."""
    only = "" if set(options.only) == set(SECTIONS) else f" --only {','.join(options.only)}"
    return f"python scripts/benchmark.py{only} --markdown {options.markdown}"


def _document(rows: list[Row], result: dict[str, Any], command: str) -> str:
    """docs/benchmarks.md: the table and how it came about."""
    on, threads = result["machine"], result["threads"]
    counted = [row.reached for row in rows if row.reached is not None]
    return f"""# Benchmarks

Written by `{command}`; run it again rather than edit this.

{table(rows, markdown=True)}

{sum(counted)} of {len(counted)} targets are reached. `ratio` is how many times faster Nearfield is where the target is
a least one, and ours divided by the peer's where it is a most one.

Measured {on["date"]} on {on["processor"]} ({on["cores"]} cores, load {on["load"]} at the start), Python {on["python"]},
torch {on["torch"]}, timm {on["timm"]}, nearfield {on["nearfield"]}; float32, {threads} thread{"s"[: threads > 1]}.
Times are CPU time of one process, medians of rounds in which all candidates take turns: other programs on the machine
count little, absolute times still depend on it, ratios are what to look at. Before it is timed, every candidate is
compared with the first peer of its row, outputs and, where they are computed, all gradients.

- Attention starts at the packed projection (batch, height, width, 3, heads, head_dim) and ends at merged heads
  (batch, height, width, channels), so that what the layout costs is included.
- The gather is the fastest of four forms that were tried; the FlexAttention row is compiled, with its compile time
  left out.
- timm's Swin rolls and cuts the map before its projection, on a third of the channels. The two rows "in its own
  order" leave the projection out at no cost for timm; they have no target.
- All rows but those of memory share a process, whose allocator keeps what the rows before asked for. A process of their
  own gives other ratios: `python scripts/benchmark.py --model nat_tiny,swin_tiny_patch4_window7_224`.
"""


def _sections(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose among {', '.join(SECTIONS)}")
    return names


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only", type=_sections, default=list(SECTIONS), metavar="NAMES", help=f"some of {','.join(SECTIONS)}"
    )
    parser.add_argument("--rounds", type=_positive, help="rounds of every comparison (default: 3 to 15, by its cost)")
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds: does it run at all")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--model", type=_names, metavar="NAMES", help="models to time instead, ours or timm's")
    parser.add_argument("--backend", type=_names, default=["torch"], metavar="NAMES", help="backends for --model")
    parser.add_argument("--batch", type=_positive, default=8, help="images at a time for --model (default 8)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the JSON here too")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table as a document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
