"""What one would use without Nearfield, each given its own layout for free: FlexAttention, SDPA, timm, gathers, NATTEN.

Every maker returns a Runner on the values of the same Inputs, so that results can be compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _bench_ops import HEAD_DIM, KERNEL, timm_block
from _gpu_problems import OF_QKV, OF_TABLE, Inputs, Named, Runner
from nearfield.checkpoints.layouts import FlippedTable
from nearfield.ops import HilbertNeighborhood, HilbertSlide, HilbertWindow, Neighborhood, Slide, hilbert_order
from nearfield.ops.patterns import Pattern
from nearfield.ops.routing import cut_regions
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

Coordinates = Callable[[Tensor], tuple[Tensor, Tensor]]


def compiled(function: Callable[..., Any], really: bool = True) -> Callable[..., Any]:
    """torch.compile for fixed shapes; the function itself in a dry run."""
    return torch.compile(function, dynamic=False) if really else function


# --- tokens in an order of their own: (B, heads, tokens, head_dim) --------------------------------------------------


@dataclass(frozen=True)
class Order:
    """An order of the tokens of a map.

    Args:
        places: raster index of the token at each position; None for raster order.
        coordinates: (y, x) of a position, as arithmetic that compiles into a kernel; None along a curve.
    """

    places: Tensor | None
    coordinates: Coordinates | None


def raster(width: int) -> Order:
    """Row by row."""
    return Order(None, lambda i: (i // width, i % width))


def tiled(height: int, width: int, tile: tuple[int, int], place: torch.device) -> Order:
    """Tile by tile, each row by row; the tiles divide the map."""
    (th, tw), across = tile, width // tile[1]
    if height % th or width % tw:
        raise ValueError(f"{th}x{tw} tiles do not divide a {height}x{width} map")

    def coordinates(i: Tensor) -> tuple[Tensor, Tensor]:
        t, r = i // (th * tw), i % (th * tw)
        return t // across * th + r // tw, t % across * tw + r % tw

    y, x = coordinates(torch.arange(height * width, device=place))
    return Order(y * width + x, coordinates)


def along_curve(height: int, width: int, place: torch.device) -> Order:
    """Along the generalized Hilbert curve."""
    return Order(hilbert_order(height, width).to(place), None)


def _split(qkv: Tensor, order: Order) -> list[Tensor]:
    """Packed (B, H, W, 3, heads, d) as contiguous q, k and v (B, heads, tokens, d) in an order."""
    tokens = qkv.flatten(1, 2)
    tokens = tokens if order.places is None else tokens[:, order.places]
    return [t.contiguous() for t in tokens.permute(2, 0, 3, 1, 4).unbind(0)]


def _joined(parts: Sequence[Tensor], order: Order, size: tuple[int, int]) -> list[Tensor]:
    """Inverse of `_split`, one (B, H, W, heads, d) a part."""
    maps = []
    for part in parts:
        tokens = part.transpose(1, 2)
        if order.places is not None:
            tokens = torch.empty_like(tokens).index_copy_(1, order.places, tokens.contiguous())
        maps.append(tokens.unflatten(1, size))
    return maps


def _in_order(attend: Callable[..., Tensor], inputs: Inputs, order: Order, *, note: str = "") -> Runner:
    """Runner of an attention on q, k and v (B, heads, tokens, d), and a table where the inputs have one."""
    size = (inputs.qkv.shape[1], inputs.qkv.shape[2])
    leaves = [t.requires_grad_() for t in _split(inputs.qkv.detach(), order)]
    grad = _split(torch.stack([inputs.grad] * 3, 3), order)[0]

    def output(out: Tensor) -> Tensor:
        return _joined([out], order, size)[0]

    def gradients(of_leaves: Sequence[Tensor]) -> Named:
        found = {OF_QKV: torch.stack(_joined(of_leaves[:3], order, size), 3)}
        return found if len(of_leaves) == 3 else {**found, OF_TABLE: of_leaves[3]}

    return Runner(attend, (*leaves, *inputs.tables), (grad,), output, gradients, note=note)


# --- FlexAttention --------------------------------------------------------------------------------------------------


def visible(pattern: Pattern, size: tuple[int, int], order: Order) -> Callable[..., Tensor]:
    """A mask_mod that is true where a query sees a key, as arithmetic on positions."""
    if isinstance(pattern, HilbertWindow) and not pattern.shift:
        length = pattern.length
        return lambda b, h, q, k: q // length == k // length
    if isinstance(pattern, HilbertSlide):
        reach = pattern.width // 2
        return lambda b, h, q, k: (k - q).abs() <= reach
    if isinstance(pattern, HilbertNeighborhood):
        length, first = pattern.length, _first_key(pattern.length, size[0] * size[1])
        return lambda b, h, q, k: (k >= first(q)) & (k < first(q) + length)
    if order.coordinates is None:
        raise ValueError(f"{pattern} has no rule along a curve here")
    at = order.coordinates
    if isinstance(pattern, Slide):
        ry, rx = (width // 2 for width in pattern.width)  # type: ignore[union-attr]
        return lambda b, h, q, k: ((at(k)[0] - at(q)[0]).abs() <= ry) & ((at(k)[1] - at(q)[1]).abs() <= rx)
    if isinstance(pattern, Neighborhood) and pattern.dilation == pattern.stride == (1, 1):
        ky, kx = pattern.kernel_size  # type: ignore[misc]
        first_y, first_x = _first_key(ky, size[0]), _first_key(kx, size[1])

        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            (qy, qx), (y, x) = at(q), at(k)
            dy, dx = y - first_y(qy), x - first_x(qx)
            return (dy >= 0) & (dy < ky) & (dx >= 0) & (dx < kx)

        return inside
    raise ValueError(f"{pattern} has no mask for FlexAttention here")


def _first_key(kernel_size: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda i: (i - kernel_size // 2).clamp(0, length - kernel_size)


def flex(pattern: Pattern, inputs: Inputs, order: Order, block: int, *, really: bool) -> Runner:
    """FlexAttention compiled, with a block mask of `block` x `block`; a learned bias as a captured buffer.

    Leaves and output lie as it wants them, contiguous and in its own order of tokens.
    """
    from torch.nn.attention import flex_attention as module

    size = (inputs.qkv.shape[1], inputs.qkv.shape[2])
    tokens = size[0] * size[1]
    mask = visible(pattern, size, order)
    blocks = module.create_block_mask(mask, None, None, tokens, tokens, device=inputs.qkv.device, BLOCK_SIZE=block)
    call = compiled(module.flex_attention, really)
    # its own choice of tiles for the device, where that fits the blocks of the mask
    options: Any = None if block % 128 == 0 else {"fwd_BLOCK_M": block, "fwd_BLOCK_N": block}

    def attend(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        biased = _score_mod(pattern, tables[0], order) if tables else None
        return call(q, k, v, score_mod=biased, block_mask=blocks, kernel_options=options)

    return _in_order(attend, inputs, order, note="its own layout and token order for free")


def _score_mod(pattern: Pattern, table: Tensor, order: Order) -> Callable[..., Tensor]:
    at = order.coordinates
    assert at is not None
    rows, columns = table.shape[1:]

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (qy, qx), (y, x) = at(q), at(k)
        # scores outside the pattern are computed before they are masked
        dy, dx = (y - qy + rows // 2).clamp(0, rows - 1), (x - qx + columns // 2).clamp(0, columns - 1)
        return score + table[h, dy, dx]

    return biased


def flex_with_reorder(pattern: Pattern, inputs: Inputs, block: int, *, really: bool) -> Runner:
    """The same from raster order and back, as a layer does whose map is in raster order."""
    size = (inputs.qkv.shape[1], inputs.qkv.shape[2])
    order = along_curve(*size, inputs.qkv.device)
    inner = flex(pattern, inputs, order, block, really=really)
    places = order.places
    assert places is not None
    back = places.argsort()

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(1, 2)[:, places].permute(2, 0, 3, 1, 4).unbind(0)
        output = inner.attend(q, k, v)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)[:, back].unflatten(1, size)

    return Runner(attend, (inputs.qkv,), (inputs.grad,), note="gathers to curve order and back")


# --- dense attention ------------------------------------------------------------------------------------------------


def dense(pattern: Pattern | None, inputs: Inputs) -> Runner:
    """SDPA over all tokens: with the pattern as an additive mask that is given for free, or without any."""
    size = (inputs.qkv.shape[1], inputs.qkv.shape[2])
    order = raster(size[1])
    mask = None
    if pattern is not None:
        i = torch.arange(size[0] * size[1], device=inputs.qkv.device)
        seen = visible(pattern, size, order)(i, i, i[:, None], i[None])
        mask = torch.zeros(seen.shape, dtype=inputs.qkv.dtype, device=i.device).masked_fill_(~seen, -torch.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    if pattern is not None:
        return _in_order(attend, inputs, order, note="mask for free")
    full = _in_order(attend, inputs, order, note="sees every key: another function")
    return replace(full, same=False)


# --- windows as timm computes them ----------------------------------------------------------------------------------


def timm_windows(inputs: Inputs, shift: int, *, fused: bool, own_order: bool, really: bool | None) -> Runner:
    """timm's WindowAttention with its rolls and copies, its projections taken out.

    Args:
        inputs: 7x7 windows, head_dim 32, one table.
        shift: of the windows.
        fused: SDPA, or matmul and softmax, which is timm's default.
        own_order: roll and cut a map of a third of the channels, as timm does before its projection, and read windows
            of the projection as if it came of that; else roll and cut the projection itself.
        really: torch.compile it; None: leave it eager, False: it stands for the compiled one in a dry run.
    """
    _, height, width, _, heads, head_dim = inputs.qkv.shape
    if head_dim != HEAD_DIM:
        raise ValueError(f"timm's block is made for head_dim {HEAD_DIM}, got {head_dim}")
    (table,) = inputs.tables
    block = timm_block(height, heads, torch.zeros(heads, 2 * KERNEL - 1, 2 * KERNEL - 1))
    block.shift_size = (shift, shift)
    block.to(inputs.qkv.device, inputs.qkv.dtype)
    block._init_buffers()
    block.attn.fused_attn = fused
    weight = block.attn.relative_position_bias_table
    with torch.no_grad():
        weight.copy_(FlippedTable().to_theirs(table))

    def cut(tokens: Tensor) -> Tensor:
        rolled = torch.roll(tokens, (-shift, -shift), (1, 2)) if shift else tokens
        return window_partition(rolled, block.window_size).flatten(1, 2)

    def attended(windows: Tensor) -> Tensor:
        windows = block.attn(windows, mask=block.attn_mask)
        merged = window_reverse(windows.unflatten(1, block.window_size), block.window_size, height, width)
        merged = torch.roll(merged, (shift, shift), (1, 2)) if shift else merged
        return merged.unflatten(3, (heads, head_dim))

    def own(tokens: Tensor, windows: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return attended(windows), cut(tokens)

    def ours(qkv: Tensor, _: Tensor) -> Tensor:
        return attended(cut(qkv.flatten(3)))

    if not own_order:
        call = ours if really is None else compiled(ours, really)
        note = "rolls and cuts q, k and v"
        return Runner(call, (inputs.qkv, weight), (inputs.grad,), gradients=_timm_gradients, note=note)
    call_own = own if really is None else compiled(own, really)
    with torch.no_grad():
        windows = cut(inputs.qkv.flatten(3)).requires_grad_()
        tokens = inputs.qkv[:, :, :, 0].flatten(3).contiguous().requires_grad_()
        of_cut = cut(inputs.grad.flatten(3))

    def gradients(of_leaves: Sequence[Tensor]) -> Named:
        return {OF_TABLE: _timm_gradients(of_leaves[1:])[OF_TABLE]}

    note = "rolls and cuts before the projection"
    return Runner(call_own, (tokens, windows, weight), (inputs.grad, of_cut), gradients=gradients, note=note)


def _timm_gradients(of_leaves: Sequence[Tensor]) -> Named:
    of_qkv, of_table = of_leaves
    return {OF_QKV: of_qkv, OF_TABLE: FlippedTable().to_ours(of_table, None)}


# --- routing by gathers ---------------------------------------------------------------------------------------------


def gathered_routing(inputs: Inputs, regions: int, topk: int) -> Runner:
    """Bi-level routing as BiFormer computes it: K and V of the top-k regions gathered, then dense products."""

    def attend(qkv: Tensor) -> Tensor:
        height, width, _, heads, head_dim = qkv.shape[1:]
        cut = cut_regions(height, width, (regions, regions), None)
        q, k, v = (cut.cut(t) for t in qkv.unbind(3))  # (B, regions, tokens, heads, d)
        with torch.no_grad():
            means = [t.flatten(3).mean(2, dtype=torch.float32) for t in (q, k)]
            routes = (means[0] @ means[1].transpose(1, 2)).topk(topk).indices
        index = routes[..., None, None].expand(-1, -1, -1, cut.tokens, heads * head_dim)

        def chosen(t: Tensor) -> Tensor:
            """(B, regions, heads, topk * tokens, d)."""
            every = t.flatten(3)[:, None].expand(-1, cut.count, -1, -1, -1)
            found = torch.gather(every, 2, index).flatten(2, 3)
            return found.unflatten(3, (heads, head_dim)).transpose(2, 3)

        scores = (q.transpose(2, 3) * (heads * head_dim) ** -0.5) @ chosen(k).transpose(3, 4)
        output = scores.softmax(-1) @ chosen(v)
        return cut.join(output.transpose(2, 3))

    return Runner(attend, (inputs.qkv,), (inputs.grad,))


# --- NATTEN, where it is installed ----------------------------------------------------------------------------------


def natten(pattern: Pattern, inputs: Inputs) -> Runner:
    """NATTEN's na2d with its own choice of kernel; ImportError where it is not installed."""
    from natten import na2d

    if not isinstance(pattern, Neighborhood):
        raise ValueError(f"NATTEN has no {pattern}")
    parts = [t.contiguous().requires_grad_() for t in inputs.qkv.detach().unbind(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return na2d(q, k, v, kernel_size=pattern.kernel_size, dilation=pattern.dilation, stride=pattern.stride)

    def gradients(of_leaves: Sequence[Tensor]) -> Named:
        return {OF_QKV: torch.stack(tuple(of_leaves), 3)}

    return Runner(attend, tuple(parts), (inputs.grad,), gradients=gradients)
