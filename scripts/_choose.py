"""Choosing launch configurations without a GPU: what compiled code says of a few candidates for each row of the table.

A candidate must spill no register, use the matrix units (half precision), copy streamed tokens asynchronously, fit the
shared memory, and leave room for as many programs as planned. Of those that do, the cheapest is taken: instructions
issued and bytes moved through the second-level cache for each score of the pattern, each at the rate the kernel study
assumes of an H200, added up as if nothing overlapped. Then every other call that takes the row must not spill either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from _compiled import PROCESSORS, Compiled, Launch, compile_launch
from _floors import DEVICES
from _kernel_cases import Case, Row, calls, launches, work
from nearfield.ops.triton import configs
from nearfield.ops.triton.configs import Config

__all__ = [
    "ARCHITECTURES", "PLAN", "TABLE", "Figures", "choose_rows", "figures", "planned", "roomy", "shipped", "streams", "written",
]  # fmt: skip

TABLE = Path(configs.__file__).parent / "configs.json"
ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
# Rows of any architecture fit the least shared memory of those that have no row of their own.
EVERYWHERE = ("sm_86", "sm_89", "sm_120")
PLAN = (
    "resident warps of a multiprocessor: 8 in two programs or more in half precision up to head_dim 64, "
    "4 beyond and in float32"
)
BYTE = DEVICES["h200"].issue_per_s / DEVICES["h200"].l2_bytes_per_s  # type: ignore[operator]
ALIKE = 1.1  # costs within this factor of the least count as equal: then the fewest instructions a score decide
FEW = 3  # candidates that are tried on further architectures
WORTH = 1.05  # an architecture gets a row of its own where the row of any architecture costs this much more

# (block_m, block_n, num_warps, num_stages), by precision, operation and slots or family.
_TILES = {
    "half": {
        "forward": ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "query": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        "key": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "bias": ((64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)),
    },
    "float": {
        "forward": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "query": ((64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "key": ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
        "bias": ((64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2), (64, 16, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
}
_CELLS = {
    16: ((1, 1), (1, 2), (1, 3), (2, 2), (4, 2)),
    32: ((1, 2), (2, 1), (2, 2), (2, 3), (4, 2), (8, 1)),
    64: ((2, 2), (4, 1), (4, 2), (4, 3), (8, 2), (8, 1), (16, 1)),
}


def candidates(row: Row) -> list[Config]:
    """Configurations that are compiled for a row."""
    group, name = row.op.split(".")
    if group == "window":
        slots = int(row.family.removeprefix("cell"))
        return [Config(slots, slots, *how, _run(row)) for how in _CELLS[slots]]
    tiles = _TILES[row.precision][name]
    if group == "neighborhood":
        return [Config(*tile, _run(row)) for tile in tiles]
    slots = int(row.family.removeprefix("region"))
    found = [Config(*tile, _run(row)) for tile in tiles if tile[0] <= slots]
    for block_n in (64, 32, 16) if row.precision == "float" else (64, 32):
        found += [Config(slots, block_n, warps, 2, _run(row)) for warps in _warps(slots, row.precision)]
    return list(dict.fromkeys(found))


def _run(row: Row) -> int:
    """Tiles or images that a program takes after each other; what it costs to begin one is not weighed here."""
    if row.group == "window" or row.op == "neighborhood.bias":
        return 16
    return 2 if row.group == "neighborhood" else 1


def _warps(slots: int, precision: str) -> tuple[int, ...]:
    return (slots // 16,) if precision == "half" else (slots // 16, slots // 8)


def planned(row: Row) -> tuple[int, int]:
    """(warps, programs) that a multiprocessor is to hold at least; in words: `PLAN`."""
    return (8, 2) if row.precision == "half" and row.block_d <= 64 else (4, 1)


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
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return self.compiled.programs() if self.compiled.registers is not None else 0

    @property
    def warps(self) -> int:
        """Warps that it holds."""
        return self.programs * self.compiled.warps


def figures(row: Row, case: Case, made: Sequence[Launch], arch: str, config: Config) -> Figures:
    """Compile the launches of a row in a case, all of one kernel with one configuration."""
    compiled = compile_launch(made[0], arch, sass=arch.startswith("sm_"))
    rounds, wrong = work(case, made), _wrong(row, case, compiled)
    if compiled.code is None:
        return Figures(case, config, compiled, 0.0, 0.0, 0.0, wrong)
    issued = rounds.per_useful_score(compiled)
    cost = issued + BYTE * rounds.moved / rounds.useful
    return Figures(case, config, compiled, rounds.per_score(compiled), issued, cost, wrong)


def _wrong(row: Row, case: Case, compiled: Compiled) -> str:
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


def roomy(row: Row, compiled: Compiled) -> bool:
    """Whether a multiprocessor holds as many programs as planned."""
    warps, programs = planned(row)
    return compiled.programs() >= programs and compiled.programs() * compiled.warps >= warps


def streams(row: Row) -> bool:
    """Whether the kernel's inner loop streams tokens past resident ones."""
    return row.group != "window" and not row.op.endswith(".bias")


