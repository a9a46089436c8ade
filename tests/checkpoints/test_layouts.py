"""The layout machinery: templates, recognition, round trips, tables, and what is said when a file does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nearfield.checkpoints import CheckpointMismatch, FlippedTable, Layout, Rule, convert, describe_mismatch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"

# small hand-written stand-ins: the real rules live in the families' own files
NAT = Layout(
    "shi-labs",
    "test",
    signature=("patch_embed.proj.0.weight", "levels.{i}.blocks.{j}.attn.rpb"),
    rules=(
        Rule("patch_embed.proj.0.{rest}", "stem.conv1.{rest}"),
        Rule("patch_embed.proj.1.{rest}", "stem.conv2.{rest}"),
        Rule("patch_embed.norm.{rest}", "stem.norm.{rest}"),
        Rule("levels.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}"),
        Rule("levels.{i}.blocks.{j}.attn.rpb", "stages.{i}.blocks.{j}.attn.rel_pos_bias"),
        Rule("levels.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
        Rule("head.weight", "head.fc.weight"),
        Rule("head.bias", "head.fc.bias"),
    ),
)
_TABLE = "layers.{i}.blocks.{j}.attn.relative_position_bias_table"
_REST = (
    Rule("patch_embed.{rest}", "stem.{rest}"),
    Rule("layers.{i}.blocks.{j}.{rest}", "stages.{i}.blocks.{j}.{rest}"),
)
_HEAD = (Rule("head.weight", "head.fc.weight"), Rule("head.bias", "head.fc.bias"))
_WINDOW = Rule(_TABLE, "stages.{i}.blocks.{j}.attn.rel_pos_bias", FlippedTable())
_NEIGHBORHOOD = Rule("layers.{i}.blocks.{j}.attn.rpb", "stages.{i}.blocks.{j}.attn.rel_pos_bias")
_SHIFTED = Rule("layers.{i}.downsample.{rest}", "stages.{i+1}.downsample.{rest}")
_DROPS = ("layers.{i}.blocks.{j}.attn_mask", "layers.{i}.blocks.{j}.attn.relative_position_index")
MICROSOFT = Layout(
    "microsoft",
    "test",
    signature=(_TABLE, "layers.0.downsample.reduction.weight"),
    rules=(_SHIFTED, _WINDOW, *_REST, *_HEAD),
    drops=_DROPS,
)
TIMM = Layout(
    "timm",
    "test",
    signature=(_TABLE, "layers.1.downsample.reduction.weight"),
    rules=(Rule("layers.{i}.downsample.{rest}", "stages.{i}.downsample.{rest}"), _WINDOW, *_REST),
    drops=_DROPS,
    absent=("layers.0.downsample.{rest}",),
)
DINAT_S = Layout(
    "shi-labs",
    "test",
    signature=("layers.{i}.blocks.{j}.attn.rpb",),
    rules=(_SHIFTED, _NEIGHBORHOOD, *_REST, *_HEAD),
)
LAYOUTS = (NAT, MICROSOFT, TIMM, DINAT_S)
PUBLISHED = {
    "nat_mini": NAT,
    "dinat_mini": NAT,
    "dinat_s_tiny": DINAT_S,
    "swin_tiny_patch4_window7_224": MICROSOFT,
}


def published_state(name: str) -> dict[str, Tensor]:
    """The authors' key list with other numbers in every tensor."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        keys = json.loads(str(file["meta"]))["keys"]
    return {
        key: torch.randn(shape) if "table" in key or "rpb" in key else torch.tensor(float(position)).expand(shape)
        for position, (key, shape, _) in enumerate(keys)
    }


@pytest.fixture(params=sorted(PUBLISHED))
def published(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Layout]:
    return published_state(request.param), PUBLISHED[request.param]


def same(left: Tensor, right: Tensor) -> bool:
    return left is right or torch.equal(left, right)


def is_dropped(key: str) -> bool:
    return key.endswith(("attn_mask", "relative_position_index"))


def test_only_the_right_layout_recognises_the_authors_keys(published: tuple[dict[str, Tensor], Layout]) -> None:
    state, layout = published
    assert [known for known in LAYOUTS if known.recognises(state)] == [layout]


