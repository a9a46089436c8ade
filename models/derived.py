"""Tensors computed from parameters, in full precision; kept for evaluation as long as the parameters do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Derived:
    """Keeps the last tensor that was computed from a module's parameters.

    It is computed anew where a gradient may be wanted, where a graph is recorded (compile, export, CUDA graphs: it
    belongs into the graph), and after any change of a parameter that PyTorch counts or that moves it. A change through
    ``.data`` is not counted: the module calls ``clear`` when it goes in or out of training. Copies and pickles of a
    module begin empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was computed."""
        self._of: tuple[Tensor, ...] = ()
        self._state: Hashable = None
        self._tensor: Tensor | None = None

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

    def get(self, parameters: Sequence[Tensor], key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave the last time.

        Args:
            parameters: all that it reads.
            key: all else that decides the result.
            compute: makes the tensor, on the device of the parameters.
        """
        if not _may_keep(parameters):
            return compute()
        state = (key, [(p._version, p.data_ptr(), p.device, p.dtype) for p in parameters])
        same = len(self._of) == len(parameters) and all(a is b for a, b in zip(self._of, parameters, strict=True))
        if self._tensor is None or not same or state != self._state:
            # a tensor born in inference mode could not take part in a later training step
            with torch.inference_mode(False), torch.no_grad():
                made = compute()
            if type(made) is not Tensor:  # fake, or wrapped by a transform that ends
                return made
            if made.is_cuda:
                # other streams read it without waiting
                torch.cuda.current_stream(made.device).synchronize()
            self._of, self._state, self._tensor = tuple(parameters), state, made
        return self._tensor


def _may_keep(parameters: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not parameters:
        return False
    # swapped in by functional_call, fake, sharded; or without a version, as made in inference mode
    if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
        return False
    return not (parameters[0].is_cuda and torch.cuda.is_current_stream_capturing())


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or ``dtype`` where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def in_wide_precision(network: nn.Module, x: Tensor) -> Tensor:
    """What a small network makes of ``x``, which is float32 or wider, in its dtype: outside autocast.

    For tables of biases. Rounded to half precision, an entry of up to 16 (SwinV2's) would be off by more than most
    differences between entries.
    """
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        parameters = dict(network.named_parameters())
        if not parameters:  # quantised layers, and replicas of nn.DataParallel
            weights = (getattr(module, "weight", None) for module in network.modules())
            return network(x.to(next((w.dtype for w in weights if isinstance(w, Tensor)), x.dtype)))
        if all(p.dtype == x.dtype for p in parameters.values()):
            return network(x)
        return functional_call(network, {name: p.to(x.dtype) for name, p in parameters.items()}, x)
