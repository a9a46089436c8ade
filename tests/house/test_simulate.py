"""scripts/simulate.py: counts against a dense mask, published figures and tables, floors, pictures, the command."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nearfield.ops import (
    Axes,
    Full,
    Grid,
    Halo,
    HilbertNeighborhood,
    HilbertSlide,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Slide,
    Window,
)
from nearfield.ops.curves import curve_order
from nearfield.ops.patterns import Axis, resolve
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ORDERS = ("raster", "hilbert", "morton", "tiles", "halo")
HEIGHT, WIDTH = 9, 11
PATTERNS = [
    Neighborhood(5),
    Neighborhood((3, 4), dilation=(3, 2)),
    Neighborhood(5, stride=3),
    Window(4, shift=1),
    Window((11, 7)),
    Grid(3),
    Halo(4, 1),
    Halo(4, (1, 2), "clip", stride=2),
    Slide((5, 3)),
    Full(),
    Axes(Halo(4, 2), Window(5)),
    HilbertWindow(9, shift=4),
    HilbertNeighborhood(12),
    HilbertSlide(7),
]
BLOCKS = [((4, 4), (2, 4), 1), ((3, 2), 12, 16)]


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules behind the command; scripts find one another in their own folder."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("blocks", "block_counts", "floors", "pictures")
        loaded = {name: importlib.import_module(f"_{name}") for name in names}
        yield SimpleNamespace(**loaded, simulate=importlib.import_module("simulate"))
    finally:
        sys.path.remove(str(SCRIPTS))


# --- counting by a dense mask, from the definitions -------------------------------------------------------------------

Token = tuple[int, int]


def sees(axis: Axis, i: int, j: int) -> bool:
    return bool(axis.start[i] <= j < axis.stop[i] and (j - axis.start[i]) % axis.step == 0)


def keys_of_axis(axis: Axis) -> range:
    return range(min(0, int(axis.start.min())), max(axis.keys, int(axis.stop.max())))


def tiles_of_axis(axis: Axis, size: int, *, in_cells: bool) -> list[Hashable]:
    """A label for each query of an axis, the same for those of one tile."""
    labels: list[Hashable] = []
    cell: dict[int, list[int]] = defaultdict(list)  # of each residue class, the queries since its last new cell
    keys = [{j for j in keys_of_axis(axis) if sees(axis, i, j)} for i in range(axis.queries)]
    for i in range(axis.queries):
        members = cell[int(axis.start[i] % axis.step)]
        if in_cells and members and not any(keys[i] & keys[e] for e in members):
            members.clear()
        members.append(i)
        labels.append((int(axis.start[i] % axis.step), members[0], (len(members) - 1) // size))
    return labels


class Dense:
    """Every pair that a pattern asks for, and the blocks of all tokens, made one by one."""

    def __init__(self, pattern: Pattern, order: str, query_tile: Token, key_tile: Token, key_tokens: int) -> None:
        resolved = resolve(pattern, HEIGHT, WIDTH)
        y, x = resolved.y, resolved.x
        queries = list(product(range(y.queries), range(x.queries)))
        keys = list(product(keys_of_axis(y), keys_of_axis(x)))
        self.pairs = {(q, k) for q in queries for k in keys if sees(y, q[0], k[0]) and sees(x, q[1], k[1])}
        self.token: dict[Token, Token] = {q: q for q in queries}  # of the map, by coordinates of the pattern
        if pattern.curve is not None:
            places = curve_order(pattern.curve, HEIGHT, WIDTH)
            self.token = {q: divmod(int(places[q[0]]), WIDTH) for q in queries}
        self.keys = [k for k in keys if 0 <= k[0] < y.keys and 0 <= k[1] < x.keys]
        self.query_block: dict[Token, Hashable]
        self.key_block: dict[Token, Hashable] | None = None
        tokens = query_tile[0] * query_tile[1]
        if order == "halo":
            sides = query_tile if pattern.curve is None else (tokens, 1)
            rows, columns = (tiles_of_axis(a, s, in_cells=True) for a, s in zip((y, x), sides, strict=True))
            self.query_block = {q: (rows[q[0]], columns[q[1]]) for q in queries}
        elif order == "tiles" and pattern.curve is None:
            rows, columns = (tiles_of_axis(a, s, in_cells=False) for a, s in zip((y, x), query_tile, strict=True))
            self.query_block = {q: (rows[q[0]], columns[q[1]]) for q in queries}
            self.key_block = {
                k: tuple((c % a.step, c // a.step // s) for c, a, s in zip(k, (y, x), key_tile, strict=True))
                for k in keys
            }
        elif order == "tiles":
            self.query_block = {q: (t[0] // query_tile[0], t[1] // query_tile[1]) for q, t in self.token.items()}
            self.key_block = {k: (t[0] // key_tile[0], t[1] // key_tile[1]) for k, t in self.token.items()}
        else:
            self.query_block = self._consecutive(order, queries, tokens)
            self.key_block = self._consecutive(order, keys, key_tokens)
        self.visits = self._visits(key_tokens)

    def _consecutive(self, order: str, coordinates: list[Token], tokens: int) -> dict[Token, Hashable]:
        places = {self.token.get(c, c): c for c in coordinates}
        ys, xs = ({p[side] for p in places} for side in (0, 1))
        walk = [divmod(int(p), len(xs)) for p in curve_order(order, len(ys), len(xs))]
        corner = min(ys), min(xs)
        return {places[corner[0] + r, corner[1] + c]: n // tokens for n, (r, c) in enumerate(walk)}

    def _visits(self, chunk: int) -> dict[tuple[Hashable, Hashable], int]:
        """Pairs of each visit; the key blocks of `halo` are numbered within their own rectangle."""
        key_block = self.key_block
        if key_block is not None:
            return Counter((self.query_block[q], key_block[k]) for q, k in self.pairs)
        own: dict[Hashable, set[Token]] = defaultdict(set)
        for q, k in self.pairs:
            own[self.query_block[q]].add(k)
        place = {(b, k): n for b, keys in own.items() for n, k in enumerate(sorted(keys))}
        self.read = sum(len(keys & set(self.keys)) for keys in own.values())
        return Counter((self.query_block[q], place[self.query_block[q], k] // chunk) for q, k in self.pairs)

    def reread(self) -> float:
        if self.key_block is None:
            return self.read / len(self.keys)
        tokens = Counter(self.key_block[k] for k in self.keys)
        return sum(tokens[key] for _, key in self.visits) / len(self.keys)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_are_those_of_a_dense_mask(scripts: SimpleNamespace, pattern: Pattern, order: str) -> None:
    for query_block, key_block, granule in BLOCKS:
        layout = scripts.blocks.Layout(order, query_block, key_block, granule)
        got = scripts.block_counts.block_map(pattern, HEIGHT, WIDTH, layout)
        key_tile = scripts.blocks.tile_of(key_block)
        dense = Dense(pattern, order, query_block, key_tile, key_tile[0] * key_tile[1])
        rows, columns = (-(-n[0] * n[1] // granule) * granule for n in (query_block, key_tile))
        assert (layout.rows, layout.columns) == (rows, columns)
        assert got.query_blocks == len(set(dense.query_block.values()))
        assert got.useful == len(dense.pairs) == got.pairs.sum()
        assert sorted(got.pairs.tolist()) == sorted(dense.visits.values())
        of_blocks = Counter(block for block, _ in dense.visits)
        assert sorted(got.visits.tolist()) == sorted(of_blocks.values())
        assert got.full == sum(n == rows * columns for n in dense.visits.values())
        assert got.computed == len(dense.visits) * rows * columns
        assert got.waste == pytest.approx(1 - len(dense.pairs) / got.computed)
        assert got.reread == pytest.approx(dense.reread())
        if dense.key_block is not None:
            assert got.key_blocks == len(set(dense.key_block.values()))
            assert got.empty == pytest.approx(1 - len(dense.visits) / (got.query_blocks * got.key_blocks))
        # The block of each query, on the map: equal numbers exactly where the tokens share a block.
        numbers = {(int(got.query_ids[dense.token[q]]), block) for q, block in dense.query_block.items()}
        assert len(numbers) == got.query_blocks == got.query_ids.max() + 1
        shares = got.shares()
        assert (shares > 0).sum() == got.visited
        assert shares.sum() * rows * columns == pytest.approx(got.useful)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_seen_keys_are_those_of_the_pattern(scripts: SimpleNamespace, pattern: Pattern) -> None:
    dense = Dense(pattern, "raster", (4, 4), (4, 4), 16)
    chosen = list(dense.token)[:: max(1, len(dense.token) // 5)]
    rows, columns = (max(t[side] for t in dense.token.values()) + 1 for side in (0, 1))
    queries = np.zeros((rows, columns), dtype=bool)
    for q in chosen:
        queries[dense.token[q]] = True
    seen, (top, left) = scripts.block_counts.seen_keys(pattern, HEIGHT, WIDTH, queries)
    expected = Counter(dense.token[k] if pattern.curve else k for q, k in dense.pairs if q in chosen)
    found = {(top + y, left + x): int(seen[y, x]) for y, x in np.argwhere(seen).tolist()}
    assert found == expected


# --- published figures and the kernel study's table -------------------------------------------------------------------


def test_flux_4k_bounds_of_the_gna_paper(scripts: SimpleNamespace) -> None:
    """256x256 tokens, window 80x80: 6.1 times for stride 1, 10.24 for stride 16, all of whose tiles are full."""
    layout = scripts.blocks.Layout("tiles", (16, 16), (16, 8))
    plain = scripts.block_counts.block_map(Neighborhood(80), 256, 256, layout)
    assert plain.key_blocks == 512
    assert plain.visits.max() == 84, "tiles of an interior query tile"
    assert plain.key_blocks / plain.visits.max() == pytest.approx(6.1, abs=0.05)
    strided = scripts.block_counts.block_map(Neighborhood(80, stride=16), 256, 256, layout)
    assert strided.fewer == pytest.approx(10.24)
    assert strided.full == strided.visited
    assert strided.waste == 0


def test_empty_blocks_of_the_hilbert_paper(scripts: SimpleNamespace) -> None:
    """64x64 tokens, window 8, blocks of 128: 87.5 % of the blocks are empty in raster order, 96.9 % on the curve."""

    def empty(pattern: Pattern, order: str) -> float:
        return scripts.block_counts.block_map(pattern, 64, 64, scripts.blocks.Layout(order, 128, 128)).empty

    assert empty(Window(8), "raster") == pytest.approx(0.875)
    assert empty(HilbertWindow(64), "hilbert") == pytest.approx(0.969, abs=0.0005)


# Waste in percent for raster, hilbert, tiles, halo, with key blocks of as many tokens as the query tile.
WASTE = [
    (56, 7, (4, 4), (81, 73, 63, 53)),
    (56, 7, (8, 8), (89, 89, 90, 78)),
    (28, 7, (4, 8), (79, 79, 80, 66)),
    (14, 7, (8, 16), (85, 85, 85, 81)),
    (7, 7, (8, 8), (41, 41, 41, 41)),
    (128, 13, (8, 8), (90, 68, 68, 60)),
    (128, 21, (8, 16), (84, 75, 73, 53)),
    (256, 7, (16, 16), (97, 98, 98, 90)),
    (256, 31, (8, 16), (88, 51, 46, 43)),
]


@pytest.mark.parametrize(("size", "kernel", "tile", "percent"), WASTE)
def test_waste_table(
    scripts: SimpleNamespace, size: int, kernel: int, tile: Token, percent: tuple[int, int, int, int]
) -> None:
    for order, expected in zip(("raster", "hilbert", "tiles", "halo"), percent, strict=True):
        layout = scripts.blocks.Layout(order, tile, tile)
        waste = scripts.block_counts.block_map(Neighborhood(kernel), size, size, layout).waste
        assert 100 * waste == pytest.approx(expected, abs=0.55), order  # some were rounded from one decimal


def test_large_maps_take_no_dense_mask(scripts: SimpleNamespace) -> None:
    """A mask of 256x256 tokens has 4 G entries; any order is counted in a fraction of a second."""
    begin = time.process_time()
    for order in ORDERS:
        blocks = scripts.block_counts.block_map(Neighborhood(13), 256, 256, scripts.blocks.Layout(order))
        assert blocks.useful == 256 * 256 * 169
    assert time.process_time() - begin < 5


# --- floors -----------------------------------------------------------------------------------------------------------

# Pattern, (batch, side, heads), query tile and chunk, key rereads of an interior tile; then forward and backward in us:
# memory, cache, matrix, exp, issue. H200, bf16, head_dim 32.
FLOORS = [
    (Window(7), (64, 56, 3), (7, 7), 64, 1, (36, 28, 8, 14, 17), (63, 49, 20, 14, 34)),
    (Neighborhood(7), (64, 56, 3), (8, 8), 32, 196 / 64, (36, 57, 19, 31, 39), (108, 142, 65, 62, 108)),
    (Neighborhood(7), (64, 28, 6), (8, 8), 32, 196 / 64, (18, 28, 10, 16, 20), (54, 71, 34, 32, 56)),
    (Neighborhood(7), (8, 128, 4), (8, 8), 32, 196 / 64, (31, 50, 18, 29, 37), (94, 124, 62, 59, 103)),
    (Neighborhood(13), (8, 128, 4), (8, 8), 32, 400 / 64, (31, 88, 33, 54, 68), (94, 201, 114, 109, 191)),
    (Neighborhood(21), (8, 128, 4), (8, 16), 64, 28 * 36 / 128, (31, 108, 78, 130, 162), (94, 241, 272, 259, 453)),
]


@pytest.mark.parametrize(("pattern", "shape", "tile", "chunk", "reread", "forward", "backward"), FLOORS)
def test_floors_of_the_kernel_study(
    scripts: SimpleNamespace,
    pattern: Pattern,
    shape: tuple[int, int, int],
    tile: Token,
    chunk: int,
    reread: float,
    forward: tuple[int, ...],
    backward: tuple[int, ...],
) -> None:
    batch, side, heads = shape
    blocks = scripts.block_counts.block_map(pattern, side, side, scripts.blocks.Layout("halo", tile, chunk))
    call = scripts.floors.Call.of(pattern, batch, side, side, heads, 32)
    device = scripts.floors.DEVICES["h200"]
    for make, expected in ((scripts.floors.forward_floor, forward), (scripts.floors.backward_floor, backward)):
        floor = make(call, device, factor=blocks.factor, reread=reread)
        terms = (floor.memory, floor.l2, floor.matrix, floor.exp, floor.issue)
        # The table is rounded to a microsecond, leaves the logarithms of the sums out, and rounds its factors.
        assert [1e6 * t for t in terms] == pytest.approx(list(expected), abs=0.8, rel=0.011)
        assert floor.seconds == max(terms)
        assert getattr(floor, floor.bound) == floor.seconds


def test_one_pass_only_where_cells_allow_it(scripts: SimpleNamespace) -> None:
    def cells(pattern: Pattern) -> bool:
        return scripts.floors.Call.of(pattern, 1, 56, 56, 1, 32).cells

    one_pass = [Window(7, 3), Grid(7), Neighborhood(7, dilation=8), Neighborhood(8, stride=8), HilbertWindow(49)]
    assert all(cells(p) for p in [*one_pass, Halo(8, 0)])
    two_passes = [Neighborhood(7), Slide(7), Halo(8, 3), Full(), Neighborhood(8, stride=4), HilbertNeighborhood(49)]
    assert not any(cells(p) for p in two_passes)


def test_unknown_rates_leave_their_terms_out(scripts: SimpleNamespace) -> None:
    call = scripts.floors.Call.of(Window(8), 2, 16, 16, 1, 32, "fp32")
    floor = scripts.floors.forward_floor(call, scripts.floors.DEVICES["b200"])
    assert (floor.l2, floor.matrix, floor.exp, floor.issue) == (None, None, None, None)
    # q, k, v and o of 512 tokens, 32 channels, 4 bytes, and a logarithm for each token
    assert floor.seconds == floor.memory == pytest.approx((4 * 512 * 32 * 4 + 512 * 4) / 8e12)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_prints_a_summary_and_one_json_object() -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "simulate.py"),
        "Neighborhood(13)",
        "--size",
        "128x128",
        "--order",
        "tiles",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["pattern"] == Neighborhood(13).spelling()
    assert (result["visited"], result["query_blocks"], result["key_blocks"]) == (46 * 46, 256, 256)
    assert result["useful"] == 128 * 128 * 169
    assert result["waste"] == pytest.approx(1 - result["useful"] / (46 * 46 * 64 * 64))
    assert result["empty_share"] + result["partial_share"] + result["full_share"] == pytest.approx(1)
    # two products of 32 channels for each score of 8 images and 4 heads
    assert result["work"]["forward"]["flops"] == 4 * 32 * 8 * 4 * result["computed"]
    floor = result["floors_s"]["forward"]
    assert floor["seconds"] == floor[floor["bound"]]
    assert "2,116" in done.stdout
    assert "68.1% waste" in done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_every_pattern_has_a_summary(scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], order: str) -> None:
    for pattern in PATTERNS:
        assert scripts.simulate.main([str(pattern), "--size", f"{HEIGHT}x{WIDTH}", "--order", order]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        blocks = scripts.block_counts.block_map(pattern, HEIGHT, WIDTH, scripts.blocks.Layout(order))
        assert (result["visited"], result["full"]) == (blocks.visited, blocks.full)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["Neighbourhood(7)"], "Neighbourhood(7)"),
        (["Neighborhood(7"], "Neighborhood(7"),
        (["Neighborhood(7)", "--size", "5x20"], "5x20"),
        (["Neighborhood(7)", "--size", "0x20"], "0x20"),
        (["Neighborhood(7)", "--size", "twenty"], "twenty"),
        (["Neighborhood(7)", "--device", "h300"], "h300"),
        (["Neighborhood(7)", "--order", "peano"], "peano"),
        (["Neighborhood(7)", "--query", "56,3"], "56,3"),
        (["Neighborhood(7)", "--query-block", "8x0"], "8x0"),
        (["Neighborhood(7)", "--batch", "-1"], "-1"),
        (["Neighborhood(7)", "--picture", "out.txt"], "out.txt"),
        (["Neighborhood(7)", "--picture", "nowhere/out.png"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    try:
        code = scripts.simulate.main(arguments)
    except SystemExit as leave:
        code = leave.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err


@pytest.mark.parametrize(
    ("pattern", "order", "query"),
    [
        ("Neighborhood(5)", "tiles", "3,10"),
        ("Halo(4, 2, stride=2)", "halo", "1,1"),
        ("HilbertSlide(9)", "morton", "0,3"),
    ],
)
def test_picture_is_an_image_of_what_the_query_sees(
    scripts: SimpleNamespace, tmp_path: Path, pattern: str, order: str, query: str
) -> None:
    path = tmp_path / "out.png"
    arguments = [pattern, "--size", "20x24", "--order", order, "--query", query, "--picture", str(path)]
    assert scripts.simulate.main(arguments) == 0
    with Image.open(path) as image:
        image.load()
        assert image.width == 1200
        pixels = np.asarray(image.convert("RGB"))
    left = pixels[:, :600].reshape(-1, 3)
    seen = tuple(int(scripts.pictures.SEEN[i : i + 2], 16) for i in (1, 3, 5))
    assert (left == seen).all(1).sum() > 2000
    assert list(tmp_path.iterdir()) == [path], "written whole, nothing left beside it"
