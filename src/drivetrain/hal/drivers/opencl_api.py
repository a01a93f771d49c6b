"""OpenCL as a declared table: functions, structures, enum values.

Each row names a function as Khronos' headers do, its result and arguments as C types, the version
of OpenCL that brought it, and what is off without it. Rows of an ``extension`` are asked of the
platform, not of the loader. The tests compare all rows with ``CL/cl.h`` and ``CL/cl_ext.h``.

The loader exports every function up to its own version, also those that a platform behind it lacks:
calling one of those may crash. So whoever calls what is newer than 1.2 asks the device first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal import missing
from drivetrain.hal.drivers import opencl_loader

NAME = "opencl"
LIBRARY = "libOpenCL.so.1"
OLDEST = 120
"""Versions are written as Khronos' headers write them: 100 * major + 10 * minor."""


@dataclass(frozen=True)
class Function:
    """One function of the API."""

    name: str
    result: str
    types: str
    """C types of the arguments, separated by commas."""
    since: int
    group: str = ""
    """What is off without it: a word of `INNER_GROUPS`; empty: nothing works without it."""
    extension: str = ""
    """The extension that brings it; empty: it belongs to OpenCL itself."""


INNER_GROUPS = {
    "queue_properties": "queues with a priority",
    "svm": "addresses that kernels and the host share",
    "usm": "Intel's addresses that kernels and the host share",
    "il": "programs in SPIR-V",
}

CALLBACKS = {
    "context_notify": "void (CL_CALLBACK *{})(const char *, const void *, size_t, void *)",
    "program_notify": "void (CL_CALLBACK *{})(cl_program, void *)",
}
"""Our words for arguments that are functions; no row passes any but NULL."""

_WAITS = "cl_uint, const cl_event *, cl_event *"
_INFO = "size_t, void *, size_t *"
_USM = "cl_intel_unified_shared_memory"


