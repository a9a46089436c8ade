"""The shipped kernels compiled ahead of time, for GPUs that need not be there: what is in their machine code.

Needs a process without TRITON_INTERPRET: python -m pytest -c tests/pytest.ini tests/kernels -m aot
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nearfield.ops.triton import configs

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="interpreted kernels cannot be compiled: env -u TRITON_INTERPRET python -m pytest -c tests/pytest.ini "
        "tests/kernels -m aot",
    ),
]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SHIPPED = configs.read_table(configs.SHIPPED)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HOT = ("cell64", "plane", "curve", "region64")  # tiles of Swin, NAT, HWT and BiFormer at 224 pixels


def rows_for(arch: str) -> list[str]:
    """Names of the rows that an architecture finds: "OP PRECISION BLOCK_D FAMILY"."""
    keys = [key.split() for key in SHIPPED]
    return sorted({" ".join([op, *rest]) for op, place, *rest in keys if place in (arch, "*")})


def is_fast(arch: str, name: str) -> bool:
    _, precision, block_d, family = name.split()
    if precision != "half":
        return False
    hot = block_d == "32" and (arch == "sm_90" or family in HOT)
    return hot or (arch, block_d, family) == ("sm_90", "64", "plane")


def is_compiled(arch: str, name: str) -> bool:
    """Half precision: every row on the architecture that the table was made for; on the others what may differ there.

    That is rows of their own; terms that are looked up, which take most registers; and on sm_80 the largest tiles,
    since cards with less shared memory take its rows.
    """
    op, precision, block_d, family = name.split()
    own = f"{op} {arch} {precision} {block_d} {family}" in SHIPPED
    large = arch == "sm_80" and block_d == "128" and family in HOT
    return precision == "half" and (arch == "sm_90" or own or large or family == "lookup" or is_fast(arch, name))


HALF = [
    pytest.param(arch, name, id=f"{arch} {name}", marks=() if is_fast(arch, name) else pytest.mark.slow)
    for arch in ARCHITECTURES
    for name in rows_for(arch)
    if is_compiled(arch, name)
]
# Exact float32 products are the same vector instructions on every architecture. Curves take the code of planes.
FLOAT = [
    name
    for name in rows_for("sm_90")
    if (" float 32 " in name or " float 128 " in name) and not name.endswith(("curve", "region16", "region32"))
]


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules of scripts/kernels.py."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("choose", "compiled", "kernel_cases", "sass")
        modules = {name: importlib.import_module(f"_{name}") for name in names}
        # by its file: the folder of these tests is called "kernels" too
        spec = importlib.util.spec_from_file_location("kernels_door", SCRIPTS / "kernels.py")
        assert spec is not None
        assert spec.loader is not None
        door = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(door)
        yield SimpleNamespace(**modules, door=door)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(autouse=True)
def _shipped_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEARFIELD_TUNED", str(tmp_path / "none.json"))
    with configs.override({}):  # forgets what was looked up before and inside
        yield


def row_called(tools: SimpleNamespace, name: str) -> Any:
    return next(row for row in tools.kernel_cases.rows() if row.name == name)


def check(tools: SimpleNamespace, name: str, arch: str) -> None:
    """Compile the usual call of a row and hold against it what every shipped configuration must keep."""
    row = row_called(tools, name)
    _, config, launches = tools.choose.shipped(row, arch)
    made = tools.compiled.compile_launch(launches[0], arch)
    assert made.spill_bytes == 0
    assert made.shared_bytes <= tools.compiled.PROCESSORS[arch].program_shared
    assert made.warps == config.num_warps
    if row.precision == "half":
        assert made.matrix_instructions > 0
    if tools.choose.streams(row):
        assert made.async_copies > 0, "tokens are streamed by asynchronous copies"
    warps, programs = tools.choose.planned(row)
    assert made.programs() >= programs, f"{made.registers} registers, {made.shared_bytes} bytes of shared memory"
    assert made.programs() * made.warps >= warps, (
        f"{made.registers} registers, {made.shared_bytes} bytes of shared memory"
    )
    if arch == "sm_80" or row.precision == "float":  # the same code there; sm_90 has tiles of its own kind
        for smaller in tools.choose.EVERYWHERE:
            if configs.choose(row.op, smaller, row.precision, row.block_d, row.family) == config:
                assert made.programs(smaller) > 0, f"{made.shared_bytes} bytes of shared memory on {smaller}"


@pytest.mark.parametrize(("arch", "name"), HALF)
def test_a_shipped_configuration_in_half_precision(tools: SimpleNamespace, arch: str, name: str) -> None:
    check(tools, name, arch)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT)
def test_a_shipped_configuration_in_float32(tools: SimpleNamespace, name: str) -> None:
    check(tools, name, "sm_90")


@pytest.mark.parametrize(
    ("family", "block_d"),
    [
        pytest.param(family, block_d, marks=() if (family, block_d) == ("plane", 32) else pytest.mark.slow)
        for block_d, families in ((32, HOT), (64, ("cell64", "plane")), (128, ("plane",)))
        for family in families
    ],
)
def test_no_other_call_of_a_row_spills(tools: SimpleNamespace, family: str, block_d: int) -> None:
    """Every kind of bias, zero keys, odd head dimensions, values of another size: on sm_90, in half precision."""
    group = [
        row
        for row in tools.kernel_cases.rows()
        if (row.precision, row.block_d, row.family) == ("half", block_d, family)
    ]
    for case in tools.kernel_cases.calls(group[0]):
        for row in group:
            if found := tools.choose.shipped(row, "sm_90", [case]):
                made = tools.compiled.compile_launch(found[2][0], "sm_90")
                assert not tools.choose.wrong_with(row, case, made), f"{row.name}: {case}"


# Instructions of a thread in the inner loop for each score computed there: a budget of 12 for the forward loops, whose
# issue otherwise takes longer than their bytes; the others keep what they have.
@pytest.mark.parametrize(
    ("name", "terms", "most"),
    [
        ("window.forward half 32 cell64", "table", 12.0),
        ("window.forward half 32 cell64", "none", 12.0),
        ("neighborhood.forward half 32 plane", "table", 12.0),
        ("neighborhood.forward half 32 plane", "none", 12.0),
        ("neighborhood.forward half 32 curve", "table", 12.0),
        ("routing.forward half 32 region64", "lists", 12.0),
        ("window.backward half 32 cell64", "table", 22.0),
        ("neighborhood.query half 32 plane", "none", 12.0),
        ("neighborhood.query half 32 plane", "table", 13.5),  # with the gradient of the table
        ("neighborhood.key half 32 plane", "table", 13.5),
        ("neighborhood.bias half 32 curve", "table", 13.5),
        ("routing.query half 32 region64", "lists", 12.0),
        ("routing.key half 32 region64", "lists", 12.0),
    ],
)
def test_instructions_per_score_on_sm_90(tools: SimpleNamespace, name: str, terms: str, most: float) -> None:
    row = row_called(tools, name)
    cases = [case for case in tools.kernel_cases.calls(row) if (case.terms, case.d, case.dv) == (terms, 32, 32)]
    case, config, launches = tools.choose.shipped(row, "sm_90", cases)
    made = tools.choose.figures(row, case, launches, "sm_90", config)
    assert 4.0 < made.per_score <= most  # fewer would mean that the loop was not found
    assert made.per_useful_score > made.per_score


@pytest.mark.parametrize("name", [name for name in rows_for("gfx942") if " half 32 " in name and name.endswith(HOT)])
def test_kernels_compile_for_amd(tools: SimpleNamespace, name: str) -> None:
    row = row_called(tools, name)
    _, _, launches = tools.choose.shipped(row, "gfx942")
    made = tools.compiled.compile_launch(launches[0], "gfx942")
    assert "v_mfma" in made.assembly
    assert made.shared_bytes <= tools.compiled.PROCESSORS["gfx942"].program_shared


def test_loops_are_found_in_machine_code(tools: SimpleNamespace) -> None:
    code = """
        MOV R0, RZ
    .L_x_0:
        LDG.E R1, [R2]
    .L_x_1:
        @P0 BRA `(.L_x_3)
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        @!P1 BRA `(.L_x_1)
        STG.E [R2], R4
        @P2 CALL.REL.NOINC `(.L_x_2)
        BRA `(.L_x_0)
    .L_x_2:
        EXIT
    .L_x_3:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2
        @!P0 BRA `(.L_x_3)
        BRA `(.L_x_1)
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        else:
            instructions.append(line)
    made = tools.sass.MachineCode(tuple(instructions), labels)
    # The wait at the end belongs to the inner loop, which it jumps back into.
    assert [len(loop) for loop in made.loops] == [2, 7, 11]
    assert made.nest == (7, 11, 13)
    assert made.opcodes()["HMMA"] == 2


