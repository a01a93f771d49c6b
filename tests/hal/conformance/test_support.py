"""docs/support.md is what the reports and tests in docs/evidence give, and nothing more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal.conformance.report import Report, Result

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def support() -> Any:
    spec = importlib.util.spec_from_file_location("support_tool", ROOT / "tools" / "support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_tool"] = module
    spec.loader.exec_module(module)
    return module


def report(driver: str, evidence: str, **more: Any) -> Report:
    facts: dict[str, Any] = {
        "driver": driver,
        "device": f"{driver}:0",
        "name": "Chip",
        "vendor": "acme",
        "driver_version": "7",
        "api_version": 2,
        "groups": ("compute",),
        "evidence": evidence,
        "date": "2026-01-02",
        "seconds": 1.0,
        "whole": True,
        "long": False,
        "machine": {"system": "Linux", "python": "3.11"},
        "results": (
            Result("memory.apart", "passed", "", 0.1, "It holds."),
            Result("kernels.floats", "passed", "", 0.1, "It holds.", ("compute",)),
        ),
    }
    return Report(**{**facts, **more})


def row(page: str, driver: str) -> dict[str, str]:
    """The driver's line of the first table."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    titles = lines[0]
    found = next(line for line in lines if line[0] == driver)
    return dict(zip(titles, (cell.strip(" |") for cell in found), strict=False))


def test_the_page_is_what_the_evidence_gives(support: Any) -> None:
    made = support.page(support.reports(), support.claims())
    assert made == support.PAGE.read_text(), "run: python tools/support.py"


def test_every_report_that_is_kept_passed(support: Any) -> None:
    for kept in support.reports():
        assert kept.passed, kept.device


def test_kinds_of_evidence_stand_side_by_side(support: Any) -> None:
    claim = support.Claim("opencl", "compute", "fake", "order", "tests/x.py::test_x")
    page = support.page([report("opencl", "emulated"), report("opencl", "hardware")], [claim])
    assert row(page, "opencl")["compute"] == "hardware (2), emulated (1), fake (a)"
    assert row(page, "opencl")["core"] == "hardware (2), emulated (1)"


def test_a_failure_is_told_and_is_no_evidence(support: Any) -> None:
    failed = Result("kernels.floats", "failed", "wrong", 0.1, "It holds.", ("compute",))
    page = support.page([report("acme", "hardware", results=(failed,))], [])
    assert row(page, "acme")["compute"] == "**failed** (1)"


def test_a_simulated_device_or_a_part_of_the_checks_is_refused(
    support: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    for bad in (
        report("simulated", ""),
        report("simulated", "hardware"),
        report("cpu", "hardware", whole=False),
    ):
        path.write_text(json.dumps(bad.as_json()))
        with pytest.raises(BadInput):
            support.reports(tmp_path)
    path.write_text(json.dumps(report("cpu", "hardware").as_json()))
    assert [found.driver for found in support.reports(tmp_path)] == ["cpu"]


def test_a_claim_names_a_test_that_there_is_and_evidence_that_a_test_can_give(
    support: Any, tmp_path: Path
) -> None:
    good = {
        "driver": "acme",
        "capability": "compute",
        "evidence": "compiled",
        "what": "it is compiled",
        "test": "tests/hal/conformance/test_support.py::test_every_report_that_is_kept_passed",
    }
    path = tmp_path / "tests.json"
    path.write_text(json.dumps({"claims": [good]}))
    assert len(support.claims(tmp_path)) == 1
    for change in (
        {"test": "tests/hal/conformance/test_support.py::test_that_there_is_not"},
        {"test": "tests/nowhere.py::test_x"},
        {"evidence": "hardware"},
        {"capability": "flying"},
    ):
        path.write_text(json.dumps({"claims": [{**good, **change}]}))
        with pytest.raises(BadInput):
            support.claims(tmp_path)
