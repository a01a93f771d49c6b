"""Time limits: a wait ends at its limit, says so, and the work goes on."""

from __future__ import annotations

import os
from collections.abc import Callable

from drivetrain.errors import Timeout
from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import NEW, OLD, busy, is_new, written_late
from drivetrain.hal.device import Device
from drivetrain.hal.stream import Stream

_ROUNDS = 5

WAIT_LIMIT = "DRIVETRAIN_WAIT_LIMIT_S"

Wait = Callable[[Stream, float], None]


def _limited(device: Device, wait: Wait) -> None:
    """Each wait of no time at all on a stream with a lot to do raises Timeout, or all is done."""
    stream, other = device.stream(), device.stream()
    in_time = 0
    for _ in range(_ROUNDS):
        buffer = written_late(device, stream)
        expired = False
        try:
            wait(stream, 0.0)
        except Timeout as error:
            expired = True
            expect(error.device == device.address, f"it names the device {error.device!r}")
            expect(isinstance(error, TimeoutError), "it is no TimeoutError")
        if not expired:
            in_time += 1
            is_new(buffer, other, "the wait said that all was done")
        wait(stream, 60.0)
        is_new(buffer, stream, "the work went on after the wait had ended")
    expect(in_time < _ROUNDS, f"{_ROUNDS} waits of 0 s ended only when all the work was done")


@check()
def stream(device: Device) -> None:
    """stream.synchronize(timeout) raises Timeout while there is work, and the work goes on."""
    _limited(device, lambda stream, limit: stream.synchronize(limit))


@check()
def event(device: Device) -> None:
    """event.synchronize(timeout) does the same."""
    kept: dict[str, object] = {}

    def wait(stream: Stream, limit: float) -> None:
        kept["event"] = last = stream.record()
        last.synchronize(limit)

    _limited(device, wait)


@check()
def whole_device(device: Device) -> None:
    """device.synchronize(timeout) does the same."""
    _limited(device, lambda stream, limit: device.synchronize(limit))


@check()
def long_enough(device: Device) -> None:
    """A wait with time enough ends with the work, not before and not with Timeout."""
    stream, other = device.stream(), device.stream()
    buffer = device.alloc(1000, stream=stream)
    buffer.fill(OLD, stream=stream)
    stream.synchronize()
    busy(device, stream)
    buffer.fill(NEW, stream=stream)
    stream.synchronize(60.0)
    is_new(buffer, other, "a wait of up to 60 s returned")


@check()
def default(device: Device) -> None:
    """A wait without a limit of its own has that of DRIVETRAIN_WAIT_LIMIT_S."""
    waits: tuple[Callable[[Stream], None], ...] = (
        lambda stream: stream.synchronize(),
        lambda stream: stream.record().synchronize(),
        lambda stream: device.synchronize(),
    )
    for wait in waits:

        def limited(stream: Stream, limit: float, wait: Callable[[Stream], None] = wait) -> None:
            before = os.environ.get(WAIT_LIMIT)
            os.environ[WAIT_LIMIT] = str(limit or 1e-9)
            try:
                wait(stream)
            finally:
                if before is None:
                    del os.environ[WAIT_LIMIT]
                else:
                    os.environ[WAIT_LIMIT] = before

        _limited(device, limited)
