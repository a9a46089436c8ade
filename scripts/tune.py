"""Measures launch configurations of the kernels on this machine's GPU and writes the fastest to a file that calls read.

    python scripts/tune.py                            the most important rows first, for five minutes
    python scripts/tune.py --seconds 1800             rows that the file does not have yet come first
    python scripts/tune.py --only "window.forward half 32"
    python scripts/tune.py --list                     rows and configurations; needs no GPU
    python scripts/tune.py --dry-run                  all but the timing, on small maps in Triton's interpreter

The file is NEARFIELD_TUNED, or nearfield/tuned.json in the user's cache folder. Nothing is ever searched for in a call:
it takes what this file says, else what is shipped. A configuration replaces the shipped one where it gives the same
result and is more than 2 % faster; those that cannot be compiled or launched, spill registers or compute something else
are dropped, with the reason. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # before these are imported, it must be settled whether kernels are interpreted
    from _kernel_cases import Row
    from _tune_table import Table

DRY_RUN_ARCH = "sm_90"  # what a dry run compiles for
RESERVE_S = 5.0  # for the measurement that is under way when the time is over


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, or list what there is to tune; 0, or 2 where that cannot be done."""
    options = _parsed(argv)
    started = time.monotonic()
    try:
        result = _listed(options.only) if options.list else _tuned(options, started)
    except (ValueError, OSError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result | {"seconds": round(time.monotonic() - started, 1)}))
    return 0


def _listed(only: str) -> dict[str, Any]:
    from _tune_choice import contenders, name
    from _tune_table import Table

    table, count = Table.read(Path(os.devnull), "*"), 0
    rows = _rows(only, table)
    for row in rows:
        first, *others = (list(astuple(config)) for config in contenders(row, table))
        print(f"{name(row)}: {first} or {' '.join(map(str, others))}")
        count += 1 + len(others)
    return {"rows": len(rows), "configurations": count}


def _rows(only: str, table: Table) -> list[Row]:
    from _kernel_cases import rows
    from _tune_choice import name, ordered

    found = [row for row in rows() if only in name(row)]
    if not found:
        raise ValueError(f"--only {only!r} is part of no row's name: see --list")
    return ordered(found, table)


def _tuned(options: argparse.Namespace, started: float) -> dict[str, Any]:
    dry = options.device == "cpu"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET"):
        raise ValueError("TRITON_INTERPRET is set, kernels would be interpreted: unset it")
    import _gpu_machine as machine

    on = machine.device(options.device)
    import torch
    from _gpu_timing import Cpu, Cuda, Device
    from _tune_bench import KernelBench, alike, timed
    from _tune_choice import tune
    from _tune_compile import Compilers
    from _tune_table import Table
    from nearfield.ops.triton.configs import architecture, cache_file

    file: Path | None = options.write or (None if dry else cache_file())
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK) or file.is_dir():
            raise ValueError(f"{file} cannot be written: name another file by --write or NEARFIELD_TUNED")
    if dry:
        torch.set_num_threads(1)
    device: Device = Cpu() if dry else Cuda()
    arch = architecture(device.place)
    table = Table.read(file or Path(os.devnull), arch)
    rows = _rows(options.only, table)
    reserve = min(RESERVE_S, 0.1 * options.seconds)
    measured = None if dry else _origin(on)

    def left_s() -> float:
        return options.seconds - reserve - (time.monotonic() - started)

    def write() -> None:
        if file is not None:
            table.write(measured)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with Compilers() as compilers:
        timer = alike if dry else timed(device)
        compiled_for = DRY_RUN_ARCH if dry else arch
        bench = KernelBench(device, table, compilers, compiled_for, rows, left_s, timer, small=dry)
        result = tune(rows, table, bench, write, say)
    tuned = sum(outcome.config is not None for outcome in result.outcomes)
    return {
        "device": on["name"],
        "measured": not dry,
        "rows": tuned,
        "failed": len(result.outcomes) - tuned,
        "replaced": sum(outcome.replaced for outcome in result.outcomes),
        "dropped": sum(len(outcome.dropped) for outcome in result.outcomes),
        "left": result.left,
        "stopped": result.stopped or None,
        "file": str(file) if file is not None and tuned else None,
    }


def _origin(on: dict[str, Any]) -> dict[str, Any]:
    """Where and how rows are measured."""
    import _gpu_machine as machine

    return {
        "device": on["name"],
        "driver": on["driver"],
        "versions": machine.versions(),
        "commit": machine.commit(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "command": " ".join(["python", "scripts/tune.py", *sys.argv[1:]]),
    }


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=_positive, default=300, help="for all of it (default 300)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name, as --list prints it")
    parser.add_argument("--write", type=Path, metavar="FILE", help="instead of the file that calls read")
    parser.add_argument("--list", action="store_true", help="print rows, each with its configurations, and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run; times nothing")
    parser.add_argument("--dry-run", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
