"""The floor of a row of the GPU report: what `_floors` says of its operator on the device that it was measured on."""

from __future__ import annotations

import torch
from _floors import DEVICES, Call, Device, Floor, backward_floor, forward_floor
from _gpu_problems import Attention, Routed, Shape

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"

# Exact float32 products: what the kernels compute unless tf32 is asked for.
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def known_device(name: str) -> Device | None:
    """The device of `_floors` that a driver's name ("NVIDIA H200") means; None where its rates are not known."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key in words), None)


def call_of(attention: Attention, shape: Shape) -> Call:
    """The operator on the shape, as `_floors` takes it."""
    dtype = _NAMES[shape.dtype]
    if isinstance(attention, Routed):
        # every query sees topk of regions * regions regions; two passes make the gradients
        pairs = shape.tokens * shape.tokens * attention.topk // attention.regions**2
        return Call(shape.batch, shape.heads, shape.head_dim, shape.tokens, shape.tokens, pairs, False, dtype)
    return Call.of(attention.pattern, shape.batch, shape.height, shape.width, shape.heads, shape.head_dim, dtype)


def floors_of(attention: Attention, shape: Shape, what: str, device: Device) -> list[Floor]:
    """The floors that add up to that of a pass."""
    call = call_of(attention, shape)
    made = []
    if what in (FORWARD, BOTH):
        made.append(forward_floor(call, device))
    if what in (BACKWARD, BOTH):
        made.append(backward_floor(call, device))
    return made


def floor_us(attention: Attention, shape: Shape, what: str, name: str) -> tuple[float | None, str]:
    """Microseconds at best on the device of that name, and what bounds them; (None, "") on an unknown device."""
    device = known_device(name)
    floors = [] if device is None else floors_of(attention, shape, what, device)
    if not floors:
        return None, ""
    return 1e6 * sum(f.seconds for f in floors), max(floors, key=lambda f: f.seconds).bound
