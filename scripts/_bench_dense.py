"""Maps for detectors: backbone and FPN on a large image, against timm's Swin-T features under the same FPN."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from _bench_memory import METHOD, measured
from _bench_timing import Candidate, Case, Named, Peer, Row, WrongResult, check, check_all, median_ms
from nearfield.models.dense.backbone import DenseBackbone
from nearfield.models.dense.pyramid import Pyramid
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

TIMM_SWIN = "swin_tiny_patch4_window7_224"
PEER = "timm's Swin-T features + FPN"
MODELS = {"Swin-T": "swin_tiny", "NAT-T": "nat_tiny"}
SIZE, QUICK_SIZE = (800, 1216), (64, 96)
PROCESSES = 3
UNPADDED = (224, 224)  # every map is a multiple of the window
TIME_TARGET, MEMORY_TARGET = 1.15, 1.0


class TimmPyramid(nn.Module):
    """timm's features under torchvision's FPN, as one would put them together without Nearfield."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.body = cast(Any, timm.create_model(TIMM_SWIN, features_only=True, img_size=size))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 256, LastLevelMaxPool())

    def maps(self, x: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) to maps (B, C, H / stride, W / stride), channels-last in memory."""
        return [y.permute(0, 3, 1, 2) for y in self.body(x)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Image (B, 3, H, W) to the pyramid's maps."""
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.maps(x))))


def dense_model(name: str, size: tuple[int, int]) -> nn.Module:
    """One of MODELS' names, or TIMM_SWIN, under the FPN, for evaluation of images of that size."""
    torch.manual_seed(0)
    return (TimmPyramid(size) if name == TIMM_SWIN else Pyramid(DenseBackbone(name))).eval()


def _candidate(name: str, run: Callable[[Tensor], Any], image: Tensor) -> Candidate:
    def inferred() -> Any:
        with torch.inference_mode():
            return run(image)

    return Candidate(name, inferred, _named)


def _named(maps: Any) -> Named:
    return dict(maps) if isinstance(maps, dict) else {str(i): y for i, y in enumerate(maps)}


def _image(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def same_maps() -> Case:
    """The maps of both Swin-T with the same weights, where neither pads: on others timm shifts before it pads."""
    theirs = dense_model(TIMM_SWIN, UNPADDED)
    assert isinstance(theirs, TimmPyramid)
    ours = DenseBackbone("swin_tiny", out_norm="none").eval()
    weights = theirs.body.state_dict()
    ours.body.load_state_dict({key.replace("layers_", "layers."): value for key, value in weights.items()})
    image = _image(UNPADDED)
    peer = _candidate("timm's Swin-T features", theirs.maps, image)
    return Case("maps of Swin-T", _candidate("nearfield", ours, image), (Peer(peer),))


def dense_rows(quick: bool, rounds: int) -> list[Row]:
    """Time and peak memory of Swin-T and NAT-T, each under the FPN, against timm's Swin-T under it."""
    size = QUICK_SIZE if quick else SIZE
    where = f"{size[0]}x{size[1]}"
    times, wrong = _times(size, rounds)
    theirs = times.get(TIMM_SWIN)
    rows = []
    for title, name in MODELS.items():
        what, ours = f"{title} + FPN forward, one image at {where}", times.get(name)
        ratio = None if ours is None or theirs is None else theirs / ours
        note = wrong or ("other models" if title == "NAT-T" else "ours also norms every map, as Swin's detectors do")
        rows.append(Row(what, PEER, ours, theirs, ratio, TIME_TARGET, note=note))
    peak = _peak(TIMM_SWIN, size, quick)
    note = METHOD if quick else f"{METHOD}, median of {PROCESSES}"
    for title, name in MODELS.items():
        ours, what = _peak(name, size, quick), f"peak memory of {title} + FPN forward, one image at {where}"
        rows.append(Row(what, PEER, ours, peak, ours / peak, MEMORY_TARGET, "MiB", "most", note))
    return rows


def _peak(name: str, size: tuple[int, int], quick: bool) -> float:
    """MiB of one forward pass: what the allocator gives back in between differs from process to process."""
    return statistics.median(measured(name, size, dense=True) for _ in range(1 if quick else PROCESSES))


def _times(size: tuple[int, int], rounds: int) -> tuple[dict[str, float], str]:
    """Milliseconds of each model, taking turns; or none, and what is wrong."""
    image = _image(size)
    candidates = [_candidate(name, dense_model(name, size), image) for name in (*MODELS.values(), TIMM_SWIN)]
    try:
        check_all(same_maps())
        for candidate in candidates:
            check(candidate.results(candidate.run()), {}, candidate.name, None)
    except WrongResult as error:
        return {}, f"wrong result, not timed: {error}"
    return median_ms(candidates, rounds), ""
