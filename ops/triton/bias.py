"""From a bias table to the terms of every kind of tile, and from their gradients back to the table.

Sums are taken in a fixed order, run by run and entry by entry: the gradient of a bias is the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2E, SIZES

__all__ = ["atlas_kernel", "runs_kernel", "table_kernel"]


@triton.jit(do_not_specialize=SIZES)
def atlas_kernel(table, entry, atlas, pairs, HEADS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """atlas (K, HEADS, pairs) float32: the table's entry of every pair in units of log2(e), -inf where it is masked."""
    blocks = tl.cdiv(pairs, BLOCK)
    head, kind = tl.program_id(0) // blocks % HEADS, tl.program_id(0) // blocks // HEADS
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    index = tl.load(entry + kind * pairs + at, mask=inside, other=-1)
    value = tl.load(table + head * ENTRIES + index, mask=index >= 0, other=0.0).to(tl.float32) * LOG2E
    tl.store(atlas + (kind * HEADS + head) * pairs + at, tl.where(index >= 0, value, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def runs_kernel(partial, bounds, summed, pairs, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """summed (K, HEADS, pairs): the partial sums of each kind's runs [bounds[kind], bounds[kind + 1]), in order."""
    blocks = tl.cdiv(pairs, BLOCK)
    head, kind = tl.program_id(0) // blocks % HEADS, tl.program_id(0) // blocks // HEADS
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < pairs
    total = tl.zeros([BLOCK], tl.float32)
    for run in range(tl.load(bounds + kind), tl.load(bounds + kind + 1)):
        total += tl.load(partial + (run * HEADS + head).to(tl.int64) * pairs + at, mask=inside, other=0.0)
    tl.store(summed + (kind * HEADS + head).to(tl.int64) * pairs + at, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def table_kernel(
    summed, sources, bounds, gradient, pairs, HEADS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """gradient (HEADS, ENTRIES): each entry is the sum of summed[kind, head, pair] over its sources.

    sources[bounds[e]:bounds[e + 1]] (int32) are those of entry e, as kind * pairs + pair. A program has one entry and
    one head.
    """
    head, entry = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    begin, end = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        source = tl.load(sources + at, mask=at < end, other=0).to(tl.int64)
        place = (source // pairs * HEADS + head) * pairs + source % pairs
        total += tl.load(summed + place, mask=at < end, other=0.0)
    tl.store(gradient + head * ENTRIES + entry, tl.sum(total, 0))
