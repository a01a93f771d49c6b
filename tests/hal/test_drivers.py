"""The cpu and cuda drivers against machines made of files and of a fake NVML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, DriverMissing, HalError
from drivetrain.hal import cgroup, registry
from drivetrain.hal.drivers import cpu, cuda
from drivetrain.hal.telemetry import host, nvml

# --- control groups ------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = {
    "proc/self/cgroup": "0::/box/job",
    "proc/self/mountinfo": "30 20 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
}
V1 = {
    "proc/self/cgroup": "4:memory:/box/job\n1:cpu,cpuacct:/box/job\n0::/",
    "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
}


def test_v2_the_least_limit_of_the_chain_holds_and_cache_does_not_count(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/box"
    root = write(
        tmp_path,
        {
            **V2,
            f"{group}/memory.max": "1000000",
            f"{group}/memory.current": "600000",
            f"{group}/memory.stat": "anon 1\ninactive_file 100000",
            f"{group}/job/memory.max": "max",
            f"{group}/job/cpu.max": "150000 100000",
            f"{group}/cpu.max": "max 100000",
        },
    )
    assert cgroup.memory(root) == cgroup.MemoryGroup(1000000, 500000)
    assert cgroup.cpu_quota(root) == 1.5


def test_v1_limits_are_read_beside_an_empty_v2_hierarchy(tmp_path: Path) -> None:
    memory, quota = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu/box/job"
    root = write(
        tmp_path,
        {
            **V1,
            f"{memory}/memory.limit_in_bytes": "9223372036854771712",
            f"{memory}/box/job/memory.limit_in_bytes": "5000",
            f"{memory}/box/job/memory.usage_in_bytes": "4000",
            f"{memory}/box/job/memory.stat": "total_inactive_file 500",
            f"{quota}/cpu.cfs_quota_us": "300000",
            f"{quota}/cpu.cfs_period_us": "100000",
        },
    )
    assert cgroup.memory(root) == cgroup.MemoryGroup(5000, 3500)
    assert cgroup.cpu_quota(root) == 3.0


def test_in_a_container_whose_group_path_is_the_hosts_the_mount_counts(tmp_path: Path) -> None:
    root = write(tmp_path, {**V2, "sys/fs/cgroup/memory.max": "7000"})
    assert cgroup.memory(root).limit_bytes == 7000


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup.memory(tmp_path) == cgroup.MemoryGroup(None, None)
    assert cgroup.cpu_quota(tmp_path) is None


@pytest.mark.parametrize("text", ["", "max", "lots", "9223372036854771712"])
def test_what_is_no_limit_is_none(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, {**V2, "sys/fs/cgroup/box/job/memory.max": text})
    assert cgroup.memory(root).limit_bytes is None


@pytest.mark.parametrize(
    ("limit", "used", "total", "free"),
    [
        (None, None, 100, 60),  # the machine's own
        (50, 10, 50, 40),  # a smaller limit
        (80, 10, 80, 60),  # a limit that others have used up already
        (400, 10, 400, 360),  # a machine that grows towards its limit
    ],
)
def test_host_memory_is_that_of_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, used: int | None, total: int, free: int
) -> None:
    system = SimpleNamespace(total=100, available=60)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: system)
    monkeypatch.setattr(cgroup, "memory", lambda root: cgroup.MemoryGroup(limit, used))
    found = host.memory()
    assert (found.total_bytes, found.free_bytes, found.used_bytes) == (total, free, total - free)


# --- cpu -----------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_core_lists_survive_writing_and_reading(cores: set[int]) -> None:
    assert cpu.cores_of(cpu.text_of(cores)) == tuple(sorted(cores))


@given(st.integers(1, 64), st.integers(1, 64), st.one_of(st.none(), st.floats(0.2, 80)))
def test_partitions_are_equal_disjoint_and_allowed(
    cores: int, parts: int, quota: float | None
) -> None:
    allowed = tuple(range(3, 3 + cores))
    if parts > cpu.usable_cores(allowed, quota):
        with pytest.raises(BadInput, match="there are only"):
            cpu.partitions(allowed, quota, str(parts))
        return
    found = cpu.partitions(allowed, quota, str(parts))
    assert len(found) == parts
    assert len({len(part) for part in found}) == 1
    assert len(set().union(*found)) == sum(len(part) for part in found)
    assert set().union(*found) <= set(allowed)
    assert len(found[0]) == cores // parts


def test_hyperthreads_of_one_core_stay_in_one_partition(tmp_path: Path) -> None:
    files = {}
    for core in range(8):  # as Intel numbers them: 0 and 4 are one core
        folder = f"sys/devices/system/cpu/cpu{core}/topology"
        files[f"{folder}/physical_package_id"] = "0"
        files[f"{folder}/core_id"] = str(core % 4)
    root = write(tmp_path, files)
    assert cpu.partitions(range(8), None, "2", root) == [(0, 1, 4, 5), (2, 3, 6, 7)]


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "1.5", " ", "²"])
def test_what_is_no_number_of_parts_is_bad_input(wanted: str) -> None:
    with pytest.raises(BadInput, match="DRIVETRAIN_CPU_PARTITIONS"):
        cpu.partitions((0, 1), None, wanted)


def test_more_parts_than_cores_is_bad_input_for_whoever_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "4096")
    with pytest.raises(BadInput, match="there are only"):
        hal.devices()


def test_numa_nodes_outside_the_affinity_are_left_out(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/devices/system/node/node0/cpulist": "0-3",
            "sys/devices/system/node/node1/cpulist": "4-7",
            "sys/devices/system/node/node2/cpulist": "",
        },
    )
    assert cpu.numa_nodes((1, 2, 5), root) == [(0, (1, 2)), (1, (5,))]
    assert cpu.numa_nodes((1, 2), root) == [(0, (1, 2))]
    assert cpu.numa_nodes((1, 9), root) == [(0, (1, 9))], "a core that no node knows"


def test_partitions_share_one_memory_and_isolate_their_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be parted")
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "2")
    first, second = hal.devices("cpu")
    assert first.memory_domain == second.memory_domain == "host"
    assert first.uuid != second.uuid
    one, two = first.isolation(), second.isolation()
    assert one.cpus
    assert two.cpus
    assert not set(one.cpus) & set(two.cpus)
    assert one.torch_device == "cpu"
    assert one.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert one.environment["OMP_NUM_THREADS"] == one.environment["MKL_NUM_THREADS"]
    assert int(one.environment["OMP_NUM_THREADS"]) == one.threads == two.threads
    # A worker inherits the variable and must not be parted again.
    assert one.environment["DRIVETRAIN_CPU_PARTITIONS"] == "1"


def test_the_cpu_tells_what_it_is() -> None:
    device = hal.device("cpu:0")
    assert device.name
    assert device.capabilities.cores == len(os.sched_getaffinity(0)) or len(hal.devices("cpu")) > 1
    assert device.capabilities.compute
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes == device.info.memory_bytes
    now = device.telemetry()
    assert now.utilisation is not None
    assert 0 <= now.utilisation <= 1


# --- cuda ----------------------------------------------------------------------------------------

GPUS = [
    cuda.Gpu("GPU-aaaa-1"),
    cuda.Gpu("GPU-aabb-2"),
    cuda.Gpu("GPU-cccc-3", ("MIG-3a", "MIG-3b"), True),
]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["GPU-aaaa-1", "GPU-aabb-2", "MIG-3a", "MIG-3b"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["GPU-aabb-2"]),
        ("1, 0", ["GPU-aabb-2", "GPU-aaaa-1"]),
        ("0,-1,1", ["GPU-aaaa-1"]),
        ("0,9,1", ["GPU-aaaa-1"]),
        ("0,0", []),
        ("2", ["MIG-3a"]),
        ("GPU-aabb-2", ["GPU-aabb-2"]),
        ("GPU-aab", ["GPU-aabb-2"]),
        ("GPU-aa", []),
        ("GPU-c", ["MIG-3a"]),
        ("MIG-3b", ["MIG-3b"]),
        ("MIG-3", []),
        ("MIG-3b,MIG-3a", ["MIG-3b", "MIG-3a"]),
        ("GPU-zz,0", []),
    ],
)
def test_an_inherited_visible_devices_is_read_as_cuda_reads_it(
    value: str | None, expected: list[str]
) -> None:
    assert cuda.visible(value, GPUS) == expected


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml:
    """Three GPUs: two linked, one with MIG; ``lost`` names indices that fell off the bus."""

    NVMLError = FakeError
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_RESET_REQUIRED = 16
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0
    NVML_CLOCK_MEM = 2
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    def __init__(self, lost: tuple[int, ...] = (), init_error: int = 0) -> None:
        self.lost, self.init_error = lost, init_error

    def nvmlInit(self) -> None:
        if self.init_error:
            raise FakeError(self.init_error)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def absent(*_: object) -> Any:
            raise FakeError(3)  # NVML_ERROR_NOT_SUPPORTED

        return absent

    def nvmlSystemGetDriverVersion(self) -> str:
        return "999.1"

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index in self.lost:
            raise FakeError(self.NVML_ERROR_GPU_IS_LOST)
        return f"GPU-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA Fake"

    def nvmlDeviceGetPciInfo(self, handle: str) -> Any:
        return SimpleNamespace(busId=f"00000000:0{handle[-1]}:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=1000, free=900, used=50)

    def nvmlDeviceGetMigMode(self, handle: str) -> Any:
        return (1, 1) if handle == "GPU-2" else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, slot: int) -> str:
        if slot > 1:
            raise FakeError(6)  # NVML_ERROR_NOT_FOUND
        return f"MIG-{slot}"

    def nvmlDeviceGetAttributes_v2(self, handle: str) -> Any:
        return SimpleNamespace(multiprocessorCount=16)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetNumGpuCores(self, handle: str) -> int:
        return 16896

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:
        return 1 if link < 4 else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: str, link: int) -> Any:
        return SimpleNamespace(busId="00000000:AA:00.0" if link else "FFFFFFFF:FF:FF.0")

    def nvmlDeviceGetP2PStatus(self, one: str, two: str, index: int) -> int:
        return 0 if {one, two} == {"GPU-0", "GPU-1"} else 5

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 123456

    def nvmlDeviceGetRemappedRows(self, handle: str) -> Any:
        return (0, 0, handle == "GPU-1", 0)


@pytest.fixture
def nvml_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**how: Any) -> None:
        monkeypatch.setattr(nvml, "_initialised_in", None)
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**how))  # type: ignore[arg-type]

    return install


def test_cuda_devices_come_with_their_facts_and_absent_sensors_are_none(nvml_of: Any) -> None:
    nvml_of()
    found = cuda.discover()
    assert [info.uuid for info in found] == ["GPU-0", "GPU-1", "MIG-0", "MIG-1"]
    first, second, mig, _ = found
    assert first.pci == "00000000:00:00.0"
    assert first.driver_version == "999.1"
    assert first.memory_bytes == 1000
    able = first.capabilities
    assert (able.compute, able.multiprocessors, able.nvlinks) == ("9.0", 132, 4)
    assert able.peers == ("00000000:aa:00.0",), "an address that the machine hides is left out"
    assert able.peer_uuids == ("GPU-1",)
    now = first.telemetry
    assert (now.memory_used_bytes, now.power_w) == (100, 123.456)
    assert now.throttle == ("power_cap", "hw_thermal")
    assert now.utilisation is None
    assert now.temperature_c is None
    assert now.health == "ok"
    assert second.telemetry.health.startswith("degraded: memory rows")
    assert (mig.parent_uuid, mig.capabilities.multiprocessors) == ("GPU-2", 16)
    assert mig.capabilities.features == ("mig",)


def test_a_cuda_worker_sees_its_device_by_uuid_and_no_other(nvml_of: Any) -> None:
    nvml_of()
    for info in cuda.discover():
        assert info.isolation.environment["CUDA_VISIBLE_DEVICES"] == info.uuid
        assert info.isolation.environment["HIP_VISIBLE_DEVICES"] == "-1"
        assert info.isolation.torch_device == "cuda:0"
        assert info.isolation.threads >= 1


def test_a_gpu_that_fell_off_the_bus_is_listed_with_the_reason_and_the_others_work(
    nvml_of: Any,
) -> None:
    nvml_of(lost=(0,))
    found = cuda.discover()
    assert [bool(info.fault) for info in found] == [True, False, False, False]
    assert "lost until it is reset" in found[0].fault


@pytest.mark.parametrize("value", ["", "-1", "GPU-none"])
def test_when_visible_devices_hides_all_the_driver_is_absent_and_says_so(
    nvml_of: Any, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    nvml_of()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(DriverMissing, match="CUDA_VISIBLE_DEVICES"):
        cuda.discover()


def test_a_library_without_its_kernel_driver_is_broken_and_a_missing_one_absent(
    nvml_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml_of(init_error=FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with pytest.raises(HalError, match="kernel driver is not loaded") as broken:
        cuda.discover()
    assert not isinstance(broken.value, DriverMissing)
    nvml_of(init_error=FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(cuda, "_kernel_driver_is_here", lambda root: False)
    with pytest.raises(DriverMissing):
        cuda.discover()
    monkeypatch.setattr(cuda, "_kernel_driver_is_here", lambda root: True)
    with pytest.raises(HalError, match="kernel driver is loaded, but") as broken:
        cuda.discover()
    assert not isinstance(broken.value, DriverMissing)


def test_telemetry_of_a_lost_gpu_is_a_reading_and_no_error(nvml_of: Any) -> None:
    nvml_of()
    sys.modules["pynvml"].nvmlDeviceGetMemoryInfo = _lost  # type: ignore[attr-defined]
    assert nvml.telemetry("GPU-0").health.startswith("lost: ")


def _lost(*_: object) -> None:
    raise FakeError(FakeNvml.NVML_ERROR_GPU_IS_LOST)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no NVIDIA driver"),
        ({"usr/lib64/libnvidia-ml.so.1": ""}, "there is no NVIDIA device"),
        ({"etc/ld.so.cache": "..libnvidia-ml.so.1.."}, "there is no NVIDIA device"),
        (
            {
                "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de",
                "sys/bus/pci/devices/0000:01:00.0/class": "0x030200",
            },
            "on the PCI bus, but no NVIDIA driver is installed",
        ),
        ({"dev/nvidiactl": ""}, ""),
        ({"dev/nvidia0": ""}, ""),
        ({"dev/dxg": "", "usr/lib/wsl/lib/libnvidia-ml.so.1": ""}, ""),
    ],
)
def test_absence_of_nvidia_is_seen_from_files_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    reason = cuda.absent(write(tmp_path / "machine", files))
    assert (expected in reason) if expected else reason == ""


def test_a_driver_that_hangs_in_telemetry_is_told_and_holds_nobody_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading
    import time
    from dataclasses import replace

    release = threading.Event()
    monkeypatch.setattr(registry, "TELEMETRY_LIMIT_S", 0.1)
    real = cpu.DRIVER

    def hanging(info: Any) -> Any:
        release.wait(30)
        return host.Telemetry()

    device = hal.device("cpu:0")
    stuck = replace(real, in_process=False, telemetry=hanging)
    monkeypatch.setattr(registry.loading, "built_in", lambda name: stuck)
    assert device.telemetry().health.startswith("unknown: driver cpu did not answer")
    started = time.monotonic()
    assert device.telemetry().health.startswith("unknown")
    assert time.monotonic() - started < 0.09, "the second question does not wait"
    release.set()
