"""Kernels: every block and thread runs, with the arguments as they were at the call."""

from __future__ import annotations

import struct
import weakref
from typing import Literal

from drivetrain import hal
from drivetrain.errors import HalError
from drivetrain.hal.conformance.check import check, expect
from drivetrain.hal.conformance.work import OLD, backend, busy, data, holding, read, refused, same
from drivetrain.hal.device import Device
from drivetrain.hal.kernel import Module
from drivetrain.hal.memory import Buffer
from drivetrain.hal.opened import Opened, opened
from drivetrain.hal.stream import Stream

SOURCE = """
struct Record { int a; float b[3]; unsigned char c; long long d; };

extern "C" __global__ void integers(long long *out, signed char a, short b, int c, long long d,
                                    unsigned char e, unsigned short f, unsigned int g,
                                    unsigned long long h) {
    out[0] = a; out[1] = b; out[2] = c; out[3] = d;
    out[4] = e; out[5] = f; out[6] = g; out[7] = (long long)h;
}

extern "C" __global__ void floats(float *out, float a, int b, float c) {
    out[0] = a; out[1] = (float)b; out[2] = c;
}

extern "C" __global__ void record(long long *out, Record r, int after) {
    out[0] = r.a; out[1] = (long long)r.b[0]; out[2] = (long long)r.b[1];
    out[3] = (long long)r.b[2]; out[4] = r.c; out[5] = r.d; out[6] = after;
}

extern "C" __global__ void where(unsigned int *out) {
    unsigned int x = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int y = blockIdx.y * blockDim.y + threadIdx.y;
    unsigned int z = blockIdx.z * blockDim.z + threadIdx.z;
    unsigned int at = (z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x;
    out[at] = blockIdx.x | blockIdx.y << 5 | blockIdx.z << 10
            | threadIdx.x << 15 | threadIdx.y << 20 | threadIdx.z << 25;
}

extern "C" __global__ void twice(int *out, const int *in, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 2 * in[i];
}

extern "C" __global__ void is_null(int *out, const int *maybe) {
    out[0] = maybe == 0 ? 1 : 2;
}

extern "C" __global__ void tell(int *out, int value) {
    out[threadIdx.x] = value;
}

extern "C" __global__ void count(int *bins, int *most, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        atomicAdd(&bins[i % 4], 1 + i % 3);
        atomicMax(most, i);
    }
}

extern "C" __global__ void turn(int *data) {
    __shared__ int tile[64];
    int t = threadIdx.x;
    tile[t] = data[blockIdx.x * 64 + t];
    for (int round = 0; round < 3; ++round) {
        __syncthreads();
        int other = tile[63 - t];
        __syncthreads();
        tile[t] = other + 1;
    }
    __syncthreads();
    data[blockIdx.x * 64 + t] = tile[(t + 1) % 64];
}

extern "C" __global__ void turn_dynamic(int *data, int n) {
    extern __shared__ int room[];
    int t = threadIdx.x;
    for (int i = t; i < n; i += blockDim.x) room[i] = data[i];
    __syncthreads();
    for (int i = t; i < n; i += blockDim.x) data[i] = room[n - 1 - i];
}
"""

DOUBLES = """
extern "C" __global__ void doubles(double *out, double a, int b, double c) {
    out[0] = a; out[1] = b / 3.0; out[2] = c;
}
"""

_modules: weakref.WeakKeyDictionary[Opened, Module] = weakref.WeakKeyDictionary()


def module(device: Device) -> Module:
    """The kernels above, compiled once. Raises Unsupported without a compiler."""
    here = opened(device)
    found = _modules.get(here)
    if found is None:
        found = _modules[here] = device.compile(hal.Source.cuda(SOURCE))
    return found


def _ints(buffer: Buffer, stream: Stream, code: Literal["i", "I", "q"] = "i") -> list[int]:
    return list(memoryview(read(buffer, stream)).cast(code))


def _packed(values: list[int]) -> bytes:
    return struct.pack(f"{len(values)}i", *values)


