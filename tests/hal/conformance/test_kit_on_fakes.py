"""The kit as a command on the cuda, hip, level_zero and sycl drivers, over fake libraries that
variables select."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import built

Kit = Callable[..., dict[str, Any]]
FAKES = {
    "cuda": ("DRIVETRAIN_CUDA_LIBRARY", "fake_cuda.c"),
    "hip": ("DRIVETRAIN_HIP_LIBRARY", "fake_hip.c"),
    "level_zero": ("DRIVETRAIN_LEVEL_ZERO_LIBRARY", "fake_ze.c"),
    "sycl": ("DRIVETRAIN_SYCL_LIBRARY", "fake_sycl.c"),
}
GROUPS = {
    "cuda": {"compute", "graphs", "managed", "peer", "pinned", "timing"},
    "hip": {"compute", "graphs", "managed", "peer", "pinned", "timing"},
    "level_zero": {"compute", "managed", "peer", "pinned", "timing"},
    "sycl": {"managed", "pinned", "timing"},
}


@pytest.fixture
def kit(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """``kit("hip", "--only", ...)``: the report as JSON."""
    (tmp_path / "drivetrain.toml").write_text('[drivers]\ndisable = ["opencl"]\n')

    def run(driver: str, *words: str, **environment: str) -> dict[str, Any]:
        variable, source = FAKES[driver]
        library = built(source, tmp_path_factory.getbasetemp())
        done = subprocess.run(
            [sys.executable, "-m", "drivetrain", "conformance", driver, "--json", *words],
            env={**os.environ, variable: str(library), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )
        assert done.stdout, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if report["passed"] else 1)
        return report

    return run


def wrong(report: dict[str, Any]) -> list[str]:
    states = ("passed", "not declared", "not here")
    return [f"{r['name']}: {r['reason']}" for r in report["results"] if r["state"] not in states]


@pytest.mark.parametrize(
    ("driver", "checks"),
    [
        ("cuda", ["events", "kernels.dynamic_shared"]),
        ("hip", ["events", "kernels.dynamic_shared"]),
        ("level_zero", ["copies", "peer", "kernels"]),
        ("sycl", ["copies"]),
    ],
)
def test_the_kit_passes_on_the_fake_and_calls_it_one(
    kit: Kit, driver: str, checks: list[str]
) -> None:
    report = kit(driver, *(word for name in checks for word in ("--only", name)))
    assert wrong(report) == []
    assert report["passed"]
    assert report["evidence"] == "fake"
    assert report["counts"]["passed"] >= 8


def test_a_library_that_loses_copies_does_not_pass(kit: Kit) -> None:
    """The control: the fake's third copy fails, and so does a check."""
    report = kit("hip", "--only", "copies.round_trip", FAKE_HIP_FAULT="hipMemcpyHtoDAsync:3:1")
    assert wrong(report)
    assert not report["passed"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("driver", sorted(FAKES))
def test_the_whole_kit_passes_on_the_fake(kit: Kit, driver: str) -> None:
    report = kit(driver)
    assert wrong(report) == []
    assert report["passed"]
    assert report["whole"]
    assert set(report["groups"]) == GROUPS[driver]
