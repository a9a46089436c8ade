"""Routed attention against loops over regions and tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from nearfield.ops import Full, local_attention, routing, routing_attention
from nearfield.ops.routing import Regions, cut_regions, route
from ops_helpers import CPU_BACKENDS
from torch import Tensor

# (height, width, regions, region_size, topk)
SHAPES = [
    (8, 8, 4, None, 2),
    (6, 9, (2, 3), None, 3),
    (4, 4, 2, None, 4),
    (7, 10, None, 3, 2),
    (5, 8, None, (2, 3), 5),
    (5, 5, None, 7, 1),
    (1, 9, None, (1, 4), 2),
    (3, 4, None, 1, 5),
    (9, 7, (3, 2), None, 1),
]


def regions_of(height: int, width: int, regions: object, region_size: object) -> list[list[tuple[int, int] | None]]:
    """Tokens of each region in raster order; None for what a short region lacks."""

    def pair(value: object) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value  # type: ignore[return-value]

    if region_size is None:
        ny, nx = pair(regions)
        sy, sx = (height + ny - 1) // ny, (width + nx - 1) // nx
    else:
        sy, sx = pair(region_size)
        ny, nx = (height + sy - 1) // sy, (width + sx - 1) // sx
    cells = []
    for a, b in product(range(ny), range(nx)):
        cell = []
        for y, x in product(range(a * sy, (a + 1) * sy), range(b * sx, (b + 1) * sx)):
            cell.append((y, x) if y < height and x < width else None)
        cells.append(cell)
    return cells


def routing_by_loops(
    q: Tensor, k: Tensor, v: Tensor, cells: list[list[tuple[int, int] | None]], topk: int, pad: str, scale: float
) -> Tensor:
    B, _, _, heads, d = q.shape
    out = torch.zeros(*q.shape[:4], v.shape[4], dtype=torch.float64)
    for n in range(B):
        real = [[t for t in cell if t is not None] for cell in cells]
        means = [[torch.stack([t[n, y, x].detach().flatten() for y, x in r]).mean(0) for r in real] for t in (q, k)]
        for i, cell in enumerate(real):
            scores = [float(means[0][i] @ other) for other in means[1]]
            chosen = sorted(range(len(cells)), key=lambda j: (-scores[j], j))[:topk]
            keys = [t for j in chosen for t in cells[j] if t is not None or pad == "zero"]
            for (y, x), h in product(cell, range(heads)):
                zk, zv = torch.zeros(d, dtype=torch.float64), torch.zeros(v.shape[4], dtype=torch.float64)
                ks = torch.stack([zk if t is None else k[n, t[0], t[1], h] for t in keys])
                vs = torch.stack([zv if t is None else v[n, t[0], t[1], h] for t in keys])
                out[n, y, x, h] = (scale * (ks @ q[n, y, x, h])).softmax(0) @ vs
    return out


def tensors(height: int, width: int, *, batch: int = 2, heads: int = 2, d: int = 4, dv: int = 3) -> list[Tensor]:
    return [
        torch.randn(batch, height, width, heads, c, dtype=torch.float64, requires_grad=True) for c in (d, d, dv)
    ]  # fmt: skip


@pytest.mark.parametrize("pad", ["zero", "clip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_equal_the_loops(shape: tuple, pad: str) -> None:
    height, width, regions, region_size, topk = shape
    q, k, v = tensors(height, width)
    cells = regions_of(height, width, regions, region_size)
    want = routing_by_loops(q, k, v, cells, topk, pad, 0.3)
    grad = torch.randn_like(want)
    gradients = torch.autograd.grad(want, (q, k, v), grad)
    for backend in CPU_BACKENDS:
        got = routing_attention(q, k, v, regions, topk, region_size=region_size, pad=pad, scale=0.3, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(torch.autograd.grad(got, (q, k, v), grad), gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("pad", ["zero", "clip"])
def test_backends_agree_in_every_chunking(pad: str, monkeypatch: pytest.MonkeyPatch, poisoned: list[int]) -> None:
    for gather_bytes in (1, 4000, 8 << 20):
        monkeypatch.setattr(routing, "GATHER_BYTES", gather_bytes)
        for height, width, regions, region_size, topk in SHAPES:
            q, k, v = tensors(height, width)
            outs = [
                routing_attention(q, k, v, regions, topk, region_size=region_size, pad=pad, backend=backend)
                for backend in ("torch", "reference")
            ]
            torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-11)
            grad = torch.randn_like(outs[0])
            gradients = [torch.autograd.grad(t, (q, k, v), grad) for t in outs]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    assert poisoned


def test_equal_scores_go_to_the_first_region() -> None:
    q = torch.randn(1, 6, 6, 2, 4)
    k = torch.ones(1, 6, 6, 2, 4)
    cut = cut_regions(6, 6, 3, None)
    assert route(q, k, cut, 9).tolist() == [[list(range(9))] * 9]
    k[:, 2:4, 2:4] = 2.0  # the middle region, and the last one the same
    k[:, 4:, 4:] = 2.0
    for row, score in zip(
        route(q, k, cut, 9)[0].tolist(), (q.view(1, 3, 2, 3, 2, 8).sum((2, 4, 5))).flatten(), strict=True
    ):
        others = [0, 1, 2, 3, 5, 6, 7]
        assert row == ([4, 8, *others] if score > 0 else [*others, 4, 8])


def test_means_of_short_regions_are_over_real_tokens() -> None:
    q = torch.ones(1, 4, 5, 1, 2, dtype=torch.float64)
    k = torch.full_like(q, 2.0)
    k[:, :, 3:] = 3.0  # columns 3, 4 are a short region of 3 columns: its mean is 3, with padding it would be 2
    cut = cut_regions(4, 5, None, 3)
    assert (cut.ny, cut.nx) == (2, 2)
    assert route(q, k, cut, 2)[0].tolist() == [[1, 3]] * 4


def test_routes_are_the_best_regions_best_first() -> None:
    q, k = torch.randn(2, 3, 8, 8, 2, 4, dtype=torch.float64).unbind(0)
    cut = cut_regions(8, 8, 4, None)

    def means(t: Tensor) -> Tensor:
        return t.view(3, 4, 2, 4, 2, 8).mean((2, 4)).flatten(1, 2)

    scores = means(q) @ means(k).transpose(1, 2)
    routes = route(q, k, cut, 5)
    assert routes.dtype == torch.int64
    assert torch.equal(routes, scores.topk(5).indices)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_all_regions_are_dense_attention(backend: str) -> None:
    for height, width, regions, region_size in ((8, 8, 4, None), (7, 10, None, (3, 4)), (5, 3, None, 2)):
        q, k, v = tensors(height, width)
        count = len(regions_of(height, width, regions, region_size))
        got = routing_attention(q, k, v, regions, count, region_size=region_size, pad="clip", backend=backend)
        want = local_attention(q, k, v, Full(), backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
        grad = torch.randn_like(got)
        gradients = [torch.autograd.grad(t, (q, k, v), grad) for t in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("pad", ["zero", "clip"])
def test_packed_gradient_is_the_stack_of_the_separate_ones(pad: str, backend: str) -> None:
    for height, width, regions, region_size, topk in SHAPES:
        qkv = torch.randn(2, height, width, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        parts = [t.detach().clone().requires_grad_() for t in qkv.unbind(3)]
        options = {"region_size": region_size, "pad": pad, "backend": backend}
        packed = routing_attention(qkv, None, None, regions, topk, **options)
        apart = routing_attention(*parts, regions, topk, **options)
        torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(packed)
        (dqkv,) = torch.autograd.grad(packed, qkv, grad)
        want = torch.stack(torch.autograd.grad(apart, parts, grad), 3)
        torch.testing.assert_close(dqkv, want, rtol=1e-11, atol=1e-12)


def test_any_strides_are_taken() -> None:
    q, k, v = torch.randn(3, 2, 2, 4, 9, 8, dtype=torch.float64).permute(0, 1, 4, 5, 2, 3)  # stored heads first
    assert not q.is_contiguous()
    got = routing_attention(q, k, v, None, 2, region_size=2)
    want = routing_attention(q.contiguous(), k.contiguous(), v.contiguous(), None, 2, region_size=2)
    assert got.shape == (2, 9, 8, 2, 4)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    one = torch.randn(1, 6, 6, 1, 4, dtype=torch.float64).expand(2, 6, 6, 3, 4)
    torch.testing.assert_close(
        routing_attention(one, one, one, 2, 3), routing_attention(one, one, one, 2, 3, backend="reference")
    )


@pytest.mark.parametrize("pad", ["zero", "clip"])
def test_gradcheck(pad: str) -> None:
    q, k, v = tensors(3, 5, batch=1, heads=1, d=2, dv=2)

    def call(*leaves: Tensor) -> Tensor:
        return routing_attention(*leaves, None, 2, region_size=2, pad=pad)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, (q, k, v))
    qkv = torch.randn(1, 4, 3, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: routing_attention(t, None, None, None, 2, region_size=2, pad=pad), (qkv,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pad", ["zero", "clip"])
def test_low_precision_errs_no_more_than_the_eager_reference_and_rounding(pad: str, dtype: torch.dtype) -> None:
    for height, width, regions, region_size, topk in SHAPES:
        leaves = [t.detach().to(dtype) for t in tensors(height, width, d=16, dv=16)]
        runs = []
        for backend, wide in (("reference", torch.float64), ("reference", dtype), ("torch", dtype)):
            q, k, v = (t.to(wide).requires_grad_() for t in leaves)
            out = routing_attention(q, k, v, regions, topk, region_size=region_size, pad=pad, backend=backend)
            grads = torch.autograd.grad(out, (q, k, v), leaves[2].to(wide))
            runs.append([t.double() for t in (out.detach(), *grads)])
        size = max(t.abs().max().item() for t in runs[0])
        for want, easy, got in zip(*runs, strict=True):
            allowed = (easy - want).abs().max() + (16 + 16) ** 0.5 * torch.finfo(dtype).eps * size
            assert (got - want).abs().max() <= allowed


def test_routing_stays_in_float32_under_autocast() -> None:
    q, k, v = (t.detach().float() for t in tensors(8, 8, d=16, dv=16))
    for backend in CPU_BACKENDS:
        plain = routing_attention(q, k, v, 4, 2, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(routing_attention(q, k, v, 4, 2, backend=backend), plain)


def test_a_meta_tensor_has_a_meta_output() -> None:
    qkv = torch.empty(2, 8, 12, 3, 2, 4, device="meta")
    out = routing_attention(qkv, None, None, 4, 3)
    assert out.is_meta
    assert out.shape == (2, 8, 12, 2, 4)


def test_results_are_bitwise_repeatable() -> None:
    q, k, v = (t.detach().float().requires_grad_() for t in tensors(9, 8))
    runs = []
    for _ in range(5):
        out = routing_attention(q, k, v, None, 3, region_size=3)
        runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    q = torch.randn(0, 4, 4, 2, 8, requires_grad=True)
    out = routing_attention(q, q, q, 2, 1, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"regions": 2, "topk": 0}, ["topk=0", "[1, 4]"]),
        ({"regions": 2, "topk": 5}, ["topk=5", "[1, 4]"]),
        ({"regions": None, "topk": 1}, ["regions", "region_size"]),
        ({"regions": 2, "topk": 1, "region_size": 2}, ["regions", "region_size", "both"]),
        ({"regions": 0, "topk": 1}, ["0", "positive"]),
        ({"regions": (1, 2, 3), "topk": 1}, ["(1, 2, 3)", "(y, x)"]),
        ({"regions": 2.5, "topk": 1}, ["2.5", "positive ints"]),
        ({"regions": (2.0, 2.0), "topk": 1}, ["2.0", "positive ints"]),
        ({"regions": 4, "topk": 1}, ["6x6 map", "4x4 regions", "region_size"]),
        ({"regions": 2, "topk": 1, "pad": "wrap"}, ["pad='wrap'", "'zero'", "'clip'"]),
        ({"regions": 2, "topk": 1, "dropout_p": 1.0}, ["dropout_p=1.0", "[0, 1)"]),
        ({"regions": 2, "topk": 1, "backend": "cuda"}, ["unknown backend 'cuda'", "reference, torch"]),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_value(kwargs: dict, said: list[str]) -> None:
    q = torch.randn(1, 6, 6, 2, 4)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the messages are compared below
        routing_attention(q, q, q, **kwargs)
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_regions_are_cut_and_joined_without_loss() -> None:
    for height, width, regions, region_size, _ in SHAPES:
        cut = cut_regions(height, width, regions, region_size)
        cells = regions_of(height, width, regions, region_size)
        assert (cut.count, cut.tokens) == (len(cells), len(cells[0]))
        t = torch.randn(2, height, width, 2, 3)
        pieces = cut.cut(t)
        for i, cell in enumerate(cells):
            for j, token in enumerate(cell):
                want = torch.zeros(2, 2, 3) if token is None else t[:, token[0], token[1]]
                assert torch.equal(pieces[:, i, j], want)
        assert torch.equal(cut.join(pieces), t)
        assert cut.present(t.device).tolist() == [[token is not None for token in cell] for cell in cells]
        assert torch.equal(cut.real(t.device).flatten(), cut.present(t.device).sum(1))


def test_a_region_count_decides_the_region_size() -> None:
    assert cut_regions(14, 21, (7, 7), None) == Regions(14, 21, 7, 7, 2, 3)
    assert cut_regions(14, 21, None, 4) == Regions(14, 21, 4, 6, 4, 4)
