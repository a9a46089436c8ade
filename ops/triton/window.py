"""Cells: tokens that attend each other and nothing else (windows, shifted or not, grids, curve windows).

A program takes one head and a run of cells of one kind: the bias tile is loaded once, shift, grid step and curve order
live in the cells' offsets. The backward pass is one pass: a cell's softmax is computed again as a whole, so neither
the output nor the log-sum-exp is read, and the bias gradient stays in registers over the run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2E, SIZES, as_offset, image_base, load_vectors, locate, product, store_vectors

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _cell_bias(
    bias, codes, head, kind, present, token,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, ENTRIES: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_M) float32: bias and mask of a kind of cell, or of the one cell whose tokens are given."""
    m = tl.arange(0, BLOCK_M)
    # Rows without a token keep their keys, so that no row is empty; they are not stored.
    if BIAS == "atlas":
        term = tl.load(bias + ((kind * HEADS + head) * BLOCK_M + m)[:, None] * BLOCK_M + m[None, :])
        return tl.where(present[:, None], term, 0.0)
    allowed = present[None, :] & (m >= 0)[:, None]
    term = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    if BIAS == "positions":
        code = tl.load(codes + token)
        entry = CENTRE + code[None, :] - code[:, None]
        term = tl.load(bias + head * ENTRIES + entry, mask=allowed, other=0.0).to(tl.float32) * LOG2E
    return tl.where(allowed, term, float("-inf"))


@triton.jit
def _next(cell, image, count):
    """The cell after this one, in the next image after the last: no division in the loop."""
    last = cell + 1 == count
    return tl.where(last, 0, cell + 1), tl.where(last, image + 1, image)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, runs, first_token, offset, order, bias, codes,
    tokens, scale, q_image, k_image, v_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, CURVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (B, tokens, HEADS, DV) of a run of cells. `scale` multiplies q . k, log2(e) included."""
    head, run = as_offset(tl.program_id(0) % HEADS, WIDE), tl.program_id(0) // HEADS
    kind, begin, count = tl.load(runs + run * 5), tl.load(runs + run * 5 + 1), tl.load(runs + run * 5 + 2)
    first, items = tl.load(runs + run * 5 + 3), tl.load(runs + run * 5 + 4)
    m = tl.arange(0, BLOCK_M)
    offsets = tl.load(offset + kind * BLOCK_M + m)
    token, present = locate(offsets, tl.load(first_token + begin), order, CURVE, True, WIDE)
    term = _cell_bias(bias, codes, head, kind, present, token, HEADS, BLOCK_M, ENTRIES, CENTRE, BIAS)
    cell, image = first % count, (first // count).to(tl.int64)
    for _ in range(items):
        token, present = locate(offsets, tl.load(first_token + begin + cell), order, CURVE, True, WIDE)
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        query = load_vectors(q_at, token, present, Q_TOKEN, D, BLOCK_D, False)
        key = load_vectors(k_at, token, present, K_TOKEN, D, BLOCK_D, False)
        values = load_vectors(v_at, token, present, V_TOKEN, DV, BLOCK_DV, False)
        score = product(query, tl.trans(key), PRECISION) * scale + term
        peak = tl.max(score, 1)
        weight = tl.exp2(score - peak[:, None])
        total = tl.sum(weight, 1)
        value = product(weight.to(values.dtype), values, PRECISION) * (1.0 / total)[:, None]
        out_at = out + image * tokens * (HEADS * DV) + head * DV
        store_vectors(out_at, token, present, value, HEADS * DV, DV, BLOCK_DV)
        cell, image = _next(cell, image, count)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad, q, k, v, dq, dk, dv, partial, runs, first_token, offset, order, bias, codes,
    scale, softmax_scale, g_image, q_image, k_image, v_image, dq_image, dk_image, dv_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr, DQ_HEAD: tl.constexpr, DK_TOKEN: tl.constexpr, DK_HEAD: tl.constexpr,
    DV_TOKEN: tl.constexpr, DV_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, CURVE: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV of a run of cells and the sum of its score gradients, partial (runs, HEADS, BLOCK_M, BLOCK_M)."""
    head, run = as_offset(tl.program_id(0) % HEADS, WIDE), tl.program_id(0) // HEADS
    kind, begin, count = tl.load(runs + run * 5), tl.load(runs + run * 5 + 1), tl.load(runs + run * 5 + 2)
    first, items = tl.load(runs + run * 5 + 3), tl.load(runs + run * 5 + 4)
    m = tl.arange(0, BLOCK_M)
    offsets = tl.load(offset + kind * BLOCK_M + m)
    token, present = locate(offsets, tl.load(first_token + begin), order, CURVE, True, WIDE)
    term = _cell_bias(bias, codes, head, kind, present, token, HEADS, BLOCK_M, ENTRIES, CENTRE, BIAS)
    if BIAS_GRADIENT:
        summed = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    cell, image = first % count, (first // count).to(tl.int64)
    for _ in range(items):
        token, present = locate(offsets, tl.load(first_token + begin + cell), order, CURVE, True, WIDE)
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
        query = load_vectors(q_at, token, present, Q_TOKEN, D, BLOCK_D, False)
        key = load_vectors(k_at, token, present, K_TOKEN, D, BLOCK_D, False)
        # Zeros where a slot has no token: its row then adds nothing to dK, dV and the bias.
        score = product(query, tl.trans(key), PRECISION) * scale + term
        weight = tl.exp2(score - tl.max(score, 1)[:, None])
        weight = weight * (1.0 / tl.sum(weight, 1))[:, None]
        g = load_vectors(g_at, token, present, G_TOKEN, DV, BLOCK_DV, True)
        value_gradient = product(tl.trans(weight.to(g.dtype)), g, PRECISION)
        dv_at = image_base(dv, image, dv_image, UNIT) + head * DV_HEAD
        store_vectors(dv_at, token, present, value_gradient, DV_TOKEN, DV, BLOCK_DV)
        values = load_vectors(v_at, token, present, V_TOKEN, DV, BLOCK_DV, False)
        dp = product(g, tl.trans(values), PRECISION)
        ds = weight * (dp - tl.sum(weight * dp, 1)[:, None])
        if BIAS_GRADIENT:
            summed += ds
        low = ds.to(query.dtype)
        query_gradient = product(low, key, PRECISION) * softmax_scale
        dq_at = image_base(dq, image, dq_image, UNIT) + head * DQ_HEAD
        store_vectors(dq_at, token, present, query_gradient, DQ_TOKEN, D, BLOCK_D)
        key_gradient = product(tl.trans(low), query, PRECISION) * softmax_scale
        dk_at = image_base(dk, image, dk_image, UNIT) + head * DK_HEAD
        store_vectors(dk_at, token, present, key_gradient, DK_TOKEN, D, BLOCK_D)
        cell, image = _next(cell, image, count)
    if BIAS_GRADIENT:
        row = (run * HEADS + head).to(tl.int64) * BLOCK_M + m
        tl.store(partial + row[:, None] * BLOCK_M + m[None, :], summed)
