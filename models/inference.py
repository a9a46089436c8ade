"""When inference may compute in another way than training: in place, in pieces, by other operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

__all__ = ["ordinary_inference", "unhooked"]


def ordinary_inference(*tensors: Tensor) -> bool:
    """Whether these are tensors of PyTorch's own class and nobody traces, differentiates or vectorizes.

    To be asked first: whatever is asked of a tensor while a graph is made becomes a condition of that graph.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and all(type(x) is Tensor for x in tensors)
    )


def unhooked(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes and calling it runs its forward alone."""
    hooks = module._forward_hooks or module._forward_pre_hooks or modules._has_any_global_hook()
    return type(module) in kinds and not hooks and "forward" not in vars(module)
