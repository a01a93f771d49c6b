"""What fails is told, once, to the right one; what can go on goes on."""

from __future__ import annotations

import time
from typing import Any

from drivetrain.errors import DeviceLost, HalError
from drivetrain.hal.conformance.check import INJECTION, check, expect
from drivetrain.hal.conformance.work import OLD, backend, data, holding, read, refused, same
from drivetrain.hal.device import Device
from drivetrain.hal.opened import close_all


def _inject(device: Device, text: str) -> None:
    driver: Any = backend(device)
    driver.inject(text)


@check(INJECTION)
def memory_runs_out_once(device: Device) -> None:
    """A request that fails for want of memory is tried again after unused memory went back."""
    stream = device.stream()
    holding(device, stream, OLD * (4 << 20)).close()
    _inject(device, "alloc:1:out_of_memory")
    buffer = holding(device, stream, data(9 << 20))
    same(read(buffer, stream), data(9 << 20), "a buffer whose first request failed")


@check(INJECTION)
def call_fails(device: Device) -> None:
    """A call that fails raises its error, and the next one works."""
    stream = device.stream()
    buffer = holding(device, stream, data(1000))
    for method, call in (
        ("copy", lambda: buffer.copy_from(data(1000), stream=stream)),
        ("fill", lambda: buffer.fill(OLD, stream=stream)),
        ("event_record", stream.record),
        ("stream_create", device.stream),
    ):
        _inject(device, f"{method}:1:error")
        refused(f"{method} that fails", call, HalError)
        call()
    buffer.copy_from(data(1000, 5), stream=stream)
    same(read(buffer, stream), data(1000, 5), "the buffer after failures")


@check(INJECTION)
def queued_work_fails(device: Device) -> None:
    """A failure of queued work is raised where its stream is waited for, once."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 1000)
    _inject(device, "work:1:error")
    buffer.fill(b"\0", stream=stream)
    refused("synchronize after work that failed", stream.synchronize, HalError)
    stream.synchronize()
    same(read(buffer, stream), OLD * 1000, "what the failed fill would have written")


@check(INJECTION)
def other_streams_go_on(device: Device) -> None:
    """A failure on one stream is not raised on another."""
    stream, other = device.stream(), device.stream()
    buffer = holding(device, stream, OLD * 1000)
    device.synchronize()
    _inject(device, "work:1:error")
    buffer.fill(b"\0", stream=stream)
    behind = stream.record()
    while not behind.done:
        time.sleep(0.001)
    other.synchronize()
    expect(other.done, "the other stream is not done")
    refused("synchronize of the failed stream", stream.synchronize, HalError)


@check(INJECTION)
def lost_for_good(device: Device) -> None:
    """A device that is lost stays lost: every call raises DeviceLost until it is closed."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 1000)
    _inject(device, "fill:1:lost")
    refused("the call that lost it", lambda: buffer.fill(OLD, stream=stream), DeviceLost)
    refused("a fill", lambda: buffer.fill(OLD, stream=stream), DeviceLost)
    refused("a copy", lambda: buffer.copy_to(bytearray(10), stream=stream), DeviceLost)
    refused("synchronize", stream.synchronize, DeviceLost)
    refused("a new stream", device.stream, DeviceLost)
    buffer.close()
    stream.close()
    close_all()


@check(INJECTION)
def lost_at_work(device: Device) -> None:
    """A device that is lost by queued work is told as lost where that is waited for."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 1000)
    _inject(device, "work:1:lost")
    buffer.fill(b"\0", stream=stream)
    refused("synchronize", stream.synchronize, DeviceLost)
    refused("synchronize again", stream.synchronize, DeviceLost)
    close_all()


@check(INJECTION)
def late_answers(device: Device) -> None:
    """Work that takes its time is waited for; what came before and after is right."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 1000)
    _inject(device, "work:1:delay:0.3")
    buffer.fill(b"\x01", stream=stream)
    event = stream.record()
    event.synchronize(30.0)
    same(read(buffer, stream), b"\x01" * 1000, "work that came late")
