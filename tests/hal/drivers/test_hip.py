"""The hip driver as a whole: another library that is selected, and cards in the kernel's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.drivers import hip

# -- the driver as a whole, in processes of its own ------------------------------------------------

WHOLE = """
import json, sys, time
from drivetrain import hal
began = time.monotonic()
state = hal.drivers()["hip"]
devices = hal.devices("hip")
out = dict(state=state.state, reason=state.reason, seconds=time.monotonic() - began,
           devices=[[d.address, d.uuid, d.name, d.vendor, d.info.pci, d.info.memory_bytes,
                     d.info.driver_version, d.capabilities.compute, d.capabilities.multiprocessors,
                     list(d.capabilities.features)] for d in devices],
           others=sorted(n for n, d in hal.drivers().items() if d.state == "usable"))
if "probe" in sys.argv:
    from drivetrain.hal.probe import probe
    verdict = probe(list(devices))
    out["verdicts"] = [[v.usable, v.reason] for v in verdict.values()]
if "kernel" in sys.argv:
    from drivetrain.hal.conformance.running import evidence_of
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
print(json.dumps(out))
"""


def whole(path: Path | str, *words: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, *words],
        env={
            **os.environ,
            "DRIVETRAIN_HIP_LIBRARY": str(path),
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
    """CUDA C goes to its own hiprtc; what it shows is called a fake."""
    found = whole(fake_library("fake_hip.c"), "probe", "kernel")
    assert found["state"] == "usable"
    facts = ["amd", "", 1 << 30, "HIP 7.1.25424", "gfx90a:sramecc+:xnack-", 104, ["wave64", "fake"]]
    assert found["devices"] == [
        [f"hip:{n}", f"GPU-fa4e{n:012x}", f"Fake Instinct {n}", *facts] for n in range(2)
    ]
    assert found["verdicts"] == [[True, ""]] * 2
    assert found["twice"] == [10] * 4
    assert found["evidence"] == "fake"


@pytest.mark.parametrize(
    ("symbol", "what", "state"),
    [
        ("hipInit", "hang", "broken"),
        ("hipGetDeviceCount", "999", "broken"),
        ("hipInit", "100", "absent"),
    ],
)
def test_a_library_that_hangs_or_fails_leaves_the_other_drivers(
    fake_library: Any, symbol: str, what: str, state: str
) -> None:
    found = whole(
        fake_library("fake_hip.c"),
        FAKE_HIP_FAULT=f"{symbol}:1:{what}",
        DRIVETRAIN_DISCOVERY_LIMIT_S="2",
    )
    assert found["state"] == state, found
    assert found["reason"]
    assert found["devices"] == []
    assert "cpu" in found["others"]


def test_a_probe_that_fails_says_so(fake_library: Any) -> None:
    found = whole(fake_library("fake_hip.c"), "probe", FAKE_HIP_FAULT="hipMallocAsync:0:719")
    assert [usable for usable, _ in found["verdicts"]] == [False, False]
    assert "hipMallocAsync" in found["verdicts"][0][1]


def test_a_library_that_is_too_old_or_not_there_is_said(fake_library: Any) -> None:
    found = whole(fake_library("fake_hip.c", without=["hipMemsetD8Async"]))
    assert found["state"] == "broken"
    assert "hipMemsetD8Async" in found["reason"]
    found = whole("/nowhere/libamdhip64.so")
    assert found["state"] == "absent"
    assert "DRIVETRAIN_HIP_LIBRARY=/nowhere/libamdhip64.so names no file" in found["reason"]


# -- the kernel's files ----------------------------------------------------------------------------


def machine(root: Path, *, ids: tuple[int, ...] = (0x1234567890ABCDEF, 0)) -> Path:
    """Two cards as amdgpu shows them, behind a processor."""
    nodes = root / hip.NODES
    (nodes / "0").mkdir(parents=True)
    (nodes / "0/properties").write_text("cpu_cores_count 64\nsimd_count 0\n")
    for number, unique in enumerate(ids):
        folder = nodes / str(number + 1)
        (folder / "mem_banks/0").mkdir(parents=True)
        (folder / "mem_banks/0/properties").write_text("heap_type 1\nsize_in_bytes 68702699520\n")
        (folder / "properties").write_text(
            f"simd_count 440\nsimd_per_cu 4\nwave_front_size 64\ngfx_target_version 90010\n"
            f"location_id {0xC100 + 0x200 * number}\ndomain 0\nunique_id {unique}\n"
            "max_engine_clk_fcompute 1700\nvendor_id 4098\n"
        )
        card = root / f"sys/bus/pci/devices/0000:{0xC1 + 2 * number:02x}:00.0"
        card.mkdir(parents=True)
        (card / "product_name").write_text("AMD Instinct MI210\n")
        (card / "numa_node").write_text("1\n")
        (card / "vendor").write_text("0x1002\n")
        (card / "class").write_text("0x038000\n")
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    (root / "opt/rocm/lib").mkdir(parents=True)
    (root / "opt/rocm/lib/libamdhip64.so.6").touch()
    (root / "sys/module/amdgpu").mkdir(parents=True)
    (root / "sys/module/amdgpu/version").write_text("6.7.0\n")
    return root


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES",
        "DRIVETRAIN_HIP_LIBRARY",
        "ROCM_PATH",
        "LD_LIBRARY_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "root"


def test_cards_are_listed_from_the_kernels_files(files: Path) -> None:
    machine(files)
    assert hip.absent(files) == ""
    one, two = hip.discover(files)
    assert (one.uuid, two.uuid) == ("GPU-1234567890abcdef", "PCI-0000:c3:00.0")
    assert (one.name, one.pci, one.memory_bytes) == (
        "AMD Instinct MI210",
        "0000:c1:00.0",
        68702699520,
    )
    assert (one.numa_node, one.driver_version) == (1, "amdgpu 6.7.0")
    assert one.capabilities.compute == "gfx90a"
    assert (one.capabilities.multiprocessors, one.capabilities.clock_mhz) == (110, 1700)
    assert one.capabilities.features == ("wave64",)
    environment = one.isolation.environment
    assert environment["ROCR_VISIBLE_DEVICES"] == one.uuid
    assert environment["HIP_VISIBLE_DEVICES"] == "0"
    assert environment["ZE_AFFINITY_MASK"]
    assert two.isolation.environment["ROCR_VISIBLE_DEVICES"] == "1"  # it has no number of its own


@pytest.mark.parametrize(
    ("variables", "left"),
    [
        ({"ROCR_VISIBLE_DEVICES": "1"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, [1, 0]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_what_rocms_variables_hide_is_not_listed(
    files: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], left: list[int]
) -> None:
    machine(files)
    both = [device.uuid for device in hip.discover(files)]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if left:
        assert [device.uuid for device in hip.discover(files)] == [both[n] for n in left]
    else:
        with pytest.raises(DriverMissing, match="hides every one of the 2"):
            hip.discover(files)


def test_why_there_is_no_gpu_is_told_apart(files: Path) -> None:
    files.mkdir()
    assert "no ROCm" in hip.absent(files)
    (files / "usr/lib").mkdir(parents=True)
    (files / "usr/lib/libamdhip64.so.5").touch()
    assert "libamdhip64 is installed, but there is no AMD GPU" in hip.absent(files)
    card = files / "sys/bus/pci/devices/0000:03:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "class").write_text("0x030000\n")
    assert "amdgpu) is not loaded" in hip.absent(files)


def test_a_kernel_driver_without_rocm_is_broken(files: Path) -> None:
    machine(files)
    (files / "opt/rocm/lib/libamdhip64.so.6").unlink()
    with pytest.raises(HalError, match="install ROCm") as caught:
        hip.discover(files)
    assert not isinstance(caught.value, DriverMissing)
