"""The static patterns on Triton: which kernels a call takes, what they are given, and the bias's way there and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bias import BiasKind, bias_kind
from ..curves import curve_order
from ..patterns import Pattern, Resolved, resolve
from ..tile_math import own_precision
from . import bias as bias_kernels
from . import neighborhood, window
from .configs import Config, architecture, choose, precision_name
from .launch import cached, constants, power_of_two, precision, readable, strides, units, wide
from .primitives import LOG2E
from .schedule import Cells, Runs, Schedule, cells, in_cells, runs, schedule

__all__ = ["backward", "forward"]

ATLAS_BYTES = 16 << 20  # larger tables of tiles are not made: entries are looked up in the kernel
PARTIAL_BYTES = 64 << 20  # score gradients held at a time on their way to a bias table
LOG2_E = float(LOG2E.value)


@dataclass(frozen=True, eq=False)
class _Held:
    """Tensors of the schedule cache that belong together."""

    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self.tensors)


class _Call:
    """What both passes of a call share: the inputs as kernels read them, and the constants they are compiled for."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, pattern: Pattern, scale: float
    ) -> None:
        self.q, self.k, self.v = readable(q, "q"), readable(k, "k"), readable(v, "v")
        self.pattern, self.scale, self.device = pattern, scale, q.device
        self.batch, self.height, self.width = q.shape[0], k.shape[1], k.shape[2]
        self.heads, self.d, self.dv = q.shape[3], q.shape[4], v.shape[4]
        self.queries = q.shape[1] * q.shape[2]
        self.resolved: Resolved = resolve(pattern, self.height, self.width)
        self.kind = bias_kind(bias, rel_x, self.resolved, self.heads, self.d)
        self.bias = None if bias is None else bias.detach().contiguous()
        self.rel_x = None if rel_x is None else rel_x.detach().contiguous()
        self.cells: Cells | None = None
        if self.kind is not BiasKind.DECOMPOSED and in_cells(pattern, self.height, self.width):
            self.cells = cells(pattern, self.height, self.width, self.device)

    def config(self, op: str, family: str) -> Config:
        block_d = power_of_two(max(self.d, self.dv))
        return choose(op, architecture(self.device), precision_name(self.q.dtype), block_d, family)

    @property
    def family(self) -> str:
        """Kind of tiles that configurations are kept for."""
        return "plane" if self.pattern.curve is None else "curve"

    def common(self, *outputs: Tensor) -> dict[str, Any]:
        """Constants that every kernel takes."""
        tensors = (self.q, self.k, self.v, *outputs)
        return {
            "HEADS": self.heads, "D": self.d, "DV": self.dv,
            "BLOCK_D": power_of_two(self.d), "BLOCK_DV": power_of_two(self.dv),
            "UNIT": units(*tensors), "WIDE": wide(*tensors),
            "CURVE": self.pattern.curve is not None, "PRECISION": precision(self.q.dtype),
            **constants(Q=self.q, K=self.k, V=self.v),
        }  # fmt: skip

    # --- bias ---------------------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> Tensor:
        """The bias table as (heads, entries); q where there is none, which no kernel then reads."""
        return self.q if self.bias is None else self.bias.flatten(1)

    @cached_property
    def codes(self) -> Tensor:
        """(H*W,) int32: a token's part in its entry of a table of true positions."""
        if self.kind is not BiasKind.POSITIONS:
            return self.q

        def build() -> Tensor:
            token = np.arange(self.height * self.width)
            code = token // self.width * (2 * self.width - 1) + token % self.width
            return torch.from_numpy(code.astype(np.int32)).to(self.device)

        found: Tensor = cached(("codes", self.height, self.width, self.device), self.device, build)
        return found

    @property
    def centre(self) -> int:
        """Entry of displacement 0 in a table of true positions."""
        return (self.height - 1) * (2 * self.width - 1) + self.width - 1

    @property
    def entries(self) -> int:
        """Entries of the table, per head."""
        return 0 if self.bias is None or self.kind is BiasKind.DECOMPOSED else self.table.shape[1]

    @cached_property
    def rel(self) -> Tensor:
        """(B, queries, heads, rows of rel_y and rel_x): q . rel of every query, one product on the unscaled q."""
        if self.kind is not BiasKind.DECOMPOSED:
            return self.q
        with own_precision(self.device):
            return torch.matmul(self.q, self.rel_tables.transpose(0, 1)).contiguous()

    @cached_property
    def rel_tables(self) -> Tensor:
        """Both tables of a decomposed bias in q's dtype, (rows, d)."""
        assert self.bias is not None
        assert self.rel_x is not None
        return torch.cat([self.bias, self.rel_x]).to(self.q.dtype)

    @property
    def rel_rows(self) -> tuple[int, int]:
        """Rows of each table of a decomposed bias."""
        if self.kind is not BiasKind.DECOMPOSED:
            return 0, 0
        return 2 * self.resolved.y.rel_reach + 1, 2 * self.resolved.x.rel_reach + 1

    def atlas(self, entry: Tensor) -> Tensor:
        """Terms (K, heads, M, N) float32 of every kind of tile, from the flat table entry of every pair."""
        kinds, pairs = entry.shape[0], entry.shape[1] * entry.shape[2]
        made = torch.empty(kinds, self.heads, *entry.shape[1:], dtype=torch.float32, device=self.device)
        block = 1024
        bias_kernels.atlas_kernel[-(-pairs // block), kinds * self.heads](
            self.table, entry, made, pairs, HEADS=self.heads, ENTRIES=self.entries, BLOCK=block
        )
        return made

    def tile_bias(self, plan: Schedule, entry: Tensor | None) -> tuple[str, Tensor]:
        """How a pass gets its bias, and the tensor it reads."""
        if self.kind is BiasKind.TABLE:
            return ("gather", self.table) if entry is None else ("atlas", self.atlas(entry))
        if self.kind is BiasKind.NONE and entry is not None:
            return "mask", entry
        return {BiasKind.NONE: "none", BiasKind.POSITIONS: "positions", BiasKind.DECOMPOSED: "decomposed"}[
            self.kind
        ], self.table

    # --- schedules ----------------------------------------------------------------------------------------------------

    def schedule(self, config: Config, *, inverse: bool) -> Schedule:
        """Tiles of a pass."""
        return schedule(
            self.pattern, self.height, self.width, config.block_m, config.block_n, self.device, inverse=inverse
        )

    def entry(self, plan: Schedule, config: Config, *, inverse: bool) -> Tensor | None:
        """Flat table entries (K, M, N) of a schedule, or its mask (0 and -inf) where there is no table.

        None where the atlas made of them would be too large, and for kinds of bias that kernels look up themselves.
        """
        masks = self.kind is BiasKind.NONE
        pairs = plan.kinds * config.block_m * plan.streamed.shape[2]
        if not (masks or self.kind is BiasKind.TABLE) or pairs * (1 if masks else self.heads) * 4 > ATLAS_BYTES:
            return None

        def build() -> Tensor:
            entry = torch.from_numpy(plan.entries()).to(self.device)
            return (
                entry.new_zeros(entry.shape, dtype=torch.float32).masked_fill_(entry < 0, -torch.inf)
                if masks
                else entry
            )

        name = "mask" if masks else "entries"
        key = (name, self.pattern, self.height, self.width, config.block_m, config.block_n, self.device, inverse)
        found: Tensor = cached(key, self.device, build)
        return found

    def cell_runs(self, config: Config) -> Runs:
        """Runs of cells; with a bias by position every cell is a group of its own."""
        held = self.cells
        assert held is not None
        alone = self.kind is BiasKind.POSITIONS
        key = ("cell runs", self.pattern, self.height, self.width, self.batch, config.run, alone, self.device)

        def build() -> Runs:
            groups = [(kind, begin, count) for kind, (begin, count) in enumerate(zip(held.begins, held.counts))]
            if alone:
                groups = [(kind, begin + i, 1) for kind, begin, count in groups for i in range(count)]
            return runs(groups, self.batch, config.run, self.device)

        found: Runs = cached(key, self.device, build)
        return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, pattern: Pattern, scale: float,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, H, W, h, d_v) in q's dtype and the log-sum-exp (B, H, W, h) of every query's scores.

    The second is empty where `need_lse` is False, and not written by a pattern in cells, whose backward pass reads none.
    """
    call = _Call(q, k, v, bias, rel_x, pattern, scale)
    out = q.new_empty(*q.shape[:4], call.dv)
    lse = torch.empty(q.shape[:4] if need_lse else 0, dtype=torch.float32, device=q.device)
    if call.cells is None:
        _forward_tiles(call, out, lse, need_lse)
    else:
        _forward_cells(call, out)
    return out, lse


def _forward_cells(call: _Call, out: Tensor) -> None:
    held = call.cells
    assert held is not None
    slots = held.offset.shape[1]
    config = call.config("window.forward", f"cell{slots}")
    plan = call.cell_runs(config)
    how, terms = _cell_bias(call, held)
    common = call.common()
    window.forward_kernel[plan.table.shape[0] * call.heads,](
        call.q, call.k, call.v, out, plan.table, held.first, held.offset, _order(held.order, held.first), terms,
        call.codes, call.queries, call.scale * LOG2_E, *_images(common, call.q, call.k, call.v),
        BLOCK_M=slots, ENTRIES=call.entries, CENTRE=call.centre, BIAS=how, num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip


def _cell_bias(call: _Call, held: Cells) -> tuple[str, Tensor]:
    if call.kind is BiasKind.TABLE:
        return "atlas", call.atlas(held.entry)
    return ("positions" if call.kind is BiasKind.POSITIONS else "none"), call.table


def _order(order: Tensor | None, other: Tensor) -> Tensor:
    """A curve's order, or any tensor where there is none."""
    return other if order is None else order


