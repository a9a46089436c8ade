"""Swin Transformer V2 (Liu et al., CVPR 2022, arXiv 2111.09883).

Swin's shifted windows with three changes: norms stand at the end of each residual branch (section 3.2); scores are
cosines times a learned scale for each head (section 3.2); and the table of relative positions is the output of a small
network on log-spaced displacements, so that weights trained with one window serve another (section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Layout, Rule
from ..ops import Window, local_attention
from .arguments import check_heads, stage_count
from .derived import Derived, in_wide_precision, wide
from .layers import Block, NormLayer, Pair, PatchMerging, PatchStem, Size, per_stage, to_pair
from .registry import register
from .swin import Swin, fitted_windows, shifted_axes, shifted_windows
from .transformer import LocalTransformer

LARGEST_SCALE = 100.0
"""The learned scale of the cosines is clamped to this (section 3.2: the temperature is at least 0.01)."""


class CosineWindowAttention(nn.Module):
    """Cosine attention in (shifted) windows, biased by a network on log-spaced displacements.

    score = min(exp(logit_scale), 100) * cos(q, k) + 16 * sigmoid(cpb_mlp(log-spaced (query - key)))

    Any map is taken as it is: windows are cut at its border. The published model is not defined on maps that are no
    multiple of the window. What is no longer than the window is not shifted (see `shifted_axes`).

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        window_size: (y, x) tokens.
        shifted: whether windows are shifted by half their size.
        pretrained_window_size: the (y, x) window with which displacements are normalised, None for ``window_size``.
        qkv_bias: whether q and v have a bias; k has none.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Pair,
        shifted: bool,
        pretrained_window_size: Pair | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.shifted = shifted
        self.attn_drop = attn_drop
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.kept_table = Derived()
        self.set_window(window_size, pretrained_window_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 10 and no biases, as published; the projections are modules of their own."""
        nn.init.constant_(self.logit_scale, math.log(10))
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def set_window(self, window_size: Pair, pretrained_window_size: Pair | None) -> None:
        """Change the window; arguments as of the class. No parameter depends on it."""
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.windows = shifted_windows(window_size, self.shifted)

    def train(self, mode: bool = True) -> CosineWindowAttention:
        """As of every module; what evaluation has kept is forgotten."""
        self.kept_table.clear()
        return super().train(mode)

    def pattern(self, height: int, width: int) -> Window:
        """Windows of a map of any size."""
        return self.windows[shifted_axes(height, width, self.window_size)]

    def bias_table(self) -> Tensor:
        """The table (heads, 2*wy-1, 2*wx-1) of key - query, float32 or wider; differentiable.

        Kept between calls in evaluation mode without gradients.
        """
        if self.training:
            return self._table()
        sizes = (self.window_size, self.pretrained_window_size)
        return self.kept_table.get(tuple(self.cpb_mlp.parameters()), sizes, self._table)

    def _table(self) -> Tensor:
        device, dtype = self.logit_scale.device, wide(self.logit_scale.dtype)
        normalisers = self.pretrained_window_size or self.window_size
        y, x = (
            log_displacements(window, normaliser, device, dtype)
            for window, normaliser in zip(self.window_size, normalisers, strict=True)
        )
        table = in_wide_precision(self.cpb_mlp, torch.stack(torch.meshgrid(y, x, indexing="ij"), -1))
        return 16 * table.permute(2, 0, 1).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        scale = self.logit_scale.to(wide(q.dtype)).clamp(max=math.log(LARGEST_SCALE)).exp()
        out = local_attention(
            (unit(q) * scale.flatten(1)).to(v.dtype),
            unit(k).to(v.dtype),
            v,
            self.pattern(x.shape[1], x.shape[2]),
            bias=self.bias_table(),
            scale=1.0,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.flatten(3)))


def log_displacements(window: int, normaliser: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Query - key along one axis as the network sees it, for key - query from -(window - 1) to window - 1.

    sign(d) * log2(1 + 8 |d| / (normaliser - 1)) / log2(8), as the published code has it (section 3.3 without the 8).
    """
    d = torch.arange(window - 1, -window, -1, device=device, dtype=dtype) * (8 / max(normaliser - 1, 1))
    return d.sign() * (1 + d.abs()).log2() / 3


def unit(x: Tensor) -> Tensor:
    """``x`` with its last axis at length 1, float32 or wider; zeros stay zeros, and their gradient stays finite."""
    x = x.to(wide(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)


class PostNormBlock(Block):
    """x + drop_path(norm1(attn(x))), then the same with the MLP; arguments as of ``Block``."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = x + self.drop_path1(self.ls1(self.norm1(self.attn(x))))
        return x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))


class PostNormPatchMerging(PatchMerging):
    """Projection of 2x2 neighbours, then a norm: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), out)."""

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer) -> None:
        super().__init__(dim, out_dim, norm_layer)
        self.norm = norm_layer(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map; odd sides are zero-padded first."""
        return self.norm(self.reduction(self.neighbours(x)))