def _rows() -> Iterable[Function]:
    def row(
        name: str, types: str, since: int = 100, group: str = "", result: str = "cl_int"
    ) -> Function:
        extension = {"usm": _USM}.get(group, "") or ("cl_khr_il_program" if "KHR" in name else "")
        return Function(name, result, types, since, group, extension)

    # -- platforms, devices, contexts
    yield row("clGetPlatformIDs", "cl_uint, cl_platform_id *, cl_uint *")
    yield row("clGetPlatformInfo", f"cl_platform_id, cl_platform_info, {_INFO}")
    yield row(
        "clGetDeviceIDs", "cl_platform_id, cl_device_type, cl_uint, cl_device_id *, cl_uint *"
    )
    yield row("clGetDeviceInfo", f"cl_device_id, cl_device_info, {_INFO}")
    yield row(
        "clGetExtensionFunctionAddressForPlatform",
        "cl_platform_id, const char *",
        120,
        result="void *",
    )
    yield row(
        "clCreateContext",
        "const cl_context_properties *, cl_uint, const cl_device_id *, context_notify, void *, "
        "cl_int *",
        result="cl_context",
    )
    yield row("clReleaseContext", "cl_context")
    # -- queues and events
    yield row(
        "clCreateCommandQueue",
        "cl_context, cl_device_id, cl_command_queue_properties, cl_int *",
        result="cl_command_queue",
    )
    yield row(
        "clCreateCommandQueueWithProperties",
        "cl_context, cl_device_id, const cl_queue_properties *, cl_int *",
        200,
        "queue_properties",
        "cl_command_queue",
    )
    yield row("clReleaseCommandQueue", "cl_command_queue")
    yield row("clFlush", "cl_command_queue")
    yield row("clEnqueueMarkerWithWaitList", f"cl_command_queue, {_WAITS}", 120)
    yield row("clEnqueueBarrierWithWaitList", f"cl_command_queue, {_WAITS}", 120)
    yield row("clGetEventInfo", f"cl_event, cl_event_info, {_INFO}")
    yield row("clGetEventProfilingInfo", f"cl_event, cl_profiling_info, {_INFO}")
    yield row("clRetainEvent", "cl_event")
    yield row("clReleaseEvent", "cl_event")
    # -- memory objects
    yield row(
        "clCreateBuffer", "cl_context, cl_mem_flags, size_t, void *, cl_int *", result="cl_mem"
    )
    yield row(
        "clCreateSubBuffer",
        "cl_mem, cl_mem_flags, cl_buffer_create_type, const void *, cl_int *",
        110,
        result="cl_mem",
    )
    yield row("clReleaseMemObject", "cl_mem")
    yield row(
        "clEnqueueReadBuffer",
        f"cl_command_queue, cl_mem, cl_bool, size_t, size_t, void *, {_WAITS}",
    )
    yield row(
        "clEnqueueWriteBuffer",
        f"cl_command_queue, cl_mem, cl_bool, size_t, size_t, const void *, {_WAITS}",
    )
    yield row(
        "clEnqueueCopyBuffer", f"cl_command_queue, cl_mem, cl_mem, size_t, size_t, size_t, {_WAITS}"
    )
    yield row(
        "clEnqueueFillBuffer",
        f"cl_command_queue, cl_mem, const void *, size_t, size_t, size_t, {_WAITS}",
        120,
    )
    yield row(
        "clEnqueueMapBuffer",
        f"cl_command_queue, cl_mem, cl_bool, cl_map_flags, size_t, size_t, {_WAITS}, cl_int *",
        result="void *",
    )
    yield row("clEnqueueUnmapMemObject", f"cl_command_queue, cl_mem, void *, {_WAITS}")
    # -- addresses that kernels and the host share
    yield row("clSVMAlloc", "cl_context, cl_svm_mem_flags, size_t, cl_uint", 200, "svm", "void *")
    yield row("clSVMFree", "cl_context, void *", 200, "svm", "void")
    yield row(
        "clEnqueueSVMMemcpy",
        f"cl_command_queue, cl_bool, void *, const void *, size_t, {_WAITS}",
        200,
        "svm",
    )
    yield row(
        "clEnqueueSVMMemFill",
        f"cl_command_queue, void *, const void *, size_t, size_t, {_WAITS}",
        200,
        "svm",
    )
    yield row("clSetKernelArgSVMPointer", "cl_kernel, cl_uint, const void *", 200, "svm")
    properties = "const cl_mem_properties_intel *, size_t, cl_uint, cl_int *"
    yield row("clHostMemAllocINTEL", f"cl_context, {properties}", 120, "usm", "void *")
    for kind in ("Device", "Shared"):
        yield row(
            f"cl{kind}MemAllocINTEL",
            f"cl_context, cl_device_id, {properties}",
            120,
            "usm",
            "void *",
        )
    yield row("clMemFreeINTEL", "cl_context, void *", 120, "usm")
    yield row(
        "clEnqueueMemcpyINTEL",
        f"cl_command_queue, cl_bool, void *, const void *, size_t, {_WAITS}",
        120,
        "usm",
    )
    yield row(
        "clEnqueueMemFillINTEL",
        f"cl_command_queue, void *, const void *, size_t, size_t, {_WAITS}",
        120,
        "usm",
    )
    yield row("clSetKernelArgMemPointerINTEL", "cl_kernel, cl_uint, const void *", 120, "usm")
    # -- programs and kernels
    yield row(
        "clCreateProgramWithSource",
        "cl_context, cl_uint, const char **, const size_t *, cl_int *",
        result="cl_program",
    )
    yield row(
        "clCreateProgramWithBinary",
        "cl_context, cl_uint, const cl_device_id *, const size_t *, const unsigned char **, "
        "cl_int *, cl_int *",
        result="cl_program",
    )
    for name, since in (("clCreateProgramWithIL", 210), ("clCreateProgramWithILKHR", 120)):
        yield row(name, "cl_context, const void *, size_t, cl_int *", since, "il", "cl_program")
    yield row(
        "clBuildProgram",
        "cl_program, cl_uint, const cl_device_id *, const char *, program_notify, void *",
    )
    yield row("clGetProgramInfo", f"cl_program, cl_program_info, {_INFO}")
    yield row("clGetProgramBuildInfo", f"cl_program, cl_device_id, cl_program_build_info, {_INFO}")
    yield row("clReleaseProgram", "cl_program")
    yield row("clCreateKernel", "cl_program, const char *, cl_int *", result="cl_kernel")
    yield row("clReleaseKernel", "cl_kernel")
    yield row("clSetKernelArg", "cl_kernel, cl_uint, size_t, const void *")
    yield row("clGetKernelInfo", f"cl_kernel, cl_kernel_info, {_INFO}")
    yield row("clGetKernelArgInfo", f"cl_kernel, cl_uint, cl_kernel_arg_info, {_INFO}", 120)
    yield row(
        "clGetKernelWorkGroupInfo",
        f"cl_kernel, cl_device_id, cl_kernel_work_group_info, {_INFO}",
    )
    yield row(
        "clEnqueueNDRangeKernel",
        "cl_command_queue, cl_kernel, cl_uint, const size_t *, const size_t *, const size_t *, "
        f"{_WAITS}",
    )