def test_programs_of_a_multiprocessor_are_counted_as_the_guide_says(tools: SimpleNamespace) -> None:
    def programs(registers: int, shared: int, warps: int, arch: str = "sm_90", columns: int = 0) -> int:
        return int(tools.compiled.Compiled(arch, registers, 0, shared, columns, "", None, warps).programs())

    assert programs(32, 0, 4) == 16  # 64 warps
    assert programs(16, 0, 1) == 32  # the most of all
    assert programs(255, 0, 4) == 2  # 256 registers for each of 256 threads
    assert programs(168, 0, 4) == 3
    assert programs(32, 113 << 10, 4) == 2
    assert programs(32, 114 << 10, 4) == 1  # and 1 KiB for each program
    assert programs(32, 100 << 10, 4, "sm_86") == 0
    assert programs(32, 0, 4, "sm_100", columns=256) == 2


def test_the_shipped_table_is_as_the_chooser_writes_it(tools: SimpleNamespace) -> None:
    assert tools.choose.written(SHIPPED) == configs.SHIPPED.read_text(encoding="utf-8")
    head = json.loads(configs.SHIPPED.read_text(encoding="utf-8"))
    assert "nothing measured" in head["chosen_from"]


def test_cells_have_rows_of_both_passes_and_all_else_has_rows() -> None:
    for arch in ARCHITECTURES:
        found = set(rows_for(arch))
        for precision in ("half", "float"):
            for block_d in ("16", "32", "64", "128"):
                rest = f"{precision} {block_d}"
                for cell in ("cell16", "cell32", "cell64"):
                    passes = [f"window.{name} {rest} {cell}" in found for name in ("forward", "backward")]
                    assert all(passes) or not any(passes), f"{arch} {rest} {cell}"
                    # whole cells that would not fit the registers are cut into tiles
                    assert all(passes) or precision == "float" or block_d == "128", f"{arch} {rest} {cell}"
                for family in ("plane", "curve"):
                    assert all(
                        f"neighborhood.{n} {rest} {family}" in found for n in ("forward", "query", "key", "bias")
                    )
                for family in ("region16", "region32", "region64"):
                    assert all(f"routing.{n} {rest} {family}" in found for n in ("forward", "query", "key"))


