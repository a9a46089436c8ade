"""Tiles of one axis: consecutive tokens that one program holds, and the tokens that these have to do with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..bias import BiasKind
from ..patterns import Axis
from ..tiles import TileShape, axis_bands, inverse_axis

__all__ = ["AxisTile", "axis_tiles"]


@dataclass(frozen=True, eq=False)
class AxisTile:
    """One tile of one axis. Codes of a pair add up to its row of a bias table: resident.code + streamed.code.

    Attributes:
        resident, streamed: coordinates; streamed ones may leave the map where zero keys pad it.
        low, high: half-open interval of streamed slots of each resident token.
        codes, rel_codes: (resident, streamed) table codes, and those of a decomposed bias.
    """

    resident: np.ndarray
    streamed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    codes: tuple[np.ndarray, np.ndarray]
    rel_codes: tuple[np.ndarray, np.ndarray]
    limit: int

    @cached_property
    def inside(self) -> np.ndarray:
        """(streamed,) bool: which of them lie in the map."""
        return (self.streamed >= 0) & (self.streamed < self.limit)

    @cached_property
    def anchor(self) -> int:
        """The streamed coordinate that the tile's place is given by: the first inside the map."""
        found = np.flatnonzero(self.inside)
        return int(self.streamed[found[0]]) if len(found) else 0

    @cached_property
    def alike(self) -> bytes:
        """Equal for tiles that differ in their place only."""
        parts = [self.resident - self.resident[0], self.streamed - self.anchor, self.inside, self.low, self.high]
        parts += [*self.codes, *self.rel_codes]
        return b"|".join(np.asarray(p, dtype=np.int64).tobytes() for p in parts)


def axis_tiles(axis: Axis, tile: int, *, inverse: bool = False, kind: BiasKind = BiasKind.TABLE) -> list[AxisTile]:
    """All tiles of one axis with at most `tile` resident tokens, in the order of the map.

    inverse: keys are resident. kind: bias whose codes are wanted; all others are 0, so that more tiles are alike.
    """
    seen_from = inverse_axis(axis) if inverse else axis
    tiles = []
    for band in axis_bands(seen_from, tile, split=True):
        shape = band.tiles[0].shape
        for i in range(band.count):
            resident = band.queries.coordinates() + i * band.query_spacing
            streamed = band.keys.coordinates() + i * band.key_spacing
            tiles.append(_axis_tile(axis, seen_from, shape, resident, streamed, inverse, kind))
    return sorted(tiles, key=lambda t: int(t.resident[0]))


def _axis_tile(
    axis: Axis, seen_from: Axis, shape: TileShape, resident: np.ndarray, streamed: np.ndarray, inverse: bool,
    kind: BiasKind,
) -> AxisTile:  # fmt: skip
    queries, keys = (streamed, resident) if inverse else (resident, streamed)
    frame = int(keys[0]) // axis.step if len(keys) else 0

    def codes(of: BiasKind, origin: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
        if kind is not of:
            return np.zeros_like(resident), np.zeros_like(streamed)
        of_queries, of_keys = reach - origin[queries] // axis.step + frame, keys // axis.step - frame
        return (of_keys, of_queries) if inverse else (of_queries, of_keys)

    return AxisTile(
        resident,
        streamed,
        np.clip(shape.low, 0, len(streamed)),
        np.clip(shape.high, 0, len(streamed)),
        codes(BiasKind.TABLE, axis.origin, axis.reach),
        codes(BiasKind.DECOMPOSED, axis.rel_origin, axis.rel_reach),
        seen_from.keys,
    )
