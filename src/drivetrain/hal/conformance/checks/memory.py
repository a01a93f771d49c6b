"""Memory: given, kept apart, filled, given back."""

from __future__ import annotations

import gc
from itertools import pairwise

from drivetrain.errors import HalError, OutOfMemory
from drivetrain.hal.conformance.check import CHECKED_ADDRESSES, OWN_MEMORY, check, expect
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
)
from drivetrain.hal.device import Device
from drivetrain.hal.kinds import Kind
from drivetrain.hal.memory import Buffer
from drivetrain.hal.opened import opened
from drivetrain.hal.pool import Pool
from drivetrain.hal.resource import FailureInjection

SIZES = (1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 4095, 4096, 65537, 1 << 20)


@check()
def alignment(device: Device) -> None:
    """Addresses are multiples of the alignment that the driver declares, at least 16."""
    declared = backend(device).alignment
    expect(
        declared >= 16 and declared & (declared - 1) == 0,
        f"an alignment of {declared} is declared; a power of two from 16 on is wanted",
    )
    stream = device.stream()
    memory = driver_memory(device)
    for nbytes in SIZES:
        ptr = memory.allocate(nbytes, stream.handle)
        memory.deallocate(ptr, nbytes, stream.handle, ())
        expect(ptr % declared == 0, f"{nbytes} bytes at {ptr:#x}: no multiple of {declared}")


@check()
def apart(device: Device) -> None:
    """Allocations do not overlap: each keeps its own bytes."""
    stream = device.stream()
    memory = driver_memory(device)
    held = []
    for number, nbytes in enumerate(SIZES * 3):
        held.append(Buffer.of(opened(device), nbytes, Kind.DEVICE, stream, memory))
        held[-1].copy_from(data(nbytes, number), stream=stream)
    for number, buffer in enumerate(held):
        same(read(buffer, stream), data(buffer.nbytes, number), f"allocation {number}")
    spans = sorted((buffer.ptr, buffer.nbytes) for buffer in held)
    for (first, nbytes), (after, _) in pairwise(spans):
        expect(first + nbytes <= after, f"{nbytes} bytes at {first:#x} overlap those at {after:#x}")


@check()
def pooled_apart(device: Device) -> None:
    """Buffers of the pool do not overlap either, also when memory is used again."""
    stream = device.stream()
    for round in range(3):
        held = [holding(device, stream, data(n, n + round)) for n in SIZES]
        for buffer in held:
            same(
                read(buffer, stream), data(buffer.nbytes, buffer.nbytes + round), "a pooled buffer"
            )
            buffer.close()


@check()
def nothing(device: Device) -> None:
    """A buffer of zero bytes can be made, viewed, filled, copied and closed."""
    stream = device.stream()
    with device.alloc(0, stream=stream) as empty, device.alloc(16, stream=stream) as other:
        other.fill(NEW, stream=stream)
        empty.fill(OLD, stream=stream)
        empty.copy_from(b"", stream=stream)
        other.copy_from(empty, stream=stream)
        empty.view(0, 0).copy_to(bytearray(), stream=stream)
        same(read(other, stream), NEW * 16, "after copies of nothing")


@check()
def out_of_memory(device: Device) -> None:
    """More than there is raises OutOfMemory; the device works on."""
    stream = device.stream()
    total = backend(device).memory()[1]
    expect(total > 0, "memory() says that the device has no memory")
    memory = driver_memory(device)
    refused(
        f"{4 * total} bytes from a device that has {total}",
        lambda: memory.allocate(4 * total, stream.handle),
        OutOfMemory,
    )
    try:
        device.alloc(4 * total, stream=stream)
    except OutOfMemory as error:
        expect(error.requested, "the pool's OutOfMemory does not say what was requested")
    buffer = holding(device, stream, data(1000))
    same(read(buffer, stream), data(1000), "a copy after memory ran out")


@check()
def freed_in_order(device: Device) -> None:
    """Memory is given back only after the work that was queued on its stream before."""
    stream, other = device.stream(), device.stream()
    memory = driver_memory(device)
    nbytes = 1 << 16
    for _ in range(3):
        first = Buffer.of(opened(device), nbytes, Kind.DEVICE, stream, memory)
        kept = device.alloc(nbytes, stream=stream)
        first.fill(NEW, stream=stream)
        kept.fill(OLD, stream=stream)
        stream.synchronize()
        busy(device, stream)
        kept.copy_from(first, stream=stream)
        first.close()
        with Buffer.of(opened(device), nbytes, Kind.DEVICE, other, memory) as reused:
            reused.fill(OLD, stream=other)
            other.synchronize()
        same(read(kept, stream), NEW * nbytes, "what was copied before the memory was freed")