def test_recognition_needs_no_head_and_no_masks(published: tuple[dict[str, Tensor], Layout]) -> None:
    state, layout = published
    features = [key for key in state if not key.startswith("head.") and not is_dropped(key)]
    assert [known for known in LAYOUTS if known.recognises(features)] == [layout]
    assert [known for known in LAYOUTS if known.recognises(iter(features))] == [layout]


def test_round_trip_is_bit_equal(published: tuple[dict[str, Tensor], Layout]) -> None:
    state, layout = published
    kept = {key: value for key, value in state.items() if not is_dropped(key)}
    ours = layout.to_ours(state)
    assert len(ours) == len(kept)
    back = layout.to_theirs(ours)
    assert list(back) == list(kept)
    assert all(same(back[key], kept[key]) for key in kept)
    again = layout.to_ours(back)
    assert all(same(again[key], ours[key]) for key in ours)


def test_converted_keys_are_in_our_layout(published: tuple[dict[str, Tensor], Layout]) -> None:
    state, layout = published
    ours = layout.to_ours(state)
    assert {key.split(".")[0] for key in ours} == {"stem", "stages", "norm", "head"}
    tables = [value for key, value in ours.items() if key.endswith("rel_pos_bias")]
    assert tables
    assert all(table.ndim == 3 and table.shape[1:] == (13, 13) for table in tables)
    assert {int(key.split(".")[1]) for key in ours if ".downsample." in key} == {1, 2, 3}
    assert {"head.fc.weight", "head.fc.bias"} <= set(ours)


def test_converting_twice_changes_nothing(published: tuple[dict[str, Tensor], Layout]) -> None:
    state, layout = published
    once, found = convert(state, LAYOUTS)
    twice, nothing = convert(once, LAYOUTS)
    assert found is layout
    assert nothing is None
    assert list(twice) == list(once)
    assert all(twice[key] is once[key] for key in once)


def test_unknown_keys_come_back_unchanged() -> None:
    state = {"conv.weight": torch.ones(2)}
    out, layout = convert(state, LAYOUTS)
    assert layout is None
    assert out == state
    assert out is not state


def test_conversion_leaves_its_argument_alone() -> None:
    state = published_state("swin_tiny_patch4_window7_224")
    keys, table = list(state), state["layers.0.blocks.0.attn.relative_position_bias_table"].clone()
    convert(state, LAYOUTS)
    assert list(state) == keys
    assert torch.equal(state["layers.0.blocks.0.attn.relative_position_bias_table"], table)


def test_microsoft_moves_downsampling_and_timm_does_not() -> None:
    theirs = MICROSOFT.to_ours(published_state("swin_tiny_patch4_window7_224"))
    as_timm = TIMM.to_theirs(theirs)
    assert "layers.1.downsample.norm.weight" in as_timm
    assert "layers.0.downsample.norm.weight" not in as_timm
    assert [known.name for known in LAYOUTS if known.recognises(as_timm)] == ["timm"]
    back, layout = convert(as_timm, LAYOUTS)
    assert layout is TIMM
    assert back.keys() == theirs.keys()
    assert all(same(back[key], theirs[key]) for key in theirs)


def test_uncovered_keys_keep_their_names() -> None:
    state = published_state("nat_mini") | {"aux_head.weight": torch.ones(1)}
    assert "aux_head.weight" in NAT.to_ours(state)


def test_a_mixture_of_layouts_is_refused() -> None:
    state = published_state("nat_mini")
    state["head.fc.weight"] = state["head.weight"]
    with pytest.raises(CheckpointMismatch, match=r"head\.fc\.weight.*mixes two layouts"):
        NAT.to_ours(state)


def test_first_rule_that_matches_wins_in_both_directions() -> None:
    layout = Layout(
        "x",
        "test",
        signature=("a.{i}.special",),
        rules=(Rule("a.{i}.special", "b.{i}.own"), Rule("a.{rest}", "b.{rest}")),
    )
    state = {"a.0.special": torch.zeros(1), "a.0.other": torch.ones(1)}
    ours = layout.to_ours(state)
    assert set(ours) == {"b.0.own", "b.0.other"}
    assert set(layout.to_theirs(ours)) == set(state)


# templates


