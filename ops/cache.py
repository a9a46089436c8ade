"""A bounded cache for schedule tensors: least recently used out first, counted in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Protocol, TypeVar, cast

import torch

__all__ = ["SCHEDULES", "Held", "Sized", "TensorCache"]


class Sized(Protocol):
    """A tensor, or a few of them held together."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


Held = TypeVar("Held", bound=Sized)


class TensorCache:
    """Tensors derived from shapes and patterns, never from parameters; or values that hold several (see `Sized`).

    They are made outside inference mode: a tensor born there could not take part in a later training step.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._tensors: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], Held]) -> Held:
        """The tensor of `key`, built on first use. One larger than the whole cache is built and not kept."""
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
                return cast(Held, self._tensors[key])
        with torch.inference_mode(False):
            tensor = build()
        size = tensor.nbytes
        with self._lock:
            if size <= self.max_bytes and key not in self._tensors:
                self._tensors[key] = tensor
                self._bytes += size
                while self._bytes > self.max_bytes:
                    _, old = self._tensors.popitem(last=False)
                    self._bytes -= old.nbytes
        return tensor

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tensors.clear()
            self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes


SCHEDULES = TensorCache(256 << 20)
"""Index and mask tensors of the stock-PyTorch backend and schedules of the kernels, per pattern, map and device."""
