"""Published key layouts as data: templates that rename keys, transforms that reshape tables, and how a layout is told.

A backbone's file lists its layouts; this module applies them in both directions. It knows key strings, tensors and
shapes, and no model. "theirs" is the published side, "ours" the side of this package's modules.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import CheckpointMismatch

_FIELD = re.compile(r"\{([a-z]+)([+-]\d+)?\}")
# no leading zeros: "01" would not come back from the round trip
_INTEGER = r"(0|[1-9][0-9]*)"
_TAIL = r"(.+)"

COUNTER = "num_batches_tracked"
"""A batch norm's count of the batches that it saw."""


class Transform(Protocol):
    """A change of a tensor's form that loses nothing."""

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """Published form -> ours; ``shape`` is the shape the model expects, when known."""

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """Ours -> the published form, bit for bit."""


@dataclass(frozen=True)
class FlippedTable:
    """Swin's relative position table <-> the (heads, 2*wy-1, 2*wx-1) table of ``ops``.

    Published: (rows, heads), row = (yq-yk+wy-1) * (2*wx-1) + (xq-xk+wx-1), query minus key (Swin, section 3.2 and its
    code; HWT alike). Ours: entry [head, dy+wy-1, dx+wx-1] with (dy, dx) = key - query. The window is the one of the
    expected shape when the rows fit it (and those of the file's other tables do: ``_table_shapes``), a square one
    otherwise: a table of another size keeps its size and is resized by the model that takes it. Where no shape is
    expected, a window that is not square stays unknown: a single row.
    """

    def to_ours(self, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """(rows, heads) -> (heads, 2*wy-1, 2*wx-1); CheckpointMismatch when the rows make no table."""
        if tensor.ndim != 2:
            raise CheckpointMismatch(f"a position table has shape {tuple(tensor.shape)}, expected (rows, heads)")
        rows, heads = tensor.shape
        if shape is not None and len(shape) == 3 and shape[1] * shape[2] == rows:
            height, width = shape[1], shape[2]
        else:
            height = width = math.isqrt(rows)
            if shape is None and height * width != rows:
                height, width = 1, rows  # flipping both axes of any rectangle turns its rows round
            if height * width != rows or rows % 2 == 0:
                raise CheckpointMismatch(
                    f"a position table has {rows} rows: neither (2*w-1)^2 of a square window"
                    + (f" nor the {shape[1]} x {shape[2]} that the model has" if shape and len(shape) == 3 else "")
                )
        return tensor.reshape(height, width, heads).permute(2, 0, 1).flip(1, 2).contiguous()

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """(heads, 2*wy-1, 2*wx-1) -> (rows, heads)."""
        return tensor.flip(1, 2).permute(1, 2, 0).flatten(0, 1).contiguous()


def _table_shapes(
    tables: Mapping[str, str], state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> Mapping[str, torch.Size]:
    """The shapes at which ``FlippedTable`` reads the tables of a file: ``expected``, where the file can be meant.

    A table may have as many rows as the oblong one of the model and still be that of a square window. The other tables
    of the file tell: it is of this model if all have the rows of its own and one has those of no square.

    Args:
        tables: published key by our name.
        state: the file.
        expected: shapes of the model's own keys.

    Raises:
        CheckpointMismatch: nothing tells.
    """
    shapes = {name: expected[name] for name in tables if name in expected and len(expected[name]) == 3}
    rows = {name: state[tables[name]].shape[:1].numel() for name in shapes}
    sides = {name: math.isqrt(count) for name, count in rows.items()}
    fitting = {name for name, (_, height, width) in shapes.items() if height * width == rows[name]}
    of_no_square = {name for name, count in rows.items() if sides[name] ** 2 != count}
    doubtful = [name for name in shapes if name in fitting - of_no_square and shapes[name][1] != shapes[name][2]]
    if not doubtful:
        return expected
    if fitting == shapes.keys():
        if of_no_square:
            return expected
        (_, height, width), side = shapes[doubtful[0]], sides[doubtful[0]]
        raise CheckpointMismatch(
            f"{tables[doubtful[0]]}: {side**2} rows are a table of {side} x {side} or of {height} x {width}, as the "
            "model has: load into a model with the window of the file, then call set_input_size"
        )
    return {**expected, **{name: torch.Size((shapes[name][0], sides[name], sides[name])) for name in doubtful}}


@dataclass(frozen=True)
class _Template:
    """A compiled key template: literal text between fields."""

    literals: tuple[str, ...]
    fields: tuple[tuple[str, int], ...]
    pattern: re.Pattern[str] | None

    def match(self, key: str) -> dict[str, int | str] | None:
        """The fields' values in ``key``, or None; a field that occurs twice must have one value."""
        if self.pattern is None:
            return {} if key == self.literals[0] else None
        found = self.pattern.fullmatch(key)
        if found is None:
            return None
        values: dict[str, int | str] = {}
        for (name, shift), text in zip(self.fields, found.groups(), strict=True):
            value: int | str = text if name == "rest" else int(text) - shift
            if (isinstance(value, int) and value < 0) or values.setdefault(name, value) != value:
                return None
        return values

    def fill(self, values: Mapping[str, int | str]) -> str | None:
        """The key with the given values, or None when a shifted integer would be negative."""
        parts = [self.literals[0]]
        for (name, shift), literal in zip(self.fields, self.literals[1:], strict=True):
            value = values[name]
            if isinstance(value, int):
                value += shift
                if value < 0:
                    return None
            parts += [str(value), literal]
        return "".join(parts)


@functools.lru_cache(maxsize=4096)
def _template(text: str) -> _Template:
    literals: list[str] = []
    fields: list[tuple[str, int]] = []
    end = 0
    for found in _FIELD.finditer(text):
        literals.append(text[end : found.start()])
        fields.append((found[1], int(found[2] or 0)))
        end = found.end()
    literals.append(text[end:])
    if any("{" in part or "}" in part for part in literals):
        raise ValueError(f"key template {text!r}: fields are {{i}}, {{i+1}}, {{i-1}} or {{rest}}")
    names = [name for name, _ in fields]
    if "rest" in names and (names.count("rest") > 1 or names[-1] != "rest" or literals[-1] or fields[-1][1]):
        raise ValueError(f"key template {text!r}: {{rest}} may stand once, at the end, without a shift")
    if not fields:
        return _Template((text,), (), None)
    regex = re.escape(literals[0])
    for name, literal in zip(names, literals[1:], strict=True):
        regex += (_TAIL if name == "rest" else _INTEGER) + re.escape(literal)
    return _Template(tuple(literals), tuple(fields), re.compile(regex))


def _any_match(text: str, keys: Collection[str]) -> bool:
    template = _template(text)
    if template.pattern is None:
        return text in keys
    return any(template.match(key) is not None for key in keys)


@dataclass(frozen=True)
class Rule:
    """One renaming, read in both directions.

    ``theirs`` and ``ours`` are key templates: ``{i}``, ``{j}`` (any lower-case name) match an integer, ``{i+1}`` and
    ``{i-1}`` that integer shifted, ``{rest}`` a non-empty tail, dots included. A field has the same value on both
    sides, so both must name the same fields. ``transform`` changes the tensor as well.
    """

    theirs: str
    ours: str
    transform: Transform | None = None

    def __post_init__(self) -> None:
        theirs, ours = ({name for name, _ in _template(text).fields} for text in (self.theirs, self.ours))
        if theirs != ours:
            raise ValueError(f"rule {self.theirs!r} -> {self.ours!r}: both sides must name the same fields")

    def rename(self, key: str) -> str | None:
        """Our name of the published ``key``, or None when the rule is about other keys."""
        values = _template(self.theirs).match(key)
        return None if values is None else _template(self.ours).fill(values)

    def rename_back(self, key: str) -> str | None:
        """The published name of our ``key``, or None when the rule is about other keys."""
        values = _template(self.ours).match(key)
        return None if values is None else _template(self.theirs).fill(values)


@dataclass(frozen=True)
class Layout:
    """One published key layout.

    Args:
        name: as in the index (``shi-labs``, ``microsoft``, ``timm``).
        source: where the layout comes from (repository, file).
        signature: key templates that must all be present.
        rules: renamings; the first that matches wins, in both directions.
        drops: templates of published keys that carry no parameter (masks, indices).
        absent: key templates none of which may be present.

    Signature keys should lie outside the head, so that a file without one is recognised too. A published key that no
    rule and no drop covers keeps its name, so that strict loading names it.
    """

    name: str
    source: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    drops: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.signature:
            raise ValueError(f"layout {self.name!r}: an empty signature would recognise every file")
        for text in (*self.signature, *self.drops, *self.absent):
            _template(text)
        for side in ([rule.theirs for rule in self.rules], [rule.ours for rule in self.rules]):
            twice = next((text for text in side if side.count(text) > 1), None)
            if twice is not None:
                raise ValueError(f"layout {self.name!r}: {twice!r} has more than one rule, so it cannot be inverted")

    def recognises(self, keys: Iterable[str]) -> bool:
        """Whether a state dict with these keys has this layout."""
        keys = keys if isinstance(keys, (set, frozenset, Mapping)) else set(keys)
        return all(_any_match(text, keys) for text in self.signature) and not any(
            _any_match(text, keys) for text in self.absent
        )

    def to_ours(
        self, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size] | None = None
    ) -> dict[str, Tensor]:
        """Published state dict -> ours.

        Args:
            state: published keys and tensors; dropped keys may be there or not.
            expected: shapes of the model's own keys, for tables whose window is not square.

        Raises:
            CheckpointMismatch: two published keys have one name here, or a table has no sensible size.
        """
        renamed: dict[str, tuple[str, Transform | None]] = {}
        for key in state:
            if any(_template(text).match(key) is not None for text in self.drops):
                continue
            name, transform = self._rename(key)
            if name in renamed:
                raise CheckpointMismatch(
                    f"layout {self.name}: published key {key} and another one are both {name} here; "
                    "the file mixes two layouts"
                )
            renamed[name] = key, transform
        tables = {name: key for name, (key, transform) in renamed.items() if isinstance(transform, FlippedTable)}
        shapes = _table_shapes(tables, state, expected or {})
        out: dict[str, Tensor] = {}
        for name, (key, transform) in renamed.items():
            out[name] = state[key]
            if transform is not None:
                try:
                    out[name] = transform.to_ours(state[key], shapes.get(name))
                except CheckpointMismatch as error:
                    raise CheckpointMismatch(f"{key}: {error}") from None
        return out

    def _rename(self, key: str) -> tuple[str, Transform | None]:
        """Our name of a published key, and how its tensor changes."""
        for rule in self.rules:
            name = rule.rename(key)
            if name is not None:
                return name, rule.transform
        return key, None

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict -> the published layout; dropped keys are not made up again."""
        out: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name, transform = key, None
            for rule in self.rules:
                renamed = rule.rename_back(key)
                if renamed is not None:
                    name, transform = renamed, rule.transform
                    break
            if name in out:
                raise CheckpointMismatch(f"layout {self.name}: {key} and another key are both {name} when published")
            out[name] = tensor if transform is None else transform.to_theirs(tensor)
        return out


def convert(
    state: Mapping[str, Tensor], layouts: Iterable[Layout], expected: Mapping[str, torch.Size] | None = None
) -> tuple[dict[str, Tensor], Layout | None]:
    """Bring a state dict into our layout.

    Args:
        state: any state dict without wrappers and prefixes (``load.unwrap`` takes them off).
        layouts: candidates; the first that recognises the keys is applied.
        expected: shapes of the model's own keys.

    Returns:
        the converted state and its layout; the state as it was and None when no layout recognises it, as is the case
        when the keys are ours already. Either has a counter for each batch norm.
    """
    state = _with_counters(state)
    for layout in layouts:
        if layout.recognises(state):
            return layout.to_ours(state, expected), layout
    return state, None


def _with_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a counter of 0 for each batch norm that has none: old files and those of other programs leave it out."""
    statistics = ".running_mean"
    counters = {
        key.removesuffix(statistics) + f".{COUNTER}": torch.zeros((), dtype=torch.long)
        for key in state
        if key.endswith(statistics)
    }
    return {**state, **{key: zero for key, zero in counters.items() if key not in state}}


def describe_mismatch(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], *, limit: int = 6) -> str:
    """How a state dict differs from what a model has, as one line; empty when all fits.

    Args:
        state: keys and tensors in our layout.
        expected: keys and shapes of the model.
        limit: how many keys of each kind are spelled out.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(shape)} in the model"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    parts = [
        _listed(what, items, limit)
        for what, items in (
            ("the file lacks", missing),
            ("the model does not have", unexpected),
            ("shapes differ for", shapes),
        )
        if items
    ]
    if missing and len(missing) == len(expected):
        parts.insert(0, "no key of the model is in the file (another model, or an unknown layout)")
    return "; ".join(parts)


def _listed(what: str, items: list[str], limit: int) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    plural = "key" if len(items) == 1 else "keys"
    return f"{what} {len(items)} {plural}: {', '.join(items[:limit])}{more}"
