"""Launches of one kernel with the same constants, of which only the first looks for compiled code."""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel

__all__ = ["Launcher"]


class Launcher:
    """Launches a kernel at one site.

    Triton finds the code of a launch by specialising all of its arguments anew. At one site they specialise alike:
    dtypes, strides and the alignment of pointers are those of the site, and sizes are not specialised on
    (`primitives.SIZES`). So compiled code is kept.

    Attributes:
        constants: of the kernel, and Triton's options, by name.
    """

    __slots__ = ("_compiled", "constants")

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants
        self._compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __call__(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Launch `programs` programs on `args`; `constants` differ between calls at one site."""
        key = tuple(constants.values())
        found = self._compiled.get(key)
        if found is not None:
            compiled, rest = found
            compiled[programs, 1, 1](*args, *rest)
            return
        every = self.constants | constants
        compiled = kernel[programs,](*args, **every)
        # An interpreted kernel returns nothing. On AMD, code also depends on whether a tensor lies within 2 GB.
        if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
            self._compiled[key] = compiled, tuple(every[name] for name in kernel.arg_names[len(args) :])
