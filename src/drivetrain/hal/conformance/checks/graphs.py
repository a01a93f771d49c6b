"""Graphs: what is captured does not happen, and happens each time it is launched."""

from __future__ import annotations

import gc

from drivetrain.errors import BadInput, HalError
from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.conformance.work import (
    NEW,
    OLD,
    backend,
    busy,
    data,
    holding,
    read,
    refused,
    same,
    stranger,
)
from drivetrain.hal.device import Device


@check()
def capture_does_nothing(device: Device) -> None:
    """What is captured does not happen."""
    stream = device.stream()
    buffer, source = (holding(device, stream, each * 1000) for each in (OLD, NEW))
    with stream.capture() as graph:
        buffer.copy_from(source, stream=stream)
        source.fill(OLD, stream=stream)
    device.synchronize()
    same(read(buffer, stream), OLD * 1000, "the destination of a captured copy")
    same(read(source, stream), NEW * 1000, "what a captured fill would have filled")
    graph.close()


@check()
def launch_does_all(device: Device) -> None:
    """A launch does all that was captured, in its order, the last command too."""
    stream = device.stream()
    first, second, third = (holding(device, stream, OLD * 1000) for _ in range(3))
    with stream.capture() as graph:
        first.fill(NEW, stream=stream)
        second.copy_from(first, stream=stream)
        first.fill(b"\x01", stream=stream)
        third.copy_from(second, stream=stream)
    graph.launch(stream)
    for buffer, wanted, name in ((first, b"\x01", "first"), (second, NEW, "2nd"), (third, NEW, "")):
        same(read(buffer, stream), wanted * 1000, f"{name or 'the last'} buffer of a graph")


@check()
def launched_again(device: Device) -> None:
    """A graph can be launched many times, on any stream, in that stream's order."""
    stream, other = device.stream(), device.stream()
    source, target = (holding(device, stream, OLD * 1000) for _ in range(2))
    with stream.capture() as graph:
        target.copy_from(source, stream=stream)
    for number in range(20):
        on = stream if number % 2 else other
        if number % 5 == 0:
            busy(device, on, 0.3)
        source.fill(bytes([number]), stream=on)
        graph.launch(on)
        same(read(target, on), bytes([number]) * 1000, f"launch {number} of a graph")


@check()
def host_memory(device: Device) -> None:
    """Copies from and to the host in a graph read and write at each launch."""
    stream = device.stream()
    host, out = bytearray(data(500, 1)), bytearray(500)
    buffer = holding(device, stream, OLD * 500)
    with stream.capture() as graph:
        buffer.copy_from(host, stream=stream)
        buffer.copy_to(out, stream=stream)
    for seed in (2, 3):
        host[:] = data(500, seed)
        graph.launch(stream)
        stream.synchronize()
        same(bytes(out), data(500, seed), "a copy through the device in a graph")


@check()
def closed_buffer(device: Device) -> None:
    """A graph whose buffer is closed is refused, and so is a closed graph."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
    buffer.close()
    refused("a graph with a closed buffer", lambda: graph.launch(stream))
    graph.close()
    refused("a closed graph", lambda: graph.launch(stream))


@check()
def broken_capture(device: Device) -> None:
    """An error while capturing leaves the stream usable and the graph refused."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)
    try:
        with stream.capture() as graph:
            buffer.fill(NEW, stream=stream)
            raise KeyError("the caller's own")
    except KeyError:
        pass
    same(read(buffer, stream), OLD * 100, "after a capture that was left with an error")
    refused("the graph of a broken capture", lambda: graph.launch(stream))
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
    graph.launch(stream)
    same(read(buffer, stream), NEW * 100, "a graph captured after a broken one")


@check()
def nothing_else_while_capturing(device: Device) -> None:
    """While a stream is captured, waiting for it and closing it are refused; others work."""
    stream, other = device.stream(), device.stream()
    buffer = holding(device, stream, OLD * 100)
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
        refused("synchronize while capturing", stream.synchronize)
        refused("close while capturing", stream.close)
        same(read(holding(device, other, data(1000)), other), data(1000), "work of another stream")
    graph.launch(stream)
    same(read(buffer, stream), NEW * 100, "the graph")


@check()
def memory_of_others(device: Device) -> None:
    """While a stream is captured, another one gets memory that the first let go."""
    stream, other = device.stream(), device.stream()
    buffer = holding(device, stream, OLD * 100)
    holding(device, stream, OLD * (8 << 20)).close()
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
        with device.alloc(8 << 20, stream=other) as taken:
            taken.fill(NEW, stream=other)
            same(read(taken, other), NEW * (8 << 20), "a buffer allocated during a capture")
    graph.launch(stream)
    same(read(buffer, stream), NEW * 100, "the graph")


@check()
def many_commands(device: Device) -> None:
    """A graph of 1,000 commands does them all."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 1000)
    with stream.capture() as graph:
        for at in range(1000):
            buffer.view(at, 1).fill(bytes([at % 251]), stream=stream)
    graph.launch(stream)
    wanted = bytes(at % 251 for at in range(1000))
    same(read(buffer, stream), wanted, "a graph of 1,000 fills")


@check()
def not_twice(device: Device) -> None:
    """A stream that is captured cannot be captured again, nor launch a graph."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 100)
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)

    def again() -> None:
        with stream.capture():
            pass

    with stream.capture() as outer:
        refused("a capture in a capture", again, BadInput)
        refused("a launch into a capture", lambda: graph.launch(stream))
        buffer.fill(b"\x05", stream=stream)
    outer.launch(stream)
    found = read(buffer, stream)
    expect(found == b"\x05" * 100, "the graph that was captured in spite of that is wrong")


