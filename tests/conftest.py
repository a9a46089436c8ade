"""Settings shared by every test: threads, a fixed seed, no network; and which process a kernel's tests need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("NEARFIELD_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from torch import Tensor

# two threads, or one in each of the processes that pytest-xdist starts
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
if THREADS == 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that a test starts

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
PYTEST = "python -m pytest -c tests/pytest.ini"


def _why_not(marker: str) -> str | None:
    """Why this process cannot run the tests of a marker, and which command can."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if marker == "interpreted" and not INTERPRETING:
        return f"needs Triton's interpreter: TRITON_INTERPRET=1 {PYTEST} -m interpreted tests/kernels"
    if marker == "aot" and INTERPRETING:
        return f"compiles kernels, which an interpreting process cannot: {PYTEST} -m aot tests/kernels"
    if marker == "gpu" and (INTERPRETING or not torch.cuda.is_available()):
        lacking = "a process without TRITON_INTERPRET" if INTERPRETING else "a CUDA device"
        return f"needs {lacking}; on a machine with a GPU: {PYTEST} -m gpu tests"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {m: pytest.mark.skip(reason=why) for m in ("interpreted", "aot", "gpu") if (why := _why_not(m))}
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one test compiled decides which sizes are variables in the next one's graphs."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Uninitialised floating point memory is NaN; the list grows by one per poisoned allocation."""
    made: list[int] = []

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned_make(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                made.append(tensor.numel())
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return poisoned_make

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    return made
