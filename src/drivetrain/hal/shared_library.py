"""A driver that is one shared library exporting ``drivetrain_driver_v1`` (``drivetrain_hal.h``).

`driver` makes the ``Driver`` object of such a library, for an entry point to name::

    DRIVER = shared_library.driver(Path(__file__).with_name("libmychip.so"))

Launches and records of events are called from C by the addresses in the library's table, so they
cost no Python. The rest goes through ctypes.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_uint32, c_uint64
from ctypes import c_void_p as void
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from drivetrain.errors import (
    CompileError,
    DeviceLost,
    DriverMissing,
    HalError,
    OutOfMemory,
    Unsupported,
)
from drivetrain.hal import loading
from drivetrain.hal.device import Device
from drivetrain.hal.driver import GROUPS, Driver

VERSION = 1
SYMBOL = "drivetrain_driver_v1"
SUPPORTED = frozenset({"compute", "timing", "pinned", "managed"})
"""Groups that the table of version 1 has calls for."""
INCLUDE = str(Path(__file__).parent)
"""The folder of ``drivetrain_hal.h``, for a compiler's ``-I``."""


class Status(IntEnum):
    """``dt_status``"""

    OK = 0
    LATE = 1
    FAILED = 2
    OUT_OF_MEMORY = 3
    INVALID = 4
    UNSUPPORTED = 5
    LOST = 6
    MISSING = 7
    REJECTED = 8
    NO_SUCH_KERNEL = 9


class Failure(ctypes.Structure):
    """``dt_failure``"""

    _fields_ = [
        ("size", c_uint32),
        ("native", c_int32),
        ("native_name", c_char * 60),
        ("text", c_char * 512),
        ("requested", c_uint64),
        ("free", c_uint64),
        ("total", c_uint64),
    ]


class Facts(ctypes.Structure):
    """``dt_device_facts``"""

    _fields_ = [
        ("size", c_uint32),
        ("index", c_uint32),
        ("memory_bytes", c_uint64),
        ("name", c_char * 128),
        ("vendor", c_char * 32),
        ("uuid", c_char * 64),
        ("pci", c_char * 24),
        ("driver_version", c_char * 64),
        ("compute", c_char * 32),
        ("memory_domain", c_char * 64),
        ("visible", c_char * 128),
        ("torch_device", c_char * 32),
        ("features", c_char * 128),
    ]


class Readings(ctypes.Structure):
    """``dt_readings``"""

    _fields_ = [
        ("size", c_uint32),
        ("reserved", c_uint32),
        ("utilisation", c_double),
        ("memory_used_bytes", c_int64),
        ("memory_total_bytes", c_int64),
        ("power_w", c_double),
        ("power_limit_w", c_double),
        ("temperature_c", c_double),
        ("memory_temperature_c", c_double),
        ("clock_mhz", c_double),
        ("memory_clock_mhz", c_double),
        ("ecc_corrected", c_int64),
        ("ecc_uncorrected", c_int64),
        ("throttle", c_char * 128),
        ("health", c_char * 128),
    ]


class DeviceLimits(ctypes.Structure):
    """``dt_device_limits``"""

    _fields_ = [
        ("size", c_uint32),
        ("alignment", c_uint32),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("threads", c_uint32),
        ("shared_bytes", c_uint32),
        ("target_kind", c_char * 16),
        ("target_arch", c_char * 64),
        ("target_features", c_char * 128),
    ]


