"""AMD's HIP as a declared table: functions, structures, enum values.

HIP is CUDA's API under other names, so each row is named as CUDA names it and says what
``libamdhip64`` calls it: what is written for the one then serves the other. Rows of one name are
versions of it, the newest first; the first that the library has is taken. What a library can do is
seen from its symbols, never from its version. All rows are compared by the tests with the vendor's
headers: HIP 5.2's and HIP 7.1's.

Served are ROCm 5.7 to 7. What changed within them, and what is done about it:

* ``hipDeviceProp_t`` has 792 bytes before ROCm 6 and 1,472 after, under one name and two symbols.
  It is read for the architecture's name alone, which no attribute tells.
* ``hipMemoryType`` was numbered anew in ROCm 6: it is never read; whether memory is pinned is asked
  of ``hipHostGetFlags``.
* ``hipGraphNodeTypeKernel`` was 1 before ROCm 5.3 and is 0 now: a library without
  ``hipGraphUpload``, which is as new, has no graphs here.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.drivers.cuda_api import Api, Function, Library, MemAccessDesc

NAME = "hip"
SELECTED = "DRIVETRAIN_HIP_LIBRARY"
LIBRARIES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")
FOLDERS = (
    "opt/rocm/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
)

_STREAM = "hipStream_t"
_DIMS = "unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int"

INNER_GROUPS = {
    "pool": "memory allocated in a stream's order",
    "tables": "4-byte words set at a distance",
    "contexts": "the current device as a pointer, for launches from C",
}
"""Groups that only this driver knows of; without one, another way is taken."""


def _rows() -> Iterable[Function]:
    def row(name: str, symbol: str, types: str, group: str = "") -> Function:
        return Function(name, symbol, types, 0, group)

    # -- the library and its devices
    yield row("cuInit", "hipInit", "unsigned int")
    yield row("cuDriverGetVersion", "hipDriverGetVersion", "int *")
    yield row("hipGetErrorName", "hipGetErrorName", "hipError_t")
    yield row("hipGetErrorString", "hipGetErrorString", "hipError_t")
    yield row("hipGetLastError", "hipGetLastError", "void")
    yield row("cuDeviceGetCount", "hipGetDeviceCount", "int *")
    yield row("cuDeviceGetUuid", "hipDeviceGetUuid", "hipUUID *, hipDevice_t")
    yield row("cuDeviceGetName", "hipDeviceGetName", "char *, int, hipDevice_t")
    yield row("cuDeviceGetPCIBusId", "hipDeviceGetPCIBusId", "char *, int, int")
    yield row("cuDeviceTotalMem", "hipDeviceTotalMem", "size_t *, hipDevice_t")
    yield row("cuDeviceGetAttribute", "hipDeviceGetAttribute", "int *, hipDeviceAttribute_t, int")
    for symbol, kind in (
        ("hipGetDevicePropertiesR0600", "hipDeviceProp_tR0600"),
        ("hipGetDeviceProperties", "hipDeviceProp_t"),
    ):
        yield row("cudaGetDeviceProperties", symbol, f"{kind} *, int")
    # -- which device a call is for
    yield row("cudaGetDevice", "hipGetDevice", "int *")
    yield row("cudaSetDevice", "hipSetDevice", "int")
    yield row("cuCtxGetCurrent", "hipCtxGetCurrent", "hipCtx_t *", "contexts")
    yield row("cuCtxSetCurrent", "hipCtxSetCurrent", "hipCtx_t", "contexts")
    yield row("cuCtxSynchronize", "hipDeviceSynchronize", "void")
    yield row("cuCtxGetStreamPriorityRange", "hipDeviceGetStreamPriorityRange", "int *, int *")
    # -- memory
    yield row("cuMemGetInfo", "hipMemGetInfo", "size_t *, size_t *")
    yield row("cuMemAlloc", "hipMalloc", "void **, size_t")
    yield row("cuMemFree", "hipFree", "void *")
    yield row("cuMemAllocAsync", "hipMallocAsync", f"void **, size_t, {_STREAM}", "pool")
    yield row("cuMemFreeAsync", "hipFreeAsync", f"void *, {_STREAM}", "pool")
    yield row("cuDeviceGetMemPool", "hipDeviceGetMemPool", "hipMemPool_t *, int", "pool")
    for name in ("MemPoolSetAttribute", "MemPoolGetAttribute"):
        yield row(f"cu{name}", f"hip{name}", "hipMemPool_t, hipMemPoolAttr, void *", "pool")
    yield row("cuMemPoolTrimTo", "hipMemPoolTrimTo", "hipMemPool_t, size_t", "pool")
    yield row(
        "cuMemPoolSetAccess",
        "hipMemPoolSetAccess",
        "hipMemPool_t, const hipMemAccessDesc *, size_t",
        "pool",
    )
    yield row("cuMemHostAlloc", "hipHostMalloc", "void **, size_t, unsigned int", "pinned")
    yield row("cuMemFreeHost", "hipHostFree", "void *", "pinned")
    yield row("cuMemHostRegister", "hipHostRegister", "void *, size_t, unsigned int", "pinned")
    yield row("cuMemHostUnregister", "hipHostUnregister", "void *", "pinned")
    yield row("cuMemHostGetFlags", "hipHostGetFlags", "unsigned int *, void *")
    yield row("cuMemAllocManaged", "hipMallocManaged", "void **, size_t, unsigned int", "managed")
    # -- copies and fills
    yield row(
        "cudaMemcpyAsync",
        "hipMemcpyAsync",
        f"void *, const void *, size_t, hipMemcpyKind, {_STREAM}",
    )
    yield row(
        "cuMemcpyHtoDAsync",
        "hipMemcpyHtoDAsync",
        f"hipDeviceptr_t, const void *, size_t, {_STREAM}",
    )
    yield row(
        "cuMemcpyDtoHAsync", "hipMemcpyDtoHAsync", f"void *, hipDeviceptr_t, size_t, {_STREAM}"
    )
    yield row(
        "cuMemcpyDtoDAsync",
        "hipMemcpyDtoDAsync",
        f"hipDeviceptr_t, hipDeviceptr_t, size_t, {_STREAM}",
    )
    for bits, kind in ((8, "unsigned char"), (16, "unsigned short"), (32, "int")):
        types = f"hipDeviceptr_t, {kind}, size_t, {_STREAM}"
        yield row(f"cuMemsetD{bits}Async", f"hipMemsetD{bits}Async", types)
    yield row(
        "cuMemsetD2D32Async",
        "hipMemsetD2D32Async",
        f"hipDeviceptr_t, size_t, unsigned int, size_t, size_t, {_STREAM}",
        "tables",
    )
    yield row(
        "cuMemsetD2D8Async",
        "hipMemset2DAsync",
        f"void *, size_t, int, size_t, size_t, {_STREAM}",
    )
    # -- streams and events
    yield row(
        "cuStreamCreateWithPriority",
        "hipStreamCreateWithPriority",
        f"{_STREAM} *, unsigned int, int",
    )
    yield row("cuStreamDestroy", "hipStreamDestroy", _STREAM)
    yield row("cuStreamQuery", "hipStreamQuery", _STREAM)
    yield row("cuStreamWaitEvent", "hipStreamWaitEvent", f"{_STREAM}, hipEvent_t, unsigned int")
    yield row("cuStreamIsCapturing", "hipStreamIsCapturing", f"{_STREAM}, hipStreamCaptureStatus *")
    yield row("cuEventCreate", "hipEventCreateWithFlags", "hipEvent_t *, unsigned int")
    yield row("cuEventDestroy", "hipEventDestroy", "hipEvent_t")
    yield row("cuEventRecord", "hipEventRecord", f"hipEvent_t, {_STREAM}")
    yield row("cuEventQuery", "hipEventQuery", "hipEvent_t")
    yield row(
        "cuEventElapsedTime", "hipEventElapsedTime", "float *, hipEvent_t, hipEvent_t", "timing"
    )
    # -- group compute
    yield row("cuModuleLoadData", "hipModuleLoadData", "hipModule_t *, const void *", "compute")
    yield row("cuModuleUnload", "hipModuleUnload", "hipModule_t", "compute")
    yield row(
        "cuModuleGetFunction",
        "hipModuleGetFunction",
        "hipFunction_t *, hipModule_t, const char *",
        "compute",
    )
    yield row(
        "cuFuncGetAttribute",
        "hipFuncGetAttribute",
        "int *, hipFunction_attribute, hipFunction_t",
        "compute",
    )
    yield row(
        "cuLaunchKernel",
        "hipModuleLaunchKernel",
        f"hipFunction_t, {_DIMS}, unsigned int, {_STREAM}, void **, void **",
        "compute",
    )
    # -- group graphs
    yield row("cuGraphUpload", "hipGraphUpload", f"hipGraphExec_t, {_STREAM}", "graphs")
    yield row(
        "cuStreamBeginCapture",
        "hipStreamBeginCapture",
        f"{_STREAM}, hipStreamCaptureMode",
        "graphs",
    )
    yield row("cuStreamEndCapture", "hipStreamEndCapture", f"{_STREAM}, hipGraph_t *", "graphs")
    yield row(
        "cuGraphInstantiate",
        "hipGraphInstantiateWithFlags",
        "hipGraphExec_t *, hipGraph_t, unsigned long long",
        "graphs",
    )
    yield row("cuGraphLaunch", "hipGraphLaunch", f"hipGraphExec_t, {_STREAM}", "graphs")
    yield row("cuGraphExecDestroy", "hipGraphExecDestroy", "hipGraphExec_t", "graphs")
    yield row("cuGraphDestroy", "hipGraphDestroy", "hipGraph_t", "graphs")
    yield row(
        "cuGraphGetNodes", "hipGraphGetNodes", "hipGraph_t, hipGraphNode_t *, size_t *", "graphs"
    )
    yield row(
        "cuGraphGetEdges",
        "hipGraphGetEdges",
        "hipGraph_t, hipGraphNode_t *, hipGraphNode_t *, size_t *",
        "graphs",
    )
    yield row(
        "cuGraphNodeGetType", "hipGraphNodeGetType", "hipGraphNode_t, hipGraphNodeType *", "graphs"
    )
    yield row(
        "cuGraphKernelNodeGetParams",
        "hipGraphKernelNodeGetParams",
        "hipGraphNode_t, hipKernelNodeParams *",
        "graphs",
    )
    yield row(
        "cuGraphExecKernelNodeSetParams",
        "hipGraphExecKernelNodeSetParams",
        "hipGraphExec_t, hipGraphNode_t, const hipKernelNodeParams *",
        "graphs",
    )
    # -- group peer
    yield row("cuDeviceCanAccessPeer", "hipDeviceCanAccessPeer", "int *, int, int", "peer")
    yield row(
        "cudaDeviceEnablePeerAccess", "hipDeviceEnablePeerAccess", "int, unsigned int", "peer"
    )
    yield row(
        "cudaMemcpyPeerAsync",
        "hipMemcpyPeerAsync",
        f"void *, int, const void *, int, size_t, {_STREAM}",
        "peer",
    )


FUNCTIONS = tuple(_rows())


# -- enum values -----------------------------------------------------------------------------------


class Hip:
    """Enum values, each under its name in the headers less the ``hip``. Flags, results and what
    else `cuda_api` names have CUDA's values in HIP, which the tests compare too."""

    DeviceAttributeClockRate = 5
    DeviceAttributeConcurrentManagedAccess = 9
    DeviceAttributeManagedMemory = 24
    DeviceAttributeMaxBlockDimX = 26
    DeviceAttributeMaxBlockDimY = 27
    DeviceAttributeMaxBlockDimZ = 28
    DeviceAttributeMaxGridDimX = 29
    DeviceAttributeMaxGridDimY = 30
    DeviceAttributeMaxGridDimZ = 31
    DeviceAttributeMaxThreadsPerBlock = 56
    DeviceAttributeMemoryClockRate = 60
    DeviceAttributeMultiprocessorCount = 63
    DeviceAttributeMaxSharedMemoryPerBlock = 74
    DeviceAttributeWarpSize = 87
    DeviceAttributeMemoryPoolsSupported = 88
    MemcpyDefault = 4
    ErrorInvalidDevice = 101
    ErrorInvalidKernelFile = 218
    ErrorSharedObjectInitFailed = 303