class SwinV2(LocalTransformer):
    """Swin Transformer V2; takes any image of at least 32 x 32.

    Args:
        window_size: an int or (y, x) pair, or one for each stage. In a stage whose map is smaller than that at
            ``img_size`` the window is the map (a square one of its shorter side for an int), as published.
        pretrained_window_sizes: the window that the position network was trained with, in the same form: weights whose
            window is changed give a displacement the bias that they learned for it. None (0 in the published files)
            for the window itself, whatever it is.
        img_size: nominal image size; decides the windows in that way and nothing else.
        depths, **options: as in ``LocalTransformer``.

    ``set_input_size`` takes ``window_size`` and ``pretrained_window_sizes`` too; the network's table is computed anew.
    """

    stem_type = PatchStem
    downsample_type = PostNormPatchMerging
    block_type = PostNormBlock
    out_norm = Swin.out_norm  # its detectors are not released
    layouts = (
        Layout(
            name="microsoft",
            source="microsoft/Swin-Transformer, models/swin_transformer_v2.py",
            signature=("layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.0.downsample.norm.weight"),
            rules=(
                Rule("patch_embed.{rest}", "stem.{rest}"),
                Rule("layers.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}"),
                Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
                Rule("head.{rest}", "head.fc.{rest}"),
            ),
            drops=(
                "layers.{i}.blocks.{j}.attn_mask",
                "layers.{i}.blocks.{j}.attn.relative_position_index",
                "layers.{i}.blocks.{j}.attn.relative_coords_table",
            ),
        ),
        Layout(
            name="timm",
            source="huggingface/pytorch-image-models, timm/models/swin_transformer_v2.py",
            signature=("layers.0.blocks.0.attn.cpb_mlp.0.weight",),
            absent=("layers.0.downsample.norm.weight",),
            rules=(
                Rule("patch_embed.{rest}", "stem.{rest}"),
                Rule("layers.{i}.downsample.{rest}", "stages.{i}.downsample.{rest}"),
                Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
            ),
            drops=(
                "layers.{i}.blocks.{j}.attn_mask",
                "layers.{i}.blocks.{j}.attn.relative_position_index",
                "layers.{i}.blocks.{j}.attn.relative_coords_table",
            ),
        ),
    )

    def __init__(
        self,
        *,
        window_size: Size | Sequence[Size] = 8,
        pretrained_window_sizes: Size | Sequence[Size] | None = None,
        img_size: Size = 256,
        depths: Sequence[int] = (2, 2, 6, 2),
        stem_stride: int = 4,
        **options: Any,
    ) -> None:
        stages = stage_count(depths)
        windows = per_stage("window_size", window_size, stages)
        fitted = fitted_windows(windows, to_pair("img_size", img_size), stem_stride)
        pretrained = _pretrained_windows(pretrained_window_sizes, stages)

        def attention(stage: int, block: int, dim: int, num_heads: int, **drops: Any) -> CosineWindowAttention:
            return CosineWindowAttention(
                dim,
                num_heads,
                fitted[stage],
                shifted=block % 2 == 1,
                pretrained_window_size=pretrained[stage],
                **drops,
            )

        super().__init__(attention, img_size=img_size, depths=depths, stem_stride=stem_stride, **options)
        self.window_sizes = windows
        self.pretrained_window_sizes = pretrained

    def init_weights(self, needs_reset: bool = True) -> None:
        """As ``Backbone.init_weights``; every residual branch begins at zero (norms of weight 0), as published."""
        super().init_weights(needs_reset)
        for stage in self.stages:
            for block in stage.blocks:
                nn.init.zeros_(block.norm1.weight)
                nn.init.zeros_(block.norm2.weight)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides norms and biases: the position networks, scales."""
        return {name for name, _ in self.named_parameters() if ".cpb_mlp." in name or name.endswith("logit_scale")}

    def _resize_attention(
        self,
        img_size: Pair,
        window_size: Size | Sequence[Size] | None = None,
        pretrained_window_sizes: Size | Sequence[Size] | None = None,
        **others: Any,
    ) -> None:
        super()._resize_attention(img_size, **others)
        windows, pretrained = self.window_sizes, self.pretrained_window_sizes
        if window_size is not None:
            windows = per_stage("window_size", window_size, len(self.feature_info))
        if pretrained_window_sizes is not None:
            pretrained = _pretrained_windows(pretrained_window_sizes, len(self.feature_info))
        fitted = fitted_windows(windows, img_size, self.feature_info[0]["reduction"])
        self.window_sizes, self.pretrained_window_sizes = windows, pretrained
        # stages may have been pruned
        for stage, window, normaliser in zip(self.stages, fitted, pretrained, strict=False):
            for block in stage.blocks:
                block.attn.set_window(window, normaliser)


def _pretrained_windows(sizes: Size | Sequence[Size] | None, stages: int) -> list[Pair | None]:
    """The normalising window of each stage; None for the stage's own."""
    entries = per_stage("pretrained_window_sizes", sizes, stages)
    return [to_pair("pretrained_window_sizes", entry) if entry else None for entry in entries]


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_BASE_22K = {**_BASE, "drop_path_rate": 0.2}
_LARGE_22K = {**_BASE_22K, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_8 = {"img_size": 256, "window_size": 8}
_16 = {"img_size": 256, "window_size": 16}
# trained on ImageNet-22k at 192 x 192, where the last map is 6 x 6; the other two are fine-tuned from it
_12 = {"img_size": 192, "window_size": 12, "pretrained_window_sizes": (12, 12, 12, 6)}
_12_TO_16 = {**_12, **_16}
_12_TO_24 = {**_12, "img_size": 384, "window_size": 24}

register(
    __name__,
    SwinV2,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "swinv2_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "embed_dim": 24,
            "depths": (2, 2, 2),
            "num_heads": (1, 2, 4),
            "window_size": 4,
            "mlp_ratio": 2.0,
        },
        "swinv2_tiny_window8": {**_TINY, **_8},
        "swinv2_tiny_window16": {**_TINY, **_16},
        "swinv2_small_window8": {**_SMALL, **_8},
        "swinv2_small_window16": {**_SMALL, **_16},
        "swinv2_base_window8": {**_BASE, **_8},
        "swinv2_base_window16": {**_BASE, **_16},
        "swinv2_base_window12_22k": {**_BASE_22K, **_12},
        "swinv2_base_window16_22k": {**_BASE_22K, **_12_TO_16},
        "swinv2_base_window24_22k": {**_BASE_22K, **_12_TO_24},
        "swinv2_large_window12_22k": {**_LARGE_22K, **_12},
        "swinv2_large_window16_22k": {**_LARGE_22K, **_12_TO_16},
        "swinv2_large_window24_22k": {**_LARGE_22K, **_12_TO_24},
    },
)
