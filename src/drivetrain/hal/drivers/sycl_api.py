"""SYCL as a declared table: functions and enum values of dpctl's C interface.

SYCL itself is C++; dpctl's ``libDPCTLSyclInterface.so`` wraps it in plain C. Only that library is
used, by its path: the Python package around it is never imported. All rows are compared by the
tests with dpctl's own headers.

An error is told by a null result and nothing else: the library catches SYCL's exceptions.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal import missing
from drivetrain.hal.drivers.cuda_api import Library

NAME = "sycl"
SELECTED = "DRIVETRAIN_SYCL_LIBRARY"
LIBRARY = "libDPCTLSyclInterface.so"
INSTALL = "pip install dpctl intel-opencl-rt intel-cmplr-lib-rt"


@dataclass(frozen=True)
class Function:
    """One function of the library; an ``optional`` one may be missing."""

    name: str
    result: str
    types: str
    optional: bool = False


_EVENT, _QUEUE = "DPCTLSyclEventRef", "const DPCTLSyclQueueRef"
_DEVICE, _CONTEXT = "const DPCTLSyclDeviceRef", "const DPCTLSyclContextRef"
_EVENTS = "const DPCTLSyclEventRef *, size_t"


def _rows() -> Iterable[Function]:
    row = Function
    # -- devices
    yield row("DPCTLDeviceMgr_GetDevices", "DPCTLDeviceVectorRef", "int")
    yield row("DPCTLDeviceVector_Size", "size_t", "DPCTLDeviceVectorRef")
    yield row("DPCTLDeviceVector_GetAt", "DPCTLSyclDeviceRef", "DPCTLDeviceVectorRef, size_t")
    yield row("DPCTLDeviceVector_Delete", "void", "DPCTLDeviceVectorRef")
    yield row("DPCTLDevice_GetBackend", "DPCTLSyclBackendType", _DEVICE)
    yield row("DPCTLDevice_GetDeviceType", "DPCTLSyclDeviceType", _DEVICE)
    yield row("DPCTLDevice_GetName", "const char *", _DEVICE)
    yield row("DPCTLDevice_GetVendor", "const char *", _DEVICE)
    yield row("DPCTLDevice_GetDriverVersion", "const char *", _DEVICE)
    yield row("DPCTLDevice_GetPlatform", "DPCTLSyclPlatformRef", _DEVICE)
    yield row("DPCTLDevice_GetGlobalMemSize", "uint64_t", _DEVICE)
    yield row("DPCTLDevice_GetLocalMemSize", "uint64_t", _DEVICE)
    yield row("DPCTLDevice_GetMaxComputeUnits", "uint32_t", _DEVICE)
    yield row("DPCTLDevice_GetMaxClockFrequency", "uint32_t", _DEVICE)
    yield row("DPCTLDevice_GetMaxWorkGroupSize", "size_t", _DEVICE)
    yield row("DPCTLDevice_GetMaxWorkItemSizes3d", "size_t *", _DEVICE)
    yield row("DPCTLDevice_HasAspect", "bool", f"{_DEVICE}, DPCTLSyclAspectType")
    yield row("DPCTLDevice_Delete", "void", "DPCTLSyclDeviceRef")
    yield row("DPCTLPlatform_GetName", "const char *", "const DPCTLSyclPlatformRef")
    yield row("DPCTLPlatform_Delete", "void", "DPCTLSyclPlatformRef")
    yield row("DPCTLCString_Delete", "void", "const char *")
    yield row("DPCTLSize_t_Array_Delete", "void", "size_t *")
    # -- contexts and queues
    yield row(
        "DPCTLContext_Create", "DPCTLSyclContextRef", f"{_DEVICE}, error_handler_callback *, int"
    )
    yield row("DPCTLContext_Delete", "void", "DPCTLSyclContextRef")
    yield row(
        "DPCTLQueue_Create",
        "DPCTLSyclQueueRef",
        f"{_CONTEXT}, {_DEVICE}, error_handler_callback *, int",
    )
    yield row("DPCTLQueue_Delete", "void", "DPCTLSyclQueueRef")
    yield row("DPCTLQueue_SubmitBarrier", _EVENT, _QUEUE)
    yield row("DPCTLQueue_SubmitBarrierForEvents", _EVENT, f"{_QUEUE}, {_EVENTS}")
    yield row("DPCTLQueue_Memcpy", _EVENT, f"{_QUEUE}, void *, const void *, size_t")
    for bits in (8, 16, 32, 64):
        yield row(f"DPCTLQueue_Fill{bits}", _EVENT, f"{_QUEUE}, void *, uint{bits}_t, size_t")
    yield row("DPCTLQueue_Fill128", _EVENT, f"{_QUEUE}, void *, uint64_t *, size_t")
    yield row(
        "DPCTLQueue_SubmitNDRange",
        _EVENT,
        f"const DPCTLSyclKernelRef, {_QUEUE}, void **, const DPCTLKernelArgType *, size_t, "
        f"const size_t *, const size_t *, size_t, {_EVENTS}",
    )
    # -- events
    yield row("DPCTLEvent_GetCommandExecutionStatus", "DPCTLSyclEventStatusType", _EVENT)
    yield row("DPCTLEvent_GetProfilingInfoEnd", "uint64_t", _EVENT)
    yield row("DPCTLEvent_Copy", _EVENT, f"const {_EVENT}")
    yield row("DPCTLEvent_Delete", "void", _EVENT)
    # -- memory
    for kind in ("device", "host", "shared"):
        yield row(f"DPCTLaligned_alloc_{kind}", "DPCTLSyclUSMRef", f"size_t, size_t, {_QUEUE}")
    yield row("DPCTLfree_with_context", "void", f"DPCTLSyclUSMRef, {_CONTEXT}")
    # -- kernels
    yield row(
        "DPCTLKernelBundle_CreateFromOCLSource",
        "DPCTLSyclKernelBundleRef",
        f"{_CONTEXT}, {_DEVICE}, const char *, const char *",
    )
    yield row(
        "DPCTLKernelBundle_CreateFromSpirv",
        "DPCTLSyclKernelBundleRef",
        f"{_CONTEXT}, {_DEVICE}, const void *, size_t, const char *",
    )
    yield row(
        "DPCTLKernelBundle_GetKernel",
        "DPCTLSyclKernelRef",
        "DPCTLSyclKernelBundleRef, const char *",
    )
    yield row("DPCTLKernelBundle_Delete", "void", "DPCTLSyclKernelBundleRef")
    yield row("DPCTLKernel_GetWorkGroupSize", "size_t", "const DPCTLSyclKernelRef")
    yield row("DPCTLKernel_GetPrivateMemSize", "size_t", "const DPCTLSyclKernelRef")
    yield row("DPCTLKernel_Delete", "void", "DPCTLSyclKernelRef")
    yield row("DPCTLRawKernelArg_Create", "DPCTLSyclRawKernelArgRef", "void *, size_t", True)
    yield row("DPCTLRawKernelArg_Delete", "void", "DPCTLSyclRawKernelArgRef", True)
    yield row("DPCTLRawKernelArg_Available", "bool", "", True)


FUNCTIONS = tuple(_rows())


# -- enum values -----------------------------------------------------------------------------------


class Dp:
    """Enum values, each under its name in dpctl's headers less the ``DPCTL_``."""

    LEVEL_ZERO = 1 << 17
    OPENCL = 1 << 18
    ALL_BACKENDS = 31 << 16
    CPU = 1 << 2
    GPU = 1 << 4
    ALL = 63
    UINT8_T = 1
    UINT16_T = 3
    UINT32_T = 5
    UINT64_T = 7
    VOID_PTR = 10
    LOCAL_ACCESSOR = 11
    RAW_KERNEL_ARG = 13
    ENABLE_PROFILING = 1
    IN_ORDER = 2
    UNKNOWN_STATUS = 0
    COMPLETE = 3


