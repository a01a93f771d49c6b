"""The CUDA driver API as a declared table: functions, structures, enum values.

Each row names what the vendor's manual names, the symbol that ``libcuda`` exports, the C types of
the arguments and the driver version that brought it. Rows of one name are versions of it, the
newest first; the first that the library has is taken. All rows are compared with the vendor's
``cuda.h`` and ``cudaTypedefs.h`` by the tests.

11.0 is the oldest driver served. A name with a ``group`` may be missing: the group is then off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal import missing

NAME = "cuda"
LIBRARY = "libcuda.so.1"
SELECTED = "DRIVETRAIN_CUDA_LIBRARY"
"""The path of another ``libcuda``, which is then asked what devices there are, instead of NVML."""
OLDEST = 11000
"""Driver versions are written as CUDA writes them: 1000 * major + 10 * minor."""


@dataclass(frozen=True)
class Function:
    """One function of the library."""

    name: str
    symbol: str
    types: str
    """C types of the arguments, separated by commas."""
    since: int
    group: str = ""
    """What is off without it: a group of the SPI, or a word of `INNER_GROUPS`; empty: nothing
    works without it."""


INNER_GROUPS = {
    "pool": "memory allocated in a stream's order",
    "context_event": "an event for all that a context does",
    "eager": "kernels loaded before their first launch",
    "parameters": "a kernel's arguments told by the driver",
    "names": "a device's name, memory and place, told by a library that was selected",
}
"""Groups that only this driver knows of; without one, an older way is taken."""

_STREAM = "CUstream"
_LAUNCH = "unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int"


def _rows() -> Iterable[Function]:
    def row(name: str, types: str, since: int, group: str = "", symbol: str = "") -> Function:
        return Function(name, symbol or name, types, since, group)

    # -- the driver and its devices
    yield row("cuInit", "unsigned int", 2000)
    yield row("cuDriverGetVersion", "int *", 2020)
    yield row("cuGetErrorName", "CUresult, const char **", 6000)
    yield row("cuGetErrorString", "CUresult, const char **", 6000)
    yield row("cuDeviceGetCount", "int *", 2000)
    yield row("cuDeviceGet", "CUdevice *, int", 2000)
    yield row("cuDeviceGetUuid", "CUuuid *, CUdevice", 11040, symbol="cuDeviceGetUuid_v2")
    yield row("cuDeviceGetUuid", "CUuuid *, CUdevice", 9020)
    yield row("cuDeviceGetAttribute", "int *, CUdevice_attribute, CUdevice", 2000)
    yield row("cuDeviceGetName", "char *, int, CUdevice", 2000, "names")
    yield row("cuDeviceTotalMem", "size_t *, CUdevice", 3020, "names", symbol="cuDeviceTotalMem_v2")
    yield row("cuDeviceGetPCIBusId", "char *, int, CUdevice", 4010, "names")
    # -- the context
    yield row("cuDevicePrimaryCtxRetain", "CUcontext *, CUdevice", 7000)
    yield row("cuDevicePrimaryCtxRelease", "CUdevice", 11000, symbol="cuDevicePrimaryCtxRelease_v2")
    yield row("cuCtxGetCurrent", "CUcontext *", 4000)
    yield row("cuCtxSetCurrent", "CUcontext", 4000)
    yield row("cuCtxPushCurrent", "CUcontext", 4000, symbol="cuCtxPushCurrent_v2")
    yield row("cuCtxPopCurrent", "CUcontext *", 4000, symbol="cuCtxPopCurrent_v2")
    yield row("cuCtxSynchronize", "void", 2000)
    yield row("cuCtxRecordEvent", "CUcontext, CUevent", 12050, "context_event")
    yield row("cuCtxGetStreamPriorityRange", "int *, int *", 5050)
    # -- memory
    yield row("cuMemGetInfo", "size_t *, size_t *", 3020, symbol="cuMemGetInfo_v2")
    yield row("cuMemAlloc", "CUdeviceptr *, size_t", 3020, symbol="cuMemAlloc_v2")
    yield row("cuMemFree", "CUdeviceptr", 3020, symbol="cuMemFree_v2")
    yield row("cuMemAllocAsync", "CUdeviceptr *, size_t, CUstream", 11020, "pool")
    yield row("cuMemFreeAsync", "CUdeviceptr, CUstream", 11020, "pool")
    yield row("cuDeviceGetMemPool", "CUmemoryPool *, CUdevice", 11020, "pool")
    yield row("cuMemPoolSetAttribute", "CUmemoryPool, CUmemPool_attribute, void *", 11020, "pool")
    yield row("cuMemPoolGetAttribute", "CUmemoryPool, CUmemPool_attribute, void *", 11020, "pool")
    yield row("cuMemPoolTrimTo", "CUmemoryPool, size_t", 11020, "pool")
    yield row("cuMemPoolSetAccess", "CUmemoryPool, const CUmemAccessDesc *, size_t", 11020, "pool")
    yield row("cuMemHostAlloc", "void **, size_t, unsigned int", 2020, "pinned")
    yield row("cuMemFreeHost", "void *", 2000, "pinned")
    yield row(
        "cuMemHostRegister",
        "void *, size_t, unsigned int",
        6050,
        "pinned",
        symbol="cuMemHostRegister_v2",
    )
    yield row("cuMemHostUnregister", "void *", 4000, "pinned")
    yield row("cuMemAllocManaged", "CUdeviceptr *, size_t, unsigned int", 6000, "managed")
    yield row("cuPointerGetAttribute", "void *, CUpointer_attribute, CUdeviceptr", 4000)
    # -- copies and fills
    yield row("cuMemcpyAsync", f"CUdeviceptr, CUdeviceptr, size_t, {_STREAM}", 4000)
    yield row(
        "cuMemcpyHtoDAsync",
        f"CUdeviceptr, const void *, size_t, {_STREAM}",
        3020,
        symbol="cuMemcpyHtoDAsync_v2",
    )
    yield row(
        "cuMemcpyDtoHAsync",
        f"void *, CUdeviceptr, size_t, {_STREAM}",
        3020,
        symbol="cuMemcpyDtoHAsync_v2",
    )
    yield row(
        "cuMemcpyDtoDAsync",
        f"CUdeviceptr, CUdeviceptr, size_t, {_STREAM}",
        3020,
        symbol="cuMemcpyDtoDAsync_v2",
    )
    yield row("cuMemsetD8Async", f"CUdeviceptr, unsigned char, size_t, {_STREAM}", 3020)
    yield row("cuMemsetD16Async", f"CUdeviceptr, unsigned short, size_t, {_STREAM}", 3020)
    yield row("cuMemsetD32Async", f"CUdeviceptr, unsigned int, size_t, {_STREAM}", 3020)
    yield row(
        "cuMemsetD2D32Async",
        f"CUdeviceptr, size_t, unsigned int, size_t, size_t, {_STREAM}",
        3020,
    )
    # -- streams and events
    yield row("cuStreamCreateWithPriority", "CUstream *, unsigned int, int", 5050)
    yield row("cuStreamDestroy", "CUstream", 4000, symbol="cuStreamDestroy_v2")
    yield row("cuStreamQuery", "CUstream", 2000)
    yield row("cuStreamWaitEvent", "CUstream, CUevent, unsigned int", 3020)
    yield row("cuStreamIsCapturing", "CUstream, CUstreamCaptureStatus *", 10000)
    yield row("cuEventCreate", "CUevent *, unsigned int", 2000)
    yield row("cuEventDestroy", "CUevent", 4000, symbol="cuEventDestroy_v2")
    yield row("cuEventRecord", "CUevent, CUstream", 2000)
    yield row("cuEventQuery", "CUevent", 2000)
    yield row(
        "cuEventElapsedTime",
        "float *, CUevent, CUevent",
        12080,
        "timing",
        symbol="cuEventElapsedTime_v2",
    )
    yield row("cuEventElapsedTime", "float *, CUevent, CUevent", 2000, "timing")
    # -- group compute
    yield row(
        "cuModuleLoadDataEx",
        "CUmodule *, const void *, unsigned int, CUjit_option *, void **",
        2010,
        "compute",
    )
    yield row("cuModuleUnload", "CUmodule", 2000, "compute")
    yield row("cuModuleGetFunction", "CUfunction *, CUmodule, const char *", 2000, "compute")
    yield row("cuFuncGetAttribute", "int *, CUfunction_attribute, CUfunction", 2020, "compute")
    yield row("cuFuncSetAttribute", "CUfunction, CUfunction_attribute, int", 9000, "compute")
    yield row("cuFuncLoad", "CUfunction", 12040, "eager")
    yield row("cuFuncGetParamInfo", "CUfunction, size_t, size_t *, size_t *", 12040, "parameters")
    yield row(
        "cuLaunchKernel",
        f"CUfunction, {_LAUNCH}, unsigned int, CUstream, void **, void **",
        4000,
        "compute",
    )
    # -- group graphs
    yield row(
        "cuStreamBeginCapture",
        "CUstream, CUstreamCaptureMode",
        10010,
        "graphs",
        symbol="cuStreamBeginCapture_v2",
    )
    yield row("cuStreamEndCapture", "CUstream, CUgraph *", 10000, "graphs")
    yield row(
        "cuGraphInstantiate",
        "CUgraphExec *, CUgraph, unsigned long long",
        11040,
        "graphs",
        symbol="cuGraphInstantiateWithFlags",
    )
    yield row(
        "cuGraphInstantiate",
        "CUgraphExec *, CUgraph, CUgraphNode *, char *, size_t",
        11000,
        "graphs",
        symbol="cuGraphInstantiate_v2",
    )
    yield row("cuGraphLaunch", "CUgraphExec, CUstream", 10000, "graphs")
    yield row("cuGraphExecDestroy", "CUgraphExec", 10000, "graphs")
    yield row("cuGraphDestroy", "CUgraph", 10000, "graphs")
    yield row("cuGraphGetNodes", "CUgraph, CUgraphNode *, size_t *", 10000, "graphs")
    yield row("cuGraphGetEdges", "CUgraph, CUgraphNode *, CUgraphNode *, size_t *", 10000, "graphs")
    yield row("cuGraphNodeGetType", "CUgraphNode, CUgraphNodeType *", 10000, "graphs")
    for name, since, const in (
        ("cuGraphKernelNodeGetParams", 10000, ""),
        ("cuGraphExecKernelNodeSetParams", 10010, "const "),
    ):
        first = "CUgraphExec, CUgraphNode" if const else "CUgraphNode"
        yield row(
            name,
            f"{first}, {const}CUDA_KERNEL_NODE_PARAMS_v2 *",
            12000,
            "graphs",
            symbol=f"{name}_v2",
        )
        yield row(name, f"{first}, {const}CUDA_KERNEL_NODE_PARAMS_v1 *", since, "graphs")
    # -- group peer
    yield row("cuDeviceCanAccessPeer", "int *, CUdevice, CUdevice", 4000, "peer")
    yield row("cuCtxEnablePeerAccess", "CUcontext, unsigned int", 4000, "peer")
    yield row(
        "cuMemcpyPeerAsync",
        f"CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, {_STREAM}",
        4000,
        "peer",
    )
    # -- memory of another process (see cuda_ipc)
    yield row(
        "cuMemGetAddressRange",
        "CUdeviceptr *, size_t *, CUdeviceptr",
        3020,
        "ipc",
        symbol="cuMemGetAddressRange_v2",
    )
    yield row("cuIpcGetMemHandle", "CUipcMemHandle *, CUdeviceptr", 4010, "ipc")
    yield row(
        "cuIpcOpenMemHandle",
        "CUdeviceptr *, CUipcMemHandle, unsigned int",
        11000,
        "ipc",
        symbol="cuIpcOpenMemHandle_v2",
    )
    yield row("cuIpcCloseMemHandle", "CUdeviceptr", 4010, "ipc")


FUNCTIONS = tuple(_rows())


# -- enum values -----------------------------------------------------------------------------------


class Cu:
    """Enum values and flags, each under its name in ``cuda.h`` less the ``CU_``."""

    STREAM_NON_BLOCKING = 1
    STREAM_LEGACY = 1
    EVENT_DEFAULT = 0
    EVENT_DISABLE_TIMING = 2
    MEM_ATTACH_GLOBAL = 1
    MEMHOSTALLOC_PORTABLE = 1
    MEMHOSTREGISTER_PORTABLE = 1
    MEMORYTYPE_HOST = 1
    POINTER_ATTRIBUTE_MEMORY_TYPE = 2
    MEMPOOL_ATTR_RELEASE_THRESHOLD = 4
    MEMPOOL_ATTR_RESERVED_MEM_CURRENT = 5
    MEMPOOL_ATTR_USED_MEM_CURRENT = 7
    MEM_LOCATION_TYPE_DEVICE = 1
    MEM_ACCESS_FLAGS_PROT_READWRITE = 3
    JIT_INFO_LOG_BUFFER = 3
    JIT_INFO_LOG_BUFFER_SIZE_BYTES = 4
    JIT_ERROR_LOG_BUFFER = 5
    JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6
    FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0
    FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
    FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3
    FUNC_ATTRIBUTE_NUM_REGS = 4
    FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    STREAM_CAPTURE_STATUS_NONE = 0
    STREAM_CAPTURE_MODE_RELAXED = 2
    GRAPH_NODE_TYPE_KERNEL = 0
    IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1
    DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 1
    DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X = 2
    DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y = 3
    DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z = 4
    DEVICE_ATTRIBUTE_MAX_GRID_DIM_X = 5
    DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y = 6
    DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z = 7
    DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK = 8
    DEVICE_ATTRIBUTE_CLOCK_RATE = 13
    DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36
    DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    DEVICE_ATTRIBUTE_MANAGED_MEMORY = 83
    DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS = 89
    DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
    DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES = 100
    DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115


class Code:
    """Results, each under its name in ``cuda.h`` less the ``CUDA_``."""

    SUCCESS = 0
    ERROR_INVALID_VALUE = 1
    ERROR_OUT_OF_MEMORY = 2
    ERROR_DEINITIALIZED = 4
    ERROR_CALL_REQUIRES_NEWER_DRIVER = 36
    ERROR_DEVICE_UNAVAILABLE = 46
    ERROR_NO_DEVICE = 100
    ERROR_INVALID_IMAGE = 200
    ERROR_NO_BINARY_FOR_GPU = 209
    ERROR_ECC_UNCORRECTABLE = 214
    ERROR_UNSUPPORTED_LIMIT = 215
    ERROR_PEER_ACCESS_UNSUPPORTED = 217
    ERROR_INVALID_PTX = 218
    ERROR_NVLINK_UNCORRECTABLE = 220
    ERROR_JIT_COMPILER_NOT_FOUND = 221
    ERROR_UNSUPPORTED_PTX_VERSION = 222
    ERROR_JIT_COMPILATION_DISABLED = 223
    ERROR_CONTAINED = 226
    ERROR_INVALID_SOURCE = 300
    ERROR_LOSSY_QUERY = 402
    ERROR_NOT_FOUND = 500
    ERROR_NOT_READY = 600
    ERROR_ILLEGAL_ADDRESS = 700
    ERROR_LAUNCH_OUT_OF_RESOURCES = 701
    ERROR_LAUNCH_TIMEOUT = 702
    ERROR_PEER_ACCESS_ALREADY_ENABLED = 704
    ERROR_CONTEXT_IS_DESTROYED = 709
    ERROR_ASSERT = 710
    ERROR_TOO_MANY_PEERS = 711
    ERROR_HARDWARE_STACK_ERROR = 714
    ERROR_ILLEGAL_INSTRUCTION = 715
    ERROR_MISALIGNED_ADDRESS = 716
    ERROR_INVALID_ADDRESS_SPACE = 717
    ERROR_INVALID_PC = 718
    ERROR_LAUNCH_FAILED = 719
    ERROR_TENSOR_MEMORY_LEAK = 721
    ERROR_NOT_SUPPORTED = 801
    ERROR_MPS_CLIENT_TERMINATED = 810
    ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    ERROR_STREAM_CAPTURE_WRONG_THREAD = 908
    ERROR_EXTERNAL_DEVICE = 911


# -- structures ------------------------------------------------------------------------------------


class Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class MemAccessDesc(ctypes.Structure):
    """``location`` laid out flat."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int), ("flags", ctypes.c_int))


