"""Tiles with a halo: neighborhoods, dilated and strided ones, slides, halo blocks, curve bands, large windows.

A program holds one tile of resident tokens and streams those they have to do with through it. Forward and dQ hold
queries and stream keys; dK/dV holds keys and streams the queries that see them, which are intervals again. The bias
gradient is taken along with dQ where the tiles are rectangles; elsewhere a pass of its own holds one block of (query,
key) slots in registers and runs over all tiles of a kind. No atomics anywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    RESIDENT,
    SIZES,
    STREAMED,
    add_terms,
    as_offset,
    image_base,
    load_sums,
    load_vectors,
    locate,
    product,
    store_sums,
    store_vectors,
    to_log2,
)

__all__ = ["bias_kernel", "forward_kernel", "key_kernel", "query_kernel"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, tiles, resident, streamed, order, bias, codes, rel,
    batch, tile_count, queries, scale, q_image, k_image, v_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, IMAGES: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, PITCH: tl.constexpr, REL_Y: tl.constexpr, REL_X: tl.constexpr,
    BIAS: tl.constexpr, CURVE: tl.constexpr, ZERO_KEYS: tl.constexpr, NEED_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries and one head, for IMAGES images after each other.

    out: (B, queries, HEADS, DV), lse: (B, queries, HEADS) float32. `scale` multiplies q . k, log2(e) included.
    """
    program = tl.program_id(0)
    head = as_offset(program % HEADS, WIDE)
    tile = (program // HEADS) % tile_count
    first = (program // (HEADS * tile_count)).to(tl.int64) * IMAGES
    place_m, place_n = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    kind, count = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    token_m, present_m = locate(tl.load(resident + kind * RESIDENT * BLOCK_M + m), place_m, order, CURVE, True, WIDE)
    for image in range(first, min(first + IMAGES, batch)):
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        rel_at = rel + image * queries * HEADS * (REL_Y + REL_X)
        query = load_vectors(q_at, token_m, present_m, Q_TOKEN, D, BLOCK_D, False)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        value = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start in range(0, count, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            offset_n = tl.load(streamed + kind * STREAMED * SLOTS + n)
            token_n, present_n = locate(offset_n, place_n, order, CURVE, ZERO_KEYS, WIDE)
            key = load_vectors(k_at, token_n, present_n, K_TOKEN, D, BLOCK_D, ZERO_KEYS)
            score = product(query, tl.trans(key), PRECISION) * scale
            score = add_terms(
                score, resident, streamed, bias, codes, rel_at, head, kind, m, n, token_m, token_n,
                HEADS, BLOCK_M, SLOTS, ENTRIES, CENTRE, PITCH, REL_Y, REL_X, BIAS, False, CURVE,
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(score, 1))
            # A row that has met no key yet is at -inf: subtract 0 there, its weights are 0 then.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(score - level[:, None])
            fade = tl.exp2(peak - level)
            total = total * fade + tl.sum(weight, 1)
            values = load_vectors(v_at, token_n, present_n, V_TOKEN, DV, BLOCK_DV, ZERO_KEYS)
            value = value * fade[:, None] + product(weight.to(values.dtype), values, PRECISION)
            peak = higher
        seen = total > 0.0
        value = value * (1.0 / tl.where(seen, total, 1.0))[:, None]
        out_at = out + image * queries * (HEADS * DV) + head * DV
        store_vectors(out_at, token_m, present_m, value, HEADS * DV, DV, BLOCK_DV)
        if NEED_LSE:
            natural = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
            tl.store(lse + image * queries * HEADS + token_m * HEADS + head, natural, mask=present_m)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad, q, k, v, out, lse, dq, sums, drel, partial, tiles, resident, streamed, order, bias, codes, rel,
    batch, tile_count, queries, scale, softmax_scale, g_image, q_image, k_image, v_image, dq_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr, DQ_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, IMAGES: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, PITCH: tl.constexpr, REL_Y: tl.constexpr, REL_X: tl.constexpr,
    KEYS_Y: tl.constexpr, KEYS_X: tl.constexpr,
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, GRID_K: tl.constexpr, TABLE_Y: tl.constexpr, TABLE_X: tl.constexpr,
    BIAS: tl.constexpr, CURVE: tl.constexpr, ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; and sums (B, queries, HEADS, 2) float32 for the other passes.

    Those are level, the log-sum-exp in base 2, and delta = sum(grad * out). With a decomposed bias also drel
    (B, queries, HEADS, REL_Y + REL_X), the gradient of q . rel, zero on entry.
    KEYS_Y, KEYS_X: a tile's streamed rows and columns, rounded up to a power of two.

    Where TABLE_Y is not 0, also partial (programs, TABLE_Y, TABLE_X) float32: the gradient of the bias table, summed
    over the program's scores. Slots then lie on a grid (see `Schedule.grid`).
    """
    program = tl.program_id(0)
    head = as_offset(program % HEADS, WIDE)
    tile = (program // HEADS) % tile_count
    first = (program // (HEADS * tile_count)).to(tl.int64) * IMAGES
    place_m, place_n = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    kind, count = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    token_m, present_m = locate(tl.load(resident + kind * RESIDENT * BLOCK_M + m), place_m, order, CURVE, True, WIDE)
    if TABLE_Y > 0:
        table = tl.zeros([TABLE_Y, TABLE_X], tl.float32)
    for image in range(first, min(first + IMAGES, batch)):
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
        out_at = out + image * queries * (HEADS * DV) + head * DV
        rel_at = rel + image * queries * HEADS * (REL_Y + REL_X)
        sums_at = image * queries * HEADS + token_m * HEADS + head
        query = load_vectors(q_at, token_m, present_m, Q_TOKEN, D, BLOCK_D, False)
        g = load_vectors(g_at, token_m, present_m, G_TOKEN, DV, BLOCK_DV, False)
        o = load_vectors(out_at, token_m, present_m, HEADS * DV, DV, BLOCK_DV, False)
        shift = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        height = to_log2(tl.load(lse + sums_at))
        store_sums(sums, sums_at, height, shift, present_m)
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if BIAS == "decomposed":
            rel_y = tl.zeros([BLOCK_M, KEYS_Y], tl.float32)
            rel_x = tl.zeros([BLOCK_M, KEYS_X], tl.float32)
        for start in range(0, count, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            offset_n = tl.load(streamed + kind * STREAMED * SLOTS + n)
            token_n, present_n = locate(offset_n, place_n, order, CURVE, ZERO_KEYS, WIDE)
            key = load_vectors(k_at, token_n, present_n, K_TOKEN, D, BLOCK_D, ZERO_KEYS)
            score = product(query, tl.trans(key), PRECISION) * scale
            score = add_terms(
                score, resident, streamed, bias, codes, rel_at, head, kind, m, n, token_m, token_n,
                HEADS, BLOCK_M, SLOTS, ENTRIES, CENTRE, PITCH, REL_Y, REL_X, BIAS, False, CURVE,
            )  # fmt: skip
            values = load_vectors(v_at, token_n, present_n, V_TOKEN, DV, BLOCK_DV, ZERO_KEYS)
            ds = tl.exp2(score - height[:, None]) * (product(g, tl.trans(values), PRECISION) - shift[:, None])
            gradient += product(ds.to(key.dtype), key, PRECISION)
            if TABLE_Y > 0:
                table += _by_displacement(
                    ds.to(key.dtype), resident + kind * RESIDENT * BLOCK_M, streamed + kind * STREAMED * SLOTS, start,
                    BLOCK_M, BLOCK_N, SLOTS, GRID_Y, GRID_X, GRID_K, TABLE_Y, TABLE_X, PRECISION,
                )  # fmt: skip
            if BIAS == "decomposed":
                at = streamed + kind * STREAMED * SLOTS + n
                in_row = tl.load(at + SLOTS)[:, None] == tl.arange(0, KEYS_Y)[None, :]
                in_column = tl.load(at + 2 * SLOTS)[:, None] == tl.arange(0, KEYS_X)[None, :]
                rel_y += product(ds.to(key.dtype), in_row.to(tl.float32).to(key.dtype), PRECISION)
                rel_x += product(ds.to(key.dtype), in_column.to(tl.float32).to(key.dtype), PRECISION)
        dq_at = image_base(dq, image, dq_image, UNIT) + head * DQ_HEAD
        store_vectors(dq_at, token_m, present_m, gradient * softmax_scale, DQ_TOKEN, D, BLOCK_D)
        if BIAS == "decomposed":
            own = resident + kind * RESIDENT * BLOCK_M + m
            row = drel + image * queries * HEADS * (REL_Y + REL_X)
            row = row + ((token_m * HEADS + head) * (REL_Y + REL_X))[:, None]
            at_y = tl.load(own + 7 * BLOCK_M)[:, None] + tl.arange(0, KEYS_Y)[None, :]
            at_x = tl.load(own + 8 * BLOCK_M)[:, None] + tl.arange(0, KEYS_X)[None, :]
            tl.store(row + at_y, rel_y, mask=present_m[:, None] & (at_y >= 0) & (at_y < REL_Y))
            tl.store(row + REL_Y + at_x, rel_x, mask=present_m[:, None] & (at_x >= 0) & (at_x < REL_X))
    if TABLE_Y > 0:
        at = tl.arange(0, TABLE_Y)[:, None] * TABLE_X + tl.arange(0, TABLE_X)[None, :]
        tl.store(partial + program.to(tl.int64) * (TABLE_Y * TABLE_X) + at, table)


@triton.jit
def _by_displacement(
    ds, resident, streamed, start,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, GRID_Y: tl.constexpr, GRID_X: tl.constexpr,
    GRID_K: tl.constexpr, TABLE_Y: tl.constexpr, TABLE_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(TABLE_Y, TABLE_X): score gradients summed by displacement, as two products with constant one-hot matrices.

    Rows and columns of a tile are regrouped, (yq, xq) x (yk, xk) to (yq, yk) x (xq, xk): a row of the table is then a
    sum over the second pair, and a column one over the first.
    """
    rows: tl.constexpr = BLOCK_N // GRID_K
    apart = tl.permute(tl.reshape(ds, [GRID_Y, GRID_X, rows, GRID_K]), [0, 2, 1, 3])
    apart = tl.reshape(apart, [GRID_Y * rows, GRID_X * GRID_K])
    pair = tl.arange(0, GRID_X * GRID_K)
    column = tl.load(resident + 6 * BLOCK_M + pair // GRID_K) + tl.load(streamed + 4 * SLOTS + pair % GRID_K)
    one_hot = (column[:, None] == tl.arange(0, TABLE_X)[None, :]).to(tl.float32)
    by_column = product(apart, one_hot.to(ds.dtype), PRECISION)
    pair = tl.arange(0, GRID_Y * rows)
    row = tl.load(resident + 5 * BLOCK_M + pair // rows * GRID_X)
    row += tl.load(streamed + 3 * SLOTS + start + pair % rows * GRID_K)
    return product((tl.arange(0, TABLE_Y)[:, None] == row[None, :]).to(tl.float32), by_column, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    grad, q, k, v, sums, dk, dv, tiles, resident, streamed, order, bias, codes, rel,
    batch, tile_count, queries, scale, softmax_scale, g_image, q_image, k_image, v_image, dk_image, dv_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    DK_TOKEN: tl.constexpr, DK_HEAD: tl.constexpr, DV_TOKEN: tl.constexpr, DV_HEAD: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, IMAGES: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, PITCH: tl.constexpr, REL_Y: tl.constexpr, REL_X: tl.constexpr,
    BIAS: tl.constexpr, CURVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, from the queries that see them. Scores are held keys by queries."""
    program = tl.program_id(0)
    head = as_offset(program % HEADS, WIDE)
    tile = (program // HEADS) % tile_count
    first = (program // (HEADS * tile_count)).to(tl.int64) * IMAGES
    place_m, place_n = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    kind, count = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    token_m, present_m = locate(tl.load(resident + kind * RESIDENT * BLOCK_M + m), place_m, order, CURVE, True, WIDE)
    for image in range(first, min(first + IMAGES, batch)):
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
        rel_at = rel + image * queries * HEADS * (REL_Y + REL_X)
        sums_at = image * queries * HEADS + head
        key = load_vectors(k_at, token_m, present_m, K_TOKEN, D, BLOCK_D, False)
        values = load_vectors(v_at, token_m, present_m, V_TOKEN, DV, BLOCK_DV, False)
        key_gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        value_gradient = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start in range(0, count, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            offset_n = tl.load(streamed + kind * STREAMED * SLOTS + n)
            token_n, present_n = locate(offset_n, place_n, order, CURVE, False, WIDE)
            query = load_vectors(q_at, token_n, present_n, Q_TOKEN, D, BLOCK_D, False)
            score = product(key, tl.trans(query), PRECISION) * scale
            score = add_terms(
                score, resident, streamed, bias, codes, rel_at, head, kind, m, n, token_m, token_n,
                HEADS, BLOCK_M, SLOTS, ENTRIES, CENTRE, PITCH, REL_Y, REL_X, BIAS, True, CURVE,
            )  # fmt: skip
            height, shift = load_sums(sums, sums_at + token_n * HEADS)
            weight = tl.exp2(score - height[None, :])
            g = load_vectors(g_at, token_n, present_n, G_TOKEN, DV, BLOCK_DV, False)
            value_gradient += product(weight.to(g.dtype), g, PRECISION)
            ds = weight * (product(values, tl.trans(g), PRECISION) - shift[None, :])
            key_gradient += product(ds.to(query.dtype), query, PRECISION)
        dk_at = image_base(dk, image, dk_image, UNIT) + head * DK_HEAD
        dv_at = image_base(dv, image, dv_image, UNIT) + head * DV_HEAD
        store_vectors(dk_at, token_m, present_m, key_gradient * softmax_scale, DK_TOKEN, D, BLOCK_D)
        store_vectors(dv_at, token_m, present_m, value_gradient, DV_TOKEN, DV, BLOCK_DV)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(
    grad, q, k, v, sums, partial, runs, members, tiles, resident, streamed, order, bias, codes, rel,
    queries, scale, g_image, q_image, k_image, v_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr, CENTRE: tl.constexpr, PITCH: tl.constexpr, REL_Y: tl.constexpr, REL_X: tl.constexpr,
    BIAS: tl.constexpr, CURVE: tl.constexpr, ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score gradients of one block of a tile's slots, summed over a run of tiles and images.

    partial: (runs, HEADS, BLOCK_M, SLOTS) float32. members: tiles sorted by kind.
    """
    program = tl.program_id(0)
    head = as_offset(program % HEADS, WIDE)
    start = (program // HEADS) % (SLOTS // BLOCK_N) * BLOCK_N
    run = program // (HEADS * (SLOTS // BLOCK_N))
    kind, begin, count = tl.load(runs + run * 5), tl.load(runs + run * 5 + 1), tl.load(runs + run * 5 + 2)
    first, items = tl.load(runs + run * 5 + 3), tl.load(runs + run * 5 + 4)
    m, n = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    offset_m = tl.load(resident + kind * RESIDENT * BLOCK_M + m)
    offset_n = tl.load(streamed + kind * STREAMED * SLOTS + n)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in range(first, first + items):
        tile, image = tl.load(members + begin + item % count), (item // count).to(tl.int64)
        token_m, present_m = locate(offset_m, tl.load(tiles + tile * 4), order, CURVE, True, WIDE)
        token_n, present_n = locate(offset_n, tl.load(tiles + tile * 4 + 1), order, CURVE, ZERO_KEYS, WIDE)
        q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
        k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
        v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
        g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
        sums_at = image * queries * HEADS + token_m * HEADS + head
        query = load_vectors(q_at, token_m, present_m, Q_TOKEN, D, BLOCK_D, False)
        key = load_vectors(k_at, token_n, present_n, K_TOKEN, D, BLOCK_D, ZERO_KEYS)
        score = product(query, tl.trans(key), PRECISION) * scale
        score = add_terms(
            score, resident, streamed, bias, codes, rel, head, kind, m, n, token_m, token_n,
            HEADS, BLOCK_M, SLOTS, ENTRIES, CENTRE, PITCH, REL_Y, REL_X, BIAS, False, CURVE,
        )  # fmt: skip
        height, shift = load_sums(sums, sums_at)
        weight = tl.exp2(score - height[:, None])
        g = load_vectors(g_at, token_m, present_m, G_TOKEN, DV, BLOCK_DV, False)
        values = load_vectors(v_at, token_n, present_n, V_TOKEN, DV, BLOCK_DV, ZERO_KEYS)
        total += weight * (product(g, tl.trans(values), PRECISION) - shift[:, None])
    row = (run * HEADS + head).to(tl.int64) * BLOCK_M + m
    tl.store(partial + row[:, None] * SLOTS + n[None, :], total)
