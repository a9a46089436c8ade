"""Arguments that no model can be made with: one line each, for every family that takes an argument of that name."""

from __future__ import annotations

from typing import Any

import nearfield
import pytest
from nearfield.models import catalog, registry

NANO = [name for name in nearfield.list_models() if name.endswith("_nano")]
CONVOLUTIONS = {"attention": ((), (), ())}

# argument, value, words of the error, what else is given
WRONG: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("depths", 3, "positive ints", {}),
    ("depths", (), "positive ints", {}),
    ("depths", (2, -1, 2), "positive ints", {}),
    ("depths", (0, 1, 1), "positive ints", {}),
    ("embed_dim", 0, "positive int", {}),
    ("embed_dim", -4, "positive int", {}),
    ("embed_dim", (32, 64, 128), "positive int", {}),
    ("num_heads", 0, "positive int", {}),
    ("num_heads", (None, 2, 2), "positive int", {}),
    ("num_heads", 5, "num_heads=5 must divide the", {}),
    ("num_heads", (1, 2), "the 3 stages", {}),
    ("in_chans", 0, "positive int", {}),
    ("in_chans", (3,), "positive int", {}),
    ("num_classes", -1, "at least 0", {}),
    ("num_classes", [10], "at least 0", {}),
    ("mlp_ratio", -1, "above 0", {}),
    ("mlp_ratio", (2.0, None, 2.0), "above 0", {}),
    ("drop_rate", 2, "probability", {}),
    ("drop_path_rate", 1.0, "probability", {}),
    ("drop_path_rate", [0.0, 0.1, 0.2], "probability", {}),
    ("attn_drop_rate", -0.1, "probability", {}),
    ("proj_drop_rate", 3, "probability", {}),
    ("layer_scale", "x", "a number", {}),
    ("layer_scale", (1.0, 1.0, 1.0), "a number", {}),
    ("global_pool", "nope", "'avg', 'max'", {}),
    ("norm_layer", "nope", "a class", {}),
    ("act_layer", "nope", "a class", {}),
    ("gate", "nope", "a class", CONVOLUTIONS),
    ("gate_ratio", -1, "above 0", {"gate": "se", **CONVOLUTIONS}),
    ("group_width", 5, "must divide", CONVOLUTIONS),
    ("img_size", 0, "positive int", {}),
    ("img_size", (64,), "pair", {}),
    ("img_size", 64.0, "pair", {}),
    ("window_size", 0, "positive int", {}),
    ("window_size", -3, "positive int", {}),
    ("window_size", "x", "positive int", {}),
    ("grid_size", 0, "positive int", {}),
    ("kernel_size", 0, "positive int", {}),
    ("dilations", 0, "the 3 stages", {}),
    ("dilations", (1,), "the 3 stages", {}),
    ("regions", 0, "positive int", {}),
    ("topk", 0, "full attention", {}),
    ("topk", (1, 2), "the 3 stages", {}),
    ("block_size", 0, "positive int", {}),
    ("halo_size", 0, "positive int", {}),
    ("halo_size", -1, "positive int", {}),
    ("attention", ((2,), (0,), (0,)), "blocks from 0 to 1", {}),
    ("attention", ((0,), (-1,), (0,)), "blocks from 0 to 1", {}),
    ("attention", ((0,), (0,)), "the 3 stages", {}),
    ("attention", 1, "the 3 stages", {}),
    ("qk_ratio", 0, "above 0", {}),
    ("num_heads", 128, "more than the", {"attention": ((), (), (0,)), "qk_ratio": 0.1}),
    ("head_dim", 0, "positive int", {}),
    ("r_v", 0, "above 0", {}),
    ("r_b", 0, "above 0", {}),
    ("r_b", (1.0, None, 1.0), "above 0", {}),
    ("expansion", 0, "above 0", {}),
    ("num_features", 0, "positive int", {}),
    ("stem_dims", (), "positive int", {}),
    ("stem_kernel_size", 0, "positive int", {}),
    ("stem_stride", 0, "must be", {}),
    ("first_stride", 3, "1 or 2", {}),
    ("stem_width", 0, "positive int", {}),
    ("expand_ratio", 0, "above 0", {}),
]


def _cases() -> list[Any]:
    cases = []
    for name in NANO:
        variant = catalog.get(name)
        assert variant is not None
        takes = registry._arguments(variant.family)
        cases += [
            pytest.param(name, argument, value, said, others, id=f"{name}-{argument}={value}")
            for argument, value, said, others in WRONG
            if {argument, *others} <= takes.keys()
        ]
    return cases


@pytest.mark.parametrize(("name", "argument", "value", "said", "others"), _cases())
def test_is_one_line_with_the_name_and_the_rule(
    name: str, argument: str, value: Any, said: str, others: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=argument) as caught:
        nearfield.create_model(name, **others, **{argument: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NANO)
def test_depths_of_another_length_name_what_has_the_old_one(name: str) -> None:
    # MaxViT has nothing else that is one for each stage
    if name == "maxvit_nano":
        assert len(nearfield.create_model(name, depths=(1, 1)).stages) == 2
        return
    with pytest.raises(ValueError, match=r"one (entry )?for each of the 2 stages, got \("):
        nearfield.create_model(name, depths=(1, 1))


@pytest.mark.parametrize("name", NANO)
def test_another_classifier_is_checked_alike(name: str) -> None:
    model = nearfield.create_model(name, num_classes=10)
    for arguments, said in (((3, "nope"), "global_pool"), ((-1,), "num_classes")):
        with pytest.raises(ValueError, match=said):
            model.reset_classifier(*arguments)
    assert model.num_classes == model.get_classifier().out_features == 10


def test_every_argument_of_every_family_has_a_wrong_value_here() -> None:
    tried = {argument for argument, *_ in WRONG}
    # both of them are true or false; the third is tested with its family
    others = {
        "qkv_bias",
        "spare_rows",
        "zero_init",
        "stem_pool",
        "hidden_head",
        "mlp_tables",
        "pretrained_window_sizes",
    }
    for name in NANO:
        variant = catalog.get(name)
        assert variant is not None
        assert set(registry._arguments(variant.family)) <= tried | others
