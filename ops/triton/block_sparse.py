"""Routed attention: every region of queries attends a list of key regions of its image, read in place.

A program holds (part of) one region and streams the tokens of the regions on its list: its own top-k list in the
forward and dQ passes, the regions that chose it in the dK/dV pass (inverse lists, in the order of the queries). Where
regions are so small that tiles of one region would be mostly empty, tiles of BLOCK_M consecutive tokens stream the
whole image and a bit per region pair masks the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2E, SIZES, as_offset, image_base, load_sums, load_vectors, product, store_sums, store_vectors

__all__ = ["forward_kernel", "key_kernel", "query_kernel"]


@triton.jit
def _resident(
    tile, BLOCK_M: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr,
    SIZE_X: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Region of a tile (0 where DENSE), the tokens of its slots, and which slots have one; the others get token 0."""
    m = tl.arange(0, BLOCK_M)
    if DENSE:
        token = tile * BLOCK_M + m
        present = token < HEIGHT * WIDTH
        region = 0
    else:
        parts: tl.constexpr = (SIZE_Y * SIZE_X + BLOCK_M - 1) // BLOCK_M
        region = tile // parts
        place = tile % parts * BLOCK_M + m
        token, present = _token(region, place, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X)
        present = present & (place < SIZE_Y * SIZE_X)
    return region, tl.where(present, token, 0), present


