"""The schedule cache: bounded, least recently used out first, nothing born in inference mode."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from nearfield.ops import HilbertWindow, Neighborhood, cache, local_attention
from nearfield.ops.cache import TensorCache
from nearfield.ops.notices import say_once
from torch import Tensor

CPU = torch.device("cpu")
ROUND = pytest.mark.filterwarnings("ignore:nearfield's schedules take more")


def kilobyte() -> Tensor:
    return torch.zeros(256)


def test_a_tensor_is_built_once() -> None:
    cache, built = TensorCache(1 << 20), []
    for _ in range(3):
        cache.get("a", lambda: (built.append(1), kilobyte())[1], CPU)
    assert built == [1]
    assert cache.get("a", kilobyte, CPU) is cache.get("a", kilobyte, CPU)
    assert cache.nbytes == 1024


@ROUND
def test_the_least_recently_used_goes_first() -> None:
    cache = TensorCache(3 * 1024)
    kept = {key: cache.get(key, kilobyte, CPU) for key in "abc"}
    cache.get("a", kilobyte, CPU)  # b is now the oldest
    cache.get("d", kilobyte, CPU)
    assert cache.nbytes == 3 * 1024
    assert cache.get("a", kilobyte, CPU) is kept["a"]
    assert cache.get("c", kilobyte, CPU) is kept["c"]
    assert cache.get("b", kilobyte, CPU) is not kept["b"]


def test_bytes_never_exceed_the_bound() -> None:
    cache = TensorCache(10_000)
    for i in range(200):
        cache.get(i, lambda i=i: torch.zeros(7 * i, dtype=torch.int64), CPU)
        assert 0 <= cache.nbytes <= 10_000
    assert cache.nbytes > 0


def test_one_larger_than_the_cache_is_given_but_not_kept() -> None:
    cache = TensorCache(1000)
    small = cache.get("small", lambda: torch.zeros(8), CPU)
    assert cache.get("large", kilobyte, CPU).numel() == 256
    assert cache.nbytes == 32
    assert cache.get("small", kilobyte, CPU) is small


def test_views_count_their_own_elements_and_every_dtype_its_size() -> None:
    cache = TensorCache(1 << 20)
    cache.get("long", lambda: torch.zeros(10, dtype=torch.int64), CPU)
    cache.get("byte", lambda: torch.zeros(10, dtype=torch.uint8), CPU)
    assert cache.nbytes == 90


def test_a_tensor_that_several_hold_counts_once() -> None:
    cache, shared = TensorCache(3 * 1024), kilobyte()
    for key in "abc":
        cache.get(key, lambda: SimpleNamespace(tensors=[shared, torch.zeros(128), shared]), CPU)
    assert cache.nbytes == 1024 + 3 * 512
    cache.get("d", kilobyte, CPU)  # a goes; what it shares stays with the others
    assert cache.nbytes == 1024 + 2 * 512 + 1024
    for key in "efg":
        cache.get(key, kilobyte, CPU)
    assert cache.nbytes == 3 * 1024


def test_what_is_made_again_and_again_is_said_once() -> None:
    cache, device = TensorCache(1024), CPU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get("a", kilobyte, device)
        cache.get("b", kilobyte, device)
        cache.get("too large", lambda: torch.zeros(1024), device)
        assert cache.get("b", kilobyte, device) is cache.get("b", kilobyte, device)
    say_once.cache_clear()
    for again in ("a", "too large"):
        with pytest.warns(UserWarning, match="made again and again: raise .*max_bytes"):
            cache.get(again, kilobyte if again == "a" else lambda: torch.zeros(1024), device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.get("b", kilobyte, device)
            cache.get("a", kilobyte, device)
        say_once.cache_clear()


def test_clear_forgets_everything() -> None:
    cache = TensorCache(1 << 20)
    first = cache.get("a", kilobyte, CPU)
    cache.clear()
    assert cache.nbytes == 0
    assert cache.get("a", kilobyte, CPU) is not first


def test_a_failing_build_leaves_the_cache_usable() -> None:
    cache = TensorCache(1 << 20)

    def fail() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get("a", fail, CPU)
    assert cache.nbytes == 0
    assert cache.get("a", kilobyte, CPU).numel() == 256


def test_tensors_made_under_inference_mode_can_be_trained_with() -> None:
    cache = TensorCache(1 << 20)
    with torch.inference_mode():
        assert not cache.get("a", kilobyte, CPU).is_inference()
    weight = torch.randn(256, requires_grad=True)
    (weight * cache.get("a", kilobyte, CPU)).sum().backward()


def test_a_graph_may_only_capture_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, device = TensorCache(1 << 20), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run it once, eagerly"):
        cache.get("a", kilobyte, device)
    there = cache.get("a", kilobyte, CPU)
    assert cache.get("a", kilobyte, device) is there
    cache.clear()
    assert there in cache._captured.values()  # a replay reads it


def test_what_a_device_reads_is_made_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose allocations another thread's memory pool does not catch."""
    cache, stream = TensorCache(1 << 20), SimpleNamespace(synchronize=lambda: waited.append(threading.get_ident()))
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with torch.inference_mode():
        made = cache.get("a", lambda: (waited.append(threading.get_ident()), kilobyte())[1], torch.device("cuda", 0))
    assert len(set(waited)) == 1
    assert threading.get_ident() not in waited
    assert not made.is_inference()


@ROUND
def test_threads_share_one_cache() -> None:
    cache, wrong = TensorCache(50 * 1024), []

    def work(seed: int) -> None:
        for i in range(300):
            key = (i * 7 + seed) % 90
            if cache.get(key, lambda key=key: torch.full((256,), float(key)), CPU)[0].item() != key:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.nbytes <= 50 * 1024
    assert cache.nbytes == sum(t.numel() * 4 for t in cache._values.values())


def test_the_operators_cache_is_bounded_and_holds_nothing_of_a_parameter() -> None:
    assert cache.SCHEDULES.max_bytes <= 256 << 20
    cache.SCHEDULES.clear()
    q, table = torch.randn(1, 9, 9, 1, 8), torch.randn(1, 5, 5)
    local_attention(q, q, q, Neighborhood(3), bias=table)
    first = local_attention(q, q, q, HilbertWindow(9), bias=torch.zeros(1, 17, 17))
    held = cache.SCHEDULES.nbytes
    assert held > 0
    other = local_attention(q, q, q, Neighborhood(3), bias=table.add_(1.0) * torch.arange(25).view(1, 5, 5))
    want = local_attention(q, q, q, Neighborhood(3), bias=table * torch.arange(25).view(1, 5, 5), backend="reference")
    torch.testing.assert_close(other, want)
    assert cache.SCHEDULES.nbytes == held  # another table, same schedule
    moved = local_attention(q, q, q, HilbertWindow(9), bias=torch.randn(1, 17, 17))
    assert not torch.allclose(first, moved)
