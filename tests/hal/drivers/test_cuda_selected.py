"""The cuda driver as a whole over another libcuda that a variable selects, in its own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WHOLE = """
import json, os, sys
from drivetrain import hal
from drivetrain.hal import registry
from drivetrain.hal.conformance.running import evidence_of
def is_loaded():
    return os.environ["DRIVETRAIN_CUDA_LIBRARY"] in open("/proc/self/maps").read()
state = hal.drivers()["cuda"]
devices = hal.devices("cuda")
out = dict(state=state.state, reason=state.reason,
           devices=[[d.address, d.uuid, d.name, d.vendor, d.info.pci, d.info.memory_bytes,
                     d.info.driver_version, d.capabilities.compute, d.capabilities.multiprocessors,
                     list(d.capabilities.features)] for d in devices],
           loaded=[is_loaded()],
           others=sorted(n for n, d in hal.drivers().items() if d.state == "usable"))
if "probe" in sys.argv:
    from drivetrain.hal.probe import probe
    out["verdicts"] = [[v.usable, v.reason] for v in probe(list(devices)).values()]
    out["memory"] = registry.telemetry(devices[0]).memory_total_bytes
if "kernel" in sys.argv:
    device = devices[0]
    source = 'extern "C" __global__ void twice(int *p) { p[threadIdx.x] *= 2; }'
    stream = device.stream()
    buffer = device.alloc(16, stream=stream)
    buffer.copy_from((5).to_bytes(4, "little") * 4, stream=stream)
    device.compile(hal.Source.cuda(source)).kernel("twice", [hal.PTR])(stream, 1, 4, buffer)
    back = bytearray(16)
    buffer.copy_to(back, stream=stream)
    stream.synchronize()
    out["twice"], out["evidence"] = list(memoryview(back).cast("i")), evidence_of(device)
    out["loaded"].append(is_loaded())
print(json.dumps(out))
"""


def whole(path: Path | str, *words: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, *words],
        env={
            **os.environ,
            "DRIVETRAIN_CUDA_LIBRARY": str(path),
            "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_another_library_is_selected_listed_probed_and_used(fake_library: Any) -> None:
    """CUDA C goes to its own NVRTC; what it shows is called a fake."""
    found = whole(fake_library("fake_cuda.c"), "probe", "kernel")
    assert found["state"] == "usable"
    facts = ["nvidia", "", 1 << 30, "CUDA 13.0", "9.0", 132, ["fake"]]
    uuid = "GPU-00112233-4455-6677-8899-aabbccddee"
    assert found["devices"] == [
        [f"cuda:{n}", f"{uuid}{n:02}", f"Fake Hopper {n}", *facts] for n in range(2)
    ]
    assert found["loaded"] == [False, True]  # listing does not load it here; opening does
    assert found["verdicts"] == [[True, ""]] * 2
    assert found["memory"] == 1 << 30
    assert found["twice"] == [10] * 4
    assert found["evidence"] == "fake"


@pytest.mark.parametrize(
    ("symbol", "what", "state"),
    [
        ("cuInit", "hang", "broken"),
        ("cuDeviceGetCount", "999", "broken"),
        ("cuDeviceGetUuid_v2", "999", "broken"),
        ("cuInit", "100", "absent"),
    ],
)
def test_a_library_that_hangs_or_fails_leaves_the_other_drivers(
    fake_library: Any, symbol: str, what: str, state: str
) -> None:
    found = whole(
        fake_library("fake_cuda.c"),
        FAKE_CUDA_FAULT=f"{symbol}:1:{what}",
        DRIVETRAIN_DISCOVERY_LIMIT_S="2",
    )
    assert found["state"] == state, found
    assert symbol in found["reason"] or what == "hang"
    assert found["devices"] == []
    assert "cpu" in found["others"]


def test_what_cuda_hides_is_not_listed(fake_library: Any) -> None:
    path, uuid = fake_library("fake_cuda.c"), "GPU-00112233-4455-6677-8899-aabbccddee01"
    found = whole(path, CUDA_VISIBLE_DEVICES=uuid)
    assert [device[:2] for device in found["devices"]] == [["cuda:0", uuid]]
    assert whole(path, CUDA_VISIBLE_DEVICES="-1")["state"] == "absent"


def test_a_library_that_is_too_old_or_not_there_is_said(fake_library: Any) -> None:
    found = whole(fake_library("fake_cuda.c", without=["cuMemsetD8Async"]))
    assert found["state"] == "broken"
    assert "cuMemsetD8Async" in found["reason"]
    found = whole("/nowhere/libcuda.so")
    assert found["state"] == "absent"
    assert "DRIVETRAIN_CUDA_LIBRARY=/nowhere/libcuda.so names no file" in found["reason"]
