"""How tensors reach the kernels: strides as compile-time constants, alignment, precision, device.

Kernels address a token by its number in the map, so rows of a map must follow each other at the distance of its width
(packed projections and channels-last maps do). Anything else is copied once, with a notice.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LOG2_E",
    "Strides",
    "call_constants",
    "constants",
    "dense",
    "interpreting",
    "layout",
    "on_device",
    "power_of_two",
    "precision",
    "readable",
    "refusal",
    "units",
    "wide",
]

LOG2_E = 1.4426950408889634  # scores are held in units of it, so that exp2 serves
VECTOR = 8  # elements of 16 bytes in half precision: strides are multiples of it where kernels load whole vectors
MOST_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1, set before its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: makes that the tensors' own."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return nullcontext()


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, in one line; None where they can."""
    if q.device.type != "cuda" and not interpreting():
        return (
            f"backend 'triton' needs CUDA tensors, got {q.device.type}: move them, choose backend='torch', or set "
            "TRITON_INTERPRET=1 to interpret the kernels"
        )
    if _older_than_ampere(q.device):
        return f"backend 'triton' needs compute capability 8.0 or newer, which {q.device} has not: choose 'torch'"
    if q.dtype not in DTYPES:
        return f"backend 'triton' takes float16, bfloat16 and float32, got {q.dtype}: choose backend='torch'"
    if max(q.shape[-1], v.shape[-1]) > MOST_HEAD_DIM:
        return (
            f"backend 'triton' takes head_dim <= {MOST_HEAD_DIM}, got {max(q.shape[-1], v.shape[-1])}: choose 'torch'"
        )
    return None


def _older_than_ampere(device: torch.device) -> bool:
    # Not initialized: a fake tensor, traced where there is no GPU. torch.compile folds these calls into constants.
    if device.type != "cuda" or not torch.cuda.is_initialized() or torch.version.hip is not None:
        return False
    return bool(torch.cuda.get_device_properties(device).major < 8)


class Strides(NamedTuple):
    """Elements from one image, token and head to the next."""

    image: int
    token: int
    head: int


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> Strides | None:
    """Strides of a (B, H, W, heads, d) map, None where no single token stride describes it."""
    batch, height, width, heads, d = shape
    image, row, column, head, channel = stride
    token = column if width > 1 else row
    if height > 1 and width > 1 and row != width * column:
        return None
    if height == 1 and width == 1:
        token = heads * d
    found = Strides(image if batch > 1 else 0, token, head if heads > 1 else d)
    broadcast = min(found.token, found.head) < 1 or (batch > 1 and found.image < 1)
    return None if broadcast or (d > 1 and channel != 1) else found


def readable(t: Tensor, name: str = "") -> Tensor:
    """The tensor, or a contiguous copy where kernels cannot address it; says so where it has a name."""
    if t.data_ptr() % 16 == 0 and _strides(t.shape, t.stride()) is not None:
        return t
    if name:
        warnings.warn(
            f"nearfield's kernels cannot read {name} of strides {tuple(t.stride())} in place and copy it: "
            "give maps whose rows follow each other and whose last axis is dense",
            stacklevel=2,
        )
    return t.clone(memory_format=torch.contiguous_format)


def dense(t: Tensor) -> Tensor:
    """A bias tensor as kernels read it: contiguous, and aligned as their inputs are."""
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def layout(**tensors: Tensor) -> tuple[tuple[str, Strides], ...]:
    """Strides of tensors that are readable, by their name in the kernels."""
    return tuple((name, _strides(t.shape, t.stride())) for name, t in tensors.items())  # type: ignore[misc]


def units(strides: dict[str, Strides]) -> int:
    """Largest power of two up to a vector that divides every image stride, which kernels take in such units."""
    return gcd(VECTOR, *(s.image for s in strides.values()))


def constants(strides: dict[str, Strides]) -> dict[str, int]:
    """TOKEN and HEAD strides of each tensor, as kernels name them."""
    made: dict[str, int] = {}
    for name, s in strides.items():
        made |= {f"{name}_TOKEN": s.token, f"{name}_HEAD": s.head}
    return made


def wide(strides: dict[str, Strides], tokens: int, heads: int, row: int) -> bool:
    """Whether offsets inside one image need 64 bits; row: most entries that a token and head have in a dense tensor."""
    reach = [(tokens - 1) * s.token + (heads - 1) * s.head + row for s in strides.values()]
    return max(*reach, tokens * heads * row) >= 1 << 31


def call_constants(
    strides: dict[str, Strides], tokens: int, heads: int, d: int, dv: int, precision: str, *, row: int = 0
) -> dict[str, Any]:
    """What all attention kernels take; `row` as in `wide`, where it is more than a vector."""
    return {
        "HEADS": heads, "D": d, "DV": dv, "BLOCK_D": power_of_two(d), "BLOCK_DV": power_of_two(dv),
        "UNIT": units(strides), "WIDE": wide(strides, tokens, heads, max(d, dv, row)), "PRECISION": precision,
    }  # fmt: skip


def power_of_two(n: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what a matrix unit takes."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How products are taken: float32 exactly, unless torch.set_float32_matmul_precision allows TF32."""
    if _interpreted():
        return "widened"
    return "ieee" if dtype == torch.float32 and not _tf32_allowed() else "tf32"


_interpreted = cache(interpreting)  # settled where kernels are launched: Triton is imported


def _tf32_allowed() -> bool:
    """PyTorch's switch in either of its spellings; the older refuses to be read once the newer was set."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
