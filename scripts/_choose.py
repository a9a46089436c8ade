"""Choosing launch configurations without a GPU: what compiled code says of a few candidates for each row of the table.

A candidate must spill no register, use the matrix units (half precision), copy streamed tokens asynchronously, fit the
shared memory, and leave room for as many programs as planned. Of those that do, the cheapest is taken: instructions
issued and bytes moved through the second-level cache for each score of the pattern, each at the rate the kernel study
assumes of an H200, added up as if nothing overlapped. Then every other call that takes the row must not spill either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from _compiled import PROCESSORS, Compiled, compile_launch
from _floors import DEVICES
from _kernel_cases import PASSES, Case, Row, calls, launches, work
from nearfield.ops.triton import configs
from nearfield.ops.triton.configs import Config

__all__ = ["ARCHITECTURES", "PLAN", "TABLE", "Figures", "choose_rows", "figures", "planned_warps", "shipped", "written"]

TABLE = Path(configs.__file__).parent / "configs.json"
ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
# Rows of any architecture fit the least shared memory of those that have no row of their own.
EVERYWHERE = ("sm_86", "sm_89", "sm_120")
PLAN = (
    "resident warps of a multiprocessor: 8 in two programs or more in half precision up to head_dim 64, "
    "4 beyond and in float32"
)
BYTE = DEVICES["h200"].issue_per_s / DEVICES["h200"].l2_bytes_per_s  # type: ignore[operator]
ALIKE = 1.1  # costs within this factor count as equal: then the configuration that keeps more warps resident is taken
WORTH = 1.05  # an architecture gets a row of its own where the row of any architecture costs this much more

# (block_m, block_n, num_warps, num_stages), by precision, operation and slots or family.
_TILES = {
    "half": {
        "forward": ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "query": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        "key": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2), (32, 32, 2, 2), (16, 32, 1, 2)),
        "bias": ((0, 64, 4, 2), (0, 64, 4, 1), (0, 64, 8, 2), (0, 32, 4, 2), (0, 32, 8, 2), (0, 16, 4, 2)),
    },
    "float": {
        "forward": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "query": ((64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
        "key": ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
        "bias": ((0, 32, 4, 2), (0, 32, 8, 2), (0, 16, 4, 2), (0, 16, 8, 2), (0, 32, 8, 1), (0, 16, 8, 1)),
    },
}
_CELLS = {
    16: ((1, 1), (1, 2), (1, 3), (2, 2), (4, 2)),
    32: ((1, 2), (2, 1), (2, 2), (2, 3), (4, 2), (8, 1)),
    64: ((2, 2), (4, 1), (4, 2), (4, 3), (8, 2), (8, 1), (16, 1)),
}
RUN = {"window": 16, "neighborhood": 2, "routing": 1}
BIAS_RUN = 16


def candidates(row: Row) -> list[Config]:
    """Configurations that are compiled for a row."""
    group, name = row.op.split(".")
    if group == "window":
        slots = int(row.family.removeprefix("cell"))
        return [Config(slots, slots, *how, RUN[group]) for how in _CELLS[slots]]
    tiles = _TILES[row.precision][name]
    if group == "neighborhood":
        return [Config(*tile, BIAS_RUN if name == "bias" else RUN[group]) for tile in tiles]
    slots = int(row.family.removeprefix("region"))
    found = [Config(*tile, RUN[group]) for tile in tiles if tile[0] <= slots]
    for block_n in (64, 32, 16) if row.precision == "float" else (64, 32):
        found += [Config(slots, block_n, warps, 2, RUN[group]) for warps in _warps(slots, row.precision)]
    return list(dict.fromkeys(found))


def _warps(slots: int, precision: str) -> tuple[int, ...]:
    return (slots // 16,) if precision == "half" else (slots // 16, slots // 8)


def planned_warps(row: Row) -> tuple[int, int]:
    """(warps, programs) that a multiprocessor is to hold at least; in words: `PLAN`."""
    return (8, 2) if row.precision == "half" and row.block_d <= 64 else (4, 1)


@dataclass(frozen=True)
class Figures:
    """What compiled code says of one launch; what is wrong with it, where something is."""

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


def figures(row: Row, case: Case, arch: str, chosen: Mapping[str, Config] | None = None) -> Figures | None:
    """Compile a case's launch of a row; None where the case does not launch it."""
    launch = launches(case, arch, chosen).get(row.op)
    if launch is None:
        return None
    compiled = compile_launch(launch, arch, sass=arch.startswith("sm_"))
    rounds = work(case, launch)
    a = launch.arguments
    config = Config(a["BLOCK_M"], a.get("BLOCK_N", a["BLOCK_M"]), compiled.warps, launch.options["num_stages"], 0)
    if compiled.code is None:
        return Figures(case, config, compiled, 0.0, 0.0, 0.0, _wrong(row, case, compiled))
    issued = rounds.per_useful_score(compiled)
    cost = issued + BYTE * rounds.moved / rounds.useful
    return Figures(case, config, compiled, rounds.per_score(compiled), issued, cost, _wrong(row, case, compiled))


