"""How the benchmark measures: candidates are checked against each other, then timed in interleaved rounds.

Time is CPU time of this process, so that other programs on the machine count little; with one thread it is what the
work costs. Every figure is a median over rounds, and in each round every candidate runs once.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


def as_output(result: Any) -> Named:
    """Results of a candidate that returns one tensor."""
    return {"output": result}


@dataclass(frozen=True)
class Candidate:
    """One way to compute something.

    `run` is what is timed; `results` names the tensors (output, gradients) in what it returned, untimed.
    """

    name: str
    run: Callable[[], Any]
    results: Callable[[Any], Named] = as_output


@dataclass(frozen=True)
class Peer:
    """A candidate to compare with, and how many times faster ours should be; None where nothing is asked."""

    candidate: Candidate
    target: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One computation, our candidate for it and its peers.

    Args:
        name: what is computed, on which shapes.
        ours: our candidate.
        peers: others; the first is the reference that all are compared with.
        tolerance: largest error allowed, relative to the largest magnitude of each tensor; None where the candidates
            are different models, of which only finite values are asked.
        missing: peers that cannot run here, by name, with their target and the reason.
    """

    name: str
    ours: Candidate
    peers: tuple[Peer, ...]
    tolerance: float | None = 1e-4
    missing: Mapping[str, tuple[float | None, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the result. `ratio` is how many times better ours is where `bound` is "least", else ours / peer."""

    name: str
    peer_name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    target: float | None
    unit: str = "ms"
    bound: Literal["least", "most"] = "least"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no figure."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target if self.bound == "least" else self.ratio <= self.target


class WrongResult(ValueError):  # noqa: N818 - it says what is wrong
    """A candidate computes something else than the reference: its time means nothing."""


def check(candidate: Named, reference: Named, name: str, tolerance: float | None) -> None:
    """Compare the named tensors of two candidates.

    Raises:
        WrongResult: a tensor is missing, has another shape, is not finite, or is further off than `tolerance`.
    """
    for key, tensor in candidate.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WrongResult(f"{name}: {key} is not finite")
    if tolerance is None:
        return
    if candidate.keys() != reference.keys():
        raise WrongResult(f"{name}: computes {sorted(candidate)}, the reference {sorted(reference)}")
    for key, want in reference.items():
        got = candidate[key]
        if got.shape != want.shape:
            raise WrongResult(f"{name}: {key} has shape {tuple(got.shape)}, the reference {tuple(want.shape)}")
        with torch.no_grad():
            error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
        if not error <= tolerance:
            raise WrongResult(f"{name}: {key} is off by {error:.1e}, allowed is {tolerance:.0e}")


def check_all(case: Case) -> None:
    """Compare every candidate of a case with the first peer; raises WrongResult."""
    first, *others = [peer.candidate for peer in case.peers]
    reference = first.results(first.run())
    check(reference, reference, first.name, case.tolerance)
    for candidate in (case.ours, *others):
        check(candidate.results(candidate.run()), reference, candidate.name, case.tolerance)


def median_ms(candidates: Sequence[Candidate], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each candidate over interleaved rounds, after one that does not count.

    The order turns round from round to round: no candidate always runs after the same other one.
    """
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for i in range(rounds + 1):
        for candidate in candidates if i % 2 else reversed(candidates):
            gc.collect()
            start = time.process_time()
            result = candidate.run()
            spent = time.process_time() - start
            del result
            if i:
                seconds[candidate.name].append(spent)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def compare(case: Case, rounds: int) -> list[Row]:
    """Check a case, time it, and give one row a peer; rows without a ratio where something is wrong or missing."""
    missing = [Row(case.name, name, None, None, None, target, note=why) for name, (target, why) in case.missing.items()]
    try:
        check_all(case)
    except WrongResult as error:
        note = f"wrong result, not timed: {error}"
        rows = [Row(case.name, p.candidate.name, None, None, None, p.target, note=note) for p in case.peers]
        return rows + missing
    times = median_ms([case.ours, *(peer.candidate for peer in case.peers)], rounds)
    ours = times[case.ours.name]
    rows = []
    for peer in case.peers:
        theirs = times[peer.candidate.name]
        rows.append(Row(case.name, peer.candidate.name, ours, theirs, theirs / ours, peer.target, note=peer.note))
    return rows + missing


def table(rows: Iterable[Row], *, markdown: bool = False) -> str:
    """Rows as aligned text, or as a Markdown table."""
    head = ("what", "compared with", "ours", "peer", "ratio", "target", "reached", "note")
    lines = [head]
    for row in rows:
        target = "" if row.target is None else f"{'>=' if row.bound == 'least' else '<='} {row.target:g}"
        reached = {True: "yes", False: "no", None: ""}[row.reached]
        figures = (_figure(row.ours, row.unit), _figure(row.peer, row.unit))
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.name, row.peer_name, *figures, ratio, target, reached, row.note))
    return grid(lines, markdown=markdown)


def grid(lines: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """A head line and others, as aligned text or as a Markdown table."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if not markdown:
        return "\n".join(line.rstrip() for line in aligned)
    marked = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([marked[0], "|" + "---|" * len(lines[0]), *marked[1:]])


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"
