"""Launches that skip Triton's search for compiled code find the code that it would have found.

Triton runs up to the launch itself, for a GPU that need not be there: nothing is compiled, and nothing is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any
from unittest import mock

import pytest
import torch
from nearfield.ops import (
    Full,
    Halo,
    HilbertNeighborhood,
    HilbertWindow,
    Neighborhood,
    Pattern,
    Window,
    local_attention,
    routing_attention,
)
from ops_helpers import bias_shapes

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="interpreted kernels have no code: env -u TRITON_INTERPRET python -m pytest -c tests/pytest.ini "
        "tests/kernels -m aot",
    ),
]

DEVICES = count(7919)  # Triton keeps what it found for a device: one for each test


class Launches:
    """What was asked of a GPU: per launch the code, its programs and all of its arguments, in order."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.searched = 0
        self.options: dict[str, int] = {}

    def code(self, kernel: Any) -> Any:
        """What Triton would have compiled."""
        from triton.compiler import CompiledKernel

        def run(*given: Any) -> None:
            self.made.append((made, given[:3], given[9:]))

        made = object.__new__(CompiledKernel)
        made.module, made.function, made.packed_metadata, made._run = object(), None, (), run
        made.name, made.src, made.metadata = kernel.__name__, kernel, self.options
        return made


@pytest.fixture
def launches() -> Iterator[Launches]:
    """A process that believes in an H200 and never reaches it."""
    from nearfield.ops import attention
    from nearfield.ops.cache import SCHEDULES
    from nearfield.ops.triton import gradient, routed, site
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    seen = Launches()

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *_: Any) -> Any:
        made = self.device_caches[device][0][key] = seen.code(self)
        return made

    real = JITFunction.run

    def search(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.searched += 1
        seen.options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        return real(self, *args, **kwargs)

    believed = mock.Mock()
    believed.get_current_device.return_value = next(DEVICES)
    believed.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", believed))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
        stack.enter_context(mock.patch.object(JITFunction, "run", search))
        stack.enter_context(mock.patch.object(attention, "refusal", return_value=None))
        for module in (site, routed):
            stack.enter_context(mock.patch.object(module, "architecture", return_value="sm_90"))
        for forget in (SCHEDULES.clear, gradient._launcher.cache_clear):
            forget()
            stack.callback(forget)
        yield seen


def train(pattern: Pattern, kind: str, dtype: torch.dtype, d: int) -> Callable[[int], None]:
    def call(batch: int) -> None:
        qkv = torch.randn(batch, 16, 15, 3, 2, d).to(dtype).requires_grad_()
        tables = [torch.randn(s, requires_grad=True) for s in bias_shapes(pattern, 16, 15, 2, d, kind)]
        bias = {0: None, 1: tables[0] if tables else None, 2: tuple(tables)}[len(tables)]
        q, k, v = (qkv, None, None) if len(tables) < 2 else qkv.unbind(3)
        out = local_attention(q, k, v, pattern, bias=bias, backend="triton")
        out.backward(torch.randn(out.shape).to(dtype))
        with torch.no_grad():
            local_attention(q, k, v, pattern, bias=bias, backend="triton")

    return call


def train_routed(topk: int, region_size: int) -> Callable[[int], None]:
    def call(batch: int) -> None:
        q, k, v = torch.randn(3, batch, 16, 16, 2, 32).half().requires_grad_().unbind(0)
        out = routing_attention(q, k, v, None, topk, region_size=region_size, backend="triton")
        out.backward(torch.randn(out.shape).half())

    return call


CALLS = {
    "windows": train(Window(7, 3), "table", torch.bfloat16, 32),
    "windows, no bias, head_dim 10": train(Window(4), "none", torch.float16, 10),
    "windows of a curve by position": train(HilbertWindow(16), "positions", torch.bfloat16, 32),
    "neighborhoods": train(Neighborhood(7), "table", torch.bfloat16, 32),
    "neighborhoods of a curve": train(HilbertNeighborhood(9), "table", torch.float32, 24),
    "halos": train(Halo(4, 2), "decomposed", torch.bfloat16, 32),
    "everything": train(Full(), "none", torch.float16, 64),
    "lists of regions": train_routed(2, 8),
    "bits of regions": train_routed(6, 2),
}


@pytest.mark.filterwarnings("ignore:nearfield's kernels cannot read")
@pytest.mark.parametrize("name", CALLS)
def test_later_launches_are_those_that_triton_would_make(name: str, launches: Launches) -> None:
    from triton.runtime.jit import JITFunction

    CALLS[name](2)
    first, searched = list(launches.made), launches.searched
    assert searched >= len({id(code) for code, *_ in first}) >= 2
    launches.made.clear()
    CALLS[name](5)
    assert launches.searched == searched, "a site's code is searched for again"
    assert [code for code, *_ in launches.made] == [code for code, *_ in first]
    with mock.patch.object(JITFunction, "_do_compile", side_effect=AssertionError("other code")):
        for code, programs, args in list(launches.made):
            launches.made.clear()
            code.src[programs](**dict(zip(code.src.arg_names, args, strict=True)), **code.metadata)
            ((found, same, bound),) = launches.made
            assert found is code
            assert same == programs
            assert all(a is b for a, b in zip(args, bound, strict=True))


def test_tests_see_first_and_later_launches_alike(
    launches: Launches, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    for name in ("windows", "neighborhoods", "bits of regions"):
        seen = []
        for batch in (2, 3):
            launched.clear()
            launches.made.clear()
            CALLS[name](batch)
            assert len(launched) == len(launches.made)
            seen.append(list(launched))
        assert seen[0] == seen[1]


def test_no_size_of_a_map_is_compiled_in(launches: Launches) -> None:
    table = torch.randn(2, 13, 13, requires_grad=True)
    codes = []
    for pattern in (Window(7, 3), Neighborhood(7)):
        for height, width in ((56, 56), (63, 49), (112, 70)):
            launches.made.clear()
            q = torch.randn(2, height, width, 3, 2, 32).half().requires_grad_()
            local_attention(q, None, None, pattern, bias=table, backend="triton").sum().backward()
            codes.append([id(code) for code, *_ in launches.made])
        assert codes[-1] == codes[-2] == codes[-3]


def test_what_specialises_otherwise_is_searched_for(launches: Launches) -> None:
    q = torch.randn(2, 14, 14, 3, 2, 32).half()
    for table in (torch.randn(2, 13, 13), torch.randn(2, 13, 13).half()):
        for pattern in (Window(7), Neighborhood(7)):
            for batch in (1, 2):
                before = launches.searched
                local_attention(q[:batch], None, None, pattern, bias=table, backend="triton")
                assert launches.searched > before
                before = launches.searched
                local_attention(q[:batch], None, None, pattern, bias=table, backend="triton")
                assert launches.searched == before
