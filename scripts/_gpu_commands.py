"""Sections of the GPU report that are commands of their own, with a time limit: the GPU tests, and tuning."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu_machine import ROOT
from _gpu_measuring import LEAST_S, SCRIPTS, Section, end, last_line
from _gpu_rows import OUT_OF_TIME, Row, make_row

PYTEST = [
    *(sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-m", "gpu and not slow", "-q"),
    # what only hardware shows comes first, should time run out
    *("tests/kernels/test_gpu.py", "tests"),
    # a machine that measures need not have what other tests import
    *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
]


def run_tests(seconds: float, command: Sequence[str] = PYTEST) -> Section:
    """Run the tests that need a GPU: a row of counts, and one for each that failed.

    Args:
        seconds: after which pytest is interrupted, so that it still says what it found, and then killed.
        command: to which the option that writes the results is added.
    """
    if seconds < LEAST_S:
        return Section([_tests_row(OUT_OF_TIME)])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder) / "results.xml", Path(folder) / "output"
        with output.open("w+", encoding="utf-8") as stream:
            code = _ended([*command, f"--junitxml={results}"], seconds, stream)
            stream.seek(0)
            last = last_line(stream.read())
        spent = time.monotonic() - started
        if not results.exists():
            how = "ended at its time limit" if code is None else f"ended with code {code}"
            return Section([_tests_row(f"pytest {how}: {last}")], {"tests": round(spent, 1)})
        rows = _test_rows(ElementTree.parse(results).getroot())
    rows[0]["note"] = "; ".join(
        filter(None, (rows[0]["note"], f"{spent:.0f} s", "" if code is not None else "cut short"))
    )
    return Section(rows, {"tests": round(spent, 1)})


def _tests_row(note: str = "", **fields: Any) -> Row:
    return make_row("tests", "", "GPU tests", "passed", unit="tests", note=note, **fields)


def _ended(command: Sequence[str], seconds: float, stream: Any) -> int | None:
    """Exit code of a command; None where it had to be ended, first politely."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    grace = min(10.0, seconds / 4)
    try:
        return process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        end(process)


def _test_rows(root: ElementTree.Element) -> list[Row]:
    counts = dict.fromkeys(("passed", "failed", "skipped", "not collected"), 0)
    missing: dict[str, int] = {}
    failures = []
    for case in root.iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is None:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
            continue
        text = f"{bad.get('message') or ''}\n{bad.text or ''}"
        module = re.search(r"No module named '([\w.]+)'", text)
        if module and bad.get("message") == "collection failure":
            missing[module[1]] = missing.get(module[1], 0) + 1
            counts["not collected"] += 1
            continue
        counts["failed"] += 1
        failures.append(make_row("tests", "", name, "failed", unit="tests", note=_said(bad)))
    note = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no test is marked gpu"
    if missing:
        note += " (no " + ", ".join(f"{module} in {count} files" for module, count in sorted(missing.items())) + ")"
    return [_tests_row(note, ours=float(counts["passed"])), *failures]


def _said(failure: ElementTree.Element) -> str:
    """The message of a failure, one line, and where it was raised."""
    message = _first_line(failure.get("message") or "")
    return " | ".join(dict.fromkeys(filter(None, (message, last_line(failure.text or "")))))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:240] if lines else ""


# --- tuning ---------------------------------------------------------------------------------------------------------


def run_tune(seconds: float, write: Path, script: Path = SCRIPTS / "tune.py") -> Section:
    """Run the tuner for a while: a row with what its last line says.

    Args:
        seconds: for all of it.
        write: file that it writes its table to.
        script: the tuner.
    """
    row = make_row("tune", "", "launch configurations", f"written to {write.name}", unit="s")
    if not script.exists():
        return Section([{**row, "note": f"not run: there is no {script.name}"}])
    grace = 15.0  # it ends its last measurement, and starting takes time too
    if seconds < grace + LEAST_S:
        return Section([{**row, "note": OUT_OF_TIME}])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+", encoding="utf-8") as stream:
        command = [sys.executable, str(script), "--seconds", f"{seconds - grace:.0f}", "--write", str(write)]
        code = _ended(command, seconds, stream)
        stream.seek(0)
        last = last_line(stream.read(), 10_000)
    spent = round(time.monotonic() - started, 1)
    try:
        said = json.loads(last)
    except ValueError:
        said = None
    if code != 0 or not isinstance(said, dict):
        how = "ended at its time limit" if code is None else f"ended with code {code}"
        return Section([{**row, "note": f"{how}: {last[:240]}"}], {"tune": spent})
    return Section([{**row, "ours": spent, "note": json.dumps(said)}], {"tune": spent})
