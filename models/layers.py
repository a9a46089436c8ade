"""Modules that families share: stems, downsamplers, the attention skeleton, the pre-norm block and the stage.

Everything between the stem and the head works on channels-last maps (B, H, W, C). Any map size is taken: what a module
cannot use as it is, it zero-pads at the right and bottom, as the published code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, trunc_normal_
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from ..ops import Pattern, local_attention, resize_table
from .arguments import check_heads, check_stem_stride
from .products import Mlp, add_mlp, linear

Pair = tuple[int, int]
Size = int | Pair
NormLayer = Callable[[int], nn.Module]


def to_pair(name: str, value: Size) -> Pair:
    """An int or (y, x) pair of positive ints as a pair; ``name`` is for the error."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise ValueError(f"{name} must be a positive int or a (y, x) pair of them, got {value!r}")
    return pair[0], pair[1]


def per_stage(name: str, value: Any, stages: int, *, pairs: bool = True) -> list[Any]:
    """One value for each stage: a sequence of ``stages`` entries is taken as that, anything else is repeated.

    pairs: a value may be a (y, x) pair, which therefore holds for all stages unless the model has exactly two.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * stages
    if len(value) == stages:
        return list(value)
    if pairs and len(value) == 2 and all(isinstance(entry, int) for entry in value):
        return [tuple(value)] * stages
    raise ValueError(f"{name} must be one value or one for each of the {stages} stages, got {value!r}")


def counts_per_stage(name: str, value: int | Sequence[int], stages: int) -> list[int]:
    """One positive int for each stage, from one or from one for each."""
    counts = per_stage(name, value, stages, pairs=False)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"{name} must be a positive int or one for each stage, got {value!r}")
    return counts


def map_sizes(img_size: Pair, stem_stride: int, stages: int) -> list[Pair]:
    """(height, width) of the map of every stage: sides are rounded up at every halving."""
    reductions = [stem_stride * 2**i for i in range(stages)]
    return [(-(-img_size[0] // reduction), -(-img_size[1] // reduction)) for reduction in reductions]


def round_up(size: int, unit: int) -> int:
    """The next multiple of a unit.

    Divided and multiplied: a size that is a variable of a graph stays a short formula through stage after stage, which
    it does not with remainders.
    """
    return (size + unit - 1) // unit * unit


def pad_map(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a (B, H, W, C) map at the right and bottom to ``height`` x ``width``."""
    return pad_end(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` x ``width`` of a (B, H, W, C) map."""
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    if statically_known_true(x.shape[1] == height) and statically_known_true(x.shape[2] == width):
        return x
    # a view is contiguous or not depending on the size, and what comes after would be compiled for either
    return x[:, :height, :width].clone(memory_format=torch.contiguous_format)


def pad_end(x: Tensor, amounts: tuple[int, ...]) -> Tensor:
    """``F.pad`` with zeros, or ``x`` itself where there is nothing to pad.

    A graph that is recorded for any size always pads: to ask whether there is something would make one for each answer.
    """
    if torch.compiler.is_compiling():
        nothing = all(statically_known_true(amount == 0) for amount in amounts)
    else:
        nothing = not any(amounts)
    return x if nothing else F.pad(x, amounts)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, nothing between them, then a norm: (B, C, H, W) -> (B, H/s, W/s, dim).

    ``stride`` 4 is NAT's tokenizer (arXiv 2204.07143, section 3.3); 2 is one convolution, for small images.
    """

    def __init__(self, in_chans: int, dim: int, norm_layer: NormLayer, stride: int = 4) -> None:
        super().__init__()
        check_stem_stride(stride)
        self.conv1 = nn.Conv2d(in_chans, dim // (stride // 2), 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1) if stride == 4 else nn.Identity()
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, ceil(H/s), ceil(W/s), dim) map."""
        return self.norm(self.conv2(self.conv1(x)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """Non-overlapping patches through one convolution, then a norm (Swin, arXiv 2103.14030, section 3.1).

    Sides that are no multiple of the patch are zero-padded at the right and bottom.
    """

    def __init__(self, in_chans: int, dim: int, norm_layer: NormLayer, patch_size: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, ceil(H/p), ceil(W/p), dim) map."""
        H, W = x.shape[2:]
        x = pad_end(x, (0, round_up(W, self.patch_size) - W, 0, round_up(H, self.patch_size) - H))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, then a norm (NAT, without bias): (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), out)."""

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer, bias: bool = False) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=bias)
        self.norm = norm_layer(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Norm and projection of 2x2 neighbours (Swin): (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), out)."""

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map; odd sides are zero-padded first."""
        return self.reduction(self.norm(self.neighbours(x)))

    @staticmethod
    def neighbours(x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C): 2x2 in the published order, x outermost."""
        x = pad_map(x, round_up(x.shape[1], 2), round_up(x.shape[2], 2))
        B, H, W, C = x.shape
        return x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)


class PositionTables(nn.Module):
    """Base of modules with learned position tables: what says which parameters they are and how each is resized.

    ``position_tables`` names them; loading, ``set_input_size`` and ``no_weight_decay`` go by it.
    """

    position_tables: ClassVar[tuple[str, ...]] = ()

    def fit_table(self, name: str, table: Tensor, source: PositionTables | None = None) -> Tensor:
        """A value of the parameter ``name`` at the size that it has in this module.

        Args:
            name: one of ``position_tables``.
            table: from a module whose sizes of attention may be others.
            source: that module, where it is known.

        Returns:
            the resized table; ``table`` itself where it has the size already or is of another kind.

        Raises:
            ValueError: the way to resize it cannot be told from the table alone, and ``source`` is None.
        """
        raise NotImplementedError

    def replace_table(self, name: str, table: Tensor) -> None:
        """Put another table in the place of the parameter ``name``; nothing happens when it is the same."""
        own = getattr(self, name)
        if table is not own:
            setattr(self, name, nn.Parameter(table.detach(), requires_grad=own.requires_grad))


class LocalAttention(PositionTables):
    """Multi-head attention over a pattern with a learned table of relative positions.

    A subclass says which pattern a map gets (``pattern``) and to which size the map is padded first (``padded``). The
    padding enters before the qkv projection and is not masked: padded keys carry the qkv bias and take part in the
    softmax. This is what the published weights were trained with.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        reach: largest |displacement| per axis, in steps; the table is (heads, 2 * reach_y + 1, 2 * reach_x + 1) and its
            entry [h, dy + reach_y, dx + reach_x] belongs to key - query = (dy, dx).
        qkv_bias: whether q, k, v have a bias.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    position_tables: ClassVar[tuple[str, ...]] = ("rel_pos_bias",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reach: Pair,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.table_size = (2 * reach[0] + 1, 2 * reach[1] + 1)
        self.rel_pos_bias = nn.Parameter(torch.empty(num_heads, *self.table_size))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew (normal, std 0.02); the projections are modules of their own."""
        trunc_normal_(self.rel_pos_bias, std=0.02)

    def resize_table(self, reach: Pair) -> None:
        """Give the table another reach, bicubically; nothing happens when it has it already."""
        self.table_size = (2 * reach[0] + 1, 2 * reach[1] + 1)
        for name in self.position_tables:
            self.replace_table(name, self.fit_table(name, getattr(self, name)))

    def fit_table(self, name: str, table: Tensor, source: PositionTables | None = None) -> Tensor:
        """A table (heads, odd, odd) of any reach at this module's, bicubically; every reach shows in the shape."""
        if table.ndim != 3 or table.shape[0] != self.num_heads or any(side % 2 == 0 for side in table.shape[1:]):
            return table
        with torch.no_grad():
            return resize_table(table, self.table_size)

    def padded(self, height: int, width: int) -> Pair:
        """Size to which a map is padded before attention."""
        return height, width

    def pattern(self, height: int, width: int) -> Pattern:
        """Pattern for a map of that size before it is padded."""
        raise NotImplementedError

    def position_bias(self, height: int, width: int) -> Tensor:
        """Bias of ``pattern`` for a (padded) map: the table, unless a family derives it."""
        return self.rel_pos_bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        H, W = x.shape[1:3]
        height, width = self.padded(H, W)
        qkv = linear(self.qkv, pad_map(x, height, width)).unflatten(-1, (3, self.num_heads, -1))
        x = local_attention(
            qkv,
            None,
            None,
            self.pattern(H, W),
            bias=self.position_bias(height, width),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(linear(self.proj, crop_map(x.flatten(3), H, W)))


class Block(nn.Module):
    """Pre-norm transformer block: x + drop_path(ls1(attn(norm1(x)))), then the same with the MLP.

    Args:
        dim: channels.
        attn: the attention module.
        mlp_ratio: hidden channels of the MLP, as a multiple of ``dim``.
        layer_scale: initial value of the two learned channel scales, None for none.
        proj_drop: dropout in the MLP.
        drop_path: probability of dropping a branch for a sample.
        norm_layer: makes a norm for a number of channels.
        act_layer: activation of the MLP.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        act_layer: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.ls1 = scale()
        self.drop_path1 = drop()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.ls2 = scale()
        self.drop_path2 = drop()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return add_mlp(x, self.norm2, self.mlp, self.ls2, self.drop_path2)


class Stage(nn.Module):
    """A downsampler (Identity in the first stage) and the blocks after it, each recomputed in backward if asked for."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) -> (B, ceil(H/2), ceil(W/2), C), not halved in the first stage."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint_block(block, x)
            else:
                x = block(x)
        return x


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, computed again in the backward pass; batch norms count a batch once."""
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _nothing_counted(block)))


@contextmanager
def _nothing_counted(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    counted = [(norm.num_batches_tracked, norm.momentum) for norm in norms]
    before = [None if counter is None else counter.clone() for counter, _ in counted]
    for norm in norms:  # not switched off: they would save other tensors than before, which a checkpoint refuses
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (counter, momentum), batches in zip(norms, counted, before, strict=True):
            norm.momentum = momentum
            if counter is not None and batches is not None:
                counter.copy_(batches)
