"""What a person sees while it runs: a bar on a terminal, plain lines otherwise, nothing on ranks other than 0."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

_logger = logging.getLogger("nearfield.engine")


def is_main_process() -> bool:
    """Whether this process is the one that talks and writes (rank 0 under torchrun, or alone)."""
    return int(os.environ.get("RANK", "0")) == 0


class Progress:
    """Progress over `total` steps in all, with lines that stay. A context manager.

    On a terminal (stderr) it is a bar of rich; elsewhere lines on stdout, at most one every `every` seconds.
    """

    def __init__(self, total: int, *, every: float = 30.0, terminal: bool | None = None) -> None:
        self.total, self.every = total, every
        self.shown = is_main_process()
        self.terminal = self.shown and (sys.stderr.isatty() if terminal is None else terminal)
        self.done = 0
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, what: str, text: str) -> None:
        """Now `done` steps of the total: `what` names the part (epoch 3/30), `text` the numbers."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=what, text=text)
        elif self.shown and time.monotonic() - self._last > self.every:
            self._last = time.monotonic()
            print(f"{what}  {done}/{self.total}  {text}", flush=True)  # noqa: T201 - its purpose

    def line(self, text: str) -> None:
        """A line that stays; it also goes to the log."""
        _logger.info("%s", text)
        self._last = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.shown:
            print(text, flush=True)  # noqa: T201 - its purpose
