"""What the kernel tests share: routed calls, what runs where, and how far from the truth a kernel may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from unittest import mock

import pytest
import torch
from nearfield.ops.reference import reference_routing
from nearfield.ops.routing import Regions, cut_regions
from ops_helpers import OPS, uncancelled
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


# --- what runs where --------------------------------------------------------------------------------------------------


def everywhere(
    names: str, values: Sequence[Any], *, fast: Iterable[int] = (), fast_on_gpu: Iterable[int] = ()
) -> pytest.MarkDecorator:
    """Parametrises a test by the `device` its kernels run on and by `names`; values whose number is not fast are slow.

    Interpreted, a call takes about a second; on a GPU, compiling its kernels takes several.
    """
    rows = []
    for place, marker, quick in (("cpu", "interpreted", set(fast)), ("cuda", "gpu", set(fast_on_gpu))):
        for number, value in enumerate(values):
            marks = [getattr(pytest.mark, marker), *([] if number in quick else [pytest.mark.slow])]
            row = value if isinstance(value, tuple) else (value,)
            ident = "-".join([marker, *(str(v).replace(" ", "").removeprefix("torch.") for v in row)])
            rows.append(pytest.param(place, *row, marks=marks, id=ident))
    return pytest.mark.parametrize(f"device, {names}", rows, indirect=["device"])


SLOW_ON_GPU = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.interpreted], id="interpreted"),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow], id="gpu"),
    ],
    indirect=True,
)


# --- how far from the truth -------------------------------------------------------------------------------------------


def in_its_own_precision() -> AbstractContextManager[Any]:
    """Inside it the reference does all its arithmetic in the dtype it is given, as plain eager attention would."""
    return mock.patch.object(torch, "promote_types", lambda a, b: a)


def roundoff(t: Tensor) -> float:
    """Unit roundoff of kernels on such tensors. Triton's interpreter cuts bfloat16 off, hardware rounds to nearest."""
    cuts_off = t.dtype == torch.bfloat16 and t.device.type == "cpu"
    return torch.finfo(t.dtype).eps / (1 if cuts_off else 2)


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_matches(call: Call) -> None:
    """Error of the kernels <= error of an eager run in the same dtype + what rounding a sum may cost.

    The ruler is the float64 reference on the same (rounded) inputs. For the largest error, the eager run holds scores
    and weights in float32, as the kernels do, and the budget, relative to the size of what is summed, is sqrt(terms) *
    unit roundoff and what exp makes of a score rounded in float32. For the root mean square, which sees small errors
    that are everywhere, the eager run does all arithmetic in the inputs' dtype, and the budget is one rounding.
    """
    ruler, terms, largest_score = uncancelled(call)
    eager, got = call.run("reference"), call.run("triton")
    with in_its_own_precision():
        plain = call.run("reference")
    of_exp = (1 + largest_score) * torch.finfo(torch.float32).eps  # of the score and of its row's log-sum-exp
    inputs = [call.leaves[0], *call.leaves]
    for name, want, term, easy, low, have, leaf in zip(
        call.names, ruler, terms, eager, plain, got, inputs, strict=True
    ):
        assert (have.dtype, have.shape) == (leaf.dtype, want.shape), name
        assert torch.isfinite(have).all(), name
        unit = max(roundoff(call.leaves[0]), torch.finfo(have.dtype).eps / 2)
        budget = (call.terms**0.5 * unit + of_exp) * max(largest(want), largest(term))
        assert_at_most(largest(have - want), largest(easy - want) + budget, f"largest error of {name}")
        budget = (unit + of_exp) * max(rms(want), rms(term))
        assert_at_most(rms(have - want), rms(low - want) + budget, f"rms error of {name}")


def assert_at_most(error: float, allowed: float, what: str) -> None:
    assert error <= allowed, f"{what}: {error:.2e} exceeds {allowed:.2e}"


def largest(t: Tensor) -> float:
    return t.abs().max().item()
