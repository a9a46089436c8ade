"""Fixtures of the operator tests, and the folder's helpers made importable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nearfield.ops import blocks, torch_tiles

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("ops_helpers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # maps are tiny here, a second thread costs more than it brings
    torch.set_num_threads(1)


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of one run of one image, so that every band is read in many pieces."""
    blocks.cut_blocks.cache_clear()
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    yield
    blocks.cut_blocks.cache_clear()


@pytest.fixture
def set_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Fixes the query tile (rows, columns) that the torch backend uses."""

    def fix(rows: int, columns: int) -> None:
        monkeypatch.setattr(torch_tiles, "choose_tile", lambda *_: (rows, columns))

    return fix