def _wrong(row: Row, case: Case, compiled: Compiled) -> str:
    """Why compiled code must not be shipped; empty where it may."""
    if compiled.shared_bytes > PROCESSORS[compiled.arch].program_shared:
        return f"{compiled.shared_bytes} bytes of shared memory"
    if (row.precision == "half" or case.tf32) and not compiled.matrix_instructions:
        return "no matrix instructions"
    if compiled.registers is None:
        return ""
    if compiled.spill_bytes:
        return f"spills {compiled.spill_bytes} bytes"
    if row.group != "window" and not row.op.endswith(".bias") and not compiled.async_copies:
        return "no asynchronous copies"
    warps, programs = planned_warps(row)
    if compiled.programs() < programs or compiled.programs() * compiled.warps < warps:
        return f"{compiled.programs()} programs of {compiled.warps} warps"
    return ""


def shipped() -> dict[str, Config]:
    """The table as it is in the file."""
    return {key: Config(*values) for key, values in json.loads(TABLE.read_text(encoding="utf-8"))["configs"].items()}


def choose_rows(wanted: list[Row], say: Callable[[str], None]) -> dict[str, Config]:
    """Configurations for rows, by key.

    Raises:
        ValueError: no candidate of a row will do.
    """
    found: dict[str, Config] = {}
    for row in wanted:
        best = {arch: _ranked(row, arch, found, say) for arch in ARCHITECTURES}
        shared = [f for f in best["sm_80"] if _fits_everywhere(row, f, found)] or best["sm_80"]
        if not shared or not all(best.values()):
            raise ValueError(f"no configuration of {row.key('*')} will do: add smaller candidates to scripts/_choose.py")
        found[row.key("*")] = _whole(row, shared[0].config)
        for arch, ranked in best.items():
            same = next((f for f in ranked if f.config == shared[0].config), None)
            if same is None or same.cost > WORTH * ranked[0].cost:
                found[row.key(arch)] = _whole(row, ranked[0].config)
    return found


def _whole(row: Row, config: Config) -> Config:
    """The candidate that a launch was made of."""
    for c in candidates(row):
        if (c.block_n, c.num_warps, c.num_stages) == astuple(config)[1:4] and c.block_m in (config.block_m, 0):
            return Config(config.block_m, *astuple(c)[1:])
    raise AssertionError(config)


def _chosen(row: Row, arch: str, found: Mapping[str, Config], config: Config) -> dict[str, Config]:
    """Configurations of all operations that a call launches with this row."""
    made = {}
    for name in PASSES[row.group]:
        other = Row(f"{row.group}.{name}", row.precision, row.block_d, row.family)
        keys = [key for key in (other.key(arch), other.key("*")) if key in found]
        made[other.op] = found[keys[0]] if keys else candidates(other)[0]
    return made | {row.op: config}


def _ranked(row: Row, arch: str, found: Mapping[str, Config], say: Callable[[str], None]) -> list[Figures]:
    """Candidates that will do, the best first; the first was compiled for every call that takes it."""
    good = []
    for config in candidates(row):
        made, wrong = _usual(row, arch, _chosen(row, arch, found, config))
        text = wrong if made is None else (made.wrong or f"{made.per_score:.1f} a score, cost {made.cost:.0f}")
        size = f", {made.compiled.registers} registers, {made.warps} warps" if made is not None else ""
        say(f"{row.key(arch)} {list(astuple(config))}: {text}{size}")
        if made is not None and not made.wrong:
            good.append(made)
    good.sort(key=lambda f: f.cost)
    while good:
        alike = [f for f in good if f.cost <= ALIKE * good[0].cost]
        first = max(alike, key=lambda f: f.warps)
        good.remove(first)
        failing = _failing(row, arch, _chosen(row, arch, found, _whole(row, first.config)))
        if not failing:
            return [first, *good]
        say(f"{row.key(arch)} {list(astuple(first.config))[:4]}: {failing}")
    return []


def _usual(row: Row, arch: str, chosen: Mapping[str, Config]) -> tuple[Figures | None, str]:
    """Figures of the usual call of a row, or why there are none."""
    try:
        made = [f for case in calls(row)[:1] if (f := figures(row, case, arch, chosen))]
        made = made or [f for case in calls(row) if (f := figures(row, case, arch, chosen))][:1]
    except Exception as error:  # Triton and ptxas raise many kinds
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return (made[0], "") if made else (None, "not launched")


def _failing(row: Row, arch: str, chosen: Mapping[str, Config]) -> str:
    """The first other call that must not be shipped with this configuration, and why; empty where there is none."""
    for case in calls(row):
        try:
            made = figures(row, case, arch, chosen)
        except Exception as error:
            return f"{case}: {type(error).__name__}"
        if made is not None and made.wrong and not made.wrong.endswith("warps"):
            return f"{case}: {made.wrong}"
    return ""


def _fits_everywhere(row: Row, made: Figures, found: Mapping[str, Config]) -> bool:
    """Whether architectures without rows of their own can launch it too."""
    if any(made.compiled.shared_bytes > PROCESSORS[arch].program_shared for arch in EVERYWHERE):
        return False
    amd, _ = _usual(row, "gfx942", _chosen(row, "*", found, _whole(row, made.config)))
    return amd is not None and not amd.wrong


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
