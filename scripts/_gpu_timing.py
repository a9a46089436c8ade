"""Timing on a device: everything takes turns in rounds, every figure is a median.

Three figures of one call: what the device needs (the host is kept ahead of it, so no gap between launches counts, and
caches are cold), what a caller waits for (calls back to back, launches included), what the host needs to issue it.
Short calls are also replayed from a CUDA graph, with warm caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

Run = Callable[[], Any]

OUT_OF_TIME = "not measured: out of time"
WARM_UPS = 3
FEWEST_ROUNDS = 3
SHORT_US = 50.0  # below this, launches are what a caller waits for: also timed as a graph


class DeviceLost(RuntimeError):  # noqa: N818 - it says what happened
    """After an error the device answers nothing any more: only a new process can go on."""


@dataclass(frozen=True)
class Timing:
    """Medians of one candidate, in microseconds a call; `first_s` is what its first call took, compiling included."""

    device_us: float
    call_us: float
    host_us: float
    graph_us: float | None
    rounds: int
    first_s: float


class Device(Protocol):
    """Where candidates run."""

    place: torch.device
    name: str

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def once_us(self, run: Run, ahead_us: float) -> tuple[float, float]:
        """One call with cold caches and `ahead_us` of other work queued before it: device and host microseconds."""

    def calls_us(self, run: Run, count: int) -> float:
        """Microseconds a call of `count` calls back to back."""

    def graph_us(self, run: Run) -> float | None:
        """Microseconds a call when replayed from a graph; None where there are no graphs."""

    def peak_bytes(self, run: Run) -> int | None:
        """Memory that a call needs at its highest beyond what was there before; None where that is not counted."""

    def recover(self) -> None:
        """Bring the device back after an error; raises DeviceLost."""


class Cpu:
    """The processor: a dry run of everything, by the wall clock."""

    place = torch.device("cpu")
    name = "cpu"

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def once_us(self, run: Run, ahead_us: float) -> tuple[float, float]:
        """One call."""
        start = time.perf_counter()
        run()
        spent = 1e6 * (time.perf_counter() - start)
        return spent, spent

    def calls_us(self, run: Run, count: int) -> float:
        """Mean of some calls."""
        start = time.perf_counter()
        for _ in range(count):
            run()
        return 1e6 * (time.perf_counter() - start) / count

    def graph_us(self, run: Run) -> float | None:
        """There are none."""
        return None

    def peak_bytes(self, run: Run) -> int | None:
        """It is not counted."""
        return None

    def recover(self) -> None:
        """Nothing to bring back."""


class Cuda:
    """The current CUDA device.

    Args:
        cold: read several times the L2 cache between calls, so that inputs come from memory.
    """

    def __init__(self, *, cold: bool = True) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.place)
        cache = int(getattr(torch.cuda.get_device_properties(self.place), "L2_cache_size", 64 << 20))
        # read, not written: dirty lines would be written back while the next call is timed
        self._scratch = torch.ones(max(4 * cache, 1 << 28) // 4, device=self.place) if cold else None
        self._cycles_per_us = self._spin_rate()

    def _spin_rate(self) -> float:
        cycles = 10_000_000
        torch.cuda._sleep(1000)
        return cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def _between(self, run: Run) -> float:
        """Microseconds between two events around `run`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return 1e3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.place)

    def once_us(self, run: Run, ahead_us: float) -> tuple[float, float]:
        """One call between two events, behind a spin that keeps the device busy while the host issues it."""
        spent = 0.0

        def timed() -> Any:
            nonlocal spent
            before = time.perf_counter()
            result = run()
            spent = 1e6 * (time.perf_counter() - before)
            return result

        if self._scratch is not None:
            self._scratch.sum()
        torch.cuda._sleep(int(ahead_us * self._cycles_per_us))
        return self._between(timed), spent

    def calls_us(self, run: Run, count: int) -> float:
        """Calls between two events, launches included."""

        def several() -> None:
            for _ in range(count):
                run()

        return self._between(several) / count

    def graph_us(self, run: Run, calls: int = 20, replays: int = 10) -> float | None:
        """Median of replays of a graph of some calls, over their number."""
        stream = torch.cuda.Stream(self.place)
        stream.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(stream):  # capture wants a warm-up on a stream of its own
            run()
            run()
        torch.cuda.current_stream(self.place).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
        times = [self._between(graph.replay) / calls for _ in range(replays)]
        del graph
        return statistics.median(times)

    def peak_bytes(self, run: Run) -> int | None:
        """By the caching allocator's count, after a warm-up."""
        run()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.place) - before

    def recover(self) -> None:
        """Wait for the device and give unused memory back; DeviceLost where it does not answer."""
        try:
            self.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(one_line(error)) from error


