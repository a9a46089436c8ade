"""What is computed: an attention on a shape, its inputs, and a runner that computes output and gradients of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from nearfield.ops import local_attention, resolve, routing_attention
from nearfield.ops.patterns import Pattern
from torch import Tensor

Named = Mapping[str, Tensor]

OUTPUT, OF_QKV, OF_TABLE = "output", "gradient of qkv", "gradient of the bias"

# Largest error allowed, as the norm of the difference over the norm of the reference: some roundings of the dtype.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
PEERS_MAY = 8.0  # times that: they may round scores, weights and sums; another function is off by far more


@dataclass(frozen=True)
class Shape:
    """A map of tokens and its heads."""

    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"B{self.batch} {self.height}x{self.width} C{self.channels} h{self.heads} d{self.head_dim}"

    @property
    def dtype_name(self) -> str:
        """As the tables print it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.height * self.width

    def small(self, size: int, batch: int) -> Shape:
        """The same on a small square map, with fewer images."""
        return replace(self, batch=min(batch, self.batch), height=size, width=size)


@dataclass(frozen=True)
class Local:
    """`local_attention` with a pattern and, if asked for, a learned bias."""

    pattern: Pattern
    bias: Literal["none", "table", "positions", "decomposed"] = "none"

    def tables(self, shape: Shape) -> list[tuple[int, ...]]:
        """Shapes of the bias."""
        resolved = resolve(self.pattern, shape.height, shape.width)
        y, x = resolved.y, resolved.x
        if self.bias == "none":
            return []
        if self.bias == "positions":
            return [(shape.heads, 2 * shape.height - 1, 2 * shape.width - 1)]
        if self.bias == "decomposed":
            return [(2 * axis.rel_reach + 1, shape.head_dim) for axis in (y, x)]
        curve = self.pattern.curve is not None
        return [(shape.heads, 2 * y.reach + 1) if curve else (shape.heads, 2 * y.reach + 1, 2 * x.reach + 1)]

    def __call__(self, backend: str, qkv: Tensor, *tables: Tensor) -> Tensor:
        """The public operator."""
        bias = None if not tables else tables[0] if len(tables) == 1 else (tables[0], tables[1])
        return local_attention(qkv, None, None, self.pattern, bias=bias, backend=backend)


@dataclass(frozen=True)
class Routed:
    """`routing_attention` with regions x regions regions of each map, scaled as BiFormer's models scale it."""

    regions: int
    topk: int

    def tables(self, shape: Shape) -> list[tuple[int, ...]]:
        """It has no bias."""
        return []

    def __call__(self, backend: str, qkv: Tensor, *tables: Tensor) -> Tensor:
        """The public operator."""
        scale = (qkv.shape[4] * qkv.shape[5]) ** -0.5
        regions = (self.regions, self.regions)
        return routing_attention(qkv, None, None, regions, self.topk, scale=scale, backend=backend)


Attention = Local | Routed