@check(OWN_MEMORY)
def reported(device: Device) -> None:
    """memory() says less when much is allocated, and as much as before when it is freed."""
    stream = device.stream()
    memory = driver_memory(device)
    before, total = backend(device).memory()
    expect(0 < before <= total, f"{before} of {total} bytes are free")
    nbytes = min(before // 4, 256 << 20)
    buffer = Buffer.of(opened(device), nbytes, Kind.DEVICE, stream, memory)
    buffer.fill(NEW, stream=stream)
    stream.synchronize()
    during = backend(device).memory()[0]
    buffer.close()
    stream.synchronize()
    after = backend(device).memory()[0]
    expect(
        before - during >= nbytes // 2,
        f"{nbytes} bytes were allocated and {before - during} fewer are free",
    )
    expect(after - during >= nbytes // 2, f"{nbytes} bytes were freed, {after - during} came back")


@check()
def fill_widths(device: Device) -> None:
    """Patterns of 1, 2, 4, 8 and 16 bytes are repeated over the whole buffer."""
    stream = device.stream()
    for width in (1, 2, 4, 8, 16):
        pattern = data(width, width)
        for count in (1, 2, 3, 255, 4097):
            with device.alloc(width * count, stream=stream) as buffer:
                buffer.fill(b"\0", stream=stream)
                buffer.fill(pattern, stream=stream)
                same(read(buffer, stream), pattern * count, f"{count} times {width} bytes")


@check()
def fill_stays_inside(device: Device) -> None:
    """A fill of a part leaves what lies before and after it alone."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 4096)
    for offset, nbytes in ((0, 1), (1, 1), (3, 250), (256, 256), (1000, 2000), (4095, 1)):
        buffer.fill(OLD, stream=stream)
        buffer.view(offset, nbytes).fill(NEW, stream=stream)
        wanted = OLD * offset + NEW * nbytes + OLD * (4096 - offset - nbytes)
        same(read(buffer, stream), wanted, f"bytes {offset} to {offset + nbytes} filled")


@check()
def adaptor_fails(device: Device) -> None:
    """A request that is made to fail raises OutOfMemory and takes nothing."""
    stream = device.stream()
    memory = driver_memory(device)
    failing = FailureInjection(memory, lambda number, nbytes: number == 2)
    with device.alloc(1000, stream=stream, pool=failing):
        refused(
            "the second request",
            lambda: device.alloc(1000, stream=stream, pool=failing),
            OutOfMemory,
        )
        with device.alloc(1000, stream=stream, pool=failing):
            expect(memory.stats().live == 2, f"{memory.stats().live} buffers, 2 were expected")


@check()
def forgotten(device: Device) -> None:
    """Memory of a buffer that nobody holds any more is given back."""
    stream = device.stream()
    memory = driver_memory(device)
    for _ in range(10):
        Buffer.of(opened(device), 4096, Kind.DEVICE, stream, memory)
    gc.collect()
    expect(memory.stats().live == 0, f"{memory.stats().live} forgotten buffers are still held")


@check("pinned")
def pinned(device: Device) -> None:
    """Pinned memory: the host writes it, the device copies from and to it."""
    _host_memory(device, Kind.PINNED)


@check("managed")
def managed(device: Device) -> None:
    """Managed memory: the host and the device see the same bytes."""
    _host_memory(device, Kind.MANAGED)


def _host_memory(device: Device, kind: Kind) -> None:
    stream = device.stream()
    content = data(100_003)
    with (
        device.alloc(len(content), stream=stream, kind=kind) as host,
        device.alloc(len(content), stream=stream) as buffer,
    ):
        stream.synchronize()
        view = host.memoryview()
        view[:] = content
        buffer.copy_from(host, stream=stream)
        same(read(buffer, stream), content, f"a copy from {kind.name.lower()} memory")
        view[:] = bytes(len(content))
        buffer.copy_to(host, stream=stream)
        stream.synchronize()
        same(bytes(view), content, f"a copy to {kind.name.lower()} memory")
        host.fill(NEW, stream=stream)
        stream.synchronize()
        same(bytes(view), NEW * len(content), f"a fill of {kind.name.lower()} memory")
        with device.alloc(len(content), stream=stream, kind=kind) as other:
            other.copy_from(content, stream=stream)
            host.copy_from(other, stream=stream)
            stream.synchronize()
            same(bytes(view), content, f"a copy between two buffers of {kind.name.lower()} memory")
        view.release()


@check(CHECKED_ADDRESSES)
def freed_once(device: Device) -> None:
    """Freeing an address that is not allocated is an error."""
    stream = device.stream()
    driver = backend(device)
    ptr = driver.alloc(4096, Kind.DEVICE, stream.handle)
    driver.free(ptr, Kind.DEVICE, stream.handle)
    refused("a second free", lambda: driver.free(ptr, Kind.DEVICE, stream.handle), HalError)
    refused("a free of nothing", lambda: driver.free(64, Kind.DEVICE, stream.handle), HalError)


@check()
def views_of_views(device: Device) -> None:
    """A view of a view begins where both say, and each keeps the memory alive."""
    stream = device.stream()
    content = data(4096)
    buffer = holding(device, stream, content)
    inner = buffer.view(100, 3000).view(77, 1001)
    same(read(inner, stream), content[177:1178], "a view of a view")
    del buffer
    gc.collect()
    device.alloc(4096, stream=stream).fill(OLD, stream=stream)
    same(read(inner, stream), content[177:1178], "a view of a buffer that nobody else holds")


@check()
def wrapped(device: Device) -> None:
    """Memory of somebody else as a buffer: the same bytes, its owner kept alive, nothing freed."""
    stream = device.stream()
    memory = driver_memory(device)
    owner = Buffer.of(opened(device), 1000, Kind.DEVICE, stream, memory)
    owner.copy_from(data(1000), stream=stream)
    theirs = device.wrap(owner.ptr + 100, 500, owner=owner)
    del owner
    gc.collect()
    expect(memory.stats().live == 1, "the owner of wrapped memory was not kept alive")
    same(read(theirs, stream), data(1000)[100:600], "wrapped memory")
    theirs.fill(NEW, stream=stream)
    same(read(theirs, stream), NEW * 500, "wrapped memory that was filled")
    theirs.close()
    stream.synchronize()  # until then queued work might use it
    gc.collect()
    expect(memory.stats().live == 0, "the owner is kept though the buffer was closed")


@check()
def retried(device: Device) -> None:
    """When a request does not fit, what a pool holds unused goes back and it is tried again; what
    does not fit then is OutOfMemory with the bytes asked for, and the pool works on."""
    stream = device.stream()
    failing: set[int] = {2}
    below = FailureInjection(driver_memory(device), lambda number, nbytes: number in failing)
    pool = Pool(below)
    device.alloc(3 << 20, stream=stream, pool=pool).close()
    with device.alloc(30 << 20, stream=stream, pool=pool) as buffer:
        buffer.fill(NEW, stream=stream)
        same(read(buffer, stream), NEW * (30 << 20), "a buffer whose first request failed")
        now = pool.stats()
        expect(now.retries == 1, f"{now.retries} retries were counted, 1 was expected")
        expect(now.reserved < 60 << 20, f"{now.reserved} bytes are held: nothing was given back")
        failing |= {4, 5}
        try:
            device.alloc(50 << 20, stream=stream, pool=pool)
        except OutOfMemory as error:
            expect(error.requested == 50 << 20, f"it says that {error.requested} were requested")
            expect(error.total > 0, "it does not say how much there is in all")
            expect(isinstance(error, MemoryError), "it is no MemoryError")
        else:
            expect(False, "a request that was made to fail twice succeeded")
    with device.alloc(50 << 20, stream=stream, pool=pool) as buffer:
        buffer.fill(OLD, stream=stream)
    stream.synchronize()
    pool.trim()
    expect(pool.stats().reserved == 0, f"after trim {pool.stats().reserved} bytes are held")


@check()
def limited(device: Device) -> None:
    """A pool with a limit refuses what would pass it with OutOfMemory, and gives it after a
    close."""
    stream = device.stream()
    pool = Pool(driver_memory(device), limit=24 << 20)
    first = device.alloc(16 << 20, stream=stream, pool=pool)
    refused(
        "16 MiB above the limit",
        lambda: device.alloc(16 << 20, stream=stream, pool=pool),
        OutOfMemory,
    )
    first.close()
    with device.alloc(20 << 20, stream=stream, pool=pool) as second:
        second.fill(NEW, stream=stream)
        same(read(second, stream), NEW * (20 << 20), "a buffer just below the limit")


@check()
def told(device: Device) -> None:
    """memory() tells what is free and what there is: above 0, and not more free than there is."""
    free, total = backend(device).memory()
    expect(0 < free <= total, f"{free} of {total} bytes are free")
