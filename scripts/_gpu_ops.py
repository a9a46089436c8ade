"""The operator section of the GPU report: which operators, on which shapes, against which peers, with which targets.

Claims are those of the kernel study; the targets are the speeds that its issue asks for on an H200. Cases come in the
order of their importance: those at the end fall first when time is short.
"""

from __future__ import annotations

import torch
from _gpu_compare import Case, Contender
from _gpu_floors import BACKWARD, BOTH, FORWARD
from _gpu_micro import batch_task, ceilings_task, host_task, repeats_task
from _gpu_peers import (
    along_curve,
    dense,
    flex,
    flex_with_reorder,
    gathered_routing,
    natten,
    raster,
    tiled,
    timm_windows,
)
from _gpu_problems import Attention, Inputs, Local, Routed, Runner, Shape
from _gpu_tasks import Context, Task
from nearfield.ops import (
    Grid,
    Halo,
    HilbertNeighborhood,
    HilbertSlide,
    HilbertWindow,
    Neighborhood,
    Slide,
    Window,
)
from nearfield.ops.patterns import Pattern

COMPILE_S = 15.0  # what the first call of one compiled peer may take
FLEX, FLEX_BIAS, FLEX_REORDER = "FlexAttention", "FlexAttention with its bias gradient", "FlexAttention with reorder"
TIMM, TIMM_COMPILED = "timm", "compiled timm"
GATHER = "gather of the top-k regions"
NO_BIAS = "nearfield without bias"
TRAINING = (FORWARD, BOTH)


# --- peers ----------------------------------------------------------------------------------------------------------


def _flex(
    pattern: Pattern,
    block: int,
    tile: tuple[int, int] | None = None,
    *,
    group: str = FLEX,
    passes: tuple[str, ...] = TRAINING,
) -> Contender:
    """FlexAttention in raster order, tile by tile, or along the curve of the pattern.

    Those that lose the forward by far take no part in the backward: compiling them takes the time of other rows.
    """

    def make(inputs: Inputs, context: Context) -> Runner:
        height, width = inputs.qkv.shape[1:3]
        if pattern.curve is not None:
            order = along_curve(height, width, inputs.qkv.device)
        else:
            order = tiled(height, width, tile, inputs.qkv.device) if tile else raster(width)
        return flex(pattern, inputs, order, block, really=not context.dry)

    where = "curve order" if pattern.curve is not None else f"{tile[0]}x{tile[1]} tiles" if tile else "raster order"
    return Contender(f"{group}, {where}, blocks of {block}", make, group, first_s=COMPILE_S, passes=passes)


def _flex_reordered(pattern: Pattern) -> Contender:
    def make(inputs: Inputs, context: Context) -> Runner:
        return flex_with_reorder(pattern, inputs, 128, really=not context.dry)

    return Contender(f"{FLEX_REORDER}, blocks of 128", make, FLEX_REORDER, first_s=COMPILE_S)


def _dense(pattern: Pattern) -> tuple[Contender, ...]:
    return (
        Contender("dense attention (SDPA) with a mask", lambda inputs, _: dense(pattern, inputs)),
        Contender("full attention (SDPA)", lambda inputs, _: dense(None, inputs)),
    )


def _natten(pattern: Pattern) -> Contender:
    return Contender("NATTEN", lambda inputs, _: natten(pattern, inputs))


def _timm(shift: int, *, compiled: bool, fused: bool = False, own_order: bool = True) -> Contender:
    """timm's WindowAttention; those in its own order compete for the target."""

    def make(inputs: Inputs, context: Context) -> Runner:
        really = not context.dry if compiled else None
        return timm_windows(inputs, shift, fused=fused, own_order=own_order, really=really)

    group = TIMM_COMPILED if compiled else TIMM
    name = f"{group}, {'SDPA' if fused else 'matmul and softmax'}"
    if own_order:
        return Contender(name, make, group, first_s=COMPILE_S if compiled else 2.0)
    return Contender(f"{name}, from our layout", make)


def _without_bias(pattern: Pattern) -> Contender:
    def make(inputs: Inputs, context: Context) -> Runner:
        plain = Local(pattern)
        return Runner(
            lambda qkv: plain(context.backend, qkv), (inputs.qkv,), (inputs.grad,), same=False, note="another function"
        )

    return Contender(NO_BIAS, make, bound="most")


# --- cases ----------------------------------------------------------------------------------------------------------


