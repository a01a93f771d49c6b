"""The devices of another ``libcuda``, one that ``DRIVETRAIN_CUDA_LIBRARY`` names. It is asked
itself: NVML knows the vendor's own driver only. That initialises CUDA, so it happens in the child
that lists devices, and never in the process that asked for the list."""

from __future__ import annotations

import ctypes
from pathlib import Path

from drivetrain.errors import DriverMissing
from drivetrain.hal.driver import Capabilities, DeviceInfo
from drivetrain.hal.drivers.cuda import GROUPS, NAME, VENDOR, first_reading, isolation, threads_each
from drivetrain.hal.drivers.cuda_api import Api, Cu, load
from drivetrain.hal.drivers.cuda_backend import initialised, seen

ROOT = Path("/")


def discover() -> tuple[DeviceInfo, ...]:
    """What the library shows. Devices have PCI addresses only where the machine has them too.
    Raises DriverMissing where it shows none, HalError when it fails."""
    api = initialised(load())
    found, problem = seen(api)
    if problem is not None:
        raise problem
    if not found:
        raise DriverMissing("the selected libcuda shows no device", code="no_device", driver=NAME)
    threads = threads_each(len(found))
    return tuple(
        _described(api, index, uuid, device, threads)
        for index, (uuid, device) in enumerate(found.items())
    )


def _described(api: Api, index: int, uuid: str, device: int, threads: int) -> DeviceInfo:
    def number(attribute: int) -> int:
        box = ctypes.c_int()
        code = api.cuDeviceGetAttribute(ctypes.byref(box), attribute, device)
        return 0 if code else box.value

    name, pci, total = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64), 0
    if "names" not in api.off:
        box = ctypes.c_size_t()
        api.cuDeviceGetName(name, len(name), device)
        api.cuDeviceGetPCIBusId(pci, len(pci), device)
        api.cuDeviceTotalMem(ctypes.byref(box), device)
        total = box.value
    place = pci.value.decode(errors="replace").lower()
    here = bool(place) and (ROOT / "sys/bus/pci/devices" / place).exists()
    version = api.version()
    major = number(Cu.DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = number(Cu.DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    return DeviceInfo(
        driver=NAME,
        index=index,
        name=name.value.decode(errors="replace") or "CUDA device",
        vendor=VENDOR,
        uuid=f"GPU-{uuid}",
        pci=place if here else "",
        memory_bytes=total,
        driver_version=f"CUDA {version // 1000}.{version % 1000 // 10}",
        capabilities=Capabilities(
            compute=f"{major}.{minor}",
            multiprocessors=number(Cu.DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) or None,
            features=("fake",) if api.is_fake else (),
            clock_mhz=number(Cu.DEVICE_ATTRIBUTE_CLOCK_RATE) // 1000 or None,
            memory_clock_mhz=number(Cu.DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) // 1000 or None,
            groups=tuple(sorted(GROUPS - api.off)),
        ),
        isolation=isolation(f"GPU-{uuid}", threads),
        telemetry=first_reading(total),
    )
