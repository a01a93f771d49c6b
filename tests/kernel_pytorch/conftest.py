"""Scripts against the published API, each in a process and with a state folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

LIMIT = pytest.mark.timeout(300)
"""For each module here: its scripts compile and start torch, which a busy machine does slowly."""

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One folder of compiled kernels for all tests here: compiling is most of their time."""
    return {"DRIVETRAIN_CACHE": str(tmp_path_factory.mktemp("kernels"))}


@pytest.fixture
def script(tmp_path: Path, kernels: dict[str, str]) -> Script:
    """Runs a text as ``script.py``; ``check=False`` for one that must fail."""

    def run(
        text: str, *args: str, check: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        done = subprocess.run(
            [sys.executable, str(path), *args],
            cwd=tmp_path,
            env={
                **os.environ,
                **kernels,
                "DRIVETRAIN_HOME": str(tmp_path / "home"),
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
