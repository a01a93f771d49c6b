"""NVIDIA GPUs, found through NVML. Only the probe, in a process of its own, and `open_device`
initialise CUDA; so does listing with a library that ``DRIVETRAIN_CUDA_LIBRARY`` names, in the child
that lists."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from drivetrain.errors import DeviceLost, DriverMissing, HalError, Timeout
from drivetrain.hal.driver import (
    Backend,
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    Kind,
    Way,
    hidden_from_all,
)
from drivetrain.hal.drivers.cuda_api import SELECTED
from drivetrain.hal.drivers.cuda_visible import Gpu, visible
from drivetrain.hal.telemetry import Telemetry, nvml

# --- names ---------------------------------------------------------------------------------------

NAME = "cuda"
VENDOR = "nvidia"
GROUPS = frozenset({"compute", "graphs", "managed", "peer", "pinned", "timing"})
VISIBLE = "CUDA_VISIBLE_DEVICES"

_LIBRARY = "libnvidia-ml.so.1"
_LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/wsl/lib",
    "usr/local/nvidia/lib64",
    "usr/local/nvidia/lib",
    "usr/local/cuda/compat",
)
_CORES_PER_MULTIPROCESSOR = {
    **{(5, m): 128 for m in (0, 2, 3)},
    (6, 0): 64,
    (6, 1): 128,
    (6, 2): 128,
    (7, 0): 64,
    (7, 2): 64,
    (7, 5): 64,
    (8, 0): 64,
    (8, 6): 128,
    (8, 7): 128,
    (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128,
    (10, 3): 128,
    (12, 0): 128,
    (12, 1): 128,
}
"""CUDA C++ Programming Guide, arithmetic throughput of 32-bit additions by compute capability."""


# --- discovery -----------------------------------------------------------------------------------


def _kernel_driver_is_here(root: Path) -> bool:
    return any((root / "dev").glob("nvidia[0-9]*")) or any(
        (root / path).exists()
        for path in ("dev/nvidiactl", "dev/dxg", "proc/driver/nvidia/version")
    )


def _library_is_here(root: Path) -> bool:
    folders = [root / folder for folder in _LIBRARY_FOLDERS]
    folders += [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    if any((folder / _LIBRARY).exists() for folder in folders):
        return True
    try:
        return _LIBRARY.encode() in (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return False


def _on_the_bus(root: Path) -> bool:
    """An NVIDIA display or 3D controller that no driver needs to be loaded for to be seen."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def absent(root: Path = Path("/")) -> str:
    """Why there is no NVIDIA GPU to be used here; ``""`` when NVML is worth asking."""
    selected = os.environ.get(SELECTED, "")
    if selected:
        return "" if Path(selected).is_file() else f"{SELECTED}={selected} names no file"
    kernel, library = _kernel_driver_is_here(root), _library_is_here(root)
    if kernel or (library and _on_the_bus(root)):
        return ""
    if _on_the_bus(root):
        return "an NVIDIA GPU is on the PCI bus, but no NVIDIA driver is installed"
    if library:
        return f"{_LIBRARY} is installed, but there is no NVIDIA device (no /dev/nvidia*)"
    return f"no NVIDIA driver (neither /dev/nvidia* nor {_LIBRARY})"


