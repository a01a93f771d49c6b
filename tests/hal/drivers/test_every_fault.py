"""Every fault at every call of a scripted sequence, for each driver over its fake library.

`every_fault` is the proof, in a process of its own: whatever the vendor's library says, or when it
says nothing, that process lives and tells what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROOF = Path(__file__).with_name("every_fault.py")
FAKES = {"cuda": "fake_cuda.c", "hip": "fake_hip.c", "level_zero": "fake_ze.c"}
SEED = 20260
Proof = Callable[..., dict[str, Any]]


@pytest.fixture
def proof(fake_library: Any, fake_object: bytes, tmp_path: Path) -> Proof:
    code = tmp_path / "kernels"
    code.write_bytes(fake_object)

    def run(driver: str, *words: object, limit_s: float = 100) -> dict[str, Any]:
        library = fake_library(FAKES[driver])
        command = [sys.executable, PROOF, driver, library, code, "--seed", SEED, *words]
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


@pytest.mark.parametrize("driver", sorted(FAKES))
def test_faults_at_some_calls(proof: Proof, driver: str) -> None:
    """A sample; `make soak` takes all of them."""
    found = proof(driver, "--most", 250)
    assert found["wrong"] == []
    assert found["came"] > 150


@pytest.mark.parametrize("driver", sorted(FAKES))
def test_a_driver_that_takes_faults_wrong_is_told(proof: Proof, driver: str) -> None:
    """The control of both proofs: drivers that swallow a result, tell another code, raise another
    class, keep memory, or let one device wait for another one's call."""
    found = proof(driver, "--mutants")
    assert len(found) == 5
    assert [words for words, told in found.items() if not told] == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("driver", sorted(FAKES))
def test_every_fault_at_every_call(proof: Proof, driver: str) -> None:
    found = proof(driver, limit_s=3000)
    assert found["wrong"] == []
    assert found["tried"] == found["all"] > 800


PROBED = """
import json
from drivetrain import hal
from drivetrain.hal.probe import probe
devices = hal.devices("{driver}")
verdicts = probe(devices, limit_s=4)
print(json.dumps([[v.usable, v.reason] for v in verdicts.values()]))
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("driver", "fault"),
    [
        ("cuda", "FAKE_CUDA_FAULT=cuMemAllocAsync:0:hang"),
        ("hip", "FAKE_HIP_FAULT=hipMallocAsync:0:hang"),
        ("level_zero", "FAKE_ZE_FAULT=zeMemAllocDevice:0:hang"),
    ],
)
def test_a_library_that_hangs_in_the_probe_makes_a_device_unusable(
    fake_library: Any, driver: str, fault: str
) -> None:
    """The process that asked goes on; so does the list of devices."""
    variable, _, value = fault.partition("=")
    selected = f"DRIVETRAIN_{driver.upper()}_LIBRARY"
    done = subprocess.run(
        [sys.executable, "-c", PROBED.format(driver=driver)],
        env={
            **os.environ,
            variable: value,
            selected: str(fake_library(FAKES[driver])),
            "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert [usable for usable, _ in verdicts] == [False, False]
    assert all("4 s" in reason for _, reason in verdicts), verdicts
