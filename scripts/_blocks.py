"""Blocks of tokens, and what visiting some pairs of them costs: how attention is cut, and the counts that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from nearfield.ops.curves import CURVES

__all__ = ["ORDERS", "Block", "BlockMap", "Layout", "parse_block", "tile_of", "tokens_of"]

ORDERS = {
    "raster": "consecutive tokens, row by row",
    "hilbert": "consecutive tokens on the generalized Hilbert curve",
    "morton": "consecutive tokens in Z-order",
    "tiles": "aligned 2-D tiles of queries and of keys, within residue classes where the pattern is dilated",
    "halo": "tiles of queries within each window, for each its exact rectangle of keys cut in chunks; on curves, runs",
}
Block = int | tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How tokens are cut into blocks.

    Attributes:
        order: a key of `ORDERS`.
        query_block, key_block: tokens, or the (rows, columns) of a tile. Orders of consecutive tokens and the chunks of
            `halo` only count the tokens of a tile; tiles make a number as square as it divides.
        granule: blocks are computed as this many rows or columns, or a multiple: 16 on matrix units.
    """

    order: str
    query_block: Block = 64
    key_block: Block = 64
    granule: int = 16

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}: choose one of {', '.join(ORDERS)}")

    def describe(self) -> str:
        """The order and the blocks, in words."""
        flat = self.order in CURVES
        queries, keys = (
            f"{tokens_of(block)} tokens" if flat else "{}x{} tiles".format(*tile_of(block))
            for block in (self.query_block, self.key_block)
        )
        keys = f"chunks of {self.key_tokens} tokens" if self.order == "halo" else keys
        return f"order {self.order}: queries in {queries}, keys in {keys}"

    @property
    def query_tokens(self) -> int:
        """Tokens of a whole query block."""
        return tokens_of(self.query_block)

    @property
    def key_tokens(self) -> int:
        """Tokens of a whole key block."""
        return tokens_of(self.key_block)

    @property
    def rows(self) -> int:
        """Rows of scores computed for a query block."""
        return -(-self.query_tokens // self.granule) * self.granule

    @property
    def columns(self) -> int:
        """Columns of scores computed for a key block."""
        return -(-self.key_tokens // self.granule) * self.granule


def parse_block(text: str) -> Block:
    """A block as written on a command line: "64" tokens, or "8x16" for a tile.

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"block {text!r} must be a number of tokens, 64, or the sides of a tile, 8x16")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def tokens_of(block: Block) -> int:
    """Tokens of a whole block."""
    return math.prod(tile_of(block))


def tile_of(block: Block) -> tuple[int, int]:
    """(rows, columns) of a block as a tile: a number is made as square as it divides."""
    if isinstance(block, tuple):
        return block
    side = next(side for side in range(math.isqrt(block), 0, -1) if block % side == 0)
    return side, block // side


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The key blocks that each query block visits; numbers are those of one image and head.

    Attributes:
        layout: of the blocks.
        query_blocks, key_blocks: how many there are; keys of zero padding included; for `halo`, how many chunks all
            keys would make.
        query, key, pairs: (visits,) one entry for each visit: its two blocks and how many pairs of their tokens the
            pattern asks for. Key blocks of `halo` count from the start of their own rectangle.
        useful: pairs that the pattern asks for, keys of zero padding included.
        reread: how often tiles read a key, on average over the map.
        query_ids: (rows, columns) of the query map: the block of each query.
        key_ids: (rows, columns) of the key map with its padding: the block of each key; None for `halo`.
    """

    layout: Layout
    query_blocks: int
    key_blocks: int
    query: np.ndarray
    key: np.ndarray
    pairs: np.ndarray
    useful: int
    reread: float
    query_ids: np.ndarray
    key_ids: np.ndarray | None

    @property
    def visited(self) -> int:
        """Pairs of blocks that are computed."""
        return len(self.pairs)

    @cached_property
    def full(self) -> int:
        """Visits of which every computed score is asked for, so that they need no mask."""
        return int((self.pairs == self.layout.rows * self.layout.columns).sum())

    @cached_property
    def visits(self) -> np.ndarray:
        """(query_blocks,) key blocks that each query block visits."""
        return np.bincount(self.query, minlength=self.query_blocks)

    @property
    def empty(self) -> float:
        """Share of all pairs of blocks that is not computed."""
        return 1.0 - self.visited / (self.query_blocks * self.key_blocks)

    @property
    def computed(self) -> int:
        """Scores that are computed."""
        return self.visited * self.layout.rows * self.layout.columns

    @property
    def waste(self) -> float:
        """Share of the computed scores that the pattern does not ask for."""
        return 1.0 - self.useful / self.computed

    @property
    def factor(self) -> float:
        """Computed over useful scores."""
        return self.computed / self.useful

    @property
    def fewer(self) -> float:
        """How many times fewer blocks than dense attention in the same blocks."""
        return self.query_blocks * self.key_blocks / self.visited

    def shares(self) -> np.ndarray:
        """(query_blocks, widest) float32: the share of a visit's scores that is asked for, 0 where there is none."""
        width = int(self.key.max()) + 1 if self.key_ids is None else self.key_blocks
        shares = np.zeros((self.query_blocks, width), dtype=np.float32)
        shares[self.query, self.key] = self.pairs / (self.layout.rows * self.layout.columns)
        return shares
