"""Small measurements of the GPU report: the device's own rates, what the host needs, repeatability, batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_floors import FORWARD, floor_us, known_device
from _gpu_machine import driver
from _gpu_problems import Attention, Inputs, Runner, Shape, distinct_results, ours
from _gpu_rows import Row, add_target, make_peer, make_row
from _gpu_tasks import Context, Task
from _gpu_timing import Run, Timing, attempt, measure

MOST_HOST_US = 25.0
REPEATS = 20
BATCHES = (1, 2, 4, 8, 16, 32, 64)

# --- rates of the device --------------------------------------------------------------------------------------------

_RATES = (
    ("copy of 2 GiB", "memory", "TB/s"),
    ("copies of 8 MiB in the cache", "L2", "TB/s"),
    ("8192 x 8192 x 8192 matrix product, bf16", "matrix units", "TFLOP/s"),
    ("nothing between two events", "timing", "us"),
)


def ceilings_task() -> Task:
    """Bandwidths and matrix rate as they are here, beside what the floors assume."""
    rows = [make_row("ops", "", name, what, unit=unit) for name, what, unit in _RATES]
    return Task("ceilings", lambda: [dict(row) for row in rows], partial(_ceilings, rows))


def _ceilings(plan: list[Row], context: Context) -> list[Row]:
    place, dry = context.device.place, context.dry
    large, cached, side = (1 << 16, 1 << 12, 64) if dry else (1 << 30, 4 << 20, 8192)
    dtype = torch.float32 if dry else torch.bfloat16

    def memory() -> Run:
        a, b = (torch.ones(large, dtype=torch.uint8, device=place) for _ in range(2))
        return lambda: b.copy_(a)

    def cache() -> Run:
        a, b = (torch.ones(cached, dtype=torch.uint8, device=place) for _ in range(2))
        return lambda: [b.copy_(a) for _ in range(100)]

    def product() -> Run:
        a, b = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
        return lambda: a @ b

    # work of one call: bytes read and written, or operations; the scale turns it per microsecond into the unit
    amounts = (2 * large, 200 * cached, 2 * side**3, None)
    made = []
    for row, make, amount in zip(plan, (memory, cache, product, lambda: _nothing), amounts, strict=True):
        time_us = attempt(context.device, partial(_median_us, context, make))
        row = dict(row)
        if isinstance(time_us, str):
            row["note"] = time_us
        else:
            row["ours"] = time_us if amount is None else amount / time_us / 1e6
            clocks = None if dry else driver()
            row["note"] = f"SM clock just after: {clocks['clocks.sm']} MHz" if clocks else ""
        made.append(row)
    device = known_device(context.device.name)
    if device is not None:
        assumed = (device.dram_bytes_per_s, device.l2_bytes_per_s, device.matrix_flops_per_s["bf16"])
        for row, rate in zip(made, assumed, strict=False):
            if rate is not None:
                row["peers"] = [make_peer("assumed by the floors", rate / 1e12, row)]
    return made


def _nothing() -> None:
    """What an empty region between two events is timed with."""


def _median_us(context: Context, make: Callable[[], Run]) -> float:
    run = make()
    run()
    return statistics.median(context.device.once_us(run, 500.0)[0] for _ in range(5))


# --- the host -------------------------------------------------------------------------------------------------------


def host_task(operators: Mapping[str, Attention], size: int) -> Task:
    """Time that the host needs for one eager call, on one small map where the device is faster than the host."""
    shape = Shape(1, size, size, 2, 32)
    rows = [_host_row(name, shape) for name in operators]
    return Task("host", lambda: [dict(row) for row in rows], partial(_host, operators, shape))


def _host_row(name: str, shape: Shape) -> Row:
    return make_row("ops", "9", name, "host, forward", shape=str(shape), dtype=shape.dtype_name)


def _host(operators: Mapping[str, Attention], shape: Shape, context: Context) -> list[Row]:
    if context.dry:
        shape = replace(shape, dtype=torch.float32)
    calls = 5 if context.dry else 100
    q = torch.randn(1, 2, 64, 32, device=context.device.place, dtype=shape.dtype)
    bare = _host_us(context, lambda: F.scaled_dot_product_attention(q, q, q), calls)
    made = []
    for name, attention in operators.items():
        row = _host_row(name, shape)
        inputs = Inputs.make(attention, shape, context.device.place)
        runner = ours(attention, inputs, context.backend)
        spent = attempt(context.device, partial(_host_us, context, runner.forward, calls))
        both = attempt(context.device, partial(_host_us, context, runner.training, calls))
        if isinstance(spent, str):
            row["note"] = spent
        else:
            note = both if isinstance(both, str) else f"with backward: {both:.0f} us"
            row |= {"ours": spent, "note": note}
            row["peers"].append(make_peer("SDPA of 64 tokens", bare, row, bound="most"))
        if not context.dry:
            add_target(row, "us", MOST_HOST_US, "most", row["ours"])
        made.append(row)
    return made


def _host_us(context: Context, run: Run, calls: int) -> float:
    """Median over rounds of the mean of some calls, whose results nobody waits for."""
    for _ in range(3):
        run()
    means = []
    for _ in range(7):
        context.device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        means.append(1e6 * (time.perf_counter() - start) / calls)
    context.device.synchronize()
    return statistics.median(means)


# --- the same result every time -------------------------------------------------------------------------------------


def repeats_task(operators: Mapping[str, Attention], size: int) -> Task:
    """Whether output and all gradients are bitwise the same in every repeat."""
    shape = Shape(8, size, size, 4, 32)
    rows = [_repeats_row(name, shape) for name in operators]
    return Task("repeats", lambda: [dict(row) for row in rows], partial(_repeats, operators, shape))


def _repeats_row(name: str, shape: Shape) -> Row:
    what = f"different results of {REPEATS} repeats, forward + backward"
    return make_row("ops", "4", name, what, unit="results", shape=str(shape), dtype=shape.dtype_name)


def _repeats(operators: Mapping[str, Attention], shape: Shape, context: Context) -> list[Row]:
    if context.dry:
        shape = replace(shape, batch=1, heads=1, dtype=torch.float32)
    made = []
    for name, attention in operators.items():
        row = _repeats_row(name, shape)

        def count(attention: Attention = attention) -> int:
            inputs = Inputs.make(attention, shape, context.device.place)
            return distinct_results(ours(attention, inputs, context.backend), 2 if context.dry else REPEATS)

        found = attempt(context.device, count)
        row |= {"note": found} if isinstance(found, str) else {"ours": float(found)}
        if not context.dry:
            add_target(row, "results", 1.0, "most", row["ours"])
        made.append(row)
    return made


# --- images that share a bias ---------------------------------------------------------------------------------------


def batch_task(name: str, attention: Attention, shape: Shape) -> Task:
    """Time an image at growing batches: what is shared among the images of a program shows here."""
    rows = [_batch_row(name, replace(shape, batch=batch)) for batch in BATCHES]
    key = "batch-" + name.replace(" ", "-").replace(",", "")
    return Task(key, lambda: [dict(row) for row in rows], partial(_batch, name, attention, shape))


def _batch_row(name: str, shape: Shape, **fields: Any) -> Row:
    return make_row("ops", "", name, "forward, an image", shape=str(shape), dtype=shape.dtype_name, **fields)


def _batch(name: str, attention: Attention, shape: Shape, context: Context) -> list[Row]:
    batches = BATCHES[:2] if context.dry else BATCHES
    if context.dry:
        shape = replace(shape, height=14, width=14, heads=1, dtype=torch.float32)
    runners: dict[str, Runner] = {}
    for batch in batches:
        inputs = Inputs.make(attention, replace(shape, batch=batch), context.device.place)
        runners[str(batch)] = ours(attention, inputs, context.backend)
    runs = {key: runner.forward for key, runner in runners.items()}
    times = measure(context.device, runs, rounds=context.rounds, seconds=context.round_seconds)
    made = []
    for batch in batches:
        of, found = replace(shape, batch=batch), times[str(batch)]
        if not isinstance(found, Timing):
            made.append(_batch_row(name, of, note=found))
            continue
        floor, floor_of = floor_us(attention, of, FORWARD, context.device.name)
        made.append(
            _batch_row(
                name,
                of,
                ours=found.device_us / batch,
                floor=None if floor is None else floor / batch,
                floor_of=floor_of,
                graph_us=None if found.graph_us is None else found.graph_us / batch,
            )
        )
    return made
