"""The template in Python: it begins with Unsupported, and the page completes it step by step."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/write_a_driver.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
STEPS = {
    name: next(block for block in BLOCKS if block.startswith(f'"""Step {number}:'))
    for number, name in ((1, "memory"), (2, "streams"), (3, "kernels"))
}
(DECLARED,) = [block.strip() for block in BLOCKS if block.startswith("GROUPS = ")]


class Package:
    """The template, installed under its own name, in a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "site/minichip_drivetrain"
        shutil.copytree(
            ROOT / "examples/driver_template/python/minichip_drivetrain",
            self.folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        metadata = folder / "site/minichip_drivetrain-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: minichip\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(
            "[drivetrain.drivers]\nminichip = minichip_drivetrain:DRIVER\n"
        )
        paths = [str(folder / "site"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file changes within the second
        }
        assert self.run("drivers", "trust", "minichip").returncode == 0

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "drivetrain", *arguments]
        environment = self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def kit(self, *only: str) -> dict[str, Any]:
        arguments = [word for name in only for word in ("--only", name)]
        done = self.run("conformance", "minichip", "--json", *arguments)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def step(self, name: str) -> None:
        (self.folder / f"{name}.py").write_text(STEPS[name])

    def declare(self) -> None:
        path = self.folder / "__init__.py"
        text, count = re.subn(r"^GROUPS = .*$", DECLARED, path.read_text(), flags=re.MULTILINE)
        assert count == 1
        path.write_text(text)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


def states(report: dict[str, Any]) -> set[str]:
    return {result["state"] for result in report["results"]}


def test_it_begins_with_unsupported_and_the_page_completes_it(package: Package) -> None:
    begun = package.kit("copies")
    assert "passed" not in states(begun)
    reasons = [each["reason"] for each in begun["results"] if each["state"] == "skipped"]
    assert reasons
    assert all("minichip does not have this yet" in reason for reason in reasons)
    assert begun["passed"] is False
    package.step("memory")
    package.step("streams")
    assert package.kit("copies.round_trip")["passed"] is True
    package.step("kernels")
    package.declare()
    finished = package.kit("timing.elapsed", "kernels.integers")
    assert finished["passed"] is True, finished
    assert finished["evidence"] == "fake"


def test_nothing_of_the_start_is_more_than_unsupported() -> None:
    """The files that the steps replace promise nothing: each call raises it."""
    folder = ROOT / "examples/driver_template/python/minichip_drivetrain"
    for name in STEPS:
        text = (folder / f"{name}.py").read_text()
        calls = re.findall(r"^    def (\w+)", text, re.MULTILINE)
        silent = {"begin", "close"}
        raising = re.findall(r'raise unsupported\("(\w+)"\)', text)
        assert sorted(raising) == sorted(set(calls) - silent)


@pytest.mark.soak
def test_the_finished_template_passes_the_whole_kit(package: Package) -> None:
    for name in STEPS:
        package.step(name)
    package.declare()
    report = package.kit()
    assert report["passed"] is True, report["gaps"]
    assert report["driver"] == "minichip"
    assert {"system", "python", "drivetrain"} <= set(report["machine"])
    assert report["date"]
