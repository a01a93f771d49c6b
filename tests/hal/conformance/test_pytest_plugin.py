"""The kit as a pytest plug-in, used as an author would: in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = "drivetrain.hal.conformance.pytest_plugin"


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *words],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_each_check_is_an_item_and_what_is_not_declared_is_skipped(tmp_path: Path) -> None:
    device = ("--drivetrain-device", "simulated:0")
    done = run(
        tmp_path / "own",
        *(*device, "-v", "-rs", "-k", "timing or pinned or adaptor_fails or direct"),
        DRIVETRAIN_SIMULATED="groups=timing,count=2",
    )
    assert done.returncode == 0, done.stdout
    assert "drivetrain: simulated:0, Simulated device, driver 1" in done.stdout
    assert "drivetrain-conformance::timing.elapsed PASSED" in done.stdout
    assert "drivetrain-conformance::memory.pinned SKIPPED (not declared: no pinned)" in done.stdout
    assert "drivetrain-conformance::peer.direct SKIPPED (not declared: no peer)" in done.stdout


def test_a_failure_says_what_was_promised_and_beside_it_run_the_authors_own(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "test_mine.py").write_text("def test_round_trip_of_mine():\n    pass\n")
    done = run(
        folder,
        *("--drivetrain-device", "simulated:0", "-k", "round_trip"),
        DRIVETRAIN_SIMULATED="mutant=copy_short",
    )
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "What is copied in comes out, at odd sizes too" in done.stdout
    assert "It does not hold: 1 bytes in and out" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_crash_is_a_failed_item_and_the_next_one_runs(tmp_path: Path) -> None:
    done = run(
        tmp_path / "own",
        *("--drivetrain-device", "simulated:0", "-v", "-k", "priorities or many_streams"),
        DRIVETRAIN_SIMULATED="mutant=priority_crashes",
    )
    assert "ordering.priorities FAILED" in done.stdout
    assert "ordering.many_streams PASSED" in done.stdout
    assert "SIGABRT" in done.stdout


@pytest.mark.soak
def test_a_device_that_does_not_close_is_an_error_of_the_last_item(tmp_path: Path) -> None:
    done = run(
        tmp_path / "own",
        *("--drivetrain-device", "simulated:0", "-k", "elapsed"),
        DRIVETRAIN_SIMULATED="mutant=close_hangs",
    )
    assert "1 passed" in done.stdout
    assert "1 error" in done.stdout
    assert "closing the device failed" in done.stdout


def test_without_a_device_it_adds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "test_mine.py").write_text("def test_mine():\n    pass\n")
    assert "1 passed" in run(folder).stdout


def test_a_device_that_there_is_not_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path / "own", "--drivetrain-device", "nowhere:0")
    assert done.returncode == 4
    assert "nowhere:0" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_options(tmp_path: Path) -> None:
    said = run(tmp_path / "own", "--help").stdout
    assert "--drivetrain-device=ADDRESS" in said
    assert "--drivetrain-long" in said


def test_a_run_without_it_does_not_import_drivetrain(tmp_path: Path) -> None:
    """Installed, it must cost nothing where it is not asked for."""
    code = (
        "import sys, pytest\n"
        "pytest.main(['-q', '-p', 'no:cacheprovider'])\n"
        "sys.exit(any(name.partition('.')[0] == 'drivetrain' for name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
