"""scripts/benchmark.py runs, ends with one JSON object, and gives no ratio for a wrong candidate."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_documents_name_the_command_that_writes_them() -> None:
    root = SCRIPTS.parent
    written = {path: re.search(r"--markdown ([^`\s]+)", path.read_text()) for path in root.glob("docs/benchmarks*.md")}
    assert len(written) >= 2
    assert {path: root / found[1] for path, found in written.items() if found} == {path: path for path in written}


@pytest.fixture(scope="module")
def timing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_bench_timing", SCRIPTS / "_bench_timing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_quick_run_ends_with_one_json_object(tmp_path: Path) -> None:
    output, document = tmp_path / "result.json", tmp_path / "result.md"
    done = run("--quick", "--only", "window", "--output", str(output), "--markdown", str(document))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["threads"] == 1
    assert {"processor", "torch", "timm", "load"} <= result["machine"].keys()
    assert result["rows"]
    for row in result["rows"]:
        assert {"name", "peer_name", "ours", "peer", "ratio", "target", "reached", "unit", "note"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        assert row["target"] is None, "targets are for the full shapes"
        assert f"| {row['peer_name']} |" in document.read_text()


def test_unknown_section_is_refused_with_the_known_ones() -> None:
    done = run("--only", "windows")
    assert done.returncode == 2
    assert "neighborhood, window, models" in done.stderr


def test_dense_part_compares_time_and_memory() -> None:
    done = run("--quick", "--rounds", "1", "--only", "dense")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["name"].split(" +")[0], row["unit"], row["bound"]) for row in rows] == [
        ("Swin-T", "ms", "least"),
        ("NAT-T", "ms", "least"),
        ("peak memory of Swin-T", "MiB", "most"),
        ("peak memory of NAT-T", "MiB", "most"),
    ]
    for row in rows:
        better = row["peer"] / row["ours"] if row["bound"] == "least" else row["ours"] / row["peer"]
        assert row["ratio"] == pytest.approx(better)


@pytest.mark.slow
def test_model_table_names_the_backend() -> None:
    done = run("--model", "nat_nano,swin_nano", "--backend", "torch,reference", "--batch", "1", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout.splitlines()[-1])["models"]
    assert [(m["model"], m["backend"]) for m in models] == [
        (name, backend) for name in ("nat_nano", "swin_nano") for backend in ("torch", "reference")
    ]
    assert all(m["images_per_s"] > 0 and m["size"] == 32 for m in models)


@pytest.mark.slow
def test_every_section_runs() -> None:
    done = run("--quick", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert not [row["note"] for row in rows if row["note"].startswith("wrong")]
    assert {row["unit"] for row in rows} == {"ms", "MiB", "us"}


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        (torch.tensor([1.0, 2.01]), "off by"),
        (torch.tensor([1.0, 2.0, 3.0]), "shape"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
    ],
)
def test_a_wrong_candidate_is_not_timed(timing: ModuleType, theirs: Tensor, complaint: str) -> None:
    right = timing.Candidate("right", lambda: torch.tensor([1.0, 2.0]))
    wrong = timing.Candidate("wrong", lambda: theirs)
    (row,) = timing.compare(timing.Case("sum", wrong, (timing.Peer(right, 1.0),)), 1)
    assert row.ratio is None
    assert row.reached is None
    assert complaint in row.note


def test_gradients_are_compared_too(timing: ModuleType) -> None:
    def results(gradient: float) -> dict[str, Tensor]:
        return {"output": torch.ones(2), "gradient": torch.full((2,), gradient)}

    with pytest.raises(timing.WrongResult, match="gradient is off"):
        timing.check(results(1.01), results(1.0), "ours", 1e-4)
    timing.check(results(1.00001), results(1.0), "ours", 1e-4)


def test_targets_bound_from_below_or_above(timing: ModuleType) -> None:
    def reached(ratio: float, bound: str) -> bool | None:
        return timing.Row("what", "peer", 1.0, 1.0, ratio, 1.2, bound=bound).reached

    assert reached(1.3, "least") is True
    assert reached(1.1, "least") is False
    assert reached(1.1, "most") is True
    assert reached(1.3, "most") is False
