"""timm's learned position biases as the tables of ``ops``: computed once a call, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosMlp, pos_embed_rel
from timm.layers.pos_embed_rel import RelPosBiasTf
from torch import Tensor

from ...checkpoints import FlippedTable
from ..layers import Pair
from .replacement import source

CODE = source(
    pos_embed_rel,
    "RelPosBias.forward",
    "RelPosBias.get_bias",
    "RelPosBias._init_buffers",
    "RelPosBiasTf.forward",
    "RelPosBiasTf.get_bias",
    "RelPosBiasTf._init_buffers",
    "RelPosMlp.forward",
    "RelPosMlp.get_bias",
    "RelPosMlp._init_buffers",
    "gen_relative_position_index",
    "gen_relative_log_coords",
    "generate_lookup_tensor",
    "reindex_2d_einsum_lookup",
)
TYPES = (RelPosBias, RelPosBiasTf, RelPosMlp, type(None))


def flipped(rows: Tensor, window_size: Pair) -> Tensor:
    """(rows, heads) by query - key, as timm and Swin write it, to (heads, 2*wy-1, 2*wx-1) by key - query."""
    return FlippedTable().to_ours(rows, torch.Size((rows.shape[1], 2 * window_size[0] - 1, 2 * window_size[1] - 1)))


def table_of(rel_pos: Any) -> Tensor | None:
    """The table of one of timm's position modules."""
    if rel_pos is None:
        return None
    if isinstance(rel_pos, RelPosBiasTf):  # TensorFlow's tables are key - query already
        return rel_pos.relative_position_bias_table
    if isinstance(rel_pos, RelPosBias):
        return flipped(rel_pos.relative_position_bias_table, rel_pos.window_size)
    # dropout of the MLP in training draws as in timm: its input is the table there, too
    table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log))
    if rel_pos.bias_gain is not None:
        table = rel_pos.bias_gain * table
    return flipped(table.flatten(0, 1), rel_pos.window_size)


def table_refusal(rel_pos: Any) -> str | None:
    """Why a position module has no such table."""
    if getattr(rel_pos, "prefix_tokens", 0):
        return "its position bias has entries for class tokens"
    return None
