"""Elapsed time between events, on the device's clock."""

from __future__ import annotations

import time

from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import busy
from drivetrain.hal.device import Device

_DRIFT = 0.05
_TICK_S = 0.002


@check("timing")
def elapsed(device: Device) -> None:
    """Elapsed time is in seconds: above 0, and not more than passed on the host's clock."""
    stream = device.stream()
    for _ in range(3):
        busy(device, stream, 0.1)  # and get to know how much work that is
        stream.synchronize()
        began = time.perf_counter()
        start = stream.record()
        busy(device, stream)
        end = stream.record()
        end.synchronize()
        stream.synchronize()
        passed = time.perf_counter() - began
        found = end.seconds_since(start)
        expect(found > 0, f"{found} seconds passed between two events with work between them")
        expect(
            found <= passed * (1 + _DRIFT) + _TICK_S,
            f"{found:.6f} s between two events, while {passed:.6f} s passed on the host",
        )


@check("timing")
def adds_up(device: Device) -> None:
    """The times of two pieces of work add up to the time of both."""
    stream = device.stream()
    events = [stream.record()]
    for _ in range(2):
        busy(device, stream, 0.5)
        events.append(stream.record())
    stream.synchronize()
    first, second = events[1].seconds_since(events[0]), events[2].seconds_since(events[1])
    both = events[2].seconds_since(events[0])
    expect(
        abs(first + second - both) <= both * _DRIFT + _TICK_S,
        f"{first:.6f} s and {second:.6f} s are {both:.6f} s together",
    )
    zero = events[0].seconds_since(events[0])
    expect(abs(zero) <= _TICK_S, f"an event is {zero:.6f} s after itself")


@check("timing")
def across_streams(device: Device) -> None:
    """Events of two streams have one clock."""
    stream, other = device.stream(), device.stream()
    start = stream.record()
    busy(device, stream)
    middle = stream.record()
    other.wait(middle)
    end = other.record()
    end.synchronize()
    stream.synchronize()
    whole, part = end.seconds_since(start), middle.seconds_since(start)
    expect(
        whole >= part - _TICK_S,
        f"the second stream's event is {whole:.6f} s after the start, and the event that it waited "
        f"for {part:.6f} s",
    )
