"""Attention patterns: which keys each query sees.

A pattern is a frozen, hashable value. Resolved on a map it becomes, per axis, intervals: the query at coordinate i sees
the keys j with `start[i] <= j < stop[i]` and `(j - start[i]) % step == 0`. The axes are the two image axes, or the one
axis of a space-filling curve (then the second axis has length 1). Everything else in `ops` is derived from these
intervals. To add a pattern, write one class with one `axis` method.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

__all__ = [
    "Axes",
    "Axis",
    "Full",
    "Grid",
    "Halo",
    "HilbertNeighborhood",
    "HilbertSlide",
    "HilbertWindow",
    "Neighborhood",
    "Pattern",
    "Resolved",
    "Slide",
    "Window",
    "parse_pattern",
    "resolve",
]

Pair = tuple[int, int]
Size = int | Pair


@dataclass(frozen=True, eq=False)
class Axis:
    """The intervals of one axis.

    Attributes:
        start, stop: (queries,) int64, key coordinates; they leave [0, keys) only where zero keys pad the map (Halo).
        step: distance between the keys of one query.
        origin: (queries,) int64, the key coordinate of displacement 0: displacement = (j - origin) // step.
        reach: largest |displacement|; a bias table has 2 * reach + 1 rows on this axis.
        keys: number of key coordinates.
        rel_origin, rel_reach: the same two for decomposed (query-dependent) bias, where a pattern counts differently.
    """

    start: np.ndarray
    stop: np.ndarray
    step: int
    origin: np.ndarray
    reach: int
    keys: int
    rel_origin: np.ndarray
    rel_reach: int

    @property
    def queries(self) -> int:
        """Number of query coordinates."""
        return len(self.start)

    @property
    def counts(self) -> np.ndarray:
        """(queries,) int64: how many keys each query coordinate sees, zero-padded keys included."""
        return -((self.start - self.stop) // self.step)


def _axis(
    start: np.ndarray,
    stop: np.ndarray,
    keys: int,
    reach: int,
    *,
    step: int = 1,
    origin: np.ndarray | None = None,
    rel: tuple[np.ndarray, int] | None = None,
) -> Axis:
    origin = np.arange(len(start)) if origin is None else origin
    rel_origin, rel_reach = (origin, reach) if rel is None else rel
    return Axis(start, stop, step, origin, reach, keys, rel_origin, rel_reach)


@dataclass(frozen=True, repr=False)
class Pattern:
    """Base of all patterns. Sizes are ints or (y, x) pairs and are kept as pairs."""

    curve: ClassVar[str | None] = None  # name of the order whose single axis the pattern lives on

    def spelling(self) -> str:
        """The pattern as code, read back by `parse_pattern`; plain enough for torch.compile to trace."""
        names: tuple[str, ...] = self.__match_args__
        values = [getattr(self, name) for name in names]
        texts = [v.spelling() if isinstance(v, Pattern) else f"{v!r}" for v in values]
        sizes = [f"{name}={text}" for name, text in zip(names, texts, strict=True)]
        return f"{type(self).__name__}({', '.join(sizes)})"

    def __repr__(self) -> str:
        return self.spelling()

    def axis(self, n: int, which: int) -> Axis:
        """Intervals of image axis `which` (0 = y, 1 = x) of `n` keys; of the curve axis for curve patterns."""
        raise NotImplementedError(f"{type(self).__name__} defines no axis")

    def query_stride(self) -> Pair:
        """How many times smaller the query map is than the key map, per axis (1 unless the pattern says otherwise)."""
        return (1, 1)

    def check(self, height: int, width: int, axes: tuple[int, ...] = (0, 1)) -> None:
        """Raise ValueError where the pattern is not defined on these axes of a height x width key map."""

    def _pair(self, name: str, *, least: int) -> None:
        """Normalise field `name` to a (y, x) pair of ints >= least."""
        value = getattr(self, name)
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        if len(pair) != 2 or not all(_is_int(p) for p in pair):
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be an int or a (y, x) pair of ints")
        if min(pair) < least:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be at least {least}")
        object.__setattr__(self, name, (int(pair[0]), int(pair[1])))

    def _whole(self, name: str, *, least: int) -> None:
        """Check that field `name`, a length along a curve, is an int >= least."""
        value = getattr(self, name)
        if not _is_int(value) or value < least:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be an int >= {least}")
        object.__setattr__(self, name, int(value))


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _window_axis(n: int, size: int, shift: int) -> Axis:
    i = np.arange(n)
    cell = (i - shift) // size
    start = np.maximum(cell * size + shift, 0)
    stop = np.minimum((cell + 1) * size + shift, n)
    return _axis(start, stop, n, size - 1)


def _neighborhood_axis(n: int, kernel_size: int, dilation: int, stride: int) -> Axis:
    i = np.arange(n)
    residue, place = i % dilation, i // dilation
    members = (n - residue + dilation - 1) // dilation  # length of the residue class of i
    leader = place if stride == 1 else np.minimum(place // stride * stride + stride // 2, members - 1)
    first = np.clip(leader - kernel_size // 2, 0, members - kernel_size)
    start = residue + dilation * first
    return _axis(start, start + dilation * (kernel_size - 1) + 1, n, kernel_size - 1, step=dilation)


def _slide_axis(n: int, width: int) -> Axis:
    i, r = np.arange(n), width // 2
    return _axis(np.maximum(i - r, 0), np.minimum(i + r + 1, n), n, r)


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    """Non-overlapping windows: cell = (i - shift) // size, keys of the same cell, clipped to the map.

    `Window(size, shift=s)` is Swin's cyclic shift by s with its mask: cells are cut at the border, nothing wraps
    (Liu et al. 2021, arXiv 2103.14030, section 3.2).
    """

    size: Size
    shift: Size = 0

    def __post_init__(self) -> None:
        self._pair("size", least=1)
        self._pair("shift", least=-(1 << 31))

    def axis(self, n: int, which: int) -> Axis:
        """Cells of this axis."""
        return _window_axis(n, self.size[which], self.shift[which])  # type: ignore[index]


@dataclass(frozen=True, repr=False)
class Grid(Pattern):
    """MaxViT's grid attention: `size` keys per axis, spread evenly over the map (Tu et al. 2022, arXiv 2204.01697).

    step = ceil(n / size), the keys of i are its residue class: a size x size grid when size divides n, otherwise the
    same as padding to a multiple and masking the padding.
    """

    size: Size

    def __post_init__(self) -> None:
        self._pair("size", least=1)

    def axis(self, n: int, which: int) -> Axis:
        """Residue classes of this axis."""
        size: int = self.size[which]  # type: ignore[index]
        step = -(-n // size)
        return _axis(np.arange(n) % step, np.full(n, n), n, size - 1, step=step)


@dataclass(frozen=True, repr=False)
class Neighborhood(Pattern):
    """Neighborhood attention: exactly `kernel_size` keys per axis around each query, shifted inward at borders.

    With dilation d a query sees members of its residue class mod d only (Hassani et al. 2022, arXiv 2204.07143; Hassani
    and Shi 2022, arXiv 2209.15001). With stride s, s consecutive queries share the keys of one leader (GNA, Hassani et
    al. 2025, arXiv 2504.16922). Even kernels look one key further to the left.
    """

    kernel_size: Size
    dilation: Size = 1
    stride: Size = 1

    def __post_init__(self) -> None:
        for name in ("kernel_size", "dilation", "stride"):
            self._pair(name, least=1)
        if any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True)):  # type: ignore[arg-type]
            raise ValueError(f"Neighborhood: stride={self.stride} must not exceed kernel_size={self.kernel_size}")

    def axis(self, n: int, which: int) -> Axis:
        """Clamped neighborhoods of this axis."""
        return _neighborhood_axis(n, self.kernel_size[which], self.dilation[which], self.stride[which])  # type: ignore[index]

    def check(self, height: int, width: int, axes: tuple[int, ...] = (0, 1)) -> None:
        """Every residue class needs kernel_size members."""
        for a in axes:
            n, k, d = (height, width)[a], self.kernel_size[a], self.dilation[a]  # type: ignore[index]
            if n < k * d:
                name = f"kernel_size {k}" if d == 1 else f"kernel_size {k} * dilation {d} = {k * d}"
                raise ValueError(
                    f"feature map {height}x{width} is smaller than {name}: "
                    f"use a larger image or kernel_size <= {n // d if n >= d else f'1 with dilation <= {n}'}"
                )


@dataclass(frozen=True, repr=False)
class Halo(Pattern):
    """Blocked local attention: the keys of the query's block, widened by `halo` on each side.

    pad="zero" keeps keys outside the map as zero keys that take part in the softmax (what released HaloNet weights
    expect), pad="clip" drops them. Queries may live on a map `stride` times smaller (stride divides block).
    Source: Vaswani et al. 2021, arXiv 2103.12731.
    """

    block: Size
    halo: Size
    pad: Literal["zero", "clip"] = "zero"
    stride: Size = 1

    def __post_init__(self) -> None:
        self._pair("block", least=1)
        self._pair("halo", least=0)
        self._pair("stride", least=1)
        if self.pad not in ("zero", "clip"):
            raise ValueError(f"Halo: pad={self.pad!r} must be 'zero' or 'clip'")
        if any(b % s for b, s in zip(self.block, self.stride, strict=True)):  # type: ignore[arg-type]
            raise ValueError(f"Halo: stride={self.stride} must divide block={self.block}")

    def query_stride(self) -> Pair:
        """The query map is `stride` times smaller than the key map."""
        return self.stride  # type: ignore[return-value]

    def axis(self, n: int, which: int) -> Axis:
        """Widened blocks of this axis; `n` counts keys."""
        block, halo, stride = self.block[which], self.halo[which], self.stride[which]  # type: ignore[index]
        i = np.arange(-(-n // stride))
        first = i * stride // block * block
        start, stop = first - halo, first + block + halo
        if self.pad == "clip":
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        # Decomposed tables count from the query's place in its block to the key's place in the widened block.
        rel_origin = first - halo + i % (block // stride)
        rel = (rel_origin, block + 2 * halo - 1)
        return _axis(start, stop, n, block + halo - 1, origin=i * stride, rel=rel)


@dataclass(frozen=True, repr=False)
class Slide(Pattern):
    """Sliding window clipped at the border: |i - j| <= width // 2."""

    width: Size

    def __post_init__(self) -> None:
        self._pair("width", least=1)

    def axis(self, n: int, which: int) -> Axis:
        """Clipped bands of this axis."""
        return _slide_axis(n, self.width[which])  # type: ignore[index]


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key."""

    def axis(self, n: int, which: int) -> Axis:
        """The whole axis."""
        return _axis(np.zeros(n, dtype=np.int64), np.full(n, n), n, n - 1)


@dataclass(frozen=True, repr=False)
class Axes(Pattern):
    """Joins the y axis of one pattern and the x axis of another: a stripe is `Axes(Full(), Window(7))`."""

    y: Pattern
    x: Pattern

    def __post_init__(self) -> None:
        for name, part in (("y", self.y), ("x", self.x)):
            if not isinstance(part, Pattern) or part.curve is not None or isinstance(part, Axes):
                raise ValueError(f"Axes: {name}={part!r} must be a pattern of the image axes")

    def axis(self, n: int, which: int) -> Axis:
        """The axis of the part that owns it."""
        return (self.y, self.x)[which].axis(n, which)

    def query_stride(self) -> Pair:
        """Each axis keeps its own."""
        return self.y.query_stride()[0], self.x.query_stride()[1]

    def check(self, height: int, width: int, axes: tuple[int, ...] = (0, 1)) -> None:
        """Each part is checked on its own axis only."""
        self.y.check(height, width, (0,))
        self.x.check(height, width, (1,))


@dataclass(frozen=True, repr=False)
class HilbertWindow(Pattern):
    """Windows of `length` consecutive tokens of the generalized Hilbert curve (HWT, arXiv 2511.05832).

    HWT's shifted blocks, which roll the sequence by +s, are `shift = length - s` here.
    """

    length: int
    shift: int = 0
    curve: ClassVar[str | None] = "hilbert"

    def __post_init__(self) -> None:
        self._whole("length", least=1)
        self._whole("shift", least=-(1 << 31))

    def axis(self, n: int, which: int) -> Axis:
        """Cells of the curve."""
        return _window_axis(n, self.length, self.shift)


@dataclass(frozen=True, repr=False)
class HilbertNeighborhood(Pattern):
    """1-D neighborhood attention of `length` keys along the generalized Hilbert curve (HNT, arXiv 2511.05832)."""

    length: int
    curve: ClassVar[str | None] = "hilbert"

    def __post_init__(self) -> None:
        self._whole("length", least=1)

    def axis(self, n: int, which: int) -> Axis:
        """Clamped neighborhoods of the curve."""
        return _neighborhood_axis(n, self.length, 1, 1)

    def check(self, height: int, width: int, axes: tuple[int, ...] = (0, 1)) -> None:
        """The curve needs `length` tokens."""
        if height * width < self.length:
            raise ValueError(
                f"feature map {height}x{width} has fewer tokens than length {self.length}: "
                f"use a larger image or length <= {height * width}"
            )


@dataclass(frozen=True, repr=False)
class HilbertSlide(Pattern):
    """Sliding window along the generalized Hilbert curve: at most width // 2 places away (HST, arXiv 2511.05832)."""

    width: int
    curve: ClassVar[str | None] = "hilbert"

    def __post_init__(self) -> None:
        self._whole("width", least=1)

    def axis(self, n: int, which: int) -> Axis:
        """Clipped bands of the curve."""
        return _slide_axis(n, self.width)


