"""Compiling the kernels of a call for a GPU that is not there, and what the machine code says of them.

A call is made on CPU tensors with Triton's launch replaced by a recorder; what it recorded is compiled ahead of time.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["Compiled", "Launch", "compile_launch", "recorded", "target"]

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its arguments by name, its launch options, and its programs."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Module and kernel, as in "neighborhood.forward_kernel"."""
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[1]}.{self.kernel.fn.__name__}"


@contextmanager
def recorded(arch: str = "sm_90") -> Iterator[list[Launch]]:
    """Inside the block kernels are not run; their launches are appended to the list. Results of calls are garbage."""
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, arguments, options, tuple(grid)))

    from nearfield.ops.triton import local, routed

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(local, "architecture", lambda device: arch),
        mock.patch.object(routed, "architecture", lambda device: arch),
    ):
        yield launches


def target(arch: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton names it."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel is made of.

    Attributes:
        registers, spill_bytes: as ptxas reports them, per thread; None where the target has no ptxas.
        shared_bytes: static and dynamic shared memory of a program.
        assembly: PTX, or AMD assembly. sass: machine code, empty where it was not asked for.
    """

    registers: int | None
    spill_bytes: int | None
    shared_bytes: int
    assembly: str
    sass: str
    threads: int

    @property
    def matrix_instructions(self) -> int:
        """Matrix-unit instructions in the code."""
        return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_", self.assembly))

    @property
    def async_copies(self) -> int:
        """Asynchronous copies into shared memory in the code."""
        return len(re.findall(r"cp\.async\.(?:cg|ca)|cp\.async\.bulk", self.assembly))

    def programs_per_sm(self, registers: int = 65536, shared: int = 227 << 10, threads: int = 2048) -> int:
        """Programs that fit one multiprocessor of an H100 or H200 at once."""
        assert self.registers is not None
        per_warp = -(-self.registers * 32 // 256) * 256
        limits = [registers // (per_warp * self.threads // 32), threads // self.threads]
        return min([*limits, shared // max(self.shared_bytes + 1024, 1)])

    def loop(self) -> list[str]:
        """Instructions of the innermost loop that holds matrix instructions, of all code where there is no such loop."""
        code: list[str] = []
        labels: dict[str, int] = {}
        best: list[str] | None = None
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(code)
            elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(found[1].strip())
                jump = re.search(r"BRA.*`\((\.L_\w+)\)", code[-1])
                body = code[labels[jump[1]] :] if jump and jump[1] in labels else []
                if any("MMA" in text for text in body) and (best is None or len(body) < len(best)):
                    best = body
        return best if best is not None else code


def compile_launch(launch: Launch, arch: str, *, sass: bool = False) -> Compiled:
    """Compile a recorded launch for an architecture."""
    signature, constants, aligned = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1:  # Triton compiles a kernel of its own for 1, and for multiples of 16
            signature[param.name], constants[(i,)] = "constexpr", 1
        else:
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=target(arch), options=dict(launch.options))
    shared, threads = int(made.metadata.shared), int(made.metadata.num_warps) * target(arch).warp_size
    if not arch.startswith("sm_"):
        return Compiled(None, None, shared, made.asm["amdgcn"], "", threads)
    registers, spills = _ptxas(made.asm["ptx"], arch)
    return Compiled(registers, spills, shared, made.asm["ptx"], _sass(made.asm["cubin"]) if sass else "", threads)


def _ptxas(ptx: str, arch: str) -> tuple[int, int]:
    name = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert name is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(int(arch[3:])).path, "-v", f"--gpu-name={name[1]}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True, check=True).stdout


Call = Callable[[], object]
