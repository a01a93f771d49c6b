"""The code on the page runs, and the command does what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drivetrain.cli import optimize as command
from drivetrain.errors import BadInput

ROOT = Path(__file__).resolve().parents[3]
MODELS = """
import torch
from torch import nn

torch.set_num_threads(1)

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(4, 8)

def nothing():
    return None
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "DRIVETRAIN_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_code_on_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/optimize.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = run(tmp_path, "page.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept: " in done.stdout


@pytest.mark.soak
def test_the_command_prints_the_report_and_remembers_the_plan(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    words = ["-m", "drivetrain", "optimize", "models.py:small", "--on", "cpu:0"]
    words += ["--skip", "compile-*"]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "channels-last" in done.stdout
    assert "the model has no 2-D convolution" in " ".join(done.stdout.split())
    again = run(tmp_path, *words, "--json")
    found = json.loads(again.stdout)
    assert found["cached"] is True
    assert found["device"] == "cpu"
    assert {trial["verdict"] for trial in found["trials"]} >= {"not tried"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("models.py", "is no MODULE:FACTORY"),
        ("nowhere.py:f", "there is no file"),
        ("no_such_module_here:f", "cannot be imported"),
        ("models.py:large", "there are: small, nothing"),
        ("models.py:nothing", r"must return \(model, example inputs\)"),
    ],
)
def test_a_wrong_factory_is_refused_with_what_to_do(
    target: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    with pytest.raises(BadInput, match=says):
        command._made(target)
    sys.modules.pop("models", None)
