"""Choosing launch configurations without a GPU: what compiled code says of a few candidates for each row of the table.

A candidate must spill no register, use the matrix units (in half precision), copy streamed tokens asynchronously and
fit the shared memory. Those that also leave room for the planned programs come first. Of them the cheapest are taken,
where the cost counts instructions issued and bytes moved through the second-level cache for each score of the pattern,
each at the rate that the kernel study assumes of an H200, added up as if nothing overlapped; and of those that cost
about the same the one with the fewest instructions a score, weighed against resident warps. Then no other call that
takes the row may spill either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from _compiled import PROCESSORS, Compiled, Launch, compile_launch
from _floors import DEVICES
from _kernel_cases import Case, Row, calls, launches, work
from nearfield.ops.triton import configs
from nearfield.ops.triton.configs import Config

__all__ = [
    "EVERYWHERE",
    "PLAN",
    "Figures",
    "candidates",
    "choose_rows",
    "figures",
    "planned",
    "replaced",
    "roomy",
    "shipped",
    "streams",
    "written",
    "wrong_with",
]  # fmt: skip

ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
# These take the rows of any architecture, which are chosen on sm_80; they share its code and have less memory.
EVERYWHERE = ("sm_86", "sm_89", "sm_120")
PLACES = ("*", *ARCHITECTURES)  # that chosen rows are kept for; those for the interpreter ("cpu") are written by hand
PLAN = (
    "warps resident on a multiprocessor: at least 8 in half precision up to head_dim 64; at least 4 beyond, and in "
    "float32"
)
BYTE = DEVICES["h200"].issue_per_s / DEVICES["h200"].l2_bytes_per_s  # type: ignore[operator]
ALIKE = 1.25  # costs within this factor of the least count as equal, the rates being assumed: then instructions decide
WAITING = 4.0  # what waiting costs, in instructions of every warp over its own, where one warp alone is resident
WORTH = 1.05  # an architecture gets a row of its own where the row of any architecture costs this much more
FEW = 3  # candidates that are tried on further architectures

# (block_m, block_n, num_warps, num_stages) by precision and operation; the bias gradient shares the tiles of dQ.
_TILES = {
    "half": {
        "forward": ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "query": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 2, 2), (32, 32, 2, 2)),
        "key": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "bias": ((64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)),
    },
    "float": {
        "forward": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "query": ((64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "key": ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
        "bias": ((64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2), (64, 16, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
}
# Where kernels look terms up, which takes registers of its own, also smaller tiles.
_LOOKUPS = {
    "half": ((64, 16, 4, 2), (64, 16, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 2, 2)),
    "float": ((64, 16, 8, 2), (32, 32, 16, 2), (32, 16, 8, 2), (16, 16, 2, 2)),
}
# (num_warps, num_stages) by slots of a cell.
_CELLS = {
    16: ((1, 1), (1, 2), (1, 3), (2, 2), (4, 2)),
    32: ((1, 2), (2, 1), (2, 2), (2, 3), (4, 2), (8, 1)),
    64: ((2, 2), (4, 1), (4, 2), (4, 3), (8, 2), (8, 1), (16, 1)),
}


def candidates(row: Row) -> list[Config]:
    """Configurations that are compiled for a row."""
    group, name = row.op.split(".")
    run = 16 if group == "window" or name == "bias" else 2 if group == "neighborhood" else 1
    if group == "window":
        slots = int(row.family.removeprefix("cell"))
        return [Config(slots, slots, *how, run) for how in _CELLS[slots]]
    tiles = list(_TILES[row.precision][name])
    if row.family == "lookup" and name != "bias":
        tiles += _LOOKUPS[row.precision]
    if group == "routing":  # a tile holds one region, or a part of it
        slots = int(row.family.removeprefix("region"))
        own = [(slots, n, warps, 2) for n in (64, 32, 16) for warps in (slots // 16, slots // 8)]
        tiles = [tile for tile in tiles if tile[0] < slots] + own
    return [Config(*tile, run) for tile in tiles]


def planned(row: Row) -> tuple[int, int]:
    """(warps, programs) that a multiprocessor is to hold at least; in words: `PLAN`."""
    return (8, 1) if row.precision == "half" and row.block_d <= 64 else (4, 1)


def roomy(row: Row, compiled: Compiled) -> bool:
    """Whether a multiprocessor holds as many programs as planned."""
    warps, programs = planned(row)
    return compiled.programs() >= programs and compiled.programs() * compiled.warps >= warps


def streams(row: Row) -> bool:
    """Whether the kernel's inner loop streams tokens past resident ones."""
    return row.group != "window" and not row.op.endswith(".bias")


