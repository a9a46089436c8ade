"""What the model tests share: models without memory, weights that matter, golden files, the work of a model."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import nearfield
import numpy as np
import torch
from nearfield.models.halonet import HaloAttention
from nearfield.models.maxvit import MaxViTRW, PartitionAttention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Model = TypeVar("Model", bound=nn.Module)

_TABLE = re.compile(r"position_bias|rel_pos_bias|relative_position_bias_table|(height|width)_rel$|logit_scale$")


def is_nano(name: str) -> bool:
    """Whether a model is one of this package's own for small images, of which nothing is published."""
    return re.search(r"_nano(_\d+)?$", name) is not None


@cache
def on_meta(name: str, **options: Any) -> Any:
    """The model of a name, as large as it is, in evaluation mode and without memory; shared, so not to be changed."""
    with torch.device("meta"):
        return nearfield.create_model(name, **{"num_classes": 1000} | options).eval()


@torch.no_grad()
def randomise(model: Model) -> Model:
    """Weights and statistics that make every part of a model or module matter, with maps of ordinary size.

    As made, tables, layer scales and last norms are about zero; and equal weights would hide that two were exchanged.
    """
    for name, p in model.named_parameters():
        if _TABLE.search(name):
            p.normal_()
        elif p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            # biases above zero: gates of a few channels have rectifiers, which would all be shut for some
            p.normal_(1.0 if name.endswith(("weight", "gamma")) else 0.5, 0.1)
    for name, statistic in model.named_buffers():
        if name.endswith("running_var"):
            statistic.uniform_(0.5, 1.5)
    return model


def _by_value(cost: int) -> Callable[..., int]:
    """A formula of FlopCounterMode: so many multiply-adds for each value of the first argument."""
    return lambda shape, *_, **__: 2 * cost * math.prod(shape)


# as fvcore counts them in evaluation
_NORMS = {
    torch.ops.aten.native_batch_norm: _by_value(2),
    torch.ops.aten._native_batch_norm_legit_no_training: _by_value(2),
    torch.ops.aten.native_layer_norm: _by_value(5),
}


def multiply_adds(model: nn.Module) -> dict[str, int]:
    """Multiply-adds of one image of the model's own size: ``products``, and what other counters add to them.

    ``norms``: of values that pass a norm. ``whole tables``: timm's halo attention multiplies each query by all rows of
    both tables, those of no key among them. ``look-ups``: MaxViT's code and timm's after it spread a table of biases
    over pairs of tokens by products with one-hot matrices, an axis at a time, once a call.
    """
    tables: list[int] = []

    def multiplies_tables(attn: HaloAttention, given: tuple[Tensor], y: Tensor) -> None:
        queries = given[0][:, 0].numel() // attn.step**2 * attn.num_heads
        rows = sum(2 * (block + 2 * halo) - 1 for block, halo in zip(attn.block_size, attn.halo_size, strict=True))
        tables.append(queries * rows * attn.head_dims[0])

    hooks = [m.register_forward_hook(multiplies_tables) for m in model.modules() if isinstance(m, HaloAttention)]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NORMS) as counter:
        model(torch.empty(1, 3, *model.img_size, device="meta"))
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()["Global"]
    norms = sum(counts.get(op, 0) for op in _NORMS)
    lookups = 0
    for attn in model.modules():
        if isinstance(attn, PartitionAttention) and not isinstance(model, MaxViTRW):
            y, x = attn.size
            lookups += attn.num_heads * (y * y * (2 * x - 1) * (2 * y - 1) + y * y * x * x * (2 * x - 1))
    return {
        "products": (sum(counts.values()) - norms) // 2,
        "norms": norms // 2,
        "whole tables": sum(tables),
        "look-ups": lookups,
    }


GOLDEN = Path(__file__).parents[1] / "golden"
fill: Any = SimpleNamespace(**runpy.run_path(str(GOLDEN / "fill.py")))


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Tensor]]:
    """What a golden file says of itself, its arrays, and the weights that were filled from the names of its keys."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    left = set(meta["left_as_constructed"])
    state = {
        key: torch.zeros(shape, dtype=getattr(torch, dtype))
        if key in left
        else fill.value(key, shape, meta["conv_gain"])
        for key, shape, dtype in meta["keys"]
    }
    return meta, arrays, state
