"""What the package can make: one entry per model name, filled by the families, read by the loader and the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .published import Published

TASKS = ("classification", "detection", "segmentation")

_DRAWING = {
    getattr(Tensor, name) for name in ("uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_")
}


class _Undrawn(TorchFunctionMode):
    """No weights are drawn: on the meta device that is most of the work of making a model."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if func in _DRAWING else func(*args, **(kwargs or {}))


def check_task(task: str | None) -> None:
    """ValueError for a task that is none of ``TASKS``; None is none in particular."""
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")


@dataclass(frozen=True)
class Variant:
    """A named set of constructor arguments.

    Attributes:
        name: as in ``create_model``.
        family: the backbone class.
        kwargs: constructor arguments that make it this variant.
        tasks: constructor arguments that differ for the images of a task of ``TASKS``, by task.
    """

    name: str
    family: type[Published]
    kwargs: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_task(self, task: str | None) -> dict[str, Any]:
        """Constructor arguments for a task, None for the one that the variant is registered for.

        Raises:
            ValueError: unknown task.
        """
        check_task(task)
        return {**self.kwargs, **self.tasks.get(task or "", {})}

    def build(self, **overrides: Any) -> Published:
        """The bare backbone, without the registry's configuration."""
        return self.family(**{**self.kwargs, **overrides})

    def skeleton(self) -> Published:
        """A new model of it on the meta device, for RGB images and without a classifier."""
        with torch.device("meta"), _Undrawn():
            return self.build(num_classes=0, in_chans=3)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the skeleton's state dict."""
        return {name: value.shape for name, value in self.skeleton().state_dict().items()}


_VARIANTS: dict[str, Variant] = {}


def add(variant: Variant) -> None:
    """Enter a variant; a name of another family that is taken already is a programming error."""
    taken = _VARIANTS.get(variant.name)
    assert taken is None or taken.family.__qualname__ == variant.family.__qualname__, f"two models {variant.name}"
    _VARIANTS[variant.name] = variant


def get(name: str) -> Variant | None:
    """The variant of that name (without tag), or None."""
    return _VARIANTS.get(name)


def variants() -> Iterator[Variant]:
    """All variants, in the order in which the families list them."""
    return iter(list(_VARIANTS.values()))