FUNCTIONS = tuple(_rows())


# -- enum values -----------------------------------------------------------------------------------


class Cl:
    """Enum values and flags, each under its name in the headers less the ``CL_``."""

    PLATFORM_VERSION = 0x0901
    PLATFORM_NAME = 0x0902
    PLATFORM_VENDOR = 0x0903
    DEVICE_TYPE_CPU = 1 << 1
    DEVICE_TYPE_GPU = 1 << 2
    DEVICE_TYPE_ALL = 0xFFFFFFFF
    DEVICE_TYPE = 0x1000
    DEVICE_MAX_COMPUTE_UNITS = 0x1002
    DEVICE_MAX_WORK_GROUP_SIZE = 0x1004
    DEVICE_MAX_WORK_ITEM_SIZES = 0x1005
    DEVICE_MAX_CLOCK_FREQUENCY = 0x100C
    DEVICE_MAX_MEM_ALLOC_SIZE = 0x1010
    DEVICE_MEM_BASE_ADDR_ALIGN = 0x1019
    DEVICE_SINGLE_FP_CONFIG = 0x101B
    DEVICE_GLOBAL_MEM_SIZE = 0x101F
    DEVICE_LOCAL_MEM_SIZE = 0x1023
    DEVICE_AVAILABLE = 0x1027
    DEVICE_COMPILER_AVAILABLE = 0x1028
    DEVICE_NAME = 0x102B
    DEVICE_VENDOR = 0x102C
    DRIVER_VERSION = 0x102D
    DEVICE_VERSION = 0x102F
    DEVICE_EXTENSIONS = 0x1030
    DEVICE_DOUBLE_FP_CONFIG = 0x1032
    DEVICE_HOST_UNIFIED_MEMORY = 0x1035
    DEVICE_OPENCL_C_VERSION = 0x103D
    DEVICE_SVM_CAPABILITIES = 0x1053
    DEVICE_IL_VERSION = 0x105B
    DEVICE_MAX_NUM_SUB_GROUPS = 0x105C
    DEVICE_OPENCL_C_ALL_VERSIONS = 0x1066
    FP_CORRECTLY_ROUNDED_DIVIDE_SQRT = 1 << 7
    DEVICE_SVM_COARSE_GRAIN_BUFFER = 1 << 0
    DEVICE_SVM_FINE_GRAIN_BUFFER = 1 << 1
    MEM_READ_WRITE = 1 << 0
    MEM_ALLOC_HOST_PTR = 1 << 4
    MEM_SVM_FINE_GRAIN_BUFFER = 1 << 10
    MAP_READ = 1 << 0
    MAP_WRITE = 1 << 1
    BUFFER_CREATE_TYPE_REGION = 0x1220
    CONTEXT_PLATFORM = 0x1084
    QUEUE_PROFILING_ENABLE = 1 << 1
    QUEUE_PROPERTIES = 0x1093
    EVENT_COMMAND_EXECUTION_STATUS = 0x11D3
    COMPLETE = 0
    PROFILING_COMMAND_END = 0x1283
    PROGRAM_BINARY_SIZES = 0x1165
    PROGRAM_BINARIES = 0x1166
    PROGRAM_KERNEL_NAMES = 0x1168
    PROGRAM_BUILD_LOG = 0x1183
    KERNEL_NUM_ARGS = 0x1191
    KERNEL_ARG_ADDRESS_QUALIFIER = 0x1196
    KERNEL_ARG_ADDRESS_GLOBAL = 0x119B
    KERNEL_ARG_ADDRESS_LOCAL = 0x119C
    KERNEL_ARG_ADDRESS_CONSTANT = 0x119D
    KERNEL_ARG_ADDRESS_PRIVATE = 0x119E
    KERNEL_WORK_GROUP_SIZE = 0x11B0
    KERNEL_LOCAL_MEM_SIZE = 0x11B2
    KERNEL_PRIVATE_MEM_SIZE = 0x11B4
    # -- extensions
    QUEUE_PRIORITY_KHR = 0x1096
    QUEUE_PRIORITY_HIGH_KHR = 1 << 0
    QUEUE_PRIORITY_MED_KHR = 1 << 1
    QUEUE_PRIORITY_LOW_KHR = 1 << 2
    DEVICE_UUID_KHR = 0x106A
    DEVICE_PCI_BUS_INFO_KHR = 0x410F
    DEVICE_TOPOLOGY_AMD = 0x4037
    DEVICE_TOPOLOGY_TYPE_PCIE_AMD = 1
    DEVICE_GLOBAL_FREE_MEMORY_AMD = 0x4039
    DEVICE_HOST_MEM_CAPABILITIES_INTEL = 0x4190
    DEVICE_DEVICE_MEM_CAPABILITIES_INTEL = 0x4191
    DEVICE_SINGLE_DEVICE_SHARED_MEM_CAPABILITIES_INTEL = 0x4192
    UNIFIED_SHARED_MEMORY_ACCESS_INTEL = 1 << 0
    UNIFIED_SHARED_MEMORY_CONCURRENT_ACCESS_INTEL = 1 << 2


