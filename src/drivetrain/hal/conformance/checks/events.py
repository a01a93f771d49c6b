"""Events: done when the work before them is, and not before."""

from __future__ import annotations

from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import backend, busy, is_new, written_late
from drivetrain.hal.device import Device


@check()
def synchronize_means_done(device: Device) -> None:
    """After event.synchronize() other streams see the work before the event."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    stream.record().synchronize()
    is_new(buffer, other, "the event was synchronised")


@check()
def done_means_done(device: Device) -> None:
    """Once an event says that it is done, other streams see the work before it."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    event = stream.record()
    while not event.done:
        pass
    is_new(buffer, other, "the event said that it was done")


@check()
def done_in_the_end(device: Device) -> None:
    """Events are done when their stream is, and stay so."""
    stream = device.stream()
    written_late(device, stream)
    events = [stream.record() for _ in range(100)]
    stream.synchronize()
    expect(all(event.done for event in events), "an event of a synchronised stream is not done")
    expect(all(event.done for event in events), "a done event is not done any more")


@check()
def fresh(device: Device) -> None:
    """An event that was never recorded counts as done, and nobody waits for it."""
    driver, stream = backend(device), device.stream()
    for timing in (False, True):
        event = driver.event_create(timing)
        expect(driver.event_done(event), "an event that was never recorded is not done")
        expect(driver.event_synchronize(event, 10.0), "waiting for an unrecorded event did not end")
        driver.stream_wait(stream.handle, event)
        driver.event_destroy(event)
    stream.synchronize()


@check()
def outlives_its_stream(device: Device) -> None:
    """An event of a stream that was closed is done once its work is."""
    stream, other = device.stream(), device.stream()
    buffer = written_late(device, stream)
    event = stream.record()
    stream.close()
    event.synchronize()
    is_new(buffer, other, "the event of a closed stream was synchronised")


@check()
def recorded_again(device: Device) -> None:
    """An event that is recorded again is not done until the new work is."""
    stream, other = device.stream(), device.stream()
    driver = backend(device)
    event = driver.event_create(False)
    driver.event_record(event, stream.handle)
    driver.event_synchronize(event, 60.0)
    buffer = written_late(device, stream)
    driver.event_record(event, stream.handle)
    driver.event_synchronize(event, 60.0)
    is_new(buffer, other, "an event was recorded again and synchronised")
    driver.event_destroy(event)


@check()
def of_each_point(device: Device) -> None:
    """An event is done when its own point is reached, though more work was queued behind it."""
    stream = device.stream()
    for more in (8.0, 16.0, 32.0):  # a busy machine may look too late, and may look again
        buffer = written_late(device, stream)
        event = stream.record()
        busy(device, stream, more)
        event.synchronize(60.0)
        late = stream.record()
        expect(not (late.done and stream.done) or event.done, "the later event was done first")
        on_time = not stream.done
        is_new(buffer, stream, "the work before the event")
        if on_time:
            return
    expect(False, "an event was synchronised and all that was queued behind it is done")