_KERNEL_NODE = (
    ("func", ctypes.c_void_p),
    ("gridDimX", ctypes.c_uint),
    ("gridDimY", ctypes.c_uint),
    ("gridDimZ", ctypes.c_uint),
    ("blockDimX", ctypes.c_uint),
    ("blockDimY", ctypes.c_uint),
    ("blockDimZ", ctypes.c_uint),
    ("sharedMemBytes", ctypes.c_uint),
    ("kernelParams", ctypes.c_void_p),
    ("extra", ctypes.c_void_p),
)


class KernelNode1(ctypes.Structure):
    _fields_ = _KERNEL_NODE


class KernelNode2(ctypes.Structure):
    _fields_ = (*_KERNEL_NODE, ("kern", ctypes.c_void_p), ("ctx", ctypes.c_void_p))


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "CUuuid": Uuid,
    "CUipcMemHandle": IpcHandle,
    "CUmemAccessDesc": MemAccessDesc,
    "CUDA_KERNEL_NODE_PARAMS_v1": KernelNode1,
    "CUDA_KERNEL_NODE_PARAMS_v2": KernelNode2,
}

_HANDLES = "context stream event module function graph graphNode graphExec memoryPool"
_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned char": ctypes.c_ubyte,
    "unsigned short": ctypes.c_ushort,
    "unsigned long long": ctypes.c_ulonglong,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUfunction_attribute": ctypes.c_int,
    "CUmemPool_attribute": ctypes.c_int,
    "CUpointer_attribute": ctypes.c_int,
    "CUipcMemHandle": IpcHandle,
    "CUstreamCaptureMode": ctypes.c_int,
    **{f"CU{handle}": ctypes.c_void_p for handle in _HANDLES.split()},
}


