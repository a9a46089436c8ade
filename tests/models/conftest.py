"""Scaled-down members of every family, so that the whole registry is tested in a minute.

A test with the argument ``member`` runs for every registered model, once for those that scaling makes equal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nearfield.models import Backbone, catalog, registry

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("model_helpers")


def _small_kwargs(name: str) -> dict[str, Any]:
    """As registered, with at most two blocks a stage and few channels."""
    variant = catalog.get(name)
    assert variant is not None
    kwargs = dict(variant.kwargs)
    depths = tuple(min(depth, 2) for depth in kwargs["depths"])
    small = {"depths": depths, "embed_dim": 16, "num_heads": tuple(2**i for i in range(len(depths)))}
    # a branch that begins at zero would have no gradients
    small |= {"mlp_ratio": 2.0, "zero_init": False, "drop_path_rate": 0.0, "num_classes": 7}
    if "stem_width" in kwargs:
        # MaxViT: three sub-blocks a block; heads of 32 channels, as its published files have them
        small |= {"embed_dim": 32, "stem_width": 16, "depths": (1, 2, 1, 1)[: len(depths)], "img_size": 96}
        del small["num_heads"]
    kwargs |= {key: value for key, value in small.items() if key in registry._arguments(variant.family)}
    if "attention" in kwargs:
        stages = zip(kwargs["attention"], depths, strict=True)
        kwargs["attention"] = tuple(tuple(j for j in stage if j < depth) for stage, depth in stages)
    if "dilations" in kwargs:
        kwargs["dilations"] = tuple(stage[:depth] for stage, depth in zip(kwargs["dilations"], depths, strict=True))
    return kwargs


def _distinct_members() -> list[str]:
    members: dict[str, str] = {}
    for variant in catalog.variants():
        members.setdefault(repr((variant.family, sorted(_small_kwargs(variant.name).items()))), variant.name)
    return list(members.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", _distinct_members())


@pytest.fixture
def small_kwargs() -> Callable[[str], dict[str, Any]]:
    """Constructor arguments of a scaled-down model, by name."""
    return _small_kwargs


@pytest.fixture
def small() -> Callable[..., Backbone]:
    """Makes the scaled-down model of a name, in evaluation mode."""

    def make(name: str, **overrides: Any) -> Backbone:
        variant = catalog.get(name)
        assert variant is not None
        return variant.family(**(_small_kwargs(name) | overrides)).eval()

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # maps are tiny here, a second thread costs more than it brings
    torch.set_num_threads(1)