def _images(common: dict[str, Any], *tensors: Tensor) -> tuple[int, ...]:
    """Image strides in units."""
    return tuple(strides(t).image // common["UNIT"] for t in tensors)


def _forward_tiles(call: _Call, out: Tensor, lse: Tensor, need_lse: bool) -> None:
    config = call.config("neighborhood.forward", call.family)
    plan = call.schedule(config, inverse=False)
    how, terms = call.tile_bias(plan, call.entry(plan, config, inverse=False))
    common = call.common()
    neighborhood.forward_kernel[_programs(call, plan, config),](
        call.q, call.k, call.v, out, lse, plan.tiles, plan.resident, plan.streamed, _order(plan.order, plan.tiles),
        terms, call.codes, call.rel, call.batch, plan.tiles.shape[0], call.queries, call.scale * LOG2_E,
        *_images(common, call.q, call.k, call.v),
        **_tile_constants(call, plan, config, how), ZERO_KEYS=plan.zero_keys, IMAGES=config.run, NEED_LSE=need_lse,
        REL_Y=call.rel_rows[0], REL_X=call.rel_rows[1], **common,
    )  # fmt: skip


def _programs(call: _Call, plan: Schedule, config: Config) -> int:
    return int(plan.tiles.shape[0]) * call.heads * -(-call.batch // config.run)


def _tile_constants(call: _Call, plan: Schedule, config: Config, how: str) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SLOTS": plan.streamed.shape[2],
        "ENTRIES": call.entries, "CENTRE": call.centre, "BIAS": how,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, pattern: Pattern, scale: float, bias_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill dq, dk, dv (all entries are written) and return the gradients of the bias tensors."""
    call = _Call(q, k, v, bias, rel_x, pattern, scale)
    grad = readable(grad, "grad")
    if call.cells is not None:
        return _backward_cells(call, grad, dq, dk, dv, bias_needs_grad), None
    return _backward_tiles(call, grad, out, lse, dq, dk, dv, bias_needs_grad)


def _backward_cells(
    call: _Call, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, bias_needs_grad: bool
) -> Tensor | None:
    held = call.cells
    assert held is not None
    slots = held.offset.shape[1]
    config = call.config("window.backward", f"cell{slots}")
    plan = call.cell_runs(config)
    how, terms = _cell_bias(call, held)
    wanted = bias_needs_grad and call.bias is not None
    size = (plan.table.shape[0], call.heads, slots, slots) if wanted else (0,)
    partial = torch.empty(size, dtype=torch.float32, device=call.device)
    common = call.common(grad, dq, dk, dv)
    window.backward_kernel[plan.table.shape[0] * call.heads,](
        grad, call.q, call.k, call.v, dq, dk, dv, partial, plan.table, held.first, held.offset,
        _order(held.order, held.first), terms, call.codes, call.scale * LOG2_E, call.scale,
        *_images(common, grad, call.q, call.k, call.v, dq, dk, dv),
        BLOCK_M=slots, ENTRIES=call.entries, CENTRE=call.centre, BIAS=how, BIAS_GRADIENT=wanted,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **constants(G=grad, DQ=dq, DK=dk, DV=dv), **common,
    )  # fmt: skip
    if not wanted:
        return None
    summed = _sum_runs(call, partial, plan)
    key = ("cell sources", call.pattern, call.height, call.width, call.kind, call.device)
    sources = cached(key, call.device, lambda: _sources(_cell_entries(call, held), call.entries))
    return _to_table(call, summed, sources)


def _cell_entries(call: _Call, held: Cells) -> Tensor:
    """Flat table entry of every pair, by kind of cell or, with a bias by position, by cell."""
    if call.kind is BiasKind.TABLE:
        return held.entry
    kind = torch.repeat_interleave(
        torch.arange(len(held.counts), device=call.device), torch.tensor(held.counts, device=call.device)
    )
    offset = held.offset[kind]
    present = offset > -(1 << 29)
    place = held.first[:, None] + offset.where(present, 0)
    return _position_entries(call, place, place, present[:, :, None] & present[:, None, :])


def _position_entries(call: _Call, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """(T, M, N) int32: entry of a table of true positions for places (T, M) and (T, N) of a curve, -1 where masked."""
    order = torch.from_numpy(curve_order(str(call.pattern.curve), call.height, call.width).astype(np.int64))
    code = call.codes[order.to(call.device)]
    entry = code[keys.long()][:, None, :] - code[queries.long()][:, :, None] + call.centre
    return entry.where(allowed, -1)


def _backward_tiles(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, bias_needs_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    delta, level = torch.empty_like(lse), torch.empty_like(lse)
    drel = torch.zeros_like(call.rel) if call.kind is BiasKind.DECOMPOSED else call.rel
    config = call.config("neighborhood.query", call.family)
    plan = call.schedule(config, inverse=False)
    entry = call.entry(plan, config, inverse=False)
    how, terms = call.tile_bias(plan, entry)
    common = call.common(grad, dq)
    neighborhood.query_kernel[_programs(call, plan, config),](
        grad, call.q, call.k, call.v, out, lse, dq, delta, level, drel, plan.tiles, plan.resident, plan.streamed,
        _order(plan.order, plan.tiles), terms, call.codes, call.rel, call.batch, plan.tiles.shape[0], call.queries,
        call.scale * LOG2_E, call.scale, *_images(common, grad, call.q, call.k, call.v, dq),
        **_tile_constants(call, plan, config, how), ZERO_KEYS=plan.zero_keys, IMAGES=config.run,
        REL_Y=call.rel_rows[0], REL_X=call.rel_rows[1], KEYS_Y=power_of_two(plan.sides[0]), KEYS_X=power_of_two(plan.sides[1]),
        **constants(G=grad, DQ=dq), **common,
    )  # fmt: skip
    _backward_keys(call, grad, delta, level, dk, dv)
    if call.kind is BiasKind.DECOMPOSED:
        return _backward_rel(call, drel, dq) if bias_needs_grad else _add_rel(call, drel, dq)
    if not bias_needs_grad or call.bias is None:
        return None, None
    return _bias_gradient(call, grad, delta, level), None


def _backward_keys(call: _Call, grad: Tensor, delta: Tensor, level: Tensor, dk: Tensor, dv: Tensor) -> None:
    config = call.config("neighborhood.key", call.family)
    plan = call.schedule(config, inverse=True)
    how, terms = call.tile_bias(plan, call.entry(plan, config, inverse=True))
    common = call.common(grad, dk, dv)
    neighborhood.key_kernel[_programs(call, plan, config),](
        grad, call.q, call.k, call.v, delta, level, dk, dv, plan.tiles, plan.resident, plan.streamed,
        _order(plan.order, plan.tiles), terms, call.codes, call.rel, call.batch, plan.tiles.shape[0], call.queries,
        call.scale * LOG2_E, call.scale, *_images(common, grad, call.q, call.k, call.v, dk, dv),
        **_tile_constants(call, plan, config, how), IMAGES=config.run, REL_Y=call.rel_rows[0], REL_X=call.rel_rows[1],
        **constants(G=grad, DK=dk, DV=dv), **common,
    )  # fmt: skip


def _add_rel(call: _Call, drel: Tensor, dq: Tensor) -> tuple[None, None]:
    """What a decomposed bias sends back to q."""
    with own_precision(call.device):
        dq += torch.matmul(drel, call.rel_tables)
    return None, None


def _backward_rel(call: _Call, drel: Tensor, dq: Tensor) -> tuple[Tensor, Tensor]:
    _add_rel(call, drel, dq)
    assert call.bias is not None
    assert call.rel_x is not None
    with own_precision(call.device):
        tables = torch.matmul(drel.flatten(0, 3).transpose(0, 1), call.q.reshape(-1, call.d))
    dy, dx = tables.split(list(call.rel_rows))
    return dy.to(call.bias.dtype), dx.to(call.rel_x.dtype)


def _bias_gradient(call: _Call, grad: Tensor, delta: Tensor, level: Tensor) -> Tensor:
    """Gradient of a bias table: score gradients summed over tiles of a kind, then over the sources of each entry."""
    config = call.config("neighborhood.bias", call.family)
    plan = call.schedule(config, inverse=False)
    entry = call.entry(plan, config, inverse=False)
    how, terms = call.tile_bias(plan, entry)
    common = call.common(grad)
    total: Tensor | None = None
    for step, (members, work, sources) in enumerate(_bias_work(call, plan, config)):
        size = (work.table.shape[0], call.heads, config.block_m, plan.streamed.shape[2])
        partial = torch.empty(size, dtype=torch.float32, device=call.device)
        neighborhood.bias_kernel[work.table.shape[0] * call.heads * (size[3] // config.block_n),](
            grad, call.q, call.k, call.v, delta, level, partial, work.table, members, plan.tiles, plan.resident,
            plan.streamed, _order(plan.order, plan.tiles), terms, call.codes, call.rel, call.queries,
            call.scale * LOG2_E, *_images(common, grad, call.q, call.k, call.v),
            **_tile_constants(call, plan, config, how), ZERO_KEYS=plan.zero_keys, **constants(G=grad), **common,
        )  # fmt: skip
        part = _to_table(call, _sum_runs(call, partial, work), sources)
        total = part if step == 0 else total.add_(part)  # type: ignore[union-attr]
    assert total is not None
    return total


def _bias_work(call: _Call, plan: Schedule, config: Config) -> Any:
    """Pieces whose score gradients fit PARTIAL_BYTES: (tiles sorted by kind, runs, sources of every entry)."""
    pairs = config.block_m * plan.streamed.shape[2]
    alone = call.kind is BiasKind.POSITIONS
    groups = [[t] for group in plan.by_kind for t in group] if alone else plan.by_kind
    at_once = max(1, PARTIAL_BYTES // (pairs * call.heads * 4))
    for first in range(0, len(groups), at_once):
        part = groups[first : first + at_once]
        key = ("bias work", call.pattern, call.height, call.width, call.batch, config, call.kind, first, at_once)
        yield cached(
            (*key, call.device), call.device, lambda part=part: _piece(call, plan, config, part, at_once)
        ).parts


@dataclass(frozen=True, eq=False)
class _Piece:
    parts: tuple[Tensor, Runs, _Held]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(p.nbytes for p in self.parts)


def _piece(call: _Call, plan: Schedule, config: Config, part: list[list[int]], at_once: int) -> _Piece:
    kinds = plan.tiles[:, 2].tolist()
    members = [t for group in part for t in group]
    begins = np.cumsum([0, *(len(g) for g in part)]).tolist()
    groups = [(kinds[g[0]], begin, len(g)) for g, begin in zip(part, begins, strict=False)]
    # As many runs as keep the device busy, unless their score gradients would not fit.
    length = max(config.run, -(-len(members) * call.batch // max(1, at_once - len(groups))))
    work = runs(groups, call.batch, length, call.device)
    tiles = torch.tensor(members, dtype=torch.int32, device=call.device)
    entry = torch.from_numpy(plan.entries()).to(call.device)[[g[0] for g in groups]]
    if call.kind is BiasKind.POSITIONS:
        chosen = tiles.long()
        kind, slots = plan.tiles[chosen, 2].long(), [plan.resident[:, 0], plan.streamed[:, 0]]
        places = [plan.tiles[chosen, f, None] + s[kind].clamp(min=-1) for f, s in enumerate(slots)]
        limit = call.height * call.width - 1
        entry = _position_entries(call, *(p.clamp(0, limit) for p in places), entry >= 0)
    return _Piece((tiles, work, _sources(entry, call.entries)))


def _sources(entry: Tensor, entries: int) -> _Held:
    """For each table entry the flat places of `entry` that name it, in order: (places, bounds)."""
    flat = entry.flatten().long()
    ordered, places = flat.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(entries + 1, device=flat.device))
    return _Held((places, bounds.int()))


def _sum_runs(call: _Call, partial: Tensor, work: Runs) -> Tensor:
    """Sums (groups, heads, M, N) over the runs of each group."""
    groups, pairs = work.bounds.shape[0] - 1, partial.shape[2] * partial.shape[3]
    summed = torch.empty(groups, *partial.shape[1:], dtype=torch.float32, device=call.device)
    block = 1024
    bias_kernels.runs_kernel[-(-pairs // block), groups * call.heads](
        partial, work.bounds, summed, pairs, HEADS=call.heads, BLOCK=block
    )
    return summed


def _to_table(call: _Call, summed: Tensor, sources: _Held) -> Tensor:
    """Gradient of the bias in its own shape and dtype."""
    assert call.bias is not None
    gradient = torch.empty(call.heads, call.entries, dtype=torch.float32, device=call.device)
    places, bounds = sources.tensors
    bias_kernels.table_kernel[call.entries, call.heads](
        summed, places, bounds, gradient, summed.shape[2] * summed.shape[3],
        HEADS=call.heads, ENTRIES=call.entries, BLOCK=256,
    )  # fmt: skip
    return gradient.view(call.bias.shape).to(call.bias.dtype)
