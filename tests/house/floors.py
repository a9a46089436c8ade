"""The floors of the house, read from the imports of the source files; nothing is executed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

# Imports go down, never up. `ops` and `checkpoints` share the ground floor and know nothing of each other.
FLOORS = {"ops": 0, "checkpoints": 0, "models": 1, "engine": 2, "train": 3, "eval": 3, "scripts": 3, "hubconf": 3}
STRANGERS = {("ops", "checkpoints"), ("checkpoints", "ops")}
# Within ops each room imports only from those before it.
OPS_ROOMS = [
    "curves", "patterns", "notices", "cache", "bias", "tiles", "blocks", "scores", "tile_math", "routing", "reference",
    "torch_tiles", "plain", "triton", "library", "attention",
]  # fmt: skip
# What the lower floors may take from outside the standard library.
OUTSIDE = {
    "ops": {"torch", "numpy", "triton"},
    "checkpoints": {"torch", "numpy", "yaml", "safetensors", "huggingface_hub"},
    "models": {"torch", "torchvision", "numpy", "timm"},
}
SKIPPED = {"tests", "build", "dist"}


def source_files(root: Path) -> dict[str, Path]:
    """Python files of the project by dotted module name without the package prefix; tests are left out."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in SKIPPED or any(p.startswith(".") or p.endswith(".egg-info") for p in parts):
            continue
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_modules(module: str, path: Path, known: set[str]) -> tuple[set[str], set[str]]:
    """(modules of the project, top-level names from outside) that a file imports anywhere, also inside functions."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    inside: set[str] = set()
    outside: set[str] = set()

    def add(dotted: str) -> None:
        while dotted and dotted not in known:
            dotted = dotted.rpartition(".")[0]
        inside.add(dotted)

    for node in _executed(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                if name.split(".")[0] == "nearfield":
                    add(name.partition(".")[2])
                else:
                    outside.add(name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                prefix = [p for p in package if p][: len([p for p in package if p]) - (node.level - 1)]
                base = ".".join([*prefix, *([base] if base else [])])
            elif base.split(".")[0] == "nearfield":
                base = base.partition(".")[2]
            else:
                outside.add(base.split(".")[0])
                continue
            for alias in node.names:
                add(f"{base}.{alias.name}".strip("."))
    return inside - {"", module}, outside


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from _executed(node)


def violations(root: Path) -> list[str]:
    """Every import that goes up, sideways between strangers, out of its floor's libraries, or round in a circle."""
    files = source_files(root)
    graph = {name: imported_modules(name, path, set(files)) for name, path in files.items()}
    found = []
    for name, (inside, outside) in graph.items():
        room = name.split(".")[0]
        for target in sorted(inside):
            other = target.split(".")[0]
            if FLOORS.get(room, 9) < FLOORS.get(other, -1):
                found.append(f"{name} imports upward: {target}")
            if (room, other) in STRANGERS:
                found.append(f"{name} imports {target}: ops and checkpoints know nothing of each other")
            if room == other == "ops" and name != "ops":
                here, there = name.split(".")[1], target.partition(".")[2]
                if here in OPS_ROOMS and there in OPS_ROOMS and OPS_ROOMS.index(there) >= OPS_ROOMS.index(here):
                    found.append(f"{name} imports a later room of ops: {target}")
        stray = outside - OUTSIDE.get(room, outside) - set(sys.stdlib_module_names)
        found += [f"{name} imports {library}: not for this floor" for library in sorted(stray)]
    return found + _circles({name: inside for name, (inside, _) in graph.items()})


def _circles(graph: dict[str, set[str]]) -> list[str]:
    """Import circles between modules; a package's own __init__ may import its parts."""
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            circle = trail[trail.index(name) :]
            if not any(a.startswith(f"{b}.") for a in circle for b in circle):
                found.append("circle: " + " -> ".join([*circle, name]))
            return
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            visit(target, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    return found
