"""Imports go down, never up, never in a circle (CONTRIBUTING: the floors)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("floors", Path(__file__).with_name("floors.py"))
assert _spec is not None
assert _spec.loader is not None
floors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(floors)


def test_every_import_goes_down() -> None:
    assert floors.violations(ROOT) == []


def test_every_file_has_a_floor() -> None:
    rooms = {name.split(".")[0] for name in floors.source_files(ROOT)}
    assert rooms - set(floors.FLOORS) <= {"", "__init__", "_version", "configs"}
    ops = {name.split(".")[1] for name in floors.source_files(ROOT) if name.startswith("ops.")}
    assert ops == set(floors.OPS_ROOMS)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"ops/a.py": "from ..models import b", "models/b.py": ""}, "ops.a imports upward: models.b"),
        ({"ops/a.py": "def f():\n    import nearfield.engine.x", "engine/x.py": ""}, "ops.a imports upward: engine.x"),
        ({"checkpoints/a.py": "from ..ops.c import d", "ops/c.py": ""}, "know nothing of each other"),
        ({"models/a.py": "from .b import x", "models/b.py": "from . import a"}, "circle: models.a -> models.b"),
        ({"ops/curves.py": "from .tiles import x", "ops/tiles.py": ""}, "a later room of ops: ops.tiles"),
        ({"ops/a.py": "import timm"}, "ops.a imports timm: not for this floor"),
        ({"models/a.py": "import hydra"}, "models.a imports hydra: not for this floor"),
    ],
)
def test_a_file_that_breaks_the_floors_is_named(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    assert any(complaint in line for line in floors.violations(tmp_path)), floors.violations(tmp_path)


def test_downward_imports_are_fine(tmp_path: Path) -> None:
    files = {"ops/a.py": "import torch\nfrom . import b", "ops/b.py": "", "models/m.py": "from ..ops.a import x"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").write_text("from .a import y" if path.parent.name == "ops" else "")
        path.write_text(text)
    assert floors.violations(tmp_path) == []


def test_engine_names_no_backbone_family() -> None:
    families = re.compile(r"\b(nat|dinat|swin|swinv2|halonet|maxvit|biformer|hwt|hnt)(_\w+)?\b", re.IGNORECASE)
    for path in (ROOT / "engine").rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not families.search(line), f"{path.name}:{number}: {line.strip()}"


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w./]+\.(?:py|md|yaml))`", text) if "NAME" not in name]
    rooms = {ROOT, *(path.parent for path in floors.source_files(ROOT).values()), *ROOT.glob("tests/*")}
    assert len(named) > 30
    assert [name for name in named if not any((room / name).is_file() for room in rooms)] == []
