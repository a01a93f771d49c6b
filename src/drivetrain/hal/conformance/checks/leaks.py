"""Leaks: what is made and given back a thousand times takes no more than once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from drivetrain.hal.conformance.check import OWN_MEMORY, Failed, check, expect
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.conformance.work import OLD, backend, driver_memory, holding
from drivetrain.hal.device import Device

CYCLES = 1000
_WARM = 200
_SLACK_BYTES = 6 << 20
_TRIES = 3


def _resident() -> int:
    """Bytes of this process in memory, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def _flat(what: str, cycle: Callable[[], None], cycles: int = CYCLES) -> None:
    """Raises Failed when the process grows with each of a few rounds of ``cycles``."""
    for _ in range(_WARM):
        cycle()
    grown = 0
    for _ in range(_TRIES):
        gc.collect()
        before = _resident()
        for _ in range(cycles):
            cycle()
        gc.collect()
        grown = _resident() - before
        if grown <= _SLACK_BYTES:
            return
    raise Failed(f"{cycles} cycles of {what} took {grown} bytes of host memory, again and again")


@check()
def driver_memory_comes_back(device: Device) -> None:
    """Memory that is freed can be allocated again: many times all there is."""
    stream = device.stream()
    memory = driver_memory(device)
    total = backend(device).memory()[1]
    nbytes = min(total // 8, 256 << 20)
    for _ in range(64):
        ptr = memory.allocate(nbytes, stream.handle)
        memory.deallocate(ptr, nbytes, stream.handle, ())
    stream.synchronize()


@check(OWN_MEMORY)
def free_memory_is_flat(device: Device) -> None:
    """The device has as much free memory after 1,000 small allocations as before."""
    stream = device.stream()
    memory = driver_memory(device)
    driver = backend(device)
    lost = 0
    for _ in range(_TRIES):
        stream.synchronize()
        before = driver.memory()[0]
        for number in range(CYCLES):
            nbytes = 4096 + 16 * number
            ptr = memory.allocate(nbytes, stream.handle)
            memory.deallocate(ptr, nbytes, stream.handle, ())
        stream.synchronize()
        lost = before - driver.memory()[0]
        if lost <= 1 << 20:
            return
    raise Failed(f"{lost} bytes of the device are gone after {CYCLES} allocations")


@check(limit_s=120.0)
def buffers(device: Device) -> None:
    """1,000 buffers made, used and closed leave nothing behind."""
    stream = device.stream()
    host = bytes(1000)

    def cycle() -> None:
        with device.alloc(1000, stream=stream) as buffer:
            buffer.copy_from(host, stream=stream)
        stream.synchronize()

    _flat("a buffer", cycle)


@check(limit_s=120.0)
def streams(device: Device) -> None:
    """1,000 streams made, used and closed leave nothing behind."""
    home = device.stream()
    buffer = holding(device, home, OLD * 100)

    def cycle() -> None:
        with device.stream() as stream:
            buffer.fill(OLD, stream=stream)
            stream.synchronize()

    _flat("a stream", cycle)


@check()
def events(device: Device) -> None:
    """1,000 events recorded, waited for and forgotten leave nothing behind."""
    driver, stream, other = backend(device), device.stream(), device.stream()

    def cycle() -> None:
        other.wait(stream.record())
        event = driver.event_create(False)
        driver.event_record(event, stream.handle)
        driver.event_destroy(event)
        other.synchronize()

    _flat("events", cycle)


@check(limit_s=120.0)
def graphs(device: Device) -> None:
    """1,000 graphs captured, launched and closed leave nothing behind."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)

    def cycle() -> None:
        with stream.capture() as graph:
            buffer.fill(OLD, stream=stream)
        graph.launch(stream)
        stream.synchronize()
        graph.close()

    _flat("a graph", cycle)


@check("compute", limit_s=120.0)
def launches(device: Device) -> None:
    """1,000 launches, prepared and not, leave nothing behind."""
    stream = device.stream()
    kernel = kernels.module(device).kernel("tell")
    out = holding(device, stream, OLD * 4)

    def cycle() -> None:
        kernel(stream, 1, 1, out, 1)
        kernel.plan(stream, 1, 1, out, 2)()
        stream.synchronize()

    _flat("launches", cycle)


@check(long=True, limit_s=3600.0)
def million_buffers(device: Device) -> None:
    """A million buffers made, used and closed leave nothing behind."""
    stream = device.stream()
    pool_before = driver_memory(device).stats().live
    counter = 0

    def cycle() -> None:
        nonlocal counter
        counter += 1
        with device.alloc(16 + counter % 5000, stream=stream) as buffer:
            buffer.fill(b"\x01", stream=stream)
        if counter % 1000 == 0:
            stream.synchronize()

    _flat("a buffer", cycle, 1_000_000)
    expect(pool_before == 0, "the adaptor was used before")


@check(long=True, limit_s=3600.0)
def million_allocations(device: Device) -> None:
    """A million allocations from the driver leave nothing behind."""
    stream = device.stream()
    memory = driver_memory(device)
    counter = 0

    def cycle() -> None:
        nonlocal counter
        counter += 1
        nbytes = 16 + counter % 5000
        memory.deallocate(memory.allocate(nbytes, stream.handle), nbytes, stream.handle, ())
        if counter % 1000 == 0:
            stream.synchronize()

    _flat("an allocation", cycle, 1_000_000)