@dataclass(frozen=True)
class Figures:
    """What compiled code says of one operation of a call.

    Attributes:
        per_score, per_useful_score: instructions, see `Work`.
        cost: of every useful score, in instructions.
        wrong: why it must not be shipped; empty where it may.
    """

    case: Case
    config: Config
    compiled: Compiled
    per_score: float
    per_useful_score: float
    cost: float
    wrong: str

    @property
    def covered(self) -> float:
        """Instructions a score, and more of them the fewer warps are resident to cover what one of them waits for."""
        return self.per_score * (1 + WAITING / max(self.compiled.programs() * self.compiled.warps, 1))


def figures(row: Row, case: Case, made: Sequence[Launch], arch: str, config: Config) -> Figures:
    """Compile the launches of a row in a case, all of one kernel with one configuration."""
    compiled = compile_launch(made[0], arch, sass=arch.startswith("sm_"))
    rounds, wrong = work(case, made), wrong_with(row, case, compiled)
    if compiled.code is None:
        return Figures(case, config, compiled, 0.0, 0.0, 0.0, wrong)
    issued = rounds.per_useful_score(compiled)
    cost = issued + BYTE * rounds.moved / rounds.useful
    return Figures(case, config, compiled, rounds.per_score(compiled), issued, cost, wrong)


@lru_cache(maxsize=4)  # rows of one call come one after another
def _launches(case: Case, arch: str) -> dict[str, list[Launch]]:
    return launches(case, arch)


def shipped(row: Row, arch: str, cases: Sequence[Case] | None = None) -> tuple[Case, Config, list[Launch]] | None:
    """The first of a row's calls, or of those given, that launches it, with its shipped configuration and launches.

    None where no call does, as for cells that are left to tiles.
    """
    if not configs.known(row.op, arch, row.precision, row.block_d, row.family):
        return None
    config = configs.choose(row.op, arch, row.precision, row.block_d, row.family)
    for case in cases or calls(row):
        if made := _launches(case, arch).get(row.op):
            return case, config, made
    return None


def wrong_with(row: Row, case: Case, compiled: Compiled) -> str:
    """Why compiled code must not be shipped; empty where it may."""
    if compiled.shared_bytes > PROCESSORS[compiled.arch].program_shared:
        return f"{compiled.shared_bytes} bytes of shared memory"
    if (row.precision == "half" or case.tf32) and not compiled.matrix_instructions:
        return "no matrix instructions"
    if compiled.registers is None:
        return ""
    if compiled.spill_bytes:
        return f"spills {compiled.spill_bytes} bytes"
    if streams(row) and not compiled.async_copies:
        return "no asynchronous copies"
    return ""


class _NothingError(ValueError):
    """No candidate of a row will do."""


