"""Deterministic fill of a state dict, deterministic inputs, and feature sampling (numpy and torch only).

The golden files were made with exactly these functions: a change here invalidates them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TABLES = ("rpb", "relative_position_bias_table", "rel_pos", "pos_embed")
FIXED = ("attn_mask", "relative_coords_table", "seq_length_scale", "padding_mask", "fold.weights")  # never filled
DAMPED = ("pos_embed", "cpe", "dwconv1", "dwconv2")  # conv position encodings on the residual stream


def is_fixed(name: str, tensor: Tensor) -> bool:
    return (not tensor.is_floating_point()) or name.endswith(FIXED)


def is_table(name: str) -> bool:
    """Position tables proper; submodules that only carry such a name (convs, MLPs) end in .weight or .bias."""
    return any(part in name for part in TABLES) and name.rsplit(".", 1)[-1] not in ("weight", "bias")


def value(name: str, shape: Sequence[int], conv_gain: float = 1.15) -> Tensor:
    """The tensor of one parameter, seeded by the authors' own key name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    shape, rank = tuple(shape), len(shape)
    if name.endswith("running_var"):
        filled = 0.5 + rng.rand(*shape)
    elif name.endswith("running_mean"):
        filled = 0.1 * rng.randn(*shape)
    elif is_table(name):
        filled = 1.0 * rng.randn(*shape)
    elif rank <= 1 and name.endswith("bias"):  # q_bias and v_bias too
        filled = 0.1 * rng.randn(*shape)
    elif rank <= 1 or "gamma" in name:  # norm weights, layer scales, scalars, gammas of any rank
        filled = 1 + 0.1 * rng.randn(*shape)
    else:
        filled = rng.randn(*shape) / np.sqrt(np.prod(shape[1:]))
        if rank == 4:
            filled = filled * (0.3 if any(part in name for part in DAMPED) else conv_gain)
    return torch.from_numpy(np.asarray(filled, dtype=np.float32).reshape(shape))


@torch.no_grad()
def fill_(model: torch.nn.Module, conv_gain: float = 1.15) -> tuple[list[str], list[str]]:
    """Fills in place; returns the names that were filled and those that were left."""
    filled, left = [], []
    for name, tensor in model.state_dict().items():
        (left if is_fixed(name, tensor) else filled).append(name)
        if not is_fixed(name, tensor):
            tensor.copy_(value(name, tensor.shape, conv_gain).to(tensor.dtype))
    return filled, left


def make_input(height: int, width: int, batch: int = 2) -> Tensor:
    noise = np.random.RandomState(0).standard_normal((batch, 3, height, width))
    return torch.from_numpy(noise.astype(np.float32))


def make_structured(height: int, width: int, batch: int = 2) -> Tensor:
    """7x7 cells plus half-strength noise: the tokens differ much more than in pure noise."""
    cells = np.random.RandomState(1).standard_normal((batch, 3, 7, 7))
    cells = cells[:, :, (np.arange(height) * 7) // height][:, :, :, (np.arange(width) * 7) // width]
    noise = np.random.RandomState(2).standard_normal((batch, 3, height, width))
    return torch.from_numpy((cells + 0.5 * noise).astype(np.float32))


def sample(features: Tensor, count: int = 256) -> np.ndarray:
    """``count`` evenly strided values of an NCHW tensor's C-contiguous flattening."""
    flat = features.detach().contiguous().flatten().double().numpy()
    return flat[(np.arange(count, dtype=np.int64) * (flat.size - 1)) // (count - 1)].astype(np.float32)
