"""scripts/tune.py and the table that it writes: what can be held without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nearfield.ops.cache import SCHEDULES
from nearfield.ops.triton import configs
from nearfield.ops.triton.configs import Config

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SHIPPED = configs.read_table(configs.SHIPPED)


@pytest.fixture(scope="module")
def tuner() -> Iterator[SimpleNamespace]:
    """The modules of the tuner."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        modules = {name: importlib.import_module(f"_tune_{name}") for name in ("bench", "choice", "compile", "table")}
        names = {"cases": "_kernel_cases", "door": "tune", "timing": "_gpu_timing"}
        yield SimpleNamespace(**modules, **{name: importlib.import_module(module) for name, module in names.items()})
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(autouse=True)
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where calls look for a tuned table: nothing is there."""
    monkeypatch.setenv("NEARFIELD_TUNED", str(tmp_path / "tuned.json"))
    with configs.override({}):  # forgets what was looked up before and inside
        yield tmp_path / "tuned.json"


def row_of(tuner: SimpleNamespace, op: str = "window.forward", family: str = "cell64", d: int = 32) -> Any:
    return tuner.cases.Row(op, "half", d, family)


def table_of(tuner: SimpleNamespace, file: Path = Path(os.devnull), arch: str = "sm_90") -> Any:
    return tuner.table.Table.read(file, arch)


# --- the table that calls read ----------------------------------------------------------------------------------------

KEY = "window.forward {} half 32 cell64"


def write(file: Path, rows: dict[str, Any]) -> None:
    file.write_text(json.dumps({"measured": None, "configs": rows}))
    with configs.override({}):
        pass


def choose(arch: str) -> Config:
    return configs.choose("window.forward", arch, "half", 32, "cell64")


def test_rows_of_an_architecture_come_before_those_of_any(tuned_file: Path) -> None:
    shipped = choose("sm_1")
    any_, own = [64, 64, 8, 1, 2], [64, 64, 2, 1, 4]
    assert shipped not in (Config(*any_), Config(*own))
    write(tuned_file, {KEY.format("*"): any_, KEY.format("sm_1"): own})
    assert choose("sm_1") == Config(*own)
    assert choose("sm_2") == Config(*any_)
    with configs.override({KEY.format("*"): shipped}):
        assert choose("sm_1") == Config(*own)
        assert choose("sm_2") == shipped


def test_an_override_holds_inside_its_block_and_forgets_schedules() -> None:
    before, other, third = choose("sm_90"), Config(64, 64, 16, 1, 1), Config(64, 64, 16, 1, 2)
    SCHEDULES.get("test", lambda: torch.zeros(1), torch.device("cpu"))
    with configs.override({KEY.format("sm_90"): other}):
        assert SCHEDULES.nbytes == 0, "what calls were made ready for with another configuration is kept there"
        assert choose("sm_90") == other
        with configs.override({KEY.format("sm_90"): third}):
            assert choose("sm_90") == third
        assert choose("sm_90") == other
        SCHEDULES.get("test", lambda: torch.zeros(1), torch.device("cpu"))
    assert choose("sm_90") == before
    assert SCHEDULES.nbytes == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"measured": null}',
        '{"configs": [1]}',
        '{"configs": {"window.forward * half 32 cell64": [64, 64, 4, 2]}}',
        '{"configs": {"window.forward * half 32 cell64": [64, 64, 4, 2, "16"]}}',
        '{"configs": {"window.forward * half 32 cell64": 64}}',
        '{"configs": {"window.forward * half 32 cell64": [64, 64, 3, 2, 16]}}',
        '{"configs": {"window.forward": [64, 64, 4, 2, 16]}}',
        '{"configs": {"neighborhood.key * half 32 plane": [64, 128, 4, 2, 2]}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_named_in_one_line(tuned_file: Path, text: str) -> None:
    tuned_file.write_bytes(text.encode("latin-1"))
    with configs.override({}), pytest.raises(ValueError, match=r"is no table of launch configurations") as raised:
        choose("sm_90")
    assert str(tuned_file) in str(raised.value)
    assert "python scripts/tune.py" in str(raised.value)
    assert "\n" not in str(raised.value)


# --- what is written --------------------------------------------------------------------------------------------------

MEASURED = {"device": "a GPU", "driver": "1", "versions": {}, "commit": {}, "date": "today", "command": "python"}


def test_calls_take_what_was_written(tuner: SimpleNamespace, tuned_file: Path) -> None:
    table, row = table_of(tuner, tuned_file), row_of(tuner)
    config = replace(table.default(row), num_warps=8, run=3)
    table.rows[row.key("sm_90")] = config
    table.write(MEASURED)
    content = json.loads(tuned_file.read_text())
    assert content["measured"] == MEASURED
    assert content["configs"] == {KEY.format("sm_90"): [64, 64, 8, config.num_stages, 3]}
    with configs.override({}):
        assert choose("sm_90") == config
        assert choose("sm_80") == table_of(tuner, arch="sm_80").default(row)


def test_a_file_is_merged_with_what_it_has(tuner: SimpleNamespace, tuned_file: Path) -> None:
    first = table_of(tuner, tuned_file, "sm_80")
    first.rows[KEY.format("sm_80")] = Config(64, 64, 8, 1, 1)
    first.write({**MEASURED, "device": "another"})
    second = table_of(tuner, tuned_file)
    assert not second.has(row_of(tuner)), "the row of another architecture is none of this one's"
    second.rows[KEY.format("sm_90")] = Config(64, 64, 8, 1, 2)
    second.write(MEASURED)
    assert configs.read_table(tuned_file) == {
        KEY.format("sm_80"): Config(64, 64, 8, 1, 1),
        KEY.format("sm_90"): Config(64, 64, 8, 1, 2),
    }
    third = table_of(tuner, tuned_file)
    assert third.has(row_of(tuner))
    assert [origin["device"] for origin in third.earlier] == ["another", "a GPU"]


def test_a_file_is_written_whole_or_not_at_all(
    tuner: SimpleNamespace, tuned_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(tuner, tuned_file)
    table.rows[KEY.format("sm_90")] = Config(64, 64, 8, 1, 1)
    table.write(MEASURED)
    before = tuned_file.read_bytes()

    def full(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:40].encode())
        raise OSError("no space left on device")

    table.rows[KEY.format("sm_90")] = Config(64, 64, 8, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            table.write(MEASURED)
    assert tuned_file.read_bytes() == before
    assert list(tuned_file.parent.iterdir()) == [tuned_file]


# --- what wins --------------------------------------------------------------------------------------------------------


class FakeBench:
    """Times of configurations by a rule; `asked` are the comparisons that were made."""

    def __init__(self, time: Callable[[Config, int], float | str]) -> None:
        self.time = time
        self.asked: list[tuple[Any, list[Config]]] = []

    def times(self, row: Any, asked: Sequence[Config]) -> dict[Config, float | str]:
        self.asked.append((row, list(asked)))
        return {config: self.time(config, len(self.asked)) for config in asked}


@pytest.mark.parametrize(("percent", "wins"), [(0.0, False), (1.9, False), (2.1, True), (50.0, True)])
def test_a_configuration_wins_by_more_than_two_percent(tuner: SimpleNamespace, percent: float, wins: bool) -> None:
    table, row = table_of(tuner), row_of(tuner)
    shipped, *others = tuner.choice.contenders(row, table)
    fast = others[1]
    bench = FakeBench(lambda config, _: 100.0 / (1 + percent / 100) if config == fast else 100.0)
    outcome = tuner.choice.choose_row(row, table, bench)
    assert outcome.config == (fast if wins else shipped)
    assert outcome.replaced == wins
    assert bench.asked[0][1][0] == bench.asked[1][1][0] == shipped, "the shipped one takes part in every comparison"


def test_the_second_comparison_decides(tuner: SimpleNamespace) -> None:
    table, row = table_of(tuner), row_of(tuner)
    shipped, lucky, *_ = tuner.choice.contenders(row, table)
    bench = FakeBench(lambda config, nth: 50.0 if (config, nth) == (lucky, 1) else 100.0)
    assert tuner.choice.choose_row(row, table, bench).config == shipped
    assert lucky in bench.asked[1][1]


def test_runs_are_tried_on_the_fastest(tuner: SimpleNamespace) -> None:
    table, row = table_of(tuner), row_of(tuner)
    fast = tuner.choice.contenders(row, table)[2]
    best = replace(fast, run=8)
    bench = FakeBench(lambda config, _: {fast: 80.0, best: 70.0}.get(config, 100.0))
    outcome = tuner.choice.choose_row(row, table, bench)
    assert outcome.config == best
    assert {config.run for config in bench.asked[1][1]} == {4, 8, 16, 32}
    assert str(outcome).endswith(f"instead of [64, 64, {', '.join(map(str, table_row(outcome.shipped)))}], 100.0 us")


def table_row(config: Config) -> list[int]:
    return [config.num_warps, config.num_stages, config.run]


def test_what_failed_never_wins(tuner: SimpleNamespace) -> None:
    table, row = table_of(tuner), row_of(tuner)
    shipped, *others = tuner.choice.contenders(row, table)
    bench = FakeBench(lambda config, _: 100.0 if config in (shipped, others[-1]) else "spills 8 bytes")
    outcome = tuner.choice.choose_row(row, table, bench)
    assert outcome.config == shipped
    assert set(others[:-1]) <= set(outcome.dropped)
    bench = FakeBench(lambda config, _: "takes too much" if config == shipped else 100.0)
    assert tuner.choice.choose_row(row, table, bench).config == others[0], "what is shipped does not run at all"
    outcome = tuner.choice.choose_row(row, table, FakeBench(lambda *_: "broken"))
    assert outcome.config is None
    assert not outcome.replaced
    assert set(outcome.dropped) == {shipped, *others}


def test_the_pass_of_the_bias_takes_the_tiles_of_the_query_pass(tuner: SimpleNamespace) -> None:
    table, bias = table_of(tuner), row_of(tuner, "neighborhood.bias", "plane")
    query = replace(bias, op="neighborhood.query")
    table.rows[query.key("sm_90")] = replace(table.default(query), block_m=32)
    assert {config.block_m for config in tuner.choice.contenders(bias, table)} == {32}


def test_every_row_has_configurations_that_kernels_take(tuner: SimpleNamespace, tmp_path: Path) -> None:
    table = table_of(tuner)
    for row in tuner.cases.rows():
        found = tuner.choice.contenders(row, table)
        assert len(set(found)) == len(found) > 1
        table.rows = {f"{row.key('*')}{i:02}": config for i, config in enumerate(found)}
        table.file = tmp_path / "all.json"
        table.write(None)
        assert list(configs.read_table(table.file).values()) == found, "a table of them can be read"
        table.rows = {}


def test_important_rows_come_first_and_measured_ones_last(tuner: SimpleNamespace) -> None:
    table, rows = table_of(tuner), tuner.cases.rows()
    order = tuner.choice.ordered(rows, table)
    assert sorted(map(str, order)) == sorted(map(str, rows))
    assert order[0] == row_of(tuner)
    families = [(row.group, row.family == "curve") for row in order if row.precision == "half" and row.block_d == 32]
    assert list(dict.fromkeys(families)) == [
        ("window", False), ("neighborhood", False), ("routing", False), ("neighborhood", True),
    ]  # fmt: skip
    first = order[: sum(row.precision == "half" and row.block_d in (32, 64) for row in rows)]
    assert all(row.precision == "half" and row.block_d in (32, 64) for row in first)
    passes = [row.op for row in order if (row.precision, row.block_d, row.family) == ("half", 32, "plane")]
    assert passes.index("neighborhood.query") < passes.index("neighborhood.bias")
    table.rows[order[0].key("sm_90")] = Config(64, 64, 4, 2, 16)
    assert tuner.choice.ordered(rows, table) == [*order[1:], order[0]]


# --- for as long as there is time -------------------------------------------------------------------------------------


def tuned(tuner: SimpleNamespace, bench: Any, rows: int = 3) -> tuple[Any, Any, list[int], list[str]]:
    """Outcome, table, rows at each time of writing, and what was said, for the first rows."""
    table = table_of(tuner)
    order = tuner.choice.ordered(tuner.cases.rows(), table)[:rows]
    written: list[int] = []
    said: list[str] = []
    result = tuner.choice.tune(order, table, bench, lambda: written.append(len(table.rows)), said.append)
    return result, table, written, said


def test_every_row_is_written_when_it_is_done(tuner: SimpleNamespace) -> None:
    bench = FakeBench(lambda config, _: "spills" if config.num_warps == 8 else 100.0)
    result, table, written, said = tuned(tuner, bench)
    assert written == [1, 2, 3]
    assert (result.left, result.stopped) == (0, "")
    assert table.rows == {outcome.row.key("sm_90"): outcome.config for outcome in result.outcomes}
    assert sum(line.endswith("dropped: spills") for line in said) == sum(len(o.dropped) for o in result.outcomes) > 0


def test_what_does_not_fit_the_time_is_left(tuner: SimpleNamespace) -> None:
    def time(config: Config, nth: int) -> float:
        if nth > 4:  # in the first comparison of the third row
            raise tuner.choice.OutOfTime
        return 100.0

    result, table, written, _ = tuned(tuner, FakeBench(time), 5)
    assert (result.left, result.stopped) == (3, "out of time")
    assert written == [1, 2]
    assert len(table.rows) == len(result.outcomes) == 2


def test_a_lost_device_ends_it_and_other_errors_do_not(tuner: SimpleNamespace) -> None:
    def fails(error: BaseException) -> Any:
        def time(config: Config, nth: int) -> float:
            if nth == 3:
                raise error
            return 100.0

        return tuned(tuner, FakeBench(time), 4)

    result, table, *_ = fails(tuner.timing.DeviceLost("an illegal memory access"))
    assert (result.left, len(table.rows)) == (3, 1)
    assert "an illegal memory access" in result.stopped
    result, table, written, said = fails(ValueError("no such map"))
    assert (result.left, result.stopped, len(table.rows), written) == (0, "", 3, [1, 2, 3])
    assert any("no such map" in line for line in said)


def test_times_are_the_devices_and_a_dry_run_has_none(tuner: SimpleNamespace) -> None:
    called: list[str] = []
    runs = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    times = tuner.bench.timed(tuner.timing.Cpu())(runs)
    assert times.keys() == runs.keys()
    assert all(isinstance(time, float) and time > 0 for time in times.values())
    assert called.count("a") == called.count("b") > 3
    called.clear()
    assert tuner.bench.alike(runs) == {"a": 0.0, "b": 0.0}
    assert called == ["a", "b"]


# --- compiled ahead ---------------------------------------------------------------------------------------------------


@pytest.fixture
def job(
    tuner: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any, Config], Any]]:
    """Makes jobs for an architecture; Triton's cache is empty and the driver that jobs set is put back."""
    from nearfield.ops.triton import window
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_active", driver._active)
    kernels = [getattr(window, name) for name in window.__all__]
    for kernel in kernels:
        kernel.device_caches.clear()
    yield lambda row, config: tuner.compile.Job(row, ((row.op, config),), "sm_90", True)
    for kernel in kernels:
        kernel.device_caches.clear()