# -- structures ------------------------------------------------------------------------------------


class Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 16),)


class KernelNode(ctypes.Structure):
    """The fields ``blockDim`` and ``gridDim`` laid out flat."""

    _fields_ = (
        ("blockDimX", ctypes.c_uint),
        ("blockDimY", ctypes.c_uint),
        ("blockDimZ", ctypes.c_uint),
        ("extra", ctypes.c_void_p),
        ("func", ctypes.c_void_p),
        ("gridDimX", ctypes.c_uint),
        ("gridDimY", ctypes.c_uint),
        ("gridDimZ", ctypes.c_uint),
        ("kernelParams", ctypes.c_void_p),
        ("sharedMemBytes", ctypes.c_uint),
    )


PROPERTIES = {"hipDeviceProp_tR0600": (1472, 1160), "hipDeviceProp_t": (792, 396)}
"""Bytes of the structure, and where ``gcnArchName`` lies in it."""
_ROOM = 4096
"""For the structure of a library that is newer still."""

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "hipUUID": Uuid,
    "hipMemAccessDesc": MemAccessDesc,
    "hipKernelNodeParams": KernelNode,
}

_ENUMS = "Error_t DeviceAttribute_t Function_attribute MemPoolAttr MemcpyKind StreamCaptureMode"
_HANDLES = (
    "Ctx_t Deviceptr_t Event_t Function_t GraphExec_t GraphNode_t Graph_t MemPool_t Module_t "
    "Stream_t"
)
_VALUES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned char": ctypes.c_ubyte,
    "unsigned short": ctypes.c_ushort,
    "unsigned long long": ctypes.c_ulonglong,
    "size_t": ctypes.c_size_t,
    "hipDevice_t": ctypes.c_int,
    **{f"hip{name}": ctypes.c_int for name in _ENUMS.split()},
    **{f"hip{name}": ctypes.c_void_p for name in _HANDLES.split()},
}


