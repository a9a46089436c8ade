"""The operators against what one would write, or gets, without Nearfield: gathers, SDPA, FlexAttention, timm's Swin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _bench_timing import Candidate, Case, Peer
from nearfield.checkpoints.layouts import FlippedTable
from nearfield.ops import Neighborhood, Window, local_attention, resolve
from nearfield.ops.bias import table_index
from nearfield.ops.patterns import Pattern
from nearfield.ops.tiles import Band, TileShape, make_plan
from nearfield.ops.torch_tiles import choose_tile
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

Operator = Callable[[Tensor, Tensor], Tensor]

KERNEL = 7
HEAD_DIM = 32


@dataclass(frozen=True)
class Inputs:
    """The packed projection (B, H, W, 3, heads, 32), the bias table (heads, 13, 13) and an output gradient."""

    qkv: Tensor
    table: Tensor
    grad: Tensor

    @staticmethod
    def make(batch: int, size: int, heads: int) -> Inputs:
        """Drawn with a fixed seed; the first two require gradients."""
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, size, size, 3, heads, HEAD_DIM, generator=generator)
        bias = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, generator=generator)
        grad = torch.randn(batch, size, size, heads * HEAD_DIM, generator=generator)
        return Inputs(qkv.requires_grad_(), bias.requires_grad_(), grad)

    def forward(self, name: str, operator: Operator) -> Candidate:
        """Candidate that computes the output (B, H, W, heads * 32) alone, as in inference."""

        def run() -> Tensor:
            with torch.no_grad():
                return operator(self.qkv, self.table)

        return Candidate(name, run)

    def training(self, name: str, operator: Operator) -> Candidate:
        """Candidate that computes the output and the gradients of projection and table."""

        def run() -> tuple[Tensor, ...]:
            output = operator(self.qkv, self.table)
            return output.detach(), *torch.autograd.grad(output, (self.qkv, self.table), self.grad)

        def results(result: Any) -> dict[str, Tensor]:
            return dict(zip(("output", "gradient of qkv", "gradient of the table"), result, strict=True))

        return Candidate(name, run, results)


def ours(pattern: Pattern) -> Operator:
    """Nearfield's operator."""
    return lambda qkv, table: local_attention(qkv, None, None, pattern, bias=table).flatten(3)


# --- neighborhood attention -----------------------------------------------------------------------------------------


def gathered(pattern: Pattern, size: int) -> Operator:
    """Gather the keys and values of every query, then batched products with them, one image at a time.

    The fastest of the forms tried: whole batch at once, one image at a time, gather by embedding, products as
    elementwise sums. It needs every query to have the same number of keys.
    """
    resolved = resolve(pattern, size, size)
    starts = torch.from_numpy(resolved.y.start)
    keys = starts[:, None] + torch.arange(KERNEL)
    tokens = (keys[:, None, :, None] * size + keys[None, :, None, :]).flatten()
    shift = (keys - torch.arange(size)[:, None]).numpy()
    entries = torch.from_numpy(table_index(shift, shift, KERNEL - 1, KERNEL - 1)).flatten()
    around = KERNEL * KERNEL

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        heads, head_dim = qkv.shape[4:]
        bias = table.flatten(1).index_select(1, entries).view(heads, -1, 1, around)
        outputs = []
        for image in qkv.flatten(1, 2).unbind(0):
            q, k, v = image.permute(1, 2, 0, 3).unbind(0)  # (heads, tokens, head_dim)
            q = (q * head_dim**-0.5).reshape(-1, 1, head_dim)
            k = k.index_select(1, tokens).view(-1, around, head_dim)
            v = v.index_select(1, tokens).view(-1, around, head_dim)
            scores = torch.bmm(q, k.transpose(1, 2)).view(heads, -1, 1, around) + bias
            output = torch.bmm(scores.softmax(-1).view(-1, 1, around), v).view(heads, -1, head_dim)
            outputs.append(output.transpose(0, 1).reshape(size, size, -1))
        return torch.stack(outputs)

    return run


