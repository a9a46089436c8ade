"""What all replacements share: the class that stands in for one of timm's, and when a module is left as it is.

A module is replaced by changing its class to a subclass of its own that overrides one method. Children, parameters,
buffers, hooks and attributes stay where they are, so state dicts, copies, moves between devices, `set_input_size` and
pickling work as before, and undoing is to change the class back.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import timm
from torch import nn
from torch.nn.modules import module as modules

Code = tuple[tuple[ModuleType, str], ...]

KNOWN_TIMM = "1.0.31"  # the release that the digests were taken from


class Replacement:
    """Mixin of the classes that stand in for one of timm's.

    A subclass names it as `published`, the functions of timm whose numbers it gives as `code`, the digest of their
    source, and in `parts` the exact type of every child that it reads or calls ("a.b" is a child of a child). Calls of
    the children named in `absorbed` are no longer made: nobody may listen to them.
    """

    published: ClassVar[type[nn.Module]]
    code: ClassVar[Code]
    digest: ClassVar[str]
    parts: ClassVar[dict[str, tuple[type, ...]]]
    absorbed: ClassVar[tuple[str, ...]] = ("attn",)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Why a module of the published class is left as it is; None where it is replaced."""
        if source_digest(cls.code) != cls.digest:
            return f"its code is not that of timm {KNOWN_TIMM}, which is known (timm here: {timm.__version__})"
        for name, types in cls.parts.items():
            part = _descend(module, name)
            if type(part) not in types:
                return f"{name} is {_article(part)}, not {' or '.join(_article(t) for t in types)}"
        read = [inner for name in cls.absorbed for inner in getattr(module, name).modules()]
        if any(_is_overridden(inner) for inner in (module, *read)):
            return "a method was replaced on this module or inside it"
        if cls.is_watched(module):
            return f"hooks inside {' and '.join(cls.absorbed)} would no longer be called"
        return None

    @classmethod
    def is_watched(cls, module: Any) -> bool:
        """Whether somebody listens to, or replaced, a call that the replacement does not make."""
        return modules._has_any_global_hook() or any(_is_touched(getattr(module, name)) for name in cls.absorbed)


def _is_touched(module: nn.Module) -> bool:
    """Whether a call of this module, or of one inside it, is more than its class's own forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ or any(_is_touched(m) for m in module._modules.values() if m is not None)


def _is_overridden(module: nn.Module) -> bool:
    """Whether a method of the class was replaced on the instance."""
    return any(callable(getattr(type(module), name, None)) for name in module.__dict__)


def source(module: ModuleType, *names: str) -> Code:
    """Functions of a module, as in "Class.method", looked up when they are compared."""
    return tuple((module, name) for name in names)


def source_digest(code: Code) -> str:
    """Digest of the source of some functions as they are now; empty where one is missing or has no source to read."""
    return _digest(tuple(_descend(module, name) for module, name in code))


@cache
def _digest(functions: tuple[Any, ...]) -> str:
    try:
        return hashlib.sha256("".join(inspect.getsource(function) for function in functions).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def dropout_of(drop: Any) -> float:
    """Rate of a dropout module at this moment."""
    return drop.p if drop.training else 0.0


def _descend(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def _article(what: Any) -> str:
    if what is None or what is type(None):
        return "None"
    name = what.__name__ if isinstance(what, type) else type(what).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
