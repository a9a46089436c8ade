"""The static patterns on Triton: which kernels a call takes and what they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bias import BiasKind
from ..patterns import Pattern
from ..tile_math import own_precision
from . import neighborhood, window
from .gradient import atlas, cell_bias_gradient, cell_runs, displacement_gradient, tile_bias_gradient
from .launch import LOG2_E, dense, layout, readable
from .site import CellPass, Site, TilePass, cell_pass, make_site, tile_pass

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, pattern: Pattern, scale: float,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, H, W, h, d_v) in q's dtype and the log-sum-exp (B, H, W, h) of every query's scores.

    The second is empty where `need_lse` is False, and 0 for a pattern in cells: its backward pass reads none.
    """
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = torch.empty(q.shape[:4] if need_lse else 0, dtype=torch.float32, device=q.device)
    if not q.shape[0]:
        return out, lse
    q, k, v = readable(q, "q"), readable(k, "k"), readable(v, "v")
    site = make_site(q, k, v, bias, rel_x, pattern, layout(Q=q, K=k, V=v))
    cells = cell_pass(site, "window.forward", ("Q", "K", "V"))
    if cells is not None:
        lse.zero_()
        _forward_cells(site, cells, q, k, v, bias, out, scale)
    else:
        _forward_tiles(site, q, k, v, bias, _Decomposed(site, q, bias, rel_x), out, lse, scale, need_lse)
    return out, lse


def _forward_cells(
    site: Site, cells: CellPass, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, scale: float
) -> None:
    work = cell_runs(site, cells, q.shape[0])
    held = cells.cells
    cells.launch(
        window.forward_kernel, work.table.shape[0] * site.heads, q, k, v, out, work.table, held.first, held.offset,
        cells.order, _cell_terms(site, cells, bias, q), cells.codes,
        site.height * site.width, scale * LOG2_E, *cells.images,
    )  # fmt: skip


def _cell_terms(site: Site, cells: CellPass, bias: Tensor | None, other: Tensor) -> Tensor:
    """The bias tensor that kernels of cells read, or any tensor where there is none."""
    if bias is None:
        return other
    return atlas(site, bias, cells.cells.entry) if cells.how == "atlas" else dense(bias)


def _tile_terms(site: Site, made: TilePass, bias: Tensor | None, other: Tensor) -> Tensor:
    """The bias or mask tensor that kernels of tiles read, or any tensor where there is none."""
    if made.how == "mask":
        assert made.entry is not None
        return made.entry
    if bias is None or site.kind is BiasKind.DECOMPOSED:
        return other
    return dense(bias) if made.entry is None else atlas(site, bias, made.entry)