def strips_by_autograd(pattern: Pattern, size: int, runs: int) -> Operator:
    """Our own tiles, one SDPA call each, left to autograd: the mask is gathered from the table and needs a gradient."""
    plan = make_plan(pattern, size, size, choose_tile(pattern, size, size, runs))
    reach = KERNEL - 1
    entries: dict[tuple[TileShape, TileShape], Tensor] = {}
    for row, column in ((row, column) for row in plan.rows for column in plan.columns):
        x = column.tiles[0].shape
        for y in (tile.shape for tile in row.tiles):
            index = torch.from_numpy(table_index(y.displacement(), x.displacement(), reach, reach))
            allowed = torch.from_numpy(y.allowed[:, None, :, None] & x.allowed[None, :, None, :]).reshape(index.shape)
            entries[y, x] = index.masked_fill_(~allowed, (2 * reach + 1) ** 2)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        batch, _, _, _, heads, head_dim = qkv.shape
        table = F.pad(table.flatten(1), (0, 1), value=-torch.inf)  # the entry of masked pairs
        masks = {key: table[:, index][None] for key, index in entries.items()}
        columns = []
        for column, q_from, k_from in _runs(plan.columns):
            x = column.tiles[0].shape
            q = qkv[:, :, q_from : q_from + x.queries, 0].contiguous()
            k, v = qkv[:, :, k_from : k_from + x.keys, 1:].contiguous().unbind(3)
            rows = []
            for row, qy, ky in _runs(plan.rows):
                for tile in row.tiles:
                    y, a, b = tile.shape, qy + tile.query, ky + tile.key
                    views = (q[:, a : a + y.queries], k[:, b : b + y.keys], v[:, b : b + y.keys])
                    qt, kt, vt = (view.flatten(1, 2).transpose(1, 2) for view in views)
                    out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=masks[y, x])
                    rows.append(out.transpose(1, 2).reshape(batch, y.queries, x.queries, heads * head_dim))
            columns.append(torch.cat(rows, 1))
        return torch.cat(columns, 2)

    return run


def _runs(bands: tuple[Band, ...]) -> list[tuple[Band, int, int]]:
    """(band, first query, first key) of every run, in the order of the map; bands of unit step."""
    starts = [
        (band, band.queries.start + i * band.query_spacing, band.keys.start + i * band.key_spacing)
        for band in bands
        for i in range(band.count)
    ]
    return sorted(starts, key=lambda start: start[1])


