"""MaxViT: Multi-Axis Vision Transformer (Tu et al., ECCV 2022, arXiv 2204.01697).

Every block is a convolution and two attentions: an MBConv with squeeze-excite, attention inside windows, attention over
a grid whose points lie evenly over the whole map. ``MaxViT`` is the published model. ``MaxViTRW`` is timm's own line:
narrower stems, no biases in its convolutions and, where ``rmlp`` is in the name, bias tables made by a small MLP of the
logarithmic displacement.

Windows and grids have img_size / 32 tokens a side in every stage. A map that they do not divide, which neither code
defines, behaves as if padded and masked: a window is cut at the border, a grid takes the points that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from timm.layers import (
    GELU,
    ClassifierHead,
    ClNormMlpClassifierHead,
    GELUTanh,
    Mlp,
    calculate_drop_path_rates,
    create_conv2d,
    gen_relative_log_coords,
)
from torch import Tensor, nn

from ..checkpoints import CheckpointMismatch, FlippedTable, Layout, Rule
from ..ops import Grid, Window
from .arguments import check_arguments, check_pool, check_stem_stride, stage_count
from .backbone import Backbone, take_stages
from .derived import Derived, in_wide_precision, wide
from .layers import Block, LocalAttention, Pair, Size, Stage, to_pair
from .mbconv import Convolutions, MBConv
from .registry import register

HEAD_DIM = 32
_WIDE_AS_MAP = ("avg", "max", "avgmax", "")  # the norm after pooling, before a hidden layer, has the width of the map


class PartitionAttention(LocalAttention):
    """Attention inside windows or over grids, with a learned table.

    Args:
        dim, num_heads, **options: as in ``LocalAttention``.
        partition: ``Window`` or ``Grid``.
        size: (y, x) tokens of a window or grid.
    """

    def __init__(self, dim: int, num_heads: int, partition: type[Window | Grid], size: Pair, **options: Any) -> None:
        super().__init__(dim, num_heads, (size[0] - 1, size[1] - 1), **options)
        self.partition = partition
        self.set_size(size)

    def set_size(self, size: Pair) -> None:
        """Change the size of windows or grids; the table is resized to it."""
        self.resize_table((size[0] - 1, size[1] - 1))
        self.size = size
        self.cells = self.partition(size)

    def pattern(self, height: int, width: int) -> Window | Grid:
        """The same for every map."""
        return self.cells


class LogMlpAttention(PartitionAttention):
    """The same with a table that an MLP makes of the displacement d, given as sign(d) * log(1 + abs(d)) per axis.

    It is computed for whatever size the windows have, so that nothing is resized. The MLP has 512 hidden channels, of
    which training drops an eighth (timm's RelPosMlp in its mode ``cr``).
    """

    position_tables = ()

    def __init__(self, dim: int, num_heads: int, partition: type[Window | Grid], size: Pair, **options: Any) -> None:
        super().__init__(dim, num_heads, partition, size, **options)
        del self.rel_pos_bias
        self.rel_pos_mlp = Mlp(2, 512, num_heads, act_layer=nn.ReLU, drop=(0.125, 0.0))
        self.kept_table = Derived()

    def reset_parameters(self) -> None:
        """Nothing: the MLP's layers are modules of their own."""

    def train(self, mode: bool = True) -> LogMlpAttention:
        """As of every module; what evaluation has kept is forgotten."""
        self.kept_table.clear()
        return super().train(mode)

    def position_bias(self, height: int, width: int) -> Tensor:
        """(heads, 2 * size_y - 1, 2 * size_x - 1), by key - query, float32 or wider.

        Kept between calls in evaluation mode without gradients.
        """
        if self.training:
            return self._table()
        return self.kept_table.get(tuple(self.rel_pos_mlp.parameters()), self.size, self._table)

    def _table(self) -> Tensor:
        weight: Any = self.rel_pos_mlp.fc1.weight
        like = weight if isinstance(weight, Tensor) else torch.empty(0)  # quantised layers have a method of that name
        # timm's coordinates are query - key
        steps = -gen_relative_log_coords(self.size, mode="cr", device=like.device, dtype=wide(like.dtype))
        return in_wide_precision(self.rel_pos_mlp, steps).permute(2, 0, 1)


class MaxViTStem(nn.Module):
    """Two 3x3 convolutions with a batch norm and an activation between: (B, C, H, W) -> (B, H/s, W/s, width[1])."""

    def __init__(self, in_chans: int, width: Pair, stride: int, conv: Convolutions) -> None:
        super().__init__()
        options = {"padding": conv.padding, "bias": conv.bias}
        self.conv1 = create_conv2d(in_chans, width[0], 3, stride=stride, **options)
        self.norm = conv.norm_act(width[0])
        self.conv2 = create_conv2d(width[0], width[1], 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, ceil(H/s), ceil(W/s), width[1]) map."""
        return self.conv2(self.norm(self.conv1(x))).permute(0, 2, 3, 1)


class MaxViTBlock(nn.Module):
    """MBConv, a transformer block of windows, one of grids; each of them on (B, H, W, C) maps."""

    def __init__(self, mbconv: MBConv, window: Block, grid: Block) -> None:
        super().__init__()
        self.mbconv = mbconv
        self.window = window
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) -> (B, H', W', C), halved in the first block of a stage."""
        return self.grid(self.window(self.mbconv(x)))


def _timm_rules(*attention: tuple[str, str, Any]) -> tuple[Rule, ...]:
    """Timm's keys and ours; ``attention`` names what differs below ``attn``: (theirs, ours, transform)."""
    block = "stages.{i}.blocks.{j}."
    rules = [Rule("stem.norm1.{rest}", "stem.norm.{rest}")]
    for theirs, ours in (
        ("shortcut.expand", "expand"),
        ("conv1_1x1", "conv1"),
        ("conv2_kxk", "conv2"),
        ("conv3_1x1", "conv3"),
    ):
        rules.append(Rule(f"{block}conv.{theirs}.{{rest}}", f"{block}mbconv.{ours}.{{rest}}"))
    rules.append(Rule(f"{block}conv.{{rest}}", f"{block}mbconv.{{rest}}"))
    for theirs, ours in (("attn_block", "window"), ("attn_grid", "grid")):
        rules += [Rule(f"{block}{theirs}.attn.{a}", f"{block}{ours}.attn.{b}", change) for a, b, change in attention]
        rules.append(Rule(f"{block}{theirs}.{{rest}}", f"{block}{ours}.{{rest}}"))
    return tuple(rules)


@dataclass(frozen=True)
class HeadsFirst:
    """Rows of a qkv projection ordered (head, q k v, channel) <-> ours, (q k v, head, channel); weight or bias."""

    head_dim: int = HEAD_DIM

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """CheckpointMismatch when the rows are not three times a number of heads."""
        rows = tensor.shape[0] if tensor.ndim else 0
        if not rows or rows % (3 * self.head_dim):
            raise CheckpointMismatch(f"{rows} rows are no multiple of 3 x {self.head_dim} channels of a head")
        return tensor.unflatten(0, (-1, 3, self.head_dim)).transpose(0, 1).flatten(0, 2).contiguous()

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """(q k v, head, channel) -> (head, q k v, channel)."""
        return tensor.unflatten(0, (3, -1, self.head_dim)).transpose(0, 1).flatten(0, 2).contiguous()


class MaxViT(Backbone):
    """MaxViT as published; takes any image of at least 32 x 32.

    Args:
        window_size, grid_size: tokens a side, an int or (y, x) pair, for all stages; None for img_size / 32, as
            published.
        img_size, in_chans, num_classes, global_pool, drop_rate: as in ``Backbone``.
        embed_dim: channels of the first stage, doubled from stage to stage.
        depths: blocks of each stage.
        head_dim: channels of a head; decides the number of heads.
        stem_width: channels of the stem's two convolutions, an int or a pair.
        stem_stride: reduction of the first stage: 4, or 2 with a stem that does not halve, for small images.
        mlp_ratio, expand_ratio: hidden channels of the MLPs and of the MBConvs.
        qkv_bias: whether q, k, v have a bias.
        layer_scale: initial value of the learned channel scales of the attentions, None for none.
        hidden_head: norm after pooling and a hidden layer (tanh) before the classifier, as published; False for a norm
            of the last map and nothing between.
        proj_drop_rate, attn_drop_rate: dropout after attention and in the MLP, and of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
    """

    first_conv = "stem.conv1"
    conv: ClassVar[Convolutions] = Convolutions(
        act_layer=GELUTanh, norm_eps=1e-3, padding="same", bias=True, of_output=True, squeeze=0.25
    )
    mlp_act: ClassVar[type[nn.Module]] = GELUTanh
    norm_eps: ClassVar[float] = 1e-5
    layouts = (
        Layout(
            name="timm",
            source="huggingface/pytorch-image-models, timm/models/maxxvit.py, models maxvit_*_tf_*",
            signature=("stem.conv1.bias", "stages.{i}.blocks.{j}.attn_block.attn.rel_pos.relative_position_bias_table"),
            # TensorFlow's tables are (heads, y, x) by key - query, as ours
            rules=_timm_rules(("rel_pos.relative_position_bias_table", "rel_pos_bias", None)),
        ),
    )

    def __init__(
        self,
        *,
        window_size: Size | None = None,
        grid_size: Size | None = None,
        img_size: Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 5, 2),
        head_dim: int = HEAD_DIM,
        stem_width: Size = 64,
        stem_stride: int = 4,
        mlp_ratio: float = 4.0,
        expand_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        hidden_head: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        stages = stage_count(depths)
        check_stem_stride(stem_stride)
        check_arguments(
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            expand_ratio=expand_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        norm = partial(nn.LayerNorm, eps=self.norm_eps)
        width = to_pair("stem_width", stem_width)
        dims = [embed_dim * 2**i for i in range(stages)]
        for dim in dims:
            if dim % head_dim:
                raise ValueError(f"head_dim={head_dim} must divide the {dim} channels of its stage")
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        size = to_pair("img_size", img_size)
        cells = (_partition("window_size", window_size, size), _partition("grid_size", grid_size, size))
        attention = self._attention()
        options: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}

        def make_block(stage: int, j: int) -> MaxViTBlock:
            dim, rate = dims[stage], rates[stage][j]
            before = dim if j else (dims[stage - 1] if stage else width[1])
            window, grid = (
                Block(
                    dim,
                    attention(dim, dim // head_dim, partition, cell, **options),
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_layer=norm,
                    act_layer=self.mlp_act,
                )
                for partition, cell in zip((Window, Grid), cells, strict=True)
            )
            return MaxViTBlock(MBConv(before, dim, 1 if j else 2, expand_ratio, self.conv, rate), window, grid)

        head = None
        if hidden_head:
            check_pool(global_pool, _WIDE_AS_MAP)
            head = ClNormMlpClassifierHead(
                dims[-1], num_classes, dims[-1], global_pool, drop_rate, norm_layer=norm, act_layer=nn.Tanh
            )
        super().__init__(
            MaxViTStem(in_chans, width, stem_stride // 2, self.conv),
            [Stage(nn.Identity(), [make_block(i, j) for j in range(depth)]) for i, depth in enumerate(depths)],
            dims,
            stem_stride=stem_stride,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm,
            head=head,
        )
        self.window_size, self.grid_size = window_size, grid_size

    def _attention(self) -> Callable[..., PartitionAttention]:
        """The class of the attentions."""
        return PartitionAttention

    def init_weights(self, needs_reset: bool = True) -> None:
        """As in ``Backbone``, the convolutions' weights from a normal of std 0.02 as well, as in the authors' code."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables, and of the parameters that make them."""
        mlps = {name for name, _ in self.named_parameters() if ".rel_pos_mlp." in name}
        return super().no_weight_decay() | mlps

    def _resize_attention(
        self, img_size: Pair, window_size: Size | None = None, grid_size: Size | None = None, **others: Any
    ) -> None:
        super()._resize_attention(img_size, **others)
        window_size = self.window_size if window_size is None else window_size
        grid_size = self.grid_size if grid_size is None else grid_size
        window, grid = _partition("window_size", window_size, img_size), _partition("grid_size", grid_size, img_size)
        self.window_size, self.grid_size = window_size, grid_size
        for stage in self.stages:
            for block in stage.blocks:
                block.window.attn.set_size(window)
                block.grid.attn.set_size(grid)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier (and pooling, if given) in place; 0 classes for none. A hidden layer stays."""
        if global_pool is not None and isinstance(self.head, ClNormMlpClassifierHead):
            check_pool(global_pool, _WIDE_AS_MAP)
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given stages do not need, a hidden layer of the head included; returns their indices."""
        wanted = take_stages(indices, len(self.stages))
        if prune_head or max(wanted) < len(self.stages) - 1:
            self.head = ClassifierHead(self.num_features, 0, pool_type="", input_fmt=self.output_fmt)
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def pruned_prefixes(self) -> tuple[str, ...]:
        """As in ``Backbone``; a head that was pruned has lost its hidden layer too."""
        pruned = isinstance(self.head, ClassifierHead) and isinstance(self.head.fc, nn.Identity)
        return super().pruned_prefixes() + (("head.",) if pruned else ())


class MaxViTRW(MaxViT):
    """Timm's own line.

    Args:
        mlp_tables: make the position tables by an MLP (``rmlp``) instead of learning them.
        hidden_head, **options: as in ``MaxViT``; ``head_dim`` is 32.
    """

    conv = Convolutions(act_layer=nn.SiLU, norm_eps=1e-5, padding="", bias=False, of_output=False, squeeze=1 / 16)
    mlp_act = GELU
    norm_eps = 1e-6
    layouts = (
        Layout(
            name="timm",
            source="huggingface/pytorch-image-models, timm/models/maxxvit.py, models maxvit_*rw*",
            signature=("stem.conv1.weight", "stages.{i}.blocks.{j}.attn_block.attn.qkv.weight"),
            absent=("stem.conv1.bias",),
            rules=_timm_rules(
                ("qkv.weight", "qkv.weight", HeadsFirst()),
                ("qkv.bias", "qkv.bias", HeadsFirst()),
                ("rel_pos.relative_position_bias_table", "rel_pos_bias", FlippedTable()),
                ("rel_pos.mlp.{rest}", "rel_pos_mlp.{rest}", None),
            ),
        ),
    )

    def __init__(
        self, *, mlp_tables: bool = False, hidden_head: bool = False, head_dim: int = HEAD_DIM, **options: Any
    ) -> None:
        if head_dim != HEAD_DIM:
            # their layout cannot tell
            raise ValueError(f"head_dim={head_dim}: timm's MaxViTs have heads of {HEAD_DIM} channels")
        self.mlp_tables = mlp_tables
        super().__init__(hidden_head=hidden_head, head_dim=head_dim, **options)

    def _attention(self) -> Callable[..., PartitionAttention]:
        return LogMlpAttention if self.mlp_tables else PartitionAttention


def _partition(name: str, size: Size | None, img_size: Pair) -> Pair:
    """The given size, or the one that a nominal image size asks for."""
    return (max(img_size[0] // 32, 1), max(img_size[1] // 32, 1)) if size is None else to_pair(name, size)


_TINY = {"embed_dim": 64, "depths": (2, 2, 5, 2), "stem_width": 64, "drop_path_rate": 0.2}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 5, 2), "stem_width": 64, "drop_path_rate": 0.3}
_BASE = {"embed_dim": 96, "depths": (2, 6, 14, 2), "stem_width": 64, "drop_path_rate": 0.4}
_LARGE = {"embed_dim": 128, "depths": (2, 6, 14, 2), "stem_width": 128, "drop_path_rate": 0.6}
# nothing is published about the stochastic depth of XLarge
_XLARGE = {"embed_dim": 192, "depths": (2, 6, 14, 2), "stem_width": 192}
_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE, "xlarge": _XLARGE}

register(
    __name__,
    MaxViT,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "maxvit_nano": {
            "img_size": 32,
            "stem_stride": 2,
            "stem_width": 16,
            "embed_dim": 16,
            "depths": (1, 2, 1),
            "head_dim": 16,
            "window_size": 4,
            "grid_size": 4,
            "mlp_ratio": 2.0,
            "hidden_head": False,
        },
        **{
            f"maxvit_{name}{suffix}": {**kwargs, **size}
            for name, kwargs in _SIZES.items()
            for suffix, size in (("", {}), ("_384", {"img_size": 384}), ("_512", {"img_size": 512}))
        },
    },
)

# timm publishes no stochastic depth of these
_RW_PICO = {"embed_dim": 32, "depths": (2, 2, 5, 2), "stem_width": (24, 32), "img_size": 256}
_RW_NANO = {"embed_dim": 64, "stem_width": (32, 64), "depths": (1, 2, 3, 1), "img_size": 256}
_RW_TINY = {"embed_dim": 64, "stem_width": (32, 64), "depths": (2, 2, 5, 2)}
_RW_SMALL = {"embed_dim": 96, "stem_width": (32, 64), "depths": (2, 2, 5, 2), "layer_scale": 1e-6}
_RW_BASE = {"embed_dim": 96, "stem_width": (32, 64), "depths": (2, 6, 14, 2), "hidden_head": True}

register(
    __name__,
    MaxViTRW,
    {
        "maxvit_nano_rw": _RW_NANO,
        "maxvit_tiny_rw": _RW_TINY,
        "maxvit_rmlp_pico_rw": {**_RW_PICO, "mlp_tables": True},
        "maxvit_rmlp_nano_rw": {**_RW_NANO, "mlp_tables": True},
        "maxvit_rmlp_tiny_rw": {**_RW_TINY, "img_size": 256, "mlp_tables": True},
        "maxvit_rmlp_small_rw": {**_RW_SMALL, "mlp_tables": True},
        "maxvit_rmlp_base_rw": {**_RW_BASE, "mlp_tables": True},
        "maxvit_rmlp_base_384_rw": {**_RW_BASE, "img_size": 384, "mlp_tables": True},
    },
)
