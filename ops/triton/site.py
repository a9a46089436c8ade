"""Where a call runs: everything its kernels are compiled for, and the schedule of each pass. Cached, batch left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind, bias_kind
from ..cache import SCHEDULES
from ..patterns import Pattern, resolve
from .axis_tiles import axis_tiles
from .cells import Cells, cell_slots, cells
from .configs import Config, architecture, choose, known, precision_name
from .launch import Strides, call_constants, constants, power_of_two, precision
from .launcher import Launcher
from .schedule import Schedule, choose_tile, schedule

__all__ = ["CellPass", "Site", "TilePass", "cell_pass", "make_site", "tile_pass"]

MOST_TABLE = 64  # rows or columns of a bias table whose gradient a program holds
GRID_COST = 1.25  # what the gradient of a bias table may add to the dQ pass, which spares a pass of its own
ATLAS_BYTES = 16 << 20  # larger tables of tiles are not made: entries are looked up in the kernel


@dataclass(frozen=True, eq=False)
class Site:
    """A pattern on a map, the tensors' sizes and strides, the bias's kind: one object for all calls that agree in them.

    Attributes:
        bias_dtype: None where there is no bias.
        entries: of a bias table, per head. rel_rows: of the two tables of a decomposed bias.
        layout: name in the kernels and strides of every tensor that is not made by the op itself.
    """

    pattern: Pattern
    height: int
    width: int
    heads: int
    d: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    kind: BiasKind
    bias_dtype: torch.dtype | None
    entries: int
    rel_rows: tuple[int, int]
    layout: tuple[tuple[str, Strides], ...]
    precision: str

    def config(self, op: str, family: str) -> Config:
        """Launch configuration of a kernel."""
        block_d = power_of_two(max(self.d, self.dv))
        return choose(op, architecture(self.device), precision_name(self.dtype), block_d, family)

    @property
    def families(self) -> tuple[str, ...]:
        """Kinds of tiles that configurations are kept for, the first that its bias allows taken.

        "plane" and "curve" read bias and mask from an atlas, "lookup" finds them score by score.
        """
        if self.kind not in (BiasKind.NONE, BiasKind.TABLE):
            return ("lookup",)
        return ("plane" if self.pattern.curve is None else "curve", "lookup")

    @property
    def coded(self) -> BiasKind:
        """The bias that tiles carry table codes for."""
        return self.kind if self.kind in (BiasKind.TABLE, BiasKind.DECOMPOSED) else BiasKind.NONE

    @property
    def centre(self) -> int:
        """Entry of displacement 0 in a table of true positions."""
        return (self.height - 1) * (2 * self.width - 1) + self.width - 1

    def constants(self, names: tuple[str, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Constants that every kernel takes, and the image strides, in units, of the tensors that this one reads.

        None of them says how large the map is, but for a table of true positions, whose size is the map's.
        """
        layout = dict(self.layout)
        made = call_constants(
            layout, self.height * self.width, self.heads, self.d, self.dv, self.precision, row=sum(self.rel_rows)
        )
        centre = self.centre if self.kind is BiasKind.POSITIONS else 0
        made |= {"ENTRIES": self.entries, "CENTRE": centre, "CURVE": self.pattern.curve is not None}
        made |= constants({name: layout[name] for name in names})
        return made, tuple(layout[name].image // made["UNIT"] for name in names)

    def codes(self, held: Tensor) -> Tensor:
        """(H*W,) int32: a token's part in its entry of a table of true positions; any tensor for other kinds."""
        if self.kind is not BiasKind.POSITIONS:
            return held
        token = np.arange(self.height * self.width)
        code = token // self.width * (2 * self.width - 1) + token % self.width
        return torch.from_numpy(code.astype(np.int32)).to(self.device)


def make_site(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, pattern: Pattern,
    layout: tuple[tuple[str, Strides], ...],
) -> Site:  # fmt: skip
    """The site of a call whose tensors are readable."""
    shapes = (None if bias is None else bias.shape, None if rel_x is None else rel_x.shape)
    dtypes = (q.dtype, None if bias is None else bias.dtype)
    return _site(pattern, k.shape[1:], v.shape[4], q.device, shapes, dtypes, layout, precision(q.dtype))


@lru_cache(maxsize=1024)
def _site(
    pattern: Pattern, keys: tuple[int, int, int, int], dv: int, device: torch.device,
    bias: tuple[tuple[int, ...] | None, tuple[int, ...] | None], dtypes: tuple[torch.dtype, torch.dtype | None],
    layout: tuple[tuple[str, Strides], ...], precision: str,
) -> Site:  # fmt: skip
    height, width, heads, d = keys
    resolved = resolve(pattern, height, width)
    table, rel_x = (None if shape is None else torch.empty(shape, device="meta") for shape in bias)
    kind = bias_kind(table, rel_x, resolved, heads, d)
    rows, entries = (0, 0), 0
    if kind is BiasKind.DECOMPOSED:
        rows = (2 * resolved.y.rel_reach + 1, 2 * resolved.x.rel_reach + 1)
    elif bias[0] is not None:
        entries = prod(bias[0][1:])
    return Site(
        pattern, height, width, heads, d, dv, dtypes[0], device, kind, dtypes[1], entries, rows, layout, precision
    )


@dataclass(frozen=True, eq=False)
class TilePass:
    """One pass over tiles at one site: its schedule, how it gets its bias, and the constants of its kernel.

    Attributes:
        family: kind of tiles that its configuration is kept for.
        how: "atlas", "mask", "gather", "positions", "decomposed" or "none", as in `primitives.add_terms`.
        entry: (K, M, N) flat table entries for "atlas", the mask itself for "mask", else None.
        order, codes: tensors the kernel reads, or any tensor where it reads none.
        images: image strides of the tensors the kernel reads, in units.
        launch: launches its kernel.
        key: what its schedule is cached by, which says nothing of the tensors' strides.
    """

    family: str
    config: Config
    plan: Schedule
    how: str
    entry: Tensor | None
    order: Tensor
    codes: Tensor
    launch: Launcher
    images: tuple[int, ...]
    key: tuple[Any, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [*self.plan.tensors, *([] if self.entry is None else [self.entry]), self.order, self.codes]

    def programs(self, heads: int, batch: int) -> int:
        """Programs of a launch in which each takes config.run images."""
        return int(self.plan.tiles.shape[0]) * heads * -(-batch // self.config.run)


def tile_pass(
    site: Site, op: str, names: tuple[str, ...], *, inverse: bool = False, table: bool = False,
    like: TilePass | None = None,
) -> TilePass:  # fmt: skip
    """The pass of kernel `op`, which reads and writes the tensors `names`, at a site; cached.

    Args:
        table: lay slots out so that the pass can take the gradient of the bias table along, if that costs little.
        like: a pass whose tiles and bias this one shares.
    """

    def build() -> TilePass:
        made, images = site.constants(names)
        if like is not None:
            config = replace(site.config(op, like.family), block_m=like.config.block_m)
            made |= _tile_constants(site, op, config, like.plan, like.how, table)
            return replace(like, config=config, launch=Launcher(made), images=images)
        for family in site.families:
            config = site.config(op, family)
            grid = table and family == "plane" and _on_grid(site, config)
            place = (site.pattern, site.height, site.width, config.block_m, site.device)
            plan = SCHEDULES.get(
                key := (*place, inverse, grid, site.coded),
                partial(schedule, *place, inverse=inverse, grid=grid, kind=site.coded),
                site.device,
            )
            how, entry = _terms(site, plan, family, key)
            if entry is not None:
                break
        made |= _tile_constants(site, op, config, plan, how, table)
        order = plan.tiles if plan.order is None else plan.order
        return TilePass(family, config, plan, how, entry, order, site.codes(plan.tiles), Launcher(made), images, key)

    return SCHEDULES.get((site, op, table), build, site.device)


def _terms(site: Site, plan: Schedule, family: str, key: tuple[Any, ...]) -> tuple[str, Tensor | None]:
    """How a pass gets its bias, and the flat table entries (K, M, N) of an atlas or the mask itself."""
    heads = site.heads if site.kind is BiasKind.TABLE else 1
    pairs = plan.resident.shape[2] * plan.streamed.shape[2]
    if family == "lookup" or plan.kinds * pairs * heads * 4 > ATLAS_BYTES:
        return {BiasKind.TABLE: "gather"}.get(site.kind, site.kind.value), None
    # 0 and -inf are exact in half precision, and half the bytes
    narrow = torch.float32 if site.dtype == torch.float32 else torch.float16

    def entries() -> Tensor:
        return torch.from_numpy(plan.entries()).to(site.device)

    def mask() -> Tensor:
        found = entries()
        return torch.zeros(found.shape, dtype=narrow, device=site.device).masked_fill_(found < 0, -torch.inf)

    if site.kind is BiasKind.TABLE:
        return "atlas", SCHEDULES.get(("entries", *key), entries, site.device)
    return "mask", SCHEDULES.get(("mask", narrow, *key), mask, site.device)


def _on_grid(site: Site, config: Config) -> bool:
    """Whether slots on a grid, which regroup into displacements, cost at most GRID_COST of slots without gaps."""
    if site.kind is not BiasKind.TABLE or site.pattern.curve is not None:
        return False
    resolved = resolve(site.pattern, site.height, site.width)
    if 2 * max(resolved.y.reach, resolved.x.reach) + 1 > MOST_TABLE:
        return False
    (_, tx), cost = choose_tile(resolved, config.block_m, False, grid=True)
    columns = power_of_two(max(len(t.streamed) for t in axis_tiles(resolved.x, tx)), 1)
    across = power_of_two(tx, 1)
    # Both products by displacement contract pairs: a matrix unit wants at least 16 of them.
    pairs = (across * columns, config.block_m // across * (config.block_n // columns))
    return min(pairs) >= 16 and cost[0] <= GRID_COST * choose_tile(resolved, config.block_m, False)[1][0]


def _tile_constants(site: Site, op: str, config: Config, plan: Schedule, how: str, table: bool) -> dict[str, Any]:
    """Constants of kernel `op`; table: it takes the gradient of the bias table along where slots lie on a grid."""
    made = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SLOTS": plan.streamed.shape[2], "BIAS": how,
        "PITCH": plan.pitch, "REL_Y": site.rel_rows[0], "REL_X": site.rel_rows[1],
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if op != "neighborhood.bias":
        made["IMAGES"] = config.run
    if op != "neighborhood.key":
        made["ZERO_KEYS"] = plan.zero_keys
    if op == "neighborhood.query":
        grid = plan.grid if table and plan.grid is not None else (0, 0, 0)
        rows = (site.entries // plan.pitch, plan.pitch) if grid[0] else ()
        made |= dict(zip(("GRID_Y", "GRID_X", "GRID_K"), grid, strict=True))
        made |= dict(zip(("TABLE_Y", "TABLE_X"), map(power_of_two, rows) if rows else (0, 0), strict=True))
        made |= dict(zip(("KEYS_Y", "KEYS_X"), map(power_of_two, plan.sides), strict=True))
    return made


@dataclass(frozen=True, eq=False)
class CellPass:
    """One pass over cells at one site; fields as in `TilePass`."""

    config: Config
    cells: Cells
    how: str
    order: Tensor
    codes: Tensor
    launch: Launcher
    images: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are held."""
        return [*self.cells.tensors, self.codes]

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """(kind, where it begins, its cells) of cells that share a bias; with a bias by position each is alone."""
        held = self.cells
        groups = [(kind, *of) for kind, of in enumerate(zip(held.begins, held.counts, strict=True))]
        if self.how == "positions":
            return [(kind, begin + i, 1) for kind, begin, count in groups for i in range(count)]
        return groups


@dataclass(frozen=True)
class _NoCells:
    """Said of a site that is cut into tiles."""

    tensors: tuple[Tensor, ...] = ()


def cell_pass(site: Site, op: str, names: tuple[str, ...]) -> CellPass | None:
    """The pass of kernel `op`, which reads and writes the tensors `names`, over the cells of a site; cached.

    None where the pattern has no cells, or none that one program can hold: it is cut into tiles then, as any other.
    """

    def build() -> CellPass | _NoCells:
        slots = cell_slots(site.pattern, site.height, site.width)
        if site.kind is BiasKind.DECOMPOSED or slots is None or not _rows_of_cells(site, slots):
            return _NoCells()
        place = (site.pattern, site.height, site.width, site.device, site.coded)
        held = SCHEDULES.get(("cells", *place), partial(cells, *place), site.device)
        config = site.config(op, f"cell{slots}")
        how = {BiasKind.TABLE: "atlas", BiasKind.POSITIONS: "positions"}.get(site.kind, "none")
        made, images = site.constants(names)
        made |= {"BLOCK_M": slots, "BIAS": how, "num_warps": config.num_warps, "num_stages": config.num_stages}
        order = held.first if held.order is None else held.order
        return CellPass(config, held, how, order, site.codes(held.first), Launcher(made), images)

    found = SCHEDULES.get((site, op), build, site.device)
    return found if isinstance(found, CellPass) else None


def _rows_of_cells(site: Site, slots: int) -> bool:
    """Whether both passes have a configuration: where a whole cell would not fit the registers there is none."""
    block_d, arch = power_of_two(max(site.d, site.dv)), architecture(site.device)
    names = (f"window.{name}" for name in ("forward", "backward"))
    return all(known(name, arch, precision_name(site.dtype), block_d, f"cell{slots}") for name in names)
