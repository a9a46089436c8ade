"""HWT: Hilbert Window Transformer (Li and Xu, ICLR 2026, arXiv 2511.05832).

Swin's body; a window is a run of consecutive tokens along the generalized Hilbert curve of the map instead of a
square, and is shifted along the curve. The position table is global: it spans the whole map, by true 2-D displacement.

The released code is tied to maps whose tokens are a multiple of the window, and drops the rest. Here the last run is
shorter where they are not, no token is dropped, and the table is resized to the map it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..ops import HilbertWindow, resize_table
from .arguments import check_arguments, stage_count
from .layers import LocalAttention, Pair, PatchMerging, PatchStem, Size, counts_per_stage, map_sizes, to_pair
from .registry import register
from .swin import Swin
from .transformer import LocalTransformer


class HilbertWindowAttention(LocalAttention):
    """Attention in (shifted) windows along the Hilbert curve with a learned table of 2-D displacements.

    A window holds window_size ** 2 tokens, half of it being the shift. A map no larger than a window on its shorter
    side gets windows of that side's square, unshifted, as published.

    Args:
        dim, num_heads, **options: as in ``LocalAttention``.
        map_size: (height, width) of the map that the table is made for, (heads, 2 * height - 1, 2 * width - 1). On a
            map of another size it is resized bicubically in every forward pass, with gradients.
        window_size: tokens on the side of the square that a window has the area of.
        shifted: whether windows are shifted.
    """

    def __init__(
        self, dim: int, num_heads: int, map_size: Pair, window_size: int, shifted: bool, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, (map_size[0] - 1, map_size[1] - 1), **options)
        self.shifted = shifted
        self.set_window(window_size)

    def set_window(self, window_size: int) -> None:
        """Change the window; the table does not depend on it."""
        self.window_size = window_size
        length = window_size**2
        # by the shorter side of the map; made here so that forward has nothing to build
        self.windows = [HilbertWindow(side**2) for side in range(1, window_size + 1)]
        self.windows.append(HilbertWindow(length, length - length // 2 if self.shifted else 0))

    def set_map(self, map_size: Pair) -> None:
        """Change the map that the table is made for; the table is resized to it."""
        self.resize_table((map_size[0] - 1, map_size[1] - 1))

    def pattern(self, height: int, width: int) -> HilbertWindow:
        """Windows of at most the square of the map's shorter side."""
        return self.windows[min(height, width, self.window_size + 1) - 1]

    def position_bias(self, height: int, width: int) -> Tensor:
        """The table at the map's own size."""
        return resize_table(self.rel_pos_bias, (2 * height - 1, 2 * width - 1))


class HWT(LocalTransformer):
    """Hilbert Window Transformer; takes any image of at least 32 x 32.

    Args:
        window_size: an int, or one for each stage; a window holds its square of tokens.
        img_size: nominal image size; decides the size of the position tables and nothing else. An image of another
            size gives what the model would give after ``set_input_size``.
        depths, **options: as in ``LocalTransformer``.
    """

    stem_type = PatchStem
    downsample_type = PatchMerging
    out_norm = Swin.out_norm
    # the released file is made from Microsoft's and kept its keys; the tables are larger
    layouts = (replace(Swin.layouts[0], name="hilbert", source="Yunge6666/Hilbert-Local-Attention, hwt.py"),)

    def __init__(
        self,
        *,
        window_size: int | Sequence[int] = 7,
        img_size: Size = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        stem_stride: int = 4,
        **options: Any,
    ) -> None:
        stages = stage_count(depths)
        windows = counts_per_stage("window_size", window_size, stages)
        check_arguments(stem_stride=stem_stride)
        maps = map_sizes(to_pair("img_size", img_size), stem_stride, stages)

        def attention(stage: int, block: int, dim: int, num_heads: int, **drops: Any) -> HilbertWindowAttention:
            return HilbertWindowAttention(dim, num_heads, maps[stage], windows[stage], shifted=block % 2 == 1, **drops)

        super().__init__(attention, img_size=img_size, depths=depths, stem_stride=stem_stride, **options)

    def _resize_attention(self, img_size: Pair, window_size: int | Sequence[int] | None = None, **others: Any) -> None:
        super()._resize_attention(img_size, **others)
        stages = len(self.feature_info)
        windows = None if window_size is None else counts_per_stage("window_size", window_size, stages)
        maps = map_sizes(img_size, self.feature_info[0]["reduction"], stages)
        # stages may have been pruned
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                block.attn.set_map(maps[i])
                if windows is not None:
                    block.attn.set_window(windows[i])


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7, "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_256 = {"img_size": 256, "window_size": 8}

# small and base are Swin's: the authors built the tiny ones alone
register(
    __name__,
    HWT,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "hwt_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 2),
            "num_heads": (1, 2, 4),
            "window_size": 4,
            "mlp_ratio": 2.0,
        },
        "hwt_tiny": _TINY,
        "hwt_tiny_256": {**_TINY, **_256},
        "hwt_small": _SMALL,
        "hwt_small_256": {**_SMALL, **_256},
        "hwt_base": _BASE,
        "hwt_base_256": {**_BASE, **_256},
    },
)