def _windows(shift: int, *, compiled: bool) -> Case:
    peers = [_timm(shift, compiled=False), _timm(shift, compiled=False, fused=True)]
    if compiled:
        peers.append(_timm(shift, compiled=True))
    peers.append(_timm(shift, compiled=False, own_order=False))
    ratios = {(TIMM, what): 4.0 for what in TRAINING}
    if compiled:
        ratios |= {(TIMM_COMPILED, what): 2.0 for what in TRAINING}
    return Case(
        "window-shifted" if shift else "window",
        "1",
        f"window 7{', shifted' if shift else ''}, bias",
        Local(Window(7, shift), "table"),
        Shape(128, 56, 56, 3, 32),
        28,
        tuple(peers),
        most_us={FORWARD: 95.0, BACKWARD: 165.0},
        ratios=ratios,
        least_fraction=0.75,
    )


def _window_stage(size: int, heads: int) -> Case:
    shape = Shape(128, size, size, heads, 32)
    name, attention = "window 7, bias", Local(Window(7), "table")
    return Case(f"window-{size}", "1", name, attention, shape, min(size, 14), (_timm(0, compiled=False),))


def _neighborhood() -> Case:
    pattern = Neighborhood(7)
    flexes = (_flex(pattern, 64, (8, 8)), _flex(pattern, 64), _flex(pattern, 128, passes=(FORWARD,)))
    return Case(
        "na7",
        "2",
        "neighborhood 7x7",
        Local(pattern),
        Shape(64, 56, 56, 3, 32),
        24,
        (*flexes, _natten(pattern), *_dense(pattern)),
        most_us={FORWARD: 80.0, BOTH: 280.0},
        ratios={(FLEX, what): 2.0 for what in TRAINING},
    )


def _neighborhood_bias() -> Case:
    pattern = Neighborhood(7)
    return Case(
        "na7-bias",
        "2, 3",
        "neighborhood 7x7, bias",
        Local(pattern, "table"),
        Shape(64, 56, 56, 3, 32),
        24,
        (_without_bias(pattern), _flex(pattern, 64, (8, 8), group=FLEX_BIAS)),
        ratios={**{(NO_BIAS, what): 1.15 for what in TRAINING}, (FLEX_BIAS, BOTH): 5.0},
    )


def _neighborhood_stage(size: int, heads: int, dilation: int = 1) -> Case:
    name = "neighborhood 7x7" + (f", dilation {dilation}" if dilation > 1 else "") + ", bias"
    attention = Local(Neighborhood(7, dilation), "table")
    key = f"na7-{size}" + (f"-dilated-{dilation}" if dilation > 1 else "")
    return Case(key, "2", name, attention, Shape(64, size, size, heads, 32), max(14, 7 * dilation))


