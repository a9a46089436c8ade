"""What a section of the report consists of: tasks that give rows, each with the time it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from _gpu_rows import OUT_OF_TIME, Row
from _gpu_timing import Cpu, Device


@dataclass(frozen=True)
class Context:
    """Where and how tasks run.

    Args:
        device: that everything is measured on.
        backend: of Nearfield's operators.
        rounds: of a comparison.
        round_seconds: limit for the rounds of one comparison.
        deadline: in `time.monotonic()`'s seconds.
    """

    device: Device
    backend: str
    rounds: int
    round_seconds: float
    deadline: float

    @property
    def dry(self) -> bool:
        """Whether this only shows that everything runs: small shapes, no compiling, no targets."""
        return isinstance(self.device, Cpu)

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Task:
    """Some rows that are made together.

    Args:
        key: short name, to choose it by.
        plan: the rows as they read when they could not be made.
        run: makes them.
        needs_s: seconds that must be left for it to start.
        most_s: seconds after which it is killed.
    """

    key: str
    plan: Callable[[], list[Row]]
    run: Callable[[Context], list[Row]]
    needs_s: float = 5.0
    most_s: float = 60.0

    def missing(self, note: str = OUT_OF_TIME) -> list[Row]:
        """The planned rows, with the reason why they have no figures."""
        return [{**row, "note": note} for row in self.plan()]
