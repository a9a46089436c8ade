"""Compiles candidates in processes of their own, ahead of their turn: they fill Triton's cache, which launches read.

One process compiles one kernel at a time, which takes longer than to measure it. What compiled code says is enough to
drop some candidates: that it spills registers, or takes more shared memory than there is.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.pool import AsyncResult
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a worker imports Triton only when it is ready to
    from _kernel_cases import Row
    from nearfield.ops.triton.configs import Config

__all__ = ["Compilers", "Job"]

MOST_WORKERS = 8
MOST_S = 60.0  # a worker that ends by a signal never answers


class Job(NamedTuple):
    """A launch to compile.

    Attributes:
        row: whose launch. configs: of all operations of its group, those of the other ones too.
        arch: what for. small: as in `problems`.
    """

    row: Row
    configs: tuple[tuple[str, Config], ...]
    arch: str
    small: bool


class Compilers:
    """Processes that compile."""

    def __init__(self, workers: int | None = None) -> None:
        count = workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1))
        self._pool = multiprocessing.get_context("spawn").Pool(count, _prepare)
        self._asked: dict[Job, AsyncResult[str]] = {}

    def ask(self, job: Job) -> None:
        """Compile a job when its turn comes, once."""
        if job not in self._asked:
            self._asked[job] = self._pool.apply_async(compiled, (job,))

    def wrong(self, job: Job, seconds: float) -> str:
        """What is wrong with a job's code, empty where nothing is; waits for at most so many seconds.

        Raises:
            TimeoutError: they are over.
        """
        self.ask(job)
        try:
            return self._asked[job].get(max(0.0, min(seconds, MOST_S)))
        except multiprocessing.TimeoutError as error:
            if seconds < MOST_S:
                raise TimeoutError from error
            return f"not compiled in {MOST_S:.0f} s"

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()


def _prepare() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled


def compiled(job: Job) -> str:
    """Compile a job as a launch would; what is wrong with its code."""
    import torch
    from _compiled import PROCESSORS, recorded, resources, target
    from _gpu_timing import one_line
    from _tune_problems import operation, problems
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(_Absent(target(job.arch)))
    backward = not job.row.op.endswith(".forward")
    for problem in problems(job.row, torch.device("cpu"), small=job.small, empty=True):
        with recorded(job.arch, dict(job.configs)) as launches:
            out, lse = problem.forward("triton")
            if backward:
                problem.backward("triton", out, lse)
        launch = next((made for made in launches if operation(made.name) == job.row.op), None)
        if launch is None:
            continue
        try:
            made = launch.kernel.run(**launch.arguments, **launch.options, grid=launch.grid, warmup=True)
            spilled = resources(made.asm, job.arch)[1] if job.arch.startswith("sm_") else 0
        except Exception as error:  # Triton and ptxas raise many kinds
            return one_line(_innermost(error))
        if spilled:
            return f"spills {spilled} bytes"
        known = PROCESSORS.get(job.arch)
        shared = int(made.metadata.shared)
        if known is not None and shared > known.program_shared:
            return f"takes {shared} bytes of shared memory, of {known.program_shared}"
        return ""
    return "no call launches it"


def _innermost(error: BaseException) -> BaseException:
    """What an error came of: Triton wraps it once for every function that a kernel calls."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class _Absent:
    """A driver of a device that is not there: enough to compile what a launch would."""

    def __init__(self, target: object) -> None:
        self._target = target

    def get_current_target(self) -> object:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
