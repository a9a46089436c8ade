"""The index: consistent rows, and the way names are looked up."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
from nearfield.checkpoints import entries, find
from nearfield.checkpoints.index import near_matches
from printed_top1 import BY_THE_AUTHORS, BY_TIMM
from timm.models import PretrainedCfg

# our names and timm's
HALO = {
    "halonet_26t": "halonet26t",
    "sehalonet_33ts": "sehalonet33ts",
    "halonet_50ts": "halonet50ts",
    "eca_halonext_26ts": "eca_halonext26ts",
    "halo_regnetz_b": "haloregnetz_b",
}
MODELS = [
    *(f"nat_{size}" for size in ("mini", "tiny", "small", "base")),
    *(f"dinat_{size}" for size in ("mini", "tiny", "small", "base", "large", "large_384", "large_384_11x11")),
    *(f"dinat_s_{size}" for size in ("tiny", "small", "base", "large", "large_384")),
    *(f"biformer_{size}" for size in ("tiny", "small", "base", "stl", "stl_nchw")),
    *(f"swin_{size}" for size in ("tiny", "small", "base", "large", "base_384", "large_384")),
    *(f"swinv2_{size}_window{window}" for size in ("tiny", "small", "base") for window in (8, 16)),
    *(f"swinv2_{size}_window{window}_22k" for size in ("base", "large") for window in (16, 24)),
    *HALO,
    *("hwt_tiny", "hwt_tiny_256", "hnt_mini", "hnt_tiny"),
    *(f"maxvit_{size}{suffix}" for size in ("tiny", "small", "base", "large") for suffix in ("", "_384", "_512")),
    *("maxvit_xlarge_384", "maxvit_xlarge_512", "maxvit_nano_rw", "maxvit_tiny_rw"),
    *(f"maxvit_rmlp_{size}_rw" for size in ("pico", "nano", "tiny", "small", "base", "base_384")),
]
# published for what they were pre-trained on alone
PRETRAINED = ["swinv2_base_window12_22k", "swinv2_large_window12_22k", "maxvit_xlarge"]
ROWS = entries()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_default_for_imagenet_1k(model: str) -> None:
    default = entries(model)[0]
    assert find(model) is default
    assert default.num_classes == 1000
    assert default.top1 is not None
    assert default.url or default.hub


def test_no_other_models_are_in_the_index() -> None:
    assert {row.model for row in ROWS} == {*MODELS, *PRETRAINED}
    assert entries("nat_nano") == []


def test_names_and_files_are_unique() -> None:
    assert max(Counter(row.name for row in ROWS).values()) == 1
    assert max(Counter(row.file for row in ROWS if row.url).values()) == 1
    assert max(Counter(row.hub for row in ROWS if row.hub).values()) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_consistent(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    assert bool(row.url) != bool(row.hub)
    if row.url:
        parts = urlsplit(row.url)
        assert parts.scheme == "https"
        # a host that names no files has a page for people, but for shares that nobody serves any more
        direct = parts.path.rsplit("/", 1)[-1] == row.file and not parts.query
        assert direct == (row.page is None and parts.hostname != "api.onedrive.com")
    of_timm = row.model in HALO or row.model.startswith("maxvit_")
    assert row.layout in ("shi-labs", "microsoft", "timm", "rayleizhu", "hilbert")
    assert row.licence == ("Apache-2.0" if of_timm else "MIT")
    assert row.source
    assert re.fullmatch(r"[a-z0-9_]+", row.tag)
    assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", row.sha256)
    assert row.interpolation == "bicubic"
    if of_timm:  # compared with its own settings below
        return
    side = next((side for side in (256, 384) if str(side) in row.model and "interp" not in row.file), 224)
    if row.model.startswith("swinv2"):
        side = 192 if "window12" in row.model else 384 if "window24" in row.model else 256
    assert row.input_size == (3, side, side)
    assert row.crop_pct == (1.0 if row.input_size[1] == 384 else 0.9 if row.layout == "timm" else 0.875)
    assert row.crop_mode == ("squash" if row.layout == "microsoft" and row.input_size[1] == 384 else "center")
    assert (row.mean, row.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


README = Path(__file__).parents[2] / "README.md"
FAMILIES = {  # lines of README.md's table, and how the names of their models begin
    "NAT": "nat_",
    "DiNAT": "dinat_(?!s_)",
    "DiNAT_s": "dinat_s_",
    "Swin": "swin_",
    "SwinV2": "swinv2_",
    "HaloNet": r"(\w*halo)",
    "BiFormer": "biformer_",
    "HWT": "hwt_",
    "HNT": "hnt_",
}
# classes of what a file was trained on last: SHI-Labs publish theirs of ImageNet-22k without a classifier
CLASSES = {"in1k": 1000, "in12k": 11821, "in21k": 21843, "in22k": 21841}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_classes_and_accuracy_are_those_that_were_printed(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    data = row.tag.removesuffix("_release").rsplit("_", 1)[-1]
    assert row.num_classes == (None if (row.layout, data) == ("shi-labs", "in22k") else CLASSES[data])
    if data != "in1k":
        assert row.top1 is None
        return
    assert row.top1 == float(printed_top1(row.name, row.model, row.tag, row.hub))


def test_the_readme_prints_what_the_index_says() -> None:
    """The figures of a family's line are those of its rows; MaxViT's line has the paper's, not the files'."""
    lines = [line.split("|")[1:4] for line in README.read_text(encoding="utf-8").splitlines() if line.count("|") == 6]
    families = {family.strip(): figures for family, _, figures in lines}
    for family, prefix in FAMILIES.items():
        known = {row.top1 for row in ROWS if re.match(prefix, row.model) and row.top1 is not None}
        figures = re.findall(r"\d\d\.\d+", families[family])
        assert figures
        for figure in figures:
            assert any(f"{top1:.{len(figure) - 3}f}" == figure for top1 in known), (family, figure)
    assert FAMILIES.keys() | {"MaxViT"} == families.keys() - {"family", "---"}


def test_every_printed_accuracy_is_that_of_a_row() -> None:
    assert BY_THE_AUTHORS.keys() <= {row.name for row in ROWS}
    assert {f"timm/{name}" for name in BY_TIMM} == {row.hub for row in ROWS if row.hub and row.top1 is not None}


def printed_top1(name: str, model: str, tag: str, hub: str | None) -> str:
    """As printed of the file itself, or of timm's copy of it."""
    if name in BY_THE_AUTHORS:
        return BY_THE_AUTHORS[name]
    if hub is None:
        (hub,) = (row.hub for row in ROWS if row.hub and row.model == model and tag_of(row.tag) == tag_of(tag))
    assert hub is not None
    return BY_TIMM[hub.removeprefix("timm/")]


