"""OpenCL devices of any platform: AMD's, Intel's, NVIDIA's, PoCL's, others. Listed through the
loader, in a child process; only the probe and `open_device` make a context."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import replace

from drivetrain.errors import HalError, Timeout
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
from drivetrain.hal.drivers import kept
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.drivers import opencl_platforms as platforms
from drivetrain.hal.drivers.opencl_api import Cl, load
from drivetrain.hal.telemetry import Telemetry, amd, host, intel, nvml

# --- names ---------------------------------------------------------------------------------------

NAME = "opencl"
VENDOR = "khronos"
GROUPS = frozenset({"compute", "managed", "pinned", "timing"})
MEMORY_DOMAIN = "host"
FILE = "opencl-devices.json"


# --- discovery -----------------------------------------------------------------------------------


def absent() -> str:
    """Why there is no OpenCL here; ``""`` when the loader is worth asking."""
    return loader.absent()


def known() -> tuple[DeviceInfo, ...] | None:
    """What the loader listed before, when nothing has changed since that a listing depends on."""
    found = kept.read(FILE, loader.fingerprint())
    if found is None:
        return None
    return tuple(replace(info, telemetry=first_reading(info)) for info in found)


def discover() -> tuple[DeviceInfo, ...]:
    """Every device of every platform. Loads the vendors' libraries, which may hang or crash."""
    before = loader.fingerprint()
    seen = platforms.devices(load())
    found = tuple(_describe(index, each) for index, each in enumerate(seen))
    kept.write(FILE, before, found)
    return tuple(replace(info, telemetry=first_reading(info)) for info in found)


def first_reading(info: DeviceInfo) -> Telemetry:
    """What can be read at once, in any process, without a vendor's library."""
    if info.memory_domain != MEMORY_DOMAIN:
        return Telemetry(memory_total_bytes=info.memory_bytes or None, at=time.time())
    now = host.memory()
    return Telemetry(
        memory_used_bytes=now.used_bytes, memory_total_bytes=now.total_bytes, at=time.time()
    )


def _describe(index: int, each: platforms.Found) -> DeviceInfo:
    shares = each.is_processor or bool(each.number(Cl.DEVICE_HOST_UNIFIED_MEMORY))
    available = bool(each.number(Cl.DEVICE_AVAILABLE))
    return DeviceInfo(
        driver=NAME,
        index=index,
        name=each.name,
        vendor=each.vendor,
        uuid=each.known_as,
        pci=each.pci,
        memory_bytes=each.number(Cl.DEVICE_GLOBAL_MEM_SIZE),
        memory_domain=MEMORY_DOMAIN if shares else "",
        driver_version=f"{each.platform.name} {each.text(Cl.DRIVER_VERSION)}".strip(),
        fault="" if available else f"{each.platform.name} says that it is not available",
        by_name_only=each.is_processor,
        capabilities=_capabilities(each),
        isolation=isolation(each.uuid, each.platform.name, each.is_processor),
    )


# --- capabilities --------------------------------------------------------------------------------


def _capabilities(each: platforms.Found) -> Capabilities:
    units = each.number(Cl.DEVICE_MAX_COMPUTE_UNITS)
    return Capabilities(
        compute=f"OpenCL C {each.language}",
        cores=units if each.is_processor else None,
        multiprocessors=None if each.is_processor else units,
        clock_mhz=each.number(Cl.DEVICE_MAX_CLOCK_FREQUENCY) or None,
        groups=tuple(sorted(GROUPS)),
    )


# --- telemetry -----------------------------------------------------------------------------------

_BY_PCI: dict[str, Callable[[str], Telemetry]] = {"amd": amd.read, "intel": intel.read}


def telemetry(info: DeviceInfo) -> Telemetry:
    """NVIDIA's sensors by uuid, AMD's and Intel's by PCI address; memory of the host where the
    device has that; nothing elsewhere: OpenCL has no sensors."""
    if info.fault:
        return Telemetry(health=f"lost: {info.fault}")
    if info.uuid.startswith("GPU-"):
        return nvml.telemetry(info.uuid)
    if info.pci and not info.by_name_only and info.vendor in _BY_PCI:
        now = _BY_PCI[info.vendor](info.pci)
        if now.memory_total_bytes is not None:
            return now
        first = first_reading(info)  # a GPU in the processor has the host's memory
        used, total = first.memory_used_bytes, first.memory_total_bytes
        return replace(now, memory_used_bytes=used, memory_total_bytes=total)
    if info.by_name_only and hasattr(os, "sched_getaffinity"):
        return host.telemetry(sorted(os.sched_getaffinity(0)))
    return first_reading(info)


# --- isolation -----------------------------------------------------------------------------------


def isolation(uuid: str, platform: str, is_processor: bool) -> Isolation:
    """Other vendors' devices hidden, as far as that does not hide the device itself."""
    environment = hidden_from_all()
    vendor = platforms.vendor_of(platform)
    if not is_processor:
        if vendor == "nvidia":
            environment["CUDA_VISIBLE_DEVICES"] = uuid if uuid.startswith("GPU-") else ""
        ours = {"amd": ("HIP_", "ROCR_"), "intel": ("ZE_", "ONEAPI_"), "nvidia": ()}
        # Whatever we know nothing of may read any of them.
        kept = ours.get(vendor, ("CUDA_", "HIP_", "ROCR_", "ZE_", "ONEAPI_"))
        environment = {n: v for n, v in environment.items() if not n.startswith(kept)}
        if vendor == "nvidia" and not environment["CUDA_VISIBLE_DEVICES"]:
            del environment["CUDA_VISIBLE_DEVICES"]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return Isolation(environment, None, threads, "cpu")


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
            "memory read back from the device is not what was written",
            code="wrong",
            driver=NAME,
            op="probe",
            device=info.uuid,
        )
    backend.close()


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """The device, open in this process through the loader. Raises HalError."""
    from drivetrain.hal.drivers.opencl_backend import OpenclBackend

    return OpenclBackend(info)


def examine() -> list[str]:
    """Platforms that are registered and that the loader left out without a word."""
    from drivetrain.hal.drivers.opencl_silent import silent

    return silent()


DRIVER = Driver(
    name=NAME,
    vendor=VENDOR,
    absent=absent,
    discover=discover,
    known=known,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    groups=GROUPS,
    examine=examine,
    install=(
        "install the loader and a platform (Debian: apt install ocl-icd-libopencl1 and your "
        "vendor's, or pocl-opencl-icd for the processor)"
    ),
)
