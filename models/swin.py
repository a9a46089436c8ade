"""Swin Transformer (Liu et al., ICCV 2021, arXiv 2103.14030).

Attention inside windows that do not overlap; every second block's windows are shifted by half a window. The shift is
in the pattern: windows are cut at the border of the map, which equals the published cyclic roll with its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import FlippedTable, Layout, Rule
from ..ops import Window
from .arguments import check_arguments, stage_count
from .layers import LocalAttention, Pair, PatchMerging, PatchStem, Size, map_sizes, per_stage, round_up, to_pair
from .registry import register
from .transformer import LocalTransformer


def shifted_windows(window_size: Pair, shifted: bool) -> dict[tuple[bool, bool], Window]:
    """Swin's pattern by whether each axis is longer than one window: one that is not is not shifted.

    Made once so that a forward pass has nothing to build.
    """
    y, x = (size // 2 if shifted else 0 for size in window_size)
    return {(tall, wide): Window(window_size, (y * tall, x * wide)) for tall in (False, True) for wide in (False, True)}


def shifted_axes(height: int, width: int, window_size: Pair) -> tuple[bool, bool]:
    """Which axes of a map are shifted: those that are longer than one window.

    Where that is one of the two, it is shifted unless the map is a multiple of the window. The classifier, which is
    defined on those maps alone, shifts both axes or none; the detection code, which pads the others, each for itself.
    """
    y, x = window_size
    # a graph that is compiled for any size is another one for each answer: no more is asked than is needed
    if height > y and width > x:
        return True, True
    if (height <= y and width <= x) or (height % y == 0 and width % x == 0):
        return False, False
    return (True, False) if height > y else (False, True)


class WindowAttention(LocalAttention):
    """Attention in (shifted) windows with a learned table.

    The map is zero-padded at the right and bottom to a multiple of the window before the qkv projection, unmasked, and
    shifted after that, as in Microsoft's detection code. What is one window long is not shifted (see `shifted_axes`).

    Args:
        dim, num_heads, **options: as in ``LocalAttention``.
        window_size: (y, x) tokens.
        shifted: whether windows are shifted by half their size.
    """

    def __init__(self, dim: int, num_heads: int, window_size: Pair, shifted: bool, **options: Any) -> None:
        super().__init__(dim, num_heads, (window_size[0] - 1, window_size[1] - 1), **options)
        self.shifted = shifted
        self._cut(window_size)

    def _cut(self, window_size: Pair) -> None:
        self.window_size = window_size
        self.windows = shifted_windows(window_size, self.shifted)

    def set_window(self, window_size: Pair) -> None:
        """Change the window; the table is resized to it."""
        self.resize_table((window_size[0] - 1, window_size[1] - 1))
        self._cut(window_size)

    def padded(self, height: int, width: int) -> Pair:
        """The next multiples of the window."""
        return round_up(height, self.window_size[0]), round_up(width, self.window_size[1])

    def pattern(self, height: int, width: int) -> Window:
        """Windows of a map, shifted or not."""
        return self.windows[shifted_axes(height, width, self.window_size)]


@dataclass(frozen=True)
class UnfoldedNeighbours:
    """Channels of 2x2 neighbours as ``nn.Unfold`` orders them (channel, y, x) <-> as Swin does (x, y, channel)."""

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """(..., 4C) -> (..., 4C)."""
        return _reorder(tensor, (-1, 2, 2))

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """(..., 4C) -> (..., 4C)."""
        return _reorder(tensor, (2, 2, -1))


def _reorder(tensor: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """The last axis as an array of three axes, with those in reversed order."""
    return tensor.unflatten(-1, sizes).transpose(-1, -3).flatten(-3).contiguous()


class Swin(LocalTransformer):
    """Swin Transformer; takes any image of at least 32 x 32.

    Args:
        window_size: an int or (y, x) pair, or one for each stage. In a stage whose map is smaller than that at
            ``img_size`` the window is the map (a square one of its shorter side for an int), as published.
        img_size: nominal image size; decides the windows in that way and nothing else.
        depths, **options: as in ``LocalTransformer``.
    """

    stem_type = PatchStem
    downsample_type = PatchMerging
    out_norm = nn.LayerNorm  # Swin-Transformer-Object-Detection, mmdet/models/backbones/swin_transformer.py
    layouts = (
        Layout(
            name="microsoft",
            source="microsoft/Swin-Transformer, models/swin_transformer.py",
            signature=("layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.downsample.norm.weight"),
            rules=(
                Rule("patch_embed.{rest}", "stem.{rest}"),
                Rule("layers.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}"),
                Rule(
                    "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
                    "stages.{i}.blocks.{j}.attn.rel_pos_bias",
                    FlippedTable(),
                ),
                Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
            drops=("layers.{i}.blocks.{j}.attn_mask", "layers.{i}.blocks.{j}.attn.relative_position_index"),
        ),
        Layout(
            name="timm",
            source="huggingface/pytorch-image-models, timm/models/swin_transformer.py",
            signature=("layers.0.blocks.0.attn.relative_position_bias_table",),
            absent=("layers.0.downsample.norm.weight",),
            rules=(
                Rule("patch_embed.{rest}", "stem.{rest}"),
                Rule("layers.{i}.downsample.{rest}", "stages.{i}.downsample.{rest}"),
                Rule(
                    "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
                    "stages.{i}.blocks.{j}.attn.rel_pos_bias",
                    FlippedTable(),
                ),
                Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
            ),
            drops=("layers.{i}.blocks.{j}.attn_mask", "layers.{i}.blocks.{j}.attn.relative_position_index"),
        ),
        Layout(
            name="open-mmlab",
            source="open-mmlab/mmsegmentation, mmseg/models/backbones/swin.py (mmdet alike)",
            signature=("stages.0.blocks.0.attn.w_msa.relative_position_bias_table",),
            rules=(
                Rule("patch_embed.projection.{rest}", "stem.proj.{rest}"),
                Rule("patch_embed.norm.{rest}", "stem.norm.{rest}"),
                Rule(
                    "stages.{i}.downsample.reduction.weight",
                    "stages.{i+1}.downsample.reduction.weight",
                    UnfoldedNeighbours(),
                ),
                Rule("stages.{i}.downsample.norm.{rest}", "stages.{i+1}.downsample.norm.{rest}", UnfoldedNeighbours()),
                Rule(
                    "stages.{i}.blocks.{j}.attn.w_msa.relative_position_bias_table",
                    "stages.{i}.blocks.{j}.attn.rel_pos_bias",
                    FlippedTable(),
                ),
                Rule("stages.{i}.blocks.{j}.attn.w_msa.{rest}", "stages.{i}.blocks.{j}.attn.{rest}"),
                Rule("stages.{i}.blocks.{j}.ffn.layers.0.0.{rest}", "stages.{i}.blocks.{j}.mlp.fc1.{rest}"),
                Rule("stages.{i}.blocks.{j}.ffn.layers.1.{rest}", "stages.{i}.blocks.{j}.mlp.fc2.{rest}"),
            ),
            drops=("stages.{i}.blocks.{j}.attn.w_msa.relative_position_index",),
        ),
    )

    def __init__(
        self,
        *,
        window_size: Size | Sequence[Size] = 7,
        img_size: Size = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        stem_stride: int = 4,
        **options: Any,
    ) -> None:
        windows = per_stage("window_size", window_size, stage_count(depths))
        fitted = fitted_windows(windows, to_pair("img_size", img_size), stem_stride)

        def attention(stage: int, block: int, dim: int, num_heads: int, **drops: Any) -> WindowAttention:
            return WindowAttention(dim, num_heads, fitted[stage], shifted=block % 2 == 1, **drops)

        super().__init__(attention, img_size=img_size, depths=depths, stem_stride=stem_stride, **options)
        self.window_sizes = windows

    def _resize_attention(
        self, img_size: Pair, window_size: Size | Sequence[Size] | None = None, **others: Any
    ) -> None:
        super()._resize_attention(img_size, **others)
        windows = self.window_sizes
        if window_size is not None:
            windows = per_stage("window_size", window_size, len(self.feature_info))
        fitted = fitted_windows(windows, img_size, self.feature_info[0]["reduction"])
        self.window_sizes = windows
        # stages may have been pruned
        for stage, window in zip(self.stages, fitted, strict=False):
            for block in stage.blocks:
                block.attn.set_window(window)


def fitted_windows(windows: Sequence[Size], img_size: Pair, stem_stride: int) -> list[Pair]:
    """The window of each stage: no larger than its map at ``img_size``."""
    fitted = []
    check_arguments(stem_stride=stem_stride)
    for window, (height, width) in zip(windows, map_sizes(img_size, stem_stride, len(windows)), strict=True):
        if isinstance(window, int):
            height = width = min(height, width)
        y, x = to_pair("window_size", window)
        fitted.append((min(y, height), min(x, width)))
    return fitted


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7, "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.2}
_384 = {"img_size": 384, "window_size": 12}

register(
    __name__,
    Swin,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "swin_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 2),
            "num_heads": (1, 2, 4),
            "window_size": 4,
            "mlp_ratio": 2.0,
        },
        "swin_tiny": _TINY,
        "swin_small": _SMALL,
        "swin_base": _BASE,
        "swin_large": _LARGE,
        "swin_base_384": {**_BASE, **_384},
        "swin_large_384": {**_LARGE, **_384},
    },
)
