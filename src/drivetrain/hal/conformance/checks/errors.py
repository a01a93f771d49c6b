"""Bad input: refused with BadInput before the driver is called."""

from __future__ import annotations

import array
import re
from collections.abc import Callable

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal import F32, I32, PTR
from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.conformance.work import (
    OLD,
    backend,
    data,
    holding,
    read,
    refused,
    refused_early,
    same,
    stranger,
)
from drivetrain.hal.device import Device
from drivetrain.hal.kinds import Kind


@check()
def sizes(device: Device) -> None:
    """Sizes below 0 or beyond any memory, and those that are no whole number."""
    stream = device.stream()
    for nbytes in (-1, 1 << 60, 1.5, "16", None):
        refused_early(
            device,
            f"alloc({nbytes!r})",
            lambda n=nbytes: device.alloc(n, stream=stream),  # type: ignore[misc]
        )


@check()
def closed_buffer(device: Device) -> None:
    """A buffer that is closed, and a view of one."""
    stream = device.stream()
    buffer, other = (holding(device, stream, OLD * 100) for _ in range(2))
    view = buffer.view(0, 10)
    buffer.close()
    for what, each in (("a closed buffer", buffer), ("a view of a closed buffer", view)):
        refused_early(device, f"fill of {what}", lambda e=each: e.fill(OLD, stream=stream))  # type: ignore[misc]
        refused_early(
            device,
            f"copy to {what}",
            lambda e=each: e.copy_from(b"x", stream=stream),  # type: ignore[misc]
        )
        refused_early(
            device,
            f"copy from {what}",
            lambda e=each: e.copy_to(bytearray(1), stream=stream),  # type: ignore[misc]
        )
        refused_early(
            device,
            f"device copy from {what}",
            lambda e=each: other.copy_from(e, stream=stream),  # type: ignore[misc]
        )
        refused_early(device, f"view of {what}", lambda e=each: e.view(0, 1))  # type: ignore[misc]


@check()
def closed_stream(device: Device) -> None:
    """A stream that is closed."""
    stream, other = device.stream(), device.stream()
    buffer = holding(device, other, OLD * 100)
    stream.close()
    refused_early(device, "alloc", lambda: device.alloc(10, stream=stream))
    refused_early(device, "fill", lambda: buffer.fill(OLD, stream=stream))
    refused_early(device, "record", stream.record)
    refused_early(device, "wait", lambda: stream.wait(other))
    refused_early(device, "synchronize", stream.synchronize)
    same(read(buffer, other), OLD * 100, "the buffer after all that")


@check()
def other_devices(device: Device) -> None:
    """A stream or buffer of another device."""
    foreign = stranger(device)
    stream, away = device.stream(), foreign.stream()
    buffer = holding(device, stream, OLD * 100)
    refused_early(device, "alloc", lambda: device.alloc(10, stream=away))
    refused_early(device, "fill", lambda: buffer.fill(OLD, stream=away))
    refused_early(device, "copy in", lambda: buffer.copy_from(b"x", stream=away))
    refused_early(device, "copy out", lambda: buffer.copy_to(bytearray(1), stream=away))
    refused_early(device, "used_by", lambda: buffer.used_by(away))
    refused_early(device, "close", lambda: buffer.close(away))


@check()
def lengths(device: Device) -> None:
    """Copies of more than fits, views beyond the end, overlapping copies."""
    stream = device.stream()
    buffer, small = holding(device, stream, data(100)), holding(device, stream, OLD * 99)
    refused_early(device, "101 bytes in", lambda: buffer.copy_from(bytes(101), stream=stream))
    refused_early(device, "101 bytes out", lambda: buffer.copy_to(bytearray(101), stream=stream))
    refused_early(device, "100 into 99", lambda: small.copy_from(buffer, stream=stream))
    for offset, nbytes in ((-1, 5), (0, 101), (100, 1), (50, -1)):
        refused_early(
            device,
            f"view({offset}, {nbytes})",
            lambda o=offset, n=nbytes: buffer.view(o, n),  # type: ignore[misc]
        )
    refused_early(
        device,
        "an overlapping copy",
        lambda: buffer.view(0, 60).copy_from(buffer.view(40, 60), stream=stream),
    )
    same(read(buffer, stream), data(100), "the buffer after all that")


@check()
def host_arrays(device: Device) -> None:
    """Host arrays that are not contiguous, read-only where they are written, or no arrays."""
    stream = device.stream()
    buffer = holding(device, stream, data(100))
    strided = memoryview(bytearray(40))[::2]
    refused_early(device, "strided in", lambda: buffer.copy_from(strided, stream=stream))
    refused_early(device, "strided out", lambda: buffer.copy_to(strided, stream=stream))
    refused_early(device, "read-only out", lambda: buffer.copy_to(bytes(10), stream=stream))
    for thing in (None, 7, "text", [1, 2]):
        refused_early(
            device,
            f"a {type(thing).__name__}",
            lambda t=thing: buffer.copy_from(t, stream=stream),  # type: ignore[misc]
        )
    same(read(buffer, stream), data(100), "the buffer after all that")