def discover() -> tuple[DeviceInfo, ...]:
    if os.environ.get(SELECTED):
        from drivetrain.hal.drivers import cuda_selected

        return cuda_selected.discover()
    try:
        nv = nvml.library()
    except DriverMissing as error:
        if not _kernel_driver_is_here(Path("/")):
            raise
        raise HalError(
            f"the NVIDIA kernel driver is loaded, but {error}", code="broken", driver=NAME
        ) from error
    version = _text(nvml.sensor(nv.nvmlSystemGetDriverVersion))
    handles: dict[str, Any] = {}
    parents: dict[str, Any] = {}
    lost: dict[str, str] = {}
    gpus: list[Gpu] = []
    for index in range(nv.nvmlDeviceGetCount()):
        try:
            handle = nv.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(nv.nvmlDeviceGetUUID(handle))
            instances = _mig_instances(nv, handle)
        except (nv.NVMLError, DeviceLost) as error:
            found = (
                error
                if isinstance(error, HalError)
                else nvml.translated(error, "nvmlDeviceGetHandleByIndex")
            )
            uuid = f"GPU-unreadable-{index}"
            lost[uuid] = str(found)
            gpus.append(Gpu(uuid))
            continue
        handles[uuid] = handle
        gpus.append(Gpu(uuid, tuple(instances or ()), instances is not None))
        for instance_uuid, instance in (instances or {}).items():
            handles[instance_uuid], parents[instance_uuid] = instance, handle
    chosen = visible(os.environ.get(VISIBLE), gpus)
    if not chosen:
        if gpus and VISIBLE in os.environ:
            why = (
                f"{VISIBLE}={os.environ[VISIBLE]!r} hides every one of the {len(gpus)} NVIDIA GPUs"
            )
        elif gpus:
            why = "MIG is on, but no MIG instance was made"
        else:
            why = "the NVIDIA driver works, but has no GPU"
        raise DriverMissing(why, code="no_device", driver=NAME)
    threads = threads_each(len(chosen))
    whole = {uuid: handle for uuid, handle in handles.items() if uuid not in parents}
    devices = []
    for index, uuid in enumerate(chosen):
        fault = lost.get(uuid, "")
        if not fault:
            try:
                parent = parents.get(uuid)
                devices.append(
                    _describe(nv, index, uuid, handles[uuid], parent, whole, version, threads)
                )
                continue
            except DeviceLost as error:
                fault = str(error)
        devices.append(
            DeviceInfo(
                driver=NAME,
                index=index,
                name="NVIDIA GPU",
                vendor=VENDOR,
                uuid=uuid,
                driver_version=version,
                fault=fault,
                isolation=isolation(uuid, threads),
            )
        )
    return tuple(devices)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


