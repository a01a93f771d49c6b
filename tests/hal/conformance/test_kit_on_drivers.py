"""The kit on every driver that this machine can execute: all that it declares must pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal.conformance.check import TOPICS, checks

LIMIT_S = 600
"""For a machine that is shared; alone on two cores each run takes about a minute."""
QUICK = ("memory", "ordering", "graphs", "threads", "lifecycle")
"""What differs most between the C parts and their twins, and is soon done."""


def kit(
    driver: str, *arguments: str, limit_s: float = LIMIT_S, **environment: str
) -> tuple[int, dict[str, Any]]:
    """(exit code, report) of ``drivetrain conformance DRIVER``."""
    done = subprocess.run(
        [sys.executable, "-m", "drivetrain", "conformance", driver, "--json", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def failures(report: dict[str, Any]) -> list[str]:
    return [
        f"{each['name']}: {each['state']}: {each['reason']}"
        for each in report["results"]
        if each["state"] in ("failed", "skipped")
    ]


def only(topics: tuple[str, ...]) -> list[str]:
    return ["--only", ",".join(topics)]


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("driver", ["cpu", "opencl"])
def test_all_that_a_driver_declares_passes(driver: str) -> None:
    if not hal.devices(driver, all_routes=True):
        pytest.skip(f"this machine has no device of driver {driver}")
    code, report = kit(driver)
    assert failures(report) == []
    assert code == 0
    assert report["passed"]
    assert report["gaps"] == []
    assert report["evidence"] == ("hardware" if driver == "cpu" else "emulated")
    assert [each["name"] for each in report["results"]] == [c.name for c in checks() if not c.long]


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("topics", [QUICK, pytest.param(TOPICS, marks=pytest.mark.soak)], ids=len)
def test_the_twin_in_python_passes_what_the_native_one_does(topics: tuple[str, ...]) -> None:
    code, report = kit("cpu", *only(topics), DRIVETRAIN_NATIVE="0")
    assert failures(report) == []
    assert code == 0


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    "topics",
    [("discovery", "copies", "events", "faults"), pytest.param(TOPICS, marks=pytest.mark.soak)],
    ids=len,
)
def test_the_simulated_device_without_a_defect_passes_and_shows_nothing(
    topics: tuple[str, ...],
) -> None:
    """The control of the mutants."""
    code, report = kit("simulated", *only(topics), DRIVETRAIN_SIMULATED="count=2 bandwidth_gbps=4")
    assert failures(report) == []
    assert code == 0
    assert report["evidence"] == ""
    assert {each["state"] for each in report["results"]} == {"passed"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("driver", "native"), [("cpu", "1"), ("cpu", "0"), ("opencl", "1"), ("simulated", "1")]
)
def test_a_million_cycles_leave_nothing_behind(driver: str, native: str) -> None:
    if driver == "opencl" and not hal.devices(driver, all_routes=True):
        pytest.skip("this machine has no OpenCL device")
    _, report = kit(
        driver,
        *only(tuple(check.name for check in checks() if check.long)),
        limit_s=3500,
        DRIVETRAIN_NATIVE=native,
        DRIVETRAIN_SIMULATED="count=2",
    )
    assert failures(report) == []
    assert {each["state"] for each in report["results"]} == {"passed"}