_VOIDS = POINTER(void)
_CALLS: dict[str, tuple[Any, ...]] = {
    "failure": (POINTER(Failure),),
    "discover": (POINTER(Facts), POINTER(c_uint32)),
    "telemetry": (c_uint32, POINTER(Readings)),
    "open": (c_uint32, _VOIDS),
    "close": (void,),
    "limits": (void, POINTER(DeviceLimits)),
    "memory": (void, POINTER(c_uint64), POINTER(c_uint64)),
    "synchronize": (void, c_int64),
    "alloc": (void, c_uint64, c_uint32, void, POINTER(c_uint64)),
    "free": (void, c_uint64, c_uint32, void),
    "copy": (void, c_uint64, c_uint64, c_uint64, c_uint32, void, c_int),
    "fill": (void, c_uint64, void, c_uint32, c_uint64, void),
    "stream_create": (void, c_int32, _VOIDS),
    "stream_destroy": (void,),
    "stream_done": (void,),
    "stream_synchronize": (void, c_int64),
    "stream_wait": (void, void),
    "event_create": (void, c_int, _VOIDS),
    "event_destroy": (void,),
    "event_record": (void, void),
    "event_done": (void,),
    "event_synchronize": (void, c_int64),
    "event_seconds": (void, void, POINTER(c_double)),
    "module_load": (void, void, c_uint64, c_char_p, _VOIDS),
    "module_unload": (void,),
    "function_find": (void, c_char_p, _VOIDS),
    "function_arguments": (void, POINTER(c_int32), c_uint32),
    "launch": (void, POINTER(c_uint32), POINTER(c_uint32), c_uint32, void, _VOIDS),
}
"""The members of the table that are functions, in its order, with their arguments."""
_OF_GROUPS = {
    "timing": ("event_seconds",),
    "compute": (
        "module_load",
        "module_unload",
        "function_find",
        "function_arguments",
        "launch",
    ),
}
_OPTIONAL = {name for names in _OF_GROUPS.values() for name in names} | {"telemetry"}


class Table(ctypes.Structure):
    """``dt_driver_v1``"""

    _fields_ = [
        ("size", c_uint32),
        ("version", c_uint32),
        ("name", c_char_p),
        ("vendor", c_char_p),
        ("groups", c_char_p),
        ("install", c_char_p),
        *((name, void) for name in _CALLS),
    ]


def text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


@dataclass(frozen=True)
class Library:
    """A loaded table: its strings, and its functions by name. What it lacks is not in ``calls``."""

    path: str
    name: str
    vendor: str
    install: str
    groups: frozenset[str]
    calls: dict[str, Any]
    addresses: dict[str, int]
    keep: Any

    def call(self, op: str, *arguments: Any, device: str = "", late: bool = False) -> bool:
        """Whether the call is done; False is DT_LATE, where that is meant. Raises HalError."""
        function = self.calls.get(op)
        status = Status.UNSUPPORTED if function is None else function(*arguments)
        if status == Status.OK:
            return True
        if late and status == Status.LATE:
            return False
        raise self._error(op, status, device, told=function is not None)

    def _error(self, op: str, status: int, device: str, *, told: bool) -> HalError:
        failure = Failure(size=ctypes.sizeof(Failure))
        if told:
            self.calls["failure"](ctypes.byref(failure))
        why = text(failure.text)
        kind, code = _KINDS.get(status, (HalError, f"status_{status}"))
        if status == Status.REJECTED:
            message = f"{op}: {self.name} does not take the code: {why.splitlines()[:1]}"
            return CompileError(
                message, log=why, code=code, driver=self.name, op=op, device=device,
                native=failure.native, native_name=text(failure.native_name),
            )  # fmt: skip
        facts: dict[str, Any] = {
            "code": code,
            "driver": self.name,
            "op": op,
            "device": device,
            "native": failure.native,
            "native_name": text(failure.native_name),
        }
        message = f"{op} on {device or self.name} failed: {why or code}"
        if kind is OutOfMemory:
            for name in ("requested", "free", "total"):
                facts[name] = getattr(failure, name)
            message += (
                f" ({failure.requested} bytes were asked for, {failure.free} of {failure.total} "
                "are free)"
            )
        return kind(message, **facts)


_KINDS: dict[int, tuple[type[HalError], str]] = {
    Status.FAILED: (HalError, "error"),
    Status.OUT_OF_MEMORY: (OutOfMemory, "out_of_memory"),
    Status.INVALID: (HalError, "invalid"),
    Status.UNSUPPORTED: (Unsupported, "unsupported"),
    Status.LOST: (DeviceLost, "device_lost"),
    Status.MISSING: (DriverMissing, "driver_missing"),
    Status.REJECTED: (CompileError, "rejected"),
    Status.NO_SUCH_KERNEL: (HalError, "no_such_kernel"),
}


