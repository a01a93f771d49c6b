"""``drivetrain conformance``: exit codes, JSON, reports, and drivers that crash or hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {each["name"]: each["state"] for each in json.loads(done.stdout)["results"]}


def reasons(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {each["name"]: each["reason"] for each in json.loads(done.stdout)["results"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name a driver"),
        (("nowhere",), "there is no driver 'nowhere'"),
        (("cpu", "--only", "memory.nowhere"), "there is no check or topic memory.nowhere"),
        (("cpu", "--device", "cpu:99"), "cpu:99"),
        (("cpu", "--device", "simulated:0"), "simulated"),
        (("cpu", "--report", "no/such/folder/x.json"), "there is no folder"),
        (("cpu", "--mutants"), "leave out driver cpu"),
        (("--mutants", "--only", "nothing"), "there is no mutant nothing"),
        (("cpu", "--nonsense"), "--nonsense"),
    ],
)
def test_bad_input_ends_with_2(command: Command, words: tuple[str, ...], says: str) -> None:
    done = command("conformance", *words)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pass_is_0_with_a_page_and_a_report(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    done = command("conformance", "cpu", "--only", "timing", "--report", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "timing     3 passed" in done.stdout
    assert "cpu:0 passed" in done.stdout
    report = json.loads(path.read_text())
    assert report["passed"]
    assert report["counts"]["passed"] == 3
    assert not report["whole"]
    for word in ("driver", "device", "driver_version", "evidence", "date", "machine", "groups"):
        assert report[word], word


def test_a_failure_is_1_and_says_what_was_promised(command: Command) -> None:
    done = command(
        "conformance",
        "simulated",
        "--only",
        "copies.round_trip,memory.alignment",
        DRIVETRAIN_SIMULATED="mutant=copy_short",
    )
    assert done.returncode == 1
    assert "failed copies.round_trip: 1 bytes in and out" in done.stdout
    assert "What is copied in comes out" in done.stdout
    assert "not passed: 1 passed, 1 failed" in done.stdout


def test_json_alone_is_on_standard_output(command: Command) -> None:
    done = command("conformance", "cpu", "--only", "memory.alignment", "--json")
    assert states(done) == {"memory.alignment": "passed"}
    assert "memory" in done.stderr


def test_checks_are_listed_with_what_they_prove_and_need(command: Command) -> None:
    listed = json.loads(command("conformance", "--list", "--json", check=True).stdout)["checks"]
    by_name = {each["name"]: each for each in listed}
    assert by_name["peer.direct"]["needs"] == ["peer", "two devices"]
    assert by_name["leaks.million_buffers"]["long"]
    assert all(each["proves"].endswith(".") for each in listed)
    page = command("conformance", "--list", "--only", "timing", check=True).stdout
    assert "timing.elapsed" in page
    assert "memory.alignment" not in page


def test_a_crash_is_a_result_and_the_rest_runs(command: Command) -> None:
    done = command(
        "conformance",
        "simulated",
        "--only",
        "ordering.priorities,ordering.one_stream",
        "--json",
        DRIVETRAIN_SIMULATED="mutant=priority_crashes",
    )
    assert done.returncode == 1
    assert states(done)["ordering.priorities"] == "failed"
    assert "SIGABRT" in reasons(done)["ordering.priorities"]
    assert "stream_create" in reasons(done)["ordering.priorities"]  # where it was
    assert states(done)["ordering.one_stream"] == "passed"


@pytest.mark.soak
def test_a_hang_is_a_result_and_a_device_that_does_not_close_fails_the_check_before(
    command: Command,
) -> None:
    hung = command(
        "conformance",
        "simulated",
        "--only",
        "lifecycle.closes,timing.elapsed",
        "--json",
        DRIVETRAIN_SIMULATED="mutant=close_hangs",
    )
    assert "did not end within" in reasons(hung)["lifecycle.closes"]
    # Nothing was wrong with the check itself, but its device does not close after it.
    assert states(hung)["timing.elapsed"] == "failed"
    assert "closing the device failed" in reasons(hung)["timing.elapsed"]


def test_one_mutant_is_told_with_its_defect_and_check(command: Command) -> None:
    done = command("conformance", "--mutants", "--only", "uuid_shared", "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["mutants"]
    assert told["caught"]
    assert told["defect"] == "All devices have one uuid."
    assert told["checks"][0]["name"] == "discovery.facts"
    assert told["checks"][0]["control"] == "passed"


def test_ctrl_c_leaves_no_process_behind() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "drivetrain", "conformance", "cpu", "--only", "limits"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests themselves run in the background, Ctrl-C is ignored and inherited so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    children: list[psutil.Process] = []
    while not children and time.monotonic() < until:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []


# -- drivers of others ----------------------------------------------------------------------------

SOME = "discovery,memory,timing,errors.launches"


def test_a_driver_from_outside_passes_what_it_declares(acme: Path, command: Command) -> None:
    done = command("conformance", "acme", "--only", SOME, "--json")
    assert done.returncode == 0, [r for r in reasons(done).items() if r[1]]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["groups"] == ["pinned", "timing"]
    assert report["vendor"] == "acme"
    assert states(done)["memory.managed"] == "not declared"
    assert states(done)["errors.launches"] == "not declared"
    assert states(done)["memory.pinned"] == "passed"


def test_a_driver_that_is_not_trusted_is_not_run(acme: Path, command: Command) -> None:
    command("drivers", "untrust", "acme", check=True)
    done = command("conformance", "acme")
    assert done.returncode == 2
    assert "trust" in done.stderr


def test_a_driver_that_crashes_everywhere_fails_everywhere(acme: Path, command: Command) -> None:
    done = command("conformance", "crashing", "--only", "memory.fill_widths,memory.told", "--json")
    assert done.returncode == 1
    assert states(done) == {"memory.told": "passed", "memory.fill_widths": "failed"}
    assert "SIGABRT" in reasons(done)["memory.fill_widths"]


@pytest.mark.soak
def test_a_driver_that_opens_no_device_is_checked_as_far_as_it_goes(
    acme: Path, command: Command
) -> None:
    done = command("conformance", "torchy", "--only", "discovery,memory", "--json")
    assert done.returncode == 0, reasons(done)
    assert states(done)["discovery.probed"] == "passed"
    assert states(done)["memory.apart"] == "not declared"
