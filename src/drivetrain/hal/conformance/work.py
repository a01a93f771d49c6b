"""What checks do to a device: known bytes, work that takes a while, what must be refused."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.conformance.check import Failed, expect
from drivetrain.hal.kinds import Kind
from drivetrain.hal.opened import Opened, opened
from drivetrain.hal.resource import DriverMemory

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.driver import Backend
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

OLD, NEW = b"\x11", b"\x77"
BUSY_S = 0.12
_SCRATCH_BYTES = 16 << 20
_MOST_SCRATCH_BYTES = 256 << 20
_MOST_ROUNDS = 10_000
_MANY_ROUNDS = 400


def backend(device: Device) -> Backend:
    """The driver itself, for promises that the objects above it would hide."""
    return opened(device).backend


def data(nbytes: int, seed: int = 1) -> bytes:
    """Bytes without a pattern, the same each time."""
    return random.Random(seed).randbytes(nbytes)


def read(buffer: Buffer, stream: Stream) -> bytes:
    """The buffer's bytes, after all that is queued on ``stream``."""
    found = bytearray(buffer.nbytes)
    buffer.copy_to(found, stream=stream)
    stream.synchronize()
    return bytes(found)


def holding(device: Device, stream: Stream, content: bytes) -> Buffer:
    """A buffer with these bytes in it already."""
    buffer = device.alloc(len(content), stream=stream)
    buffer.copy_from(content, stream=stream)
    stream.synchronize()
    return buffer


def same(found: bytes, wanted: bytes, what: str) -> None:
    """Raises Failed naming the first byte that differs."""
    if found == wanted:
        return
    if len(found) != len(wanted):
        raise Failed(f"{what}: {len(found)} bytes, {len(wanted)} were expected")
    at = next(i for i in range(len(wanted)) if found[i] != wanted[i])
    raise Failed(
        f"{what}: byte {at} of {len(wanted)} is {found[at]:#04x}, {wanted[at]:#04x} was expected"
    )


def driver_memory(device: Device, kind: Kind = Kind.DEVICE) -> DriverMemory:
    """Memory straight from the driver, without the pool."""
    return DriverMemory(opened(device), kind)


def second(device: Device) -> Device:
    """Another device of the same driver."""
    return next(d for d in hal.devices(device.driver) if d.address != device.address)


def stranger(device: Device) -> Device:
    """A device of another driver: the simulated one, or the processor."""
    return hal.devices("cpu" if device.driver == "simulated" else "simulated")[0]


def refused(what: str, call: Callable[[], Any], kind: type[Exception] = BadInput) -> None:
    """Raises Failed when ``call`` succeeds or raises something else."""
    try:
        call()
    except kind:
        return
    except Exception as error:
        wanted = kind.__name__
        raise Failed(f"{what}: {type(error).__name__} ({error}), not {wanted}") from error
    raise Failed(f"{what}: it was accepted; {kind.__name__} was expected")


# -- work that takes a while ----------------------------------------------------------------------

_busy: weakref.WeakKeyDictionary[Opened, tuple[Buffer, Buffer, int]] = weakref.WeakKeyDictionary()


def busy(device: Device, stream: Stream, times: float = 1.0) -> None:
    """Queue work of some 0.1 s (or ``times`` as much), so that what follows comes late."""
    here = opened(device)
    known = _busy.get(here)
    if known is None:
        known = _busy[here] = _calibrated(device)
    first, second, rounds = known
    _work(first, second, max(1, int(rounds * times)), stream)


def _work(first: Buffer, second: Buffer, rounds: int, stream: Stream) -> None:
    """Fills and copies: a driver may do one of them at once, or wrongly."""
    for _ in range(rounds):
        first.fill(b"\xa5", stream=stream)
        second.copy_from(first, stream=stream)


def _calibrated(device: Device) -> tuple[Buffer, Buffer, int]:
    """Two buffers, and how many rounds of work take `BUSY_S`. They are as large as it takes for the
    work, not the queueing of it, to be most of that time (a fast device would be done at once), and
    for a few rounds to do (a queue may be short, and queueing wait for room in it)."""
    stream = device.stream()
    total = max(backend(device).memory()[1], 1 << 20)
    nbytes, most = (min(size, total // 32) for size in (_SCRATCH_BYTES, _MOST_SCRATCH_BYTES))
    while True:
        first, second = (device.alloc(nbytes, stream=stream) for _ in range(2))
        rounds, waited = _rounds(first, second, stream)
        if (waited > 0.5 and rounds <= _MANY_ROUNDS) or nbytes >= most:
            return first, second, rounds
        nbytes = min(most, nbytes * 4)


def _rounds(first: Buffer, second: Buffer, stream: Stream) -> tuple[int, float]:
    """How many rounds take `BUSY_S`, and which share of it passes after the last was queued. All
    ways of waiting are used: one may lie. The shorter of two times counts: the machine may have
    been busy."""

    def times(rounds: int) -> tuple[float, float]:
        began = time.perf_counter()
        _work(first, second, rounds, stream)
        queued = time.perf_counter()
        event = stream.record()
        stream.synchronize()
        event.synchronize()
        while not (event.done and stream.done):
            time.sleep(0.001)
        ended = time.perf_counter()
        return ended - began, (ended - queued) / (ended - began)

    rounds = 1
    while True:
        taken, waited = times(rounds)
        if taken > BUSY_S / 4 or rounds >= _MOST_ROUNDS:
            taken, waited = min((taken, waited), times(rounds))
            if taken > BUSY_S / 4 or rounds >= _MOST_ROUNDS:
                return max(1, min(_MOST_ROUNDS, round(rounds * BUSY_S / taken))), waited
        rounds *= 2


def written_late(device: Device, stream: Stream, nbytes: int = 4096) -> Buffer:
    """A buffer full of OLD, on whose way to NEW ``stream`` has a lot to do first."""
    buffer = device.alloc(nbytes, stream=stream)
    buffer.fill(OLD, stream=stream)
    stream.synchronize()
    busy(device, stream)
    buffer.fill(NEW, stream=stream)
    return buffer


def is_new(buffer: Buffer, stream: Stream, why: str) -> None:
    """Read through ``stream``: all is NEW, or else ``why``."""
    found = read(buffer, stream)
    expect(found == NEW * buffer.nbytes, f"{why}: {found.count(OLD)} of {len(found)} bytes are old")


# -- the driver, watched --------------------------------------------------------------------------


class Watched:
    """A backend that counts the calls that reach it."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            return value(*arguments)

        return called


def refused_early(
    device: Device, what: str, call: Callable[[], Any], kind: type[Exception] = BadInput
) -> None:
    """`refused`, and the driver was not called."""
    here = opened(device)
    inner = here.backend
    watched = Watched(inner)
    here.backend = watched  # type: ignore[assignment]
    try:
        refused(what, call, kind)
    finally:
        here.backend = inner
    expect(not watched.calls, f"{what}: the driver was called before it was refused")