class Nv:
    """Values of ``cl_nv_device_attribute_query`` that Khronos' headers leave out."""

    DEVICE_PCI_BUS_ID = 0x4008
    DEVICE_PCI_SLOT_ID = 0x4009
    DEVICE_PCI_DOMAIN_ID = 0x400A
    ILLEGAL_ACCESS = -9999
    """What NVIDIA's driver answers after a kernel touched memory that is not its own."""


class Code:
    """Results, each under its name in the headers less the ``CL_``."""

    SUCCESS = 0
    DEVICE_NOT_FOUND = -1
    DEVICE_NOT_AVAILABLE = -2
    COMPILER_NOT_AVAILABLE = -3
    MEM_OBJECT_ALLOCATION_FAILURE = -4
    OUT_OF_RESOURCES = -5
    OUT_OF_HOST_MEMORY = -6
    PROFILING_INFO_NOT_AVAILABLE = -7
    MEM_COPY_OVERLAP = -8
    IMAGE_FORMAT_MISMATCH = -9
    IMAGE_FORMAT_NOT_SUPPORTED = -10
    BUILD_PROGRAM_FAILURE = -11
    MAP_FAILURE = -12
    MISALIGNED_SUB_BUFFER_OFFSET = -13
    EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST = -14
    COMPILE_PROGRAM_FAILURE = -15
    LINKER_NOT_AVAILABLE = -16
    LINK_PROGRAM_FAILURE = -17
    DEVICE_PARTITION_FAILED = -18
    KERNEL_ARG_INFO_NOT_AVAILABLE = -19
    INVALID_VALUE = -30
    INVALID_DEVICE_TYPE = -31
    INVALID_PLATFORM = -32
    INVALID_DEVICE = -33
    INVALID_CONTEXT = -34
    INVALID_QUEUE_PROPERTIES = -35
    INVALID_COMMAND_QUEUE = -36
    INVALID_HOST_PTR = -37
    INVALID_MEM_OBJECT = -38
    INVALID_IMAGE_FORMAT_DESCRIPTOR = -39
    INVALID_IMAGE_SIZE = -40
    INVALID_SAMPLER = -41
    INVALID_BINARY = -42
    INVALID_BUILD_OPTIONS = -43
    INVALID_PROGRAM = -44
    INVALID_PROGRAM_EXECUTABLE = -45
    INVALID_KERNEL_NAME = -46
    INVALID_KERNEL_DEFINITION = -47
    INVALID_KERNEL = -48
    INVALID_ARG_INDEX = -49
    INVALID_ARG_VALUE = -50
    INVALID_ARG_SIZE = -51
    INVALID_KERNEL_ARGS = -52
    INVALID_WORK_DIMENSION = -53
    INVALID_WORK_GROUP_SIZE = -54
    INVALID_WORK_ITEM_SIZE = -55
    INVALID_GLOBAL_OFFSET = -56
    INVALID_EVENT_WAIT_LIST = -57
    INVALID_EVENT = -58
    INVALID_OPERATION = -59
    INVALID_GL_OBJECT = -60
    INVALID_BUFFER_SIZE = -61
    INVALID_MIP_LEVEL = -62
    INVALID_GLOBAL_WORK_SIZE = -63
    INVALID_PROPERTY = -64
    INVALID_IMAGE_DESCRIPTOR = -65
    INVALID_COMPILER_OPTIONS = -66
    INVALID_LINKER_OPTIONS = -67
    INVALID_DEVICE_PARTITION_COUNT = -68
    INVALID_PIPE_SIZE = -69
    INVALID_DEVICE_QUEUE = -70
    INVALID_SPEC_ID = -71
    MAX_SIZE_RESTRICTION_EXCEEDED = -72
    PLATFORM_NOT_FOUND_KHR = -1001
    CONTEXT_TERMINATED_KHR = -1121