def flex_attention(size: int) -> Operator:
    """torch.compile of FlexAttention: the neighborhood as block mask, the bias as score_mod."""
    from torch.nn.attention import flex_attention as flex

    def first(coordinate: Tensor) -> Tensor:
        return (coordinate - KERNEL // 2).clamp(0, size - KERNEL)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dy, dx = k // size - first(q // size), k % size - first(q % size)
        return (dy >= 0) & (dy < KERNEL) & (dx >= 0) & (dx < KERNEL)

    blocks = flex.create_block_mask(visible, None, None, size * size, size * size, device="cpu")
    compiled: Any = torch.compile(flex.flex_attention, dynamic=False)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        table = table.detach()

        def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            dy, dx = k // size - q // size + KERNEL - 1, k % size - q % size + KERNEL - 1
            # scores outside the neighborhood are computed before they are masked
            inside = dy.clamp(0, 2 * KERNEL - 2), dx.clamp(0, 2 * KERNEL - 2)
            return score + table[h, inside[0], inside[1]]

        q, k, v = qkv.detach().flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = compiled(q, k, v, score_mod=biased, block_mask=blocks)
        return out.transpose(1, 2).reshape(*qkv.shape[:3], -1)

    return run


def neighborhood_cases(quick: bool) -> list[Case]:
    """7x7 neighborhood attention with a trained bias at the first stage of NAT-T."""
    batch, size, heads = (1, 14, 2) if quick else (8, 56, 2)
    name = f"7x7 neighborhood attention, {batch}x{size}x{size}, {heads} heads x {HEAD_DIM}"
    inputs, pattern = Inputs.make(batch, size, heads), Neighborhood(KERNEL)
    gather, strips = gathered(pattern, size), strips_by_autograd(pattern, size, batch * heads)
    training = Case(
        f"{name}, forward + backward",
        inputs.training("nearfield", ours(pattern)),
        (
            Peer(inputs.training("gather of K and V per query", gather), 10.0),
            Peer(inputs.training("autograd of SDPA on our tiles", strips), 1.5),
        ),
    )
    flex_name, flex_target = "compiled FlexAttention, bias as score_mod", 5.0
    peers, missing = [Peer(inputs.forward("gather of K and V per query", gather))], {}
    if quick:
        missing[flex_name] = (flex_target, "not measured: left out of --quick")
    elif shutil.which("g++") is None:
        missing[flex_name] = (flex_target, "not measured: no C++ compiler")
    else:
        peers.append(Peer(inputs.forward(flex_name, flex_attention(size)), flex_target))
    forward = Case(f"{name}, forward", inputs.forward("nearfield", ours(pattern)), tuple(peers), missing=missing)
    return [training, forward]


# --- shifted windows ------------------------------------------------------------------------------------------------


def timm_block(size: int, heads: int, table: Tensor) -> Any:
    """timm's shifted SwinTransformerBlock with our table, its projections taken out."""
    block: Any = SwinTransformerBlock(
        heads * HEAD_DIM, (size, size), num_heads=heads, window_size=KERNEL, shift_size=KERNEL // 2
    ).eval()
    block.attn.qkv = block.attn.proj = nn.Identity()
    with torch.no_grad():
        block.attn.relative_position_bias_table.copy_(FlippedTable().to_theirs(table))
    return block


def timm_windows(block: Any, *, fused: bool | None, rolled: bool = False) -> Operator:
    """timm's path: roll, cut into windows, attention with its mask, put together, roll back.

    Args:
        block: its functions, bias and mask.
        fused: SDPA or matmul and softmax; None for timm's choice.
        rolled: roll and cut a map of a third of the channels, and read the packed projection as if it came of that.
            This is timm's order, in which the projection lies between, less what the projection costs.
    """
    window, shift = block.window_size, block.shift_size
    chosen = block.attn.fused_attn
    kept: list[Tensor] = []

    def cut(tokens: Tensor) -> Tensor:
        return window_partition(torch.roll(tokens, (-shift[0], -shift[1]), (1, 2)), window).flatten(1, 2)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        block.attn.fused_attn = chosen if fused is None else fused
        height, width = qkv.shape[1:3]
        if rolled:
            if not kept:
                kept.extend((qkv[..., 0, :, :].flatten(3).contiguous(), cut(qkv.flatten(3))))
            cut(kept[0])
            windows = kept[1]
        else:
            windows = cut(qkv.flatten(3))
        windows = block.attn(windows, mask=block.attn_mask)
        merged = window_reverse(windows.unflatten(1, window), window, height, width)
        return torch.roll(merged, shift, (1, 2))

    return run


def window_cases(quick: bool) -> list[Case]:
    """Shifted 7x7 window attention at the first stage of Swin-T."""
    batch, size, heads = (1, 14, 3) if quick else (8, 56, 3)
    inputs = Inputs.make(batch, size, heads)
    block = timm_block(size, heads, inputs.table)
    default = "SDPA" if block.attn.fused_attn else "matmul and softmax"
    before = "roll and cut before the projection, whose own cost is left out"
    return [
        Case(
            f"shifted 7x7 window attention, {batch}x{size}x{size}, {heads} heads x {HEAD_DIM}, forward",
            inputs.forward("nearfield", ours(Window(KERNEL, KERNEL // 2))),
            (
                Peer(
                    inputs.forward("timm's default", timm_windows(block, fused=None)),
                    1.9,
                    f"timm chooses {default} here",
                ),
                Peer(inputs.forward("timm with SDPA", timm_windows(block, fused=True)), 1.5),
                Peer(
                    inputs.forward("timm's default in its own order", timm_windows(block, fused=None, rolled=True)),
                    note=before,
                ),
                Peer(
                    inputs.forward("timm with SDPA in its own order", timm_windows(block, fused=True, rolled=True)),
                    note=before,
                ),
            ),
        )
    ]