# -- the library -----------------------------------------------------------------------------------


class HipApi(Api):
    """The functions of one ``libamdhip64``, as attributes by CUDA's names."""

    driver = NAME
    functions = FUNCTIONS
    too_old = "libamdhip64 has no {}: it is older than ROCm 5.7. Install a newer ROCm"
    lacks = "this ROCm's libamdhip64 has no {}; a newer one may"

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        for function in (self.hipGetErrorName, self.hipGetErrorString):
            function.restype = ctypes.c_char_p
        self.off |= {"context_event"}  # HIP has no event for all that a device does

        def hipMemcpyAsync(dst: int, src: int, nbytes: int, stream: int) -> int:
            return int(self.cudaMemcpyAsync(dst, src, nbytes, Hip.MemcpyDefault, stream))

        self.cuMemcpyAsync = hipMemcpyAsync

    @staticmethod
    def argument_types(row: Function) -> tuple[Any, ...]:
        words = [] if row.types == "void" else [word.strip() for word in row.types.split(",")]
        return tuple(ctypes.c_void_p if w.endswith("*") else _VALUES[w] for w in words)

    def words(self, code: int) -> tuple[str, str]:
        found = [
            (function(code) or b"").decode(errors="replace")
            for function in (self.hipGetErrorName, self.hipGetErrorString)
        ]
        return found[0] or f"HIP error {code}", found[1]

    def version(self) -> int:
        """As HIP writes it: 10,000,000 * major + 100,000 * minor + patch."""
        found = ctypes.c_int()
        self.cuDriverGetVersion(ctypes.byref(found))
        return found.value

    def version_text(self) -> str:
        number = self.version()
        return f"{number // 10**7}.{number // 10**5 % 100}.{number % 10**5}"

    def kernel_node(
        self,
        function: int = 0,
        grid: tuple[int, int, int] = (0, 0, 0),
        block: tuple[int, int, int] = (0, 0, 0),
        shared: int = 0,
        arguments: int = 0,
    ) -> Any:
        return KernelNode(*block, None, function, *grid, arguments or None, shared)

    def in_host_memory(self, code: Callable[..., int], ptr: int) -> bool | None:
        """True: pinned; False: another kind, or pageable, which HIP does not tell apart."""
        return not code(self.cuMemHostGetFlags, ctypes.byref(ctypes.c_uint()), ptr)

    def architecture(self, device: int) -> str:
        """``gfx90a:sramecc+:xnack-``; empty when the library does not tell."""
        form = "hipDeviceProp_t"
        if self.symbols["cudaGetDeviceProperties"].endswith("R0600"):
            form += "R0600"
        room = ctypes.create_string_buffer(_ROOM)
        if self.cudaGetDeviceProperties(room, device):
            self.hipGetLastError()
            return ""
        told = room.raw[PROPERTIES[form][1] :].partition(b"\0")[0]
        if not told.startswith(b"gfx"):  # a structure that is not known here
            found = re.search(rb"gfx[0-9a-f]{3,}[\w:+-]*", room.raw)
            told = found[0] if found else b""
        return told.decode(errors="replace")


