"""Two drawings side by side: which keys a query sees and its block computes, and which blocks visit which."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _block_counts import seen_keys
from _blocks import BlockMap
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from nearfield.ops.patterns import Pattern

SEEN, SHARED, WASTED, UNREAD = "#1b5e9e", "#a9cdea", "#f6b26b", "#f4f4f2"
FULL, LEAST, MOST, EMPTY = "#1b5e9e", "#fbe2c2", "#d8731a", "#f4f4f2"  # a partial block is between least and most
INK, FAINT = "#222222", "#c9c9c4"
MARK: dict[str, Any] = {"color": "#ffd21f", "markeredgecolor": INK}
MARGINS = {"left": 0.05, "right": 0.985, "top": 0.86, "bottom": 0.205, "wspace": 0.12}
WIDEST = 440  # blocks along a side of the block map; more are drawn in groups
FOCUS_ABOVE, FOCUS_LEAST = 64, 40  # tokens: larger maps are cut to what is read, at least so much of them


def draw(path: Path, pattern: Pattern, height: int, width: int, blocks: BlockMap, query: tuple[int, int]) -> None:
    """Write the picture, 1200 pixels wide for a PNG.

    Args:
        path: of the image; its suffix says the format.
        pattern, height, width: the pattern and its key map.
        blocks: the block map of them.
        query: (y, x) on the map of queries.
    """
    figure = Figure(figsize=(12, 6.9), dpi=100)
    FigureCanvasAgg(figure)
    cut = blocks.layout.describe()
    figure.suptitle(f"{pattern.spelling()} on {height}x{width}\n{cut}", fontsize=12.5, color=INK)
    left, right = figure.subplots(1, 2, gridspec_kw=MARGINS)
    _draw_keys(left, pattern, height, width, blocks, query)
    _draw_blocks(right, blocks, query)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part)
    os.replace(part, path)


def _draw_keys(axes: Axes, pattern: Pattern, height: int, width: int, blocks: BlockMap, query: tuple[int, int]) -> None:
    number = blocks.query_ids[query]
    members = blocks.query_ids == number
    alone = np.zeros_like(members)
    alone[query] = True
    seen, (top, left) = seen_keys(pattern, height, width, alone)
    shared, _ = seen_keys(pattern, height, width, members)
    visited = blocks.key[blocks.query == number]
    rows, columns = seen.shape
    kind = np.zeros((rows, columns), dtype=np.uint8)
    if blocks.key_ids is not None:
        kind[np.isin(blocks.key_ids, visited)] = 1
    kind[shared > 0] = 2
    kind[seen > 0] = 3
    none, wasted, others, own = np.bincount(kind.ravel(), minlength=4).tolist()
    padding = len(visited) * blocks.layout.columns - wasted - others - own

    box = (left - 0.5, left + columns - 0.5, top + rows - 0.5, top - 0.5)
    colors = ListedColormap((UNREAD, WASTED, SHARED, SEEN))
    axes.imshow(kind, cmap=colors, vmin=0, vmax=3, extent=box, interpolation="nearest")
    borders = _edges(blocks.query_ids, 0, 0) if blocks.key_ids is None else _edges(blocks.key_ids, top, left)
    if len(borders) < kind.size and pattern.query_stride() == (1, 1):  # scattered tokens would be all borders
        axes.add_collection(LineCollection(list(borders), colors=FAINT, linewidths=0.5))
    if (rows, columns) != (height, width):
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=INK, linestyle=":", linewidth=1.2))
    stride = pattern.query_stride()
    outline = _edges(np.pad(members, 1), -1, -1)
    for side, step in enumerate(reversed(stride)):  # a query of a smaller map stands for step tokens
        outline[:, :, side] = outline[:, :, side] * step + (step - 1) / 2
    axes.add_collection(LineCollection(list(outline), colors=INK, linewidths=1.4))
    axes.plot(query[1] * stride[1], query[0] * stride[0], marker="*", markersize=13, linestyle="", **MARK)
    part = _focus(axes, kind > 0, top, left)

    axes.set_title(f"keys of the query at y={query[0]}, x={query[1]}, and of its block", fontsize=11.5, color=INK)
    axes.set_xlabel(f"x{part}")
    axes.set_ylabel(f"y{part}")
    waste = f"computed for nobody ({wasted:,}" + (f" + {padding:,} of padding)" if padding else ")")
    names = (
        (SEEN, f"seen by the query ({own:,})"),
        (SHARED, f"by others of its block ({others:,})"),
        (WASTED, waste),
        (UNREAD, f"not read ({none:,})"),
    )
    star = Line2D([], [], linestyle="", marker="*", markersize=12, label="the query", **MARK)
    _finish(axes, names, [star, Line2D([], [], color=INK, linewidth=1.4, label="its block of queries")])


def _edges(ids: np.ndarray, top: float, left: float) -> np.ndarray:
    """(segments, 2, 2) of (x, y): sides between neighbours of different ids; the first token lies at (left, top)."""
    y, x = np.nonzero(ids[:, 1:] != ids[:, :-1])
    upright = np.stack([np.stack([x + 0.5, y - 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], 1)
    y, x = np.nonzero(ids[1:] != ids[:-1])
    level = np.stack([np.stack([x - 0.5, y + 0.5], 1), np.stack([x + 0.5, y + 0.5], 1)], 1)
    return np.concatenate([upright, level]) + np.array([left, top])


def _focus(axes: Axes, read: np.ndarray, top: int, left: int) -> str:
    """On large maps, show the keys that are read and some around them, and say so; all where they are spread out."""
    y, x = np.nonzero(read)
    side = max(FOCUS_LEAST, round(1.5 * max(np.ptp(y), np.ptp(x))))
    if max(read.shape) <= FOCUS_ABOVE or side > 0.7 * max(read.shape):
        return ""

    def limits(places: np.ndarray, size: int, first: int) -> tuple[float, float]:
        begin = int(np.clip((places.min() + places.max() - side) // 2, 0, max(size - side, 0)))
        return first + begin - 0.5, first + min(begin + side, size) - 0.5

    axes.set_xlim(*limits(x, read.shape[1], left))
    axes.set_ylim(*reversed(limits(y, read.shape[0], top)))
    return " (part of the map)"


def _draw_blocks(axes: Axes, blocks: BlockMap, query: tuple[int, int]) -> None:
    shares = blocks.shares()
    rows, columns = shares.shape
    high, wide = -(-rows // WIDEST), -(-columns // WIDEST)
    shares = np.pad(shares, ((0, -rows % high), (0, -columns % wide)))
    shares = shares.reshape(len(shares) // high, high, -1, wide).max((1, 3))
    least, most, full, empty = (np.array(to_rgb(color)) for color in (LEAST, MOST, FULL, EMPTY))
    image = least + shares[:, :, None] * (most - least)
    image[shares == 0] = empty
    image[shares == 1] = full
    box = (-0.5, image.shape[1] * wide - 0.5, image.shape[0] * high - 0.5, -0.5)
    axes.imshow(image, extent=box, interpolation="nearest", aspect="auto")
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_box_aspect(1)
    beside = axes.get_yaxis_transform()
    number = int(blocks.query_ids[query])
    axes.plot(-0.016, number, marker=">", markersize=9, linestyle="", clip_on=False, transform=beside, **MARK)

    own = blocks.key_ids is None
    grouped = f" ({high}x{wide} to a dot)" if high * wide > 1 else ""
    head = f"chunks of each block{grouped}" if own else f"block map{grouped}: {blocks.empty:.1%} empty"
    axes.set_title(f"{head}, {blocks.waste:.1%} waste", fontsize=11.5, color=INK)
    axes.set_xlabel("chunk of the block's own keys" if own else "block of keys")
    axes.set_ylabel("block of queries")
    axes.tick_params(axis="y", pad=9)
    nothing = blocks.query_blocks * blocks.key_blocks - blocks.visited
    names = (
        (FULL, f"full, no mask ({blocks.full:,})"),
        (_blend(LEAST, MOST), f"partial, darker: less waste ({blocks.visited - blocks.full:,})"),
        (EMPTY, "no chunk" if own else f"empty ({nothing:,})"),
    )
    marker = Line2D([], [], linestyle="", marker=">", markersize=8, label="the block on the left", **MARK)
    _finish(axes, names, [marker])


def _blend(first: str, second: str) -> tuple[float, ...]:
    return tuple(((np.array(to_rgb(first)) + to_rgb(second)) / 2).tolist())


def _finish(axes: Axes, names: Sequence[tuple[Any, str]], marks: Sequence[Line2D]) -> None:
    """Whole numbers on both sides and the legend below."""
    axes.set_anchor("N")
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.tick_params(colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    patches = [Patch(facecolor=color, edgecolor=FAINT, label=label) for color, label in names]
    handles: list[Artist] = [*patches, *marks]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9.5)