@check()
def patterns(device: Device) -> None:
    """Fills with a pattern of another width, or that does not fit the buffer or its address."""
    stream = device.stream()
    buffer = holding(device, stream, data(100))
    for pattern in (b"", b"abc", bytes(5), bytes(32)):
        refused_early(
            device,
            f"a pattern of {len(pattern)} bytes",
            lambda p=pattern: buffer.fill(p, stream=stream),  # type: ignore[misc]
        )
    refused_early(device, "100 bytes of 8", lambda: buffer.fill(bytes(8), stream=stream))
    refused_early(
        device,
        "an address of no multiple",
        lambda: buffer.view(2, 8).fill(bytes(4), stream=stream),
    )


@check()
def waits(device: Device) -> None:
    """Waits with a limit below 0, and for what is no event or stream."""
    stream = device.stream()
    refused_early(device, "synchronize(-1)", lambda: stream.synchronize(-1))
    refused_early(device, "synchronize(nan)", lambda: stream.synchronize(float("nan")))
    for thing in (None, 3, "event"):
        refused_early(device, f"wait({thing!r})", lambda t=thing: stream.wait(t))  # type: ignore[misc]


@check()
def absent_groups(device: Device) -> None:
    """What the driver does not declare is refused with Unsupported, by the core."""
    stream = device.stream()
    has = backend(device).groups
    for kind, group in ((Kind.PINNED, "pinned"), (Kind.MANAGED, "managed")):
        if group not in has:
            refused_early(
                device,
                f"{group} memory",
                lambda k=kind: device.alloc(16, stream=stream, kind=k),  # type: ignore[misc]
                Unsupported,
            )


@check("compute", limit_s=120.0)
def launches(device: Device) -> None:
    """Arguments of another number, type or range; grids and blocks beyond the limits."""
    stream = device.stream()
    kernel = kernels.module(device).kernel("twice")
    a, b = (holding(device, stream, OLD * 64) for _ in range(2))
    limits = backend(device).limits
    good = (a, b, 16)
    for what, arguments in (
        ("two arguments", good[:2]),
        ("four arguments", (*good, 1)),
        ("an int for a pointer", (1, b, 16)),
        ("bytes for a pointer", (b"abc", b, 16)),
        ("a buffer for an int", (a, b, a)),
        ("a float for an int", (a, b, 1.5)),
        ("text for an int", (a, b, "16")),
        ("an int beyond its range", (a, b, 1 << 31)),
        ("an int below its range", (a, b, -(1 << 31) - 1)),
    ):
        refused_early(device, what, lambda x=arguments: kernel(stream, 1, 16, *x))  # type: ignore[misc]
    for grid, block in (
        (0, 1),
        (-1, 1),
        ((1, 0, 1), 1),
        ((1, 1, 1, 1), 1),
        (limits.grid[0] + 1, 1),
        ((1, limits.grid[1] + 1, 1), 1),
        ((1, 1, limits.grid[2] + 1), 1),
        (1, 0),
        (1, limits.threads + 1),
        (1, (limits.block[0] + 1, 1, 1)),
        (1, (1, 1, limits.block[2] + 1)),
        ("1", 1),
        (1.5, 1),
    ):
        refused_early(
            device,
            f"a grid of {grid!r} and a block of {block!r}",
            lambda g=grid, k=block: kernel(stream, g, k, *good),  # type: ignore[misc]
        )
    for shared in (-1, limits.shared_bytes + 1):
        refused_early(
            device,
            f"{shared} bytes of shared memory",
            lambda s=shared: kernel(stream, 1, 1, *good, shared=s),  # type: ignore[misc]
        )


@check("compute", limit_s=120.0)
def kernel_buffers(device: Device) -> None:
    """Kernels with a buffer that is closed or of another device, or a stream of one."""
    foreign = stranger(device)
    stream, away = device.stream(), foreign.stream()
    kernel = kernels.module(device).kernel("tell")
    out, theirs = holding(device, stream, OLD * 4), holding(foreign, away, OLD * 4)
    refused_early(device, "another device's stream", lambda: kernel(away, 1, 1, out, 1))
    refused_early(device, "another device's buffer", lambda: kernel(stream, 1, 1, theirs, 1))
    plan = kernel.plan(stream, 1, 1, out, 1)
    out.close()
    refused_early(device, "a closed buffer", lambda: kernel(stream, 1, 1, out, 1))
    refused_early(device, "a plan with a closed buffer", plan)