def load(path: Path | str) -> Library:
    """The library's table, checked. Raises DriverMissing when it cannot be loaded and HalError when
    it is no driver of this version."""
    where = str(path)
    try:
        library = ctypes.CDLL(where)
    except OSError as error:
        raise DriverMissing(f"{where} cannot be loaded: {error}", code="driver_missing") from error
    try:
        entry = library[SYMBOL]
    except AttributeError:
        raise HalError(
            f"{where} exports no {SYMBOL}(): it is no driver, or one of another version",
            code="api_version",
        ) from None
    entry.restype = void
    address = entry()
    if not address:
        raise HalError(f"{where}: {SYMBOL}() gave no table", code="broken")
    size, version = (c_uint32 * 2).from_address(address)
    if version != VERSION or size < Table.name.offset + 8:
        raise HalError(
            f"{where}: its table says version {version} and {size} bytes; this Drivetrain takes "
            f"version {VERSION}: install a driver that fits",
            code="api_version",
        )
    table = Table()  # zeros for what an older table does not have
    ctypes.memmove(ctypes.addressof(table), address, min(size, ctypes.sizeof(Table)))
    return _checked(where, table, library)


def _checked(where: str, table: Table, library: Any) -> Library:
    name = text(table.name)
    groups = frozenset(text(table.groups).split())
    addresses = {call: getattr(table, call) or 0 for call in _CALLS}
    lacking = [call for call, at in addresses.items() if not at and call not in _OPTIONAL]
    for group, members in _OF_GROUPS.items():
        if group in groups:
            lacking += [member for member in members if not addresses[member]]
    unknown = groups - set(GROUPS)
    beyond = groups - unknown - SUPPORTED
    wrong = ""
    if not name.isidentifier():
        wrong = f"its name is {name!r}"
    elif lacking:
        wrong = f"its table lacks {', '.join(lacking)}"
    elif unknown or beyond:
        told = ", ".join(sorted(unknown | beyond))
        wrong = f"its table declares {told}, which version {VERSION} has no calls for"
    if wrong:
        raise HalError(f"{where} is no whole driver: {wrong}", code="broken", driver=name)
    calls = {
        call: ctypes.CFUNCTYPE(c_int, *_CALLS[call])(at) for call, at in addresses.items() if at
    }
    return Library(
        where, name, text(table.vendor), text(table.install), groups, calls, addresses, library
    )


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def count(value: int) -> int | None:
    return value if value >= 0 else None


def driver(path: Path | str) -> Driver:
    """The ``Driver`` of the library at ``path``, which is loaded. Raises DriverMissing and HalError
    as `load` does."""
    from drivetrain.hal.shared_library_driver import made

    return made(path)


_here: dict[str, tuple[Device, ...]] = {}


def devices(path: Path | str) -> tuple[Device, ...]:
    """The devices of the library at ``path``, for this process only: it is loaded here, without
    an entry point, and its devices are in no listing. The same path gives the same devices.

    Raises what `load` raises, DriverMissing where it has no device, and BadInput where another
    driver has its name.
    """
    key = str(path)
    if key not in _here:
        made = driver(path)
        found = made.discover()
        if not found:
            raise DriverMissing(f"{key}: {made.name} found no device", code="driver_missing")
        loading.give(made)
        addresses = [f"{made.name}:{info.index}" for info in found]
        _here[key] = tuple(
            Device(address, info, info.uuid, (address,))
            for address, info in zip(addresses, found, strict=True)
        )
    return _here[key]


def is_driver(path: Path | str) -> bool:
    """Whether the library exports the table. Raises DriverMissing when it cannot be loaded."""
    try:
        return hasattr(ctypes.CDLL(str(path)), SYMBOL)
    except OSError as error:
        raise DriverMissing(f"{path} cannot be loaded: {error}", code="driver_missing") from error
