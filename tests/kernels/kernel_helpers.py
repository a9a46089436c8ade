"""What the kernel tests share: routed calls, and how far from the truth a kernel may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from unittest import mock

import torch
from nearfield.ops.reference import reference_routing
from nearfield.ops.routing import Regions, cut_regions
from ops_helpers import OPS, term_sizes
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


class Call(Protocol):
    """What `ops_helpers.Case` and `Routed` have in common."""

    leaves: list[Tensor]
    grad: Tensor

    @property
    def names(self) -> list[str]: ...

    @property
    def terms(self) -> int: ...

    def to(self, kind: torch.dtype | torch.device) -> Any: ...

    def run(self, backend: str) -> list[Tensor]: ...


@dataclass
class Routed:
    """Inputs of one routed call, its routes among them: near-equal scores would choose others in another dtype."""

    leaves: list[Tensor]
    grad: Tensor
    routes: Tensor
    regions: Regions
    zero_pad: bool
    scale: float
    view: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None, Tensor | None]] = field(
        default=lambda leaves: (leaves[0], leaves[1], leaves[2])
    )

    @property
    def names(self) -> list[str]:
        return ["out", "qkv"] if len(self.leaves) == 1 else ["out", "q", "k", "v"]

    @property
    def terms(self) -> int:
        return self.leaves[0].shape[-1] + self.routes.shape[2] * self.regions.tokens

    def to(self, kind: torch.dtype | torch.device) -> Routed:
        routes = self.routes.to(kind) if isinstance(kind, torch.device) else self.routes
        return replace(self, leaves=[t.to(kind) for t in self.leaves], grad=self.grad.to(kind), routes=routes)

    def run(self, backend: str) -> list[Tensor]:
        """Output and the gradient of every leaf."""
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves]
        q, k, v = self.view(leaves)
        if backend == "reference":
            parts = q.unbind(3) if k is None else (q, k, v)
            out = reference_routing(*parts, self.routes, self.regions, self.zero_pad, self.scale)  # type: ignore[arg-type]
        else:
            size = [self.regions.size_y, self.regions.size_x]
            out, _ = OPS.routing_attention(q, k, v, self.routes, None, size, self.zero_pad, self.scale, 0.0, backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))]


def make_routed(
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    topk: int,
    *,
    zero_pad: bool = False,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    value_dim: int | None = None,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    routes: Tensor | None = None,
) -> Routed:
    regions = cut_regions(height, width, None, region_size)
    if routes is None:
        routes = torch.rand(batch, regions.count, regions.count).argsort(-1)[..., :topk].contiguous()

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).to(dtype)

    shape = (batch, height, width)
    dims = (head_dim, head_dim, value_dim or head_dim)
    leaves = [tensor(*shape, 3, heads, head_dim)] if packed else [tensor(*shape, heads, d) for d in dims]
    made = Routed(leaves, tensor(*shape, heads, dims[2]), routes, regions, zero_pad, head_dim**-0.5)
    return replace(made, view=lambda t: (t[0], None, None)) if packed else made


# --- how far from the truth -------------------------------------------------------------------------------------------


def in_its_own_precision() -> AbstractContextManager[Any]:
    """Inside it the reference does all its arithmetic in the dtype it is given, as plain eager attention would."""
    return mock.patch.object(torch, "promote_types", lambda a, b: a)


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def assert_matches(call: Call) -> None:
    """Error of the kernels <= what an eager run in the same dtype makes + what rounding a sum may cost.

    The ruler is the float64 reference on the same (rounded) inputs. For the largest error the eager run holds scores and
    weights in float32, as the kernels do, and the budget, relative to the size of what is summed, is sqrt(terms) * unit
    roundoff and what exp makes of a score rounded in float32. The error's root mean square, which sees what is a little
    wrong everywhere, is held against that of an eager run with all arithmetic in the inputs' dtype.
    """
    ruler, eager, got = call.to(torch.float64).run("reference"), call.run("reference"), call.run("triton")
    with in_its_own_precision():
        plain = call.run("reference")
    sizes, largest_score = term_sizes(call)  # type: ignore[arg-type]
    unit = torch.finfo(call.leaves[0].dtype).eps / 2
    of_exp = (1 + largest_score) * torch.finfo(torch.float32).eps  # of the score and of its row's log-sum-exp
    leaves = [call.leaves[0], *call.leaves]
    for name, want, easy, low, have, leaf, size in zip(
        call.names, ruler, eager, plain, got, leaves, sizes, strict=True
    ):
        assert (have.dtype, have.shape) == (leaf.dtype, want.shape), name
        assert torch.isfinite(have).all(), name
        budgets = {
            "largest": (largest(easy, want) + (call.terms**0.5 * unit + of_exp) * size, largest(have, want)),
            "rms": (rms(low.double() - want) + (unit + of_exp) * (rms(want) + 1e-3 * size), rms(have.double() - want)),
        }
        for kind, (allowed, error) in budgets.items():
            assert error <= allowed, f"{name}: {kind} error {error:.2e} exceeds {allowed:.2e}"


def largest(have: Tensor, want: Tensor) -> float:
    return (have.double() - want).abs().max().item()
