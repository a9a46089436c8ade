"""What training scripts put around a state dict comes off; nothing else does."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

import pytest
import torch
from nearfield.checkpoints import CheckpointError, unwrap
from torch import Tensor

STATE = {"stem.weight": torch.ones(2), "stages.0.bias": torch.zeros(3)}
AVERAGE = {key: value + 1 for key, value in STATE.items()}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    "obj",
    [
        STATE,
        OrderedDict(STATE),
        {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}, "epoch": 3},
        {"state_dict": STATE, "meta": {"config": "text"}},
        {"model_state": STATE},
        {"model_state_dict": STATE},
        {"module": STATE},
        {"model": {"state_dict": STATE}},
        {"model": STATE, "args": argparse.Namespace(model="nat_mini")},
        {"state_dict": STATE, "state_dict_ema": AVERAGE},
        {"model": STATE, "model_ema": AVERAGE, "step": torch.tensor(3)},
        {"model": "nat_mini", "state_dict": STATE},
        {"model": {}, "state_dict": STATE},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("module.module."),
        prefixed("model."),
        {"state_dict": prefixed("model._orig_mod.")},
        {"stem._orig_mod.weight": STATE["stem.weight"], "stages.0._orig_mod.bias": STATE["stages.0.bias"]},
        {"n_averaged": torch.tensor(7), **prefixed("module.")},
        {**STATE, **prefixed("model_ema.", AVERAGE)},
        {**prefixed("model."), **prefixed("model_ema.", AVERAGE)},
        {**STATE, "version": 2, "names": ["a"]},
        {"state_dict_ema": STATE},
        {"ema": {"module": STATE}, "epoch": 3},
    ],
    ids=range(27),
)
def test_the_state_dict_inside_is_found(obj: Any) -> None:
    assert same(unwrap(obj), STATE)


@pytest.mark.parametrize(
    "obj",
    [
        {"state_dict": STATE, "state_dict_ema": AVERAGE},
        {"model": STATE, "model_ema": AVERAGE},
        {"model": STATE, "ema": {"module": AVERAGE}},
        {"state_dict": STATE, "ema_state_dict": prefixed("module.", AVERAGE)},
        {"state_dict": {**STATE, **prefixed("model_ema.", AVERAGE)}},
        {**prefixed("model."), **prefixed("ema.", AVERAGE)},
        {"model": {"model_ema": AVERAGE, "state_dict": STATE}},
    ],
    ids=range(7),
)
def test_averaged_weights_are_taken_when_asked_for(obj: Any) -> None:
    assert same(unwrap(obj, ema=True), AVERAGE)


def test_missing_averages_are_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"no averaged \(EMA\) weights"):
        unwrap({"model": STATE}, ema=True)


def test_only_detached_tensors_are_kept() -> None:
    state = unwrap({"weight": torch.nn.Parameter(torch.ones(2)), "extra": 3, 7: torch.ones(1)})
    assert list(state) == ["weight"]
    assert type(state["weight"]) is Tensor
    assert not state["weight"].requires_grad


def test_keys_that_only_share_a_first_word_partly_are_left_alone() -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert unwrap(state).keys() == state.keys()


DETECTOR = {
    **prefixed("backbone."),
    "neck.lateral_convs.0.conv.weight": torch.ones(1),
    "roi_head.bbox_head.fc_cls.weight": torch.ones(1),
}


def test_the_backbone_of_a_detector_is_taken() -> None:
    assert same(unwrap({"state_dict": DETECTOR, "meta": {}}), STATE)


def test_a_detector_stays_whole_when_asked_for() -> None:
    assert unwrap({"state_dict": DETECTOR}, backbone=False).keys() == DETECTOR.keys()


def test_the_classifier_beside_a_backbone_is_kept() -> None:
    state = unwrap({**prefixed("backbone."), "head.fc.weight": torch.ones(1), "neck.conv.weight": torch.ones(1)})
    assert state.keys() == {*STATE, "head.fc.weight"}


def test_nothing_is_cut_when_backbone_parts_lie_outside() -> None:
    state = {**prefixed("backbone."), "stages.0.weight": torch.ones(1)}
    assert unwrap(state).keys() == state.keys()


def nested(depth: int) -> dict[str, Any]:
    obj: dict[str, Any] = STATE
    for _ in range(depth):
        obj = {"model": obj}
    return obj


@pytest.mark.parametrize(
    ("obj", "match"),
    [
        ({}, "holds no tensors"),
        ({"epoch": 3, "model": {"lr": 0.1}}, r"holds no tensors \(found: epoch, model\)"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        (None, "holds a NoneType"),
        (torch.nn.Linear(2, 2), "state_dict"),
        (nested(20), "holds no tensors|wrapped more than"),
    ],
    ids=range(7),
)
def test_what_holds_no_state_dict_is_named(obj: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        unwrap(obj)
    assert "\n" not in str(error.value)


def test_a_cyclic_checkpoint_ends() -> None:
    obj: dict[str, Any] = {"optimizer": torch.ones(1)}
    obj["model"] = obj
    with pytest.raises(CheckpointError, match="wrapped"):
        unwrap(obj)
