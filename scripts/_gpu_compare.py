"""One comparison: Nearfield's operator held against its definition, then timed among its peers, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from _gpu_floors import BACKWARD, BOTH, FORWARD, floor_us
from _gpu_problems import (
    LIMITS,
    OF_TABLE,
    PEERS_MAY,
    Attention,
    Inputs,
    Named,
    Runner,
    Shape,
    against_reference,
    ours,
    relative_errors,
)
from _gpu_rows import Bound, Row, add_target, make_peer, make_row
from _gpu_tasks import Context, Task
from _gpu_timing import Run, Timing, attempt, measure

OURS = "nearfield"


@dataclass(frozen=True)
class Contender:
    """A peer of a case.

    Args:
        name: as the table prints it.
        make: builds it on inputs.
        group: peers of one group compete, and a target holds for the fastest of them; its own name by default.
        bound: "most" where ours is expected to cost no more than so many times this.
        first_s: seconds that its first call may take, compiling included.
        passes: in which it takes part.
    """

    name: str
    make: Callable[[Inputs, Context], Runner]
    group: str = ""
    bound: Bound = "least"
    first_s: float = 2.0
    passes: tuple[str, ...] = (FORWARD, BOTH)


@dataclass(frozen=True)
class Case:
    """One operator on one shape, with its peers.

    Args:
        key: short name, to choose it by.
        claim: of the kernel study.
        name: what is computed.
        attention: the operator.
        shape: on which it is timed.
        small: side of the map on which it is held against the definition, and of a dry run.
        contenders: the peers.
        passes: what is timed.
        most_us: targets in microseconds, by pass.
        ratios: targets against a group of peers, by (group, pass).
        least_fraction: target for the fraction of the floor, forward and backward.
        memory: also compare the peak of memory, target in multiples of inputs and outputs.
    """

    key: str
    claim: str
    name: str
    attention: Attention
    shape: Shape
    small: int
    contenders: tuple[Contender, ...] = ()
    passes: tuple[str, ...] = (FORWARD, BOTH, BACKWARD)
    most_us: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[tuple[str, str], float] = field(default_factory=dict)
    least_fraction: float | None = None
    memory: float | None = None

    def task(self) -> Task:
        """The task that makes the rows of this case."""
        compiling = sum(c.first_s * len(c.passes) for c in self.contenders)
        return Task(self.key, self._plan, self._run, needs_s=8.0, most_s=40.0 + compiling)

    def wanted(self) -> list[str]:
        """The targets, in words."""
        texts = [f"{what} <= {limit:g} us" for what, limit in self.most_us.items()]
        if self.least_fraction is not None:
            texts.append(f">= {100 * self.least_fraction:g} % of the floor's speed")
        for (group, what), limit in self.ratios.items():
            least = self._members(group)[0].bound == "least"
            texts.append(f"{what} >= {limit:g} x {group}" if least else f"{what} <= {limit:g} of {group}")
        return texts

    def _members(self, group: str) -> list[Contender]:
        return [c for c in self.contenders if (c.group or c.name) == group]

    def _row(self, what: str, **fields: Any) -> Row:
        common = {"shape": str(self.shape), "dtype": self.shape.dtype_name}
        return make_row("ops", self.claim, self.name, what, **common | fields)

    def _plan(self) -> list[Row]:
        rows = [self._row(what) for what in self.passes]
        return rows + [self._row(f"peak memory, {what}", unit=MEMORY) for what in (FORWARD, BOTH) if self.memory]

    def _run(self, context: Context) -> list[Row]:
        if context.dry:  # on a small map, in the dtype that a processor computes in
            shape = replace(self.shape, heads=min(2, self.shape.heads), dtype=torch.float32)
            return replace(self, shape=shape.small(self.small, 1))._measured(context)
        return self._measured(context)

    def _measured(self, context: Context) -> list[Row]:
        torch._dynamo.reset()
        place, backend = context.device.place, context.backend
        guarded = self.shape.small(self.small, 1 if context.dry else 3)  # an odd batch
        errors = attempt(context.device, partial(against_reference, self.attention, guarded, backend, place))
        complaint = errors if isinstance(errors, str) else wrong(errors, LIMITS[self.shape.dtype])
        if complaint:
            errors = {} if isinstance(errors, str) else errors
            return [{**row, "note": f"not timed: {complaint}", "errors": errors} for row in self._plan()]
        inputs = Inputs.make(self.attention, self.shape, place)
        runners: dict[str, Runner] = {OURS: ours(self.attention, inputs, backend)}
        failed: dict[str, str] = {}
        for contender in self.contenders:
            built = attempt(context.device, partial(contender.make, inputs, context))
            if isinstance(built, str):
                failed[contender.name] = built
            else:
                runners[contender.name] = built
        rows = [self._pass(context, what, runners, failed, errors) for what in self.passes]
        if self.memory and not context.dry:
            rows += [self._memory(context, what, runners) for what in (FORWARD, BOTH)]
        return rows

    def _pass(
        self, context: Context, what: str, runners: Mapping[str, Runner], failed: Mapping[str, str], errors: Any
    ) -> Row:
        taking_part = {OURS} | {c.name for c in self.contenders if what in c.passes}
        runs = {name: _call(runner, what) for name, runner in runners.items() if name in taking_part}
        limit = PEERS_MAY * LIMITS[self.shape.dtype]
        times = measure(
            context.device,
            runs,
            rounds=context.rounds,
            seconds=context.round_seconds,
            graph=what != BACKWARD,  # of a pass that ran outside of a capture, the backward cannot be captured
            inspect=None if what == BACKWARD else Comparison(runners, limit),
            left_s=context.left_s,
            needs_s={c.name: c.first_s for c in self.contenders} if not context.dry else None,
        )
        mine = times[OURS]
        bound, floor_of = floor_us(self.attention, self.shape, what, context.device.name)
        figures = {"note": mine} if isinstance(mine, str) else {"ours": mine.device_us, **_beside(mine)}
        row = self._row(what, floor=bound, floor_of=floor_of, errors=errors, **figures)
        for contender in self.contenders:
            if what in contender.passes:
                time = times.get(contender.name, failed.get(contender.name, ""))
                row["peers"].append(_peer(contender, time, row, runners.get(contender.name)))
        if not context.dry:  # targets hold for the full shapes
            self._targets(row, what)
        return row

    def _targets(self, row: Row, what: str) -> None:
        if what in self.most_us:
            add_target(row, "us", self.most_us[what], "most", row["ours"])
        if self.least_fraction is not None and what != BOTH:
            add_target(row, "fraction of the floor", self.least_fraction, "least", row["fraction"])
        if what == BOTH and OF_TABLE in row["errors"]:
            limit = 1e-5 if self.shape.dtype == torch.float32 else 1e-2
            add_target(row, "error of the bias gradient", limit, "most", row["errors"][OF_TABLE])
        for (group, which), limit in self.ratios.items():
            if which == what:
                members = self._members(group)
                names = {c.name for c in members}
                ratios = [p["ratio"] for p in row["peers"] if p["name"] in names and p["ratio"] is not None]
                of = f"x {group}" if members[0].bound == "least" else f"of {group}"
                # the fastest of a group is the one over which ours gains least
                add_target(row, of, limit, members[0].bound, min(ratios) if ratios else None)

    def _memory(self, context: Context, what: str, runners: Mapping[str, Runner]) -> Row:
        """Peak of memory in multiples of q, k, v and output, with their gradients where those are computed too."""
        row = self._row(f"peak memory, {what}", unit=MEMORY)
        one = self.shape.batch * self.shape.tokens * self.shape.channels * self.shape.dtype.itemsize
        held, least = (3 * one, 4 * one) if what == FORWARD else (4 * one, 8 * one)
        for name, runner in runners.items():
            peak = attempt(context.device, partial(context.device.peak_bytes, _call(runner, what)))
            value, note = ((held + peak) / least, "") if isinstance(peak, int) else (None, str(peak))
            if name == OURS:
                row |= {"ours": value, "note": note}
            else:
                row["peers"].append(make_peer(name, value, row, note=note))
        if self.memory is not None:
            add_target(row, "of q, k, v, o", self.memory, "most", row["ours"])
        return row


MEMORY = "x q, k, v, o"


def _call(runner: Runner, what: str) -> Run:
    calls: dict[str, Run] = {FORWARD: runner.forward, BOTH: runner.training, BACKWARD: _Backward(runner)}
    return calls[what]


class _Backward:
    """Backward pass of one forward pass, which is made when it is first called."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.run: Run | None = None

    def __call__(self) -> Any:
        self.run = self.run or self.runner.backward()
        return self.run()