@given(i=st.integers(0, 40), j=st.integers(0, 40), tail=st.text("ab.0", min_size=1, max_size=6))
def test_shifted_integers_and_tails_come_back(i: int, j: int, tail: str) -> None:
    rule = Rule("p.{i}.q{j-1}.{rest}", "o.{i+2}.{j}-{rest}")
    ours = rule.rename(f"p.{i}.q{j}.{tail}")
    assert ours == f"o.{i + 2}.{j + 1}-{tail}"
    assert rule.rename_back(ours) == f"p.{i}.q{j}.{tail}"


@pytest.mark.parametrize(
    "key", ["levels.01.x", "levels.x.x", "levels.-1.x", "levels.1.", "levels.1", "xlevels.1.x", "levels..x"]
)
def test_only_plain_integers_and_full_tails_match(key: str) -> None:
    assert Rule("levels.{i}.{rest}", "stages.{i}.{rest}").rename(key) is None


def test_a_negative_index_is_no_match() -> None:
    rule = Rule("levels.{i}.downsample", "stages.{i+1}.downsample")
    assert rule.rename_back("stages.0.downsample") is None
    assert rule.rename_back("stages.1.downsample") == "levels.0.downsample"
    assert Rule("a.{i}", "b.{i-1}").rename("a.0") is None
    assert Rule("a.{i+1}", "b.{i+1}").rename("a.0") is None


def test_a_repeated_field_must_agree_with_itself() -> None:
    rule = Rule("a.{i}.b.{i+1}", "c.{i}")
    assert rule.rename("a.3.b.4") == "c.3"
    assert rule.rename("a.3.b.3") is None
    assert rule.rename_back("c.3") == "a.3.b.4"


def test_regex_characters_are_literal() -> None:
    assert Rule("a.b", "c").rename("axb") is None
    assert Rule("a+{i}", "c{i}").rename("a+1") == "c1"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("a.{i}", "b"),
        ("a", "b.{i}"),
        ("a.{i}", "b.{j}"),
        ("a.{rest}.x", "b.{rest}"),
        ("a.{i*2}", "b.{i}"),
        ("a.{rest}{rest}", "b.{rest}"),
        ("a{", "b"),
    ],
)
def test_rules_that_cannot_be_inverted_are_refused(theirs: str, ours: str) -> None:
    with pytest.raises(ValueError, match=r"rule|template"):
        Rule(theirs, ours)


def test_a_layout_without_signature_is_refused() -> None:
    with pytest.raises(ValueError, match="signature"):
        Layout("x", "test", signature=(), rules=())


@pytest.mark.parametrize("rules", [(Rule("a", "c"), Rule("b", "c")), (Rule("a", "b"), Rule("a", "c"))])
def test_two_rules_for_one_template_are_refused(rules: tuple[Rule, ...]) -> None:
    with pytest.raises(ValueError, match="more than one rule"):
        Layout("x", "test", signature=("a",), rules=rules)


# tables


@pytest.mark.parametrize(("wy", "wx"), [(1, 1), (2, 2), (7, 7), (3, 2), (2, 5), (1, 4)])
def test_table_entries_move_from_query_minus_key_to_key_minus_query(wy: int, wx: int) -> None:
    heads = 2
    theirs = torch.randn((2 * wy - 1) * (2 * wx - 1), heads)
    ours = FlippedTable().to_ours(theirs, torch.Size((heads, 2 * wy - 1, 2 * wx - 1)))
    assert ours.shape == (heads, 2 * wy - 1, 2 * wx - 1)
    for yq in range(wy):
        for xq in range(wx):
            for yk in range(wy):
                for xk in range(wx):
                    row = (yq - yk + wy - 1) * (2 * wx - 1) + (xq - xk + wx - 1)
                    assert torch.equal(ours[:, yk - yq + wy - 1, xk - xq + wx - 1], theirs[row])
    assert torch.equal(FlippedTable().to_theirs(ours), theirs)


def test_a_table_of_another_size_keeps_its_own() -> None:
    theirs = torch.randn(23 * 23, 4)
    ours = FlippedTable().to_ours(theirs, torch.Size((4, 13, 13)))
    assert ours.shape == (4, 23, 23)
    assert torch.equal(FlippedTable().to_theirs(ours), theirs)


