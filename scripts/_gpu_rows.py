"""Rows of the GPU report: plain dictionaries, as the JSON file has them, and how they read as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from _bench_timing import grid
from _gpu_timing import OUT_OF_TIME

Row = dict[str, Any]
Bound = Literal["least", "most"]

HIGHER_IS_BETTER = {"img/s", "TB/s", "TFLOP/s"}


def make_row(section: str, claim: str, name: str, what: str, *, unit: str = "us", **fields: Any) -> Row:
    """A row with every field there; what is not given is None, or empty.

    Args:
        section: ops, models, tests or tune.
        claim: of the kernel study that it belongs to; "" for none.
        name: what is computed.
        what: which part of it: forward, backward, forward + backward, training, ...
        unit: of `ours` and of the peers.
        fields: `shape`, `dtype`, `ours` (the figure), `call_us`, `host_us`, `graph_us`, `first_s`, `floor`, `floor_of`
            (what bounds it), `errors` (by tensor, against the reference), `peers`, `targets`, `note`.
    """
    row: Row = {"section": section, "claim": claim, "name": name, "what": what, "shape": "", "dtype": "", "ours": None}
    row |= {"unit": unit, "call_us": None, "host_us": None, "graph_us": None, "first_s": None}
    row |= {"floor": None, "floor_of": "", "fraction": None, "errors": {}, "peers": [], "targets": [], "note": ""}
    unknown = fields.keys() - row.keys()
    if unknown:
        raise TypeError(f"a row has no {', '.join(sorted(unknown))}")
    row |= fields
    if row["floor"] and row["ours"] and row["fraction"] is None:
        row["fraction"] = row["floor"] / row["ours"]
    return row


def make_peer(
    name: str, value: float | None, row: Row, *, bound: Bound = "least", note: str = "", **fields: Any
) -> dict[str, Any]:
    """A peer's entry in a row.

    `ratio` is how many times better ours is where `bound` is "least"; ours over the peer's (a cost) where "most".
    """
    ratio = None
    if value and row["ours"]:
        ratio = row["ours"] / value if bound == "most" or row["unit"] in HIGHER_IS_BETTER else value / row["ours"]
    return {"name": name, "value": value, "ratio": ratio, "bound": bound, "note": note, **fields}


def add_target(row: Row, of: str, limit: float, bound: Bound, value: float | None) -> None:
    """Append a target: `of` names what is bounded, `value` what was reached; None where nothing was measured."""
    reached = None if value is None else value >= limit if bound == "least" else value <= limit
    row["targets"].append({"of": of, "limit": limit, "bound": bound, "value": value, "reached": reached})


def counted(rows: Iterable[Row]) -> tuple[int, int, int]:
    """Targets reached, targets missed, targets without a measurement."""
    found = [target["reached"] for row in rows for target in row["targets"]]
    return found.count(True), found.count(False), found.count(None)


def failed(row: Row) -> bool:
    """Whether something went wrong in a row that was tried."""
    return row["ours"] is None and row["note"] != OUT_OF_TIME


def figure(value: float | None, digits: int = 4) -> str:
    """A number as the tables print it."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _peer_text(peer: Mapping[str, Any], unit: str) -> str:
    if peer["value"] is None:
        return f"{peer['name']}: {_cut(peer['note'], 100)}"
    text = f"{peer['name']}: {figure(peer['value'])} {unit}"
    if peer["ratio"] is None:
        return text
    sign = "of it" if peer["bound"] == "most" else "x"
    return f"{text} (**{peer['ratio']:.2f}{' ' if sign == 'of it' else ''}{sign}**)"


def _target_text(target: Mapping[str, Any]) -> str:
    sign = ">=" if target["bound"] == "least" else "<="
    reached = {True: "yes", False: "no", None: "not measured"}[target["reached"]]
    value = "" if target["value"] is None else f" ({figure(target['value'], 3)})"
    return f"{target['of']} {sign} {target['limit']:g}: {reached}{value}"


def _error_text(errors: Mapping[str, float]) -> str:
    return f"{max(errors.values()):.1e}" if errors else ""


HEAD = ("what", "shape", "ours", "call", "floor", "fraction", "others", "targets", "error", "note")


def table_line(row: Row) -> tuple[str, ...]:
    """One row as the cells of a Markdown table."""
    unit = row["unit"]
    ours = "" if row["ours"] is None else f"{figure(row['ours'])} {unit}"
    if row["graph_us"] is not None:
        ours += f" (graph, warm: {figure(row['graph_us'])})"
    floor = "" if row["floor"] is None else f"{figure(row['floor'], 3)} {unit}"
    if floor and row["floor_of"]:
        floor += f", {row['floor_of']}"
    cells = (
        f"{row['name']}, {row['what']}" if row["what"] else row["name"],
        " ".join(part for part in (row["shape"], row["dtype"]) if part),
        ours,
        "" if row["call_us"] is None else f"{figure(row['call_us'])} us",
        floor,
        "" if row["fraction"] is None else f"{100 * row['fraction']:.0f} %",
        "<br>".join(_peer_text(peer, unit) for peer in row["peers"]),
        "<br>".join(_target_text(target) for target in row["targets"]),
        _error_text(row["errors"]),
        row["note"],
    )
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    return grid([HEAD, *(table_line(row) for row in rows)], markdown=True)


def plain_lines(rows: Iterable[Row]) -> list[str]:
    """Rows as short lines for a terminal: what, figure, fraction of the floor, targets, what went wrong."""
    lines = []
    for row in rows:
        name = ", ".join(part for part in (row["name"], row["what"]) if part)
        parts = [f"{name} [{row['shape']}]" if row["shape"] else name]
        if row["ours"] is not None:
            parts.append(f"{figure(row['ours'])} {row['unit']}")
        if row["fraction"] is not None:
            parts.append(f"{100 * row['fraction']:.0f} % of the floor's speed")
        parts += [_target_text(target) for target in row["targets"]]
        parts += [f"{p['name']}: {_cut(p['note'], 60)}" for p in row["peers"] if p["value"] is None and p["note"]]
        if row["note"]:
            parts.append(_cut(row["note"], 120))
        lines.append("; ".join(parts))
    return lines
