"""A program that only imports torch gets a device of the HAL, where a variable says so."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import torch
name = torch._C._get_privateuse1_backend_name()
if name != "privateuseone":
    x = torch.arange(4.0, device=name)
    assert (x + x).cpu().tolist() == [0, 2, 4, 6]
print(name)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the entry points that the project declares, as an installer writes them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (lines,) = [f"{k} = {v}" for k, v in declared["torch.backends"].items()]
    metadata = tmp_path / "site/autoloaded-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: autoloaded\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{lines}\n")
    return metadata.parent


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"DRIVETRAIN_AUTOLOAD": "simulated:0"}, "simulated"),
        ({}, "privateuseone"),
        pytest.param(
            {"DRIVETRAIN_AUTOLOAD": "simulated:0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "privateuseone",
            marks=pytest.mark.soak,
        ),
        pytest.param({"DRIVETRAIN_AUTOLOAD": "simulated:7"}, "", marks=pytest.mark.soak),
    ],
)
def test_importing_torch_registers_only_the_device_that_the_variable_names(
    installed: Path, tmp_path: Path, environment: dict[str, str], printed: str
) -> None:
    paths = [str(installed), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DRIVETRAIN_HOME": str(tmp_path / "home"),
        "DRIVETRAIN_SIMULATED": "count=1 memory=64M",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stdout.strip() == printed, done.stderr
    if not printed:
        assert "there is no device 'simulated:7'" in done.stderr
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stderr