_NAMES = {number: f"CL_{name}" for name, number in vars(Code).items() if name.isupper()}
_NAMES[Nv.ILLEGAL_ACCESS] = "NVIDIA -9999"


def name_of(code: int) -> str:
    """The result's name as the headers write it."""
    return _NAMES.get(code, f"OpenCL error {code}")


# -- structures ------------------------------------------------------------------------------------


class NameVersion(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("name", ctypes.c_char * 64))


class BufferRegion(ctypes.Structure):
    _fields_ = (("origin", ctypes.c_size_t), ("size", ctypes.c_size_t))


class PciBusInfo(ctypes.Structure):
    _fields_ = (
        ("pci_domain", ctypes.c_uint),
        ("pci_bus", ctypes.c_uint),
        ("pci_device", ctypes.c_uint),
        ("pci_function", ctypes.c_uint),
    )


class TopologyAmd(ctypes.Structure):
    """The ``pcie`` member of a union, laid out flat."""

    _fields_ = (
        ("type", ctypes.c_uint),
        ("unused", ctypes.c_ubyte * 17),
        ("bus", ctypes.c_ubyte),
        ("device", ctypes.c_ubyte),
        ("function", ctypes.c_ubyte),
    )


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "cl_name_version": NameVersion,
    "cl_buffer_region": BufferRegion,
    "cl_device_pci_bus_info_khr": PciBusInfo,
    "cl_device_topology_amd": TopologyAmd,
}

