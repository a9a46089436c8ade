"""Loops of NVIDIA machine code, as nvdisasm prints it: how many instructions the loops of a kernel have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import triton

__all__ = ["MachineCode", "disassembled"]

# A share of the products that the loop over streamed tokens holds at least; what is left was moved before or after it.
MOST_PRODUCTS = 0.4


@dataclass(frozen=True)
class MachineCode:
    """Instructions in order, and for every label the index of the instruction that follows it."""

    instructions: tuple[str, ...]
    labels: dict[str, int]

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """Natural loops as sets of instructions, the smallest first."""
        blocks, after = self._blocks()
        before: list[set[int]] = [set() for _ in blocks]
        for i, targets in enumerate(after):
            for t in targets:
                before[t].add(i)
        dominators = _dominators(after, before)
        found: dict[int, set[int]] = {}
        for i, targets in enumerate(after):
            for head in targets:
                if dominators[i] >> head & 1:
                    found.setdefault(head, {head}).update(_reaching(i, head, before))
        instructions = [frozenset(k for b in body for k in range(*blocks[b])) for body in found.values()]
        return sorted(instructions, key=len)

    @cached_property
    def nest(self) -> tuple[int, int, int]:
        """Instructions of the loop that holds most products, of the loop around it, and in all.

        A kernel without the one or the other has the next larger figure in its place.
        """
        products = {i for i, text in enumerate(self.instructions) if "MMA" in _opcode(text)}
        if not products:
            products = {i for i, text in enumerate(self.instructions) if _opcode(text).startswith("FFMA")}
        holding = [loop for loop in self.loops if len(loop & products) >= max(1, MOST_PRODUCTS * len(products))]
        inner = len(holding[0]) if holding else len(self.instructions)
        around = [loop for loop in holding[1:] if loop > holding[0]]
        return inner, len(around[0]) if around else inner, len(self.instructions)

    def opcodes(self) -> Counter[str]:
        """How often each operation occurs in the loop that holds most products."""
        inner = next((loop for loop in self.loops if len(loop) == self.nest[0]), range(len(self.instructions)))
        return Counter(_opcode(self.instructions[i]) for i in inner)

    def _blocks(self) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """Basic blocks as ranges of instructions, and the blocks that may follow each."""
        cuts = {0, len(self.instructions), *self.labels.values()}
        cuts |= {i + 1 for i, text in enumerate(self.instructions) if _target(text) or _ends(text)}
        edges = sorted(cut for cut in cuts if cut <= len(self.instructions))
        blocks = list(pairwise(edges))
        number = {a: i for i, (a, _) in enumerate(blocks)}
        after = []
        for i, (_, end) in enumerate(blocks):
            last = self.instructions[end - 1]
            to = self.labels.get(_target(last) or "")
            targets = [number[to]] if to is not None and to in number else []
            if not _ends(last) and i + 1 < len(blocks):
                targets.append(i + 1)
            after.append(targets)
        return blocks, after


def _opcode(text: str) -> str:
    """The operation without its predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def _target(text: str) -> str | None:
    """Label that an instruction may jump to. A call that pushes no return address is a jump."""
    found = re.search(r"(?:BRA|CALL\.REL\.NOINC)\b.*`\((\.L_\w+)\)", text)
    return found[1] if found else None


def _ends(text: str) -> bool:
    """Whether the next instruction never follows."""
    if text.startswith("@"):
        return False
    if text.startswith(("EXIT", "RET", "BRX")):
        return True
    return _target(text) is not None and re.match(r"(?:BRA|CALL\.REL\.NOINC)\s+`", text) is not None


def _dominators(after: list[list[int]], before: list[set[int]]) -> list[int]:
    """For every block the blocks on all ways to it, as bits."""
    every = (1 << len(after)) - 1
    found = [1] + [every] * (len(after) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(after)):
            common = every
            for b in before[i]:
                common &= found[b]
            new = common | 1 << i
            changed, found[i] = changed or new != found[i], new
    return found


def _reaching(block: int, head: int, before: list[set[int]]) -> set[int]:
    """Blocks from which `block` is reached without passing `head`."""
    found, todo = set(), [block]
    while todo:
        b = todo.pop()
        if b != head and b not in found:
            found.add(b)
            todo += before[b]
    return found


def disassembled(cubin: bytes) -> MachineCode:
    """Machine code of a compiled kernel; of its first function, where the compiler added others."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in printed.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return MachineCode(tuple(instructions), labels)
