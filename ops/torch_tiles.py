"""The stock-PyTorch backend: every pattern as blocks of the map, one fused SDPA call per tile, own backward.

A block is a band of rows times a band of columns (see `tiles`). It is read once, as a strided view where the layout
allows and as one copy otherwise; its row tiles are views of it. No N x N scores, no gather of keys per query, no roll.
On a CPU the forward uses PyTorch's flash kernel; a mask that requires a gradient would push SDPA to its slow path, so
the backward is written out: p = exp(s - lse), five batched products a tile, score gradients summed per tile shape and
scattered into the bias table once at the end. All sums are in float32 (float64 for float64 inputs).

Shapes: B batch, H, W map, h heads, d head_dim; n runs of a block, L queries and S keys of a tile.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import product
from math import prod

import torch
from torch import Tensor

from .bias import BiasKind
from .blocks import Block, Curve, Place, Raster, Workspace, cut_blocks
from .patterns import Pattern, resolve
from .scores import tile_scores
from .tile_math import attend, dropout_masks, score_gradients
from .tiles import Band, Stack, axis_bands, make_plan

__all__ = ["backward", "choose_tile", "forward"]

CALL_SCORES = 24_000  # what one SDPA call costs, in scores
COPY_SCORES = 10  # what one copied token of one head costs, in scores
TILE_SCORES = 1 << 19  # most scores of one tile and run: 2 MiB in float32
TILE_QUERIES = 14  # what reading the keys of a tile costs, in queries


@lru_cache(maxsize=1024)
def choose_tile(pattern: Pattern, height: int, width: int, runs: int, stacked: int = 0) -> tuple[int, int]:
    """Query tile (rows, columns) with the least estimated work for `runs` = batch * heads.

    stacked: images, in a pass that computes stacks of tiles in one call; 0 in one that computes every tile alone.

    The estimate counts scores, reads of keys, copied tokens and calls; its constants were fitted to measured times.
    """
    resolved = resolve(pattern, height, width)
    rows = {ty: axis_bands(resolved.y, ty, split=False) for ty in _candidates(resolved.y.queries)}
    columns = {tx: axis_bands(resolved.x, tx, split=True) for tx in _candidates(resolved.x.queries)}
    tiles = sorted(product(rows, columns))
    narrow = [t for t in tiles if _most_scores(rows[t[0]], columns[t[1]]) <= TILE_SCORES] or tiles[:1]
    return min(narrow, key=lambda tile: _cost(rows[tile[0]], columns[tile[1]], runs, stacked))


def _candidates(n: int) -> list[int]:
    return sorted({min(s, n) for s in (1, 2, 4, 7, 8, 10, 12, 14, 16, 24, 32, 49, 64, 128)})


def _most_scores(rows: tuple[Band, ...], columns: tuple[Band, ...]) -> int:
    """Scores of the largest tile, which the backward pass holds for every run."""
    sides = [[t.shape for b in bands for t in b.tiles] for bands in (rows, columns)]
    return prod(max(s.queries for s in shapes) * max(s.keys for s in shapes) for shapes in sides)


def _cost(rows: tuple[Band, ...], columns: tuple[Band, ...], runs: int, stacked: int) -> float:
    cost = 0.0
    for row in rows:
        for column in columns:
            x = column.tiles[0].shape
            alike = row.count * column.count * runs
            tokens = row.queries.length * column.queries.length + 2 * row.keys.length * column.keys.length
            cost += alike * tokens * COPY_SCORES
            for tile in row.tiles:
                queries, keys = tile.shape.queries * x.queries, tile.shape.keys * x.keys
                cost += alike * (queries + TILE_QUERIES) * keys
            calls = len(row.tiles)
            if stacked:
                calls = min(calls, stacked * row.count * column.count * len(row.stacks))
            cost += calls * CALL_SCORES
    return cost


class _Work:
    """What both passes share: the blocks, the layout, the bias."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        bias: Tensor | None,
        rel_x: Tensor | None,
        stacked: bool = False,
    ) -> None:
        size = (k.shape[1], k.shape[2])
        resolved = resolve(pattern, *size)
        self.compute = torch.promote_types(q.dtype, torch.float32)
        self.scores, kind = tile_scores(bias, rel_x, resolved, self.compute, q)
        self.heads = q.shape[3]
        one_image = kind is BiasKind.POSITIONS  # its masks differ from run to run, so images are not joined
        self.stacked = stacked and not one_image
        images = 1 if one_image else q.shape[0]
        tile = choose_tile(pattern, *size, self.heads * images, images if self.stacked else 0)
        token_bytes = self.heads * max(q.shape[4], v.shape[4]) * self.compute.itemsize
        score_bytes = self.heads * self.compute.itemsize
        self.blocks = cut_blocks(pattern, *size, tile, q.shape[0], token_bytes, one_image, score_bytes, self.stacked)
        self.exclusive = make_plan(pattern, *size, tile).exclusive
        self.layout = Raster() if pattern.curve is None else Curve(pattern.curve, *size)
        self.space = Workspace(self.compute, q.device)

    def by_head(self, t: Tensor) -> Tensor:
        """(n * h, ...) as (n, h, ...)."""
        return t.unflatten(0, (-1, self.heads))

    def add_mask(self, mask: Tensor, scores: Tensor) -> Tensor:
        """Add a tile's mask (n or 1, h or 1, L, S) to its scores (n * h, L, S), in place."""
        self.by_head(scores).add_(mask)
        return scores

    def as_block(self, t: Tensor, block: Block, place: Place) -> Tensor:
        """(p, n * h, ly * lx, d) as (b, cy, cx, ly, lx, p, h, d), the order of the map."""
        size = (len(t), *block.counts, self.heads, place.rows.length, place.columns.length, t.shape[-1])
        return t.view(size).permute(1, 2, 3, 5, 6, 0, 4, 7)


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """q, k and v as one (B, H, W, 3, h, d) view, where they lie evenly spaced in one storage."""
    gap = k.storage_offset() - q.storage_offset()
    alike = q.shape == k.shape == v.shape and q.stride() == k.stride() == v.stride() and gap > 0
    shared = (
        alike and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    )
    if not shared or v.storage_offset() - k.storage_offset() != gap:
        return None
    return q.as_strided((*q.shape[:3], 3, *q.shape[3:]), (*q.stride()[:3], gap, *q.stride()[3:]))