def _loaded() -> str:
    """The path of the library that this process has already: torch's own, for example. Two HIP
    runtimes in one process would each think that the devices are theirs."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"(/\S*/libamdhip64\.so\S*)", maps)
    return found[1] if found else ""


def paths(root: Path = Path("/")) -> list[str]:
    """Where the library may be, the most wanted first; looks at files only. A bare name is one that
    the loader's cache knows."""
    selected = os.environ.get(SELECTED, "")
    if selected:
        return [selected] if Path(selected).is_file() else []
    homes = [os.environ.get(name, "") for name in ("ROCM_PATH", "ROCM_HOME", "HIP_PATH")]
    folders = [Path(home) / "lib" for home in homes if home]
    folders += [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    folders += [root / folder for folder in FOLDERS]
    found = [str(f / name) for f in folders for name in LIBRARIES if (f / name).is_file()]
    try:
        known = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        known = b""
    return found + [name for name in LIBRARIES if name.encode() + b"\0" in known]


@cache
def load() -> HipApi:
    """The machine's ``libamdhip64``, bound once: the one that `SELECTED` names, else the one that
    is loaded already, else the first of `paths`. Raises DriverMissing where there is none, HalError
    for one that does not load or is too old."""
    selected = os.environ.get(SELECTED, "")
    tried = [selected] if selected else [p for p in (_loaded(), *paths()) if p]
    problems = []
    for path in tried:
        try:
            return HipApi(ctypes.CDLL(path))
        except OSError as error:
            problems.append(str(error))
    if problems:
        why = "; ".join(problems)
        raise HalError(
            f"libamdhip64 cannot be loaded: {why}", code="broken", driver=NAME, op="open"
        )
    raise DriverMissing(
        "libamdhip64 is nowhere on this machine", code="driver_missing", driver=NAME, op="open"
    )