class Aspect:
    """What a device can do, each under its name in dpctl's headers."""

    queue_profiling = 11
    usm_device_allocations = 12
    usm_host_allocations = 13
    usm_atomic_shared_allocations = 17


class LocalAccessor(ctypes.Structure):
    """``MDLocalAccessor``: dynamic local memory as a kernel's argument."""

    _fields_ = (
        ("ndim", ctypes.c_size_t),
        ("dpctl_type_id", ctypes.c_int),
        ("dim0", ctypes.c_size_t),
        ("dim1", ctypes.c_size_t),
        ("dim2", ctypes.c_size_t),
    )


ErrorHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _ctype(text: str) -> Any:
    word = text.removeprefix("const ").strip()
    if word == "char *" and text.startswith("const"):
        return ctypes.c_char_p
    if word.endswith(("*", "Ref")):
        return ctypes.c_void_p
    if word.endswith("Type"):
        return ctypes.c_int
    return {
        "void": None,
        "bool": ctypes.c_bool,
        "int": ctypes.c_int,
        "size_t": ctypes.c_size_t,
        "uint8_t": ctypes.c_uint8,
        "uint16_t": ctypes.c_uint16,
        "uint32_t": ctypes.c_uint32,
        "uint64_t": ctypes.c_uint64,
    }[word]


