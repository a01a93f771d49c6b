"""Scripts that register a device, each in a process of its own: there is no way back from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("torch")

HEAD = """
import copy, gc, io, os, sys, warnings
sys.path.insert(0, {folder!r})
import torch
from torch import nn
from chips import CHIPS, OpaqueChip, SharedChip, VisibleChip
from drivetrain.errors import BadInput, OutOfMemory, Unsupported
from drivetrain.pytorch.custom import Config, register_custom_device, registered
torch.set_num_threads(1)
F = nn.functional
SHIM = {shim!r}

def raises(kind, text, act):
    try:
        act()
    except kind as error:
        assert text in str(error), str(error)
        return error
    raise AssertionError(f"no {{kind.__name__}} ({{text}})")

def register(memory="shared", count=1, **more):
    chip = CHIPS[memory]("npu", count=count)
    return register_custom_device(chip, Config(**{{"fallback": "allow", "shim": SHIM, **more}}))
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder (``DRIVETRAIN_CACHE``) with the C++ shim, built once in a session: all workers
    of one session share it, and the first of them builds."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler is installed")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "with-shim"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "drivetrain.pytorch.custom.shim"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DRIVETRAIN_CACHE": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def with_shim(run: Callable[..., str], built: Path) -> Callable[..., str]:
    """`run` with the shim that is built."""
    return partial(run, shim="require", DRIVETRAIN_CACHE=str(built))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run a script after the head above; what it printed. It must end with 0, or as ``rc`` says."""

    def run(code: str, rc: int = 0, shim: str = "off", **environment: str) -> str:
        head = HEAD.format(folder=str(Path(__file__).parent), shim=shim)
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", head + dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            timeout=1100,  # pytest ends a test before that
            cwd=tmp_path,
            env={**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home"), **environment},
        )
        assert done.returncode == rc, done.stderr[-4000:]
        return done.stdout

    return run
