"""Each example runs alone, as a plain script, and says how it went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOW = {"accumulation", "compile_amp", "ema_gan", "evaluation", "loader_workers", "plain"}
SCRIPTS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.soak] if path.stem in SLOW else [])
    for path in sorted(EXAMPLES.glob("*.py"))
]
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_runs_alone_and_leaves_no_file(script: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, **HIDDEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ":" in done.stdout.splitlines()[-1]
    assert "does not move" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_examples_are_short():
    for path in EXAMPLES.rglob("*.py"):
        if "driver_template" in path.parts:
            continue  # a package to begin with, not a script to read
        assert len(path.read_text().splitlines()) < 60, path