@dataclass(frozen=True, eq=False)
class Resolved:
    """A pattern on a key map of known size: one `Axis` per axis; curve patterns have a second axis of length 1."""

    pattern: Pattern
    height: int
    width: int
    y: Axis
    x: Axis


@lru_cache(maxsize=512)
def resolve(pattern: Pattern, height: int, width: int) -> Resolved:
    """Intervals of `pattern` on a height x width key map.

    Raises:
        ValueError: an empty map, or one on which the pattern is not defined.
    """
    if height < 1 or width < 1:
        raise ValueError(f"feature map {height}x{width} has no tokens: both sides must be at least 1")
    pattern.check(height, width)
    if pattern.curve is not None:
        return Resolved(pattern, height, width, pattern.axis(height * width, 0), Full().axis(1, 1))
    return Resolved(pattern, height, width, pattern.axis(height, 0), pattern.axis(width, 1))


_BY_NAME: dict[str, type[Pattern]] = {
    c.__name__: c
    for c in (
        Window, Grid, Neighborhood, Halo, Slide, Full, Axes, HilbertWindow, HilbertNeighborhood, HilbertSlide,
    )
}  # fmt: skip


@lru_cache(maxsize=512)
def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` spells, as in code: "Neighborhood(7, dilation=2)"; the inverse of `repr`.

    Raises:
        ValueError: not a pattern, or one with impossible sizes. Nothing but patterns and literals is evaluated.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"cannot read pattern {text!r}: {error.msg}; write it as Neighborhood(7, dilation=2)"
        ) from None
    return _pattern_of(node, text)


def _pattern_of(node: ast.expr, text: str) -> Pattern:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _BY_NAME:
        raise ValueError(f"cannot read pattern {text!r}: expected one of {', '.join(_BY_NAME)} with its sizes")

    def value(arg: ast.expr) -> Any:
        if isinstance(arg, ast.Call):
            return _pattern_of(arg, text)
        try:
            return ast.literal_eval(arg)
        except (ValueError, TypeError):
            raise ValueError(f"cannot read pattern {text!r}: {ast.unparse(arg)} is not a number or a pair") from None

    kind = _BY_NAME[node.func.id]
    known = [f.name for f in fields(kind)]
    keywords = {k.arg: value(k.value) for k in node.keywords}
    repeated = len(keywords) < len(node.keywords)
    if repeated or not set(keywords) <= set(known) or len(node.args) + len(keywords) > len(known):
        raise ValueError(f"cannot read pattern {text!r}: {kind.__name__} takes {', '.join(known) or 'no arguments'}")
    try:
        return kind(*(value(a) for a in node.args), **keywords)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"cannot read pattern {text!r}: {error}") from None
