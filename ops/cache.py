"""A bounded cache for schedule tensors: least recently used out first, counted in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
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
    """Tensors derived from shapes and patterns, never from parameters; or values that hold several (see `Sized`)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._tensors: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: dict[int, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], Held], device: torch.device) -> Held:
        """The tensor of `key` on `device`, built on first use. One larger than the whole cache is built and not kept.

        What is used while a CUDA graph is captured is never freed: a replay would read freed memory.

        Raises:
            RuntimeError: a CUDA graph is being captured and the tensor is not there yet.
        """
        with self._lock:
            found = self._tensors.get(key)
            if found is not None:
                self._tensors.move_to_end(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found is None:
            if capturing:
                raise RuntimeError("a CUDA graph is captured of a call that was not made before: run it once, eagerly")
            found = self._keep(key, _built(build, device))
        if capturing:
            self._captured[id(found)] = found
        return cast(Held, found)

    def _keep(self, key: Hashable, made: Held) -> Held:
        size = made.nbytes
        with self._lock:
            if size <= self.max_bytes and key not in self._tensors:
                self._tensors[key] = made
                self._bytes += size
                while self._bytes > self.max_bytes:
                    _, old = self._tensors.popitem(last=False)
                    self._bytes -= old.nbytes
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tensors.clear()
            self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes


def _built(build: Callable[[], Held], device: torch.device) -> Held:
    """What `build` makes, outside inference mode: a tensor born there could not take part in a later training step."""

    def finished() -> Held:
        with torch.cuda.device(device):
            made = build()
            torch.cuda.current_stream(device).synchronize()  # other streams read it without waiting
        return made

    if device.type != "cuda":
        with torch.inference_mode(False):
            return build()
    # torch.compile(mode="reduce-overhead") has its thread allocate in a pool that it rewinds later: not so another's.
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(finished).result()


SCHEDULES = TensorCache(256 << 20)
"""Index and mask tensors of the stock-PyTorch backend and schedules of the kernels, per pattern, map and device."""