def _ctype(text: str) -> Any:
    return ctypes.c_void_p if text.endswith("*") else _TYPES[text]


def argument_types(types: str) -> tuple[Any, ...]:
    """The ctypes of a row's arguments."""
    return () if types == "void" else tuple(_ctype(text.strip()) for text in types.split(","))


# -- the library -----------------------------------------------------------------------------------


class Library(Protocol):
    """A loaded library: ``library[symbol]`` is a new function object, or AttributeError."""

    def __getitem__(self, symbol: str, /) -> Any: ...


class Api:
    """The functions of one library, as attributes by name.

    A name that is missing raises Unsupported when it is used. Raises HalError when the library
    lacks what nothing works without.
    """

    driver = NAME
    functions: Iterable[Function] = FUNCTIONS
    too_old = (
        f"{LIBRARY} has no {{}}: it is older than the CUDA 11.0 driver (450.36). Install a newer "
        "NVIDIA driver"
    )
    lacks = "this NVIDIA driver has no {}; a newer driver has"

    def __init__(self, library: Library) -> None:
        self.symbols: dict[str, str] = {}
        """Name -> the symbol that was taken."""
        missing: dict[str, str] = {}
        for row in self.functions:
            if row.name in self.symbols:
                continue
            try:
                function = library[row.symbol]
            except AttributeError:
                missing[row.name] = row.group
                continue
            function.argtypes = self.argument_types(row)
            function.restype = ctypes.c_int
            setattr(self, row.name, function)
            self.symbols[row.name] = row.symbol
        lacking = {name: group for name, group in missing.items() if name not in self.symbols}
        called = {row.name: row.symbol for row in self.functions}
        needed = sorted(called[name] for name, group in lacking.items() if not group)
        if needed:
            raise HalError(
                self.too_old.format(", ".join(needed)),
                code="broken",
                driver=self.driver,
                op="open",
            )
        self.off = frozenset(lacking.values())
        """Groups that the library cannot serve."""
        self.is_fake = _has(library, "drivetrain_fake")
        """It says of itself that it stands in for the vendor's library in tests."""

    def __getattr__(self, name: str) -> Any:
        symbol = next((row.symbol for row in self.functions if row.name == name), name)
        raise Unsupported(
            self.lacks.format(symbol), code="unsupported", driver=self.driver, op=symbol
        )

    @staticmethod
    def argument_types(row: Function) -> tuple[Any, ...]:
        return argument_types(row.types)

    def kernel_node(
        self,
        function: int = 0,
        grid: tuple[int, int, int] = (0, 0, 0),
        block: tuple[int, int, int] = (0, 0, 0),
        shared: int = 0,
        arguments: int = 0,
    ) -> Any:
        """A kernel's launch as a node of a graph has it: the newer form, which begins with the
        older one, so that either version of a function finds its own."""
        return KernelNode2(function, *grid, *block, shared, arguments or None)

    def in_host_memory(self, code: Callable[..., int], ptr: int) -> bool | None:
        """True: pinned, False: a device's or managed, None: pageable. ``code`` makes the call."""
        box = ctypes.c_uint()
        failed = code(
            self.cuPointerGetAttribute,
            ctypes.byref(box),
            Cu.POINTER_ATTRIBUTE_MEMORY_TYPE,
            ptr,
        )
        return None if failed or not box.value else box.value == Cu.MEMORYTYPE_HOST

    def version(self) -> int:
        """The newest CUDA that the driver serves: 13000 for 13.0."""
        found = ctypes.c_int()
        self.cuDriverGetVersion(ctypes.byref(found))
        return found.value

    def words(self, code: int) -> tuple[str, str]:
        """(name, sentence) of a result."""
        found = []
        for function in (self.cuGetErrorName, self.cuGetErrorString):
            text = ctypes.c_char_p()
            function(code, ctypes.byref(text))
            found.append((text.value or b"").decode(errors="replace"))
        return found[0] or f"CUDA error {code}", found[1]


def _has(library: Library, symbol: str) -> bool:
    try:
        library[symbol]
    except AttributeError:
        return False
    return True


@cache
def load() -> Api:
    """The ``libcuda`` that `SELECTED` names, else the machine's, bound once. Raises DriverMissing
    where it is not there, HalError for one that does not load or is too old."""
    name = os.environ.get(SELECTED, "") or LIBRARY
    try:
        return Api(ctypes.CDLL(name))
    except OSError as error:
        raise missing.unloadable(name, error, driver=NAME) from error
