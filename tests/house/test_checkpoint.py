"""scripts/checkpoint.py: what fits a file, conversion both ways, a picture through a model; the command's manners."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nearfield
import pytest
import torch
from nearfield import checkpoints
from nearfield.models import export_state_dict
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The module of the command; scripts find one another in their own folder."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("checkpoint")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; what its last line holds, and all of it under ``text``."""

    def call(*arguments: object) -> dict[str, Any]:
        assert script.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        return {**json.loads(text.splitlines()[-1]), "text": text}

    return call


@pytest.fixture(scope="module")
def swin() -> Any:
    return nearfield.create_model("swin_nano", num_classes=10).eval()


@pytest.fixture
def published(swin: Any, tmp_path: Path) -> Path:
    """Weights as Swin's authors write them, a mask and a wrapper included."""
    state = export_state_dict(swin, "microsoft") | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    path = tmp_path / "published.pth"
    torch.save({"model": state, "epoch": 3}, path)
    return path


def fails(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command says when it cannot do what was asked."""
    try:
        code = script.main([str(argument) for argument in arguments])
    except SystemExit as leave:
        code = leave.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return str(printed.err)


def test_inspect_names_the_model_and_the_layout(run: Run, published: Path) -> None:
    said = run("inspect", published)
    assert said["models"] == {"swin_nano": "microsoft"}
    assert (said["num_classes"], said["in_chans"], said["nearest"]) == (10, 3, None)
    assert "swin_nano, layout microsoft" in said["text"]


def test_inspect_names_every_twin_and_the_header_decides(run: Run, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {
            key: value.shape for key, value in nearfield.create_model("dinat_mini", in_chans=1).state_dict().items()
        }
    state = {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}
    path = checkpoints.save(state, tmp_path / "nat.safetensors", {"epoch": "3", "model": "dinat_mini"})
    said = run("inspect", path)
    assert set(said["models"]) >= {"nat_mini", "dinat_mini"}
    assert set(said["models"].values()) == {"nearfield"}
    assert (said["in_chans"], said["header"]["epoch"]) == (1, "3")
    assert "differ in nothing that a file stores" in said["text"]
    assert run("convert", path)["model"] == "dinat_mini"


def test_inspect_says_what_is_nearest_to_a_file_that_nothing_fits(run: Run, swin: Any, tmp_path: Path) -> None:
    state = dict(swin.state_dict())
    key = next(key for key in state if key.endswith("mlp.fc1.weight"))
    state[key] = state[key][:-1]
    said = run("inspect", checkpoints.save(state, tmp_path / "odd.safetensors"))
    assert said["models"] == {}
    assert said["nearest"]["models"] == ["swin_nano"]
    assert key in said["nearest"]["difference"]
    strange = checkpoints.save({"a.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    said = run("inspect", strange)
    assert said["nearest"] is None
    assert "no key is one of its models'" in said["text"]


def test_a_published_name_is_told_by_the_file_name(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nat_mini.pth"
    torch.save({"a.weight": torch.zeros(2)}, path)
    said = run("inspect", path)
    assert said["published_as"] == "nat_mini.in1k"
    assert "content is not compared" in said["text"]


def test_converts_there_and_back_bit_for_bit(run: Run, swin: Any, published: Path) -> None:
    there = run("convert", published)
    ours = published.with_name("published.nearfield.safetensors")
    assert (there["output"], there["to"], there["left_out"]) == (
        str(ours),
        "nearfield",
        ["layers.0.blocks.1.attn_mask"],
    )
    state = checkpoints.read(ours)
    assert state.keys() == swin.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in swin.state_dict().items())
    assert checkpoints.read_metadata(ours)["model"] == "swin_nano"

    back = run("convert", ours, "--to", "microsoft", "--output", published.with_name("back.pth"), "--under", "model")
    held = torch.load(back["output"], weights_only=True)
    theirs = export_state_dict(swin, "microsoft")
    assert held.keys() == {"model"}
    assert held["model"].keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in held["model"].items())
    assert "strict=False" in back["text"]
    files = sorted(path.name for path in published.parent.iterdir())
    assert files == ["back.pth", "published.nearfield.safetensors", "published.pth"], "nothing left beside them"


def test_converts_from_one_published_layout_to_another(run: Run, swin: Any, published: Path) -> None:
    said = run("convert", published, "--to", "timm")
    assert checkpoints.read(said["output"]).keys() == export_state_dict(swin, "timm").keys()


def test_a_failed_conversion_writes_nothing(
    script: ModuleType, capsys: pytest.CaptureFixture[str], swin: Any, published: Path, tmp_path: Path
) -> None:
    ours = checkpoints.save(swin.state_dict(), tmp_path / "ours.safetensors", {"model": "swin_nano"})
    before = sorted(tmp_path.iterdir())
    assert "say --to, swin_nano has microsoft, timm" in fails(script, capsys, "convert", ours)
    assert "--to caffe" in fails(script, capsys, "convert", published, "--to", "caffe")
    assert "other keys than nat_nano" in fails(script, capsys, "convert", published, "--model", "nat_nano")
    assert "--output" in fails(script, capsys, "convert", published, "--output", published)
    assert ".safetensors" in fails(script, capsys, "convert", published, "--output", tmp_path / "a.onnx")
    assert "--under" in fails(script, capsys, "convert", published, "--under", "model")
    assert sorted(tmp_path.iterdir()) == before


def test_verify_shows_a_picture_to_the_model(run: Run, swin: Any, published: Path, tmp_path: Path) -> None:
    picture, names = tmp_path / "cat.png", tmp_path / "names.txt"
    Image.effect_noise((50, 40), 80).convert("RGB").save(picture)
    names.write_text("".join(f"kind {number}\n" for number in range(10)))
    said = run("verify", published, "--picture", picture, "--names", names)
    assert (said["model"], said["layout"], said["classes"], said["picture"]) == (
        "swin_nano",
        "microsoft",
        10,
        str(picture),
    )
    assert len(said["top"]) == 5
    assert said["top"][0]["name"] == f"kind {said['top'][0]['class']}"

    from timm.data import create_transform, resolve_model_data_config

    with torch.inference_mode():
        image = create_transform(**resolve_model_data_config(swin))(Image.open(picture))
        expected = swin(image[None])[0].softmax(-1)
    assert said["top"][0]["class"] == int(expected.argmax())
    assert said["top"][0]["p"] == pytest.approx(float(expected.max()))


def test_verify_says_that_it_drew_the_picture(run: Run, published: Path) -> None:
    said = run("verify", published, "--size", "40x56")
    assert "drawn by this script" in said["text"]
    assert said["input"] == [3, 40, 56]
    assert all(row["name"] is None for row in said["top"])


def test_verify_takes_grey_pictures_and_files_without_a_head(run: Run, tmp_path: Path) -> None:
    model = nearfield.create_model("dinat_nano", in_chans=1, num_classes=0)
    path = checkpoints.save(model.state_dict(), tmp_path / "grey.safetensors")
    said = run("verify", path)
    assert (said["model"], said["classes"], said["top"]) == ("dinat_nano", 0, [])
    assert said["input"] == [1, 32, 32]
    assert "no classifier" in said["text"]


def test_averaged_weights_are_taken_when_asked_for(run: Run, swin: Any, tmp_path: Path) -> None:
    plain, averaged = swin.state_dict(), {key: value * 0.5 for key, value in swin.state_dict().items()}
    path = tmp_path / "training.pth"
    torch.save({"model": plain, "model_ema": averaged}, path)
    one, other = (run("verify", path, "--model", "swin_nano", *more)["top"][0]["p"] for more in ([], ["--ema"]))
    assert one != other


def test_the_file_of_a_twin_is_said(run: Run, monkeypatch: pytest.MonkeyPatch, published: Path) -> None:
    class Other:
        file, model, name = published.name, "swin_tiny", "swin_tiny.in1k"

    monkeypatch.setattr(checkpoints, "find", lambda name: Other)
    assert "published for swin_tiny" in run("verify", published)["text"]


def test_what_was_downloaded_is_converted_into_this_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, published: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run("convert", published.as_uri())["output"] == "published.nearfield.safetensors"
    assert [path.name for path in here.iterdir()] == ["published.nearfield.safetensors"]


def test_verify_refuses_weights_that_are_not_finite(
    script: ModuleType, capsys: pytest.CaptureFixture[str], swin: Any, tmp_path: Path
) -> None:
    state = {key: value.clone() for key, value in swin.state_dict().items()}
    state["norm.weight"][0] = float("nan")
    path = checkpoints.save(state, tmp_path / "broken.safetensors", {"model": "swin_nano"})
    assert script.main(["verify", str(path)]) == 2
    printed = capsys.readouterr()
    assert "not finite" in printed.err
    assert "{" not in printed.out


def test_mistakes_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], published: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("no picture\n")
    strange = checkpoints.save({"a.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    assert "neither a file" in fails(script, capsys, "inspect", tmp_path / "none.pth")
    assert "not a checkpoint" in fails(script, capsys, "inspect", text)
    assert "no model of this package" in fails(script, capsys, "verify", strange)
    assert "swin_nanno" in fails(script, capsys, "verify", published, "--model", "swin_nanno")
    assert "does not fit nat_nano" in fails(script, capsys, "verify", published, "--model", "nat_nano")
    for arguments in ([], ["inspect"], ["inspect", published, "--pitcure"], ["verify", published, "--size", "big"]):
        assert fails(script, capsys, *arguments).startswith("checkpoint")


@pytest.mark.parametrize(
    ("option", "words"), [("--picture", "no image"), ("--names", "1 lines"), ("--picture=nope", "no such file")]
)
def test_pictures_and_names_that_do_not_serve_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], published: Path, tmp_path: Path, option: str, words: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    arguments = [option] if "=" in option else [option, str(text)]
    assert script.main(["verify", str(published), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_tables_that_are_not_square_are_converted_both_ways(run: Run, tmp_path: Path) -> None:
    for name, layout, options, given in (
        ("swin_nano", "microsoft", {"window_size": (4, 2)}, ["window_size=[4,2]"]),
        ("hwt_nano", "hilbert", {"img_size": (64, 96)}, ["img_size=[64,96]"]),
    ):
        model = nearfield.create_model(name, **options)
        torch.save(model.state_dict(), tmp_path / "ours.pth")
        run("convert", tmp_path / "ours.pth", "--model", name, "--to", layout, "--output", tmp_path / "theirs.pth")
        settings = [text for setting in given for text in ("--set", setting)]
        run("convert", tmp_path / "theirs.pth", "--model", name, *settings, "--output", tmp_path / "back.pth")
        back = checkpoints.read(tmp_path / "back.pth")
        assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
        assert run("verify", tmp_path / "theirs.pth", "--model", name, *settings)["classes"] == 1000


def test_a_file_of_other_tables_or_parts_is_told_with_its_layout(run: Run, tmp_path: Path) -> None:
    torch.save(nearfield.create_model("hwt_nano", img_size=64).state_dict(), tmp_path / "larger.pth")
    near = run("inspect", tmp_path / "larger.pth")["nearest"]
    # their keys are the same, and tables of other sizes do not tell
    assert (near["models"], near["layout"], near["tables_alone"]) == (["swin_nano", "hwt_nano"], "nearfield", True)
    torch.save(nearfield.create_model("hnt_nano", features_only=True).state_dict(), tmp_path / "features.pth")
    near = run("inspect", tmp_path / "features.pth")["nearest"]
    assert (near["models"], near["difference"]) == (["hnt_nano"], "the file lacks 2 keys: norm.weight, norm.bias")


def test_counters_may_be_missing(run: Run, tmp_path: Path) -> None:
    state = nearfield.create_model("maxvit_nano", num_classes=3).state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "bare.pth")
    assert run("inspect", tmp_path / "bare.pth")["models"] == {"maxvit_nano": "nearfield"}
    assert run("convert", tmp_path / "bare.pth", "--output", tmp_path / "timm.pth")["tensors"] == len(state)
    assert run("verify", tmp_path / "timm.pth")["model"] == "maxvit_nano"


def test_mistakes_in_arguments_of_the_model_are_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], published: Path, tmp_path: Path
) -> None:
    told = fails(script, capsys, "verify", published, "--set", "windows=3")
    assert "--set: " in told
    assert "'windows'" in told
    with pytest.raises(SystemExit):
        script.main(["verify", str(published), "--set", "img_size=[224"])
    assert "the value is no YAML" in capsys.readouterr().err
    assert "--names" in fails(script, capsys, "verify", published, "--names", tmp_path / "none.txt")
    assert capsys.readouterr().out == ""
