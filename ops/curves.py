"""Orders in which a space-filling curve visits the tokens of an H x W map.

An order is a (H*W,) int64 array: the raster index (y * W + x) of the token at each place of the curve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["CURVES", "curve_order", "hilbert_order", "inverse_order"]


def _raster(height: int, width: int) -> np.ndarray:
    return np.arange(height * width, dtype=np.int64)


def _hilbert(height: int, width: int) -> np.ndarray:
    """Generalized Hilbert ("gilbert") curve: unit steps, from the corner (0, 0) to the other end of the longer side.

    A block is a corner plus two vectors: `a` along the way, `b` across it. Long blocks are cut in two along `a`, others
    in three: up, along, down. Halves are floor divisions of the signed vectors and are made even where that keeps the
    steps of unit length. One diagonal step is left exactly where the longer side is odd and the shorter even and >= 4.
    """
    a, b = ((width, 0), (0, height)) if width >= height else ((0, height), (width, 0))
    pieces: list[np.ndarray] = []
    stack = [((0, 0), a, b)]
    while stack:
        (x, y), (ax, ay), (bx, by) = stack.pop()
        along, across = abs(ax + ay), abs(bx + by)
        dax, day, dbx, dby = np.sign((ax, ay, bx, by)).tolist()
        if across == 1 or along == 1:
            n, dx, dy = (along, dax, day) if across == 1 else (across, dbx, dby)
            t = np.arange(n, dtype=np.int64)
            pieces.append((y + t * dy) * width + (x + t * dx))
            continue
        hax, hay, hbx, hby = ax // 2, ay // 2, bx // 2, by // 2
        if 2 * along > 3 * across:
            if abs(hax + hay) % 2 and along > 2:
                hax, hay = hax + dax, hay + day
            parts = [
                ((x, y), (hax, hay), (bx, by)),
                ((x + hax, y + hay), (ax - hax, ay - hay), (bx, by)),
            ]
        else:
            if abs(hbx + hby) % 2 and across > 2:
                hbx, hby = hbx + dbx, hby + dby
            end = (x + (ax - dax) + (hbx - dbx), y + (ay - day) + (hby - dby))
            parts = [
                ((x, y), (hbx, hby), (hax, hay)),
                ((x + hbx, y + hby), (ax, ay), (bx - hbx, by - hby)),
                (end, (-hbx, -hby), (-(ax - hax), -(ay - hay))),
            ]
        stack.extend(reversed(parts))
    return np.concatenate(pieces)


def _morton(height: int, width: int) -> np.ndarray:
    """Z-order: tokens sorted by the interleaved bits of (y, x), y the more significant of each pair."""
    y, x = np.divmod(np.arange(height * width, dtype=np.int64), width)
    code = np.zeros_like(y)
    for bit in range(max(height, width).bit_length()):
        code |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return np.argsort(code, kind="stable")


CURVES: dict[str, Callable[[int, int], np.ndarray]] = {"raster": _raster, "hilbert": _hilbert, "morton": _morton}


@lru_cache(maxsize=64)
def curve_order(name: str, height: int, width: int) -> np.ndarray:
    """Raster index of the token at each place of the curve `name` ("raster", "hilbert", "morton"); read-only.

    Raises:
        ValueError: unknown curve, or a map without tokens.
    """
    if name not in CURVES:
        raise ValueError(f"unknown curve {name!r}: choose one of {', '.join(CURVES)}")
    if height < 1 or width < 1:
        raise ValueError(f"a curve needs a map of at least 1x1, got {height}x{width}")
    order = CURVES[name](height, width)
    order.setflags(write=False)
    return order


def inverse_order(order: np.ndarray) -> np.ndarray:
    """Place on the curve of each raster index: `inverse_order(order)[order[p]] == p`."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=order.dtype)
    return inverse


def hilbert_order(height: int, width: int) -> Tensor:
    """Generalized Hilbert order of an H x W map.

    Returns:
        (height * width,) int64: raster index of the token at each curve position. Consecutive tokens are neighbours.

    Source: the generalized Hilbert curve used by Hilbert Window / Neighborhood Transformers (arXiv 2511.05832).
    """
    return torch.from_numpy(curve_order("hilbert", height, width).copy())
