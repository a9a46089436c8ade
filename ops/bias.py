"""Relative position bias: which kinds there are, where each score finds its entry, and how tables change size.

All tables are indexed by key minus query. `table`: (heads, 2*ry+1, 2*rx+1), one entry per displacement in steps.
`curve`: (heads, 2*r+1), the same along a curve. `positions`: (heads, 2H-1, 2W-1) for a curve pattern, by the true 2-D
places of the two tokens. `decomposed`: a pair (rel_y, rel_x) of (rows, head_dim), added as q . rel_y + q . rel_x.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .curves import curve_order
from .patterns import Resolved

__all__ = ["BiasKind", "bias_kind", "position_index", "resize_table", "table_index"]


class BiasKind(Enum):
    """How the bias of a score is found."""

    NONE = "none"
    TABLE = "table"
    POSITIONS = "positions"
    DECOMPOSED = "decomposed"


def bias_kind(bias: Tensor | None, rel_x: Tensor | None, resolved: Resolved, num_heads: int, head_dim: int) -> BiasKind:
    """Kind of a bias, after checking its shape against the pattern.

    Raises:
        ValueError: the bias does not fit; the message says which shape does.
    """
    if bias is None:
        return BiasKind.NONE
    ry, rx = resolved.y, resolved.x
    if rel_x is not None:
        want = ((2 * ry.rel_reach + 1, head_dim), (2 * rx.rel_reach + 1, head_dim))
        got = (tuple(bias.shape), tuple(rel_x.shape))
        if resolved.pattern.curve is not None:
            raise ValueError(f"decomposed bias needs the two image axes, {resolved.pattern} has one curve axis")
        if got != want:
            raise ValueError(f"decomposed bias of {resolved.pattern} must have shapes {want[0]}, {want[1]}, got {got}")
        return BiasKind.DECOMPOSED
    shape = tuple(bias.shape)
    table: tuple[int, ...] = (num_heads, 2 * ry.reach + 1, 2 * rx.reach + 1)
    if resolved.pattern.curve is None:
        if shape != table:
            raise ValueError(f"bias of {resolved.pattern} must have shape {table} (heads, 2*ry+1, 2*rx+1), got {shape}")
        return BiasKind.TABLE
    positions = (num_heads, 2 * resolved.height - 1, 2 * resolved.width - 1)
    if shape == table[:2]:
        return BiasKind.TABLE
    if shape == positions:
        return BiasKind.POSITIONS
    raise ValueError(
        f"bias of {resolved.pattern} on a {resolved.height}x{resolved.width} map must have shape {table[:2]} "
        f"(along the curve) or {positions} (by 2-D position), got {shape}"
    )


def table_index(dy: np.ndarray, dx: np.ndarray, reach_y: int, reach_x: int) -> np.ndarray:
    """Flat table entry of every (query, key) pair of a tile.

    Args:
        dy: (queries_y, keys_y) displacements; dx: (queries_x, keys_x). Entries beyond the reach are clipped: masked.

    Returns:
        (queries_y * queries_x, keys_y * keys_x) int64.
    """
    row = np.clip(dy + reach_y, 0, 2 * reach_y)[:, None, :, None]
    column = np.clip(dx + reach_x, 0, 2 * reach_x)[None, :, None, :]
    index = row * (2 * reach_x + 1) + column
    return index.reshape(dy.shape[0] * dx.shape[0], dy.shape[1] * dx.shape[1])


def position_index(resolved: Resolved, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Flat entry of a (2H-1, 2W-1) table for tokens given by their places on the pattern's curve.

    Args:
        queries: (..., L) places; keys: (..., S) places.

    Returns:
        (..., L, S) int64.
    """
    height, width = resolved.height, resolved.width
    order = curve_order(str(resolved.pattern.curve), height, width)
    yq, xq = np.divmod(order[queries], width)
    yk, xk = np.divmod(order[keys], width)
    dy = yk[..., None, :] - yq[..., :, None] + height - 1
    dx = xk[..., None, :] - xq[..., :, None] + width - 1
    return dy * (2 * width - 1) + dx


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a displacement table (heads, h, w) to (heads, *size), bicubic with aligned corners; differentiable.

    Displacement 0 stays in the centre and the largest displacements stay at the rim. This is how published weights are
    moved to another window or kernel size. Sizes must be odd, as every displacement table's are.
    """
    if table.ndim != 3 or any(s % 2 == 0 or s < 1 for s in (*table.shape[1:], *size)):
        raise ValueError(
            f"a displacement table (heads, odd, odd) is resized to odd sizes, got {tuple(table.shape)}, {size}"
        )
    if tuple(table.shape[1:]) == tuple(size):
        return table
    # a single row has no rim, and F.interpolate would take the first one
    if size[0] == 1:
        table = table[:, table.shape[1] // 2, None]
    if size[1] == 1:
        table = table[:, :, table.shape[2] // 2, None]
    compute = torch.promote_types(table.dtype, torch.float32)
    wide = F.interpolate(table[None].to(compute), size=size, mode="bicubic", align_corners=True)[0]
    return wide.to(table.dtype)
