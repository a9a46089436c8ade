"""The model section of the GPU report: images per second of whole models beside timm's Swin, training and inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import nearfield
import timm
import torch
import torch.nn.functional as F
from _bench_models import TIMM_SWIN
from _gpu_peers import compiled
from _gpu_problems import relative_errors
from _gpu_rows import Row, add_target, make_peer, make_row
from _gpu_tasks import Context, Task
from _gpu_timing import Run, attempt, measure
from nearfield.ops import use_backend
from torch import Tensor, nn

TRAINING, INFERENCE = "training", "inference"
SWIN = "swin_tiny"
OURS = (SWIN, "nat_tiny", "nat_mini", "dinat_tiny")
TIMM_EAGER, TIMM_COMPILED = "timm Swin-T", "timm Swin-T, compiled"
LEAST_RATIO = 1.3  # claim 10, Swin-T in training against the same weights in timm
BATCH, SIZE = 128, 224
LIMITS = {True: 1e-3, False: 5e-2}  # error of the logits against timm's, by whether it is a dry run


@dataclass(frozen=True)
class Model:
    """One model of a comparison: its name in the table, the weights, whether it is compiled."""

    name: str
    module: nn.Module
    compile: bool


def _named(name: str, compile: bool) -> str:
    return f"{name}, compiled" if compile else name


def tasks() -> list[Task]:
    """Eager models first: they take no time to compile."""
    return [_task(what, compile) for compile in (False, True) for what in (TRAINING, INFERENCE)]


def _task(what: str, compile: bool) -> Task:
    names = (SWIN, "nat_tiny") if compile else OURS
    rows = [_row(_named(name, compile), what) for name in names]
    key = f"{what}-compiled" if compile else what
    needs, most = (45.0, 240.0) if compile else (12.0, 90.0)
    return Task(key, lambda: [dict(row) for row in rows], partial(_measured, what, compile, names), needs, most)


def _row(name: str, what: str, batch: int = BATCH, dtype: str = "bfloat16 autocast", **fields: Any) -> Row:
    return make_row("models", "10", name, what, unit="img/s", shape=f"B{batch} {SIZE}", dtype=dtype, **fields)


def _made(context: Context, names: Sequence[str], compile: bool) -> list[Model]:
    """Ours by name, timm's last; Swin-T has timm's weights."""
    torch.manual_seed(0)
    theirs = timm.create_model(TIMM_SWIN, drop_path_rate=0.0)
    models = []
    for name in names:
        # without stochastic depth: all of them then compute all of it, and logits can be compared
        module = nearfield.create_model(name, drop_path_rate=0.0)
        if name == SWIN:
            module.load_state_dict(theirs.state_dict())
        models.append(Model(_named(name, compile), module, compile))
    models.append(Model(TIMM_EAGER, theirs, False))
    if compile:
        models.append(Model(TIMM_COMPILED, theirs, True))
    for model in models:
        model.module.to(context.device.place).eval()  # nothing is dropped in either mode
    return models


def _measured(what: str, compile: bool, names: Sequence[str], context: Context) -> list[Row]:
    torch._dynamo.reset()
    batch = 1 if context.dry else BATCH
    names = [name for name in names if name == SWIN] if context.dry else names
    models = _made(context, names, compile)
    images = torch.randn(batch, 3, SIZE, SIZE, device=context.device.place)
    labels = torch.arange(batch, device=context.device.place)
    make = _training if what == TRAINING else _inference
    runs = {model.name: make(context, model, images, labels) for model in models}
    times = measure(
        context.device,
        runs,
        rounds=context.rounds,
        seconds=2 * context.round_seconds,
        graph=False,
        inspect=_Logits(LIMITS[context.dry]),
        left_s=context.left_s,
        needs_s={model.name: 30.0 for model in models if model.compile and not context.dry},
    )
    # a caller waits for the host too: throughput is that of calls back to back
    throughput = {name: t if isinstance(t, str) else 1e6 * batch / t.call_us for name, t in times.items()}
    dtype = "float32" if context.dry else "bfloat16 autocast"
    peers = [name for name in throughput if name in (TIMM_EAGER, TIMM_COMPILED)]
    rows = []
    for model in models:
        if model.name not in peers:
            row = _row(model.name, what, batch, dtype)
            mine = throughput[model.name]
            row |= {"note": mine} if isinstance(mine, str) else {"ours": mine}
            _add_peers(row, peers, throughput, same=model.name.startswith(SWIN))
            _add_memory(context, row, {name: runs[name] for name in (model.name, *peers)}, throughput)
            if model.name == SWIN and what == TRAINING and not compile and not context.dry:
                add_target(row, f"x {TIMM_EAGER}", LEAST_RATIO, "least", row["peers"][0]["ratio"])
            rows.append(row)
    return rows


def _add_peers(row: Row, peers: Sequence[str], throughput: Mapping[str, float | str], *, same: bool) -> None:
    for name in peers:
        theirs = throughput[name]
        value, note = (None, theirs) if isinstance(theirs, str) else (theirs, "same weights" if same else "other model")
        row["peers"].append(make_peer(name, value, row, note=note))


def _add_memory(context: Context, row: Row, runs: Mapping[str, Run], throughput: Mapping[str, float | str]) -> None:
    """Peak memory of one step beyond weights and images, as a note."""
    parts = []
    for name, run in runs.items():
        if not isinstance(throughput[name], str):
            peak = attempt(context.device, partial(context.device.peak_bytes, run))
            if isinstance(peak, int):
                parts.append(f"{name} {peak / 2**30:.2f} GiB")
    if parts:
        row["note"] = "; ".join(filter(None, (row["note"], "peak memory: " + ", ".join(parts))))


def _forward(context: Context, model: Model) -> Callable[[Tensor], Tensor]:
    """Logits under bfloat16 autocast; float32 in a dry run."""
    place = context.device.place.type
    call = compiled(model.module, not context.dry) if model.compile else model.module

    def forward(images: Tensor) -> Tensor:
        with nullcontext() if context.dry else torch.autocast(place, torch.bfloat16), use_backend(context.backend):
            return call(images)

    return forward


def _inference(context: Context, model: Model, images: Tensor, labels: Tensor) -> Run:
    forward = _forward(context, model)

    def run() -> Tensor:
        with torch.no_grad():
            return forward(images)

    return run


def _training(context: Context, model: Model, images: Tensor, labels: Tensor) -> Run:
    """Forward, backward of the cross entropy, AdamW with a learning rate of 0: the weights stay what they are."""
    forward = _forward(context, model)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.0, fused=not context.dry)

    def run() -> Tensor:
        logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logits.detach()

    return run


class _Logits:
    """Holds logits of timm's Swin-T against those of ours, which come first."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.ours: Tensor | None = None

    def __call__(self, name: str, logits: Tensor) -> None:
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("logits are not finite")
        if name.startswith(SWIN):
            self.ours = logits
        elif name in (TIMM_EAGER, TIMM_COMPILED) and self.ours is not None:
            error = relative_errors({"logits": logits}, {"logits": self.ours})["logits"]
            if error > self.limit:
                raise ValueError(f"logits are off by {error:.1e}, allowed is {self.limit:.0e}")
