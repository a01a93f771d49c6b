"""Many threads at once: any thread may call anything."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from drivetrain.hal.conformance.check import Failed, check, expect
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.conformance.work import data, driver_memory, holding, read, same
from drivetrain.hal.device import Device
from drivetrain.hal.memory import Buffer
from drivetrain.hal.stream import Event

THREADS = 8


def _at_once(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Run ``work(number)`` in threads that begin together; the first error is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def one(number: int) -> None:
        try:
            start.wait(30.0)
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(50.0)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in running):
        raise Failed("a thread did not end within 50 s")


@check()
def allocations(device: Device) -> None:
    """Threads that allocate and free at once never get the same memory."""
    memory = driver_memory(device)
    held: dict[int, int] = {}
    lock = threading.Lock()

    def work(number: int) -> None:
        stream = device.stream()
        for round in range(25):
            nbytes = 4096 * (1 + (number + round) % 4)
            mine = [memory.allocate(nbytes, stream.handle) for _ in range(3)]
            with lock:
                for ptr in mine:
                    near = [p for p, n in held.items() if p < ptr + nbytes and ptr < p + n]
                    expect(not near, f"{nbytes} bytes at {ptr:#x} are another thread's")
                    held[ptr] = nbytes
            with lock:
                for ptr in mine:
                    del held[ptr]
            for ptr in mine:
                memory.deallocate(ptr, nbytes, stream.handle, ())

    _at_once(work)


@check()
def own_streams(device: Device) -> None:
    """Threads with a stream each get their own bytes back."""

    def work(number: int) -> None:
        stream = device.stream()
        for round in range(10):
            content = data(20_000 + number, 100 * number + round)
            with holding(device, stream, content) as first:
                second = device.alloc(len(content), stream=stream)
                second.copy_from(first, stream=stream)
                same(read(second, stream), content, f"thread {number}, round {round}")

    _at_once(work)


@check()
def one_stream(device: Device) -> None:
    """Threads that share a stream get their own bytes back."""
    stream = device.stream()

    def work(number: int) -> None:
        for round in range(10):
            content = data(5000 + number, 100 * number + round)
            same(
                read(holding(device, stream, content), stream), content, f"thread {number}, {round}"
            )

    _at_once(work)


@check()
def events(device: Device) -> None:
    """Threads that record and wait for each other's events come to an end."""
    streams = [device.stream() for _ in range(THREADS)]
    latest: list[Event] = [stream.record() for stream in streams]

    def work(number: int) -> None:
        for round in range(50):
            streams[number].wait(latest[(number + round) % THREADS])
            latest[number] = streams[number].record()
        streams[number].synchronize(40.0)

    _at_once(work)


@check()
def streams_come_and_go(device: Device) -> None:
    """Threads that make, use and close streams do not disturb each other."""
    keeper = device.stream()
    kept = holding(device, keeper, data(1000))

    def work(number: int) -> None:
        for _ in range(20):
            with device.stream() as stream:
                buffer = device.alloc(1000, stream=stream)
                stream.wait(keeper)
                buffer.copy_from(kept, stream=stream)
                same(read(buffer, stream), data(1000), f"thread {number}")
                buffer.close()

    _at_once(work)


@check()
def first_use(device: Device) -> None:
    """Threads that all use the device first open it once."""
    from drivetrain.hal.opened import close_all, opened

    close_all()
    found: set[int] = set()

    def work(number: int) -> None:
        found.add(id(opened(device)))
        stream = device.stream()
        same(read(holding(device, stream, data(100)), stream), data(100), f"thread {number}")

    _at_once(work)
    expect(len(found) == 1, f"the device was opened {len(found)} times")


@check()
def handed_over(device: Device) -> None:
    """Buffers that one thread fills and another reads and closes have the first one's bytes."""
    stream = device.stream()
    ready: queue.SimpleQueue[tuple[int, Buffer, Event]] = queue.SimpleQueue()
    rounds = 25

    def work(number: int) -> None:
        mine = device.stream()
        for round in range(rounds):
            if number % 2:
                seed, buffer, event = ready.get(timeout=40.0)
                mine.wait(event)
                same(read(buffer, mine), data(3000, seed), f"buffer {seed} of another thread")
                buffer.close()
            else:
                seed = 1000 * number + round
                buffer = device.alloc(3000, stream=stream)
                buffer.copy_from(data(3000, seed), stream=stream)
                ready.put((seed, buffer, stream.record()))

    _at_once(work)


@check("compute", limit_s=120.0)
def launches(device: Device) -> None:
    """Threads that launch one kernel at once, each on its stream, get their own arguments."""
    kernel = kernels.module(device).kernel("tell")
    kept = [(device.stream(), []) for _ in range(THREADS)]  # type: ignore[var-annotated]

    def work(number: int) -> None:
        stream, outs = kept[number]
        for round in range(40):
            outs.append(device.alloc(4, stream=stream))
            kernel(stream, 1, 1, outs[-1], 1000 * number + round)
        for round, out in enumerate(outs):
            wanted = (1000 * number + round).to_bytes(4, "little")
            same(read(out, stream), wanted, f"launch {round} of thread {number}")

    _at_once(work)


@check()
def graphs(device: Device) -> None:
    """Threads that capture and launch at once, each on its stream, get their own graphs."""

    def work(number: int) -> None:
        stream = device.stream()
        buffer = holding(device, stream, bytes(500))
        for round in range(10):
            with stream.capture() as graph:
                buffer.fill(bytes([number * 10 + round]), stream=stream)
            graph.launch(stream)
            same(read(buffer, stream), bytes([number * 10 + round]) * 500, f"thread {number}")

    _at_once(work)