def test_expected_shapes_reach_the_table() -> None:
    state = {
        "layers.0.blocks.0.attn.relative_position_bias_table": torch.randn(5 * 9, 2),
        "layers.0.downsample.reduction.weight": torch.ones(1),
    }
    name = "stages.0.blocks.0.attn.rel_pos_bias"
    ours, layout = convert(state, LAYOUTS, {name: torch.Size((2, 5, 9))})
    assert layout is MICROSOFT
    assert ours[name].shape == (2, 5, 9)


def test_a_rectangle_that_nobody_expects_comes_back() -> None:
    theirs = torch.randn(5 * 9, 2)
    ours = FlippedTable().to_ours(theirs, None)
    assert ours.shape == (2, 1, 45)
    assert torch.equal(FlippedTable().to_theirs(ours), theirs)
    with pytest.raises(CheckpointMismatch, match=r"45 rows.*13 x 13"):
        FlippedTable().to_ours(theirs, torch.Size((2, 13, 13)))


def read_tables(rows: Iterable[int], shapes: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Sizes of the tables that a file with these rows has for a model with tables of these shapes."""
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    state = {table.format(i): torch.randn(count, 2) for i, count in enumerate(rows)}
    state["layers.0.downsample.reduction.weight"] = torch.ones(1)
    names = [f"stages.{i}.blocks.0.attn.rel_pos_bias" for i in range(len(state) - 1)]
    ours, _ = convert(
        state, LAYOUTS, {name: torch.Size((2, *shape)) for name, shape in zip(names, shapes, strict=True)}
    )
    return [tuple(ours[name].shape[1:]) for name in names]


# 225 rows: 15 x 15 of a window of 8, or 9 x 25 of one of 5 x 13
@pytest.mark.parametrize(
    ("rows", "shapes", "sizes"),
    [
        ((961, 225), ((19, 51), (9, 25)), [(31, 31), (15, 15)]),
        ((969, 225), ((19, 51), (9, 25)), [(19, 51), (9, 25)]),
        ((225, 169), ((9, 25), (15, 15)), [(15, 15), (13, 13)]),
    ],
)
def test_rows_of_a_square_and_of_an_oblong_table_are_read_as_the_others_of_the_file(
    rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...], sizes: list[tuple[int, ...]]
) -> None:
    assert read_tables(rows, shapes) == sizes
    assert read_tables(rows[::-1], shapes[::-1]) == sizes[::-1]


@pytest.mark.parametrize(
    ("rows", "shapes"), [((225,), ((9, 25),)), ((225, 225), ((9, 25),) * 2), ((225, 169), ((9, 25), (13, 13)))]
)
def test_rows_of_a_square_and_of_an_oblong_table_are_not_guessed(
    rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(CheckpointMismatch, match=r"225 rows.* 15 x 15 .* 9 x 25, .*set_input_size") as error:
        read_tables(rows, shapes)
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(46, 2), (16, 2), (169,), (2, 13, 13)])
def test_impossible_tables_are_named(shape: tuple[int, ...]) -> None:
    state = {
        "layers.0.blocks.0.attn.relative_position_bias_table": torch.randn(shape),
        "layers.0.downsample.reduction.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointMismatch, match=r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table") as error:
        convert(state, LAYOUTS)
    assert "\n" not in str(error.value)


# what is said


def test_nothing_is_said_when_all_fits() -> None:
    assert describe_mismatch({"a": torch.ones(2, 3)}, {"a": torch.Size((2, 3))}) == ""


def test_differences_are_one_line_with_every_kind() -> None:
    state = {"a": torch.ones(2), "b": torch.ones(3), "extra": torch.ones(1)}
    text = describe_mismatch(state, {"a": torch.Size((2,)), "b": torch.Size((4,)), "c": torch.Size(())})
    assert "\n" not in text
    assert "lacks 1 key: c" in text
    assert "does not have 1 key: extra" in text
    assert "b is (3,) in the file and (4,) in the model" in text


def test_long_lists_are_cut() -> None:
    state = {f"k{i}": torch.ones(1) for i in range(20)}
    text = describe_mismatch(state, {"a": torch.Size((1,))}, limit=2)
    assert "20 keys: k0, k1 and 18 more" in text
    assert "k2" not in text
    assert "no key of the model is in the file" in text
