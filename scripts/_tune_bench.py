"""Measures launch configurations of a row: held against the shipped one, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

from _gpu_compare import wrong
from _gpu_problems import LIMITS, OUTPUT, Named, relative_errors
from _gpu_timing import Device, Run, attempt, measure
from _kernel_cases import PASSES, Row
from _tune_choice import OutOfTime, contenders
from _tune_compile import Compilers, Job
from _tune_problems import Problem, named, operation, problems, takes
from _tune_table import Table
from nearfield.ops.triton.configs import Config, override
from nearfield.ops.triton.launch import interpreting
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

__all__ = ["KernelBench", "alike", "timed"]

Timer = Callable[[Mapping[str, Run]], Mapping[str, float | str]]

ROUNDS, ROUND_SECONDS = 30, 2.0
AHEAD = 4  # rows whose candidates are compiled while one is measured


def timed(device: Device) -> Timer:
    """Medians of what the device needs, in microseconds."""

    def times(runs: Mapping[str, Run]) -> dict[str, float | str]:
        made = measure(device, runs, rounds=ROUNDS, seconds=ROUND_SECONDS, graph=False)
        return {key: time if isinstance(time, str) else time.device_us for key, time in made.items()}

    return times


def alike(runs: Mapping[str, Run]) -> dict[str, float | str]:
    """For a dry run: everything is called, nothing is timed, all are equal."""
    for run in runs.values():
        run()
    return dict.fromkeys(runs, 0.0)


Noted = tuple[str, partial[Any]]  # operation, and the launch once more


@contextmanager
def noted() -> Iterator[list[Noted]]:
    """Launches inside the block are made as ever, and kept so that they can be made again."""
    kind: Any = InterpretedFunction if interpreting() else JITFunction
    run, found = kind.run, list[Noted]()

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__.rpartition(".")[2]
        found.append((operation(f"{module}.{self.fn.__name__}"), partial(run, self, *args, **kwargs)))
        return run(self, *args, **kwargs)

    with mock.patch.object(kind, "run", noting):
        yield found


class KernelBench:
    """Runs the pass that a row's kernel is part of, and times its launches without those of other rows.

    What a configuration does to the sums after it counts too, as with the partial gradients of a bias.

    Args:
        device: where kernels run.
        compilers: compile for `arch`.
        rows: that will be asked for, in their order.
        left_s: seconds left.
        timer: see `timed` and `alike`.
        small: on small maps.
    """

    def __init__(
        self, device: Device, table: Table, compilers: Compilers, arch: str, rows: Sequence[Row],
        left_s: Callable[[], float], timer: Timer, *, small: bool = False,
    ) -> None:  # fmt: skip
        self._device, self._table, self._compilers, self._arch = device, table, compilers, arch
        self._rows, self._left_s, self._timer, self._small = list(rows), left_s, timer, small
        self._kept: _Kept | None = None

    def times(self, row: Row, configs: Sequence[Config]) -> dict[Config, float | str]:
        """See `Bench`."""
        self._ahead(row, configs)
        kept = self._prepared(row, configs[0])
        if isinstance(kept, str):
            return dict.fromkeys(configs, kept)
        found: dict[Config, float | str] = {}
        runs: dict[Config, Run] = {}
        for config in configs:
            complaint = self._complaint(row, config) if config != configs[0] else ""
            made = complaint or self._launched(row, config, kept)
            if isinstance(made, str):
                found[config] = made
            else:
                runs[config] = made
        times = self._timer({str(astuple(config)): run for config, run in runs.items()})
        return {config: found[config] if config in found else times[str(astuple(config))] for config in configs}

    def _ahead(self, row: Row, configs: Sequence[Config]) -> None:
        """Have the configurations compiled, then those of the rows to come."""
        for config in configs:
            self._compilers.ask(self._job(row, config))
        at = self._rows.index(row)
        for later in self._rows[at + 1 : at + 1 + AHEAD]:
            for config in contenders(later, self._table):
                self._compilers.ask(self._job(later, config))

    def _configs(self, row: Row, config: Config) -> dict[Row, Config]:
        """Configurations of all passes of a row's kind, where this one has a certain one."""
        passes = [replace(row, op=f"{row.group}.{name}") for name in PASSES[row.group]]
        return {each: self._table.current(each) for each in passes} | {row: config}

    def _job(self, row: Row, config: Config) -> Job:
        configs = tuple((each.op, chosen) for each, chosen in self._configs(row, config).items())
        return Job(row, configs, self._arch, self._small)

    def _override(self, row: Row, config: Config) -> AbstractContextManager[None]:
        configs = self._configs(row, config)
        return override({each.key(self._table.arch): chosen for each, chosen in configs.items()})

    def _complaint(self, row: Row, config: Config) -> str:
        """What is wrong with the compiled code of a configuration."""
        try:
            return self._compilers.wrong(self._job(row, config), self._left_s())
        except TimeoutError as error:
            raise OutOfTime from error

    def _prepared(self, row: Row, shipped: Config) -> _Kept | str:
        """The first call that launches a row, or why there is none; made once for one row after the other."""
        if self._kept is not None and self._kept.row == row:
            return self._kept
        self._kept = None
        backward = not row.op.endswith(".forward")
        for problem in problems(row, self._device.place, small=self._small, empty=False):
            self._in_time()
            with self._override(row, shipped), noted() as launches:
                given = self._sound(problem.forward) if backward else ()
                call = partial(_call, problem, given)
                want = self._sound(call)
            if any(op == row.op and takes(run.keywords, shipped) for op, run in launches):
                self._kept = _Kept(row, call, named(want, backward=backward), LIMITS[problem.case.dtype])
                return self._kept
        return "no call launches it"

    def _sound(self, call: Callable[[str], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a call returns; by stock PyTorch, where kernels cannot be launched as they are shipped."""
        made = attempt(self._device, partial(call, "triton"))
        return call("torch") if isinstance(made, str) else made

    def _launched(self, row: Row, config: Config, kept: _Kept) -> Run | str:
        """The launches of a pass that are timed, after they were made once; or what was wrong with that."""
        self._in_time()
        with self._override(row, config), noted() as launches:
            made = attempt(self._device, partial(kept.call, "triton"))
        if isinstance(made, str):
            return made
        complaint = wrong(relative_errors(named(made, backward=OUTPUT not in kept.want), kept.want), kept.limit)
        if complaint:
            return f"computes something else: {complaint}"
        of_others = {f"{group}.{name}" for group, names in PASSES.items() for name in names} - {row.op}
        runs = [run for op, run in launches if op not in of_others]
        return lambda: [run() for run in runs]

    def _in_time(self) -> None:
        if self._left_s() <= 0:
            raise OutOfTime


@dataclass(frozen=True)
class _Kept:
    """A row's pass on a named backend, what it is to return, and by how much it may differ."""

    row: Row
    call: Callable[[str], tuple[Tensor, ...]]
    want: Named
    limit: float


def _call(problem: Problem, given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    """The backward pass of what a forward pass returned, or the forward pass where nothing is given."""
    return problem.backward(backend, given[0], given[1]) if given else problem.forward(backend)
