"""scripts/gpu_report.py and scripts/performance.py: what can be held without a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
BLOCKED = ("hydra", "wandb", "omegaconf", "matplotlib", "rich", "sklearn", "tensorboard", "natten")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of the report."""
    sys.path.insert(0, str(SCRIPTS))
    names = ("commands", "compare", "floors", "measuring", "ops", "problems", "rows", "tasks", "timing", "worker")
    try:
        modules = {name: importlib.import_module(f"_gpu_{name}") for name in names}
        doors = {"performance": "performance", "report": "gpu_report"}
        yield SimpleNamespace(**modules, **{name: importlib.import_module(door) for name, door in doors.items()})
    finally:
        sys.path.remove(str(SCRIPTS))


def context(gpu: SimpleNamespace, seconds: float = 60.0) -> Any:
    return gpu.tasks.Context(gpu.timing.Cpu(), "torch", 2, 0.1, time.monotonic() + seconds)


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# --- the whole script, on a machine that has torch, triton and timm only --------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that makes every process which has it on its path do without some packages."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n")
    return str(folder)


@pytest.fixture(scope="module")
def dry_run(bare: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file and the last line of a dry run of two operators."""
    out = tmp_path_factory.mktemp("dry") / "report.json"
    arguments = ("--device", "cpu", "--only", "ops", "--case", "window-7", "--case", "routing-3", "--rounds", "1")
    done = run("gpu_report.py", *arguments, "--out", str(out), PYTHONPATH=bare)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def test_the_bare_machine_really_lacks_them(bare: str) -> None:
    code = f"for name in {BLOCKED}:\n try: __import__(name)\n except ImportError: continue\n raise SystemExit(name)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": bare}, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_help_on_a_bare_machine(bare: str) -> None:
    done = run("gpu_report.py", "--help", PYTHONPATH=bare)
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout


def test_a_dry_run_writes_every_field_and_says_what_it_is(dry_run: tuple[Path, dict[str, Any]]) -> None:
    path, last = dry_run
    result = json.loads(path.read_text())
    assert result["measured_on_gpu"] is last["measured_on_gpu"] is False
    assert last["report"] == str(path)
    assert last["trouble"] == []
    assert {"command", "date", "device", "versions", "commit", "settings", "seconds"} <= result.keys()
    assert {"name", "driver"} <= result["device"].keys()
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["commit"].keys() == {"hash", "dirty"}
    rows = result["sections"]["ops"]["rows"]
    assert [row["what"] for row in rows] == [
        "forward",
        "forward + backward",
        "forward",
        "forward + backward",
        "backward",
    ]
    for row in rows:
        assert row["ours"] > 0
        assert row["call_us"] > 0
        assert row["floor"] is None, "a processor has no floor here"
        assert row["targets"] == [], "targets hold for the full shapes"
        assert set(row["errors"]) >= {"output", "gradient of qkv"}
        assert max(row["errors"].values()) < 1e-4
        for peer in row["peers"]:
            assert peer["ratio"] == pytest.approx(peer["value"] / row["ours"])
    assert {peer["name"] for row in rows for peer in row["peers"]} == {
        "gather of the top-k regions, eager",
        "timm, matmul and softmax",
    }
    assert result["sections"]["ops"]["seconds"].keys() == {"window-7", "routing-3"}
    assert "a dry run" in path.with_suffix(".md").read_text()
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".part")] == []


def test_a_dry_run_is_no_result(
    gpu: SimpleNamespace, dry_run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.performance.main(["--check", "--results", str(dry_run[0].parent)]) == 2
    said = capsys.readouterr().err
    assert "report.json is of a dry run" in said
    assert said.count("\n") == 1


def test_without_a_device_it_says_so_in_one_line(
    gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.report.main([]) == 2
    said = capsys.readouterr().err
    assert "--device cpu" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--only", "speed"), ("--out", "report.txt"), ("--seconds", "0")])
def test_wrong_arguments_are_refused(
    gpu: SimpleNamespace, arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.report.main(arguments)
    assert stopped.value.code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_models_flex_attention_and_the_small_measurements(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    cases = ("inference", "na7-bias", "hilbert-window-64", "ceilings", "host", "repeats", "batch-neighborhood-7x7")
    options = [word for case in cases for word in ("--case", case)]
    done = run("gpu_report.py", "--device", "cpu", "--only", "ops,models", *options, "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    sections = json.loads(out.read_text())["sections"]
    rows = sections["ops"]["rows"]
    assert not [row["note"] for row in rows if row["ours"] is None]
    forward = [row for row in rows if row["what"] == "forward"]
    flex = [peer for row in forward for peer in row["peers"] if peer["name"].startswith("Flex")]
    assert len(flex) == 3
    assert all(peer["ratio"] for peer in flex), "they compute the same as ours"
    repeats = [row for row in rows if row["unit"] == "results"]
    assert repeats
    assert all(row["ours"] == 1 for row in repeats)
    (model,) = sections["models"]["rows"]
    assert model["unit"] == "img/s"
    assert model["ours"] > 0
    (peer,) = model["peers"]
    assert peer["note"] == "same weights"
    assert peer["ratio"] == pytest.approx(model["ours"] / peer["value"]), "more images a second are better"


# --- one comparison -------------------------------------------------------------------------------------------------


def case(gpu: SimpleNamespace, *contenders: Any, **fields: Any) -> Any:
    window = next(c for c in gpu.ops.cases() if c.key == "window-7")
    shape = dataclasses.replace(window.shape, batch=1, heads=2, dtype=torch.float32)
    return dataclasses.replace(window, shape=shape, contenders=contenders, **fields)


def ours_again(gpu: SimpleNamespace, change: Callable[[Tensor], Tensor] = lambda t: t) -> Callable[..., Any]:
    attention = case(gpu).attention

    def make(inputs: Any, context: Any) -> Any:
        leaves = (inputs.qkv, *inputs.tables)
        return gpu.problems.Runner(lambda *leaves: change(attention("torch", *leaves)), leaves, (inputs.grad,))

    return make


def test_a_peer_that_raises_or_computes_something_else_costs_only_itself(gpu: SimpleNamespace) -> None:
    def broken(inputs: Any, context: Any) -> Any:
        raise RuntimeError("no such kernel\nand a second line")

    def late(t: Tensor) -> Tensor:
        raise NotImplementedError("not on this device")

    make = gpu.compare.Contender
    contenders = (
        make("broken", broken),
        make("late", ours_again(gpu, late)),
        make("wrong", ours_again(gpu, lambda t: 1.01 * t)),
        make("not finite", ours_again(gpu, lambda t: t / (t * 0))),
        make("right", ours_again(gpu)),
    )
    rows = case(gpu, *contenders).task().run(context(gpu))
    for row in rows[:2]:
        assert row["ours"] > 0
        peers = {peer["name"]: peer for peer in row["peers"]}
        assert list(peers) == [contender.name for contender in contenders]
        assert peers["broken"]["note"] == "RuntimeError: no such kernel"
        assert peers["late"]["note"] == "NotImplementedError: not on this device"
        assert "computes something else: output is off by 1.0e-02" in peers["wrong"]["note"]
        assert "computes something else" in peers["not finite"]["note"]
        assert [name for name, peer in peers.items() if peer["ratio"] is not None] == ["right"]


def test_a_wrong_operator_is_not_timed(gpu: SimpleNamespace) -> None:
    class Wrong(gpu.problems.Local):  # type: ignore[name-defined,misc]
        def __call__(self, backend: str, qkv: Tensor, *tables: Tensor) -> Tensor:
            right = super().__call__(backend, qkv, *tables)
            return right if backend == "reference" else right + 1e-3 * right.detach()

    right = case(gpu).attention
    rows = case(gpu, attention=Wrong(right.pattern, right.bias)).task().run(context(gpu))
    assert len(rows) == 3
    for row in rows:
        assert row["ours"] is None
        assert "not timed: output is off by 1.0e-03" in row["note"]
        assert row["errors"]["output"] == pytest.approx(1e-3, rel=1e-3)


def test_the_fastest_of_competing_peers_counts(gpu: SimpleNamespace) -> None:
    contenders = tuple(gpu.compare.Contender(name, ours_again(gpu), "flex") for name in ("slow", "fast"))
    made = case(gpu, *contenders, most_us={"forward": 100.0}, ratios={("flex", "forward"): 2.0}, least_fraction=0.5)
    row = gpu.rows.make_row("ops", "", "", "forward", ours=100.0, floor=60.0)
    row["peers"] = [gpu.rows.make_peer("slow", 300.0, row), gpu.rows.make_peer("fast", 190.0, row)]
    made._targets(row, "forward")
    assert [(t["of"], t["value"], t["reached"]) for t in row["targets"]] == [
        ("us", 100.0, True),
        ("fraction of the floor", 0.6, True),
        ("x flex", 1.9, False),
    ]
    row["peers"], row["targets"] = [gpu.rows.make_peer("slow", None, row)], []
    made._targets(row, "forward")
    assert row["targets"][2]["reached"] is None


def test_every_target_of_a_ratio_has_its_peers(gpu: SimpleNamespace) -> None:
    keys = [task.key for task in gpu.ops.tasks()]
    assert len(keys) == len(set(keys))
    for made in gpu.ops.cases():
        for group, what in made.ratios:
            assert any(what in member.passes for member in made._members(group)), (made.key, group)


def test_floors_are_those_of_the_device_that_was_measured(gpu: SimpleNamespace) -> None:
    window = next(c for c in gpu.ops.cases() if c.key == "window")
    forward, bound = gpu.floors.floor_us(window.attention, window.shape, "forward", "NVIDIA H200")
    # 4 tensors of 128 * 3136 * 96 bf16 numbers and the float32 logarithms of 3 heads at 4.3 TB/s
    assert forward == pytest.approx((4 * 128 * 3136 * 96 * 2 + 128 * 3136 * 3 * 4) / 4.3e6)
    assert bound == "memory"
    both = gpu.floors.floor_us(window.attention, window.shape, "forward + backward", "NVIDIA H200")[0]
    backward = gpu.floors.floor_us(window.attention, window.shape, "backward", "NVIDIA H200")[0]
    assert both == pytest.approx(forward + backward)
    assert gpu.floors.floor_us(window.attention, window.shape, "forward", "Some Other GPU") == (None, "")


# --- time limits and processes --------------------------------------------------------------------------------------


def test_what_does_not_fit_the_time_is_left_out_with_that_reason(gpu: SimpleNamespace) -> None:
    lines: list[dict[str, Any]] = []
    assert gpu.worker.run_tasks([case(gpu).task()], context(gpu, seconds=1.0), lines.append) == 0
    (rows,) = [line["rows"] for line in lines if "rows" in line]
    assert [row["note"] for row in rows] == [gpu.rows.OUT_OF_TIME] * 3
    compiling = gpu.compare.Contender("compiled", ours_again(gpu), first_s=1000.0)
    runs = {"slow to compile": lambda: None, "quick": lambda: None}
    found = gpu.timing.measure(
        gpu.timing.Cpu(), runs, rounds=1, seconds=1, left_s=lambda: 5.0, needs_s={"slow to compile": compiling.first_s}
    )
    assert found["slow to compile"] == gpu.rows.OUT_OF_TIME
    assert found["quick"].device_us >= 0


def test_no_process_starts_when_the_time_is_over(gpu: SimpleNamespace) -> None:
    how = gpu.measuring.Measuring("cpu", "torch", 1)
    section = gpu.measuring.measured("ops", how, 0.0, lambda text: None, lambda rows: None)
    assert len(section.rows) > 50
    assert {row["note"] for row in section.rows} == {gpu.rows.OUT_OF_TIME}
    assert not gpu.commands.run_tests(0.0).rows[0]["ours"]


STUB = """
import json, os, sys, time
file, names = sys.argv[1], sys.argv[2:]
def write(**line):
    with open(file, "a") as stream:
        stream.write(json.dumps(line) + "\\n")
for name in names:
    write(start=name)
    if name == "crashes":
        print("illegal memory access", file=sys.stderr, flush=True)
        os._exit(134)
    if name == "hangs":
        time.sleep(60)
    write(rows=[{"name": name, "note": "", "ours": 1.0}])
    write(done=name, seconds=0.1)
    if name == "loses":
        sys.exit(75)
"""


def test_a_process_that_crashes_hangs_or_loses_the_device_is_replaced(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub.py").write_text(STUB)

    class Stub(gpu.measuring.Measuring):  # type: ignore[name-defined,misc]
        def command(self, section: str, tasks: list[str], file: Path, seconds: float) -> list[str]:
            return [sys.executable, str(tmp_path / "stub.py"), str(file), *tasks]

    def task(name: str) -> Any:
        return gpu.tasks.Task(name, lambda: [gpu.rows.make_row("ops", "", name, "")], lambda context: [], most_s=1.0)

    tasks = [task(name) for name in ("first", "crashes", "hangs", "loses", "last")]
    monkeypatch.setattr(gpu.measuring, "section_tasks", lambda section: tasks)
    kept: list[int] = []
    section = gpu.measuring.measured(
        "ops", Stub("cpu", "torch", 1), 60.0, lambda text: None, lambda rows: kept.append(len(rows))
    )
    assert [row["name"] for row in section.rows] == ["first", "crashes", "hangs", "loses", "last"]
    assert [row["ours"] for row in section.rows] == [1.0, None, None, 1.0, 1.0]
    assert section.rows[1]["note"] == "crashes: the process ended with code 134: illegal memory access"
    assert section.rows[2]["note"].startswith("hangs: ended after 1 s")
    assert len(section.trouble) == 2
    assert kept[0] == 1, "rows are kept as they come"


def test_a_process_that_cannot_start_is_not_started_again(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub(gpu.measuring.Measuring):  # type: ignore[name-defined,misc]
        def command(self, section: str, tasks: list[str], file: Path, seconds: float) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no driver')"]

    section = gpu.measuring.measured("ops", Stub("cpu", "torch", 1), 60.0, lambda text: None, lambda rows: None)
    assert len(section.trouble) == 1
    assert "no driver" in section.trouble[0]
    assert {row["note"] for row in section.rows} == set(section.trouble)


XML = """<testsuites><testsuite>
<testcase classname="tests.ops.test_gpu" name="test_window[bf16]"/>
<testcase classname="tests.ops.test_gpu" name="test_halo"><failure message="AssertionError: off by 2e-2&#10;more">
def test_halo():
tests/ops/test_gpu.py:12: AssertionError</failure></testcase>
<testcase classname="tests.ops.test_gpu" name="test_many"><skipped message="one device"/></testcase>
<testcase classname="" name="tests.engine.test_loop"><error message="collection failure">
E   ModuleNotFoundError: No module named 'hydra'</error></testcase>
</testsuite></testsuites>"""


def stub_tests(body: str) -> list[str]:
    head = "import sys, time; file = sys.argv[-1].removeprefix('--junitxml=')\n"
    return [sys.executable, "-c", head + body]


def test_counts_and_failures_of_the_gpu_tests(gpu: SimpleNamespace) -> None:
    section = gpu.commands.run_tests(30.0, stub_tests(f"open(file, 'w').write({XML!r}); sys.exit(1)"))
    counts, failure = section.rows
    assert counts["ours"] == 1.0
    assert counts["note"].startswith("1 passed, 1 failed, 1 skipped, 1 not collected (no hydra in 1 files)")
    assert failure["name"] == "tests.ops.test_gpu::test_halo"
    assert failure["note"] == "AssertionError: off by 2e-2 | tests/ops/test_gpu.py:12: AssertionError"


@pytest.mark.slow
def test_the_gpu_tests_end_at_their_time_limit(gpu: SimpleNamespace) -> None:
    started = time.monotonic()
    slow = f"""
try: time.sleep(60)
except KeyboardInterrupt: open(file, 'w').write({XML!r})"""
    cut = gpu.commands.run_tests(16.0, stub_tests(slow)).rows[0]  # a loaded machine starts Python in seconds
    assert "cut short" in cut["note"]
    assert cut["ours"] == 1.0
    dead = gpu.commands.run_tests(4.0, stub_tests("print('no such option'); sys.exit(4)")).rows[0]
    assert dead["note"] == "pytest ended with code 4: no such option"
    assert time.monotonic() - started < 45


def test_tuning_is_a_command_of_its_own(gpu: SimpleNamespace, tmp_path: Path) -> None:
    script, table = tmp_path / "tune.py", tmp_path / "found.json"
    assert "there is no tune.py" in gpu.commands.run_tune(60.0, table, script).rows[0]["note"]
    script.write_text("import sys; print('busy'); print('{\"tuned\": ' + sys.argv[2] + '}')")
    (row,) = gpu.commands.run_tune(60.0, table, script).rows
    assert json.loads(row["note"]) == {"tuned": 45}
    script.write_text("raise SystemExit('no device')")
    assert gpu.commands.run_tune(60.0, table, script).rows[0]["note"] == "ended with code 1: no device"


# --- the page -------------------------------------------------------------------------------------------------------


def report(gpu: SimpleNamespace, date: str, device: str = "NVIDIA H200", ours: float = 90.0) -> dict[str, Any]:
    rows = gpu.rows
    row = rows.make_row("ops", "1", "window 7, bias", "forward", shape="B128 56x56", dtype="bfloat16", ours=ours)
    row |= {"floor": 72.8, "floor_of": "memory", "fraction": 72.8 / ours, "call_us": 101.0, "errors": {"output": 2e-3}}
    row["peers"] = [
        rows.make_peer("timm, matmul and softmax", 450.0, row),
        rows.make_peer("NATTEN", None, row, note="ModuleNotFoundError: No module named 'natten'"),
        rows.make_peer("nearfield without bias", 85.0, row, bound="most"),
    ]
    rows.add_target(row, "us", 95.0, "most", row["ours"])
    rows.add_target(row, "x timm", 6.0, "least", row["peers"][0]["ratio"])
    late = rows.make_row("ops", "5", "neighborhood 21x21", "forward", note=rows.OUT_OF_TIME)
    tests = rows.make_row("tests", "", "GPU tests", "passed", unit="tests", ours=12.0, note="12 passed")
    return {
        "kind": "nearfield gpu report",
        "date": date,
        "command": "python scripts/gpu_report.py",
        "measured_on_gpu": True,
        "backend": "triton",
        "cold_cache": True,
        "device": {
            "name": device,
            "driver": "580.1",
            "processors": 132,
            "before": None,
            "after": {"clocks.sm": "1980", "clocks.max.sm": "1980"},
        },
        "versions": {"python": "3.12.3", "torch": "2.11.0", "natten": None},
        "commit": {"hash": "abc123", "dirty": True},
        "settings": {"NEARFIELD_TUNED": "tuned.json"},
        "seconds": 400.0,
        "sections": {
            "ops": {"rows": [row, late], "seconds": {}, "trouble": []},
            "tests": {"rows": [tests], "seconds": {}, "trouble": []},
        },
    }


def test_the_page_shows_what_was_measured(gpu: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(report(gpu, "2026-12-01 10:00 UTC")))
    text = gpu.performance.page(gpu.performance.results(tmp_path))
    assert "## NVIDIA H200" in text
    for words in (
        "commit\nabc123 with changes",
        "driver\n580.1",
        "torch 2.11.0",
        "1980 of 1980 MHz",
        "NEARFIELD_TUNED",
    ):
        assert words in text
    assert "natten None" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| window 7, bias, forward")]
    assert "90 us" in line
    assert "72.8 us, memory | 81 %" in line
    assert "timm, matmul and softmax: 450 us (**5.00x**)" in line
    assert "nearfield without bias: 85 us (**1.06 of it**)" in line
    assert "us <= 95: yes (90)<br>x timm >= 6: no (5)" in line
    assert "No module named 'natten'" in line
    assert "2.0e-03" in line
    assert "1 of 2 targets are reached" in text
    assert gpu.rows.OUT_OF_TIME in text
    assert "12 passed" in text
    assert "Not measured" not in text


def test_the_newest_result_of_each_device_comes_first(gpu: SimpleNamespace, tmp_path: Path) -> None:
    newer = report(gpu, "2026-12-02 10:00 UTC", ours=80.0)
    del newer["sections"]["tests"]
    files = {
        "a": report(gpu, "2026-12-01 10:00 UTC"),
        "b": newer,
        "c": report(gpu, "2026-12-03 10:00 UTC", "NVIDIA B200"),
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "a.configs.json").write_text("{}")
    text = gpu.performance.page(gpu.performance.results(tmp_path))
    b200, h200 = text.index("## NVIDIA B200"), text.index("## NVIDIA H200")
    assert b200 < h200
    assert "| 80 us |" in text[h200:]
    assert "| 90 us |" not in text[h200:], "an older figure of the same section"
    assert "12 passed" in text[h200:], "a section that the newer one lacks"
    assert text == gpu.performance.page(gpu.performance.results(tmp_path))
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="was not written by"):
        gpu.performance.results(tmp_path)


def test_the_page_in_the_repository_is_the_one_that_is_generated(gpu: SimpleNamespace) -> None:
    text = gpu.performance.page(gpu.performance.results(gpu.performance.RESULTS))
    assert gpu.performance.PAGE.read_text(encoding="utf-8") == text, "run python scripts/performance.py"


def test_without_results_the_page_says_so_and_lists_floors_as_computed(gpu: SimpleNamespace, tmp_path: Path) -> None:
    text = gpu.performance.page(gpu.performance.results(tmp_path))
    assert "Not measured on a GPU yet" in text
    assert "Nothing here is measured." in text
    assert "| 72.8, memory | 125, memory |" in text
    assert "forward <= 1.15 of nearfield without bias" in text