def _is(found: list[int], wanted: list[int], what: str) -> None:
    if found == wanted:
        return
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
    expect(at < 0, f"{what}: number {at} is {found[at]}, {wanted[at]} was expected")
    expect(False, f"{what}: {len(found)} numbers, {len(wanted)} were expected")


@check("compute", limit_s=120.0)
def integers(device: Device) -> None:
    """Integers of every width arrive with their sign, small and large ones."""
    stream = device.stream()
    kernel = module(device).kernel("integers")
    for values in (
        [-5, -300, -70000, -(1 << 40), 250, 60000, 4_000_000_000, 1 << 50],
        [-128, -(1 << 15), -(1 << 31), -(1 << 63), 255, 65535, (1 << 32) - 1, (1 << 63) - 1],
        [127, 32767, (1 << 31) - 1, (1 << 63) - 1, 0, 0, 0, 0],
    ):
        out = holding(device, stream, OLD * 64)
        kernel(stream, 1, 1, out, *values)
        _is(_ints(out, stream, "q"), values, "integers as a kernel sees them")


@check("compute")
def floats(device: Device) -> None:
    """Floating-point arguments arrive exactly, also beside integers."""
    stream = device.stream()
    out = holding(device, stream, OLD * 12)
    module(device).kernel("floats")(stream, 1, 1, out, 1.5, -7, -3.0e38)
    wanted = struct.pack("3f", 1.5, -7.0, -3.0e38)
    same(read(out, stream), wanted, "floats as a kernel sees them")


@check("compute", limit_s=120.0)
def doubles(device: Device) -> None:
    """Double-precision arguments and arithmetic are exact, where the device has them."""
    stream = device.stream()
    out = holding(device, stream, OLD * 24)
    kernel = device.compile(hal.Source.cuda(DOUBLES)).kernel("doubles")
    kernel(stream, 1, 1, out, 1e300, 1, 0.1)
    same(read(out, stream), struct.pack("3d", 1e300, 1 / 3.0, 0.1), "doubles")


@check("compute")
def structure(device: Device) -> None:
    """A structure by value arrives whole, and so does the argument after it."""
    stream = device.stream()
    out = holding(device, stream, OLD * 56)
    value = struct.pack("=i3fB7xq", -9, 1.0, -2.0, 3.0, 200, -(1 << 45))
    module(device).kernel("record")(stream, 1, 1, out, value, 77)
    _is(_ints(out, stream, "q"), [-9, 1, -2, 3, 200, -(1 << 45), 77], "a structure's members")


@check("compute")
def indices(device: Device) -> None:
    """Every thread of every block runs once and knows where it is, in three dimensions."""
    stream = device.stream()
    kernel = module(device).kernel("where")
    for grid, block in (
        ((1, 1, 1), (1, 1, 1)),
        ((5, 1, 1), (31, 1, 1)),
        ((3, 4, 5), (2, 3, 4)),
        ((1, 7, 1), (1, 8, 2)),
        ((2, 1, 9), (16, 2, 1)),
    ):
        wide, high, deep = (g * b for g, b in zip(grid, block, strict=True))
        out = holding(device, stream, b"\xff" * (4 * wide * high * deep))
        kernel(stream, grid, block, out)
        wanted = [
            x // block[0]
            | y // block[1] << 5
            | z // block[2] << 10
            | x % block[0] << 15
            | y % block[1] << 20
            | z % block[2] << 25
            for z in range(deep)
            for y in range(high)
            for x in range(wide)
        ]
        _is(_ints(out, stream, "I"), wanted, f"a grid of {grid} blocks of {block} threads")