def _large(kernel_size: int, head_dim: int) -> Case:
    """A 128x128 map; peers in tiles as large as their blocks, which at head_dim 64 have to be of 128."""
    pattern = Neighborhood(kernel_size)
    tiles = _flex(pattern, 64, (8, 8)) if head_dim < 64 else _flex(pattern, 128, (16, 8))
    peers = [tiles, _flex(pattern, 128, passes=(FORWARD,)), _natten(pattern)]
    return Case(
        f"na{kernel_size}-128-d{head_dim}",
        "5",
        f"neighborhood {kernel_size}x{kernel_size}",
        Local(pattern),
        Shape(8, 128, 128, 128 // head_dim, head_dim),
        32 if kernel_size < 16 else 48,
        (*peers, *_dense(pattern)[1:]),
        passes=TRAINING,
        ratios={(FLEX, what): 1.0 for what in TRAINING},
    )


def _curve(key: str, name: str, pattern: Pattern, size: int, small: int, *, target: bool = False) -> Case:
    """At the sizes of the Hilbert paper's notebook: fp16, 16 images, 2 heads of 64."""
    groups = (FLEX, FLEX_REORDER) if target else ()
    return Case(
        key,
        "7",
        name,
        Local(pattern),
        Shape(16, size, size, 2, 64, torch.float16),
        small,
        (_flex(pattern, 128), _flex_reordered(pattern)),
        passes=TRAINING,
        ratios={(group, what): 2.0 for group in groups for what in TRAINING},
    )


def _slide() -> Case:
    pattern = Slide(7)
    return Case(
        "slide",
        "7",
        "slide 7x7",
        Local(pattern),
        Shape(64, 56, 56, 3, 32),
        24,
        (_flex(pattern, 64, (8, 8)), _flex(pattern, 128, passes=(FORWARD,))),
        passes=TRAINING,
        ratios={(FLEX, what): 2.0 for what in TRAINING},
    )


def _hilbert_bias() -> Case:
    pattern = HilbertWindow(49)
    return Case(
        "hilbert-window-bias",
        "7",
        "Hilbert window of 49, 2-D bias",
        Local(pattern, "positions"),
        Shape(64, 56, 56, 3, 32),
        14,
        (_without_bias(pattern),),
    )


def _routing(stage: int, size: int, heads: int, topk: int) -> Case:
    """Stages of BiFormer-T: 7x7 regions, 64 keys a query."""

    def make(inputs: Inputs, _: Context) -> Runner:
        return gathered_routing(inputs, 7, topk)

    return Case(
        f"routing-{stage}",
        "8",
        f"bi-level routing, top {topk} of 7x7 regions",
        Routed(7, topk),
        Shape(128, size, size, heads, 32),
        size,  # the tokens of a region decide what is run
        (Contender(f"{GATHER}, eager", make, GATHER),),
        passes=TRAINING,
        ratios={(GATHER, what): 4.0 for what in TRAINING},
        memory=1.2,
    )


def _other(key: str, name: str, attention: Local, shape: Shape, small: int) -> Case:
    """Ours alone."""
    return Case(key, "", name, attention, shape, small)


def cases() -> list[Case]:
    """All comparisons, the most important first."""
    window, na7 = Local(Window(7, 3), "table"), Local(Neighborhood(7), "table")
    return [
        _windows(3, compiled=True),
        _neighborhood(),
        _neighborhood_bias(),
        *(
            _routing(stage, size, heads, topk)
            for stage, size, heads, topk in ((1, 56, 2, 1), (2, 28, 4, 4), (3, 14, 8, 16))
        ),
        _large(13, 32),
        _large(21, 32),
        _large(13, 64),
        _large(21, 64),
        _curve("hilbert-window-64", "Hilbert window of 64", HilbertWindow(64), 64, 16, target=True),
        _slide(),
        _curve("hilbert-window-256", "Hilbert window of 256", HilbertWindow(256), 128, 32, target=True),
        _hilbert_bias(),
        _windows(0, compiled=True),
        *(_neighborhood_stage(size, heads) for size, heads in ((28, 6), (14, 12))),
        _neighborhood_stage(56, 3, dilation=8),
        *(_window_stage(size, heads) for size, heads in ((28, 6), (14, 12), (7, 24))),
        _other("grid", "grid 7, bias", Local(Grid(7), "table"), Shape(64, 56, 56, 3, 32), 28),
        _other("halo", "halo 8 + 3, decomposed bias", Local(Halo(8, 3), "decomposed"), Shape(64, 64, 64, 4, 16), 24),
        _curve("hilbert-slide", "Hilbert slide of 121", HilbertSlide(121), 96, 24),
        _curve("hilbert-neighborhood", "Hilbert neighborhood of 289", HilbertNeighborhood(289), 96, 24),
        *(
            _other(f"{key}-{name}", f"{title}, bias", attention, Shape(64, 56, 56, 3, 32, dtype), 28)
            for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32"))
            for key, title, attention in (("window", "window 7, shifted", window), ("na7", "neighborhood 7x7", na7))
        ),
    ]


def tasks() -> list[Task]:
    """All tasks of the section, the most important first; what the others are read against comes before them."""
    made = [case.task() for case in cases()]
    small: dict[str, Attention] = {
        "window 7, shifted, bias": Local(Window(7, 3), "table"),
        "neighborhood 7x7, bias": Local(Neighborhood(7), "table"),
        "neighborhood 7x7": Local(Neighborhood(7)),
        "Hilbert window of 49": Local(HilbertWindow(49)),
        "halo 8 + 3, decomposed bias": Local(Halo(8, 3), "decomposed"),
        "bi-level routing, top 4 of 7x7 regions": Routed(7, 4),
    }
    return [
        ceilings_task(),
        *made[:3],
        host_task(small, 28),
        repeats_task({**small, "neighborhood 7x7, dilation 2, bias": Local(Neighborhood(7, 2), "table")}, 28),
        *made[3:],
        batch_task("neighborhood 7x7, bias", Local(Neighborhood(7), "table"), Shape(64, 56, 56, 3, 32)),
        batch_task("neighborhood 7x7", Local(Neighborhood(7)), Shape(64, 56, 56, 3, 32)),
    ]
