"""Linear layers and MLPs as inference on a CPU computes them best: by oneDNN, in pieces that stay in the cache.

What a module computes does not change, but for the rounding of sums (some 1e-6 of the largest value). Whatever makes a
module more than its formula (a hook, a subclass in its place, a tensor of another kind, a tracer) has it called as is.
"""

from __future__ import annotations

from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .inference import ordinary_inference, unhooked

__all__ = ["Mlp", "add_mlp", "linear"]

FEW_TOKENS = 128  # below, oneDNN spends more on laying out the weights than it saves
PIECE_BYTES = 4 << 20  # hidden activations of a piece, for each thread
PIECE_TOKENS = 1024  # the least of a piece, for each thread: every piece reads the weights again


def _onednn() -> Any:
    """oneDNN's product with bias and activation (what TorchInductor calls), None where this PyTorch lacks it."""
    usable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if usable else None


_ONEDNN = _onednn()

if _ONEDNN is not None and _ONEDNN not in flop_registry:

    @register_flop_formula(_ONEDNN)
    def _product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * int(torch.Size(x).numel()) * int(weight[0])


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of an ``nn.Linear``: (..., in) to (..., out)."""
    if _ONEDNN is None or not _inference(x) or not _bare(layer, nn.Linear):
        return layer(x)
    return _product(x.reshape(-1, x.shape[-1]), layer).view(*x.shape[:-1], -1)


class Mlp(timm.layers.Mlp):
    """timm's MLP; its hidden activations never exist as a whole in inference on a CPU."""

    fc1: Any
    fc2: Any

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if not _inference(x) or not self.is_plain():
            return super().forward(x)
        tokens = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(tokens), self.fc2.out_features)
        size = _piece(tokens, self.fc1.out_features)
        for piece, part in zip(out.split(size), tokens.split(size), strict=True):
            piece.copy_(_product(_product(part, self.fc1, self.act), self.fc2))
        return out.view(*x.shape[:-1], -1)

    def is_plain(self) -> bool:
        """Whether two products with a GELU between them are all there is to compute."""
        drops = (self.drop1, self.drop2)
        return (
            _bare(self, Mlp)
            and _bare(self.fc1, nn.Linear)
            and _bare(self.fc2, nn.Linear)
            and _bare(self.act, nn.GELU)
            and _bare(self.norm, nn.Identity)
            and all(_bare(drop, nn.Dropout) and not (drop.training and drop.p) for drop in drops)
        )


def add_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, scale: nn.Module, drop: nn.Module) -> Tensor:
    """``x + drop(scale(mlp(norm(x))))``, stored in x itself in inference on a CPU: nobody else may need it."""
    plain = (
        _inference(x)
        and x.is_contiguous()
        and _bare(norm, nn.LayerNorm, timm.layers.LayerNorm)
        and isinstance(mlp, Mlp)
        and mlp.is_plain()
        and _bare(scale, nn.Identity, timm.layers.LayerScale)
        and _bare(drop, nn.Identity, timm.layers.DropPath)
        and not drop.training
    )
    if not plain:
        return x + drop(scale(mlp(norm(x))))
    tokens = x.view(-1, x.shape[-1])
    for piece in tokens.split(_piece(tokens, cast(Mlp, mlp).fc1.out_features)):
        piece.add_(scale(mlp(norm(piece))))
    return x


def _piece(tokens: Tensor, hidden: int) -> int:
    """Tokens at a time of an MLP with so many hidden channels, about the same in every piece."""
    most = torch.get_num_threads() * max(PIECE_TOKENS, PIECE_BYTES // (hidden * tokens.itemsize))
    return -(-len(tokens) // -(-len(tokens) // most))


def _inference(x: Tensor) -> bool:
    """Whether x is an ordinary float32 tensor on a CPU, large enough, in inference."""
    return (
        ordinary_inference(x)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= FEW_TOKENS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def _bare(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes, without hooks and with ordinary parameters."""
    return unhooked(module, *kinds) and all(
        type(p) is nn.Parameter and p.dtype == torch.float32 for p in module._parameters.values() if p is not None
    )


def _product(x: Tensor, layer: Any, act: Any = None) -> Tensor:
    """(n, in) to (n, out), through a GELU where one is given."""
    if _ONEDNN is None or not torch.backends.mkldnn.enabled:
        y = F.linear(x, layer.weight, layer.bias)
        return y if act is None else F.gelu(y, approximate=act.approximate)
    kind, algorithm = ("none", "") if act is None else ("gelu", act.approximate)
    return _ONEDNN(x, layer.weight, layer.bias, kind, [], algorithm)