class Comparison:
    """Holds the first results of peers against those of ours, which come first."""

    def __init__(self, runners: Mapping[str, Runner], limit: float) -> None:
        self.runners, self.limit = runners, limit
        self.ours: Named = {}

    def __call__(self, name: str, result: Any) -> None:
        runner = self.runners[name]
        if name == OURS:
            self.ours = runner.named(result)
        elif runner.same:
            complaint = wrong(relative_errors(runner.named(result), self.ours), self.limit)
            if complaint:
                raise ValueError(f"computes something else: {complaint}")


def wrong(errors: Mapping[str, float], limit: float) -> str:
    """What is further off than allowed; empty where nothing is."""
    off = [f"{key} is off by {error:.1e}, allowed is {limit:.1e}" for key, error in errors.items() if error > limit]
    return "; ".join(off)


def _peer(contender: Contender, time: Timing | str, row: Row, runner: Runner | None) -> dict[str, Any]:
    if isinstance(time, str):
        return make_peer(contender.name, None, row, bound=contender.bound, note=time or "not measured")
    return make_peer(
        contender.name,
        time.device_us,
        row,
        bound=contender.bound,
        note=runner.note if runner else "",
        **_beside(time),
    )


def _beside(time: Timing) -> dict[str, Any]:
    """What is recorded beside the device's time."""
    names = ("call_us", "host_us", "graph_us", "first_s")
    return {name: getattr(time, name) for name in names}