@pytest.mark.slow
def test_choosing_again_gives_the_same(tools: SimpleNamespace) -> None:
    rows = [row for row in tools.kernel_cases.rows() if row.name.endswith("half 32 cell16")]
    (_, found), *_ = tools.choose.choose_rows(rows, SHIPPED, lambda text: None)
    ours = {key: config for key, config in SHIPPED.items() if key.endswith("half 32 cell16")}
    assert found == {key: config for key, config in ours.items() if key.split()[1] != "cpu"}


def test_the_door_prints_a_table_and_one_json_object() -> None:
    arguments = ("--arch", "sm_80", "--only", "window.forward half 32 cell64")
    done = subprocess.run([sys.executable, SCRIPTS / "kernels.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, line, last = done.stdout.splitlines()
    (kernel,) = json.loads(last)["kernels"]
    assert kernel["row"] == "window.forward half 32 cell64"
    assert kernel["spilled"] == 0
    assert kernel["matrix"] > 0
    assert kernel["per_score"] < kernel["per_useful_score"]
    assert str(kernel["registers"]) in line.split()
    assert "registers" in head


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--only", "window.sideways"], {}, "'window.sideways'"),
        (["--arch", "sm_1"], {}, "sm_90"),
        ([], {"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET"),
    ],
)
def test_the_door_refuses_in_one_line(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], environment: dict[str, str], said: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tools.door.main(arguments) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert said in printed.err
    assert printed.out == ""
