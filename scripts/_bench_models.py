"""Whole models: Swin-T against timm's with the same weights, NAT-T beside it, memory and cost at large sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import nearfield
import timm
import torch
import torch.nn.functional as F
from _bench_memory import METHOD, measured
from _bench_timing import Candidate, Case, Peer, Row, check, median_ms
from nearfield.models import Backbone
from nearfield.ops import use_backend
from torch import Tensor, nn

TIMM_SWIN = "swin_tiny_patch4_window7_224"


def _forward(name: str, model: nn.Module, images: Tensor) -> Candidate:
    def run() -> Tensor:
        with torch.no_grad():
            return model(images)

    return Candidate(name, run)


def _training(name: str, model: nn.Module, images: Tensor, labels: Tensor, like: Backbone) -> Candidate:
    """Forward and backward of the cross entropy; gradients are compared under the names of `like`."""
    parameters = dict(model.named_parameters())

    def run() -> tuple[Tensor, ...]:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        return logits.detach(), *torch.autograd.grad(loss, list(parameters.values()))

    def results(result: Any) -> dict[str, Tensor]:
        logits, *gradients = result
        # a layout moves entries and changes none, so what converts weights converts gradients
        named = like.fit_state_dict(dict(zip(parameters, gradients, strict=True)))
        return {"logits": logits, **{f"gradient of {key}": value for key, value in sorted(named.items())}}

    return Candidate(name, run, results)


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def model_cases(quick: bool) -> list[Case]:
    """Swin-T forward and training step, NAT-T forward."""
    batch, size = (1, 224) if quick else (8, 224)
    torch.manual_seed(0)
    # without stochastic depth: both then compute the same, and all of it
    theirs = timm.create_model(TIMM_SWIN, drop_path_rate=0.0)
    swin = nearfield.create_model("swin_tiny", drop_path_rate=0.0)
    nat = nearfield.create_model("nat_tiny", drop_path_rate=0.0)
    assert isinstance(swin, Backbone)
    swin.load_state_dict(theirs.state_dict())
    accelerated = copy.deepcopy(theirs)
    nearfield.accelerate(accelerated)
    images, labels = _images(batch, size), torch.arange(batch)
    shape = f"batch {batch} at {size}"
    peer = _forward("timm's Swin-T", theirs, images)
    for model in (swin, nat, theirs, accelerated):
        model.eval()  # the same as training mode, with nothing dropped
    return [
        Case(
            f"Swin-T forward, {shape}",
            _forward("nearfield", swin, images),
            (Peer(peer, 1.05, "same weights"),),
        ),
        Case(
            f"Swin-T training step, {shape}",
            _training("nearfield", swin, images, labels, swin),
            (
                Peer(
                    _training("timm's Swin-T", theirs, images, labels, swin),
                    1.0,
                    "same weights; forward and backward of the cross entropy",
                ),
            ),
            tolerance=1e-3,
        ),
        Case(
            f"timm's Swin-T after nearfield.accelerate, forward, {shape}",
            _forward("nearfield", accelerated, images),
            (Peer(peer, None, "same weights"),),
        ),
        Case(
            f"NAT-T forward, {shape}",
            _forward("nearfield", nat, images),
            (Peer(peer, 1.0, "ratio of img/s; other models, so outputs are not compared"),),
            tolerance=None,
        ),
    ]


def memory_rows(quick: bool) -> list[Row]:
    """Peak memory of NAT-T's forward pass at a large size, against timm's Swin-T."""
    size = 256 if quick else 1024
    ours, theirs = measured("nat_tiny", (size, size)), measured(TIMM_SWIN, (size, size))
    name = f"peak memory of NAT-T forward, one image at {size}"
    return [Row(name, "timm's Swin-T", ours, theirs, ours / theirs, 1.2, "MiB", "most", METHOD)]


def scaling_rows(quick: bool, rounds: int) -> list[Row]:
    """Time per token of NAT-T at a large size, against that at a smaller one."""
    small, large = (64, 128) if quick else (512, 2048)
    model = nearfield.create_model("nat_tiny").eval()
    candidates = [_forward(str(size), model, _images(1, size)) for size in (small, large)]
    for candidate in candidates[:1]:
        check(candidate.results(candidate.run()), {}, candidate.name, None)
    times = median_ms(candidates, rounds)
    per_token = {size: 1e3 * times[str(size)] / (size // 4) ** 2 for size in (small, large)}
    return [
        Row(
            f"time per token of NAT-T forward, one image at {large}",
            f"the same at {small}",
            per_token[large],
            per_token[small],
            per_token[large] / per_token[small],
            1.3,
            "us",
            "most",
            "tokens of the first stage",
        )
    ]


def throughput(names: Sequence[str], backends: Sequence[str], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Images per second of any models of Nearfield or timm, at their own size; ours on each of the backends.

    Logits of one model on several backends are compared; WrongResult where they differ.
    """
    candidates: list[Candidate] = []
    found: list[dict[str, Any]] = []
    for name in names:
        torch.manual_seed(0)
        model = nearfield.create_model(name).eval()
        ours = isinstance(model, Backbone)
        size = int(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1])
        images = _images(batch, size)
        reference: dict[str, Tensor] | None = None
        for backend in backends if ours else ("timm",):
            candidate = _forward(f"{name} {backend}", _On(backend, model) if ours else model, images)
            logits = {"logits": candidate.run()}
            check(logits, reference or logits, candidate.name, 1e-4)
            reference = reference or logits
            candidates.append(candidate)
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            found.append(
                {"model": name, "backend": backend, "size": size, "batch": batch, "parameters_m": round(parameters, 2)}
            )
    times = median_ms(candidates, rounds)
    for row, candidate in zip(found, candidates, strict=True):
        row["ms"] = times[candidate.name]
        row["images_per_s"] = 1e3 * batch / times[candidate.name]
    return found


class _On(nn.Module):
    """A model whose operators run on one backend."""

    def __init__(self, backend: str, model: nn.Module) -> None:
        super().__init__()
        self.backend, self.model = backend, model

    def forward(self, x: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model(x)