def _forward_tiles(
    site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel: _Decomposed, out: Tensor, lse: Tensor,
    scale: float, need_lse: bool,
) -> None:  # fmt: skip
    made = tile_pass(site, "neighborhood.forward", ("Q", "K", "V"))
    plan = made.plan
    made.launch(
        neighborhood.forward_kernel, made.programs(site.heads, q.shape[0]), q, k, v, out, lse, plan.tiles,
        plan.resident, plan.streamed, made.order, _tile_terms(site, made, bias, q), made.codes, rel.terms,
        q.shape[0], plan.tiles.shape[0], q.shape[1] * q.shape[2], scale * LOG2_E,
        *made.images, NEED_LSE=need_lse,
    )  # fmt: skip


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, pattern: Pattern, scale: float, bias_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill dq, dk, dv (all entries are written) and return the gradients of the bias tensors."""
    if not q.shape[0]:
        zero = [None if t is None or not bias_needs_grad else torch.zeros_like(t) for t in (bias, rel_x)]
        return zero[0], zero[1]
    q, k, v, grad = readable(q), readable(k), readable(v), readable(grad)  # the forward pass has said so
    out, lse = dense(out), dense(lse)
    tensors = layout(G=grad, Q=q, K=k, V=v, DQ=dq, DK=dk, DV=dv)
    site = make_site(q, k, v, bias, rel_x, pattern, tensors)
    cells = cell_pass(site, "window.backward", tuple(name for name, _ in tensors))
    if cells is not None:
        return _backward_cells(site, cells, grad, q, k, v, bias, dq, dk, dv, scale, bias_needs_grad), None
    rel = _Decomposed(site, q, bias, rel_x)
    sums = torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
    wanted = bias_needs_grad and bias is not None and site.kind is not BiasKind.DECOMPOSED
    made = tile_pass(site, "neighborhood.query", ("G", "Q", "K", "V", "DQ"), table=wanted)
    terms = _tile_terms(site, made, bias, q)
    partial = _backward_queries(site, made, terms, grad, q, k, v, rel, out, lse, dq, sums, scale)
    _backward_keys(site, grad, q, k, v, bias, rel, dk, dv, sums, scale)
    if site.kind is BiasKind.DECOMPOSED:
        return rel.send_back(dq, bias_needs_grad)
    if bias is None or not wanted:
        return None, None
    if made.plan.grid is not None:
        return displacement_gradient(bias, partial), None
    return tile_bias_gradient(site, made, terms, grad, q, k, v, bias, sums, scale * LOG2_E), None


def _backward_cells(
    site: Site, cells: CellPass, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, scale: float, bias_needs_grad: bool,
) -> Tensor | None:  # fmt: skip
    wanted = bias_needs_grad and bias is not None
    work = cell_runs(site, cells, q.shape[0], summed=wanted)
    held, slots = cells.cells, cells.cells.offset.shape[1]
    size = (work.table.shape[0], site.heads, slots, slots) if wanted else (0,)
    partial = torch.empty(size, dtype=torch.float32, device=q.device)
    cells.launch(
        window.backward_kernel, work.table.shape[0] * site.heads, grad, q, k, v, dq, dk, dv, partial, work.table,
        held.first, held.offset, cells.order, _cell_terms(site, cells, bias, q), cells.codes, scale * LOG2_E, scale,
        *cells.images, BIAS_GRADIENT=wanted,
    )  # fmt: skip
    return cell_bias_gradient(site, cells, bias, partial, work) if bias is not None and wanted else None


def _backward_queries(
    site: Site, made: TilePass, terms: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: _Decomposed,
    out: Tensor, lse: Tensor, dq: Tensor, sums: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Fill dq and sums; return the table gradient of every program, empty where none is taken along."""
    plan, table = made.plan, (made.launch.constants["TABLE_Y"], made.launch.constants["TABLE_X"])
    programs = made.programs(site.heads, q.shape[0])
    partial = torch.empty(programs if table[0] else 0, *table, dtype=torch.float32, device=q.device)
    made.launch(
        neighborhood.query_kernel, programs, grad, q, k, v, out, lse, dq, sums, rel.gradient, partial,
        plan.tiles, plan.resident, plan.streamed, made.order, terms, made.codes, rel.terms,
        q.shape[0], plan.tiles.shape[0], q.shape[1] * q.shape[2], scale * LOG2_E, scale, *made.images,
    )  # fmt: skip
    return partial


def _backward_keys(
    site: Site, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel: _Decomposed,
    dk: Tensor, dv: Tensor, sums: Tensor, scale: float,
) -> None:  # fmt: skip
    made = tile_pass(site, "neighborhood.key", ("G", "Q", "K", "V", "DK", "DV"), inverse=True)
    plan = made.plan
    made.launch(
        neighborhood.key_kernel, made.programs(site.heads, q.shape[0]), grad, q, k, v, sums, dk, dv, plan.tiles,
        plan.resident, plan.streamed, made.order, _tile_terms(site, made, bias, q), made.codes, rel.terms,
        q.shape[0], plan.tiles.shape[0],
        q.shape[1] * q.shape[2], scale * LOG2_E, scale, *made.images,
    )  # fmt: skip


class _Decomposed:
    """A decomposed bias: q . rel of every query in one product, which kernels read; and the way back.

    terms, gradient: (B, queries, heads, rows of rel_y and rel_x) in q's dtype; any tensor for other kinds of bias.
    """

    def __init__(self, site: Site, q: Tensor, rel_y: Tensor | None, rel_x: Tensor | None) -> None:
        self.terms = self.gradient = q
        if site.kind is not BiasKind.DECOMPOSED:
            return
        assert rel_y is not None
        assert rel_x is not None
        self.site, self.q, self.given = site, q, (rel_y, rel_x)
        self.tables = torch.cat([rel_y.detach(), rel_x.detach()]).to(q.dtype)
        with own_precision(q.device):
            self.terms = torch.matmul(q, self.tables.transpose(0, 1)).contiguous()
        self.gradient = torch.zeros_like(self.terms)

    def send_back(self, dq: Tensor, tables_need_grad: bool) -> tuple[Tensor | None, Tensor | None]:
        """Add to dq what comes back through q . rel; gradients of the tables where they are asked for."""
        with own_precision(dq.device):
            dq += torch.matmul(self.gradient, self.tables)
            if not tables_need_grad:
                return None, None
            rows = self.gradient.flatten(0, 3).transpose(0, 1)
            dy, dx = torch.matmul(rows, self.q.reshape(-1, self.site.d)).split(list(self.site.rel_rows))
        return dy.to(self.given[0].dtype, copy=True), dx.to(self.given[1].dtype, copy=True)  # not views of one product
