"""The demo and benchmark commands of the guide, as it prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LIMIT

pytestmark = LIMIT
ROOT = Path(__file__).resolve().parents[2]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, kernels: dict[str, str]) -> Run:
    """Runs a command of the guide, in a state folder of its own."""
    environment = {**os.environ, **kernels, "DRIVETRAIN_HOME": str(tmp_path)}
    return lambda *words: subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_the_enhanced_demo_shows_its_four_parts(run: Run) -> None:
    done = run("demos/hardware_abstraction/enhanced_multi_vendor_demo.py", "--quick")
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert titles == [
        "Cross-vendor device mesh",
        "Intelligent workload placement",
        "Performance comparison",
        "Real-time capability analysis",
    ]
    assert "rank 0: " in done.stdout
    assert "a model of 100 TB: nothing here fits" in done.stdout
    assert "GFLOP/s" in done.stdout
    assert "health" in done.stdout


def test_the_first_demo_computes_the_same_on_every_device(run: Run) -> None:
    done = run("demos/hardware_abstraction/multi_vendor_demo.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "cpu:0        2x + 1 over 10000 numbers: equal to numpy's" in done.stdout
    assert "the same 40000 bytes" in done.stdout


def test_the_benchmark_measures_what_is_there_and_writes_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "hal_results.json"
    words = ("benchmarks/hardware_abstraction_benchmark.py", "--quick", "--output", str(out))
    done = run(*words)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert "cpu:0" in [device["address"] for device in told["devices"]]
    for device in told["devices"]:
        assert device["matmul_gflops"] > 0
        assert device["copy_gbps"] > 0
        assert 0 <= device["matmul_error"] < 1e-3
        assert all(len(values) == told["rounds"] for values in device["seconds"].values())
        assert f"{device['address']} " in done.stdout


@pytest.mark.parametrize("words", [("--output", "/nowhere/at/all.json"), ("--fast",)])
def test_the_benchmark_refuses_before_it_measures(run: Run, words: tuple[str, ...]) -> None:
    done = run("benchmarks/hardware_abstraction_benchmark.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert words[-1].partition("/at")[0] in done.stderr
