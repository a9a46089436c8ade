"""Which launch configuration a row gets: the order of rows, what takes part, and what wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Protocol

from _choose import candidates
from _gpu_timing import DeviceLost, one_line
from _kernel_cases import FAMILIES, PASSES, Row
from _tune_table import Table
from nearfield.ops.triton.configs import Config

__all__ = ["GAIN", "Bench", "OutOfTime", "Outcome", "Tuned", "choose_row", "contenders", "name", "ordered", "tune"]

GAIN = 1.02  # times as fast as the shipped configuration another has to be, to replace it
# What one program takes after each other: tried on the fastest of the other choices.
RUNS = {"window": (4, 8, 16, 32), "neighborhood": (1, 2, 4), "bias": (8, 16, 32)}


class OutOfTime(RuntimeError):  # noqa: N818 - it says what happened
    """What was begun does not fit the time."""


class Bench(Protocol):
    """Measures configurations of a row."""

    def times(self, row: Row, configs: Sequence[Config]) -> dict[Config, float | str]:
        """Microseconds of each, or why there are none; all must agree with the first, which is the shipped one.

        Raises:
            OutOfTime: they do not fit the time.
            DeviceLost: the device answers nothing any more.
        """


def name(row: Row) -> str:
    """A row, whatever the architecture."""
    return f"{row.op} {row.precision} {row.block_d} {row.family}"


def ordered(rows: Iterable[Row], table: Table) -> list[Row]:
    """The most important first: half precision, head_dim 32 and 64, maps before curves; those in the file come last.

    Passes of a kind stay in their order: some take over what an earlier one has.
    """

    def rank(row: Row) -> tuple[bool, bool, bool, bool, int, int, int, int]:
        return (
            table.has(row),
            row.precision != "half",
            row.block_d not in (32, 64),
            row.family == "curve",
            list(PASSES).index(row.group),
            row.block_d,
            -FAMILIES[row.group].index(row.family),  # large tiles first
            PASSES[row.group].index(row.op.split(".")[1]),
        )

    return sorted(rows, key=rank)


def fitted(row: Row, config: Config, table: Table) -> Config:
    """A configuration as it is launched: the bias gradient's pass takes the tiles of the dQ pass."""
    if row.op != "neighborhood.bias":
        return config
    return replace(config, block_m=table.current(replace(row, op="neighborhood.query")).block_m)


def contenders(row: Row, table: Table) -> list[Config]:
    """Configurations of a row that are measured first; the first of them is the shipped one."""
    return list(dict.fromkeys(fitted(row, config, table) for config in (table.default(row), *candidates(row))))


@dataclass(frozen=True)
class Outcome:
    """What came of a row.

    Attributes:
        shipped: its shipped configuration. config: what it gets; None where none runs.
        times: microseconds, of the last comparison in which each took part. dropped: why others have none.
    """

    row: Row
    shipped: Config
    config: Config | None
    times: Mapping[Config, float]
    dropped: Mapping[Config, str]

    @property
    def replaced(self) -> bool:
        """Whether the row gets something else than what is shipped."""
        return self.config not in (None, self.shipped)

    def __str__(self) -> str:
        def told(config: Config) -> str:
            time = self.times.get(config, self.dropped.get(config))
            took = time if isinstance(time, str) else f"{time:.1f} us" if time else "not timed"
            return f"{list(astuple(config))}, {took}"

        if self.config is None:
            return f"{name(self.row)}: nothing runs"
        if not self.replaced:
            return f"{name(self.row)}: stays {told(self.config)}"
        return f"{name(self.row)}: {told(self.config)}, instead of {told(self.shipped)}"


def choose_row(row: Row, table: Table, bench: Bench) -> Outcome:
    """Measure a row's configurations, then the fastest with other runs beside the shipped one, which decides."""
    configs = contenders(row, table)
    shipped = configs[0]
    found = bench.times(row, configs)
    fastest = _fastest(found)
    if fastest is not None:
        runs = RUNS.get(row.op.split(".")[1], RUNS.get(row.group, ()))
        final = dict.fromkeys((shipped, fastest, *(replace(fastest, run=run) for run in runs)))
        if len(final) > 1:
            again = bench.times(row, list(final))
            found |= again
            fastest = _fastest(again)
    times = {config: time for config, time in found.items() if isinstance(time, float)}
    dropped = {config: why for config, why in found.items() if isinstance(why, str)}
    if fastest is not None and shipped in times and times[shipped] <= GAIN * times[fastest]:
        fastest = shipped
    return Outcome(row, shipped, fastest, times, dropped)


def _fastest(found: Mapping[Config, float | str]) -> Config | None:
    times = {config: time for config, time in found.items() if isinstance(time, float)}
    return min(times, key=lambda config: times[config]) if times else None


@dataclass
class Tuned:
    """What came of some rows; stopped: why the others had no turn, empty where all had one."""

    outcomes: list[Outcome] = field(default_factory=list)
    left: int = 0
    stopped: str = ""


def tune(
    rows: Sequence[Row], table: Table, bench: Bench, write: Callable[[], None], say: Callable[[str], None]
) -> Tuned:
    """Tune rows in their order for as long as there is time; `write` is called after each, `say` told of each."""
    result = Tuned(left=len(rows))
    for row in rows:
        try:
            outcome = choose_row(row, table, bench)
        except OutOfTime:
            result.stopped = "out of time"
        except DeviceLost as error:
            result.stopped = f"{name(row)}: the device was lost: {error}"
        except KeyboardInterrupt:
            result.stopped = "interrupted"
        except Exception as error:  # whatever it is, the next row has its turn
            outcome = Outcome(row, table.default(row), None, {}, {table.default(row): one_line(error)})
        if result.stopped:
            break
        result.left -= 1
        result.outcomes.append(outcome)
        for config, why in outcome.dropped.items():
            say(f"{name(row)}: {list(astuple(config))} dropped: {why}")
        say(str(outcome))
        if outcome.config is not None:
            table.rows[row.key(table.arch)] = outcome.config
            write()
    return result