@check("compute")
def partial_blocks(device: Device) -> None:
    """Sizes that are no multiple of the block are computed to the last element, and no further."""
    stream = device.stream()
    kernel = module(device).kernel("twice")
    for n in (1, 63, 64, 65, 1000, 4096, 10_007):
        given = list(range(-5, n - 5))
        source = holding(device, stream, _packed(given))
        out = holding(device, stream, b"\xff" * (4 * n + 64))
        kernel(stream, -(-n // 64), 64, out, source, n)
        _is(_ints(out, stream), [2 * each for each in given] + [-1] * 16, f"{n} elements")


@check("compute")
def views(device: Device) -> None:
    """A view as an argument begins at its first byte."""
    stream = device.stream()
    kernel = module(device).kernel("twice")
    source = holding(device, stream, _packed(list(range(300))))
    out = holding(device, stream, _packed([-1] * 300))
    kernel(stream, 2, 64, out.view(4 * 17, 400), source.view(4 * 101, 400), 100)
    wanted = [-1] * 17 + [2 * (i + 101) for i in range(100)] + [-1] * 183
    _is(_ints(out, stream), wanted, "a kernel over two views")


@check("compute")
def null(device: Device) -> None:
    """None is a null pointer."""
    stream = device.stream()
    kernel = module(device).kernel("is_null")
    out = holding(device, stream, OLD * 4)
    kernel(stream, 1, 1, out, None)
    _is(_ints(out, stream), [1], "a null pointer")
    kernel(stream, 1, 1, out, out)
    _is(_ints(out, stream), [2], "a pointer")


@check("compute")
def arguments_at_the_call(device: Device) -> None:
    """Arguments are read before the call returns: changing a plan changes later launches only."""
    stream = device.stream()
    kernel = module(device).kernel("tell")
    first, second = (holding(device, stream, OLD * 4) for _ in range(2))
    busy(device, stream)
    plan = kernel.plan(stream, 1, 1, first, 1)
    plan()
    plan.set(0, second)
    plan.set(1, 2)
    plan()
    plan.set(1, 3)
    _is(_ints(first, stream), [1], "what the first launch was given")
    _is(_ints(second, stream), [2], "what the second launch was given")


@check("compute")
def in_order(device: Device) -> None:
    """Kernels, copies and fills of one stream happen in their order."""
    stream = device.stream()
    kernel = module(device).kernel("twice")
    n = 1000
    buffer, source = (holding(device, stream, _packed([3] * n)) for _ in range(2))
    busy(device, stream)
    for _ in range(5):
        kernel(stream, -(-n // 128), 128, buffer, source, n)
        source.copy_from(buffer, stream=stream)
    buffer.fill(b"\0", stream=stream)
    _is(_ints(source, stream), [96] * n, "five doublings")


@check("compute")
def atomics(device: Device) -> None:
    """No atomic addition or maximum is lost, whichever blocks run at once."""
    stream = device.stream()
    kernel = module(device).kernel("count")
    for n in (1, 1000, 40_003):
        bins = holding(device, stream, bytes(16))
        most = holding(device, stream, bytes(4))
        kernel(stream, -(-n // 128), 128, bins, most, n)
        wanted = [sum(1 + i % 3 for i in range(k, n, 4)) for k in range(4)]
        _is(_ints(bins, stream), wanted, f"sums over {n} threads")
        _is(_ints(most, stream), [n - 1], f"the maximum over {n} threads")


@check("compute")
def barriers(device: Device) -> None:
    """Threads of a block see what the others wrote before the barrier, in loops too."""
    stream = device.stream()
    kernel = module(device).kernel("turn")
    for blocks in (1, 7, 100):
        given = [(i * 37) % 1001 for i in range(64 * blocks)]
        wanted = []
        for b in range(blocks):
            tile = given[64 * b : 64 * b + 64]
            for _ in range(3):
                tile = [each + 1 for each in reversed(tile)]
            wanted += tile[1:] + tile[:1]
        buffer = holding(device, stream, _packed(given))
        kernel(stream, blocks, 64, buffer)
        _is(_ints(buffer, stream), wanted, f"{blocks} blocks that turn their numbers round")


@check("compute")
def dynamic_shared(device: Device) -> None:
    """Dynamic shared memory has the size that the launch asks for, up to the declared limit."""
    stream = device.stream()
    kernel = module(device).kernel("turn_dynamic")
    most = (backend(device).limits.shared_bytes - kernel.facts.shared_bytes) // 4
    for n in (1, 64, 1000, most):
        buffer = holding(device, stream, _packed(list(range(n))))
        kernel(stream, 1, 64, buffer, n, shared=4 * n)
        _is(_ints(buffer, stream), list(range(n))[::-1], f"{4 * n} bytes of shared memory")


@check("compute")
def in_graph(device: Device) -> None:
    """Kernels in a graph run at each launch, with arguments that can be changed between."""
    stream = device.stream()
    kernel = module(device).kernel("tell")
    first, second = (holding(device, stream, OLD * 4) for _ in range(2))
    with stream.capture() as graph:
        kernel(stream, 1, 1, first, 1)
        kernel(stream, 1, 1, second, 2)
    _is(_ints(first, stream), list(struct.unpack("i", OLD * 4)), "what a captured kernel writes")
    graph.launch(stream)
    _is(_ints(first, stream) + _ints(second, stream), [1, 2], "the kernels of a graph")
    graph.set(1, 1, 5)
    graph.launch(stream)
    _is(_ints(first, stream) + _ints(second, stream), [1, 5], "after one argument was changed")
    graph.set(0, 0, second)
    graph.set(1, 0, first)
    graph.launch(stream)
    _is(_ints(first, stream) + _ints(second, stream), [5, 1], "after the buffers were changed")
    refused("a kernel that the graph does not have", lambda: graph.set(2, 1, 1))


@check("compute")
def graph_in_flight(device: Device) -> None:
    """Changing a graph's arguments changes later launches, not those that are queued."""
    stream = device.stream()
    kernel = module(device).kernel("tell")
    out, kept = (holding(device, stream, OLD * 4) for _ in range(2))
    with stream.capture() as graph:
        kernel(stream, 1, 1, out, 1)
    busy(device, stream)
    graph.launch(stream)
    kept.copy_from(out, stream=stream)
    graph.set(0, 1, 2)
    graph.launch(stream)
    _is(_ints(kept, stream) + _ints(out, stream), [1, 2], "the first and the second launch")


@check("compute")
def plan_in_graph(device: Device) -> None:
    """A plan that is captured keeps the arguments that it had then."""
    stream = device.stream()
    out = holding(device, stream, OLD * 4)
    plan = module(device).kernel("tell").plan(stream, 1, 1, out, 1)
    with stream.capture() as graph:
        plan()
    plan.set(1, 9)
    graph.launch(stream)
    _is(_ints(out, stream), [1], "a captured plan that was changed afterwards")


@check("compute", limit_s=120.0)
def loaded_twice(device: Device) -> None:
    """Two modules with kernels of one name are apart, and one outlives the other."""
    stream = device.stream()
    text = 'extern "C" __global__ void same(int *out) {{ out[0] = {}; }}'
    out = holding(device, stream, OLD * 8)
    first = device.compile(hal.Source.cuda(text.format(1)))
    second = device.compile(hal.Source.cuda(text.format(2))).kernel("same")
    first.kernel("same")(stream, 1, 1, out.view(0, 4))
    del first
    second(stream, 1, 1, out.view(4, 4))
    _is(_ints(out, stream), [1, 2], "two kernels of one name")


@check("compute")
def missing_symbol(device: Device) -> None:
    """A kernel that loaded code does not have is an error of its own, ``no_such_kernel``."""
    driver = backend(device)
    try:
        driver.function(module(device)._handle, "nowhere")
    except HalError as error:
        expect(error.code == "no_such_kernel", f"its code is {error.code!r}: {error}")
        return
    expect(False, "a kernel that does not exist was found")


@check("compute")
def large_grids(device: Device) -> None:
    """100,000 blocks run, each once."""
    stream = device.stream()
    n = 100_000
    source = holding(device, stream, data(4 * n))
    out = holding(device, stream, OLD * (4 * n))
    numbers = list(memoryview(data(4 * n)).cast("i"))
    module(device).kernel("twice")(stream, n, 1, out, source, n)
    wanted = [(2 * each + (1 << 31)) % (1 << 32) - (1 << 31) for each in numbers]
    _is(_ints(out, stream), wanted, f"{n} blocks of one thread")