# -- the library -----------------------------------------------------------------------------------


class Api:
    """The functions of the library, as attributes. Raises HalError when it lacks what nothing works
    without."""

    def __init__(self, library: Library) -> None:
        self._library = library
        lacking = []
        for row in FUNCTIONS:
            try:
                function = library[row.name]
            except AttributeError:
                if not row.optional:
                    lacking.append(row.name)
                continue
            words = [word for word in row.types.split(", ") if word]
            function.argtypes = tuple(_ctype(word) for word in words)
            # A string that is given is ours to delete, so it comes as an address.
            given = row.result == "const char *"
            function.restype = ctypes.c_void_p if given else _ctype(row.result)
            setattr(self, row.name, function)
        if lacking:
            raise HalError(
                f"{LIBRARY} has no {', '.join(lacking)}; install a newer dpctl",
                code="broken",
                driver=NAME,
                op="open",
            )
        try:
            library["drivetrain_fake"]
            self.is_fake = True
        except AttributeError:
            self.is_fake = False
        """It says of itself that it stands in for the real library in tests."""
        self.takes_structures = "DPCTLRawKernelArg_Create" in self.__dict__ and bool(
            self.DPCTLRawKernelArg_Available()
        )
        """Whether a kernel's argument may be any bytes."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def text(self, function: Any, handle: int) -> str:
        """What a function tells in words; empty for nothing."""
        found = function(handle) if handle else None
        if not found:
            return ""
        words = ctypes.string_at(found).decode(errors="replace")
        self.DPCTLCString_Delete(ctypes.c_char_p(found))
        return " ".join(words.split())


def find() -> str:
    """The path of the library: what `SELECTED` names, or that of the dpctl on Python's path; ``""``
    for none. Looks at files only."""
    selected = os.environ.get(SELECTED, "")
    if selected:
        return selected if Path(selected).is_file() else ""
    for folder in sys.path:
        path = Path(folder or ".") / "dpctl" / LIBRARY
        if path.is_file():
            return str(path)
    return ""


def libraries(path: str) -> Path:
    """The folder where wheels put the libraries beside a dpctl: ``lib`` of its installation."""
    return Path(os.path.normpath(Path(path).absolute().parent / "../../.."))


@cache
def _loaded(path: str) -> Api:
    try:
        return Api(ctypes.CDLL(path))
    except OSError as error:
        raise missing.unloadable(path, error, driver=NAME, op="open") from error


def load() -> Api:
    """The library, bound once. Raises DriverMissing, or HalError where it does not load."""
    path = find()
    if not path:
        raise DriverMissing(
            f"there is no {LIBRARY}: {INSTALL}", code="driver_missing", driver=NAME, op="open"
        )
    return _loaded(path)
