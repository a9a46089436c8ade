"""Inference on a CPU computes linear layers and MLPs as training does, and calls whatever is more than a formula."""

from __future__ import annotations

from typing import Any

import nearfield
import pytest
import torch
from nearfield.models import products
from nearfield.models.layers import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(16, nn.Identity(), 3.0, 0.5, 0.0, 0.0, nn.LayerNorm).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 25, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("onednn", [True, False])
def test_pieces_give_what_training_computes(
    monkeypatch: pytest.MonkeyPatch, block: Block, x: Tensor, onednn: bool
) -> None:
    monkeypatch.setattr(products, "PIECE_TOKENS", 70)
    monkeypatch.setattr(products, "PIECE_BYTES", 1)
    if not onednn:
        monkeypatch.setattr(products, "_ONEDNN", None)
    want, want_mlp = block(x).detach(), block.mlp(x).detach()
    before = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(block(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block.mlp(x), want_mlp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(products.linear(block.mlp.fc1, x), block.mlp.fc1(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["mlp", "mlp.fc1", "mlp.act", "norm2"])
def test_hooks_see_the_whole_map(block: Block, x: Tensor, name: str) -> None:
    seen: list[Any] = []
    block.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out.shape[:-1]))
    with torch.no_grad():
        block(x)
    assert seen == [x.shape[:-1]]


def test_a_module_in_its_place_is_called(block: Block, x: Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(16, 48)
    doubled.load_state_dict(block.mlp.fc1.state_dict())
    block.mlp.fc1 = doubled
    want = block(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x), want, atol=1e-5, rtol=1e-5)


def test_products_are_counted() -> None:
    model, image = nearfield.create_model("nat_nano").eval(), torch.randn(8, 3, 32, 32)
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            model(image)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