def one_line(error: BaseException, most: int = 240) -> str:
    """Type and first line of what an error says, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def attempt(device: Device, run: Run) -> Any:
    """What `run` returns, or, as a string, the one line of the error that it raised."""
    try:
        result = run()
        device.synchronize()
    except DeviceLost:
        raise
    except Exception as error:  # a peer may fail in any way, and the report goes on
        text = one_line(error)
        del error  # with its traceback go the tensors that its frames hold
        device.recover()
        return text
    return result


def warm_up(device: Device, run: Run, inspect: Callable[[Any], None] | None = None) -> float | str:
    """Seconds that the first call took, after some more calls; the error, where one raises.

    `inspect` is given what the first call returned and may raise too.
    """

    def several() -> float:
        start = time.perf_counter()
        result = run()
        device.synchronize()
        first = time.perf_counter() - start
        if inspect is not None:
            inspect(result)
        del result
        for _ in range(WARM_UPS - 1):
            run()
        return first

    return attempt(device, several)


def measure(
    device: Device,
    runs: Mapping[str, Run],
    *,
    rounds: int,
    seconds: float,
    graph: bool = True,
    inspect: Callable[[str, Any], None] | None = None,
    left_s: Callable[[], float] = lambda: float("inf"),
    needs_s: Mapping[str, float] | None = None,
) -> dict[str, Timing | str]:
    """Time candidates in interleaved rounds; the order turns from round to round.

    Args:
        device: where they run.
        runs: what one call of each candidate does, by name.
        rounds: rounds to make, fewer when `seconds` are over, but never less than three.
        seconds: time limit of the rounds; warm-up, with what it compiles, is not in it.
        graph: replay short candidates from a graph too.
        inspect: is given name and first result of each candidate, and raises where that is wrong.
        left_s: seconds left for all of it.
        needs_s: seconds that the first call of a candidate may take, by name; it is left out where less is left.

    Returns:
        By name a Timing, or one line that says why there is none.
    """
    found: dict[str, Timing | str] = {}
    first: dict[str, float] = {}
    for name, run in runs.items():
        if left_s() < (needs_s or {}).get(name, 0.0):
            found[name] = OUT_OF_TIME
            continue
        outcome = warm_up(device, run, None if inspect is None else partial(inspect, name))
        if isinstance(outcome, str):
            found[name] = outcome
        else:
            first[name] = outcome
    samples = _rounds(device, {name: runs[name] for name in first}, rounds, seconds)
    for name, (device_us, host_us) in samples.items():
        run, typical = runs[name], statistics.median(device_us)
        count = min(20, max(1, int(2000 / max(typical, 1.0))))
        call_us = statistics.median(device.calls_us(run, count) for _ in range(FEWEST_ROUNDS))
        replayed = attempt(device, partial(device.graph_us, run)) if graph and typical < SHORT_US else None
        graph_us = replayed if isinstance(replayed, float) else None
        found[name] = Timing(typical, call_us, statistics.median(host_us), graph_us, len(device_us), first[name])
    return {name: found[name] for name in runs}


def _rounds(
    device: Device, runs: Mapping[str, Run], rounds: int, seconds: float
) -> dict[str, tuple[list[float], list[float]]]:
    """Device and host microseconds of every round, by candidate."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    ahead = dict.fromkeys(runs, 200.0)
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            if i >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for name in list(runs) if i % 2 else reversed(list(runs)):
                device_us, host_us = device.once_us(runs[name], ahead[name])
                if host_us > ahead[name]:  # the device waited for the host: keep it busy for longer, and once more
                    ahead[name] = min(2 * host_us, 20_000.0)
                    device_us, host_us = device.once_us(runs[name], ahead[name])
                samples[name][0].append(device_us)
                samples[name][1].append(host_us)
    finally:
        gc.enable()
    return samples
