"""Exported models: ONNX, torch.export, AOTInductor. One member of each family, whatever the registry holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nearfield
import pytest
import torch
from nearfield.models import Backbone, catalog
from nearfield.ops import routing_attention, use_backend
from torch import Tensor, nn

Small = Callable[..., Backbone]

# the example's batch is 2: from 1 PyTorch concludes that it is always 1
BATCH = ({0: torch.export.Dim("batch")},)


def _one_of_each_family() -> list[str]:
    """The small members for 32 x 32 images, and the first member of a family that has none."""
    names = [variant.name for variant in catalog.variants() if variant.name.endswith("_nano")]
    families = {variant.family.__module__ for variant in catalog.variants() if variant.name in names}
    for variant in catalog.variants():
        if variant.family.__module__ not in families:
            families.add(variant.family.__module__)
            names.append(variant.name)
    return names


every_family = pytest.mark.parametrize("name", _one_of_each_family())


def made(name: str, small: Small) -> nn.Module:
    """A model of the name whose every part matters, in evaluation mode."""
    model = nearfield.create_model(name, num_classes=10) if name.endswith("_nano") else small(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def model(name: str, small: Small) -> nn.Module:
    """As ``made``."""
    return made(name, small)


def images(batch: int) -> Tensor:
    # no multiple of any window: what a family pads is in the graph too
    return torch.randn(batch, 3, 36, 44)


def custom_ops(program: torch.export.ExportedProgram) -> set[str]:
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return {str(node.target) for node in calls if str(node.target).startswith("nearfield")}


def to_onnx(model: nn.Module, x: Tensor, folder: Path) -> Any:
    """A session of onnxruntime with the exported model, in which every operation is one of ONNX's own."""
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    path = folder / "model.onnx"
    program = torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_runs_any_batch(run: Callable[[Tensor], Tensor], model: nn.Module, tolerance: float) -> None:
    for batch in (1, 2, 5):
        x = images(batch)
        with torch.no_grad():
            expected = model(x)
            error = (run(x) - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"batch {batch}: {error:.1e}"


@every_family
def test_onnx_holds_plain_operations_and_runs_any_batch(model: nn.Module, tmp_path: Path) -> None:
    session = to_onnx(model, images(2), tmp_path)
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, 36, 44]
    assert_runs_any_batch(lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), model, 1e-4)


def test_onnx_routes_equal_scores_to_the_first_regions(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return routing_attention(torch.zeros_like(v), torch.zeros_like(v), v, (4, 4), 3)

    v = torch.randn(2, 8, 8, 1, 4)
    session = to_onnx(Tied(), v, tmp_path)
    (got,) = session.run(None, {session.get_inputs()[0].name: v.numpy()})
    expected = v[:, :2, :6].mean((1, 2), keepdim=True).expand(v.shape)
    torch.testing.assert_close(torch.from_numpy(got), expected)


@pytest.mark.parametrize(("backbone", "head"), [("swin_nano", "upernet"), ("nat_nano", "fpn")])
def test_onnx_of_a_segmentor_runs_any_batch(backbone: str, head: str, tmp_path: Path) -> None:
    sizes = {"num_classes": 3, "channels": 16, "aux_channels": 8, "fpn_channels": 16}
    segmentor = nearfield.create_segmentor(backbone, head, **sizes)
    # statistics and weights that matter
    segmentor(torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        for p in segmentor.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    segmentor.eval()
    # maps of 18 x 22, 9 x 11 and 5 x 6 tokens, which the pooling's 1, 2, 3 and 6 cells do not divide
    session = to_onnx(segmentor, images(2), tmp_path)
    (given,) = session.get_inputs()
    assert session.get_outputs()[0].shape == ["batch", 3, 36, 44]
    assert_runs_any_batch(lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), segmentor, 1e-4)


@every_family
def test_torch_export_keeps_the_fused_op_and_runs_any_batch(model: nn.Module) -> None:
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert custom_ops(program)
    assert_runs_any_batch(program.module(), model, 1e-6)


@every_family
def test_the_plain_backend_exports_without_a_custom_op(model: nn.Module) -> None:
    with use_backend("plain"):
        program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert not custom_ops(program)
    assert_runs_any_batch(program.module(), model, 1e-5)


class Families(nn.Module):
    """All of them side by side: one compile, most of which costs the same for one as for ten."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model in self.models)


@pytest.mark.slow
def test_aot_inductor_runs_any_batch_of_every_family(small: Small, tmp_path: Path) -> None:
    names = _one_of_each_family()
    model = Families([made(name, small) for name in names]).eval()
    with torch.no_grad():
        program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for index, one in enumerate(model.models):
        assert_runs_any_batch(lambda x, index=index: run(x)[index], one, 1e-5)
