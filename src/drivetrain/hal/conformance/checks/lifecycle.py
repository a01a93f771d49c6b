"""Life in the wrong order: nothing crashes, nothing hangs, memory comes back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

from drivetrain import hal
from drivetrain.errors import DrivetrainError
from drivetrain.hal.conformance.check import OWN_MEMORY, check, expect
from drivetrain.hal.conformance.work import (
    NEW,
    OLD,
    backend,
    busy,
    data,
    driver_memory,
    holding,
    read,
    refused,
    same,
    written_late,
)
from drivetrain.hal.device import Device
from drivetrain.hal.isolated import python_path
from drivetrain.hal.opened import close_all


@check()
def stream_before_buffer(device: Device) -> None:
    """A stream that closes before its buffers: their memory is given back all the same."""
    other = device.stream()
    for _ in range(3):
        stream = device.stream()
        buffers = [holding(device, stream, data(10_000, n)) for n in range(3)]
        stream.close()
        for number, buffer in enumerate(buffers):
            same(read(buffer, other), data(10_000, number), "a buffer of a closed stream")
            buffer.close()


@check()
def user_before_buffer(device: Device) -> None:
    """A stream that used a buffer and was closed is waited for before the memory is used again."""
    home, other = device.stream(), device.stream()
    nbytes = 1 << 20
    for _ in range(3):
        buffer = holding(device, home, NEW * nbytes)
        kept = device.alloc(nbytes, stream=other)
        other.synchronize()
        user = device.stream()
        busy(device, user)
        kept.copy_from(buffer, stream=user)
        user.close()
        buffer.close()
        again = device.alloc(nbytes, stream=home)
        again.fill(OLD, stream=home)
        home.synchronize()
        device.synchronize()
        same(read(kept, other), NEW * nbytes, "what a closed stream copied from a closed buffer")
        again.close()


@check()
def closed_twice(device: Device) -> None:
    """Closing anything twice does nothing."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
    for each in (graph, buffer, stream):
        each.close()
        each.close()
    close_all()
    close_all()


@check(limit_s=10.0)
def closes(device: Device) -> None:
    """Closing a device whose streams have work queued comes to its end."""
    streams = [device.stream() for _ in range(3)]
    for stream in streams:
        written_late(device, stream)
    close_all()
    expect(not streams[0].handle, "the streams of a closed device have their handles still")


@check()
def opened_again(device: Device) -> None:
    """A device that was closed can be opened again, many times."""
    for number in range(5):
        stream = device.stream()
        same(read(holding(device, stream, data(5000, number)), stream), data(5000, number), "")
        close_all()


@check()
def dead_objects(device: Device) -> None:
    """Objects of a device that was closed are refused or do nothing; they do not crash."""
    dead = _used_after_closing(device)
    anew = device.stream()
    del dead
    gc.collect()
    same(read(holding(device, anew, data(1000)), anew), data(1000), "the device, opened again")


def _used_after_closing(device: Device) -> tuple[object, ...]:
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)
    event = stream.record()
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
    busy(device, stream, 0.2)
    close_all()
    refused("fill", lambda: buffer.fill(OLD, stream=stream), DrivetrainError)
    refused("copy", lambda: buffer.copy_to(bytearray(10), stream=stream), DrivetrainError)
    refused("record", stream.record, DrivetrainError)
    refused("synchronize", stream.synchronize, DrivetrainError)
    refused("event", lambda: event.done, DrivetrainError)
    refused("launch", lambda: graph.launch(stream), DrivetrainError)
    return stream, buffer, event, graph


@check(OWN_MEMORY)
def memory_after_close(device: Device) -> None:
    """A device that is closed gives back what was allocated on it."""
    nbytes = backend(device).memory()[0] // 8  # drivers may give no more than a quarter at once
    for _ in range(4):
        stream, began = device.stream(), time.monotonic()
        for _ in range(4):
            driver_memory(device).allocate(nbytes, stream.handle)
            if time.monotonic() - began > 5.0:
                break  # some platforms clear what they give
        close_all()


@check()
def finalised_elsewhere(device: Device) -> None:
    """Objects that are forgotten in another thread, or in a cycle, are given back."""
    stream = device.stream()
    memory = driver_memory(device)
    held: list[object] = [device.alloc(1000, stream=stream, pool=memory) for _ in range(10)]
    held.append(device.stream())
    held.append(stream.record())

    def forget() -> None:
        held.clear()
        gc.collect()

    thread = threading.Thread(target=forget)
    thread.start()
    thread.join(30.0)
    expect(not thread.is_alive(), "the finalisers did not end within 30 s")
    cycle: dict[str, object] = {"buffer": device.alloc(1000, stream=stream, pool=memory)}
    cycle["itself"] = cycle
    del cycle
    gc.collect()
    expect(memory.stats().live == 0, f"{memory.stats().live} forgotten buffers are still held")