def shipped() -> dict[str, Config]:
    """The table as it is in the file."""
    return {key: Config(*values) for key, values in json.loads(TABLE.read_text(encoding="utf-8"))["configs"].items()}


class _Site:
    """The rows of one call: operations that share precision, head dimension and family, and so tiles and tests."""

    def __init__(self, rows: list[Row], seeds: Mapping[str, Config], say: Callable[[str], None]) -> None:
        self.rows, self.seeds, self.say = rows, seeds, say
        self.good: dict[tuple[Row, str], list[Figures]] = {}

    def choose(self) -> dict[str, Config]:
        """Configurations by key. ValueError where no candidate of a row will do."""
        for row in self.rows:
            for arch in ARCHITECTURES:
                self._rank(row, arch, self._first(row, arch))
        while failing := self._failing():
            for row, arch in failing:
                bad = self._picked(row, arch)
                self.good[row, arch] = [f for f in self.good[row, arch] if f.config != bad]
                if not self.good[row, arch]:
                    self._rank(row, arch, [c for c in candidates(row) if c != bad])
        found = {}
        for row in self.rows:
            anywhere = self._anywhere(row)
            found[row.key("*")] = anywhere
            for arch in ARCHITECTURES:
                if (own := self._picked(row, arch)) != anywhere:
                    found[row.key(arch)] = own
        return found

    def _first(self, row: Row, arch: str) -> list[Config]:
        """Candidates to begin with: what a similar row took, or the best on the first architecture."""
        if seeds := [self.seeds[key] for key in (row.key(arch), row.key("*")) if key in self.seeds]:
            return seeds[:1]
        if arch != ARCHITECTURES[0]:
            return [f.config for f in self.good[row, ARCHITECTURES[0]][:FEW]]
        return candidates(row)

    def _rank(self, row: Row, arch: str, tried: list[Config]) -> None:
        """Compile the usual call with candidates, with all where none of the first will do; keep the good, best first."""
        good: list[Figures] = []
        for config in (*tried, *(c for c in candidates(row) if c not in tried)):
            if config not in tried and any(roomy(row, f.compiled) for f in good):
                break
            made, wrong = self._usual(row, arch, config)
            wrong = wrong if made is None else made.wrong
            size = "" if made is None else f", {made.compiled.registers} registers, {made.warps} warps"
            cost = "" if made is None else f"{made.per_score:.1f} instructions a score, cost {made.cost:.0f}"
            self.say(f"{row.key(arch)} {list(astuple(config))[:4]}: {wrong or cost}{size}")
            if made is not None and not made.wrong:
                good.append(made)
        good = [f for f in good if roomy(row, f.compiled)] or good
        if not good:
            raise ValueError(f"no configuration of {row.key(arch)} will do: add smaller candidates to {Path(__file__).name}")
        least = min(f.cost for f in good)
        self.good[row, arch] = sorted(good, key=lambda f: (f.cost > ALIKE * least, f.per_score))

    def _picked(self, row: Row, arch: str) -> Config:
        """Configuration that a row takes on an architecture: that of any architecture where it costs about the same."""
        own, anywhere = self.good[row, arch], self._anywhere(row)
        same = next((f for f in own if f.config == anywhere), None)
        return own[0].config if same is None or same.cost > WORTH * own[0].cost else anywhere

    def _anywhere(self, row: Row) -> Config:
        """Configuration for architectures without rows of their own, which have the least shared memory."""
        made = self.good[row, "sm_80"]
        fitting = [f for f in made if all(f.compiled.programs(arch) for arch in EVERYWHERE)]
        return (fitting or made)[0].config

    def _chosen(self, row: Row, arch: str, config: Config) -> dict[str, Config]:
        """Configurations of all operations of a call that takes `config` for this row."""
        made = {}
        for other in self.rows:
            known = self.good.get((other, arch))
            made[other.op] = known[0].config if known else candidates(other)[0]
        return made | {row.op: config}

    def _usual(self, row: Row, arch: str, config: Config) -> tuple[Figures | None, str]:
        """Figures of the usual call that launches this row, or why there are none."""
        try:
            for case in calls(row):
                if made := launches(case, arch, self._chosen(row, arch, config)).get(row.op):
                    return figures(row, case, made, arch, config), ""
        except Exception as error:  # Triton and ptxas raise many kinds
            return None, _said(error)
        return None, "not launched"

    def _failing(self) -> list[tuple[Row, str]]:
        """Rows and architectures where some call must not take the configuration that was picked."""
        found: dict[tuple[Row, str], None] = {}
        for arch in ARCHITECTURES:
            picked = {row.op: self._picked(row, arch) for row in self.rows}
            for case in calls(self.rows[0]):
                for row, wrong in self._tried(case, arch, picked):
                    self.say(f"{row.key(arch)} {list(astuple(picked[row.op]))[:4]}: {case}: {wrong}")
                    found[row, arch] = None
        return list(found)

    def _tried(self, case: Case, arch: str, picked: Mapping[str, Config]) -> Iterator[tuple[Row, str]]:
        made = launches(case, arch, picked)
        for row in self.rows:
            if row.op not in made:
                continue
            try:
                wrong = figures(row, case, made[row.op], arch, picked[row.op]).wrong
            except Exception as error:
                wrong = _said(error)
            if wrong:
                yield row, wrong


