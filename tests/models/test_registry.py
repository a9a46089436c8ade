"""Names, tags, timm's registry, and what importing costs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nearfield
import pytest
import timm
import torch
from nearfield.models import catalog, registry
from nearfield.models.nat import NAT
from nearfield.models.swin import Swin
from torch import nn

NAMES = set(
    """
    nat_nano nat_nano_128 nat_mini nat_tiny nat_small nat_base
    dinat_nano dinat_mini dinat_tiny dinat_small dinat_base dinat_large dinat_large_384 dinat_large_384_11x11
    dinat_s_tiny dinat_s_small dinat_s_base dinat_s_large dinat_s_large_384
    biformer_nano biformer_tiny biformer_small biformer_base biformer_stl biformer_stl_nchw
    swin_nano swin_tiny swin_small swin_base swin_large swin_base_384 swin_large_384
    swinv2_nano swinv2_tiny_window8 swinv2_tiny_window16 swinv2_small_window8 swinv2_small_window16
    swinv2_base_window8 swinv2_base_window16 swinv2_base_window16_22k swinv2_base_window24_22k
    swinv2_large_window16_22k swinv2_large_window24_22k
    halonet_nano halo_h0 halo_h1 halo_h2 halo_h3 halo_h4 halo_h5 halo_h6 halo_h7
    halonet_26t sehalonet_33ts halonet_50ts eca_halonext_26ts halo_regnetz_b
    hwt_nano hwt_tiny hwt_small hwt_base hwt_tiny_256 hwt_small_256 hwt_base_256
    hnt_nano hnt_mini hnt_tiny hnt_small hnt_base
    maxvit_nano maxvit_tiny maxvit_tiny_384 maxvit_tiny_512 maxvit_small maxvit_small_384 maxvit_small_512
    maxvit_base maxvit_base_384 maxvit_base_512 maxvit_large maxvit_large_384 maxvit_large_512
    maxvit_xlarge maxvit_xlarge_384 maxvit_xlarge_512
    maxvit_nano_rw maxvit_tiny_rw maxvit_rmlp_pico_rw maxvit_rmlp_nano_rw maxvit_rmlp_tiny_rw maxvit_rmlp_small_rw
    maxvit_rmlp_base_rw maxvit_rmlp_base_384_rw
    """.split()  # noqa: SIM905 - read as a table
)


def test_lists_the_promised_names() -> None:
    assert set(nearfield.list_models()) >= NAMES
    assert nearfield.list_models("nat_*") == [
        "nat_base",
        "nat_mini",
        "nat_nano",
        "nat_nano_128",
        "nat_small",
        "nat_tiny",
    ]
    assert nearfield.list_models(["swin_t*", "nat_m*"]) == ["nat_mini", "swin_tiny"]
    assert nearfield.list_models("no_such_*") == []


def test_lists_published_files_with_their_tags() -> None:
    listed = nearfield.list_models(pretrained=True)
    assert {"nat_tiny.in1k", "swin_base.ms_in22k_ft_in1k"} <= set(listed)
    assert nearfield.list_models("nat_tiny", pretrained=True) == ["nat_tiny.in1k"]
    assert not any(name.startswith("nat_nano") for name in listed)


@pytest.mark.parametrize("name", nearfield.list_models())
def test_timm_knows_every_model(name: str) -> None:
    assert timm.is_model(name)
    with torch.device("meta"):
        assert type(timm.create_model(name)) is catalog.get(name).family


def test_timm_has_none_of_the_names_itself() -> None:
    assert registry.not_in_timm == []


@pytest.mark.parametrize("name", nearfield.list_models(pretrained=True))
def test_every_tag_is_made_here_and_by_timm(name: str) -> None:
    kwargs = {"depths": (1, 1, 1, 1)}
    registered = catalog.get(name.partition(".")[0]).kwargs
    if "dilations" in registered:
        kwargs["dilations"] = (1, 1, 1, 1)
    if "attention" in registered:
        kwargs["attention"] = ((), (), (), (0,))
    for create in (nearfield.create_model, timm.create_model):
        with torch.device("meta"):
            model = create(name, **kwargs)
        assert ".".join((model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"])) == name
    assert name in timm.list_models(name.partition(".")[0], pretrained=True)


def test_the_first_file_of_the_index_is_the_default() -> None:
    for name in nearfield.list_models():
        entries = nearfield.checkpoints.entries(name)
        if entries:
            with torch.device("meta"):
                assert nearfield.create_model(name).pretrained_cfg["tag"] == entries[0].tag
            assert timm.get_pretrained_cfg(name).tag == entries[0].tag


def test_number_of_classes_follows_the_tag() -> None:
    with torch.device("meta"):
        assert nearfield.create_model("swin_base.ms_in22k").num_classes == 21841
        assert nearfield.create_model("swin_base.ms_in22k", num_classes=5).num_classes == 5


def test_names_of_timm_alone_go_to_timm() -> None:
    with torch.device("meta"):
        model = nearfield.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64)
    assert model.num_classes == 3
    assert model.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nat_tinny", ("'nat_tinny'", "did you mean nat_tiny")),
        ("zzzzzzzz", ("'zzzzzzzz'", "list_models()")),
        ("nat_tiny.in2k", ("'in2k'", "nat_tiny.in1k")),
        ("nat_nano.in1k", ("'in1k'", "nothing is published")),
    ],
)
def test_unknown_names_are_one_line_with_what_is_near(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="unknown") as error:
        nearfield.create_model(name)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_pretrained_without_a_published_file_says_so() -> None:
    with pytest.raises(ValueError, match=r"nothing is published for nat_nano.*checkpoint_path="):
        nearfield.create_model("nat_nano", pretrained=True)


def test_a_name_that_timm_has_is_left_to_timm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.model_entrypoint("resnet18")
    monkeypatch.setattr(registry, "not_in_timm", [])
    monkeypatch.setattr(registry, "_ENTRYPOINTS", dict(registry._ENTRYPOINTS))
    monkeypatch.setattr(catalog, "_VARIANTS", dict(catalog._VARIANTS))
    monkeypatch.setitem(globals(), "default_cfgs", {})
    monkeypatch.setitem(globals(), "resnet18", None)
    registry.register(__name__, Swin, {"resnet18": {"embed_dim": 16, "num_heads": (1, 2, 4, 8)}})
    assert registry.not_in_timm == ["resnet18"]
    assert timm.model_entrypoint("resnet18") is theirs
    with torch.device("meta"):
        assert isinstance(nearfield.create_model("resnet18"), Swin)
        assert not isinstance(timm.create_model("resnet18"), Swin)
    with caplog.at_level(logging.WARNING):
        registry.warn_about_names()
    assert [record.getMessage().count("resnet18") for record in caplog.records] == [1]


def test_arguments_of_the_constructor_pass_through() -> None:
    with torch.device("meta"):
        model = nearfield.create_model(
            "nat_mini",
            depths=(1, 1, 1, 1),
            embed_dim=32,
            num_heads=2,
            kernel_size=5,
            layer_scale=None,
            img_size=(64, 96),
        )
    assert isinstance(model, NAT)
    assert model.img_size == (64, 96)
    assert model.feature_info[-1]["num_chs"] == 256
    with pytest.raises(TypeError, match="kernel"):
        nearfield.create_model("nat_mini", kernel=5)


@pytest.mark.parametrize("make", [nearfield.create_model, timm.create_model])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("swinv2_nano", "strict_img_size"),
        ("halonet_nano", "head"),
        ("maxvit_nano", "patch_size"),
        ("swin_nano", "heads"),
    ],
)
def test_an_argument_that_no_family_takes_is_one_line_at_every_door(make: Any, name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} takes no argument '{argument}': ") as caught:
        make(name, **{argument: 3})
    assert "\n" not in str(caught.value)
    assert f"did you mean {argument}?" not in str(caught.value)


def test_sizes_that_a_family_does_not_take_are_named_beside_those_that_it_does() -> None:
    for name, known in (("biformer_nano", "img_size, regions"), ("hnt_nano", "img_size, kernel_size")):
        with pytest.raises(ValueError, match=rf"\.set_input_size takes {known}, got window_sizes$"):
            nearfield.create_model(name).set_input_size(64, window_sizes=3)


@pytest.mark.parametrize(
    ("name", "argument", "made"),
    [
        ("nat_small", "layer_scale", lambda model: isinstance(model.stages[0].blocks[0].ls1, nn.Identity)),
        ("biformer_nano", "topk", lambda model: model.topk == [None, None, None]),
        ("halonet_nano", "attention", lambda model: hasattr(model.stages[0].blocks[0], "attn")),
        ("halonet_nano", "num_features", lambda model: isinstance(model.norm, nn.Identity)),
        ("eca_halonext_26ts", "head_dim", lambda model: model.stages[3].blocks[0].attn.head_dims == (64, 64)),
        ("eca_halonext_26ts", "gate", lambda model: not hasattr(model.stages[0].blocks[0], "gate")),
        ("maxvit_nano", "window_size", lambda model: model.stages[0].blocks[0].window.attn.size == (1, 1)),
        ("dinat_nano", "dilations", lambda model: model.stages[0].blocks[1].attn.dilation == (1, 1)),
        ("swinv2_base_window16_22k", "pretrained_window_sizes", lambda model: not any(model.pretrained_window_sizes)),
    ],
)
def test_none_is_a_value_where_the_argument_may_be_none(name: str, argument: str, made: Any) -> None:
    with torch.device("meta"):
        assert not made(nearfield.create_model(name))
        assert made(nearfield.create_model(name, **{argument: None}))


@pytest.mark.parametrize(
    "argument", ["img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate", "cache_dir"]
)
def test_none_is_as_if_left_out_where_timm_has_it_so(argument: str) -> None:
    with torch.device("meta"):
        model = nearfield.create_model("swin_base.ms_in22k", **{argument: None})
    assert (model.img_size, model.in_chans, model.num_classes) == ((224, 224), 3, 21841)
    assert model.global_pool == "avg"
    assert model.stages[0].blocks[1].drop_path1.drop_prob > 0


@pytest.mark.parametrize(
    ("name", "argument"),
    [("nat_nano", "depths"), ("swin_nano", "window_size"), ("halonet_nano", "block_size"), ("hnt_nano", "mlp_ratio")],
)
def test_none_is_one_line_where_the_argument_may_not_be_none(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} takes no {argument}=None: leave it out for the model's own$"):
        nearfield.create_model(name, **{argument: None})


@pytest.mark.parametrize("name", ["nat_nano", "maxvit_nano", "halonet_nano"])
def test_options_of_features_are_those_of_timm(name: str) -> None:
    image = torch.randn(1, 3, 64, 64)
    model = nearfield.create_model(name, num_classes=0).eval()
    for options, axis in (
        ({}, 1),
        ({"feature_cls": "getter"}, 1),
        ({"feature_cls": "hook"}, 3),
        ({"feature_cls": "hook", "out_indices": (1,)}, 3),
        ({"output_fmt": "NHWC"}, 3),
        ({"norm": True}, 1),
        ({"feature_cfg": {"out_indices": (0, 2)}}, 1),
        ({"out_indices": (2, 0)}, 1),
        ({"out_indices": (-1, 0, 0)}, 1),
    ):
        for create in (nearfield.create_model, timm.create_model):
            features = create(name, features_only=True, **options).eval()
            assert [y.shape[axis] for y in features(image)] == features.feature_info.channels(), options
    normed = nearfield.create_model(name, features_only=True, norm=True).eval()
    normed.backbone.load_state_dict(model.state_dict())
    torch.testing.assert_close(normed(image)[-1].permute(0, 2, 3, 1), model.forward_features(image))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"feature_cls": "list"},
            r"^feature_cls='list': these models take 'getter', 'hook' or a class",
        ),
        ({"feature_cls": "hook", "norm": True}, r"^norm= is not for feature_cls='hook'"),
        ({"out_indices": 9}, r"^out_indices=9 asks for the last 9 of 3 stages: use 1 to 3$"),
        ({"out_indices": (3,)}, r"^out_indices=\(3,\) must name stages from -3 to 2, at least one$"),
    ],
)
def test_impossible_features_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        nearfield.create_model("nat_nano", features_only=True, **options)


def test_a_pretrained_cfg_by_its_tag() -> None:
    with torch.device("meta"):
        assert nearfield.create_model("swin_base", pretrained_cfg="ms_in22k").pretrained_cfg["tag"] == "ms_in22k"
    with pytest.raises(ValueError, match=r"unknown tag 'foo' of swin_base"):
        nearfield.create_model("swin_base", pretrained_cfg="foo")


@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
def test_weights_load_into_timms_own_feature_wrappers(feature_cls: str, tmp_path: Path) -> None:
    model = nearfield.create_model("swin_nano", num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "swin.pth")
    features = nearfield.create_model(
        "swin_nano", features_only=True, feature_cls=feature_cls, checkpoint_path=tmp_path / "swin.pth"
    ).eval()
    assert "state_dict" not in features.pretrained_cfg
    image = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(image, intermediates_only=True, output_fmt="NHWC")
    for got, wanted in zip(features(image), expected, strict=True):
        torch.testing.assert_close(got if feature_cls == "hook" else got.permute(0, 2, 3, 1), wanted)