@check()
def finalised_while_allocating(device: Device) -> None:
    """A collection in the middle of an allocation closes buffers, streams and events without a
    deadlock."""
    stream = device.stream()
    threshold = gc.get_threshold()
    gc.set_threshold(3)
    try:
        for number in range(300):
            other = device.stream()
            cycle: dict[str, object] = {"buffer": device.alloc(2000, stream=stream)}
            cycle["theirs"] = device.alloc(300_000 + number * 600, stream=other)
            cycle["event"], cycle["stream"], cycle["itself"] = other.record(), other, cycle
            del other
    finally:
        gc.set_threshold(*threshold)
    stream.synchronize()
    same(read(holding(device, stream, data(5000)), stream), data(5000), "a buffer after all that")


_AT_EXIT = """
import sys
from drivetrain import hal
device = hal.device(sys.argv[1])
stream = device.stream()
buffers = [device.alloc(4 << 20, stream=stream) for _ in range(4)]
for _ in range(20):
    for buffer in buffers:
        buffer.fill(b"x", stream=stream)
event = stream.record()
with stream.capture() as graph:
    buffers[0].fill(b"y", stream=stream)
class Cycle: pass
cycle = Cycle(); cycle.itself = cycle; cycle.held = (buffers, graph, event, stream)
print("ready", flush=True)
"""


@check()
def interpreter_exit(device: Device) -> None:
    """A program that ends with everything open and work queued ends with 0, silently."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _AT_EXIT, device.address],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50.0,
        check=False,
    )
    said = done.stderr.strip().splitlines()
    expect(done.returncode == 0, f"it ended with {done.returncode}: {said[-1:] or 'silently'}")
    expect(done.stdout.strip() == "ready", "it did not come to its end")
    expect(not said, f"it said at its end: {said[-1:]}")


@check()
def after_fork(device: Device) -> None:
    """A process that was forked from one with the device open is refused, and harms nobody."""
    if not hasattr(os, "fork"):
        return
    stream = device.stream()
    buffer = holding(device, stream, data(1000))
    child = os.fork()
    if child == 0:
        try:
            device.stream()
        except DrivetrainError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    expect(code == 0, "the child was not refused" if code == 1 else f"the child ended with {code}")
    same(read(buffer, stream), data(1000), "the parent's buffer")


@check()
def forgotten_in_flight(device: Device) -> None:
    """Work of buffers and streams that are forgotten while it is queued happens all the same."""
    other = device.stream()
    kept = [device.alloc(20_000, stream=other) for _ in range(4)]
    other.synchronize()
    for number, target in enumerate(kept):
        stream = device.stream()
        source = holding(device, stream, data(20_000, number))
        busy(device, stream, 0.3)
        target.copy_from(source, stream=stream)
        del source, stream
    gc.collect()
    for _ in range(8):
        device.alloc(20_000, stream=other).fill(OLD, stream=other)
    device.synchronize()
    for number, target in enumerate(kept):
        same(read(target, other), data(20_000, number), f"copy {number} of a forgotten buffer")


@check("compute", limit_s=120.0)
def module_before_its_work(device: Device) -> None:
    """A kernel that is forgotten with its module while it is queued runs all the same."""
    stream = device.stream()
    text = 'extern "C" __global__ void last(int *out) { out[0] = 4711; }'
    out = holding(device, stream, OLD * 4)
    kernel = device.compile(hal.Source.cuda(text)).kernel("last")
    busy(device, stream)
    kernel(stream, 1, 1, out)
    del kernel
    gc.collect()
    same(read(out, stream), (4711).to_bytes(4, "little"), "a kernel whose module was forgotten")


@check("compute", limit_s=120.0)
def graph_keeps_all(device: Device) -> None:
    """A graph keeps its kernels and buffers though nobody else does."""
    stream = device.stream()
    text = 'extern "C" __global__ void copy1(int *out, const int *in) { out[0] = in[0] + 1; }'
    out, source = holding(device, stream, OLD * 4), holding(device, stream, bytes(4))
    kernel = device.compile(hal.Source.cuda(text)).kernel("copy1")
    with stream.capture() as graph:
        kernel(stream, 1, 1, out, source)
    del kernel, source
    gc.collect()
    for _ in range(8):
        device.alloc(4, stream=stream).fill(OLD, stream=stream)
    graph.launch(stream)
    same(read(out, stream), (1).to_bytes(4, "little"), "a graph whose parts nobody else holds")
