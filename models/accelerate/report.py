"""What ``accelerate`` did to a model, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from .replacement import Replacement


class Report:
    """Which modules run on ``nearfield.ops`` now and which were left; prints as a few lines.

    Attributes:
        replaced: name of each replaced module -> file and class in timm, "davit.SpatialBlock".
        left: name of each module that was left as it is -> the reason.
    """

    def __init__(self, modules: Mapping[str, nn.Module], left: Mapping[str, str]) -> None:
        self.replaced = {name: kind_of(module) for name, module in modules.items()}
        self.left = dict(left)
        self._modules = list(modules.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of replaced modules of each kind."""
        return dict(Counter(self.replaced.values()))

    def undo(self) -> None:
        """Give the replaced modules timm's code back; whatever happened to their weights since stays."""
        for module in self._modules:
            restore(module)

    def __str__(self) -> str:
        lines = [f"nearfield runs the attention of {len(self.replaced)} modules:"]
        lines += [f"  {count} x {kind}" for kind, count in self.counts.items()]
        if self.left:
            lines.append(f"{len(self.left)} left as they are:")
            lines += [f"  {reason}: {', '.join(names)}" for reason, names in self._by_reason().items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _by_reason(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            found.setdefault(reason, []).append(name)
        return found


def kind_of(module: nn.Module) -> str:
    """timm's name for the class of a module, replaced or not: file and class."""
    published = module.published if isinstance(module, Replacement) else type(module)
    return f"{published.__module__.rpartition('.')[2]}.{published.__name__}"


def restore(module: nn.Module) -> None:
    """Undo the replacement of one module; one that is not replaced stays as it is."""
    if isinstance(module, Replacement):
        module.__class__ = module.published  # type: ignore[assignment]
