"""Runs the measurements of a section in processes of their own: one that crashes, hangs or runs late is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from _gpu_machine import ROOT
from _gpu_rows import OUT_OF_TIME, Row, make_row
from _gpu_tasks import Task
from _gpu_timing import one_line
from _gpu_worker import section_tasks

SCRIPTS = ROOT / "scripts"
POLL_S = 0.1
LEAST_S = 3.0  # a process is not started for less

Say = Callable[[str], None]


@dataclass
class Section:
    """What came of a section.

    Args:
        rows: as they were made.
        seconds: that each of its parts took, by name.
        trouble: processes that ended early, and why.
    """

    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Measuring:
    """How the processes that measure are started.

    Args:
        device: "cuda" or "cpu".
        backend: of Nearfield's operators.
        rounds: of a comparison.
        warm: leave the caches as the call before left them.
        cases: shell patterns of the tasks to run; all where there are none.
    """

    device: str
    backend: str
    rounds: int
    warm: bool = False
    cases: tuple[str, ...] = ()

    def command(self, section: str, tasks: Sequence[str], file: Path, seconds: float) -> list[str]:
        """Command line of a process that runs some tasks."""
        command = [sys.executable, str(SCRIPTS / "_gpu_worker.py"), section, *tasks, "--file", str(file)]
        command += ["--device", self.device, "--backend", self.backend, "--seconds", f"{seconds:.1f}"]
        return [*command, "--rounds", str(self.rounds), *(["--warm"] if self.warm else [])]


def measured(name: str, how: Measuring, seconds: float, say: Say, keep: Callable[[list[Row]], None]) -> Section:
    """Run the tasks of a section; a process that crashes, hangs or loses the device is replaced by a new one.

    Args:
        name: of the section, "ops" or "models".
        how: what to start.
        seconds: for all of it; what does not fit is left out with that reason.
        say: told of progress.
        keep: given all rows so far whenever a task is done.
    """
    try:
        tasks = [t for t in section_tasks(name) if not how.cases or any(fnmatch(t.key, c) for c in how.cases)]
    except Exception as error:  # the other sections still have their turn
        return Section([make_row(name, "", name, "", note=one_line(error))])
    if not tasks:
        return Section([make_row(name, "", name, "", note=f"nothing is called {' or '.join(how.cases)}")])
    deadline, section = time.monotonic() + seconds, Section()
    while tasks:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            for task in tasks:
                section.rows += task.missing()
            break
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows"
            command = how.command(name, [task.key for task in tasks], file, left)
            with open(Path(folder) / "errors", "w+", encoding="utf-8") as errors:
                process = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors, start_new_session=True)
                try:
                    done = _followed(process, file, tasks, deadline, section, say, keep)
                finally:
                    end(process)
                errors.seek(0)
                last = last_line(errors.read())
        tasks = tasks[done.tasks :]
        if done.why and tasks:
            section.trouble.append(f"{tasks[0].key}: {done.why}{f': {last}' if last else ''}")
            note = OUT_OF_TIME if done.out_of_time else section.trouble[-1]
            stopped = tasks if done.fatal else tasks[:1]
            section.rows += [row for task in stopped for row in task.missing(note)]
            tasks = tasks[len(stopped) :]
        keep(section.rows)
    return section


@dataclass(frozen=True)
class _Done:
    """How many tasks a process finished, and why it ended before the last; fatal: it would happen to any other too."""

    tasks: int
    why: str = ""
    out_of_time: bool = False
    fatal: bool = False


def _followed(
    process: subprocess.Popen[bytes],
    file: Path,
    tasks: Sequence[Task],
    deadline: float,
    section: Section,
    say: Say,
    keep: Callable[[list[Row]], None],
) -> _Done:
    """Collect what a process writes until it ends, or has to be ended."""
    most = {task.key: task.most_s for task in tasks}
    started = time.monotonic()
    finished, running, why, late = 0, "", "", False
    lines = _lines(file)
    while True:
        ended = process.poll() is not None  # asked before reading: what it wrote last is then there
        for line in lines():
            if "start" in line:
                running, started = line["start"], time.monotonic()
                say(running)
            elif "rows" in line:
                section.rows += line["rows"]
                keep(section.rows)
            elif "done" in line:
                section.seconds[line["done"]] = line["seconds"]
                finished, running = finished + 1, ""
        if ended:
            break
        spent = time.monotonic() - started
        if time.monotonic() > deadline + LEAST_S:
            why, late = "ended at the section's time limit", True
        elif running and spent > most[running]:
            why = f"ended after {spent:.0f} s"
        if why:
            end(process)
            break
        time.sleep(POLL_S)
    # one that ends between two tasks has lost the device, and said so in its rows
    if not why and finished < len(tasks) and (running or not finished):
        why = f"the process ended with code {process.returncode}"
    return _Done(finished, why, late, fatal=not running and not finished)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(file: Path) -> Callable[[], Iterator[dict[str, Any]]]:
    """Each call gives the whole lines that were appended since the last."""
    read = 0

    def new() -> Iterator[dict[str, Any]]:
        nonlocal read
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(read)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            read += len(whole)
            for line in whole.splitlines():
                yield json.loads(line)

    return new


def last_line(text: str, most: int = 240) -> str:
    """The last line that is not empty, cut to a length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""