@check("compute", limit_s=120.0)
def kernel_names(device: Device) -> None:
    """Kernels that the source does not have, and argument types that are not its own."""
    module = kernels.module(device)
    refused("no such kernel", lambda: module.kernel("nowhere"))
    refused("too few types", lambda: module.kernel("tell", [PTR]))
    refused("another type", lambda: module.kernel("tell", [PTR, F32]))
    refused("no type at all", lambda: module.kernel("tell", [PTR, int]))  # type: ignore[list-item]
    module.kernel("tell", [PTR, I32])


@check("timing")
def times(device: Device) -> None:
    """The time between events of which one is not done, or is of another device."""
    stream, away = device.stream(), stranger(device).stream()
    first, theirs = stream.record(), away.record()
    stream.synchronize()
    away.synchronize()
    refused("an event of another device", lambda: first.seconds_since(theirs), BadInput)


@check()
def typed_arrays(device: Device) -> None:
    """A typed array counts in bytes: 13 doubles do not fit 100 bytes."""
    stream = device.stream()
    buffer = holding(device, stream, data(100))
    words = array.array("d", range(13))
    refused_early(device, "13 doubles", lambda: buffer.copy_from(words, stream=stream))


@check("compute", limit_s=120.0)
def later_arguments(device: Device) -> None:
    """A plan's and a graph's argument of the wrong place, type or range: refused, and the others
    stay as they were."""
    stream = device.stream()
    kernel = kernels.module(device).kernel("tell")
    out, closed = (holding(device, stream, OLD * 4) for _ in range(2))
    plan = kernel.plan(stream, 1, 1, out, 7)
    with stream.capture() as graph:
        plan()
    closed.close()
    for index, value in ((0, 3), (0, closed), (1, "7"), (1, 1 << 31), (1, None), (2, 1), (-1, 1)):
        what = f"argument {index} as {value!r}"
        refused_early(device, f"plan.set, {what}", lambda i=index, v=value: plan.set(i, v))  # type: ignore[misc]
        refused_early(device, f"graph.set, {what}", lambda i=index, v=value: graph.set(0, i, v))  # type: ignore[misc]
    acts: tuple[Callable[[], None], ...] = (plan, lambda: graph.launch(stream))
    for act in acts:
        out.fill(OLD, stream=stream)
        act()
        same(read(out, stream), (7).to_bytes(4, "little"), "what a refused change left")


@check("compute", limit_s=120.0)
def source_with_a_mistake(device: Device) -> None:
    """A source that does not compile raises CompileError, whose log names the line."""
    text = (
        'extern "C" __global__ void f(int *out) {\n    out[0] = 1;\n    out[0] = missing + 1;\n}\n'
    )
    try:
        device.compile(hal.Source.cuda(text))
    except CompileError as error:
        told = f"{error}\n{error.log}"
        expect("missing" in told, f"it does not name what is wrong: {told[:300]!r}")
        expect(re.search(r"\b3\b", told), f"it does not name line 3: {told[:300]!r}")
        return
    expect(False, "a source with an undeclared name was compiled")


@check("compute")
def bad_code(device: Device) -> None:
    """Code that is none, or of a form that the device never takes, is an error and no crash."""
    driver = backend(device)
    for form in ("ptx", "cubin", "so", "cl", "spirv", "hsaco"):
        try:
            driver.module_load(b"this is no code at all;" * 9, form)
        except HalError:
            continue
        expect(False, f"text was loaded as {form}")


@check("compute", limit_s=120.0)
def facts(device: Device) -> None:
    """Limits and a kernel's facts make sense, and a block as large as they say runs."""
    stream = device.stream()
    limits = backend(device).limits
    least = (*limits.grid, *limits.block, limits.threads, limits.shared_bytes)
    expect(min(least) >= 1, f"a limit is below 1: {limits}")
    kernel = kernels.module(device).kernel("tell")
    expect(min(vars(kernel.facts).values()) >= 0, f"a fact is below 0: {kernel.facts}")
    threads = min(kernel.facts.threads or limits.threads, limits.block[0])
    expect(threads <= limits.threads, f"the kernel takes {threads} threads, the device fewer")
    out = holding(device, stream, OLD * (4 * threads))
    kernel(stream, 1, threads, out, 5)
    same(read(out, stream), (5).to_bytes(4, "little") * threads, f"a block of {threads} threads")


@check()
def hidden_memory(device: Device) -> None:
    """Memory that the host cannot touch is not given to it."""
    stream = device.stream()
    buffer = holding(device, stream, data(100))
    if buffer.host_visible:
        same(bytes(buffer.memoryview()), data(100), "memory that the host sees")
    else:
        refused_early(device, "memoryview", buffer.memoryview, HalError)