def test_code_that_spills_or_does_not_compile_is_complained_of(
    tuner: SimpleNamespace, job: Callable[[Any, Config], Any]
) -> None:
    row = row_of(tuner)
    assert tuner.compile.compiled(job(row, Config(64, 64, 1, 1, 16))).startswith("spills ")
    assert "num_warps" in tuner.compile.compiled(job(row, Config(64, 64, 3, 1, 16)))
    assert tuner.compile.compiled(job(replace(row, op="window.sideways"), Config(64, 64, 4, 1, 16))) == (
        "no call launches it"
    )


def test_what_is_compiled_ahead_is_what_a_launch_asks_for(
    tuner: SimpleNamespace, job: Callable[[Any, Config], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfield.ops.triton import window
    from triton.compiler import ASTSource

    made: list[str] = []
    make_ir = ASTSource.make_ir

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(self.fn.__name__)
        return make_ir(self, *args, **kwargs)

    monkeypatch.setattr(ASTSource, "make_ir", spy)
    row, config = row_of(tuner, family="cell16"), Config(16, 16, 1, 1, 16)
    assert tuner.compile.compiled(job(row, config)) == ""
    assert made == ["forward_kernel"]
    window.forward_kernel.device_caches.clear()  # as in another process
    assert tuner.compile.compiled(job(row, config)) == ""
    assert made == ["forward_kernel"], "it was read from Triton's cache"


# --- the door ---------------------------------------------------------------------------------------------------------


def test_the_list_needs_no_gpu(tuner: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.door.main(["--list"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    names = {line.split(": [")[0] for line in lines}
    assert names == {key.replace(" cpu ", " ") for key in SHIPPED if " cpu " in key}
    assert json.loads(last)["rows"] == len(lines)
    assert json.loads(last)["configurations"] == sum(line.count("[") for line in lines)
    assert tuner.door.main(["--list", "--only", "window.forward half 32"]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert f"cell64: {[*vars(SHIPPED[KEY.format('*')]).values()]} or [" in lines[0]


def test_without_a_device_it_says_so_in_one_line(
    tuner: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tuned_file: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tuner.door.main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA device" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not tuned_file.exists()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuner.door.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_wrong_arguments_are_refused(tuner: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.door.main(["--list", "--only", "speed"]) == 2
    assert capsys.readouterr().err == "tune: --only 'speed' is part of no row's name: see --list\n"
    with pytest.raises(SystemExit) as stopped:
        tuner.door.main(["--seconds", "0"])
    assert stopped.value.code == 2


# In a process of its own, as kernels are interpreted there: the script's dry run, then one comparison in which no
# difference is allowed and one configuration cannot be launched.
DRY_RUN = """
import json, os, sys
from pathlib import Path
folder, written = sys.argv[1:]
sys.path.insert(0, folder)
import tune
def main():
    damaged = Path(written + ".damaged")
    damaged.write_text("{")
    codes = [tune.main(["--dry-run", "--only", "routing.forward half 16 region16", "--seconds", "50", "--write", file])
             for file in (str(damaged), written)]
    import torch, _kernel_cases, _tune_bench, _tune_choice
    from _gpu_timing import Cpu
    from _kernel_cases import Row
    from _tune_table import Table
    from nearfield.ops.triton.configs import Config
    class Compilers:
        def ask(self, job): pass
        def wrong(self, job, seconds):
            if dict(job.configs)["routing.forward"].num_stages == 5: raise TimeoutError
            return "spills" if dict(job.configs)["routing.forward"].num_warps == 8 else ""
    row, compared = Row("routing.forward", "half", 16, "region16"), []
    _tune_bench.LIMITS[torch.bfloat16] = 0.0
    def timer(runs):
        compared.append(list(runs))
        return _tune_bench.alike(runs)
    table = Table.read(Path(os.devnull), "cpu")
    bench = _tune_bench.KernelBench(Cpu(), table, Compilers(), "sm_90", [row], lambda: 9.0, timer, small=True)
    choices = ((16, 64, 1, 2, 1), (16, 64, 4, 2, 1), (16, 16, 1, 2, 1), (16, 48, 1, 2, 1), (16, 64, 8, 2, 1))
    shipped, same, other, impossible, spilling = (Config(*choice) for choice in choices)
    found = bench.times(row, [shipped, same, other, impossible, spilling])
    try:
        bench.times(row, [shipped, Config(16, 64, 1, 5, 1)])
        late = "nothing"
    except _tune_choice.OutOfTime:
        late = "out of time"
    for of in ("lists", "zero keys"):  # regions so small that tiles of 64 tokens are masked: a row of another family
        _kernel_cases.ROUTED["region16", of] = (16, 2, 16, False)
    masked = _tune_bench.KernelBench(Cpu(), table, Compilers(), "sm_90", [row], lambda: 9.0, timer, small=True)
    masked = masked.times(row, [shipped])[shipped]
    print(json.dumps([codes, list(found.values()), compared, late, masked]))
if __name__ == "__main__":
    main()
"""


def test_a_dry_run_compiles_and_compares_everything(tmp_path: Path) -> None:
    script, written = tmp_path / "dry.py", tmp_path / "found.json"
    script.write_text(DRY_RUN)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(SCRIPTS), str(written)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said, compared = (json.loads(line) for line in done.stdout.splitlines())
    assert said | {"seconds": 0, "dropped": 0} == {
        "device": "cpu", "measured": False, "rows": 1, "failed": 0, "replaced": 0, "dropped": 0, "left": 0,
        "stopped": None, "file": str(written), "seconds": 0,
    }  # fmt: skip
    content = json.loads(written.read_text())
    assert content["measured"] is None
    shipped = SHIPPED["routing.forward cpu half 16 region16"]
    assert configs.read_table(written) == {"routing.forward cpu half 16 region16": shipped}
    assert "not timed" in done.stderr
    assert done.stderr.splitlines()[0].startswith(f"tune: {written}.damaged is no table of launch configurations")

    codes, (first, same, other, impossible, spilling), runs, late, masked = compared
    assert codes == [2, 0]
    assert (first, same) == (0.0, 0.0)
    assert other.startswith("computes something else: output is off by ")
    assert isinstance(impossible, str)
    assert "power" in impossible
    assert spilling == "spills"
    assert runs == [["(16, 64, 1, 2, 1)", "(16, 64, 4, 2, 1)"]], "only what gives the same result is timed"
    assert late == "out of time"
    assert masked == "no call launches it"