@triton.jit
def _streamed(
    start, count, listed, BLOCK_N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr,
    SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Of streamed slots: tokens, which have one (others get token 0), which belong to a listed region, rows of sums."""
    tokens: tl.constexpr = SIZE_Y * SIZE_X
    n = start + tl.arange(0, BLOCK_N)
    used = n < count
    if DENSE:
        token, present = n, used
        region, place = _region(n, WIDTH, ACROSS, SIZE_Y, SIZE_X), n // WIDTH % SIZE_Y * SIZE_X + n % WIDTH % SIZE_X
    else:
        if tokens % BLOCK_N == 0:  # a block lies in one region
            region = tl.load(listed + start // tokens).to(tl.int32)
            place = start % tokens + tl.arange(0, BLOCK_N)
        else:
            region = tl.load(listed + n // tokens, mask=used, other=0).to(tl.int32)
            place = n % tokens
        token, present = _token(region, place, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X)
        present = present & used
    return tl.where(present, token, 0), present, used, tl.where(present, region * tokens + place, 0)


@triton.jit
def _token(
    region, place, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr,
    SIZE_X: tl.constexpr,
):  # fmt: skip
    """The map's token at `place` of a region, and whether it lies in the map."""
    y = region // ACROSS * SIZE_Y + place // SIZE_X
    x = region % ACROSS * SIZE_X + place % SIZE_X
    return y * WIDTH + x, (y < HEIGHT) & (x < WIDTH)


@triton.jit
def _region(token, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr):
    return token // WIDTH // SIZE_Y * ACROSS + token % WIDTH // SIZE_X


@triton.jit
def _row(
    token, image, head, HEADS: tl.constexpr, REGIONS: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr,
    SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
):  # fmt: skip
    """Where a token's entry lies in (B, HEADS, REGIONS, tokens of a region) sums."""
    place = token // WIDTH % SIZE_Y * SIZE_X + token % WIDTH % SIZE_X
    region = _region(token, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    return ((image * HEADS + head) * REGIONS + region) * (SIZE_Y * SIZE_X) + place


@triton.jit
def _masked(
    score, counted, chosen, query_region, key_region, DENSE: tl.constexpr, WHOLE: tl.constexpr, INVERSE: tl.constexpr
):
    """Scores with -inf where a streamed slot does not count or, where DENSE, a region did not choose the other.

    chosen: an image's (REGIONS,) int64, bit s of entry r set where the queries of region r attend region s.
    WHOLE: every slot counts.
    """
    if WHOLE and not DENSE:
        return score
    allowed = counted[None, :]
    if DENSE and INVERSE:
        bits = tl.full(key_region.shape, 1, tl.int64) << key_region.to(tl.int64)
        allowed = allowed & ((tl.load(chosen + query_region)[None, :] & bits[:, None]) != 0)
    elif DENSE:
        bits = tl.full(key_region.shape, 1, tl.int64) << key_region.to(tl.int64)
        allowed = allowed & ((tl.load(chosen + query_region)[:, None] & bits[None, :]) != 0)
    return tl.where(allowed, score, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, routes, chosen, scale, q_image, k_image, v_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, REGIONS: tl.constexpr, TOPK: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
    DENSE: tl.constexpr, ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (B, H * W, HEADS, DV) and log-sum-exp (B, HEADS, REGIONS, tokens) float32 of one tile and head."""
    head, tile = as_offset(tl.program_id(0) % HEADS, WIDE), tl.program_id(0) // HEADS % TILES
    image = (tl.program_id(0) // (HEADS * TILES)).to(tl.int64)
    region, token_m, present_m = _resident(tile, BLOCK_M, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE)
    token_m = as_offset(token_m, WIDE)
    listed = routes + (image * REGIONS + region) * TOPK
    chosen = chosen + image * REGIONS
    q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
    k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
    v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
    query = load_vectors(q_at, token_m, present_m, Q_TOKEN, D, BLOCK_D, False)
    region_m = _region(token_m, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    count: tl.constexpr = HEIGHT * WIDTH if DENSE else TOPK * SIZE_Y * SIZE_X
    short: tl.constexpr = HEIGHT % SIZE_Y > 0 or WIDTH % SIZE_X > 0
    whole: tl.constexpr = count % BLOCK_N == 0 and (ZERO_KEYS or not short)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, count, BLOCK_N):
        token_n, present_n, used, _ = _streamed(
            start, count, listed, BLOCK_N, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE
        )
        token_n = as_offset(token_n, WIDE)
        key = load_vectors(k_at, token_n, present_n, K_TOKEN, D, BLOCK_D, ZERO_KEYS)
        score = product(query, tl.trans(key), PRECISION) * scale
        region_n = _region(token_n, WIDTH, ACROSS, SIZE_Y, SIZE_X)
        score = _masked(score, used if ZERO_KEYS else present_n, chosen, region_m, region_n, DENSE, whole, False)
        higher = tl.maximum(peak, tl.max(score, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weight, 1)
        values = load_vectors(v_at, token_n, present_n, V_TOKEN, DV, BLOCK_DV, ZERO_KEYS)
        value = value * fade[:, None] + product(weight.to(values.dtype), values, PRECISION)
        peak = higher
    out_at = out + image * (HEIGHT * WIDTH * HEADS * DV) + head * DV
    store_vectors(out_at, token_m, present_m, value * (1.0 / total)[:, None], HEADS * DV, DV, BLOCK_DV)
    row = _row(token_m, image, head, HEADS, REGIONS, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    tl.store(lse + row, (peak + tl.log2(total)) / LOG2E, mask=present_m)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad, q, k, v, out, lse, dq, sums, routes, chosen, scale, softmax_scale,
    g_image, q_image, k_image, v_image, dq_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr, DQ_HEAD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, REGIONS: tl.constexpr, TOPK: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
    DENSE: tl.constexpr, ZERO_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; for the dK/dV pass delta = sum(grad * out) and level, lse in base 2, laid out so."""
    head, tile = as_offset(tl.program_id(0) % HEADS, WIDE), tl.program_id(0) // HEADS % TILES
    image = (tl.program_id(0) // (HEADS * TILES)).to(tl.int64)
    region, token_m, present_m = _resident(tile, BLOCK_M, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE)
    token_m = as_offset(token_m, WIDE)
    listed = routes + (image * REGIONS + region) * TOPK
    chosen = chosen + image * REGIONS
    q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
    k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
    v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
    g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
    out_at = out + image * (HEIGHT * WIDTH * HEADS * DV) + head * DV
    query = load_vectors(q_at, token_m, present_m, Q_TOKEN, D, BLOCK_D, False)
    g = load_vectors(g_at, token_m, present_m, G_TOKEN, DV, BLOCK_DV, False)
    o = load_vectors(out_at, token_m, present_m, HEADS * DV, DV, BLOCK_DV, False)
    row = _row(token_m, image, head, HEADS, REGIONS, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    shift = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    height = tl.load(lse + row) * LOG2E
    store_sums(sums, row, height, shift, present_m)
    region_m = _region(token_m, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    count: tl.constexpr = HEIGHT * WIDTH if DENSE else TOPK * SIZE_Y * SIZE_X
    short: tl.constexpr = HEIGHT % SIZE_Y > 0 or WIDTH % SIZE_X > 0
    whole: tl.constexpr = count % BLOCK_N == 0 and (ZERO_KEYS or not short)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_N):
        token_n, present_n, used, _ = _streamed(
            start, count, listed, BLOCK_N, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE
        )
        token_n = as_offset(token_n, WIDE)
        key = load_vectors(k_at, token_n, present_n, K_TOKEN, D, BLOCK_D, ZERO_KEYS)
        score = product(query, tl.trans(key), PRECISION) * scale
        region_n = _region(token_n, WIDTH, ACROSS, SIZE_Y, SIZE_X)
        score = _masked(score, used if ZERO_KEYS else present_n, chosen, region_m, region_n, DENSE, whole, False)
        values = load_vectors(v_at, token_n, present_n, V_TOKEN, DV, BLOCK_DV, ZERO_KEYS)
        ds = tl.exp2(score - height[:, None]) * (product(g, tl.trans(values), PRECISION) - shift[:, None])
        gradient += product(ds.to(key.dtype), key, PRECISION)
    dq_at = image_base(dq, image, dq_image, UNIT) + head * DQ_HEAD
    store_vectors(dq_at, token_m, present_m, gradient * softmax_scale, DQ_TOKEN, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    grad, q, k, v, sums, dk, dv, chosen_by, bounds, chosen, scale, softmax_scale,
    g_image, q_image, k_image, v_image, dk_image, dv_image,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    G_TOKEN: tl.constexpr, G_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    DK_TOKEN: tl.constexpr, DK_HEAD: tl.constexpr, DV_TOKEN: tl.constexpr, DV_HEAD: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, REGIONS: tl.constexpr, TOPK: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys. chosen_by (B, REGIONS * TOPK): the query regions that chose each key region,

    those of region s at [bounds[b, s], bounds[b, s + 1]) of image b.
    """
    head, tile = as_offset(tl.program_id(0) % HEADS, WIDE), tl.program_id(0) // HEADS % TILES
    image = (tl.program_id(0) // (HEADS * TILES)).to(tl.int64)
    region, token_m, present_m = _resident(tile, BLOCK_M, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE)
    token_m = as_offset(token_m, WIDE)
    chosen = chosen + image * REGIONS
    q_at = image_base(q, image, q_image, UNIT) + head * Q_HEAD
    k_at = image_base(k, image, k_image, UNIT) + head * K_HEAD
    v_at = image_base(v, image, v_image, UNIT) + head * V_HEAD
    g_at = image_base(grad, image, g_image, UNIT) + head * G_HEAD
    key = load_vectors(k_at, token_m, present_m, K_TOKEN, D, BLOCK_D, False)
    values = load_vectors(v_at, token_m, present_m, V_TOKEN, DV, BLOCK_DV, False)
    region_m = _region(token_m, WIDTH, ACROSS, SIZE_Y, SIZE_X)
    listed = chosen_by
    if DENSE:
        count = HEIGHT * WIDTH
    else:
        begin = tl.load(bounds + image * (REGIONS + 1) + region)
        count = (tl.load(bounds + image * (REGIONS + 1) + region + 1) - begin) * (SIZE_Y * SIZE_X)
        listed = chosen_by + image * (REGIONS * TOPK) + begin
    short: tl.constexpr = HEIGHT % SIZE_Y > 0 or WIDTH % SIZE_X > 0
    whole: tl.constexpr = (SIZE_Y * SIZE_X) % BLOCK_N == 0 and not short
    key_gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, count, BLOCK_N):
        token_n, present_n, _, row_n = _streamed(
            start, count, listed, BLOCK_N, HEIGHT, WIDTH, ACROSS, SIZE_Y, SIZE_X, DENSE
        )
        token_n = as_offset(token_n, WIDE)
        query = load_vectors(q_at, token_n, present_n, Q_TOKEN, D, BLOCK_D, False)
        score = product(key, tl.trans(query), PRECISION) * scale
        region_n = _region(token_n, WIDTH, ACROSS, SIZE_Y, SIZE_X)
        score = _masked(score, present_n, chosen, region_n, region_m, DENSE, whole, True)
        height, shift = load_sums(sums, (image * HEADS + head) * (REGIONS * SIZE_Y * SIZE_X) + row_n)
        weight = tl.exp2(score - height[None, :])
        g = load_vectors(g_at, token_n, present_n, G_TOKEN, DV, BLOCK_DV, False)
        value_gradient += product(weight.to(g.dtype), g, PRECISION)
        ds = weight * (product(values, tl.trans(g), PRECISION) - shift[None, :])
        key_gradient += product(ds.to(query.dtype), query, PRECISION)
    dk_at = image_base(dk, image, dk_image, UNIT) + head * DK_HEAD
    dv_at = image_base(dv, image, dv_image, UNIT) + head * DV_HEAD
    store_vectors(dk_at, token_m, present_m, key_gradient * softmax_scale, DK_TOKEN, D, BLOCK_D)
    store_vectors(dv_at, token_m, present_m, value_gradient, DV_TOKEN, DV, BLOCK_DV)
