"""The backend as users meet it: chosen by argument, block or environment; whole models; what it refuses, and how."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import nearfield
import pytest
import torch
from kernel_helpers import everywhere
from nearfield.ops import (
    Neighborhood,
    Window,
    grid_attention,
    halo_attention,
    hilbert_neighborhood_attention,
    hilbert_window_attention,
    local_attention,
    neighborhood_attention,
    routing_attention,
    use_backend,
    window_attention,
)
from nearfield.ops.notices import say_once
from torch import Tensor

Launched = list[tuple[str, dict[str, Any]]]


def table(y: int, x: int) -> Tensor:
    return torch.randn(2, 2 * y - 1, 2 * x - 1)


# Every public function once: what it is given besides q, k and v, with a learned tensor last.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "local": (lambda *t, **o: local_attention(*t[:3], Neighborhood((3, 5)), bias=t[3], **o), lambda: (table(3, 5),)),
    "neighborhood": (
        lambda *t, **o: neighborhood_attention(*t[:3], 3, dilation=2, stride=2, bias=t[3], **o),
        lambda: (table(3, 3),),
    ),
    "window": (lambda *t, **o: window_attention(*t[:3], 4, shift=1, bias=t[3], **o), lambda: (table(4, 4),)),
    "grid": (lambda *t, **o: grid_attention(*t[:3], (3, 4), bias=t[3], **o), lambda: (table(3, 4),)),
    "halo": (
        lambda *t, **o: halo_attention(*t[:3], 3, 1, rel=(t[3], t[4]), **o),
        lambda: (torch.randn(9, 8), torch.randn(9, 8)),
    ),
    "hilbert window": (
        lambda *t, **o: hilbert_window_attention(*t[:3], 9, shift=4, bias=t[3], **o),
        lambda: (table(6, 7),),
    ),
    "hilbert neighborhood": (
        lambda *t, **o: hilbert_neighborhood_attention(*t[:3], 9, bias=t[3], **o),
        lambda: (torch.randn(2, 17),),
    ),
    "routing": (lambda *t, **o: routing_attention(*t[:3], None, 2, region_size=3, pad="zero", **o), lambda: ()),
}


def run(name: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = FUNCTIONS[name][0](*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def inputs(name: str, device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in (*torch.randn(3, 1, 6, 7, 2, 8).unbind(0), *FUNCTIONS[name][1]())]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_what_the_reference_gives(
    device: torch.device, name: str, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(name, device)
    want = run(name, tensors, backend="reference")
    assert not launched
    monkeypatch.setenv("NEARFIELD_BACKEND", "triton")
    torch.testing.assert_close(run(name, tensors), want, rtol=1e-4, atol=1e-5)
    assert launched


def test_the_backend_is_named_by_argument_block_or_environment(
    device: torch.device, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 3, 4, 1, 8, device=device)

    def kernels(**options: Any) -> bool:
        launched.clear()
        window_attention(q, q, q, 2, **options)
        return bool(launched)

    monkeypatch.delenv("NEARFIELD_BACKEND", raising=False)
    assert kernels() == (device.type == "cuda")  # by itself on CUDA tensors only
    assert kernels(backend="triton")
    with use_backend("triton"):
        assert kernels()
        assert not kernels(backend="torch")
        with use_backend("torch"):
            assert not kernels()
            assert kernels(backend="triton")
    monkeypatch.setenv("NEARFIELD_BACKEND", "triton")
    assert kernels()
    with use_backend("reference"):
        assert not kernels()


@everywhere("name", ["nat_nano", "swin_nano", "dinat_nano"], fast=(1,), fast_on_gpu=(0, 1, 2))
def test_models_compute_what_they_compute_on_the_reference(device: torch.device, name: str, launched: Launched) -> None:
    model = nearfield.create_model(name, num_classes=5).to(device).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 3:
                p.normal_()  # bias tables begin near zero
    image = torch.randn(1, 3, 32, 32, device=device)
    results = []
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend):
            logits = model(image)
            logits.square().sum().backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    assert launched
    (want, want_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got_gradients.keys() == want_gradients.keys()
    for key, gradient in got_gradients.items():
        scale = want_gradients[key].abs().max().item()
        torch.testing.assert_close(gradient, want_gradients[key], rtol=1e-3, atol=1e-4 * scale, msg=key)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_kernels_do_not_take_is_refused_in_one_line(device: torch.device, name: str, launched: Launched) -> None:
    q, k, v, *biases = inputs(name, device)
    double = [t.double() for t in (q, k, v, *biases)]
    wide = [*torch.randn(3, 1, 6, 7, 2, 256, device=device).unbind(0)]
    if name == "halo":
        biases = [torch.randn(9, 256, device=device) for _ in range(2)]
    wrong = [
        (double, "takes float16, bfloat16 and float32, got torch.float64"),
        ([*wide, *biases], "takes head_dim <= 128, got 256"),
    ]
    for tensors, said in wrong:
        with pytest.raises(ValueError, match=said) as caught:
            FUNCTIONS[name][0](*tensors, backend="triton")
        assert "\n" not in str(caught.value)
        assert "choose" in str(caught.value)
    assert not launched
    with pytest.raises(ValueError, match="head_dim <= 128, got 256"):
        FUNCTIONS["local"][0](q, k, wide[0], table(3, 5).to(device), backend="triton")


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is named runs or raises."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in FUNCTIONS:
        tensors = inputs(name, torch.device("cpu"))
        for options, around in (({"backend": "triton"}, None), ({}, "triton")):
            with use_backend(around), pytest.raises(ValueError, match="needs CUDA tensors, got cpu") as caught:
                FUNCTIONS[name][0](*tensors, **options)
            assert "\n" not in str(caught.value)
            assert "TRITON_INTERPRET=1" in str(caught.value)


def test_without_triton_the_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.ops import attention

    monkeypatch.setattr(attention, "_HAS_TRITON", False)
    q = torch.randn(1, 3, 4, 1, 8)
    with pytest.raises(ValueError, match="package triton, which is not installed"):
        local_attention(q, q, q, Window(2), backend="triton")
    assert local_attention(q, q, q, Window(2)).shape == q.shape


def test_no_kernel_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, torch, nearfield; q = torch.randn(1, 4, 4, 1, 8); "
        "nearfield.ops.window_attention(q, q, q, 2, backend='torch'); "
        "kernels = {'window', 'neighborhood', 'block_sparse', 'bias', 'primitives'}; "
        "found = {m for m in sys.modules if m.startswith('nearfield.ops.triton.') and m.split('.')[-1] in kernels}; "
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wrong_shapes_are_refused_as_by_the_other_backends(device: torch.device) -> None:
    q = torch.randn(1, 4, 4, 2, 8, device=device)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (Neighborhood(5), {}),
        (Window(2), {"bias": torch.zeros(2, 2, 2, device=device)}),
        (Window(2), {"bias": (torch.zeros(3, 4, device=device), torch.zeros(3, 8, device=device))}),
    ]
    for pattern, options in wrong:
        said = []
        for backend in ("torch", "triton"):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages are compared
                local_attention(q, q, q, pattern, backend=backend, **options)
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert "\n" not in said[0]


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dropout_runs_on_the_torch_backend_with_a_notice(device: torch.device, name: str, launched: Launched) -> None:
    tensors = inputs(name, device)

    def dropped(backend: str) -> list[Tensor]:
        torch.manual_seed(11)
        return run(name, tensors, dropout_p=0.4, backend=backend)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = dropped("torch")
    with pytest.warns(UserWarning, match="dropout runs on the 'torch' backend"):
        got = dropped("triton")
    assert not launched
    for a, b in zip(got, want, strict=True):  # on a GPU that backend adds in any order
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if device.type == "cpu" else {}))


def test_the_notice_of_dropout_is_shown_once(device: torch.device) -> None:
    q = torch.randn(1, 4, 4, 1, 8, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            window_attention(q, q, q, 2, dropout_p=0.5, backend="triton")
        window_attention(q, q, q, 4, dropout_p=0.1, backend="triton")  # another line of the caller's code
    assert len([w for w in caught if "dropout" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attention dropout")
        window_attention(q, q, q, 2, dropout_p=0.0, backend="triton")


def test_models_with_attention_dropout_train_on_the_torch_backend(device: torch.device, launched: Launched) -> None:
    model = nearfield.create_model("swin_nano", attn_drop_rate=0.2).to(device)
    image = torch.randn(1, 3, 32, 32, device=device)
    with use_backend("triton"), pytest.warns(UserWarning, match="dropout runs on the 'torch' backend"):
        model.train()(image).sum().backward()
    assert not launched
    with use_backend("triton"), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="attention dropout")
        model.eval()(image)
    assert launched
