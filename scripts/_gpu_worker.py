"""Runs a section's tasks in a process of its own, so that an error that loses the device costs one task, not a report.

It appends to a file, one JSON object a line: {"start": key}, {"rows": [...]}, {"done": key, "seconds": ...} for each
task. `_gpu_measuring.py` starts it and reads the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _gpu_tasks import Context, Task
from _gpu_timing import Cpu, Cuda, Device, DeviceLost, one_line

LOST = 75  # exit code: the device is lost, go on in a new process


def section_tasks(section: str) -> list[Task]:
    """Tasks of a section, the most important first."""
    if section == "ops":
        from _gpu_ops import tasks
    else:
        from _gpu_models import tasks
    return tasks()


def run_tasks(tasks: Sequence[Task], context: Context, write: Callable[[dict[str, Any]], None]) -> int:
    """Run tasks in order; the exit code."""
    for task in tasks:
        write({"start": task.key})
        started, lost = time.monotonic(), False
        if context.left_s() < task.needs_s:
            rows = task.missing()
        else:
            try:
                rows = task.run(context)
                context.device.recover()
            except DeviceLost as error:
                rows, lost = task.missing(f"the device was lost: {error}"), True
            except Exception as error:  # whatever it is, the next task has its turn
                rows = task.missing(one_line(error))
                try:
                    context.device.recover()
                except DeviceLost:
                    lost = True
        write({"rows": rows})
        write({"done": task.key, "seconds": round(time.monotonic() - started, 1)})
        if lost:
            return LOST
    return 0


def main() -> int:
    """Run the tasks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section")
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    _settings(options.device)
    device: Device = Cpu() if options.device == "cpu" else Cuda(cold=not options.warm)
    context = Context(device, options.backend, options.rounds, 2.0, deadline)
    with options.file.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        named = [task for task in section_tasks(options.section) if task.key in options.tasks]
        return run_tasks(named, context, write)


def _settings(device: str) -> None:
    import torch

    config = torch._dynamo.config
    # many masks and shapes share a function: past the limit it would run uncompiled, and say so once
    config.recompile_limit = config.accumulated_recompile_limit = 1024
    if device == "cpu":
        torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