class _Site:
    """The rows of one call: operations that share precision, head dimension and family, and so tiles and tests."""

    def __init__(self, rows: list[Row], seeds: Mapping[str, Config], say: Callable[[str], None]) -> None:
        self.rows, self.seeds, self.say = rows, seeds, say
        self.architectures = list(ARCHITECTURES)
        self.good: dict[tuple[Row, str], list[Figures]] = {}
        self.bad: set[tuple[Row, str, Config]] = set()
        self.amd: dict[tuple[Row, Config], bool] = {}

    def choose(self) -> dict[str, Config]:
        """Configurations by key; for cells that are too large for an architecture none.

        Raises:
            ValueError: no candidate of a row will do, and the kernel has to.
        """
        for arch in ARCHITECTURES:
            self._ranked(arch, lambda arch=arch: [self._rank(row, arch) for row in self.rows])  # type: ignore[func-returns-value,misc]
        while failing := self._failing():
            for row, arch in failing:
                self.bad.add((row, arch, self._picked(row, arch)))
            for row, arch in failing:
                self._ranked(arch, lambda row=row, arch=arch: self._rank(row, arch))  # type: ignore[misc]
        anywhere = self.architectures == list(ARCHITECTURES)
        found = {}
        for row in self.rows:
            if anywhere:
                found[row.key("*")] = self._anywhere(row)
            for arch in self.architectures:
                if not anywhere or self._picked(row, arch) != self._anywhere(row):
                    found[row.key(arch)] = self._picked(row, arch)
        return found

    def _ranked(self, arch: str, rank: Callable[[], object]) -> None:
        """Rank candidates; leave the architecture out where that gives none and tiles can take the place of cells."""
        try:
            if arch in self.architectures:
                rank()
        except _NothingError as error:
            if self.rows[0].group != "window":
                raise
            self.say(f"{error}: left to tiles")
            self.architectures.remove(arch)

    def _rank(self, row: Row, arch: str) -> None:
        """Compile the usual call with some candidates, with all where none will do; keep the good, best first."""
        good: list[Figures] = []
        first = self._first(row, arch)
        for config in dict.fromkeys((*first, *candidates(row))):
            if config not in first and any(roomy(row, f.compiled) for f in good):
                break
            if (row, arch, config) in self.bad:
                continue
            made, wrong = self._usual(row, arch, config)
            wrong = wrong if made is None else made.wrong
            text = f"{row.key(arch)} {list(astuple(config))[:4]}: "
            if made is None or wrong:
                self.say(text + wrong)
                continue
            resident = made.compiled.programs() * made.compiled.warps
            self.say(
                f"{text}{made.per_score:.1f} instructions a score, cost {made.cost:.0f}, "
                f"{made.compiled.registers} registers, {resident} warps"
            )
            good.append(made)
        if not good:
            raise _NothingError(f"no configuration of {row.key(arch)} will do")

        def tier(f: Figures) -> tuple[bool, bool]:
            return not roomy(row, f.compiled), row.precision == "half" and not f.compiled.async_copies

        ranked = []
        for _, alike in groupby(sorted(good, key=lambda f: (tier(f), f.cost)), tier):
            group = list(alike)
            ranked += sorted(group, key=lambda f: (f.cost > ALIKE * group[0].cost, f.covered))
        self.good[row, arch] = ranked

    def _first(self, row: Row, arch: str) -> list[Config]:
        """Candidates to begin with: what a similar row took, or the best on the first architecture."""
        if seeds := [self.seeds[key] for key in (row.key(arch), row.key("*")) if key in self.seeds]:
            return seeds[:1]
        known = self.good.get((row, ARCHITECTURES[0]))
        return [f.config for f in known[:FEW]] if known and arch != ARCHITECTURES[0] else candidates(row)

    def _picked(self, row: Row, arch: str) -> Config:
        """Configuration that a row takes on an architecture: that of any architecture where it costs about the same."""
        own = self.good[row, arch]
        if self.architectures != list(ARCHITECTURES):
            return own[0].config
        same = next((f for f in own if f.config == self._anywhere(row)), None)
        if same is None or same.cost > WORTH * own[0].cost or same.covered > WORTH * own[0].covered:
            return own[0].config
        return same.config

    def _anywhere(self, row: Row) -> Config:
        """Configuration for architectures without rows of their own, which have less shared memory."""
        made = self.good[row, "sm_80"]
        fitting = [f.config for f in made if all(f.compiled.programs(arch) for arch in EVERYWHERE)]
        return next((config for config in fitting if self._on_amd(row, config)), (fitting or [made[0].config])[0])

    def _on_amd(self, row: Row, config: Config) -> bool:
        if (key := (row, config)) not in self.amd:
            made, _ = self._usual(row, "gfx942", config)
            self.amd[key] = made is not None and not made.wrong
        return self.amd[key]

    def _chosen(self, row: Row, arch: str, config: Config) -> dict[str, Config]:
        """Configurations of all operations of a call that takes `config` for this row."""
        made = {}
        for other in self.rows:
            known = self.good.get((other, arch))
            made[other.op] = known[0].config if known else candidates(other)[0]
        return made | {row.op: config}

    def _usual(self, row: Row, arch: str, config: Config) -> tuple[Figures | None, str]:
        """Figures of the first call that launches this row, or why there are none."""
        try:
            for case in calls(row):
                made = launches(case, arch, self._chosen(row, arch, config))
                if row.op in made:
                    found = figures(row, case, made[row.op], arch, config)
                    # What dQ does not take along, a pass of its own has to do.
                    left = [r for r in self.rows if r.op == "neighborhood.bias" and r.op in made and "query" in row.op]
                    costs = [figures(r, case, made[r.op], arch, config).cost for r in left]
                    return replace(found, cost=found.cost + sum(costs)), ""
        except Exception as error:  # Triton and ptxas raise many kinds
            return None, _said(error)
        return None, "not launched"

    def _failing(self) -> list[tuple[Row, str]]:
        """Rows and architectures where some call must not take the configuration that was picked."""
        found: dict[tuple[Row, str], None] = {}
        for arch in self.architectures:
            picked = {row.op: self._picked(row, arch) for row in self.rows}
            for case in self._checked(arch):
                for row, wrong in self._tried(case, arch, picked):
                    self.say(f"{row.key(arch)} {list(astuple(picked[row.op]))[:4]}: {case}: {wrong}")
                    found[row, arch] = None
        return list(found)

    def _checked(self, arch: str) -> list[Case]:
        """Calls that are compiled with what was picked: all on the first architecture, every kind of bias on others."""
        every = calls(self.rows[0])
        if arch == ARCHITECTURES[0]:
            return every
        if self.rows[0].precision == "half":
            return [case for case in every if case.d == case.dv == every[0].d]
        # Exact products are the same vector instructions everywhere, and take long to compile.
        return [case for case in every if case.terms == every[0].terms and case.d == case.dv == every[0].d]

    def _tried(self, case: Case, arch: str, picked: Mapping[str, Config]) -> Iterator[tuple[Row, str]]:
        made = launches(case, arch, picked)
        for row in self.rows:
            if row.op not in made:
                continue
            try:
                wrong = wrong_with(row, case, compile_launch(made[row.op][0], arch))
            except Exception as error:
                wrong = _said(error)
            if wrong:
                yield row, wrong


