"""How many blocks an attention pattern visits, what that wastes, how fast it can be at best; nothing is run or timed.

    python scripts/simulate.py "Neighborhood(13)" --size 128x128 --order tiles
    python scripts/simulate.py "Window(7, shift=3)" --size 56x56 --order halo --query-block 7x7
    python scripts/simulate.py "HilbertWindow(64)" --size 64x64 --order hilbert --query-block 128 --key-block 128
    python scripts/simulate.py "Slide(9)" --size 32x32 --order morton --picture slide.png

Prints a summary and a last line of JSON. Everything is computed from the pattern and a device's rates: floors are what
the device needs for the bytes, products, exponentials and instructions alone, not predictions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from _bench_timing import grid
from _block_counts import block_map
from _blocks import ORDERS, BlockMap, Layout, parse_block
from _floors import DEVICES, DTYPE_BYTES, Call, Device, Floor, Work, backward_work, forward_work
from nearfield.ops.patterns import Pattern, parse_pattern

TERMS = ("memory", "l2", "matrix", "exp", "issue")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was asked for; 0, or 2 for what cannot be simulated."""
    options = _parser().parse_args(argv)
    height, width = options.size
    try:
        pattern = parse_pattern(options.pattern)
        layout = Layout(options.order, options.query_block, options.key_block, options.granule)
        call = Call.of(pattern, options.batch, height, width, options.heads, options.head_dim, options.dtype)
        blocks = block_map(pattern, height, width, layout)
        query = _query(options.query, blocks)
        work = _work(call, blocks)
        device = DEVICES[options.device]
        if options.picture:
            from _pictures import draw  # matplotlib, only for those who want a picture

            draw(options.picture, pattern, height, width, blocks, query)
    except (ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    floors = {direction: part.on(device) for direction, part in work.items()}
    print(_summary(pattern, height, width, call, blocks, work))
    print(f"\nfloors on {device.name}, in us ({device.source})")
    print(_floor_table(floors))
    if options.picture:
        print(f"\npicture: {options.picture}, of the query {query[0]},{query[1]}")
    print(json.dumps(_result(options, pattern, call, blocks, work, floors, device, query)))
    return 0


def _query(given: tuple[int, int] | None, blocks: BlockMap) -> tuple[int, int]:
    """The query to draw: the one asked for, or one near the upper border, where most patterns show what they do."""
    rows, columns = blocks.query_ids.shape
    if given is None:
        return rows // 32, columns * 2 // 5
    if given[0] >= rows or given[1] >= columns:
        raise ValueError(f"query {given[0]},{given[1]} is outside the {rows}x{columns} map of queries: count from 0,0")
    return given


def _work(call: Call, blocks: BlockMap) -> dict[str, Work]:
    """Both directions; one pass makes all gradients only where no key is read by two query blocks."""
    passes = 1 if call.cells and blocks.reread <= 1 else 2
    shares = {"factor": blocks.factor, "reread": blocks.reread}
    return {"forward": forward_work(call, **shares), "backward": backward_work(call, **shares, passes=passes)}


def _summary(pattern: Pattern, height: int, width: int, call: Call, blocks: BlockMap, work: dict[str, Work]) -> str:
    layout = blocks.layout
    shape = f"batch {call.batch}, {call.heads} heads of {call.head_dim}, {call.dtype}"
    head = f"{pattern.spelling()} on {height}x{width}, {shape}\n{layout.describe()}"
    visits = blocks.visits
    lines = [
        ("query blocks", f"{blocks.query_blocks:,}, {layout.rows} rows of scores each"),
        ("key blocks", f"{blocks.key_blocks:,}, {layout.columns} columns of scores each"),
        (
            "visited",
            f"{blocks.visited:,}; by a query block {visits.mean():.2f}, {visits.min()} to {visits.max()}; "
            f"{blocks.fewer:.2f} times fewer than dense",
        ),
        (
            "of all pairs of blocks",
            f"{blocks.empty:.1%} empty, {_partial(blocks):.1%} partial, {_full(blocks):.1%} full; "
            f"{blocks.full / blocks.visited:.1%} of the visited are full",
        ),
        (
            "scores",
            f"{blocks.computed:,} computed, {blocks.useful:,} asked for, an image and head: {blocks.waste:.1%} waste, "
            f"{blocks.factor:.2f} times",
        ),
        ("keys read", f"{blocks.reread:.2f} times each"),
    ]
    lines += [
        (
            direction,
            f"{part.flops / 1e9:.2f} GFLOP, {part.flops / blocks.factor / 1e9:.2f} of them asked for; "
            f"{part.dram_bytes / 1e6:.1f} MB of memory, {part.l2_bytes / 1e6:.1f} MB through the cache",
        )
        for direction, part in work.items()
    ]
    wide = max(len(name) for name, _ in lines)
    body = "\n".join(f"  {name.ljust(wide)}  {text}" for name, text in lines)
    return f"{head}\n{body}"


def _full(blocks: BlockMap) -> float:
    return blocks.full / (blocks.query_blocks * blocks.key_blocks)


def _partial(blocks: BlockMap) -> float:
    return 1.0 - blocks.empty - _full(blocks)


def _floor_table(floors: dict[str, Floor]) -> str:
    lines: list[tuple[str, ...]] = [("", *TERMS, "floor", "bound by")]
    for direction, floor in floors.items():
        terms = (_microseconds(getattr(floor, term)) for term in TERMS)
        lines.append((direction, *terms, _microseconds(floor.seconds), floor.bound))
    return grid(lines)


def _microseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e6:.1f}"


