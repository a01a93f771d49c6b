"""The ``Driver`` and the ``Backend`` over a shared library's table."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from ctypes import byref, c_double, c_int32, c_uint32, c_uint64
from ctypes import c_void_p as void
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from drivetrain.errors import HalError, Timeout, Unsupported
from drivetrain.hal.driver import (
    Backend,
    Calls,
    Capabilities,
    DeviceInfo,
    Driver,
    FunctionFacts,
    Isolation,
    Kind,
    LaunchAbi,
    Limits,
    Target,
    Telemetry,
    Way,
    hidden_from_all,
)
from drivetrain.hal.shared_library import (
    DeviceLimits,
    Facts,
    Library,
    Readings,
    count,
    load,
    number,
    text,
)

_MOST_DEVICES = 1024
_FOREVER_NS = (1 << 63) - 1
_CLOSE_WAIT_S = 10.0
_PROBE_WAIT_S = 30.0
_PATTERN, _BYTES = bytes.fromhex("dec0175a"), 1 << 20


def made(path: Path | str) -> Driver:
    """The driver of the library at ``path``, which is loaded now: whoever imports it is in a child,
    or has trusted it. Raises HalError when it is no driver."""
    library = load(path)
    return Driver(
        name=library.name,
        vendor=library.vendor,
        absent=lambda: "",
        discover=lambda: discover(library),
        telemetry=lambda info: telemetry(library, info),
        probe=lambda info: probe(library, info),
        open=lambda info: _opened(library, info),
        groups=library.groups,
        install=library.install,
    )


def discover(library: Library) -> tuple[DeviceInfo, ...]:
    """Every device that the library tells of."""
    room = 16
    while True:
        facts = (Facts * room)()
        for each in facts:
            each.size = ctypes.sizeof(Facts)
        told = c_uint32(room)
        library.call("discover", facts, byref(told))
        if told.value <= room:
            break
        if told.value > _MOST_DEVICES:
            raise HalError(
                f"discover: {library.name} tells of {told.value} devices; {_MOST_DEVICES} at most",
                code="broken",
                driver=library.name,
            )
        room = told.value
    return tuple(_info(library, each) for each in facts[: told.value])


def _info(library: Library, facts: Facts) -> DeviceInfo:
    name, _, value = text(facts.visible).partition("=")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found = DeviceInfo(
        driver=library.name,
        index=facts.index,
        name=text(facts.name),
        vendor=text(facts.vendor) or library.vendor,
        uuid=text(facts.uuid),
        pci=text(facts.pci),
        memory_bytes=facts.memory_bytes,
        memory_domain=text(facts.memory_domain),
        driver_version=text(facts.driver_version),
        capabilities=Capabilities(
            compute=text(facts.compute), features=tuple(text(facts.features).split())
        ),
        isolation=Isolation(
            environment=hidden_from_all(**({name: value} if name else {})),
            threads=threads,
            torch_device=text(facts.torch_device) or "cpu",
        ),
    )
    return replace(found, telemetry=telemetry(library, found))


def telemetry(library: Library, info: DeviceInfo) -> Telemetry:
    """The sensors now, as far as the library has any."""
    nan = float("nan")
    now = Readings(
        ctypes.sizeof(Readings), 0, nan, -1, -1, nan, nan, nan, nan, nan, nan, -1, -1, b"", b"ok"
    )
    if "telemetry" in library.calls:
        library.call("telemetry", info.index, byref(now), device=info.uuid)
    busy = number(now.utilisation)
    return Telemetry(
        utilisation=None if busy is None else min(1.0, max(0.0, busy)),
        memory_used_bytes=count(now.memory_used_bytes),
        memory_total_bytes=count(now.memory_total_bytes) or info.memory_bytes or None,
        power_w=number(now.power_w),
        power_limit_w=number(now.power_limit_w),
        temperature_c=number(now.temperature_c),
        memory_temperature_c=number(now.memory_temperature_c),
        clock_mhz=number(now.clock_mhz),
        memory_clock_mhz=number(now.memory_clock_mhz),
        throttle=tuple(text(now.throttle).split()),
        ecc_corrected=count(now.ecc_corrected),
        ecc_uncorrected=count(now.ecc_uncorrected),
        health=text(now.health) or "unknown",
        at=time.time(),
    )


def probe(library: Library, info: DeviceInfo) -> None:
    """1 MiB allocated, filled, copied back and compared. Raises HalError."""
    backend = LibraryBackend(library, info)
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
            driver=library.name,
            op="probe",
            device=info.uuid,
        )
    if back.raw != _PATTERN * (_BYTES // len(_PATTERN)):
        raise HalError(
            "memory read back from the device is not what was written",
            code="wrong",
            driver=library.name,
            op="probe",
            device=info.uuid,
        )
    backend.close()


def _opened(library: Library, info: DeviceInfo) -> Backend:
    return LibraryBackend(library, info)


def _ns(seconds: float) -> int:
    return min(_FOREVER_NS, max(0, int(seconds * 1e9))) if seconds < 1e9 else _FOREVER_NS


class LibraryBackend:
    """One device of a library, open. Handles are the library's pointers."""

    def __init__(self, library: Library, info: DeviceInfo) -> None:
        self._library = library
        self.name = f"{library.name}:{info.index}"
        self.groups = library.groups
        self._closed = False
        handle = void()
        self._call("open", info.index, byref(handle))
        self._device = handle.value or 0
        told = DeviceLimits(size=ctypes.sizeof(DeviceLimits))
        self._call("limits", self._device, byref(told))
        self.alignment = max(16, told.alignment)
        x, y, z = told.grid
        u, v, w = told.block
        self.limits = Limits((x, y, z), (u, v, w), told.threads, told.shared_bytes)
        self.target = Target(
            text(told.target_kind),
            text(told.target_arch),
            tuple(text(told.target_features).split()),
            info.driver_version,
        )

    def _call(self, op: str, *arguments: object) -> None:
        self._open(op)
        self._library.call(op, *arguments, device=self.name)

    def _done(self, op: str, *arguments: object) -> bool:
        self._open(op)
        return self._library.call(op, *arguments, device=self.name, late=True)

    def _open(self, op: str) -> None:
        """A library cannot tell a handle of a closed device: it is not asked."""
        if self._closed:
            raise HalError(
                f"{op}: {self.name} is closed; open it and make the object anew",
                code="closed",
                driver=self._library.name,
                op=op,
                device=self.name,
            )

    def _made(self, op: str, *arguments: object) -> int:
        handle = void()
        self._call(op, *arguments, byref(handle))
        return handle.value or 0

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._library.call("close", self._device, device=self.name)

    def memory(self) -> tuple[int, int]:
        free, total = c_uint64(), c_uint64()
        self._call("memory", self._device, byref(free), byref(total))
        return free.value, total.value

    def synchronize(self, timeout_s: float) -> bool:
        return self._done("synchronize", self._device, _ns(timeout_s))

    # -- memory ---------------------------------------------------------------------------------

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        address = c_uint64()
        self._call("alloc", self._device, nbytes, int(kind), stream, byref(address))
        return address.value

    def free(self, ptr: int, kind: int, stream: int) -> None:
        self._call("free", self._device, ptr, int(kind), stream)

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        self._call("copy", self._device, dst, src, nbytes, int(way), stream, int(host_free))

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        held = ctypes.create_string_buffer(bytes(pattern), len(pattern))
        at = ctypes.addressof(held)
        self._call("fill", self._device, ptr, at, len(pattern), count, stream)

    # -- streams and events ---------------------------------------------------------------------

    def stream_create(self, priority: int) -> int:
        return self._made("stream_create", self._device, priority)

    def stream_destroy(self, stream: int) -> None:
        self._call("stream_destroy", stream)

    def stream_done(self, stream: int) -> bool:
        return self._done("stream_done", stream)

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        return self._done("stream_synchronize", stream, _ns(timeout_s))

    def stream_wait(self, stream: int, event: int) -> None:
        self._call("stream_wait", stream, event)

    def event_create(self, timing: bool) -> int:
        return self._made("event_create", self._device, int(timing))

    def event_destroy(self, event: int) -> None:
        self._call("event_destroy", event)

    def event_record(self, event: int, stream: int) -> None:
        self._call("event_record", event, stream)

    def event_done(self, event: int) -> bool:
        return self._done("event_done", event)

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return self._done("event_synchronize", event, _ns(timeout_s))

    def event_seconds(self, start: int, end: int) -> float:
        seconds = c_double()
        self._call("event_seconds", start, end, byref(seconds))
        return seconds.value

    # -- kernels --------------------------------------------------------------------------------

    def module_load(self, code: bytes, form: str) -> int:
        held = ctypes.create_string_buffer(code, len(code))
        at = ctypes.addressof(held)
        return self._made("module_load", self._device, at, len(code), form.encode())

    def module_unload(self, module: int) -> None:
        self._call("module_unload", module)

    def function(self, module: int, symbol: str) -> int:
        return self._made("function_find", module, symbol.encode())

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        self._call("function_arguments", function, (c_int32 * len(sizes))(*sizes), len(sizes))

    def function_facts(self, function: int) -> FunctionFacts:
        return FunctionFacts()

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        blocks, threads = (c_uint32 * 3)(*grid), (c_uint32 * 3)(*block)
        at = ctypes.cast(arguments, ctypes.POINTER(void))
        self._call("launch", function, blocks, threads, shared, stream, at)

    def calls(self) -> Calls:
        at = self._library.addresses
        if not at["launch"]:
            return Calls(record=at["event_record"])
        return Calls(LaunchAbi.PLAIN, launch=at["launch"], record=at["event_record"])

    # -- groups that version 1 of the table has no calls for ------------------------------------

    def _none(self, group: str) -> NoReturn:
        raise Unsupported(
            f"{self.name}: the table of a shared library has no {group} in version 1",
            code="unsupported",
            driver=self._library.name,
            op=group,
            device=self.name,
        )

    def graph_begin(self, stream: int) -> None:
        self._none("graphs")

    def graph_end(self, stream: int) -> int:
        self._none("graphs")

    def graph_launch(self, graph: int, stream: int) -> None:
        self._none("graphs")

    def graph_destroy(self, graph: int) -> None:
        self._none("graphs")

    def graph_set(
        self,
        graph: int,
        node: int,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        self._none("graphs")

    def peer_enable(self, other: Backend) -> bool:
        self._none("peer")

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        self._none("peer")
