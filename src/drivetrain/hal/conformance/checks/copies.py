"""Copies: every size and offset, whole and nothing else, and what the host may do meanwhile."""

from __future__ import annotations

import array
import gc
import weakref

from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import (
    NEW,
    OLD,
    busy,
    data,
    holding,
    read,
    same,
    stranger,
)
from drivetrain.hal.device import Device
from drivetrain.hal.link import LinkKind

SIZES = (1, 2, 3, 7, 16, 31, 255, 256, 257, 4095, 4097, 65535, 1 << 16, 1_000_003)
LARGE = (16 << 20) + 3


@check()
def round_trip(device: Device) -> None:
    """What is copied in comes out, at odd sizes too, and no byte behind it is touched."""
    stream = device.stream()
    for nbytes in SIZES:
        with device.alloc(nbytes + 16, stream=stream) as buffer:
            buffer.fill(OLD, stream=stream)
            buffer.copy_from(data(nbytes), stream=stream)
            same(read(buffer, stream), data(nbytes) + OLD * 16, f"{nbytes} bytes in and out")


@check()
def shorter(device: Device) -> None:
    """A host array that is shorter than the buffer gets its beginning."""
    stream = device.stream()
    buffer = holding(device, stream, data(1000))
    for nbytes in (1, 17, 999, 1000):
        out = bytearray(nbytes)
        buffer.copy_to(out, stream=stream)
        stream.synchronize()
        same(bytes(out), data(1000)[:nbytes], f"{nbytes} bytes out of 1000")


@check()
def offsets(device: Device) -> None:
    """Copies from and to views begin at the view's first byte, whatever its address."""
    stream = device.stream()
    content = data(8192)
    source = holding(device, stream, content)
    target = holding(device, stream, OLD * 8192)
    for at, to, nbytes in ((1, 2, 3), (3, 1, 1000), (255, 257, 4000), (4096, 1, 4095), (7, 0, 1)):
        target.fill(OLD, stream=stream)
        part = source.view(at, nbytes)
        same(read(part, stream), content[at : at + nbytes], f"a view from byte {at}, read")
        target.view(to, nbytes).copy_from(part, stream=stream)
        wanted = OLD * to + content[at : at + nbytes] + OLD * (8192 - to - nbytes)
        same(read(target, stream), wanted, f"{nbytes} bytes from {at} to {to} on the device")
        target.view(to, nbytes).copy_from(content[:nbytes], stream=stream)
        wanted = OLD * to + content[:nbytes] + OLD * (8192 - to - nbytes)
        same(read(target, stream), wanted, f"{nbytes} bytes from the host to {to}")


@check()
def within_the_device(device: Device) -> None:
    """A copy between two buffers goes from the source to the destination."""
    stream = device.stream()
    for nbytes in SIZES:
        source = holding(device, stream, data(nbytes, 2))
        target = holding(device, stream, data(nbytes, 3))
        target.copy_from(source, stream=stream)
        same(read(target, stream), data(nbytes, 2), f"the destination of {nbytes} bytes")
        same(read(source, stream), data(nbytes, 2), f"the source of {nbytes} bytes")


@check()
def large(device: Device) -> None:
    """Copies of more than 16 MiB are whole, every way."""
    stream = device.stream()
    content = data(LARGE)
    with holding(device, stream, content) as source, device.alloc(LARGE, stream=stream) as target:
        target.fill(OLD, stream=stream)
        target.copy_from(source, stream=stream)
        same(read(target, stream), content, f"{LARGE} bytes")


@check()
def host_reused(device: Device) -> None:
    """A host array may be reused as soon as the copy from it was queued."""
    stream = device.stream()
    for nbytes in (100, 100_000, 4 << 20):
        buffer = holding(device, stream, OLD * nbytes)
        busy(device, stream)
        host = bytearray(data(nbytes))
        buffer.copy_from(host, stream=stream)
        host[:] = bytes(nbytes)
        same(read(buffer, stream), data(nbytes), f"{nbytes} bytes whose array was overwritten")


@check()
def out_in_order(device: Device) -> None:
    """A copy to the host has what was queued before it, not what was queued after."""
    stream = device.stream()
    buffer = holding(device, stream, OLD * 50_000)
    busy(device, stream)
    buffer.fill(NEW, stream=stream)
    out = bytearray(50_000)
    buffer.copy_to(out, stream=stream)
    buffer.fill(OLD, stream=stream)
    stream.synchronize()
    same(bytes(out), NEW * 50_000, "a copy to the host between two fills")


@check()
def host_types(device: Device) -> None:
    """Read-only bytes, typed arrays and memoryviews are taken as their bytes."""
    stream = device.stream()
    words = array.array("d", [1.5, -2.25, 1e300])
    view = memoryview(bytearray(data(60)))[10:50]
    for given in (data(40), bytearray(data(40)), words, view, memoryview(words)):
        wanted = memoryview(given).cast("B").tobytes() if given is not view else view.tobytes()
        same(
            read(holding(device, stream, wanted), stream),
            wanted,
            f"the bytes of a {type(given).__name__}",
        )
        buffer = device.alloc(len(wanted), stream=stream)
        buffer.copy_from(given, stream=stream)
        same(read(buffer, stream), wanted, f"a {type(given).__name__}")
    back = array.array("d", [0.0] * 3)
    holding(device, stream, words.tobytes()).copy_to(back, stream=stream)
    stream.synchronize()
    same(back.tobytes(), words.tobytes(), "a typed array that was copied to")


@check()
def other_driver(device: Device) -> None:
    """Copies from and to a device of another driver, in chunks and with a rest."""
    other = stranger(device)
    here, there = device.stream(), other.stream()
    for nbytes in (1, 1000, 300_001, (9 << 20) + 5):
        content = data(nbytes, nbytes)
        source = holding(device, here, content)
        away = other.alloc(nbytes, stream=there)
        away.copy_from(source, stream=there)
        same(read(away, there), content, f"{nbytes} bytes to {other.address}")
        back = device.alloc(nbytes, stream=here)
        back.copy_from(away, stream=here)
        same(read(back, here), content, f"{nbytes} bytes from {other.address}")


@check()
def kept_alive(device: Device) -> None:
    """A host array that is copied to lives until the copy is done, and no longer."""
    stream = device.stream()
    buffer = holding(device, stream, data(80_000))
    busy(device, stream)
    host = array.array("b", bytes(80_000))
    held = weakref.ref(host)
    buffer.copy_to(host, stream=stream)
    del host
    gc.collect()
    kept = held()
    expect(kept is not None, "the array that a queued copy goes to was let go of")
    stream.synchronize()
    assert kept is not None
    same(kept.tobytes(), data(80_000), "an array that only the copy held")
    del kept
    gc.collect()
    expect(held() is None, "the array is still held after the stream was synchronised")


@check()
def link(device: Device) -> None:
    """How bytes go to itself and to another device is told, and measured."""
    same_device, away = device.link(device), device.link(stranger(device))
    expect(same_device.kind is LinkKind.SAME, f"the link to itself is {same_device.kind.value}")
    expect(away.kind is LinkKind.STAGED, f"the link to another driver is {away.kind.value}")
    for found in (same_device, away):
        expect(
            found.bandwidth_gbps is not None and found.bandwidth_gbps > 0,
            f"{found.kind.value} has a bandwidth of {found.bandwidth_gbps} GB/s: {found.reason}",
        )
