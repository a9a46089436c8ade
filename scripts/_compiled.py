"""Compiling the kernels of a call for a GPU that is not there, and what the machine code says of them.

A call is made on CPU tensors with Triton's launch replaced by a recorder; what it recorded is compiled ahead of time.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from _sass import MachineCode, disassembled
from nearfield.ops.cache import SCHEDULES
from nearfield.ops.triton import configs
from nearfield.ops.triton.configs import Config
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["PROCESSORS", "Compiled", "Launch", "Processor", "compile_launch", "recorded", "resources", "target"]

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, where it has one


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor holds at once.

    Attributes:
        registers, threads, programs: at most.
        shared: bytes of shared memory, of which every program also takes `RESERVED`.
        program_shared: bytes that one program may take.
    """

    threads: int
    programs: int
    shared: int
    program_shared: int
    registers: int = 65536


RESERVED = 1024
# Technical specifications per compute capability, CUDA C++ programming guide; gfx942: CDNA 3 ISA, shared memory only.
PROCESSORS = {
    "sm_80": Processor(2048, 32, 164 << 10, 163 << 10),
    "sm_86": Processor(1536, 16, 100 << 10, 99 << 10),
    "sm_89": Processor(1536, 24, 100 << 10, 99 << 10),
    "sm_90": Processor(2048, 32, 228 << 10, 227 << 10),
    "sm_100": Processor(2048, 32, 228 << 10, 227 << 10),
    "sm_120": Processor(1536, 24, 100 << 10, 99 << 10),
    "gfx942": Processor(2048, 32, 64 << 10, 64 << 10),
}


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
def recorded(arch: str = "sm_90", rows: Mapping[str, Config] | None = None) -> Iterator[list[Launch]]:
    """Inside the block kernels are not run; their launches are appended to the list. Results of calls are garbage.

    rows: configurations by operation, instead of the shipped ones.
    """
    launches: list[Launch] = []
    given = rows or {}

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, arguments, options, tuple(grid)))

    instead = {
        "architecture": lambda device: arch,
        "choose": lambda op, *where: given.get(op) or configs.choose(op, *where),
        "known": lambda op, *where: op in given or configs.known(op, *where),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        users = [m for name, m in sys.modules.items() if name.startswith("nearfield.ops.triton.") and m is not configs]
        for module in users:
            for name in instead.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, instead[name]))
        SCHEDULES.clear()  # what calls were made ready for is kept there, and says nothing of the architecture
        stack.callback(SCHEDULES.clear)
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
        arch: what it was compiled for.
        registers, spill_bytes: as ptxas reports them, per thread; None where the target has no ptxas.
        shared_bytes: static and dynamic shared memory of a program. tensor_columns: of tensor memory.
        assembly: PTX, or AMD assembly. code: machine code, None where it was not asked for.
        warps: of 32 threads, 64 on AMD.
    """

    arch: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int
    tensor_columns: int
    assembly: str
    code: MachineCode | None
    warps: int

    @property
    def matrix_instructions(self) -> int:
        """Matrix-unit instructions in the code."""
        return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_", self.assembly))

    @property
    def async_copies(self) -> int:
        """Asynchronous copies into shared memory in the code."""
        return len(re.findall(r"cp\.async\.(?:cg|ca)|cp\.async\.bulk", self.assembly))

    def programs(self, arch: str | None = None) -> int:
        """Programs that a multiprocessor holds at once; of another architecture, as if its code took the same."""
        assert self.registers is not None
        sm = PROCESSORS[arch or self.arch]
        if self.shared_bytes > sm.program_shared:
            return 0
        # Registers are given to warps by 256, and each quarter of a multiprocessor has its own.
        warps = sm.registers // 4 // (-(-self.registers * 32 // 256) * 256) * 4
        limits = [warps // self.warps, sm.threads // (32 * self.warps), sm.programs]
        limits.append(sm.shared // (-(-self.shared_bytes // 128) * 128 + RESERVED))
        if self.tensor_columns:
            limits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)


def compile_launch(launch: Launch, arch: str, *, sass: bool = False) -> Compiled:
    """Compile a recorded launch for an architecture.

    Raises:
        RuntimeError: ptxas refuses the code, as where it takes more shared memory than there is.
    """
    signature, constants, aligned = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1 and not param.do_not_specialize:  # a kernel of its own for 1, and for multiples of 16
            signature[param.name], constants[(i,)] = "constexpr", 1
        else:
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=target(arch), options=dict(launch.options))
    shared, warps = int(made.metadata.shared), int(made.metadata.num_warps)
    if not arch.startswith("sm_"):
        return Compiled(arch, None, None, shared, 0, made.asm["amdgcn"], None, warps)
    registers, spills = resources(made.asm, arch)
    columns = int(getattr(made.metadata, "tmem_size", 0) or 0)
    code = disassembled(made.asm["cubin"]) if sass else None
    return Compiled(arch, registers, spills, shared, columns, made.asm["ptx"], code, warps)


def resources(asm: Mapping[str, Any], arch: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    if all(int(stack) == 0 for _, stack in found):  # spilled registers would lie there
        return max(int(n) for n, _ in found), 0
    name = re.search(r"\.target\s+(sm_\w+)", asm["ptx"])
    assert name is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(asm["ptx"])
        file.flush()
        command = [get_ptxas(int(arch[3:])).path, "-v", f"--gpu-name={name[1]}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
