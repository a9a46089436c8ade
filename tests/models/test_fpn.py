"""The feature pyramid is torchvision's, in training and in inference, and changes nobody's maps."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from nearfield.models.dense import fpn
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

CHANNELS = [8, 16, 24]
SIZES = {
    "even": ((12, 20), (6, 10), (3, 5)),
    "odd": ((11, 19), (6, 10), (3, 5)),
    "one is odd": ((12, 19), (6, 10), (3, 5)),
}


def _maps(sizes: Any, memory_format: torch.memory_format) -> dict[str, Tensor]:
    maps = [torch.randn(2, c, *size).to(memory_format=memory_format) for c, size in zip(CHANNELS, sizes, strict=True)]
    return OrderedDict((f"p{i}", y) for i, y in enumerate(maps))


def _both(extra: Any = None) -> tuple[fpn.FPN, FeaturePyramidNetwork]:
    ours, theirs = fpn.FPN(CHANNELS, 16, extra), FeaturePyramidNetwork(CHANNELS, 16, extra)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("extra", [None, LastLevelMaxPool(), LastLevelP6P7(16, 16)], ids=["", "pool", "conv"])
def test_results_are_those_of_torchvision(sizes: Any, memory_format: torch.memory_format, extra: Any) -> None:
    ours, theirs = _both(extra)
    maps = _maps(sizes, memory_format)
    before = {name: y.clone() for name, y in maps.items()}
    want = theirs(maps)
    for got in (ours(maps), torch.inference_mode()(ours)(maps), torch.no_grad()(ours)(maps)):
        assert list(got) == list(want)
        for name, y in want.items():
            assert torch.equal(got[name], y)
    assert all(torch.equal(y, before[name]) for name, y in maps.items())


def test_gradients_are_those_of_torchvision() -> None:
    ours, theirs = _both()
    maps = _maps(SIZES["even"], torch.channels_last)
    for network in (ours, theirs):
        sum(y.square().sum() for y in network(maps).values()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_maps_of_twice_the_size_are_added_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three levels have one above them; nothing is upsampled for either."""
    ours, _ = _both()

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("upsampled")

    monkeypatch.setattr(fpn.F, "interpolate", refuse)
    maps = _maps(SIZES["even"], torch.channels_last)
    with torch.no_grad():
        ours(maps)
    with pytest.raises(AssertionError, match="upsampled"):
        ours(maps)


@torch.no_grad()
@pytest.mark.parametrize("batched", ["maps", "weights"])
def test_it_is_vectorized(batched: str) -> None:
    ours, theirs = _both()
    maps = {name: torch.stack([y, 2 * y]) for name, y in _maps(SIZES["even"], torch.channels_last).items()}
    if batched == "maps":
        got = torch.func.vmap(ours)(maps)
        want = [theirs({name: y[i] for name, y in maps.items()}) for i in range(2)]
    else:
        parameters = dict(ours.named_parameters())
        scaled = {name: torch.stack([p, 2 * p]) for name, p in parameters.items() if name == "inner_blocks.1.0.weight"}
        one = {name: y[0] for name, y in maps.items()}
        got = torch.func.vmap(lambda own: torch.func.functional_call(ours, {**parameters, **own}, (one,)))(scaled)
        want = [torch.func.functional_call(theirs, {n: p[i] for n, p in scaled.items()}, (one,)) for i in range(2)]
    for name, y in got.items():
        torch.testing.assert_close(y, torch.stack([part[name] for part in want]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_hook_keeps_what_it_saw() -> None:
    ours, _ = _both()
    seen: list[Tensor] = []
    ours.inner_blocks[0][0].register_forward_hook(lambda _, args, out: seen.append(out))
    maps = _maps(SIZES["even"], torch.channels_last)
    ours(maps)
    assert torch.equal(seen[0], ours.inner_blocks[0](maps["p0"]))


@torch.no_grad()
def test_a_block_that_passes_a_map_through_leaves_it_alone() -> None:
    ours = fpn.FPN([16, 16], 16)
    ours.inner_blocks[0] = nn.Identity()
    maps = {"fine": torch.randn(1, 16, 4, 6).to(memory_format=torch.channels_last), "coarse": torch.randn(1, 16, 2, 3)}
    before = maps["fine"].clone()
    ours(maps)
    assert torch.equal(maps["fine"], before)
