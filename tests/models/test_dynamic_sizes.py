"""Compiled for any size (``dynamic=True``): how many graphs images of different sizes take."""

from __future__ import annotations

import nearfield
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

# multiples of nothing in particular, of windows, odd sides, wider than high and the other way round
SIZES = ((72, 56), (64, 80), (51, 77), (100, 68))

# A stride of 2 on channels-last maps, whose order of strides PyTorch asks for by size: HaloNet takes a second graph.
GRAPHS = {"halonet_nano": 2}

# sizes are traced as formulas, which takes the others twice as long: they are in the long run
QUICK = ("nat_nano", "dinat_nano", "hnt_nano")


def _every_nano() -> list[object]:
    names = [name for name in nearfield.list_models() if name.endswith("_nano")]
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _every_nano())
def test_images_of_all_sizes_share_a_graph(name: str) -> None:
    model = nearfield.create_model(name, num_classes=10).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= GRAPHS.get(name, 1)


def test_a_size_that_is_given_is_not_padded_for_others() -> None:
    """A graph of one size has no padding, no cropping where there is nothing to pad."""
    model = nearfield.create_model("swin_nano", num_classes=10).eval()
    counter = CompileCounterWithBackend("eager")
    with torch.inference_mode():
        torch.compile(model, fullgraph=True, dynamic=False, backend=counter)(torch.randn(2, 3, 32, 32))
    (graph,) = counter.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    assert called
    assert not any("pad" in target or target == "clone" for target in called)
