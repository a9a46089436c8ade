"""State dicts of every layout into models that fit them, nearly fit them, or do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nearfield
import pytest
import timm
import torch
from model_helpers import randomise
from nearfield import checkpoints
from nearfield.models import Backbone, export_state_dict, models_that_fit
from torch import nn

Small = Callable[..., Backbone]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_every_layout_round_trips_bit_for_bit(member: str, small: Small) -> None:
    model = randomise(small(member))
    assert model.layouts
    for layout in model.layouts:
        theirs = export_state_dict(model, layout.name)
        assert [known.name for known in model.layouts if known.recognises(theirs)] == [layout.name]
        assert not any(known.recognises(model.state_dict()) for known in model.layouts)
        # a key that both layouts have means the same in both, but for the shape, or cannot be taken for the other
        own = {key: value for key, value in model.state_dict().items() if key.startswith("stages.")}
        both = [(theirs[key].flatten(), own[key].flatten()) for key in theirs.keys() & own.keys()]
        assert all(len(a) != len(b) or torch.equal(a, b) for a, b in both)
        other = small(member)
        other.load_state_dict(theirs)
        assert same(model, other)


def test_unknown_layout_is_an_error_with_the_known_ones(small: Small) -> None:
    with pytest.raises(ValueError, match=r"'google'.*microsoft, timm"):
        export_state_dict(small("swin_tiny"), "google")


def test_weights_of_timms_own_swin_give_timms_logits() -> None:
    kwargs = {
        "img_size": 64,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "num_classes": 5,
    }
    theirs = randomise(timm.create_model("swin_tiny_patch4_window7_224", **kwargs)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.3)
    ours = nearfield.create_model("swin_tiny", **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


def test_our_own_keys_load_under_a_prefix_and_in_wrappers(small: Small, tmp_path: Path) -> None:
    model = randomise(nearfield.create_model("nat_nano", num_classes=10))
    path = tmp_path / "run.pth"
    for content in (
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}},
        {"model": {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}, "epoch": 1},
        dict(model.state_dict()),
    ):
        torch.save(content, path)
        # the file decides the number of classes when the caller does not
        assert same(model, nearfield.create_model("nat_nano", checkpoint_path=path))
    checkpoints.save(model.state_dict(), tmp_path / "run.safetensors")
    assert same(model, nearfield.create_model("nat_nano", checkpoint_path=tmp_path / "run.safetensors"))
    # nothing in the file becomes the model's buffer or alias
    detector = nn.ModuleDict({"backbone": nearfield.create_model("nat_nano", num_classes=10)})
    detector.load_state_dict({f"backbone.{key}": value for key, value in model.state_dict().items()})
    assert same(detector["backbone"], model)


def test_input_channels_follow_the_file_or_are_adapted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "grey.pth"
    grey = randomise(nearfield.create_model("nat_nano", num_classes=10, in_chans=1))
    torch.save(grey.state_dict(), path)
    assert same(grey, nearfield.create_model("nat_nano", checkpoint_path=path))
    with caplog.at_level(logging.INFO, "nearfield.models"):
        colour = nearfield.create_model("nat_nano", checkpoint_path=path, in_chans=3)
    assert ["from 1 to 3 input channels" in record.getMessage() for record in caplog.records] == [True]
    assert torch.allclose(colour.stem.conv1.weight.sum(1), grey.stem.conv1.weight.sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["nearfield", "timm", "load_state_dict"])
@pytest.mark.parametrize("published", [True, False])
def test_tables_of_another_size_are_resized_with_one_log_line(
    route: str, published: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "k5.pth"
    model = randomise(nearfield.create_model("nat_nano", num_classes=10))
    torch.save(export_state_dict(model, "shi-labs") if published else model.state_dict(), path)
    kwargs = {"kernel_size": (7, 5, 3), "num_classes": 10}
    with caplog.at_level(logging.INFO, "nearfield.models"):
        if route == "load_state_dict":
            other = nearfield.create_model("nat_nano", **kwargs)
            other.load_state_dict(torch.load(path, weights_only=True))
        else:
            create = nearfield.create_model if route == "nearfield" else timm.create_model
            other = create("nat_nano", checkpoint_path=path, **kwargs)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "nearfield.models"]
    assert "2 from 9x9 to 13x13" in line
    for j in (0, 1):
        table = model.stages[0].blocks[j].attn.rel_pos_bias
        expected = nearfield.ops.resize_table(table, (13, 13))
        assert torch.equal(other.stages[0].blocks[j].attn.rel_pos_bias, expected)
    assert torch.equal(other.stages[1].blocks[0].attn.rel_pos_bias, model.stages[1].blocks[0].attn.rel_pos_bias)


def test_a_window_that_is_not_square_keeps_its_published_table(small: Small) -> None:
    model = randomise(small("swin_tiny", window_size=(3, 6)))
    for layout in ("microsoft", "timm"):
        other = small("swin_tiny", window_size=(3, 6))
        other.load_state_dict(export_state_dict(model, layout))
        assert same(model, other)


def assert_mismatch(error: BaseException, *words: str) -> None:
    assert isinstance(error, checkpoints.CheckpointMismatch)
    assert isinstance(error, RuntimeError)
    assert all(word in str(error) for word in words), str(error)


def test_a_file_of_another_model_names_keys_shapes_and_the_models_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    state = export_state_dict(nearfield.create_model("nat_mini"), "shi-labs")
    torch.save({"model": state}, path)
    for load in (
        lambda: nearfield.create_model("nat_tiny", checkpoint_path=path),
        lambda: timm.create_model("nat_tiny", checkpoint_path=path),
        lambda: nearfield.create_model("nat_tiny").load_state_dict(state),
    ):
        with pytest.raises(checkpoints.CheckpointMismatch) as caught:
            load()
        # twins that only their dilations tell apart
        assert_mismatch(caught.value, "nat_tiny", "stages.2.blocks.6.norm1.weight", "fits nat_mini, dinat_mini")
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        nearfield.create_model("nat_small", checkpoint_path=path)
    assert_mismatch(caught.value, "stem.norm.weight", "(64,)", "(96,)")
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        nearfield.create_model("swin_tiny", features_only=True, checkpoint_path=path)
    assert_mismatch(caught.value, "fits nat_mini, dinat_mini")


def test_a_missing_or_unexpected_key_is_never_overlooked(small: Small) -> None:
    model = small("swin_tiny")
    for layout in ("microsoft", "timm"):
        state = export_state_dict(model, layout)
        with pytest.raises(checkpoints.CheckpointMismatch) as caught:
            small("swin_tiny").load_state_dict({**state, "layers.0.blocks.0.extra": torch.zeros(1)})
        assert_mismatch(caught.value, "stages.0.blocks.0.extra")
        del state["layers.1.blocks.0.attn.qkv.bias"]
        with pytest.raises(checkpoints.CheckpointMismatch) as caught:
            small("swin_tiny").load_state_dict(state)
        assert_mismatch(caught.value, "lacks 1 key", "stages.1.blocks.0.attn.qkv.bias")
    result = small("swin_tiny").load_state_dict(state, strict=False)
    assert result.missing_keys == ["stages.1.blocks.0.attn.qkv.bias"]
    assert result.unexpected_keys == []


def test_another_class_count_is_an_error_outside_create_model() -> None:
    state = nearfield.create_model("nat_nano", num_classes=10).state_dict()
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        nearfield.create_model("nat_nano").load_state_dict(state)
    assert_mismatch(caught.value, "head.fc.weight", "(10, 96)", "nat_nano made with num_classes=10, in_chans=3")


def test_another_class_count_draws_a_new_head_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.pth"
    model = nearfield.create_model("nat_nano", num_classes=10)
    torch.save(export_state_dict(model, "shi-labs"), path)
    with caplog.at_level(logging.INFO, "nearfield.models"):
        other = nearfield.create_model("nat_nano", checkpoint_path=path, num_classes=4)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "nearfield.models"]
    assert "10 classes" in line
    assert "4 classes" in line
    assert other.num_classes == 4
    assert other.head.fc.weight.shape == (4, 96)
    assert other.head.fc.weight.std() > 0
    bodies = [{k: v for k, v in m.state_dict().items() if not k.startswith("head.fc")} for m in (model, other)]
    assert all(torch.equal(value, bodies[1][key]) for key, value in bodies[0].items())
    assert models_that_fit(nearfield.create_model("nat_nano", checkpoint_path=path, num_classes=0).state_dict())


def test_a_published_cfg_is_checked_strictly_though_timm_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pth"
    state = nearfield.create_model("nat_nano").state_dict()
    del state["norm.bias"]
    torch.save(state, path)
    with pytest.raises(checkpoints.CheckpointMismatch) as caught:
        # timm loads loosely as soon as the number of classes differs
        timm.create_model("nat_nano", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=3)
    assert_mismatch(caught.value, "norm.bias")


def test_files_that_fit_are_found_by_content(small: Small) -> None:
    with torch.device("meta"):
        swin = nearfield.create_model("swin_small", num_classes=3, in_chans=1)
        for layout in ("microsoft", "timm"):
            assert models_that_fit(export_state_dict(swin, layout)) == ["swin_small"]
        # in our own names another attention in the same body is a twin too
        assert models_that_fit(swin.state_dict()) == ["dinat_s_small", "swin_small"]
        assert models_that_fit(nearfield.create_model("dinat_small").state_dict()) == ["dinat_small"]
        assert models_that_fit(nearfield.create_model("dinat_large").state_dict()) == ["dinat_large", "dinat_large_384"]
    assert models_that_fit({"fc.weight": torch.zeros(2, 2)}) == []
    assert models_that_fit(small("nat_mini").state_dict()) == []


def test_a_checkpoint_that_is_not_there_says_so() -> None:
    with pytest.raises(checkpoints.CheckpointError, match="no_such_file"):
        nearfield.create_model("nat_nano", checkpoint_path="no_such_file.pth")


def test_the_file_of_a_twin_is_noticed_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "dinat_mini_in1k_224.pth"
    torch.save(nearfield.create_model("nat_mini").state_dict(), path)
    for name, lines in (("nat_mini", 1), ("dinat_mini", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nearfield.models"):
            nearfield.create_model(name, checkpoint_path=path)
        assert ["published for dinat_mini" in record.getMessage() for record in caplog.records] == [True] * lines


def test_a_plain_state_dict_with_a_wrapper_prefix_is_taken() -> None:
    model = randomise(nearfield.create_model("nat_nano"))
    other = nearfield.create_model("nat_nano")
    other.load_state_dict({f"module.{key}": value for key, value in model.state_dict().items()})
    assert same(model, other)


def test_a_file_of_another_model_is_named_for_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints.save(nearfield.create_model("nat_nano").state_dict(), tmp_path / "a.safetensors")
    with (
        caplog.at_level(logging.WARNING, "nearfield.models"),
        pytest.raises(checkpoints.CheckpointMismatch, match="it fits nat_nano"),
    ):
        nearfield.create_model("swin_nano", checkpoint_path=tmp_path / "a.safetensors")
    assert "resized" not in caplog.text


@pytest.mark.parametrize(
    ("argument", "said"), [("kernelsize", "did you mean kernel_size"), ("xyz", "it takes .*depths")]
)
def test_an_unknown_argument_is_answered_with_the_known_ones(argument: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"nat_nano takes no argument '{argument}': .*{said}"):
        nearfield.create_model("nat_nano", **{argument: 3})


def test_a_pruned_model_takes_one_size_for_each_stage_it_was_made_with() -> None:
    features = nearfield.create_model("nat_nano", features_only=True, out_indices=(0,))
    features.set_input_size(kernel_size=(7, 5, 3))
    assert features.backbone.stages[0].blocks[0].attn.kernel_size == (7, 7)


@pytest.mark.parametrize(("theirs", "ours"), [("swin_nano", "hwt_nano"), ("hwt_nano", "swin_nano")])
def test_a_file_whose_tables_are_those_of_another_family_is_not_resized(theirs: str, ours: str, tmp_path: Path) -> None:
    state = nearfield.create_model(theirs, num_classes=10).state_dict()
    model = nearfield.create_model(ours, num_classes=10)
    assert {key for key in state if "rel_pos" not in key} == {key for key in model.state_dict() if "rel_pos" not in key}
    with pytest.raises(RuntimeError, match=f"does not fit {ours}: .*it fits {theirs}"):
        model.load_state_dict(state)
    checkpoints.save(state, tmp_path / "file.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=f"it fits {theirs}"):
        nearfield.create_model(ours, checkpoint_path=tmp_path / "file.safetensors")


@pytest.mark.parametrize("route", ["create_model", "load_state_dict", "set_input_size"])
def test_tables_of_other_blocks_and_halos_are_resized_alike_on_every_way_in(
    route: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"block_size": (4, 6), "halo_size": (2, 1)}
    model = randomise(nearfield.create_model("halonet_nano", num_classes=10))
    before = model.stages[1].blocks[0].attn.rel_pos_bias_y.detach().clone()
    if route == "create_model":
        checkpoints.save(model.state_dict(), tmp_path / "file.safetensors")
        with caplog.at_level(logging.WARNING, "nearfield.models"):
            other = nearfield.create_model("halonet_nano", checkpoint_path=tmp_path / "file.safetensors", **sizes)
        assert "2 from 9x16 to 11x16, 2 from 9x16 to 13x16, " in caplog.text
    elif route == "load_state_dict":
        other = nearfield.create_model("halonet_nano", num_classes=10, **sizes)
        other.load_state_dict(model.state_dict())
    else:
        other = model
        other.set_input_size(**sizes)
    attn = other.stages[1].blocks[0].attn
    expected = nearfield.ops.resize_table(before.T[..., None], (11, 1))[..., 0].T
    assert torch.equal(attn.rel_pos_bias_y, expected)
    # displacement 0 and the largest ones stay
    torch.testing.assert_close(attn.rel_pos_bias_y[[0, 5, 10]], before[[0, 4, 8]])
    assert attn.rel_pos_bias_x.shape == (13, 16)
    assert other.eval()(torch.randn(1, 3, 40, 40)).isfinite().all()


def test_spare_rows_are_those_of_the_model_whose_file_it_is() -> None:
    model = randomise(nearfield.create_model("halonet_26t", num_classes=2))
    other = nearfield.create_model("halonet_26t", num_classes=2, block_size=10)
    other.load_state_dict(export_state_dict(model, "timm"))
    model.set_input_size(block_size=10)
    assert same(model, other)


def test_spare_rows_that_nothing_tells_are_not_guessed(small: Small) -> None:
    # 4 * halo + 2 * block - 1 rows: 27 are a block of 8 with a halo of 3, or of 10 with one of 2
    state = small("halonet_50ts").state_dict()
    assert state["stages.3.blocks.1.attn.rel_pos_bias_y"].shape[0] == 27
    with pytest.raises(
        checkpoints.CheckpointMismatch, match=r"rel_pos_bias_y: .*27 rows.* 31.*set_input_size"
    ) as caught:
        small("halonet_50ts", block_size=10).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_a_file_of_square_windows_is_not_taken_for_one_of_oblong_windows(small: Small) -> None:
    # 225 rows: windows of 8 x 8, or of 5 x 13
    square = randomise(small("maxvit_nano_rw", img_size=256))
    oblong = small("maxvit_nano_rw", img_size=(160, 416))
    state = export_state_dict(square, "timm")
    with pytest.raises(checkpoints.CheckpointMismatch, match=r"225 rows.*set_input_size"):
        oblong.load_state_dict(state)
    square.set_input_size((160, 416))
    oblong.load_state_dict(square.state_dict())
    assert same(square, oblong)


def test_a_file_of_another_map_is_not_taken_for_one_of_oblong_maps(small: Small) -> None:
    # 225 rows are those of the last stage: maps of 8 x 8, or of 5 x 13
    square = randomise(small("hwt_tiny", img_size=256))
    oblong = small("hwt_tiny", img_size=(160, 416))
    oblong.load_state_dict(export_state_dict(square, "hilbert"))
    square.set_input_size((160, 416))
    assert same(square, oblong)
    again = small("hwt_tiny", img_size=(160, 416))
    again.load_state_dict(export_state_dict(square, "hilbert"))
    assert same(square, again)


COUNTED = ["maxvit_nano", "biformer_nano", "halonet_nano"]


@pytest.mark.parametrize("name", COUNTED)
def test_files_need_not_count_the_batches_of_batch_norms(name: str, tmp_path: Path) -> None:
    model = randomise(nearfield.create_model(name, num_classes=4))
    for state in (model.state_dict(), *(export_state_dict(model, layout.name) for layout in model.layouts)):
        bare = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        assert len(bare) < len(state)
        path = tmp_path / "bare.pth"
        torch.save(bare, path)
        assert name in models_that_fit(bare)
        other = nearfield.create_model(name)
        other.reset_classifier(4)
        other.load_state_dict(bare)
        overlay = {"file": str(path), "num_classes": 4}
        for loaded in (
            other,
            nearfield.create_model(name, checkpoint_path=path),
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay),
        ):
            assert same(loaded, model)


def test_tables_are_resized_in_a_file_without_counters(tmp_path: Path) -> None:
    state = nearfield.create_model("maxvit_nano").state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "bare.pth")
    model = nearfield.create_model("maxvit_nano", checkpoint_path=tmp_path / "bare.pth", window_size=8)
    assert model.stages[0].blocks[0].window.attn.rel_pos_bias.shape[1:] == (15, 15)


def test_a_file_without_a_classifier_gives_a_model_without_or_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = nearfield.create_model("hwt_nano", num_classes=0)
    torch.save(body.state_dict(), tmp_path / "body.pth")
    assert same(nearfield.create_model("hwt_nano", checkpoint_path=tmp_path / "body.pth"), body)
    assert not caplog.text
    model = nearfield.create_model("hwt_nano", checkpoint_path=tmp_path / "body.pth", num_classes=5)
    assert caplog.messages == ["the file has no classifier: it is drawn anew for 5 classes"]
    assert torch.equal(model.stem.proj.weight, body.stem.proj.weight)
    with pytest.raises(RuntimeError, match=r"lacks 2 keys: .*it fits hwt_nano made with in_chans=3, num_classes=0"):
        model.load_state_dict(body.state_dict())


def test_an_empty_state_dict_is_taken_as_modules_take_it() -> None:
    model = nearfield.create_model("nat_nano")
    assert set(model.load_state_dict({}, strict=False).missing_keys) == set(model.state_dict())
    with pytest.raises(RuntimeError, match="the checkpoint does not fit nat_nano"):
        model.load_state_dict({})
