"""A bounded cache for schedule tensors: least recently used out first, counted in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .notices import say_once

__all__ = ["SCHEDULES", "Held", "Sized", "TensorCache"]


class Sized(Protocol):
    """Several tensors held together, some of them perhaps by others too."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that are held."""


Held = TypeVar("Held", bound=Tensor | Sized)


class TensorCache:
    """Tensors derived from shapes and patterns, never from parameters; or values that hold several (see `Sized`).

    A tensor that several values hold counts once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._holders: dict[int, int] = {}
        self._dropped: OrderedDict[Hashable, None] = OrderedDict()
        self._captured: dict[int, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], Held], device: torch.device) -> Held:
        """The value of `key` on `device`, built on first use. One larger than the whole cache is built and not kept.

        Nor is what an exporter's tracer builds: its tensors are symbols of one graph.

        What is used while a CUDA graph is captured is never freed: a replay would read freed memory.

        Raises:
            RuntimeError: a CUDA graph is being captured and the value is not there yet.
        """
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is captured of a call that was not made before at this batch: run it once, eagerly"
                )
            found = _built(build, device)
            if all(type(t) is Tensor for t in _tensors(found)):
                self._keep(key, found)
        if capturing:
            self._captured[id(found)] = found
        return cast(Held, found)

    def _keep(self, key: Hashable, made: Tensor | Sized) -> None:
        with self._lock:
            if key in self._values:
                return
            again = key in self._dropped
            dropped = []
            if sum(t.nbytes for t in _tensors(made)) > self.max_bytes:
                self._dropped[key] = None
            else:
                self._values[key] = made
                self._count(made, 1)
            while self._bytes > self.max_bytes:
                dropped.append(self._values.popitem(last=False))
                self._count(dropped[-1][1], -1)
                self._dropped[dropped[-1][0]] = None
            while len(self._dropped) > 4096:
                self._dropped.popitem(last=False)
        for device in {t.device for _, value in dropped for t in _tensors(value) if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # kernels of any stream may still read what is freed now
        if again:
            say_once(
                f"nearfield's schedules take more than {self.max_bytes >> 20} MB and are made again and again: "
                "raise nearfield.ops.cache.SCHEDULES.max_bytes, or use fewer sizes and patterns in turn"
            )

    def _count(self, value: Tensor | Sized, step: int) -> None:
        """Add or take away a holder of every tensor; those without one do not count."""
        for tensor in {id(t): t for t in _tensors(value)}.values():
            before = self._holders.pop(id(tensor), 0)
            if before + step:
                self._holders[id(tensor)] = before + step
            self._bytes += tensor.nbytes * (bool(before + step) - bool(before))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._holders.clear()
            self._dropped.clear()
            self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes


def _tensors(value: Tensor | Sized) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else value.tensors


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
