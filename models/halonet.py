"""HaloNet (Vaswani et al., CVPR 2021, arXiv 2103.12731), and timm's hybrids of it with convolutions.

A residual network whose 3x3 convolutions are attention: the queries of a block see the keys of that block, widened by
a halo. The bias depends on the query, q . r_y + q . r_x. Keys outside the map are zero keys that take part in the
softmax: nothing is masked. A stage's first attention may have its queries on every second token, which halves the map.

Nobody published code or weights of the paper's H0 to H7. What its table leaves open is filled in as re-implementations
have it: ReLU, norm and activation after the attention, 4 heads in the first stage and 8 in the others. The printed
numbers of parameters come out when a table has rows for those displacements only that occur, and when H3 has 1280 final
features: with the 1024 that its table gives it would have 11.8 M parameters, not the 12.3 M that are printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    calculate_drop_path_rates,
    create_attn,
    get_act_layer,
    get_norm_act_layer,
    make_divisible,
    trunc_normal_,
)
from torch import Tensor, nn

from ..checkpoints import Layout, Rule
from ..ops import Halo, local_attention, resize_table
from .arguments import by_name, check_arguments, check_entries, check_heads, stage_count
from .backbone import Backbone
from .layers import Pair, PositionTables, Size, Stage, per_stage, to_pair
from .registry import register
from .resnet import Bottleneck, ConvNorm, FinalConv, ResNetStem, every


class HaloAttention(PositionTables):
    """Blocked local attention with a halo, and tables of relative positions that multiply the query.

    A map that is no multiple of the block has zero keys in the rest of its last blocks, as it has in their halo.

    Args:
        dim: channels in.
        v_dim: channels out, those of v in all heads.
        num_heads: heads; must divide ``v_dim``.
        head_dim: channels of q and k in a head.
        block_size, halo_size: (y, x) tokens.
        stride: 2 halves the map: by queries on every second token, or by averaging where 2 does not divide the block.
        spare_rows: tables as timm has them, with 2 * halo rows in front that no displacement reaches.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    position_tables = ("rel_pos_bias_y", "rel_pos_bias_x")
    rel_pos_bias_y: nn.Parameter
    rel_pos_bias_x: nn.Parameter

    def __init__(
        self,
        dim: int,
        v_dim: int,
        num_heads: int,
        head_dim: int,
        block_size: Pair,
        halo_size: Pair,
        stride: int = 1,
        spare_rows: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(v_dim, num_heads, "channels of v")
        self.num_heads = num_heads
        self.head_dims = (head_dim, v_dim // num_heads)
        self.stride = stride
        self.spare_rows = spare_rows
        self.attn_drop = attn_drop
        self.q = nn.Conv2d(dim, num_heads * head_dim, 1, bias=False)
        self.kv = nn.Conv2d(dim, num_heads * head_dim + v_dim, 1, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)
        self._cut(block_size, halo_size)
        for name, rows in self._rows().items():
            self.register_parameter(name, nn.Parameter(torch.empty(sum(rows), head_dim)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projections (by fan-in) and tables (by the scale of the scores) anew."""
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        for table in (self.rel_pos_bias_y, self.rel_pos_bias_x):
            trunc_normal_(table, std=self.head_dims[0] ** -0.5)

    def _cut(self, block_size: Pair, halo_size: Pair) -> None:
        self.block_size, self.halo_size = block_size, halo_size
        strided = self.stride > 1 and not any(size % self.stride for size in block_size)
        self.step = self.stride if strided else 1
        self.averaged = self.stride > self.step
        self.halo = Halo(block_size, halo_size, "zero", self.step)

    def _rows(self) -> dict[str, Pair]:
        """Of each table the rows that no displacement reaches, and those that one does."""
        sizes = zip(self.position_tables, self.block_size, self.halo_size, strict=True)
        return {name: (2 * halo if self.spare_rows else 0, 2 * (block + halo) - 1) for name, block, halo in sizes}

    def set_block(self, block_size: Pair, halo_size: Pair) -> None:
        """Change block and halo; the tables are resized to the displacements that then occur."""
        before = self._rows()
        self._cut(block_size, halo_size)
        for name, rows in self._rows().items():
            self.replace_table(name, resize_rows(getattr(self, name), before[name], rows))

    def fit_table(self, name: str, table: Tensor, source: PositionTables | None = None) -> Tensor:
        """A table (rows, head_dim) of other blocks and halos; how many of its rows are spare takes a ``source``."""
        rows = self._rows()[name]
        if table.ndim != 2 or table.shape[1] != self.head_dims[0] or table.shape[0] in (0, sum(rows)):
            return table
        if isinstance(source, HaloAttention):
            before = source._rows()[name]
        elif self.spare_rows:
            raise ValueError(
                f"the file has {table.shape[0]} rows, the model {sum(rows)}, and rows do not tell block from halo: "
                "load into a model with the block_size and halo_size of the file, then call set_input_size"
            )
        else:
            before = (0, table.shape[0])
        return resize_rows(table, before, rows) if sum(before) == table.shape[0] and before[1] % 2 else table

    def _table(self, table: Tensor, axis: int) -> Tensor:
        """The table with the spare rows that the operator counts from."""
        return table if self.spare_rows else F.pad(table, (0, 0, 2 * self.halo_size[axis], 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, v_dim, ceil(H/s), ceil(W/s))."""
        q = self.q(every(x, self.step)).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        # a head's channels of k and v lie together
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        k, v = kv.split(self.head_dims, -1)
        x = local_attention(
            q,
            k,
            v,
            self.halo,
            bias=(self._table(self.rel_pos_bias_y, 0), self._table(self.rel_pos_bias_x, 1)),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        x = x.flatten(3).permute(0, 3, 1, 2)
        if self.averaged:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return self.proj_drop(x)


def resize_rows(table: Tensor, before: Pair, after: Pair) -> Tensor:
    """A table (rows, head_dim) with other numbers of spare rows, which become zero, and of displacements, bicubically.

    before, after: (spare, reached) rows that it has and is to have.
    """
    if before == after:
        return table
    with torch.no_grad():
        reached = resize_table(table[before[0] :].T[..., None], (after[1], 1))[..., 0].T
        return F.pad(reached, (0, 0, after[0], 0))


def _timm(*stem: Rule) -> Layout:
    """timm's layout, with the rules of a stem that it names in another way."""
    block = "stages.{i}.{j}.", "stages.{i}.blocks.{j}."
    renamed = {
        "conv1_1x1.{rest}": "conv1.{rest}",
        "conv2_kxk.{rest}": "conv2.{rest}",
        "attn.{rest}": "gate.{rest}",
        "self_attn.pos_embed.height_rel": "attn.rel_pos_bias_y",
        "self_attn.pos_embed.width_rel": "attn.rel_pos_bias_x",
        "self_attn.{rest}": "attn.{rest}",
        "post_attn.{rest}": "norm.{rest}",
        "conv3_1x1.{rest}": "conv3.{rest}",
        "shortcut.{rest}": "shortcut.{rest}",
    }
    return Layout(
        name="timm",
        source="huggingface/pytorch-image-models, timm/models/byoanet.py",
        signature=("stages.{i}.{j}.self_attn.q.weight", stem[0].theirs if stem else "stem.conv1.conv.weight"),
        rules=(
            *stem,
            *(Rule(block[0] + theirs, block[1] + ours) for theirs, ours in renamed.items()),
            Rule("final_conv.{rest}", "norm.{rest}"),
        ),
    )


class HaloNet(Backbone):
    """HaloNet and its hybrids; takes any image of at least 32 x 32.

    The names r_v and r_b are the paper's. Stage i works on ``embed_dim * 2**i`` channels inside its blocks and has r_b
    times as many between them.

    Args:
        img_size, in_chans, num_classes, global_pool, drop_rate: as in ``Backbone``.
        embed_dim: inner channels of the first stage.
        depths, num_heads: blocks and heads of each stage.
        attention: for each stage the numbers of the blocks with attention, None for all; the others are convolutions.
        block_size, halo_size: an int or (y, x) pair, or one for each stage.
        r_v: channels of v as a multiple of the inner ones.
        r_b: channels between blocks as a multiple of the inner ones, one value or one for each stage.
        head_dim: channels of q and k in a head; None for ``qk_ratio`` times the inner channels, divided by the heads.
        qk_ratio: see there.
        spare_rows: as in ``HaloAttention``.
        expansion: inner channels of a block as this multiple of those that enter it, as in RegNetZ, which also has no
            shortcut between unlike maps and no activation after one; None for a plain residual network.
        group_width: channels in a group of the 3x3 convolutions, 0 for one group.
        gate: timm's name of the channel attention after them (``se``, ``eca``), None for none.
        gate_ratio: its reduction, None for its own.
        num_features: channels of a last 1x1 convolution with norm and activation (the paper's d_f), None for none. It
            is ``norm``; feature maps are taken before it.
        stem_dims, stem_kernel_size, stem_pool, stem_stride: as in ``ResNetStem``.
        first_stride: 2 if the first stage halves the map too.
        act_layer, norm_layer: classes, or timm's names of them.
        zero_init: begin with branches of zero.
        proj_drop_rate: dropout after attention.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
    """

    first_conv = "stem.conv1.conv"
    layouts = (_timm(),)

    def __init__(
        self,
        *,
        img_size: Size = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int | Sequence[int] = (4, 8, 8, 8),
        attention: Sequence[Sequence[int]] | None = None,
        block_size: Size | Sequence[Size] = 8,
        halo_size: Size | Sequence[Size] = 3,
        r_v: float = 1.0,
        r_b: float | Sequence[float] = 1.0,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        spare_rows: bool = True,
        expansion: float | None = None,
        group_width: int = 0,
        gate: str | None = None,
        gate_ratio: float | None = None,
        num_features: int | None = None,
        stem_dims: Sequence[int] = (64,),
        stem_kernel_size: int = 7,
        stem_pool: bool = True,
        stem_stride: int = 4,
        first_stride: int = 1,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm",
        zero_init: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        stages = stage_count(depths)
        check_arguments(
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            r_v=r_v,
            head_dim=head_dim,
            qk_ratio=qk_ratio,
            expansion=expansion,
            group_width=group_width,
            gate_ratio=gate_ratio,
            num_features=num_features,
            stem_kernel_size=stem_kernel_size,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        check_entries(num_heads=num_heads, r_b=r_b, stem_dims=stem_dims)
        if first_stride not in (1, 2):
            raise ValueError(f"first_stride must be 1 or 2, got {first_stride!r}")
        ratios = per_stage("r_b", r_b, stages, pairs=False)
        heads = per_stage("num_heads", num_heads, stages, pairs=False)
        blocks = [to_pair("block_size", size) for size in per_stage("block_size", block_size, stages)]
        halos = [to_pair("halo_size", size) for size in per_stage("halo_size", halo_size, stages)]
        attended = _attended(attention, depths)
        dims = [round(embed_dim * 2**i * ratio) for i, ratio in enumerate(ratios)]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        layers: dict[str, Any] = {"norm_layer": norm_layer, "act_layer": act_layer}
        conv = partial(ConvNorm, **layers)
        by_name("act_layer", act_layer, get_act_layer)
        norm_act = by_name("norm_layer", norm_layer, partial(get_norm_act_layer, act_layer=act_layer))

        def bottleneck(i: int, j: int, dim: int) -> Bottleneck:
            inner = embed_dim * 2**i if expansion is None else round(dim * expansion)
            stride = 1 if j else (2 if i else first_stride)
            mixer: dict[str, nn.Module]
            if j in attended[i]:
                mixed = round(inner * r_v)
                mixer = {
                    "attn": HaloAttention(
                        inner,
                        mixed,
                        heads[i],
                        head_dim or _qk_dim(inner, qk_ratio, heads[i]),
                        blocks[i],
                        halos[i],
                        stride,
                        spare_rows,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                    ),
                    "norm": norm_act(mixed),
                }
            else:
                mixed = inner
                if group_width and inner % group_width:
                    raise ValueError(f"group_width={group_width} must divide the {inner} channels of stage {i}")
                mixer = {"conv2": conv(inner, inner, 3, stride=stride, groups=inner // (group_width or inner))}
                if gate is not None:
                    reduction = {} if gate_ratio is None else {"rd_ratio": gate_ratio}
                    mixer["gate"] = by_name("gate", gate, partial(create_attn, channels=inner, **reduction))
            return Bottleneck(
                mixer,
                dim,
                inner,
                mixed,
                dims[i],
                stride,
                project=expansion is None,
                last_act=act_layer if expansion is None else None,
                zero_init=zero_init,
                drop_path=rates[i][j],
                conv=conv,
            )

        entering = [stem_dims[-1], *dims]
        super().__init__(
            ResNetStem(in_chans, stem_dims, stem_kernel_size, stem_stride, stem_pool, conv),
            [
                Stage(nn.Identity(), [bottleneck(i, j, dims[i] if j else entering[i]) for j in range(depths[i])])
                for i in range(stages)
            ],
            dims,
            stem_stride=stem_stride * first_stride,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity if num_features is None else lambda dim: FinalConv(dim, num_features, 1, **layers),
            num_features=num_features,
        )

    def _resize_attention(
        self,
        img_size: Pair,
        block_size: Size | Sequence[Size] | None = None,
        halo_size: Size | Sequence[Size] | None = None,
        **others: Any,
    ) -> None:
        super()._resize_attention(img_size, **others)
        # one entry for each stage that the model was made with, also where some are pruned
        stages = len(self.feature_info)
        asked = (("block_size", block_size), ("halo_size", halo_size))
        blocks, halos = (
            None if size is None else [to_pair(name, entry) for entry in per_stage(name, size, stages)]
            for name, size in asked
        )
        for i, stage in enumerate(self.stages):
            for attn in (module for module in stage.modules() if isinstance(module, HaloAttention)):
                attn.set_block(
                    attn.block_size if blocks is None else blocks[i], attn.halo_size if halos is None else halos[i]
                )


def _attended(attention: Sequence[Sequence[int]] | None, depths: Sequence[int]) -> list[Sequence[int]]:
    """The numbers of the blocks with attention in every stage."""
    if attention is None:
        return [range(depth) for depth in depths]
    if not isinstance(attention, Sequence) or len(attention) != len(depths):
        raise ValueError(f"attention must have one entry for each of the {len(depths)} stages, got {attention!r}")
    for i, (blocks, depth) in enumerate(zip(attention, depths, strict=True)):
        if not isinstance(blocks, Sequence) or not all(block in range(depth) for block in blocks):
            raise ValueError(f"attention[{i}] must name blocks from 0 to {depth - 1}, got {blocks!r}")
    return list(attention)


def _qk_dim(inner: int, qk_ratio: float, num_heads: int) -> int:
    """Channels of q and k in a head: a multiple of 8 for all heads, shared among them."""
    width = make_divisible(inner * qk_ratio, 8)
    if width < num_heads:
        raise ValueError(f"num_heads={num_heads} are more than the {width} channels of q: lower it or give head_dim=")
    return width // num_heads


class HaloRegNetZ(HaloNet):
    """timm's RegNetZ with halo attention, whose stem is one convolution; arguments as of ``HaloNet``."""

    layouts = (
        _timm(
            Rule("stem.conv.weight", "stem.conv1.conv.weight"),
            Rule("stem.bn.{rest}", "stem.conv1.bn.{rest}"),
        ),
    )


def _paper(
    img_size: int, blocks: int, block_size: int, halo_size: int, r_v: float, r_b: float, d_f: int | None = None
) -> dict[str, Any]:
    """A row of the paper's table of models; ``blocks`` are those of the third stage, ``d_f`` the final features."""
    return {
        "img_size": img_size,
        "depths": (3, 3, blocks, 3),
        "num_heads": (4, 8, 8, 8),
        "block_size": block_size,
        "halo_size": halo_size,
        "r_v": r_v,
        "r_b": r_b,
        "num_features": d_f,
        "spare_rows": False,
    }


# timm's tiered stem of three 3x3 convolutions, and as many channels between blocks as ResNet-50 has
_HYBRID = {"img_size": 256, "num_heads": 8, "r_b": 4.0, "stem_dims": (24, 32, 64), "stem_kernel_size": 3}

register(
    __name__,
    HaloNet,
    {
        # for images of 32 x 32: maps of 16, 8 and 4 tokens a side
        "halonet_nano": {
            "img_size": 32,
            "stem_dims": (32,),
            "stem_kernel_size": 3,
            "stem_stride": 2,
            "embed_dim": 32,
            "depths": (2, 2, 2),
            "attention": ((), (0, 1), (0, 1)),
            "num_heads": (2, 4, 4),
            "block_size": 4,
            "halo_size": 1,
            "num_features": 112,
            "spare_rows": False,
        },
        "halo_h0": _paper(256, 7, 8, 3, 1.0, 0.5),
        "halo_h1": _paper(256, 10, 8, 3, 1.0, 1.0),
        "halo_h2": _paper(256, 11, 8, 3, 1.0, 1.25),
        "halo_h3": _paper(320, 12, 10, 3, 1.0, 1.5, 1280),
        "halo_h4": _paper(384, 12, 12, 2, 1.0, 3.0, 1280),
        "halo_h5": _paper(448, 23, 14, 2, 2.5, 2.0, 1536),
        "halo_h6": _paper(512, 24, 8, 4, 3.0, 2.75, 1536),
        "halo_h7": _paper(600, 26, 10, 3, 4.0, 3.5, 2048),
        "halonet_26t": {**_HYBRID, "depths": (2, 2, 2, 2), "attention": ((), (), (1,), (0, 1)), "halo_size": 2},
        "sehalonet_33ts": {
            **_HYBRID,
            "depths": (2, 3, 3, 2),
            "attention": ((), (2,), (2,), (0, 1)),
            "r_b": (4.0, 4.0, 4.0, 3.0),
            "gate": "se",
            "num_features": 1280,
            "stem_pool": False,
            "act_layer": "silu",
        },
        "halonet_50ts": {
            **_HYBRID,
            "depths": (3, 4, 6, 3),
            "attention": ((), (3,), (1, 3, 5), (1,)),
            "num_heads": (8, 4, 8, 8),
            "act_layer": "silu",
        },
        "eca_halonext_26ts": {
            **_HYBRID,
            "depths": (2, 2, 2, 2),
            "attention": ((), (), (1,), (0, 1)),
            "halo_size": 2,
            "head_dim": 16,
            "group_width": 16,
            "gate": "eca",
            "act_layer": "silu",
        },
    },
)
register(
    __name__,
    HaloRegNetZ,
    {
        "halo_regnetz_b": {
            "img_size": 224,
            "embed_dim": 48,
            "depths": (2, 6, 12, 2),
            "attention": ((), (), (3, 7, 11), (0, 1)),
            "num_heads": 8,
            "block_size": 7,
            "halo_size": 2,
            "r_b": (1.0, 1.0, 1.0, 0.75),
            "qk_ratio": 0.33,
            "expansion": 3.0,
            "group_width": 16,
            "gate": "se",
            "gate_ratio": 0.25,
            "num_features": 1536,
            "stem_dims": (32,),
            "stem_kernel_size": 3,
            "stem_stride": 2,
            "first_stride": 2,
            "act_layer": "silu",
        },
    },
)