def _said(error: Exception) -> str:
    """An error of a compiler in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def choose_rows(
    wanted: Sequence[Row], table: Mapping[str, Config], say: Callable[[str], None]
) -> Iterator[tuple[list[Row], dict[str, Config]]]:
    """Configurations by key, for the rows of one call after another.

    table: what was chosen before. Curves begin with what planes took, and the least head dimension with the next.

    Raises:
        ValueError: no candidate of a row will do.
    """
    sites: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in wanted:
        sites.setdefault((row.group, row.precision, row.block_d, row.family), []).append(row)
    found = dict(table)
    for group, precision, block_d, family in sorted(sites, key=lambda s: (s[1] != "half", s[2] == 16, s[3] == "curve")):
        rows = sites[group, precision, block_d, family]
        like = replace(
            rows[0], block_d=32 if block_d == 16 else block_d, family="plane" if family == "curve" else family
        )
        seeds: dict[Any, Any] = {}
        if like != rows[0]:
            for row in rows:
                other = replace(row, block_d=like.block_d, family=like.family)
                seeds |= {row.key(a): found[other.key(a)] for a in PLACES if other.key(a) in found}
        made = _Site(rows, seeds, say).choose()
        found = replaced(found, rows, made)
        yield rows, made


def replaced(table: Mapping[str, Config], rows: Sequence[Row], made: Mapping[str, Config]) -> dict[str, Config]:
    """A table with what was chosen for some rows in the place of all that it had for them."""
    stale = {row.key(place) for row in rows for place in PLACES}
    return {key: config for key, config in table.items() if key not in stale} | dict(made)


def written(rows: Mapping[str, Config]) -> str:
    """The table as text, a row a line."""
    head: dict[str, Any] = {
        "measured": None,
        "chosen_from": "compiled code, nothing measured; python scripts/kernels.py --choose chooses anew",
        "plan": PLAN,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(list(astuple(rows[key])))}" for key in sorted(rows)]
    top = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    return "{\n" + top + '"configs": {\n' + ",\n".join(lines) + "\n}\n}\n"
