"""`pip install .` gives a small pure-Python wheel with everything that the package reads at run time."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    leave = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "runs", "tests", ".*_cache")
    shutil.copytree(ROOT, source, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(work), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = work.glob("*.whl")
    return path


def test_wheel_is_small_and_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000


def test_wheel_holds_every_module_config_and_the_index(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [ROOT / "train.py", ROOT / "eval.py", ROOT / "py.typed", ROOT / "checkpoints" / "index.yaml"]
    for folder in ("ops", "models", "checkpoints", "engine"):
        wanted += (ROOT / folder).rglob("*.py")
    wanted += (ROOT / "configs").rglob("*.yaml")
    missing = [
        p for p in wanted if "configs/local/" not in p.as_posix() and f"nearfield/{p.relative_to(ROOT)}" not in names
    ]
    assert not missing


def test_wheel_puts_nothing_else_on_the_import_path(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"nearfield"}


def test_console_scripts_are_declared(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    text = archive.read(entry).decode()
    assert "nearfield-train = nearfield.train:main" in text
    assert "nearfield-eval = nearfield.eval:main" in text


def test_tested_versions_satisfy_the_lower_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib; 3.11 in CI has")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    wanted = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:  # an extra that takes in another
            continue
        text = str(requirement)
        assert Version(pins[requirement.name.lower().replace("_", "-")]) in requirement.specifier, text
