"""What the fake libraries promise the tests that stand on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKES = {"cuda": "fake_cuda.c", "hip": "fake_hip.c", "level_zero": "fake_ze.c"}
BEGIN = """
import ctypes, shutil, sys
from pathlib import Path
name, library, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
sys.path.insert(0, sys.argv[4])
import every_fault
from every_fault import VENDORS, Run
from fakes import Fake
from drivetrain.hal.kinds import Kind
"""


def ran(driver: str, path: Path, folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + text, driver, path, folder, Path(__file__).parent]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=110, check=False
    )


TOUCH = """
backend = Run(VENDORS[name], Fake(library), b"").open(0)
stream = backend.stream_create(0)
pinned = backend.alloc(64, Kind.PINNED, stream)
ctypes.memset(pinned, 1, 64)
print("pinned", flush=True)
ctypes.memset(backend.alloc(64, Kind.DEVICE, stream), 1, 64)
print("touched")
"""


@pytest.mark.parametrize("driver", sorted(FAKES))
def test_device_memory_cannot_be_touched_by_the_host(
    driver: str, fake_library: Any, tmp_path: Path
) -> None:
    """As on a discrete card; pinned memory is the control."""
    done = ran(driver, fake_library(FAKES[driver]), tmp_path, TOUCH)
    assert done.stdout == "pinned\n", done.stderr
    assert done.returncode < 0  # SIGSEGV


COPIES = """
held = []
for number in range(600):
    path = folder / f"{number}.so"
    shutil.copy(library, path)
    run = Run(VENDORS[name], Fake(path), b"")
    backend = run.open(0)
    backend.alloc(64, Kind.DEVICE, backend.stream_create(0))
    backend.close()
    path.unlink()
    if HOLD:
        held.append(run)
print("done")
"""


@pytest.mark.soak
@pytest.mark.parametrize("driver", sorted(FAKES))
def test_hundreds_of_copies_fit_into_a_process(
    driver: str, fake_library: Any, tmp_path: Path
) -> None:
    """Each has 256 GiB of addresses until nobody holds it. Held, they are too many, and say so."""
    path = fake_library(FAKES[driver])
    done = ran(driver, path, tmp_path, f"HOLD = False{COPIES}")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    done = ran(driver, path, tmp_path, f"HOLD = True{COPIES}")
    assert done.returncode < 0
    assert "no addresses left" in done.stderr
