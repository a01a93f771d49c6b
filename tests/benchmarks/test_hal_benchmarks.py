"""The benchmarks of floor 1 run, and say what they must; no time decides anything here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPAN = ("start: ", "end: ", "peer: ", "floor: ")


def quick(name: str, *parts: str, tmp_path: Path, limit_s: float = 300) -> dict[str, Any]:
    """What one benchmark's quick run prints as JSON, after its lines were looked at."""
    environment = {**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home")}
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--quick", "--json", *parts]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit_s
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    (answer,) = [json.loads(line) for line in lines if line.startswith('{"benchmark"')]
    for gate in answer["gates"]:
        (line,) = [line for line in lines if gate["name"] + ": " in line]
        assert all(word in line for word in SPAN)
        assert f"limit {gate['limit']:.4g}" in line
        assert gate["verdict"] == "quick"
    for row in answer["rows"]:
        found = [line for line in lines if line.strip().startswith(row["line"] + " ")]
        assert any("start: " in line and "end: " in line for line in found), row["line"]
        assert row["seconds"] > 0
        assert row["start"]
        assert row["end"]
    assert answer["failed"] == []
    assert "Python" in answer["machine"]
    assert "drivetrain" in answer["versions"]
    return answer


def in_a_process(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=True,
    )
    return done.stdout


def test_launches_on_the_processor_run_and_are_held_against_c(tmp_path: Path) -> None:
    answer = quick("hal_launch", "cpu", tmp_path=tmp_path)
    names = {gate["name"] for gate in answer["gates"]}
    assert {"cpu:0 plan() above the C loop", "cpu:0 kernel(...) above the C loop"} <= names
    assert "cpu:0 graph of 100 kernels / C" in names
    assert {"C loop", "plan()", "kernel(...)"} <= {row["line"] for row in answer["rows"]}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("hal_launch", ["cpu:0 plan() above the C loop"]),
        ("hal_copies", []),
        ("hal_cpu", ["saxpy", "stencil", "chain", "matmul"]),
        ("hal_workloads", ["stencil on cpu:0 / C", "pipeline of small kernels on cpu:0 / C"]),
    ],
)
def test_every_benchmark_runs(name: str, gates: list[str], tmp_path: Path) -> None:
    answer = quick(name, tmp_path=tmp_path, limit_s=900)
    if not any("PoCL" in each for each in answer["absent"]):
        for gate in gates:
            assert any(found["name"].startswith(gate) for found in answer["gates"]), gate


def test_what_is_not_there_is_named_and_a_part_that_fails_hides_no_other() -> None:
    code = """
import sys
from benchmarks.hal.common import HalReport
report = HalReport("t")
report.missing("a peer", "No module named 'peer'")
report.part("first", lambda: 1 / 0)
report.part("second", lambda: print("second ran"))
report.part("third", lambda: sys.exit("gave up"))
sys.exit(0 if report.finish() == 1 else 5)
"""
    said = in_a_process(code)
    assert "not here: a peer: No module named 'peer'" in said
    assert "second ran" in said
    assert "failed: first: ZeroDivisionError: division by zero; third: SystemExit" in said


def test_a_gate_that_is_narrower_than_the_controls_spread_decides_nothing() -> None:
    code = """
from benchmarks.hal.common import Narrow
for value, spread, room in [(0.1, 0, 0.2), (0.1, 0.3, 0.2), (0.3, 0.05, 0.2), (0.22, 0.05, 0.2),
                            (0.6, 0.3, 0.2), (0.2, 0.1, float("inf"))]:
    print(Narrow("g", value, 0.2, "us", spread, room).verdict)
"""
    wanted = ["ok", "undecided", "MISS", "undecided", "MISS", "ok"]
    assert in_a_process(code).split() == wanted


def test_an_unknown_part_is_refused() -> None:
    for name in ("hal_launch", "hal_copies", "hal_cpu", "hal_workloads"):
        command = [sys.executable, f"benchmarks/bench_{name}.py", "nonsense"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert done.returncode == 2
        assert "there are" in done.stderr
