"""Intel's Level Zero as a declared table: functions, structures, enum values.

Everything goes through the loader, ``libze_loader``, which finds the drivers by itself. Bound is
what version 1.0 of the interface has, so that every loader serves; newer functions are optional.
All rows are compared by the tests with the vendor's ``ze_api.h``.

Loader and drivers are one installation: a loader of one version over a driver of another was seen
to end the process. So it is loaded in children, and in whoever opens a device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from drivetrain.errors import DriverMissing, HalError, Unsupported
from drivetrain.hal.drivers.cuda_api import Library

NAME = "level_zero"
SELECTED = "DRIVETRAIN_LEVEL_ZERO_LIBRARY"
LOADER = "libze_loader.so.1"
DRIVERS = ("libze_intel_gpu.so.1", "libze_intel_vpu.so.1", "libze_intel_npu.so.1")
FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
    "usr/lib/wsl/lib",
)


@dataclass(frozen=True)
class Function:
    """One function of the loader; an ``optional`` one may be missing."""

    name: str
    types: str
    optional: bool = False


_WAITS = "ze_event_handle_t, uint32_t, ze_event_handle_t *"


def _rows() -> Iterable[Function]:
    row = Function
    # -- drivers and devices
    yield row("zeInit", "ze_init_flags_t")
    yield row("zeDriverGet", "uint32_t *, ze_driver_handle_t *")
    yield row("zeDriverGetProperties", "ze_driver_handle_t, ze_driver_properties_t *")
    yield row("zeDeviceGet", "ze_driver_handle_t, uint32_t *, ze_device_handle_t *")
    yield row("zeDeviceGetProperties", "ze_device_handle_t, ze_device_properties_t *")
    yield row(
        "zeDeviceGetMemoryProperties",
        "ze_device_handle_t, uint32_t *, ze_device_memory_properties_t *",
    )
    yield row(
        "zeDeviceGetMemoryAccessProperties",
        "ze_device_handle_t, ze_device_memory_access_properties_t *",
    )
    yield row(
        "zeDeviceGetCommandQueueGroupProperties",
        "ze_device_handle_t, uint32_t *, ze_command_queue_group_properties_t *",
    )
    yield row("zeDevicePciGetPropertiesExt", "ze_device_handle_t, ze_pci_ext_properties_t *", True)
    # -- contexts and lists
    yield row(
        "zeContextCreate", "ze_driver_handle_t, const ze_context_desc_t *, ze_context_handle_t *"
    )
    yield row("zeContextDestroy", "ze_context_handle_t")
    yield row(
        "zeCommandListCreateImmediate",
        "ze_context_handle_t, ze_device_handle_t, const ze_command_queue_desc_t *, "
        "ze_command_list_handle_t *",
    )
    yield row("zeCommandListDestroy", "ze_command_list_handle_t")
    yield row("zeCommandListAppendBarrier", f"ze_command_list_handle_t, {_WAITS}")
    yield row(
        "zeCommandListAppendMemoryCopy",
        f"ze_command_list_handle_t, void *, const void *, size_t, {_WAITS}",
    )
    yield row(
        "zeCommandListAppendMemoryFill",
        f"ze_command_list_handle_t, void *, const void *, size_t, size_t, {_WAITS}",
    )
    yield row(
        "zeCommandListAppendWriteGlobalTimestamp",
        f"ze_command_list_handle_t, uint64_t *, {_WAITS}",
    )
    # -- events
    yield row(
        "zeEventPoolCreate",
        "ze_context_handle_t, const ze_event_pool_desc_t *, uint32_t, ze_device_handle_t *, "
        "ze_event_pool_handle_t *",
    )
    yield row("zeEventPoolDestroy", "ze_event_pool_handle_t")
    yield row(
        "zeEventCreate", "ze_event_pool_handle_t, const ze_event_desc_t *, ze_event_handle_t *"
    )
    yield row("zeEventDestroy", "ze_event_handle_t")
    yield row("zeEventQueryStatus", "ze_event_handle_t")
    yield row("zeEventHostReset", "ze_event_handle_t")
    # -- memory
    yield row(
        "zeMemAllocDevice",
        "ze_context_handle_t, const ze_device_mem_alloc_desc_t *, size_t, size_t, "
        "ze_device_handle_t, void **",
    )
    yield row(
        "zeMemAllocHost",
        "ze_context_handle_t, const ze_host_mem_alloc_desc_t *, size_t, size_t, void **",
    )
    yield row(
        "zeMemAllocShared",
        "ze_context_handle_t, const ze_device_mem_alloc_desc_t *, "
        "const ze_host_mem_alloc_desc_t *, size_t, size_t, ze_device_handle_t, void **",
    )
    yield row("zeMemFree", "ze_context_handle_t, void *")


FUNCTIONS = tuple(_rows())


# -- enum values -----------------------------------------------------------------------------------


class Ze:
    """Enum values and flags, each under its name in ``ze_api.h`` less the ``ZE_``."""

    DEVICE_TYPE_GPU = 1
    DEVICE_PROPERTY_FLAG_INTEGRATED = 1
    COMMAND_QUEUE_GROUP_PROPERTY_FLAG_COMPUTE = 1
    COMMAND_QUEUE_MODE_ASYNCHRONOUS = 2
    COMMAND_QUEUE_PRIORITY_NORMAL = 0
    COMMAND_QUEUE_PRIORITY_PRIORITY_LOW = 1
    COMMAND_QUEUE_PRIORITY_PRIORITY_HIGH = 2
    EVENT_POOL_FLAG_HOST_VISIBLE = 1
    EVENT_SCOPE_FLAG_DEVICE = 2
    EVENT_SCOPE_FLAG_HOST = 4
    MEMORY_ACCESS_CAP_FLAG_RW = 1
    MEMORY_ACCESS_CAP_FLAG_CONCURRENT = 4
    STRUCTURE_TYPE_DRIVER_PROPERTIES = 0x1
    STRUCTURE_TYPE_DEVICE_PROPERTIES = 0x3
    STRUCTURE_TYPE_COMMAND_QUEUE_GROUP_PROPERTIES = 0x6
    STRUCTURE_TYPE_DEVICE_MEMORY_PROPERTIES = 0x7
    STRUCTURE_TYPE_DEVICE_MEMORY_ACCESS_PROPERTIES = 0x8
    STRUCTURE_TYPE_CONTEXT_DESC = 0xD
    STRUCTURE_TYPE_COMMAND_QUEUE_DESC = 0xE
    STRUCTURE_TYPE_EVENT_POOL_DESC = 0x10
    STRUCTURE_TYPE_EVENT_DESC = 0x11
    STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC = 0x15
    STRUCTURE_TYPE_HOST_MEM_ALLOC_DESC = 0x16
    STRUCTURE_TYPE_PCI_EXT_PROPERTIES = 0x10008
    RESULT_NOT_READY = 1
    RESULT_ERROR_DEVICE_LOST = 0x70000001
    RESULT_ERROR_OUT_OF_HOST_MEMORY = 0x70000002
    RESULT_ERROR_OUT_OF_DEVICE_MEMORY = 0x70000003
    RESULT_ERROR_DEVICE_REQUIRES_RESET = 0x70000006
    RESULT_ERROR_DEPENDENCY_UNAVAILABLE = 0x70020000
    RESULT_ERROR_UNINITIALIZED = 0x78000001
    RESULT_ERROR_UNSUPPORTED_VERSION = 0x78000002
    RESULT_ERROR_UNSUPPORTED_FEATURE = 0x78000003
    RESULT_ERROR_INVALID_ARGUMENT = 0x78000004
    RESULT_ERROR_UNSUPPORTED_SIZE = 0x78000009


RESULTS = {n: name for name, n in vars(Ze).items() if name.startswith("RESULT_")}


# -- structures: each begins with its type and a pointer to an extension ---------------------------

_U32, _U64, _PTR, _SIZE = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t
_HEAD = (("stype", ctypes.c_int), ("pNext", _PTR))


class DriverProperties(ctypes.Structure):
    _fields_ = (*_HEAD, ("uuid", ctypes.c_ubyte * 16), ("driverVersion", _U32))


class DeviceProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("type", ctypes.c_int),
        ("vendorId", _U32),
        ("deviceId", _U32),
        ("flags", _U32),
        ("subdeviceId", _U32),
        ("coreClockRate", _U32),
        ("maxMemAllocSize", _U64),
        ("maxHardwareContexts", _U32),
        ("maxCommandQueuePriority", _U32),
        ("numThreadsPerEU", _U32),
        ("physicalEUSimdWidth", _U32),
        ("numEUsPerSubslice", _U32),
        ("numSubslicesPerSlice", _U32),
        ("numSlices", _U32),
        ("timerResolution", _U64),
        ("timestampValidBits", _U32),
        ("kernelTimestampValidBits", _U32),
        ("uuid", ctypes.c_ubyte * 16),
        ("name", ctypes.c_char * 256),
    )


class MemoryProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("flags", _U32),
        ("maxClockRate", _U32),
        ("maxBusWidth", _U32),
        ("totalSize", _U64),
        ("name", ctypes.c_char * 256),
    )


class MemoryAccessProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("hostAllocCapabilities", _U32),
        ("deviceAllocCapabilities", _U32),
        ("sharedSingleDeviceAllocCapabilities", _U32),
        ("sharedCrossDeviceAllocCapabilities", _U32),
        ("sharedSystemAllocCapabilities", _U32),
    )


class QueueGroupProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("flags", _U32),
        ("maxMemoryFillPatternSize", _SIZE),
        ("numQueues", _U32),
    )


class PciProperties(ctypes.Structure):
    """``address`` and ``maxSpeed`` laid out flat."""

    _fields_ = (
        *_HEAD,
        ("domain", _U32),
        ("bus", _U32),
        ("device", _U32),
        ("function", _U32),
        ("genVersion", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("maxBandwidth", ctypes.c_int64),
    )


class ContextDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("flags", _U32))


class QueueDesc(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("ordinal", _U32),
        ("index", _U32),
        ("flags", _U32),
        ("mode", ctypes.c_int),
        ("priority", ctypes.c_int),
    )


class EventPoolDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("flags", _U32), ("count", _U32))


class EventDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("index", _U32), ("signal", _U32), ("wait", _U32))


class DeviceMemDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("flags", _U32), ("ordinal", _U32))


class HostMemDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("flags", _U32))


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "ze_driver_properties_t": DriverProperties,
    "ze_device_properties_t": DeviceProperties,
    "ze_device_memory_properties_t": MemoryProperties,
    "ze_device_memory_access_properties_t": MemoryAccessProperties,
    "ze_command_queue_group_properties_t": QueueGroupProperties,
    "ze_pci_ext_properties_t": PciProperties,
    "ze_context_desc_t": ContextDesc,
    "ze_command_queue_desc_t": QueueDesc,
    "ze_event_pool_desc_t": EventPoolDesc,
    "ze_event_desc_t": EventDesc,
    "ze_device_mem_alloc_desc_t": DeviceMemDesc,
    "ze_host_mem_alloc_desc_t": HostMemDesc,
}


def _ctype(word: str) -> Any:
    if word.endswith(("*", "_handle_t")):
        return _PTR
    return {"uint32_t": _U32, "size_t": _SIZE, "ze_init_flags_t": _U32}[word]


# -- the library -----------------------------------------------------------------------------------


class Api:
    """The functions of one loader, as attributes. One that is missing raises Unsupported when it is
    used. Raises HalError when the loader lacks what nothing works without."""

    def __init__(self, library: Library) -> None:
        lacking = []
        for row in FUNCTIONS:
            try:
                function = library[row.name]
            except AttributeError:
                if not row.optional:
                    lacking.append(row.name)
                continue
            function.argtypes = tuple(_ctype(word.strip()) for word in row.types.split(","))
            function.restype = ctypes.c_int
            setattr(self, row.name, function)
        if lacking:
            raise HalError(
                f"{LOADER} has no {', '.join(lacking)}; install a newer Level Zero loader",
                code="broken",
                driver=NAME,
                op="open",
            )
        try:
            library["drivetrain_fake"]
            self.is_fake = True
        except AttributeError:
            self.is_fake = False
        """It says of itself that it stands in for the vendor's library in tests."""

    def __getattr__(self, name: str) -> Any:
        raise Unsupported(
            f"this Level Zero loader has no {name}; a newer one has",
            code="unsupported",
            driver=NAME,
            op=name,
        )

    def has(self, name: str) -> bool:
        return name in self.__dict__


def word(code: int) -> str:
    """The name of a result."""
    name = RESULTS.get(code & 0xFFFFFFFF)
    return f"ZE_{name}" if name else f"Level Zero result {code & 0xFFFFFFFF:#x}"


def find(names: Iterable[str], root: Path = Path("/")) -> str:
    """The path of the first library that is there, its name where only the loader's cache knows it,
    or ``""``. Looks at files only."""
    folders = [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    folders += [root / folder for folder in FOLDERS]
    try:
        known = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        known = b""
    for name in names:
        for folder in folders:
            if (folder / name).is_file():
                return str(folder / name)
        if name.encode() + b"\0" in known:
            return name
    return ""


@cache
def load() -> Api:
    """The machine's loader, or what `SELECTED` names, bound once. Raises DriverMissing."""
    path = os.environ.get(SELECTED, "") or find([LOADER]) or LOADER
    try:
        return Api(ctypes.CDLL(path))
    except OSError as error:
        raise DriverMissing(
            f"{path} cannot be loaded: {error}", code="driver_missing", driver=NAME, op="open"
        ) from error
