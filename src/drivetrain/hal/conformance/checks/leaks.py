"""Leaks: what is made and given back again and again takes no more than once.

Each check counts the process's memory (resident, of the C heap, Python's objects), its open files
and threads, the device's memory and the driver's handles, before and after; see ``held``.
"""

from __future__ import annotations

from collections.abc import Callable

from drivetrain import hal
from drivetrain.hal.conformance.check import OWN_MEMORY, Failed, check
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.conformance.held import CYCLES, flat
from drivetrain.hal.conformance.work import OLD, backend, driver_memory, holding
from drivetrain.hal.device import Device

MILLION = 1_000_000
_BETWEEN = 1000  # cycles of a million between waits for the device


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
    for _ in range(3):
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


# -- one cycle of each kind ------------------------------------------------------------------------


def _buffer(device: Device) -> Callable[[], None]:
    stream = device.stream()
    host = bytes(1000)

    def cycle() -> None:
        with device.alloc(1000, stream=stream) as buffer:
            buffer.copy_from(host, stream=stream)

    return cycle


def _allocation(device: Device) -> Callable[[], None]:
    stream = device.stream()
    memory = driver_memory(device)
    counter = 0

    def cycle() -> None:
        nonlocal counter
        counter += 1
        nbytes = 16 + counter % 5000
        memory.deallocate(memory.allocate(nbytes, stream.handle), nbytes, stream.handle, ())

    return cycle


def _stream(device: Device) -> Callable[[], None]:
    home = device.stream()
    buffer = holding(device, home, OLD * 100)

    def cycle() -> None:
        with device.stream() as stream:
            buffer.fill(OLD, stream=stream)

    return cycle


def _event(device: Device) -> Callable[[], None]:
    driver, stream, other = backend(device), device.stream(), device.stream()

    def cycle() -> None:
        other.wait(stream.record())
        event = driver.event_create(False)
        driver.event_record(event, stream.handle)
        driver.event_destroy(event)

    return cycle


def _graph(device: Device) -> Callable[[], None]:
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)

    def cycle() -> None:
        with stream.capture() as graph:
            buffer.fill(OLD, stream=stream)
        graph.launch(stream)
        graph.close()

    return cycle


def _launch(device: Device) -> Callable[[], None]:
    stream = device.stream()
    kernel = kernels.module(device).kernel("tell")
    out = holding(device, stream, OLD * 4)

    def cycle() -> None:
        kernel(stream, 1, 1, out, 1)
        kernel.plan(stream, 1, 1, out, 2)()

    return cycle


def _module(device: Device) -> Callable[[], None]:
    stream = device.stream()
    source = hal.Source.cuda(kernels.SOURCE)
    out = holding(device, stream, OLD * 4)

    def cycle() -> None:
        device.compile(source).kernel("tell")(stream, 1, 1, out, 1)

    return cycle


def _waited_for(device: Device, cycle: Callable[[], None], every: int) -> Callable[[], None]:
    """The cycle, and a wait for the device after so many: queues must not grow without end."""
    counter = 0

    def waited() -> None:
        nonlocal counter
        cycle()
        counter += 1
        if counter % every == 0:
            device.synchronize()

    return waited


def _leaves_nothing(
    device: Device, what: str, cycle: Callable[[], None], cycles: int = CYCLES
) -> None:
    flat(device, what, _waited_for(device, cycle, 20 if cycles < MILLION else _BETWEEN), cycles)


@check(limit_s=120.0)
def buffers(device: Device) -> None:
    """1,000 buffers made, used and closed leave nothing behind."""
    _leaves_nothing(device, "a buffer", _buffer(device))


@check(limit_s=120.0)
def allocations(device: Device) -> None:
    """1,000 allocations from the driver, given back, leave nothing behind."""
    _leaves_nothing(device, "an allocation", _allocation(device))


@check(limit_s=120.0)
def streams(device: Device) -> None:
    """1,000 streams made, used and closed leave nothing behind."""
    _leaves_nothing(device, "a stream", _stream(device))


@check(limit_s=120.0)
def events(device: Device) -> None:
    """1,000 events recorded, waited for and forgotten leave nothing behind."""
    _leaves_nothing(device, "events", _event(device))


@check(limit_s=120.0)
def graphs(device: Device) -> None:
    """1,000 graphs captured, launched and closed leave nothing behind."""
    _leaves_nothing(device, "a graph", _graph(device))


@check("compute", limit_s=120.0)
def launches(device: Device) -> None:
    """1,000 launches, prepared and not, leave nothing behind."""
    _leaves_nothing(device, "launches", _launch(device))


@check("compute", limit_s=120.0)
def modules(device: Device) -> None:
    """100 modules loaded, used and forgotten leave nothing behind."""
    cycle = _waited_for(device, _module(device), 1)
    flat(device, "a module", cycle, 100, warm=20, heap_bytes=2048)  # vendors' compilers take notes


# -- a million of each: with --long ----------------------------------------------------------------


@check(long=True, limit_s=3600.0)
def million_buffers(device: Device) -> None:
    """A million buffers made, used and closed leave nothing behind."""
    _leaves_nothing(device, "a buffer", _buffer(device), MILLION)


@check(long=True, limit_s=3600.0)
def million_allocations(device: Device) -> None:
    """A million allocations from the driver, given back, leave nothing behind."""
    _leaves_nothing(device, "an allocation", _allocation(device), MILLION)


@check(long=True, limit_s=3600.0)
def million_streams(device: Device) -> None:
    """A million streams made, used and closed leave nothing behind."""
    _leaves_nothing(device, "a stream", _stream(device), MILLION)


@check(long=True, limit_s=3600.0)
def million_events(device: Device) -> None:
    """A million events recorded, waited for and forgotten leave nothing behind."""
    _leaves_nothing(device, "events", _event(device), MILLION)


@check(long=True, limit_s=3600.0)
def million_graphs(device: Device) -> None:
    """A million graphs captured, launched and closed leave nothing behind."""
    _leaves_nothing(device, "a graph", _graph(device), MILLION)


@check("compute", long=True, limit_s=3600.0)
def million_launches(device: Device) -> None:
    """A million launches, prepared and not, leave nothing behind."""
    _leaves_nothing(device, "launches", _launch(device), MILLION)
