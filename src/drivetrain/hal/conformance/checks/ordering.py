"""Order: within a stream, between streams, and when the host waits."""

from __future__ import annotations

from itertools import pairwise

from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import (
    NEW,
    OLD,
    backend,
    busy,
    holding,
    is_new,
    read,
    same,
    stranger,
    written_late,
)
from drivetrain.hal.device import Device
from drivetrain.hal.kinds import Way


@check()
def one_stream(device: Device) -> None:
    """Copies and fills of one stream happen in the order in which they were queued."""
    stream = device.stream()
    buffers = [holding(device, stream, OLD * 10_000) for _ in range(8)]
    busy(device, stream)
    for number in range(32):
        buffers[0].fill(bytes([number]), stream=stream)
        for before, after in pairwise(buffers):
            after.copy_from(before, stream=stream)
    buffers[0].fill(OLD, stream=stream)
    same(read(buffers[-1], stream), bytes([31]) * 10_000, "the last of a chain of copies")


@check()
def fill_waits_its_turn(device: Device) -> None:
    """A fill does not overtake the copy that was queued before it."""
    stream = device.stream()
    source = holding(device, stream, NEW * 4096)
    target = holding(device, stream, OLD * 4096)
    busy(device, stream)
    target.copy_from(source, stream=stream)
    source.fill(OLD, stream=stream)
    same(read(target, stream), NEW * 4096, "a copy whose source is filled afterwards")


@check()
def synchronize_means_done(device: Device) -> None:
    """After synchronize() all that was queued has happened; other streams see it."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    stream.synchronize()
    is_new(buffer, other, "the stream was synchronised")


@check()
def done_means_done(device: Device) -> None:
    """Once a stream says that it is done, other streams see its work."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    while not stream.done:
        pass
    is_new(buffer, other, "the stream said that it was done")


@check()
def wait_for_stream(device: Device) -> None:
    """A stream that waits for another one sees its work."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    other.wait(stream)
    is_new(buffer, other, "the second stream waited for the first")


@check()
def wait_for_the_right_event(device: Device) -> None:
    """A wait is for the event that was named, not for another one."""
    late, idle, waiting = (device.stream() for _ in range(3))
    buffer = written_late(device, late)
    event = late.record()
    other = idle.record()
    waiting.wait(event)
    is_new(buffer, waiting, "the stream waited for the event behind the write")
    waiting.wait(other)


@check()
def wait_keeps_its_point(device: Device) -> None:
    """A queued wait is for the event as it was recorded then, though it is recorded anew."""
    late, idle, waiting = (device.stream() for _ in range(3))
    driver = backend(device)
    buffer = written_late(device, late)
    event = driver.event_create(False)
    driver.event_record(event, late.handle)
    driver.stream_wait(waiting.handle, event)
    driver.event_record(event, idle.handle)
    is_new(buffer, waiting, "the event was recorded anew after the wait was queued")
    driver.event_destroy(event)


@check()
def wait_outlives_its_event(device: Device) -> None:
    """A queued wait holds when its event is destroyed."""
    late, waiting = device.stream(), device.stream()
    driver = backend(device)
    buffer = written_late(device, late)
    event = driver.event_create(False)
    driver.event_record(event, late.handle)
    driver.stream_wait(waiting.handle, event)
    driver.event_destroy(event)
    is_new(buffer, waiting, "the event was destroyed after the wait was queued")


@check()
def device_synchronize(device: Device) -> None:
    """Waiting for the device waits for all its streams."""
    streams = [device.stream() for _ in range(3)]
    buffers = [written_late(device, stream) for stream in streams]
    device.synchronize()
    other = device.stream()
    for buffer in buffers:
        is_new(buffer, other, "the device was synchronised")


@check()
def destroyed_stream_finishes(device: Device) -> None:
    """What was queued on a stream that is closed still happens."""
    stream, other = device.stream(), device.stream()
    buffer = device.alloc(4096, stream=other)
    buffer.fill(OLD, stream=other)
    other.synchronize()
    busy(device, stream)
    buffer.fill(NEW, stream=stream)
    stream.close()
    device.synchronize()
    is_new(buffer, other, "the stream was closed and the device synchronised")


@check()
def priorities(device: Device) -> None:
    """Streams of any priority can be made and do their work."""
    for priority in (-1, 0, 1, -100, 100):
        with device.stream(priority=priority) as stream:
            same(read(holding(device, stream, NEW * 100), stream), NEW * 100, f"{priority}")


@check()
def many_streams(device: Device) -> None:
    """A chain over 16 streams, each waiting for the one before, gives the last one's bytes."""
    streams = [device.stream() for _ in range(16)]
    buffer = written_late(device, streams[0], 1000)
    for number, (before, stream) in enumerate(pairwise(streams)):
        stream.wait(before)
        buffer.fill(bytes([number]), stream=stream)
    same(read(buffer, streams[-1]), bytes([14]) * 1000, "the end of a chain of 16 streams")


@check()
def used_memory_waits(device: Device) -> None:
    """A buffer that another stream still reads is not used again when it is closed."""
    home, reader = device.stream(), device.stream()
    nbytes = 1 << 20
    for _ in range(3):
        buffer = holding(device, home, NEW * nbytes)
        kept = device.alloc(nbytes, stream=reader)
        reader.synchronize()
        busy(device, reader)
        kept.copy_from(buffer, stream=reader)
        buffer.close()
        again = device.alloc(nbytes, stream=home)
        again.fill(OLD, stream=home)
        home.synchronize()
        found = read(kept, reader)
        expect(found == NEW * nbytes, "memory was used again while another stream read it")
        again.close()


@check()
def named_user_waits(device: Device) -> None:
    """A buffer whose other user was named by used_by, or when it is closed, waits for it."""
    home, reader = device.stream(), device.stream()
    nbytes = 1 << 20
    for named_at_close in (False, True):
        buffer = holding(device, home, NEW * nbytes)
        kept = device.alloc(nbytes, stream=reader)
        reader.synchronize()
        busy(device, reader)
        backend(device).copy(
            kept.ptr, buffer.ptr, nbytes, Way.DEVICE_TO_DEVICE, reader.handle, False
        )
        if named_at_close:
            buffer.close(reader)
        else:
            buffer.used_by(reader)
            buffer.close()
        again = device.alloc(nbytes, stream=home)
        again.fill(OLD, stream=home)
        home.synchronize()
        found = read(kept, reader)
        expect(found == NEW * nbytes, "memory was used again while a named stream read it")
        again.close()


@check()
def wrapped_stream(device: Device) -> None:
    """Somebody else's stream, wrapped, has their order; closing it leaves theirs alone."""
    theirs = device.stream()
    ours = device.wrap_stream(theirs.handle, owner=theirs)
    buffer = written_late(device, theirs)
    is_new(buffer, ours, "the wrapped stream is the same stream")
    buffer.fill(OLD, stream=ours)
    ours.close()
    same(read(buffer, theirs), OLD * buffer.nbytes, "what the wrapped stream queued")
    with device.stream() as other:
        other.wait(theirs)
        same(read(buffer, other), OLD * buffer.nbytes, "the stream after its wrapper was closed")


@check()
def other_driver(device: Device) -> None:
    """A stream that waits for a stream or event of another driver sees its work."""
    foreign = stranger(device)
    here, away = device.stream(), foreign.stream()
    for by_event in (False, True):
        buffer = written_late(device, here)
        away.wait(here.record() if by_event else here)
        away.synchronize()
        other = device.stream()
        is_new(buffer, other, f"a stream of {foreign.address} waited for this device's")