class _Parts:
    """q, k and v in as few pieces as they can be read and written: all three, q and the pair, or each alone.

    Every piece is (B, H, W, parts, h, d). `joined` pieces serve blocks whose queries and keys are the same tokens.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        packed = _packed(q, k, v)
        self.joined = None if packed is None else [packed]
        self.apart = (
            [t.unsqueeze(3) for t in (q, k, v)] if packed is None else [packed[:, :, :, :1], packed[:, :, :, 1:]]
        )

    def of(self, block: Block, joined: bool) -> list[tuple[str, Tensor, Place]]:
        """Name, piece and place of what a block reads."""
        if joined and self.joined is not None:
            return [("qkv", self.joined[0], block.queries)]
        places = [block.queries, *[block.keys] * 2]
        return list(zip(("q", "k", "v"), self.apart, places, strict=False))


def _stacked(t: Tensor, first: int, length: int, count: int, step: int) -> Tensor:
    """Tokens [first, first + length) of (n, tokens, h, d), and of n = 1 `count` such pieces `step` apart, heads first.

    A view (n or count, h, length, d), its pieces overlapping where `step` is less than `length`.
    """
    run, token, head, channel = t.stride()
    size, outer = (len(t), run) if count == 1 else (count, step * token)
    shape, strides = (size, t.shape[2], length, t.shape[3]), (outer, head, token, channel)
    return t.as_strided(shape, strides, t.storage_offset() + first * token)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None,
    pattern: Pattern, scale: float, dropout_p: float, seed: Tensor | None, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, H, W, h, d_v) in q's dtype and the log-sum-exp (B, H, W, h) of every query's scores.

    The second is empty where `need_lse` is False.
    """
    # with dropout the backward pass draws its masks again, tile by tile; other devices would hold a stack's scores
    stacked = q.device.type == "cpu" and dropout_p == 0.0
    work = _Work(q, k, v, pattern, bias, rel_x, stacked)
    layout, space, parts = work.layout, work.space, _Parts(q, k, v)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = torch.empty(q.shape[:4] if need_lse else 0, dtype=work.compute, device=q.device)
    keep = dropout_masks(dropout_p, seed, q.device)
    for block in work.blocks:
        pieces = parts.of(block, block.same_place)
        qs, ks, vs = (t for n, piece, at in pieces for t in space.tokens(n, layout.read(piece, block, at)).unbind(2))
        wq, wk = block.queries.columns.length, block.keys.columns.length
        calls = block.stacks if work.stacked else [(Stack(tile), place) for tile, place in block.tiles]
        for stack, place in calls:
            tile, rows = stack.tile, place.rows.length
            n = tile.shape.queries
            qt = _stacked(qs, tile.query * wq, n * wq, stack.count, n * wq)
            kt, vt = (
                _stacked(t, tile.key * wk, tile.shape.keys * wk, stack.count, stack.key_step * wk) for t in (ks, vs)
            )
            mask = work.scores.mask(block, tile, qt)
            o, s = attend(qt, kt, vt, mask, scale, keep)
            size = (*block.counts, rows, wq, work.heads)
            if out.shape[:3] == (block.counts[0], rows, wq) and o.dtype == out.dtype:  # one tile is all
                out = o.transpose(1, 2).reshape(out.shape).contiguous()
                lse = s.transpose(1, 2).reshape(lse.shape).contiguous() if need_lse else lse
                continue
            layout.write(out, block, place, o.transpose(1, 2).reshape(*size, -1))
            if need_lse:
                layout.write(lse, block, place, s.transpose(1, 2).reshape(size))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_x: Tensor | None, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
    pattern: Pattern, scale: float, dropout_p: float, seed: Tensor | None, bias_needs_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill dq, dk, dv (any strides, all entries are written) and return the gradients of the bias tensors."""
    work = _Work(q, k, v, pattern, bias, rel_x)
    layout, space, exclusive = work.layout, work.space, work.exclusive
    keep = dropout_masks(dropout_p, seed, q.device)
    parts, results = _Parts(q, k, v), _Parts(dq, dk, dv)
    joint = parts.joined is not None and results.joined is not None and exclusive
    # Sums over blocks need the wide dtype; where every key belongs to one block, its gradient is stored at once.
    narrow = list(results.apart[1:])
    if not exclusive:
        sums = [torch.zeros_like(t, dtype=work.compute) if t.dtype != work.compute else t.zero_() for t in narrow]
        results.apart[1:] = sums
    store = layout.write if exclusive else layout.add
    for block in work.blocks:
        queries, keys = block.queries, block.keys
        joined = joint and block.same_place
        pieces = parts.of(block, joined)
        qs, ks, vs = (t for n, piece, at in pieces for t in space.parts(n, layout.read(piece, block, at)))
        targets = results.of(block, joined)
        buffers = [
            space.take(f"d{n}", (piece.shape[3], *(qs if at is queries else ks if n != "v" else vs).shape))
            for n, piece, at in targets
        ]
        dqs, dks, dvs = (t for buffer in buffers for t in buffer)
        ks.mul_(scale)
        single = len(block.tiles) == 1
        if not single:
            dks.zero_()
            dvs.zero_()
        gs = space.heads_first("g", layout.read(grad, block, queries))
        delta = space.heads_first("o", layout.read(out, block, queries)).mul_(gs).sum(-1, keepdim=True)
        ls = space.heads_first("l", layout.read(lse, block, queries)[..., None])
        wq, wk = queries.columns.length, keys.columns.length
        for tile, _ in block.tiles:
            a, b = tile.query * wq, (tile.query + tile.shape.queries) * wq
            c, d = tile.key * wk, (tile.key + tile.shape.keys) * wk
            qt, gt, kt, vt = qs[:, a:b], gs[:, a:b], ks[:, c:d], vs[:, c:d]
            mask = work.scores.mask(block, tile, work.by_head(qt))
            add = None if mask is None else partial(work.add_mask, mask)
            p, ds = score_gradients(qt, kt, vt, gt, ls[:, a:b], delta[:, a:b], add, keep)
            # beta = 0 ignores what the buffer held, NaN included.
            dvs[:, c:d].baddbmm_(p.transpose(1, 2), gt, beta=0 if single else 1)
            dks[:, c:d].baddbmm_(ds.transpose(1, 2), qt, beta=0 if single else 1, alpha=scale)
            dqt = torch.bmm(ds, kt)
            if bias_needs_grad or rel_x is not None:
                work.scores.collect(block, tile, work.by_head(qt), work.by_head(ds), work.by_head(dqt))
            dqs[:, a:b] = dqt
        for buffer, (_, piece, at) in zip(buffers, targets, strict=True):
            (layout.write if at is queries else store)(piece, block, at, work.as_block(buffer, block, at))
    if not exclusive:
        for total, result in zip(sums, narrow, strict=True):
            if total is not result:
                result.copy_(total)
    return work.scores.gradients() if bias_needs_grad else (None, None)