def _said(error: Exception) -> str:
    """An error of a compiler in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def choose_rows(wanted: Sequence[Row], say: Callable[[str], None]) -> dict[str, Config]:
    """Configurations for rows, by key.

    Raises:
        ValueError: no candidate of a row will do.
    """
    sites: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in wanted:
        sites.setdefault((row.group, row.precision, row.block_d, row.family), []).append(row)
    found: dict[str, Config] = {}
    for group, precision, block_d, family in sorted(sites, key=lambda site: (site[2] == 16, site[3] == "curve")):
        like = {"curve": "plane"}.get(family, family), 32 if block_d == 16 else block_d
        seeds = {}
        for key, config in found.items():
            op, arch, *rest = key.split(" ")
            if op.startswith(group) and rest == [precision, str(like[1]), like[0]]:
                seeds[f"{op} {arch} {precision} {block_d} {family}"] = config
        found |= _Site(sites[group, precision, block_d, family], seeds, say).choose()
    return found


def written(rows: Mapping[str, Config]) -> str:
    """The table as text, a row a line."""
    head: dict[str, Any] = {
        "measured": None,
        "chosen_from": "compiled code, not measured: python scripts/kernels.py --choose",
        "plan": PLAN,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(list(astuple(rows[key])))}" for key in sorted(rows)]
    top = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    return "{\n" + top + '"configs": {\n' + ",\n".join(lines) + "\n}\n}\n"
