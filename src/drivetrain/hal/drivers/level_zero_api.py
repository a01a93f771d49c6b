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
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal import missing
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
    group: str = ""
    """Of the SPI, off without it."""


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
    # -- group peer
    yield row(
        "zeDeviceCanAccessPeer",
        "ze_device_handle_t, ze_device_handle_t, ze_bool_t *",
        True,
        "peer",
    )
    # -- group compute
    for name, types in (
        (
            "zeModuleCreate",
            "ze_context_handle_t, ze_device_handle_t, const ze_module_desc_t *, "
            "ze_module_handle_t *, ze_module_build_log_handle_t *",
        ),
        ("zeModuleDestroy", "ze_module_handle_t"),
        ("zeModuleBuildLogGetString", "ze_module_build_log_handle_t, size_t *, char *"),
        ("zeModuleBuildLogDestroy", "ze_module_build_log_handle_t"),
        ("zeKernelCreate", "ze_module_handle_t, const ze_kernel_desc_t *, ze_kernel_handle_t *"),
        ("zeKernelDestroy", "ze_kernel_handle_t"),
        ("zeKernelGetProperties", "ze_kernel_handle_t, ze_kernel_properties_t *"),
        ("zeKernelSetGroupSize", "ze_kernel_handle_t, uint32_t, uint32_t, uint32_t"),
        ("zeKernelSetArgumentValue", "ze_kernel_handle_t, uint32_t, size_t, const void *"),
        (
            "zeCommandListAppendLaunchKernel",
            f"ze_command_list_handle_t, ze_kernel_handle_t, const ze_group_count_t *, {_WAITS}",
        ),
        (
            "zeDeviceGetComputeProperties",
            "ze_device_handle_t, ze_device_compute_properties_t *",
        ),
    ):
        yield row(name, types, True, "compute")


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
    STRUCTURE_TYPE_DEVICE_COMPUTE_PROPERTIES = 0x4
    STRUCTURE_TYPE_COMMAND_QUEUE_GROUP_PROPERTIES = 0x6
    STRUCTURE_TYPE_DEVICE_MEMORY_PROPERTIES = 0x7
    STRUCTURE_TYPE_DEVICE_MEMORY_ACCESS_PROPERTIES = 0x8
    STRUCTURE_TYPE_CONTEXT_DESC = 0xD
    STRUCTURE_TYPE_COMMAND_QUEUE_DESC = 0xE
    STRUCTURE_TYPE_EVENT_POOL_DESC = 0x10
    STRUCTURE_TYPE_EVENT_DESC = 0x11
    STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC = 0x15
    STRUCTURE_TYPE_HOST_MEM_ALLOC_DESC = 0x16
    STRUCTURE_TYPE_MODULE_DESC = 0x1B
    STRUCTURE_TYPE_KERNEL_DESC = 0x1D
    STRUCTURE_TYPE_KERNEL_PROPERTIES = 0x1E
    STRUCTURE_TYPE_PCI_EXT_PROPERTIES = 0x10008
    MODULE_FORMAT_IL_SPIRV = 0
    RESULT_NOT_READY = 1
    RESULT_ERROR_DEVICE_LOST = 0x70000001
    RESULT_ERROR_OUT_OF_HOST_MEMORY = 0x70000002
    RESULT_ERROR_OUT_OF_DEVICE_MEMORY = 0x70000003
    RESULT_ERROR_MODULE_BUILD_FAILURE = 0x70000004
    RESULT_ERROR_MODULE_LINK_FAILURE = 0x70000005
    RESULT_ERROR_DEVICE_REQUIRES_RESET = 0x70000006
    RESULT_ERROR_DEPENDENCY_UNAVAILABLE = 0x70020000
    RESULT_ERROR_UNINITIALIZED = 0x78000001
    RESULT_ERROR_UNSUPPORTED_VERSION = 0x78000002
    RESULT_ERROR_UNSUPPORTED_FEATURE = 0x78000003
    RESULT_ERROR_INVALID_ARGUMENT = 0x78000004
    RESULT_ERROR_UNSUPPORTED_SIZE = 0x78000009
    RESULT_ERROR_INVALID_NATIVE_BINARY = 0x7800000F
    RESULT_ERROR_INVALID_KERNEL_NAME = 0x78000011


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


class ComputeProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("maxTotalGroupSize", _U32),
        ("maxGroupSizeX", _U32),
        ("maxGroupSizeY", _U32),
        ("maxGroupSizeZ", _U32),
        ("maxGroupCountX", _U32),
        ("maxGroupCountY", _U32),
        ("maxGroupCountZ", _U32),
        ("maxSharedLocalMemory", _U32),
        ("numSubGroupSizes", _U32),
        ("subGroupSizes", _U32 * 8),
    )


class ModuleDesc(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("format", ctypes.c_int),
        ("inputSize", _SIZE),
        ("pInputModule", ctypes.c_char_p),
        ("pBuildFlags", ctypes.c_char_p),
        ("pConstants", _PTR),
    )


class KernelDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("flags", _U32), ("pKernelName", ctypes.c_char_p))


class KernelProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("numKernelArgs", _U32),
        ("requiredGroupSizeX", _U32),
        ("requiredGroupSizeY", _U32),
        ("requiredGroupSizeZ", _U32),
        ("requiredNumSubGroups", _U32),
        ("requiredSubgroupSize", _U32),
        ("maxSubgroupSize", _U32),
        ("maxNumSubgroups", _U32),
        ("localMemSize", _U32),
        ("privateMemSize", _U32),
        ("spillMemSize", _U32),
        ("uuid", ctypes.c_ubyte * 32),
    )


class GroupCount(ctypes.Structure):
    _fields_ = (("groupCountX", _U32), ("groupCountY", _U32), ("groupCountZ", _U32))


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
    "ze_device_compute_properties_t": ComputeProperties,
    "ze_module_desc_t": ModuleDesc,
    "ze_kernel_desc_t": KernelDesc,
    "ze_kernel_properties_t": KernelProperties,
    "ze_group_count_t": GroupCount,
}


def _ctype(word: str) -> Any:
    if word.endswith(("*", "_handle_t")):
        return _PTR
    return {"uint32_t": _U32, "size_t": _SIZE, "ze_init_flags_t": _U32}[word]


# -- the library -----------------------------------------------------------------------------------


@dataclass
class Shared:
    """A context of Level Zero's, and how many devices are open in it."""

    handle: int
    users: int = 0
    kept: bool = False
    """Something in it was never given back: it stays until the process ends."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Gives back what a closed device left because others may still wait for it."""


class Api:
    """The functions of one loader, as attributes. One that is missing raises Unsupported when it is
    used. Raises HalError when the loader lacks what nothing works without."""

    def __init__(self, library: Library) -> None:
        lacking, off = [], set()
        for row in FUNCTIONS:
            try:
                function = library[row.name]
            except AttributeError:
                if not row.optional:
                    lacking.append(row.name)
                off |= {row.group} - {""}
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
        self.off = frozenset(off)
        """Groups that the loader cannot serve."""
        self.contexts: dict[int, Shared] = {}
        """By driver: a process has one of each, so that its devices reach each other's memory."""
        self.lock = threading.Lock()
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
    """The machine's loader, or what `SELECTED` names, bound once. Raises DriverMissing where it
    is not there, HalError for one that does not load."""
    path = os.environ.get(SELECTED, "") or find([LOADER]) or LOADER
    try:
        return Api(ctypes.CDLL(path))
    except OSError as error:
        raise missing.unloadable(path, error, driver=NAME, op="open") from error