@check()
def empty(device: Device) -> None:
    """A graph of nothing can be captured and launched."""
    stream = device.stream()
    with stream.capture() as graph:
        pass
    graph.launch(stream)
    stream.synchronize()


@check()
def closed_in_flight(device: Device) -> None:
    """What was launched still happens when the graph is closed right after."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 10_000)
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
    busy(device, stream)
    graph.launch(stream)
    graph.close()
    del graph
    gc.collect()
    same(read(buffer, stream), NEW * 10_000, "what a graph did that was closed while queued")


@check()
def back_to_back(device: Device) -> None:
    """Launches queued one behind another happen one behind another."""
    stream = device.stream()
    ring = [holding(device, stream, bytes([n]) * 5000) for n in range(4)]
    spare = holding(device, stream, OLD * 5000)
    with stream.capture() as graph:  # each moves one place on
        spare.copy_from(ring[3], stream=stream)
        for n in (3, 2, 1):
            ring[n].copy_from(ring[n - 1], stream=stream)
        ring[0].copy_from(spare, stream=stream)
    busy(device, stream)
    for _ in range(11):
        graph.launch(stream)
    for n in range(4):
        same(read(ring[n], stream), bytes([(n - 11) % 4]) * 5000, f"place {n} after 11 launches")


@check()
def other_streams_meanwhile(device: Device) -> None:
    """A buffer that a captured stream used before can be closed while the capture goes on; its
    memory waits for that use."""
    stream, home = device.stream(), device.stream()
    nbytes = 1 << 20
    kept = holding(device, stream, OLD * nbytes)
    buffer = holding(device, home, NEW * nbytes)
    busy(device, stream)
    kept.copy_from(buffer, stream=stream)
    with stream.capture() as graph:
        kept.view(0, 1).fill(NEW, stream=stream)
        buffer.close()
        with device.alloc(nbytes, stream=home) as again:
            again.fill(OLD, stream=home)
            home.synchronize()
    graph.launch(stream)
    same(read(kept, stream), NEW * nbytes, "what was copied before the capture began")


@check()
def not_while_capturing(device: Device) -> None:
    """What no graph can hold is refused while capturing, and the capture goes on: allocations on
    the stream, copies between devices; events are held or refused."""
    stream, foreign = device.stream(), stranger(device)
    away = foreign.stream()
    buffer = holding(device, stream, OLD * 100)
    theirs = holding(foreign, away, NEW * 100)
    idle = device.stream().record()
    with stream.capture() as graph:
        buffer.fill(NEW, stream=stream)
        refused("alloc", lambda: device.alloc(10, stream=stream), HalError)
        refused("copy", lambda: buffer.copy_from(theirs, stream=stream), HalError)
        for act in (stream.record, lambda: stream.wait(idle)):
            try:
                act()
            except HalError as error:
                expect(error.code == "capturing", f"an event was refused with {error.code}")
        refused("launch of an unfinished graph", lambda: graph.launch(stream))
    graph.launch(stream)
    same(read(buffer, stream), NEW * 100, "the graph")


@check("graphs")
def of_the_driver(device: Device) -> None:
    """The driver's own graphs: ended where none was begun, launched in flight, destroyed while
    queued, of two streams at once."""
    stream, other = device.stream(), device.stream()
    driver = backend(device)
    first, second = (holding(device, stream, OLD * 1000) for _ in range(2))
    refused("an end without a beginning", lambda: driver.graph_end(stream.handle), HalError)
    driver.graph_begin(stream.handle)
    driver.graph_begin(other.handle)
    driver.fill(first.ptr, NEW, 1000, stream.handle)
    driver.fill(second.ptr, b"\x05", 1000, other.handle)
    graphs = [driver.graph_end(each.handle) for each in (stream, other)]
    same(read(first, stream) + read(second, stream), OLD * 2000, "what was captured happened")
    busy(device, stream)
    for graph in graphs:
        driver.graph_launch(graph, stream.handle)
        driver.graph_destroy(graph)
    same(read(first, stream), NEW * 1000, "the first graph, destroyed while it was queued")
    same(read(second, stream), b"\x05" * 1000, "the second graph, captured beside the first")


@check("graphs", "compute", limit_s=120.0)
def nodes_of_the_driver(device: Device) -> None:
    """The driver's graph is native, and a launch that it does not have cannot be changed."""
    stream = device.stream()
    kernel = kernels.module(device).kernel("tell")
    out = holding(device, stream, OLD * 4)
    with stream.capture() as graph:
        out.fill(OLD, stream=stream)
        kernel(stream, 1, 1, out, 1)
    expect(graph.native, "the driver declares graphs, and the core keeps a list of commands")
    launch = kernel.plan(stream, 1, 1, out, 2)
    refused("a node beyond the last", lambda: launch._launch.change(graph._handle, 1), HalError)
    launch._launch.change(graph._handle, 0)
    graph.launch(stream)
    same(read(out, stream), (2).to_bytes(4, "little"), "the launch that was changed")