_HANDLES = "platform_id device_id context command_queue mem program kernel event"
_UINTS = (
    "uint bool platform_info device_info event_info profiling_info program_info kernel_info "
    "program_build_info kernel_arg_info kernel_work_group_info buffer_create_type"
)
_ULONGS = "device_type command_queue_properties mem_flags svm_mem_flags map_flags"
TYPES: dict[str, Any] = {
    "void": None,
    "void *": ctypes.c_void_p,
    "size_t": ctypes.c_size_t,
    "cl_int": ctypes.c_int,
    **{f"cl_{name}": ctypes.c_uint for name in _UINTS.split()},
    **{f"cl_{name}": ctypes.c_uint64 for name in _ULONGS.split()},
    **{f"cl_{name}": ctypes.c_void_p for name in _HANDLES.split()},
    **dict.fromkeys(CALLBACKS, ctypes.c_void_p),
}


def _ctype(text: str) -> Any:
    return ctypes.c_void_p if text.endswith("*") else TYPES[text]


def prototype(row: Function) -> Any:
    """The ctypes function type of a row."""
    arguments = (_ctype(text.strip()) for text in row.types.split(","))
    return ctypes.CFUNCTYPE(TYPES[row.result], *arguments)


# -- the library -----------------------------------------------------------------------------------


class Library(Protocol):
    """A loaded library: ``library[symbol]`` is a new function object, or AttributeError."""

    def __getitem__(self, symbol: str, /) -> Any: ...


class Api:
    """The functions of the loader, as attributes by name.

    A name that is missing raises Unsupported when it is used. Raises HalError when the library
    lacks what nothing works without.
    """

    def __init__(self, library: Library) -> None:
        self._library = library  # the functions live as long as it does
        missing: dict[str, str] = {}
        for row in FUNCTIONS:
            if row.extension:
                continue
            try:
                address = ctypes.cast(library[row.name], ctypes.c_void_p).value
            except AttributeError:
                missing[row.name] = row.group
                continue
            self._bind(row, address or 0)
        needed = sorted(name for name, group in missing.items() if not group)
        if needed:
            raise HalError(
                f"{LIBRARY} has no {', '.join(needed)}: it is older than OpenCL 1.2. Install a "
                "newer loader (Debian: apt install ocl-icd-libopencl1)",
                code="broken",
                driver=NAME,
                op="open",
            )
        self.off = frozenset(missing.values())
        """Inner groups that the loader cannot serve."""

    def _bind(self, row: Function, address: int) -> None:
        function = prototype(row)(address)
        function.__name__ = row.name
        setattr(self, row.name, function)

    def extended(self, platform: int, group: str) -> Extended | None:
        """The functions of a platform's extension; None when it does not give all of them."""
        return Extended.of(self, platform, group)

    def __getattr__(self, name: str) -> Any:
        raise Unsupported(
            f"this OpenCL loader has no {name}; a newer one has",
            code="unsupported",
            driver=NAME,
            op=name,
        )


class Extended:
    """Functions that one platform gives for an extension, as attributes by name."""

    @classmethod
    def of(cls, api: Api, platform: int, group: str) -> Extended | None:
        self = cls()
        for row in FUNCTIONS:
            if row.group != group or not row.extension:
                continue
            address = api.clGetExtensionFunctionAddressForPlatform(platform, row.name.encode())
            if not address:
                return None
            function = prototype(row)(address)
            function.__name__ = row.name
            setattr(self, row.name, function)
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def address_of(function: Any) -> int:
    """The C address behind a function of the table."""
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@cache
def load() -> Api:
    """The machine's loader, bound once. Raises DriverMissing, or HalError for one too old."""
    try:
        return Api(ctypes.CDLL(LIBRARY))
    except OSError as error:
        found = opencl_loader.load_wheels_loader()
        if found is None:
            raise missing.unloadable(LIBRARY, error, driver=NAME) from error
        return Api(found)
