"""Two devices of one driver."""

from __future__ import annotations

from drivetrain.hal import copies
from drivetrain.hal.conformance.check import TWO_DEVICES, check, expect
from drivetrain.hal.conformance.work import (
    data,
    holding,
    is_new,
    read,
    refused_early,
    same,
    second,
    written_late,
)
from drivetrain.hal.device import Device
from drivetrain.hal.link import LinkKind
from drivetrain.hal.opened import opened

SIZES = (1, 3, 1000, 65537, (9 << 20) + 1)


@check(TWO_DEVICES)
def copy(device: Device) -> None:
    """A copy goes from one device to the other, queued on either's stream; the source stays."""
    other = second(device)
    here, there = device.stream(), other.stream()
    for nbytes in SIZES:
        source = holding(device, here, data(nbytes, 1))
        for stream in (here, there):
            target = holding(other, there, data(nbytes, 2))
            target.copy_from(source, stream=stream)
            stream.synchronize()
            same(read(target, there), data(nbytes, 1), f"{nbytes} bytes to {other.address}")
            same(read(source, here), data(nbytes, 1), f"the source of {nbytes} bytes")


@check(TWO_DEVICES, "peer")
def direct(device: Device) -> None:
    """Where one device reads the other's memory, the driver's own copy is right."""
    other = second(device)
    if not copies.direct(opened(device), opened(other)):
        return  # the driver says that these two cannot; the copies above were staged
    here, there = device.stream(), other.stream()
    for nbytes in SIZES:
        source = holding(device, here, data(nbytes, 1))
        target = holding(other, there, data(nbytes, 2))
        opened(other).backend.copy_peer(
            target.ptr, source.ptr, nbytes, opened(device).backend, there.handle
        )
        same(read(target, there), data(nbytes, 1), f"{nbytes} bytes from {device.address}")


@check(TWO_DEVICES)
def ordered(device: Device) -> None:
    """A stream of one device waits for a stream of the other."""
    other = second(device)
    here, there = device.stream(), other.stream()
    buffer = written_late(device, here)
    target = other.alloc(buffer.nbytes, stream=there)
    there.wait(here)
    target.copy_from(buffer, stream=there)
    is_new(target, there, "the copy waited for the other device's stream")


@check(TWO_DEVICES)
def source_closed(device: Device) -> None:
    """Memory that is on its way to the other device is not used again before it has arrived."""
    other = second(device)
    here, there = device.stream(), other.stream()
    nbytes = 1 << 20
    for _ in range(3):
        source = holding(device, here, data(nbytes, 1))
        target = other.alloc(nbytes, stream=there)
        written_late(other, there)
        target.copy_from(source, stream=there)
        source.close()
        again = device.alloc(nbytes, stream=here)
        again.fill(b"\0", stream=here)
        here.synchronize()
        same(read(target, there), data(nbytes, 1), "what was copied from a buffer closed after")
        again.close()


@check(TWO_DEVICES)
def strangers(device: Device) -> None:
    """A stream or an event's time of the other device is refused where it cannot be meant."""
    other = second(device)
    here, there = device.stream(), other.stream()
    buffer = holding(device, here, data(100))
    refused_early(device, "alloc", lambda: device.alloc(10, stream=there))
    refused_early(device, "fill", lambda: buffer.fill(b"x", stream=there))
    refused_early(device, "copy in", lambda: buffer.copy_from(b"x", stream=there))
    refused_early(device, "copy out", lambda: buffer.copy_to(bytearray(1), stream=there))
    refused_early(device, "used_by", lambda: buffer.used_by(there))
    with here.capture() as graph:
        buffer.fill(b"x", stream=here)
    refused_early(device, "a graph", lambda: graph.launch(there))
    same(read(buffer, here), data(100), "the buffer after all that")


@check(TWO_DEVICES)
def link(device: Device) -> None:
    """How bytes go between the two devices is told both ways, and measured."""
    other = second(device)
    for found in (device.link(other), other.link(device)):
        expect(
            found.kind in (LinkKind.PEER, LinkKind.STAGED),
            f"the link is {found.kind.value}: {found.reason}",
        )
        expect(found.bandwidth_gbps, f"its bandwidth is {found.bandwidth_gbps}: {found.reason}")