def threads_each(count: int) -> int:
    """Processor threads for each of ``count`` workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // count)


def _mig_instances(nv: Any, handle: Any) -> dict[str, Any] | None:
    """uuid -> handle of each MIG instance; ``None`` when MIG is off."""
    mode = nvml.sensor(nv.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nv.NVML_DEVICE_MIG_ENABLE:
        return None
    found = {}
    for slot in range(nvml.sensor(nv.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = nvml.sensor(nv.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
        if instance is not None:
            found[_text(nv.nvmlDeviceGetUUID(instance))] = instance
    return found


def _describe(
    nv: Any,
    index: int,
    uuid: str,
    handle: Any,
    parent: Any,
    whole: dict[str, Any],
    version: str,
    threads: int,
) -> DeviceInfo:
    gpu = handle if parent is None else parent
    pci = _text(getattr(nvml.sensor(nv.nvmlDeviceGetPciInfo, gpu), "busId", "")).lower()
    now = nvml.read(nv, handle)
    return DeviceInfo(
        driver=NAME,
        index=index,
        name=_text(nvml.sensor(nv.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
        vendor=VENDOR,
        uuid=uuid,
        pci=pci,
        memory_bytes=now.memory_total_bytes or 0,
        driver_version=version,
        numa_node=_numa_node(pci),
        parent_uuid="" if parent is None else _text(nvml.sensor(nv.nvmlDeviceGetUUID, parent)),
        capabilities=_capabilities(nv, uuid, handle, parent, whole),
        isolation=isolation(uuid, threads),
        telemetry=now,
    )


def _numa_node(pci: str) -> int | None:
    """The kernel's word for where the GPU hangs; -1 is its word for unknown."""
    try:
        node = int(Path(f"/sys/bus/pci/devices/{pci[-12:]}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


# --- capabilities --------------------------------------------------------------------------------


def _capabilities(
    nv: Any, uuid: str, handle: Any, parent: Any, whole: dict[str, Any]
) -> Capabilities:
    gpu = handle if parent is None else parent
    compute = nvml.sensor(nv.nvmlDeviceGetCudaComputeCapability, gpu)
    cores = nvml.sensor(nv.nvmlDeviceGetNumGpuCores, gpu) if parent is None else None
    slice_facts = nvml.sensor(nv.nvmlDeviceGetAttributes_v2, handle) if parent is not None else None
    multiprocessors = None
    if slice_facts is not None:
        multiprocessors = int(slice_facts.multiprocessorCount)
    elif cores and compute and tuple(compute) in _CORES_PER_MULTIPROCESSOR:
        multiprocessors = cores // _CORES_PER_MULTIPROCESSOR[tuple(compute)]
    links, peers = _nvlinks(nv, gpu) if parent is None else (None, ())
    return Capabilities(
        compute=".".join(str(part) for part in compute or ()),
        cores=cores,
        multiprocessors=multiprocessors,
        features=("mig",) if parent is not None else (),
        clock_mhz=nvml.sensor(nv.nvmlDeviceGetMaxClockInfo, gpu, nv.NVML_CLOCK_SM),
        memory_clock_mhz=nvml.sensor(nv.nvmlDeviceGetMaxClockInfo, gpu, nv.NVML_CLOCK_MEM),
        nvlinks=links,
        peers=peers,
        peer_uuids=tuple(
            other
            for other, far in whole.items()
            if parent is None
            and other != uuid
            and nvml.sensor(nv.nvmlDeviceGetP2PStatus, gpu, far, nv.NVML_P2P_CAPS_INDEX_NVLINK)
            == nv.NVML_P2P_STATUS_OK
        ),
        groups=tuple(sorted(GROUPS)),
    )


def _nvlinks(nv: Any, handle: Any) -> tuple[int | None, tuple[str, ...]]:
    """(active links, PCI addresses they lead to); (None, ()) on a GPU without NVLink."""
    active: int | None = None
    far: list[str] = []
    for link in range(nv.NVML_NVLINK_MAX_LINKS):
        state = nvml.sensor(nv.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:
            break
        active = active or 0
        if state == nv.NVML_FEATURE_ENABLED:
            active += 1
            remote = nvml.sensor(nv.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            address = "" if remote is None else _text(remote.busId).lower()
            if address and not address.startswith("ffffffff"):  # hidden by a virtual machine
                far.append(address)
    return active, tuple(sorted(set(far)))


# --- telemetry -----------------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    if info.fault:
        return Telemetry(health=f"lost: {info.fault}")
    if os.environ.get(SELECTED) and not info.pci:  # NVML knows only what is on the bus
        return first_reading(info.memory_bytes)
    return nvml.telemetry(info.uuid)


def first_reading(total: int) -> Telemetry:
    return Telemetry(memory_total_bytes=total or None, at=time.time())


# --- isolation -----------------------------------------------------------------------------------


def isolation(uuid: str, threads: int) -> Isolation:
    """Only this GPU (or MIG instance), by uuid; it is ``cuda:0`` in the worker."""
    environment = hidden_from_all(
        CUDA_VISIBLE_DEVICES=uuid, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)
    )
    return Isolation(environment, None, threads, "cuda:0")


# --- probe ---------------------------------------------------------------------------------------

_PATTERN, _BYTES = bytes.fromhex("dec0175a"), 1 << 20
_PROBE_WAIT_S = 30.0


def probe(info: DeviceInfo) -> None:
    """Context, 1 MiB allocated, filled, copied back and compared. Raises HalError."""
    backend = open_device(info)
    stream = backend.stream_create(0)
    memory = backend.alloc(_BYTES, Kind.DEVICE, stream)
    backend.fill(memory, _PATTERN, _BYTES // len(_PATTERN), stream)
    back = ctypes.create_string_buffer(_BYTES)
    backend.copy(ctypes.addressof(back), memory, _BYTES, Way.DEVICE_TO_HOST, stream, False)
    backend.free(memory, Kind.DEVICE, stream)
    if not backend.stream_synchronize(stream, _PROBE_WAIT_S):
        raise Timeout(
            f"a fill and a copy of 1 MiB were not done within {_PROBE_WAIT_S:g} s",
            code="timeout",
            driver=NAME,
            op="probe",
            device=info.uuid,
        )
    if back.raw != _PATTERN * (_BYTES // len(_PATTERN)):
        raise HalError(
            "memory read back from the GPU is not what was written",
            code="wrong",
            driver=NAME,
            op="probe",
            device=info.uuid,
        )
    backend.close()


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """The device, open in this process through ``libcuda``. Raises HalError."""
    from drivetrain.hal.drivers.cuda_backend import CudaBackend

    return CudaBackend(info)


DRIVER = Driver(
    name=NAME,
    vendor=VENDOR,
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    groups=GROUPS,
    install=(
        "install the NVIDIA driver (Debian: apt install nvidia-driver; Ubuntu: ubuntu-drivers "
        "install); in a container, start it with --gpus all"
    ),
)