def tag_of(tag: str) -> str:
    return tag.removeprefix("timm_").removesuffix("_release")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_become_pretrained_cfgs_of_timm(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    cfg = PretrainedCfg(**row.pretrained_cfg())
    assert cfg.has_weights
    assert (cfg.architecture, cfg.tag, cfg.license) == (row.model, row.tag, row.licence.lower())
    assert (cfg.input_size, cfg.crop_pct, cfg.crop_mode) == (row.input_size, row.crop_pct, row.crop_mode)


def timm_cfgs(*patterns: str) -> list[PretrainedCfg]:
    names = timm.list_models(list(patterns), pretrained=True)
    names = [name for name in names if timm.model_entrypoint(name).__module__.startswith("timm.")]
    cfgs = [timm.get_pretrained_cfg(name) for name in names]
    return [cfg for cfg in cfgs if cfg is not None]


def test_swin_rows_are_those_that_timm_knows() -> None:
    cfgs = timm_cfgs("swin_*_patch4_window*", "swinv2_*_window*_*")
    assert {cfg.url for cfg in cfgs} == {row.url for row in ROWS if row.layout == "microsoft"}
    assert_as_in_timm(cfgs, "swin")


def test_maxvit_rows_are_those_that_timm_knows() -> None:
    cfgs = timm_cfgs("maxvit_*_tf_*", "maxvit_*_rw_*")
    assert_as_in_timm(cfgs, "maxvit_")
    assert {cfg.url for cfg in cfgs if cfg.url} == {row.url for row in ROWS if row.url and "maxvit" in row.model}


def assert_as_in_timm(cfgs: list[PretrainedCfg], prefix: str) -> None:
    hub = {f"{cfg.hf_hub_id}": cfg for cfg in cfgs}
    rows = {row.hub: row for row in ROWS if row.hub and row.model.startswith(prefix)}
    assert hub.keys() == rows.keys()
    for name, cfg in hub.items():
        row = rows[name]
        assert (cfg.num_classes, cfg.input_size) == (row.num_classes, row.input_size)
        assert (cfg.crop_pct, cfg.crop_mode, cfg.interpolation) == (row.crop_pct, row.crop_mode, row.interpolation)
        assert (cfg.mean, cfg.std) == (row.mean, row.std)


@pytest.mark.parametrize("row", [row for row in ROWS if row.model in HALO], ids=lambda row: row.name)
def test_halo_rows_are_those_that_timm_knows(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    cfg = timm.get_pretrained_cfg(HALO[row.model])
    assert cfg is not None
    assert row.hub in (None, cfg.hf_hub_id)
    assert row.url in (None, cfg.url)
    assert row.tag.removeprefix("timm_") == cfg.tag
    assert (row.licence.lower(), row.num_classes, row.input_size) == (cfg.license, cfg.num_classes, cfg.input_size)
    assert (row.crop_pct, row.crop_mode, row.interpolation) == (cfg.crop_pct, cfg.crop_mode, cfg.interpolation)
    assert (row.mean, row.std) == (cfg.mean, cfg.std)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nat_mini", "nat_mini.in1k"),
        ("nat_mini.in1k", "nat_mini.in1k"),
        ("nat_mini.pth", "nat_mini.in1k"),
        ("some/where/dinat_mini_in1k_224.pth", "dinat_mini.in1k"),
        ("C:\\weights\\nat_base.pth", "nat_base.in1k"),
        ("https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth", "nat_tiny.in1k"),
        ("swin_base", "swin_base.ms_in1k"),
        ("swin_base.ms_in22k_ft_in1k", "swin_base.ms_in22k_ft_in1k"),
        ("swin_large", "swin_large.ms_in22k_ft_in1k"),
        ("swinv2_base_patch4_window12_192_22k.pth", "swinv2_base_window12_22k.ms_in22k"),
        ("hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny.timm_in1k"),
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny.timm_in1k"),
        ("hwt_tiny_256.pth", "hwt_tiny_256.in1k"),
        ("https://drive.google.com/file/d/1HrUmo-Tsk7J5bq2KBtdzw1cXzlZuvS_V/view?usp=sharing", "hnt_mini.in1k"),
    ],
)
def test_rows_are_found_by_every_name(text: str, name: str) -> None:
    row = find(text)
    assert row is not None
    assert row.name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nat",
        "nat_mini.",
        "nat_mini.in22k",
        "model.safetensors",
        "https://example.org/nat_mini.pth",
        "weights/nat_mini",
        "hf-hub:timm/nat_mini",
    ],
)
def test_what_is_not_published_is_not_found(text: str) -> None:
    assert find(text) is None


def test_typos_have_near_matches() -> None:
    assert near_matches("nat_mni")[0] == "nat_mini"
    assert "swin_base.ms_in22k" in near_matches("swin_base.ms_in22")
    assert "dinat_large_in22k_224.pth" in near_matches("x/dinat_large_22k_224.pth")
    assert near_matches("qqqqqqqq") == []