def _result(
    options: argparse.Namespace,
    pattern: Pattern,
    call: Call,
    blocks: BlockMap,
    work: dict[str, Work],
    floors: dict[str, Floor],
    device: Device,
    query: tuple[int, int],
) -> dict[str, Any]:
    layout, visits = blocks.layout, blocks.visits
    return {
        "pattern": pattern.spelling(),
        "size": list(options.size),
        "order": layout.order,
        "query_block": layout.query_block,
        "key_block": layout.key_block,
        "granule": layout.granule,
        "call": asdict(call),
        "query_blocks": blocks.query_blocks,
        "key_blocks": blocks.key_blocks,
        "visited": blocks.visited,
        "full": blocks.full,
        "visits": {"least": int(visits.min()), "mean": float(visits.mean()), "most": int(visits.max())},
        "fewer_than_dense": blocks.fewer,
        "empty_share": blocks.empty,
        "partial_share": _partial(blocks),
        "full_share": _full(blocks),
        "useful": blocks.useful,
        "computed": blocks.computed,
        "waste": blocks.waste,
        "reread": blocks.reread,
        "work": {direction: asdict(part) for direction, part in work.items()},
        "device": {"name": device.name, "source": device.source},
        "floors_s": {
            direction: {**asdict(floor), "seconds": floor.seconds, "bound": floor.bound}
            for direction, floor in floors.items()
        },
        "query": list(query),
        "picture": str(options.picture) if options.picture else None,
    }


def _pair(text: str, sign: str, example: str, least: int) -> tuple[int, int]:
    found = re.fullmatch(rf"(\d+){sign}(\d+)", text)
    if found is None or min(int(part) for part in found.groups()) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be two whole numbers, at least {least}, like {example}")
    return int(found[1]), int(found[2])


def _size(text: str) -> tuple[int, int]:
    return _pair(text, "x", "128x128", 1)


def _place(text: str) -> tuple[int, int]:
    return _pair(text, ",", "3,21", 0)


def _block_option(text: str) -> int | tuple[int, int]:
    try:
        return parse_block(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


class _OneLineParser(argparse.ArgumentParser):
    """Errors without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"simulate: {message}\n")


def _parser() -> argparse.ArgumentParser:
    orders = "\n".join(f"  {name.ljust(8)} {text}" for name, text in ORDERS.items())
    parser = _OneLineParser(
        description=f"{__doc__}\norders:\n{orders}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("pattern", help='as in code: "Neighborhood(7, dilation=2)"')
    parser.add_argument("--size", type=_size, default=(56, 56), metavar="HxW", help="map of keys (default 56x56)")
    parser.add_argument(
        "--order", choices=ORDERS, default="tiles", help="how tokens are cut into blocks (default tiles)"
    )
    parser.add_argument(
        "--query-block", type=_block_option, default=64, metavar="N|HxW", help="tokens or tile of queries (default 64)"
    )
    parser.add_argument(
        "--key-block", type=_block_option, default=64, metavar="N|HxW", help="tokens or tile of keys (default 64)"
    )
    parser.add_argument(
        "--granule", type=_positive, default=16, metavar="N",
        help="blocks are computed as multiples of N rows and columns (default 16, as matrix units do; 1: as they are)",
    )  # fmt: skip
    parser.add_argument("--batch", type=_positive, default=8, help="images (default 8)")
    parser.add_argument("--heads", type=_positive, default=4, help="heads (default 4)")
    parser.add_argument("--head-dim", type=_positive, default=32, help="channels of a head (default 32)")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bf16", help="of q, k, v and o (default bf16)")
    parser.add_argument("--device", choices=DEVICES, default="h200", help="for the floors (default h200)")
    parser.add_argument(
        "--picture", type=_picture, metavar="FILE.png", help="draw what a query sees, and the block map"
    )
    parser.add_argument("--query", type=_place, metavar="Y,X", help="the query to draw (default one near the border)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
