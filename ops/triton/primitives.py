"""What all kernels share: reading tokens of a strided map, products, and the terms added to scores.

Scores are held in units of log2(e), so that exp2 serves. Slots: `m` for resident tokens, `n` for streamed ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch, schedule

__all__ = [
    "SIZES", "add_terms", "as_offset", "load_sums", "load_vectors", "locate", "product", "store_sums", "store_vectors",
    "to_log2",
]  # fmt: skip

# Arguments that differ from call to call: one compiled kernel serves every value.
SIZES = [
    "batch", "tile_count", "tokens", "queries", "pairs",
    *(f"{name}_image" for name in ("g", "q", "k", "v", "dq", "dk", "dv")),
]  # fmt: skip
ABSENT = tl.constexpr(schedule.ABSENT)
LOG2E = tl.constexpr(launch.LOG2_E)
RESIDENT = tl.constexpr(len(schedule.RESIDENT_FIELDS))
STREAMED = tl.constexpr(len(schedule.STREAMED_FIELDS))


@triton.jit
def locate(offset, place, order, CURVE: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """Tokens of slots whose offsets from `place` are given, and which slots have one; the others get the token there.

    Where MASKED is not set every slot has one. WIDE: what is computed from tokens takes 64 bits.
    """
    present = offset > ABSENT
    if MASKED:
        offset = tl.where(present, offset, 0)
    token = place + offset
    if CURVE:
        token = tl.load(order + token)
    return as_offset(token, WIDE), present


@triton.jit
def as_offset(index, WIDE: tl.constexpr):
    """An index from which offsets are computed: int64 where 32 bits would not hold them."""
    if WIDE:
        return index.to(tl.int64)
    return index


@triton.jit
def image_base(pointer, image, stride, UNIT: tl.constexpr):
    """Pointer to one image (int64) of a batch. `stride` counts UNIT elements: the compiler then sees the alignment."""
    return pointer + image * stride * UNIT


@triton.jit
def _vector_pointers(pointer, token, TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    return pointer + token[:, None] * TOKEN + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_vectors(
    pointer, token, present, TOKEN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """(slots, BLOCK): a vector of SIZE channels per token, zeros beyond it and, where MASKED, in slots without one."""
    at = _vector_pointers(pointer, token, TOKEN, BLOCK)
    if MASKED and SIZE < BLOCK:
        return tl.load(at, mask=present[:, None] & (tl.arange(0, BLOCK) < SIZE)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=present[:, None], other=0.0)
    elif SIZE < BLOCK:
        return tl.load(at, mask=(tl.arange(0, BLOCK) < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_vectors(pointer, token, present, value, TOKEN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store (slots, BLOCK) for the slots that have a token."""
    at = _vector_pointers(pointer, token, TOKEN, BLOCK)
    mask = present[:, None]
    if SIZE < BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < SIZE)[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums. "widened" serves the interpreter, which does not know bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_sums(sums, row):
    """Level and delta of rows of `sums` (rows, 2): side by side, since a load of single numbers is one per thread."""
    return tl.split(tl.load(sums + row[:, None] * 2 + tl.arange(0, 2)[None, :]))


@triton.jit
def store_sums(sums, row, level, delta, present):
    """Store what `load_sums` loads."""
    tl.store(sums + row[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(level, delta), mask=present[:, None])


@triton.jit
def to_log2(natural):
    """A log-sum-exp in units of log2; rows without a key count as 0, so that exp2(-inf - 0) is 0."""
    return tl.where(natural == float("-inf"), 0.0, natural * LOG2E)


@triton.jit
def add_terms(
    score, resident, streamed, bias, codes, rel, head, kind, m, n, token_m, token_n,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, ENTRIES: tl.constexpr, CENTRE: tl.constexpr,
    PITCH: tl.constexpr, REL_Y: tl.constexpr, REL_X: tl.constexpr,
    BIAS: tl.constexpr, INVERSE: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """Bias and mask of a tile's scores, by kind of bias.

    "atlas": both are one table per kind of tile and head. "mask": the same without bias and heads. All others compare
    places with the intervals; "gather" takes entries of a displacement table by the sums of two codes, "positions" by
    the difference of two tokens' codes, "decomposed" takes q . rel of the query's row of `rel`, one entry per axis.
    INVERSE: resident tokens are keys.
    """
    if BIAS == "atlas":
        row = (kind * HEADS + head) * BLOCK_M + m
        return score + tl.load(bias + row[:, None] * SLOTS + n[None, :]).to(tl.float32)
    if BIAS == "mask":
        return score + tl.load(bias + (kind * BLOCK_M + m)[:, None] * SLOTS + n[None, :]).to(tl.float32)
    own = resident + kind * RESIDENT * BLOCK_M + m
    other = streamed + kind * STREAMED * SLOTS + n
    y = tl.load(other + SLOTS)[None, :]
    allowed = (y >= tl.load(own + BLOCK_M)[:, None]) & (y < tl.load(own + 2 * BLOCK_M)[:, None])
    if not ONE_AXIS:
        x = tl.load(other + 2 * SLOTS)[None, :]
        allowed = allowed & (x >= tl.load(own + 3 * BLOCK_M)[:, None]) & (x < tl.load(own + 4 * BLOCK_M)[:, None])
    if BIAS == "gather":
        row = tl.load(own + 5 * BLOCK_M)[:, None] + tl.load(other + 3 * SLOTS)[None, :]
        entry = row * PITCH + tl.load(own + 6 * BLOCK_M)[:, None] + tl.load(other + 4 * SLOTS)[None, :]
        term = tl.load(bias + head * ENTRIES + entry, mask=allowed, other=0.0)
        score += term.to(tl.float32) * LOG2E
    elif BIAS == "positions":
        ahead = tl.load(codes + token_n)[None, :] - tl.load(codes + token_m)[:, None]
        if INVERSE:
            ahead = -ahead
        term = tl.load(bias + head * ENTRIES + CENTRE + ahead, mask=allowed, other=0.0)
        score += term.to(tl.float32) * LOG2E
    elif BIAS == "decomposed":
        if INVERSE:
            row = ((token_n * HEADS + head) * (REL_Y + REL_X))[None, :]
        else:
            row = ((token_m * HEADS + head) * (REL_Y + REL_X))[:, None]
        at_y = tl.load(own + 7 * BLOCK_M)[:, None] + tl.load(other + 5 * SLOTS)[None, :]
        at_x = tl.load(own + 8 * BLOCK_M)[:, None] + tl.load(other + 6 * SLOTS)[None, :]
        term_y = tl.load(rel + row + at_y, mask=allowed, other=0.0).to(tl.float32)
        term_x = tl.load(rel + row + REL_Y + at_x, mask=allowed, other=0.0).to(tl.float32)
        score += (term_y + term_x) * LOG2E
    return tl.where(allowed, score, float("-inf"))
