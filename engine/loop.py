"""The training and evaluation loops: accumulation, clipping, averaging, and what happens when a loss is not finite."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from .config import TrainerConfig
from .data import Batch
from .errors import DivergedError
from .metrics import Mean
from .state import TrainState
from .task import Forward, Task

_logger = logging.getLogger("nearfield.engine")
AutocastFactory = Callable[[], contextlib.AbstractContextManager[Any]]
OnStep = Callable[[int, int, TrainState, Mean], None]


class StopSignal:
    """While active, Ctrl-C and SIGTERM set `asked` instead of ending the program; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals to whoever owns it
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


@dataclass
class EpochResult:
    """What an epoch of training gave; `waited` are the seconds that the loop stood still for the next batch."""

    loss: float
    images: int
    seconds: float
    complete: bool
    waited: float


def train_epoch(
    state: TrainState,
    task: Task,
    batches: Iterable[Batch],
    trainer: TrainerConfig,
    *,
    batch_size: int,
    autocast: AutocastFactory = contextlib.nullcontext,
    forward: Forward | None = None,
    until: int | None = None,
    stop: StopSignal | None = None,
    on_step: OnStep | None = None,
) -> EpochResult:
    """One pass over the batches.

    Gradients of `trainer.accumulate` batches make one update; the last update of a pass may have fewer (also when the
    loader gives fewer batches than its length), and its loss is still the mean over the images in it. The schedule
    moves at every update, also at those that are skipped.

    Args:
        state: changed in place; `state.epoch` counts up when the pass is complete.
        task: gives the loss.
        batches: (inputs, targets) on the device, tensors or lists, one entry an image; needs a length.
        trainer: accumulation, clipping, patience with losses that are not finite.
        batch_size: images of a full batch.
        autocast: context of the forward pass.
        forward: what is called instead of `state.model` (a compiled version of it).
        until: count of updates (`state.step`) at which training, and with it this pass, is complete.
        stop: looked at after every update but the last.
        on_step: called after every update with (batch index, batches, state, mean loss so far).

    Raises:
        DivergedError: `trainer.max_nonfinite` updates in a row without a finite loss and gradient.
    """
    state.model.train()
    forward = state.model if forward is None else forward
    total = len(batches)  # type: ignore[arg-type]
    nominal = batch_size * trainer.accumulate
    mean, group = Mean(), Mean()
    started, images, waited = time.perf_counter(), 0, 0.0

    def result(complete: bool) -> EpochResult:
        return EpochResult(mean.value, images, time.perf_counter() - started, complete, waited)

    def update(done: int) -> None:
        nonlocal group
        if group.weight != nominal:
            _scale_gradients(state.model, nominal / group.weight)
        if _update(state, trainer, group):
            mean.add(torch.tensor(group.value), group.weight)
        group = Mean()
        if on_step is not None:
            on_step(done, total, state, mean)

    state.optimizer.zero_grad(set_to_none=True)
    done, asked = 0, started
    for done, (inputs, targets) in enumerate(batches, start=1):
        waited += time.perf_counter() - asked
        count = len(inputs)
        images += count
        with autocast():
            loss = task.loss(forward, inputs, targets)
        group.add(loss, count)
        state.scaler.scale(loss * (count / nominal)).backward()
        if not done % trainer.accumulate or done >= total:
            update(done)
            if until is not None and state.step >= until:
                break
            if stop is not None and stop.asked and done < total:
                return result(complete=False)
        asked = time.perf_counter()
    if group.weight:
        update(done)
    state.epoch += 1
    return result(complete=True)


def _update(state: TrainState, trainer: TrainerConfig, group: Mean) -> bool:
    """One optimizer step with the gradients that are there; False if it was skipped."""
    loss = group.value
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = _clip(parameters, trainer)
    fine = math.isfinite(loss) and math.isfinite(norm)
    if fine or state.scaler.is_enabled():
        state.scaler.step(state.optimizer)  # an enabled scaler looks for itself, and lowers its scale
        state.scaler.update()
    state.step += 1
    if fine:
        state.skipped_in_a_row = 0
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= trainer.max_nonfinite:
            raise DivergedError(diagnosis(state, loss, norm))
        _logger.warning("update %d skipped: loss %g, gradient norm %g", state.step, loss, norm)
    state.optimizer.zero_grad(set_to_none=True)
    if state.scheduler is not None:
        state.scheduler.step_update(state.step)
    return fine


def _clip(parameters: list[nn.Parameter], trainer: TrainerConfig) -> float:
    """Clip as `trainer` says and return the norm before."""
    if trainer.clip_grad and trainer.clip_mode == "norm":
        return float(nn.utils.clip_grad_norm_(parameters, trainer.clip_grad))
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if trainer.clip_grad:
        from timm.utils import dispatch_clip_grad

        dispatch_clip_grad(parameters, trainer.clip_grad, mode=trainer.clip_mode)
    return norm


def _scale_gradients(model: nn.Module, factor: float) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def diagnosis(state: TrainState, loss: float, norm: float) -> str:
    """One line on why training cannot go on: where it is, what is not finite, what to try."""
    weights = [name for name, p in state.model.named_parameters() if not bool(torch.isfinite(p).all())]
    gradients = [
        name
        for name, p in state.model.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    if weights:
        where = f"{len(weights)} parameters are not finite, first {weights[0]}"
    elif not math.isfinite(loss):
        where = "all parameters are finite: the forward pass overflows or the data holds NaN"
    else:
        where = f"{len(gradients)} gradients are not finite, first {gradients[0] if gradients else 'none'}"
    return (
        f"training diverged at update {state.step} of epoch {state.epoch + 1}: {state.skipped_in_a_row} updates in a "
        f"row without a finite loss and gradient (loss {loss:g}, gradient norm {norm:g}, lr {state.lr:.3g}; {where}); "
        "lower optim.lr, lengthen sched.warmup_epochs, set trainer.clip_grad, or use hardware.amp=bf16, not fp16"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    *,
    autocast: AutocastFactory = contextlib.nullcontext,
    on_batch: Callable[[int], None] | None = None,
    forward: Forward | None = None,
) -> dict[str, float]:
    """The task's metrics of a model over the batches, in evaluation mode; the mode it was in is restored."""
    was_training = model.training
    model.eval()
    metrics = task.metrics()
    try:
        for index, (inputs, targets) in enumerate(batches):
            with autocast():
                outputs = task.predict(forward or model, inputs)
            metrics.add(outputs, targets)
            if on_batch is not None:
                on_batch(index + 1)
    finally:
        model.train(was_training)
    return metrics.result()
