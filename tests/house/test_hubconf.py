"""hubconf.py: torch.hub makes every model from a clone that nobody installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nearfield
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hubconf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf_of_the_clone", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_uninstalled_clone_is_loaded_as_the_package(tmp_path: Path) -> None:
    clone = tmp_path / "owner_repository_main"  # as torch.hub names it
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=leave)
    code = f"""
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
assert importlib.util.find_spec("nearfield") is None, "it is installed, so that nothing would be shown"
import torch
before = list(sys.path)
model = torch.hub.load({str(clone)!r}, "nat_nano", source="local", num_classes=3)
import nearfield, nearfield.ops.patterns, timm
assert nearfield.__file__.startswith({str(clone)!r}), nearfield.__file__
assert type(model).__module__ == "nearfield.models.nat", type(model)
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
assert type(timm.create_model("nat_nano")) is type(model)
assert sys.path == before
assert not {{"ops", "models", "checkpoints", "engine"}} & set(sys.modules)
"""
    # isolated: neither PYTHONPATH nor the current folder has the package
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_every_name_is_an_entry_point(hubconf: ModuleType) -> None:
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert {*nearfield.list_models(), "create_model", "list_models"} <= entries
    assert "swin_nano" in (hubconf.swin_nano.__doc__ or "")


def test_it_uses_the_package_that_is_imported_already() -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), "swin_nano", source="local", num_classes=3)
        tagged = torch.hub.load(str(ROOT), "create_model", "swin_base.ms_in22k", source="local")
    assert type(model) is nearfield.models.swin.Swin
    assert tagged.num_classes == 21841


def test_what_torch_hub_asks_for_is_there(hubconf: ModuleType) -> None:
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)