@dataclass(frozen=True)
class Inputs:
    """The packed projection (B, H, W, 3, heads, head_dim), float32 bias tables and an output gradient."""

    qkv: Tensor
    tables: tuple[Tensor, ...]
    grad: Tensor

    @staticmethod
    def make(attention: Attention, shape: Shape, place: torch.device) -> Inputs:
        """Drawn with a fixed seed: leaves that require gradients, and a gradient in the shape of the output."""
        generator = torch.Generator(place).manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=place).to(dtype)

        b, h, w, heads, d = shape.batch, shape.height, shape.width, shape.heads, shape.head_dim
        qkv = draw(b, h, w, 3, heads, d).requires_grad_()
        tables = tuple(draw(*size, dtype=torch.float32).requires_grad_() for size in attention.tables(shape))
        return Inputs(qkv, tables, draw(b, h, w, heads, d))

    def double(self) -> Inputs:
        """The same values in float64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.qkv, *self.tables)]
        return Inputs(leaves[0], tuple(leaves[1:]), self.grad.double())


def _as_it_is(output: Tensor) -> Tensor:
    return output


def _of_projection(gradients: Sequence[Tensor]) -> Named:
    of_qkv, *of_tables = gradients
    tables = {OF_TABLE if i == 0 else f"{OF_TABLE}, {i + 1}": gradient for i, gradient in enumerate(of_tables)}
    return {OF_QKV: of_qkv, **tables}


@dataclass(frozen=True)
class Runner:
    """One way to compute a problem.

    Args:
        attend: computes the output, or several, from the leaves.
        leaves: what gets gradients.
        grads: a gradient for each output.
        output: the first output as (B, H, W, heads, head_dim), the form in which runners of a problem are compared.
        gradients: those of the leaves, by name, in the form in which they are compared.
        same: whether it computes the same as the others at all.
        note: what a reader should know.
    """

    attend: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    output: Callable[[Tensor], Tensor] = _as_it_is
    gradients: Callable[[Sequence[Tensor]], Named] = _of_projection
    same: bool = True
    note: str = ""

    @cached_property
    def _fixed(self) -> tuple[Tensor, ...]:
        return tuple(leaf.detach() for leaf in self.leaves)

    def forward(self) -> Tensor:
        """The first output, as in inference."""
        with torch.no_grad():
            return self._outputs(self._fixed)[0]

    def training(self) -> tuple[Tensor, ...]:
        """The first output and the gradient of each leaf."""
        outputs = self._outputs(self.leaves)
        return outputs[0].detach(), *torch.autograd.grad(outputs, self.leaves, self.grads)

    def named(self, result: Tensor | tuple[Tensor, ...]) -> Named:
        """What `forward` or `training` returned, by name."""
        if isinstance(result, Tensor):
            return {OUTPUT: self.output(result)}
        return {OUTPUT: self.output(result[0]), **self.gradients(result[1:])}

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A call that computes the gradients alone, of one forward pass that is kept."""
        outputs = self._outputs(self.leaves)
        return lambda: torch.autograd.grad(outputs, self.leaves, self.grads, retain_graph=True)

    def _outputs(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result = self.attend(*leaves)
        return result if isinstance(result, tuple) else (result,)


def ours(attention: Attention, inputs: Inputs, backend: str) -> Runner:
    """Nearfield's public operator on a named backend."""

    def attend(qkv: Tensor, *tables: Tensor) -> Tensor:
        return attention(backend, qkv, *tables)

    return Runner(attend, (inputs.qkv, *inputs.tables), (inputs.grad,))


def relative_errors(got: Named, want: Named) -> dict[str, float]:
    """Norm of the difference over the norm of what is wanted, of the tensors that both name; inf where not finite."""
    errors = {}
    for key in want:
        if key in got:
            a, b = got[key].detach().double(), want[key].detach().double()
            if a.shape != b.shape:
                raise ValueError(f"{key} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            error = float((a - b).norm() / b.norm().clamp_min(1e-30))
            errors[key] = error if error == error else float("inf")
    return errors


def against_reference(attention: Attention, shape: Shape, backend: str, place: torch.device) -> dict[str, float]:
    """Errors of our output and gradients against the dense definition in float64, on the same rounded inputs."""
    inputs = Inputs.make(attention, shape, place)
    got = ours(attention, inputs, backend)
    want = ours(attention, inputs.double(), "reference")
    return relative_errors(got.named(got.training()), want.named(want.training()))


def distinct_results(runner: Runner, repeats: int) -> int:
    """How many bitwise different results some repeats of forward and backward give; 1 is wanted."""
    kept: list[tuple[Tensor, ...]] = []
    for _ in range(repeats):
        result = runner.training()
        if not any(all(torch.equal(a, b) for a, b in zip(result, other, strict=True)) for other in kept):
            kept.append(result)
    return len(kept)
