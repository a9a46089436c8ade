"""Fixtures of the kernel tests. Most tests are written once and run twice: interpreted on the CPU, and on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "ops"):
    sys.path.insert(0, str(folder))
pytest.register_assert_rewrite("kernel_helpers", "ops_helpers")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # the interpreter is one thread of Python
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _exact_convolutions() -> None:
    # cuDNN's default is TF32, which no comparison of two backends survives
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def _faster_interpreter() -> Iterator[None]:
    """Leaves out what takes half of the interpreter's time and changes no result.

    It patches triton.language anew in every call of a device function, and finds out whether any sum or product of
    integers overflows, which it then keeps to itself (one test of test_forms.py has it say so).
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    real, patched = interpreter._patch_lang, set()

    def patch(function: Any) -> Any:
        languages = {
            m.__name__ for m in function.__globals__.values() if m is interpreter.tl or m is interpreter.tl.core
        }
        if languages <= patched:
            return interpreter._LangPatchScope()
        outermost, scope = not patched, real(function)
        patched.update(languages)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patch)
        change.setattr(
            interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)
        )
        yield


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's kernels run."""
    return torch.device(request.param)


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, Any], None]]:
    """Replaces what launches are chosen by, and forgets the schedules that were made with the old and the new."""
    from nearfield.ops.cache import SCHEDULES

    SCHEDULES.clear()
    yield monkeypatch.setattr
    SCHEDULES.clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Name and constants of every kernel that a test launches, in order."""
    from nearfield.ops.triton.launcher import Launcher

    made: list[tuple[str, dict[str, Any]]] = []
    launch = Launcher.__call__

    def spy(self: Launcher, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        module, name = kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__.removesuffix("_kernel")
        made.append((f"{module}.{name}", self.constants | constants))
        launch(self, kernel, programs, *args, **constants)

    monkeypatch.setattr(Launcher, "__call__", spy)
    return made
