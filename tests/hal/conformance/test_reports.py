"""What a report calls passed, and that it survives being written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal.conformance.report import Report, Result, from_json, read


def result(name: str, state: str, *needs: str, optional: str = "") -> Result:
    return Result(name, state, "why" * (state != "passed"), 0.1, "It holds.", needs, optional)


def report(*results: Result, groups: tuple[str, ...] = ("compute", "timing")) -> Report:
    return Report(
        driver="acme",
        device="acme:0",
        name="Acme One",
        vendor="acme",
        driver_version="7",
        api_version=2,
        groups=groups,
        evidence="hardware",
        date="2026-01-02",
        seconds=1.5,
        whole=True,
        long=False,
        machine={"system": "Linux"},
        results=results,
    )


GOOD = (
    result("discovery.facts", "passed", "no open device"),
    result("memory.apart", "passed"),
    result("kernels.floats", "passed", "compute"),
    result("timing.elapsed", "passed", "timing"),
)


def test_passed_is_what_has_no_failure_and_no_gap() -> None:
    found = report(*GOOD, result("peer.copy", "not here", "two devices"))
    assert found.passed
    assert found.gaps == ()
    assert [found.shown(g) for g in ("discovery", "core", "compute", "timing", "peer")] == [
        "passed",
        "passed",
        "passed",
        "passed",
        "not declared",
    ]


def test_one_failure_fails_its_group_and_the_whole() -> None:
    found = report(*GOOD, result("kernels.null", "failed", "compute"))
    assert not found.passed
    assert found.shown("compute") == "failed"
    assert found.shown("core") == "passed"


def test_what_is_declared_and_was_skipped_is_a_gap() -> None:
    found = report(*GOOD[:2], result("kernels.floats", "skipped", "compute"), GOOD[3])
    assert not found.passed
    assert found.gaps == ("kernels.floats: why",)
    assert found.shown("compute") == "skipped"


def test_what_a_device_may_lack_is_no_gap() -> None:
    lacks = result("kernels.doubles", "skipped", "compute", optional="double precision")
    assert report(*GOOD, lacks).passed


def test_a_declared_group_that_the_kit_has_no_check_for_is_a_gap() -> None:
    found = report(*GOOD, groups=("compute", "ipc", "timing"))
    assert found.gaps == ("group ipc: the kit has no check for it",)
    assert not found.passed
    assert replace(found, whole=False).gaps == ()  # some checks were asked for


def test_nothing_shown_is_not_passed() -> None:
    assert not report(result("memory.apart", "not declared"), groups=()).passed


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    found = report(*GOOD)
    path.write_text(json.dumps(found.as_json()))
    assert read(path) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": 99}', '{"form": 1, "results": []}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(BadInput):
        read(path)
    with pytest.raises(BadInput):
        from_json(None)
