"""Try every method of the cuda backend on a real GPU and say of each whether it did what it says.

    PYTHONPATH=src python3 tools/hal_gpu_try.py [NAME ...]

One line a check; names given choose checks that contain them. Exit status 1 when one failed. Needs
NVRTC (a toolkit, or the wheels that torch brings) for the kernels written in CUDA C; without it
those checks fail. Checks between two GPUs run where there are two.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from drivetrain import hal
from drivetrain.errors import CompileError, DeviceLost, HalError, OutOfMemory, Timeout, Unsupported
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.driver import LaunchAbi, Target
from drivetrain.hal.drivers import cuda, cuda_api
from drivetrain.hal.drivers.cuda_backend import CudaBackend, initialised
from drivetrain.hal.kinds import Kind, Way
from drivetrain.hal.language import compile
from drivetrain.hal.language.facts import Compiled
from drivetrain.hal.language.source import Source
from drivetrain.hal.opened import opened

triton: ModuleType | None
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

MIB = 1 << 20
ADD = 'extern "C" __global__ void add(int *out, int value) { atomicAdd(out, value); }'
Check = Callable[["Bench"], Any]
CHECKS: list[Check] = []
PTX = """
.version 6.4
.target sm_50
.address_size 64
.visible .entry store(.param .u64 out, .param .u32 value)
{
    .reg .b64 %rd<3>;
    .reg .b32 %r<2>;
    ld.param.u64 %rd1, [out];
    cvta.to.global.u64 %rd2, %rd1;
    ld.param.u32 %r1, [value];
    st.global.u32 [%rd2], %r1;
    ret;
}
"""
SOURCE = r"""
extern "C" __global__ void spin(long long ns) {
    long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - start < ns);
}
extern "C" __global__ void saxpy(const float *x, float *y, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
extern "C" __global__ void add(int *p, int v) { *p += v; }
extern "C" __global__ void times(int *p, int v) { *p *= v; }
extern "C" __global__ void reverse(int *p, int n) {
    extern __shared__ int room[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) room[i] = p[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) p[i] = room[n - 1 - i];
}
extern "C" __global__ void stray(int *p) { *p = 1; }
"""


TEMPLATES = r"""
#include <cuda_fp16.h>
struct By { float factor, more; };
template <typename T, int N> __global__ void scale(T *p, By by) {
    p[threadIdx.x] = p[threadIdx.x] * by.factor + N + by.more;
}
template __global__ void scale<float, 4>(float *, By);
__global__ void halve(float *p) {
    p[threadIdx.x] = __half2float(__hmul(__float2half(p[threadIdx.x]), __float2half(0.5f)));
}
"""


def block_sums(x, out, n, by, BLOCK):  # type: ignore[no-untyped-def]
    """A Triton kernel; it is compiled elsewhere and never called here."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + place, mask=place < n, other=0.0))
    tl.store(out + tl.program_id(0), total * by)


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# -- what the checks stand on ----------------------------------------------------------------------


def compiled(source: str, target: Target) -> Compiled:
    """A cubin; PTX where NVRTC is older than the GPU."""
    return compile(Source.cuda(source, name="try.cu"), target)


def infos() -> list[DeviceInfo]:
    try:
        return list(cuda.discover())
    except Exception as error:
        print(f"# discovery through NVML: {type(error).__name__}: {error}; uuids come from CUDA")
    api = initialised(cuda_api.load())
    count = ctypes.c_int()
    api.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for index in range(count.value):
        raw = cuda_api.Uuid()
        api.cuDeviceGetUuid(ctypes.byref(raw), index)
        name = f"GPU-{uuid.UUID(bytes=bytes(raw.bytes))}"
        found.append(DeviceInfo(driver="cuda", index=index, name="?", vendor="nvidia", uuid=name))
    return found


class Bench:
    """An open device, a stream, and short words for what the checks do again and again."""

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.b = CudaBackend(info)
        self.s = self.b.stream_create(0)
        self._functions: dict[str, int] = {}
        self._module = 0

    def function(self, name: str) -> int:
        if not self._module:
            made = compiled(SOURCE, self.b.target)
            self._module = self.b.module_load(made.code, made.form)
        if name not in self._functions:
            self._functions[name] = self.b.function(self._module, name)
        return self._functions[name]

    def launch(self, name: str, *values: Any, **how: Any) -> None:
        table = pack(*values)
        self.b.launch(
            self.function(name),
            how.get("grid", (1, 1, 1)),
            how.get("block", (1, 1, 1)),
            how.get("shared", 0),
            how.get("stream", self.s),
            ctypes.addressof(table),
            [ctypes.sizeof(v) for v in values],
        )

    def spin(self, seconds: float, stream: int = 0) -> None:
        self.launch("spin", ctypes.c_longlong(int(seconds * 1e9)), stream=stream or self.s)

    @contextlib.contextmanager
    def memory(self, nbytes: int, kind: Kind = Kind.DEVICE) -> Iterator[int]:
        ptr = self.b.alloc(nbytes, kind, self.s)
        try:
            yield ptr
        finally:
            self.b.free(ptr, kind, self.s)

    def write(self, ptr: int, data: bytes) -> None:
        self.b.copy(ptr, address(data), len(data), Way.HOST_TO_DEVICE, self.s, True)

    def read(self, ptr: int, nbytes: int) -> bytes:
        out = ctypes.create_string_buffer(nbytes)
        self.b.copy(ctypes.addressof(out), ptr, nbytes, Way.DEVICE_TO_HOST, self.s, False)
        self.sync()
        return out.raw

    def sync(self) -> None:
        assert self.b.stream_synchronize(self.s, 10), "not done after 10 s"

    def number(self, ptr: int) -> int:
        return int.from_bytes(self.read(ptr, 4), "little", signed=True)


def pack(*values: Any) -> Any:
    table = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
    table.kept = values
    return table


def address(data: bytes) -> int:
    return ctypes.cast(data, ctypes.c_void_p).value or 0


def noise(nbytes: int, seed: int = 1) -> bytes:
    import random

    return random.Random(seed).randbytes(nbytes)


def raises(kind: type[BaseException], code: str, call: Callable[..., Any], *values: Any) -> Any:
    found: Any = None
    try:
        call(*values)
    except kind as error:
        found = error
    assert found is not None, f"{call} did not raise {kind.__name__}"
    assert not code or found.code == code, (found, found.code)
    return found


# -- facts -----------------------------------------------------------------------------------------


@check
def facts(t: Bench) -> Any:
    b = t.b
    assert b.limits.threads >= 512
    assert b.limits.grid[0] >= 65535
    assert b.limits.block[0] >= 512
    assert b.limits.shared_bytes >= 48 << 10
    assert b.target.kind == "cuda"
    assert b.target.arch.startswith("sm_")
    return b.target, b.limits, sorted(b.groups), sorted(b._api.off)


@check
def memory_counts(t: Bench) -> Any:
    free, total = t.b.memory()
    assert 0 < free <= total
    with t.memory(512 * MIB):
        t.sync()
        assert t.b.memory()[0] <= free - 500 * MIB, (free, t.b.memory())
    t.sync()
    assert t.b.memory()[0] >= free - 64 * MIB, (free, t.b.memory())
    return free, total


@check
def addresses_are_aligned(t: Bench) -> None:
    for kind in Kind:
        ptrs = [t.b.alloc(n, kind, t.s) for n in (1, 3, 17, 257, 4097, MIB + 1)]
        assert all(p and p % t.b.alignment == 0 for p in ptrs), (kind, list(map(hex, ptrs)))
        assert len(set(ptrs)) == len(ptrs)
        for ptr in ptrs:
            t.b.free(ptr, kind, t.s)
    t.sync()


@check
def freeing_twice_is_an_error(t: Bench) -> None:
    ptr = t.b.alloc(64, Kind.DEVICE, t.s)
    raises(HalError, "not_allocated", t.b.free, ptr, Kind.PINNED, t.s)
    t.b.free(ptr, Kind.DEVICE, t.s)
    raises(HalError, "not_allocated", t.b.free, ptr, Kind.DEVICE, t.s)


@check
def out_of_memory(t: Bench) -> Any:
    _, total = t.b.memory()
    error = raises(OutOfMemory, "out_of_memory", t.b.alloc, 4 * total, Kind.DEVICE, t.s)
    assert error.requested == 4 * total
    assert error.total == total
    assert error.native == 2
    with t.memory(MIB) as ptr:
        t.write(ptr, b"fine")
        assert t.read(ptr, 4) == b"fine"
    return str(error)


# -- copies and fills ------------------------------------------------------------------------------


@check
def copies_every_way(t: Bench) -> None:
    n = 3 * MIB + 5
    data = noise(n)
    with t.memory(n) as a, t.memory(n) as c, t.memory(n, Kind.PINNED) as p:
        t.write(a, data)
        t.b.copy(c, a, n, Way.DEVICE_TO_DEVICE, t.s, False)
        assert t.read(c, n) == data
        t.b.copy(p, c, n, Way.DEVICE_TO_HOST, t.s, False)
        t.sync()
        assert ctypes.string_at(p, n) == data
        with t.memory(n, Kind.PINNED) as q:
            t.b.copy(q, p, n, Way.HOST_TO_HOST, t.s, False)
            t.sync()
            assert ctypes.string_at(q, n) == data
            out = ctypes.create_string_buffer(n)
            t.b.copy(ctypes.addressof(out), q, n, Way.HOST_TO_HOST, t.s, True)
            t.sync()
            assert out.raw == data


@check
def host_memory_is_free_when_the_copy_returns(t: Bench) -> None:
    for n in (100, 60_000, 70_000, 8 * MIB, 64 * MIB):
        data, other = noise(n), noise(n, 2)
        pageable = ctypes.create_string_buffer(data, n)
        with t.memory(n) as a, t.memory(n, Kind.PINNED) as p:
            for source in (ctypes.addressof(pageable), p):
                ctypes.memmove(source, data, n)
                t.spin(0.02)
                t.b.copy(a, source, n, Way.HOST_TO_DEVICE, t.s, True)
                ctypes.memmove(source, other, n)
                assert t.read(a, n) == data, f"{n} bytes, {'pinned' if source == p else 'pageable'}"


@check
def a_pinned_copy_without_the_promise_returns_at_once(t: Bench) -> Any:
    n = 64 * MIB
    with t.memory(n) as a, t.memory(n, Kind.PINNED) as p:
        t.sync()
        t.spin(0.2)
        began = time.perf_counter()
        t.b.copy(a, p, n, Way.HOST_TO_DEVICE, t.s, False)
        took = time.perf_counter() - began
        t.sync()
        assert took < 0.1, took
    return f"{took * 1e6:.0f} us"


@check
def fills_of_every_width_and_count(t: Bench) -> None:
    for kind in (Kind.DEVICE, Kind.MANAGED, Kind.PINNED):
        for width in (1, 2, 4, 8, 16):
            for pattern in (noise(width, width), bytes(width), noise(max(1, width // 2)) * 2):
                pattern = pattern[:width]
                for count in (1, 3, 4095, 4096, 4097, 20_001):
                    n = width * count
                    with t.memory(n + 64, kind) as ptr:
                        t.b.fill(ptr, b"\xee", n + 64, t.s)
                        t.b.fill(ptr + 16, pattern, count, t.s)
                        got = t.read(ptr, n + 64)
                    expected = b"\xee" * 16 + pattern * count + b"\xee" * 48
                    assert got == expected, (kind, width, count)


@check
def a_large_fill_of_sixteen_bytes(t: Bench) -> Any:
    n = 1 << 30
    pattern = noise(16)
    with t.memory(n) as ptr:
        t.sync()
        began = time.perf_counter()
        t.b.fill(ptr, pattern, n // 16, t.s)
        t.sync()
        took = time.perf_counter() - began
        for at in (0, n // 2 - 8, n - 32 * 1024):
            at -= at % 16
            assert t.read(ptr + at, 32 * 1024) == pattern * 2048
    return f"{n / took / 1e9:.0f} GB/s"


@check
def managed_memory_is_touched_by_both(t: Bench) -> None:
    with t.memory(4096, Kind.MANAGED) as ptr:
        t.sync()
        ctypes.memmove(ptr, (41).to_bytes(4, "little"), 4)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(1))
        t.sync()
        assert int.from_bytes(ctypes.string_at(ptr, 4), "little") == 42


@check
def pinned_memory_is_reached_by_kernels(t: Bench) -> None:
    with t.memory(4096, Kind.PINNED) as ptr:
        ctypes.memset(ptr, 0, 4096)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(7))
        t.sync()
        assert int.from_bytes(ctypes.string_at(ptr, 4), "little") == 7


@check
def registered_memory(t: Bench) -> None:
    import mmap

    n = 4 * MIB
    room = mmap.mmap(-1, n)
    held = (ctypes.c_char * n).from_buffer(room)
    ptr = ctypes.addressof(held)
    t.b.register(ptr, n)
    assert t.b._memory._in_host_memory(ptr) is True
    raises(HalError, "", t.b.register, ptr, n)
    with t.memory(n) as a:
        data = noise(n)
        ctypes.memmove(ptr, data, n)
        t.b.copy(a, ptr, n, Way.HOST_TO_DEVICE, t.s, False)
        assert t.read(a, n) == data
    t.b.unregister(ptr)
    assert t.b._memory._in_host_memory(ptr) is None
    raises(HalError, "", t.b.unregister, ptr)


@check
def memory_is_free_only_after_its_stream(t: Bench) -> None:
    """Freed while a kernel that will write it is queued behind a spin."""
    for kind in Kind:
        ptr = t.b.alloc(MIB, kind, t.s)
        t.spin(0.05)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(1))
        began = time.perf_counter()
        t.b.free(ptr, kind, t.s)
        assert time.perf_counter() - began < 0.04, f"free of {kind.name} waited"
        t.sync()
        t.b.free(t.b.alloc(64, kind, t.s), kind, t.s)
    t.sync()


# -- streams and events ----------------------------------------------------------------------------


@check
def priorities_are_clamped(t: Bench) -> Any:
    for priority in (-1000, -1, 0, 1, 1000):
        t.b.stream_destroy(t.b.stream_create(priority))
    return t.b._streams._priorities


@check
def a_stream_is_done_when_its_work_is(t: Bench) -> None:
    t.sync()
    assert t.b.stream_done(t.s)
    t.spin(0.1)
    assert not t.b.stream_done(t.s)
    assert not t.b.stream_synchronize(t.s, 0.01)
    assert t.b.stream_synchronize(t.s, 5)
    assert t.b.stream_done(t.s)


@check
def events_wait_and_time(t: Bench) -> Any:
    a, c = t.b.event_create(True), t.b.event_create(True)
    assert t.b.event_done(a), "an event that was never recorded is done"
    t.b.event_record(a, t.s)
    t.spin(0.1)
    t.b.event_record(c, t.s)
    assert not t.b.event_done(c)
    assert not t.b.event_synchronize(c, 0.01)
    assert t.b.event_synchronize(c, 5)
    took = t.b.event_seconds(a, c)
    assert 0.09 < took < 0.2, took
    plain = t.b.event_create(False)
    t.b.event_record(plain, t.s)
    t.sync()
    raises(HalError, "", t.b.event_seconds, a, plain)
    for event in (a, c, plain):
        t.b.event_destroy(event)
    return took


@check
def a_stream_waits_for_an_event(t: Bench) -> None:
    other = t.b.stream_create(0)
    event = t.b.event_create(False)
    with t.memory(4) as ptr:
        t.b.fill(ptr, b"\0" * 4, 1, t.s)
        t.spin(0.05)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(5))
        t.b.event_record(event, t.s)
        t.b.stream_wait(other, event)
        t.launch("times", ctypes.c_uint64(ptr), ctypes.c_int(3), stream=other)
        t.b.event_destroy(event)
        t.b.stream_destroy(other)  # what was queued still happens
        assert t.b.synchronize(5)
        assert t.number(ptr) == 15


@check
def the_whole_device_is_waited_for(t: Bench) -> None:
    other = t.b.stream_create(0)
    t.spin(0.1, other)
    assert not t.b.synchronize(0.01)
    assert t.b.synchronize(5)
    assert t.b.stream_done(other)
    t.b.stream_destroy(other)


@check
def the_old_way_to_wait_for_the_device(t: Bench) -> None:
    api, off = t.b._api, t.b._api.off
    api.off = off | {"context_event"}
    try:
        the_whole_device_is_waited_for(t)
    finally:
        api.off = off


# -- kernels ---------------------------------------------------------------------------------------


@check
def ptx_and_cubin_load_and_run(t: Bench) -> None:
    module = t.b.module_load(PTX.encode(), "ptx")
    function = t.b.function(module, "store")
    with t.memory(4) as ptr:
        t.b.fill(ptr, b"\0", 4, t.s)
        table = pack(ctypes.c_uint64(ptr), ctypes.c_uint32(77))
        t.b.function_arguments(function, (-8, 4))
        t.b.launch(function, (1, 1, 1), (1, 1, 1), 0, t.s, ctypes.addressof(table), (-8, 4))
        assert t.number(ptr) == 77
    t.b.module_unload(module)
    t.launch("saxpy", *(ctypes.c_uint64(0),) * 2, ctypes.c_float(0), ctypes.c_int(0))
    t.sync()


@check
def templates_structs_and_headers_compile_and_run(t: Bench) -> Any:
    device = hal.device(f"cuda://{t.info.uuid}")
    module = device.compile(Source.cuda(TEMPLATES, name="templates.cu"))
    floats, halves = module.kernel("scale<float,4>"), module.kernel("halve")
    with device.stream() as stream, device.alloc(16, stream=stream) as buffer:
        buffer.copy_from(memoryview(struct.pack("4f", 1, 2, 3, 4)), stream=stream)
        floats(stream, 1, 4, buffer, struct.pack("2f", 10, 0.5))
        halves(stream, 1, 4, buffer)
        out = bytearray(16)
        buffer.copy_to(memoryview(out), stream=stream)
        stream.synchronize()
    assert struct.unpack("4f", out) == tuple((x * 10 + 4.5) / 2 for x in (1, 2, 3, 4))
    return module.names


@check
def triton_kernels_are_launched_by_our_launcher(t: Bench) -> Any:
    if tl is None:
        return "Triton is not installed"
    device, n, block = hal.device(f"cuda://{t.info.uuid}"), 5000, 1024
    types = {"x": "*fp32", "out": "*fp32", "n": "i32", "by": "fp32"}
    for warps in (4, 8):
        source = Source.triton(
            block_sums, signature=types, constants={"BLOCK": block}, num_warps=warps
        )
        kernel = device.compile(source).kernel("block_sums")
        blocks = -(-n // block)
        with device.stream() as stream, device.alloc(4 * n, stream=stream) as x:
            x.copy_from(memoryview(struct.pack(f"{n}f", *range(n))), stream=stream)
            plan_out, call_out = (device.alloc(4 * blocks, stream=stream) for _ in range(2))
            kernel(stream, blocks, None, x, call_out, n, 2.0)
            kernel.plan(stream, blocks, None, x, plan_out, n, 2.0)()
            for buffer in (call_out, plan_out):
                out = bytearray(4 * blocks)
                buffer.copy_to(memoryview(out), stream=stream)
                stream.synchronize()
                want = [2.0 * sum(range(b * block, min(n, (b + 1) * block))) for b in range(blocks)]
                assert list(struct.unpack(f"{blocks}f", out)) == want, (warps, out)
                buffer.close()
    return f"Triton {triton.__version__}, {kernel._shared} bytes of shared memory"


@check
def code_that_is_none_is_refused_with_a_log(t: Bench) -> Any:
    bad = PTX.replace("st.global.u32", "st.nowhere.u32").encode()
    error = raises(CompileError, "not_taken", t.b.module_load, bad, "ptx")
    assert "nowhere" in error.log or "line" in error.log, error.log
    newer = PTX.replace(".version 6.4", ".version 99.9").encode()
    raises(CompileError, "not_taken", t.b.module_load, newer, "ptx")
    raises(CompileError, "", t.b.module_load, b"nothing at all", "ptx")
    raises(CompileError, "", t.b.module_load, b"nothing at all", "cubin")
    raises(Unsupported, "unsupported", t.b.module_load, b"x", "hsaco")
    return error.log.splitlines()[0]


@check
def unknown_kernels_and_wrong_arguments(t: Bench) -> Any:
    t.function("add")
    raises(HalError, "no_such_kernel", t.b.function, t._module, "nothing")
    if "parameters" in t.b._api.off:
        return "this driver tells no parameters"
    t.b.function_arguments(t.function("saxpy"), (-8, -8, 4, 4))
    for sizes in ((-8, -8, 4), (-8, -8, 4, 8), (-8, -8, 4, 4, 4), ()):
        error = raises(
            HalError, "wrong_arguments", t.b.function_arguments, t.function("saxpy"), sizes
        )
    return str(error)


@check
def facts_of_a_kernel(t: Bench) -> Any:
    facts = t.b.function_facts(t.function("saxpy"))
    assert 32 <= facts.threads <= t.b.limits.threads
    assert facts.registers > 0
    assert facts.shared_bytes == 0
    return facts


@check
def saxpy(t: Bench) -> None:
    import array

    n = 100_003
    x = array.array("f", [i % 17 for i in range(n)])
    y = array.array("f", [i % 5 for i in range(n)])
    with t.memory(4 * n) as a, t.memory(4 * n) as c:
        t.write(a, x.tobytes())
        t.write(c, y.tobytes())
        values = ctypes.c_uint64(a), ctypes.c_uint64(c), ctypes.c_float(2), ctypes.c_int(n)
        t.launch("saxpy", *values, grid=(-(-n // 256), 1, 1), block=(256, 1, 1))
        assert list(memoryview(t.read(c, 4 * n)).cast("f")) == [
            2 * (i % 17) + i % 5 for i in range(n)
        ]


@check
def all_the_dynamic_shared_memory(t: Bench) -> Any:
    most = t.b.limits.shared_bytes
    n = most // 4
    with t.memory(most) as ptr:
        t.write(ptr, b"".join(i.to_bytes(4, "little") for i in range(n)))
        values = ctypes.c_uint64(ptr), ctypes.c_int(n)
        t.launch("reverse", *values, block=(256, 1, 1), shared=most)
        assert list(memoryview(t.read(ptr, 4 * n)).cast("i")) == list(range(n))[::-1]
    too_much = {"block": (256, 1, 1), "shared": most + 1024}
    raises(HalError, "", lambda: t.launch("reverse", *values, **too_much))
    return most


@check
def the_addresses_for_c_are_the_drivers(t: Bench) -> None:
    calls = t.b.calls()
    assert calls.abi == LaunchAbi.CUDA
    assert all((calls.launch, calls.record, calls.context, calls.get_context, calls.set_context))
    where = calls.launch
    uint, ptr = ctypes.c_uint, ctypes.c_void_p
    launch = ctypes.CFUNCTYPE(ctypes.c_int, ptr, *(uint,) * 7, ptr, ptr, ptr)(where)
    with t.memory(4) as memory:
        t.b.fill(memory, b"\0", 4, t.s)
        table = pack(ctypes.c_uint64(memory), ctypes.c_int(9))
        assert launch(t.function("add"), 1, 1, 1, 1, 1, 1, 0, t.s, ctypes.addressof(table), 0) == 0
        assert t.number(memory) == 9
        codes: list[int] = []

        def bare() -> None:
            codes.append(
                launch(t.function("add"), 1, 1, 1, 1, 1, 1, 0, t.s, ctypes.addressof(table), 0)
            )

        thread = threading.Thread(target=bare)
        thread.start()
        thread.join()
        t.sync()
    print(f"# cuLaunchKernel on a thread that has no context: {codes[0]}")


# -- threads and contexts --------------------------------------------------------------------------


@check
def any_thread_may_call(t: Bench) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            stream = t.b.stream_create(0)
            for turn in range(40):
                n = 16 * (1 + (seed * 7919 + turn * 104729) % 5000)
                kind = (Kind.DEVICE, Kind.PINNED, Kind.DEVICE)[turn % 3]
                ptr = t.b.alloc(n, kind, stream)
                pattern = noise(16, seed * 1000 + turn)
                t.b.fill(ptr, pattern, n // 16, stream)
                out = ctypes.create_string_buffer(n)
                way = Way.HOST_TO_HOST if kind is Kind.PINNED else Way.DEVICE_TO_HOST
                t.b.copy(ctypes.addressof(out), ptr, n, way, stream, False)
                t.b.free(ptr, kind, stream)
                assert t.b.stream_synchronize(stream, 10)
                assert out.raw == pattern * (n // 16)
            t.b.stream_destroy(stream)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


@check
def the_callers_context_is_left_as_it_was(t: Bench) -> None:
    library = ctypes.CDLL("libcuda.so.1")
    mine, now = ctypes.c_void_p(), ctypes.c_void_p()
    assert library.cuCtxCreate_v2(ctypes.byref(mine), 0, t.b._context.device) == 0
    try:
        with t.memory(64) as ptr:
            t.write(ptr, b"abcd")
            assert t.read(ptr, 4) == b"abcd"
            t.spin(0.001)
            t.sync()
        assert library.cuCtxGetCurrent(ctypes.byref(now)) == 0
        assert now.value == mine.value
    finally:
        library.cuCtxDestroy_v2(mine)


@check
def a_launch_finds_its_device_whatever_context_is_current(t: Bench) -> Any:
    """None at all, or another device's: what C queues goes to the stream's own device."""
    devices = hal.devices("cuda")
    library = ctypes.CDLL("libcuda.so.1")
    contexts = []
    for device in devices:
        device.stream().synchronize(10)
        contexts.append(opened(device).backend._context.handle)
    for device in devices:
        stream = device.stream()
        kernel = device.compile(hal.Source.cuda(ADD)).kernel("add")
        for context in [None, *contexts]:
            out = device.alloc(4, stream=stream)
            out.fill(bytes(4), stream=stream)
            plan = kernel.plan(stream, 1, 1, out, 5)
            with stream.capture() as graph:
                kernel(stream, 1, 1, out, 30)
            assert library.cuCtxSetCurrent(ctypes.c_void_p(context)) == 0
            plan()
            graph.launch(stream)
            kernel(stream, 1, 1, out, 700)
            event = stream.record()
            now = ctypes.c_void_p()
            assert library.cuCtxGetCurrent(ctypes.byref(now)) == 0
            assert context in (None, now.value), "the caller's context was not left as it was"
            event.synchronize(10)
            got = bytearray(4)
            out.copy_to(memoryview(got), stream=stream)
            stream.synchronize(10)
            assert int.from_bytes(got, "little") == 735, got
    return f"{len(devices)} device(s)"


@check
def streams_of_torch(t: Bench) -> Any:
    try:
        import torch
    except ImportError:
        return "torch is not here"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    device = f"cuda:{t.b._context.device}"
    with torch.cuda.device(device):  # torch captures on the one that is current
        theirs = torch.cuda.Stream(device=device)
        with torch.cuda.stream(theirs):
            tensor = torch.arange(1000, dtype=torch.int32, device=device)
            t.launch(
                "add",
                ctypes.c_uint64(tensor.data_ptr()),
                ctypes.c_int(5),
                stream=theirs.cuda_stream,
            )
        assert t.b.stream_synchronize(theirs.cuda_stream, 5)
        assert tensor[0].item() == 5
        graph = torch.cuda.CUDAGraph()
        static = torch.zeros(8, dtype=torch.int32, device=device)
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            stream = torch.cuda.current_stream(device).cuda_stream
            raises(HalError, "capturing", t.b.stream_done, stream)
            raises(HalError, "capturing", t.b.stream_synchronize, stream, 1.0)
            raises(HalError, "capturing", t.b.alloc, 64, Kind.DEVICE, stream)
            t.launch("add", ctypes.c_uint64(static.data_ptr()), ctypes.c_int(1), stream=stream)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize(device)
        assert static[0].item() == 3
    return torch.__version__


# -- graphs ----------------------------------------------------------------------------------------


@check
def a_graph_is_noted_launched_and_changed(t: Bench) -> None:
    with t.memory(4) as ptr, t.memory(4096) as room:
        t.b.fill(ptr, b"\0", 4, t.s)
        t.b.graph_begin(t.s)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(2))
        t.b.fill(room, noise(16), 256, t.s)
        t.launch("times", ctypes.c_uint64(ptr), ctypes.c_int(3))
        t.b.copy(room, ptr, 4, Way.DEVICE_TO_DEVICE, t.s, False)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(1))
        graph = t.b.graph_end(t.s)
        assert t.number(ptr) == 0, "nothing happened yet"
        t.b.graph_launch(graph, t.s)
        assert t.number(ptr) == 7
        assert t.number(room) == 6
        table = pack(ctypes.c_uint64(ptr), ctypes.c_int(10))
        one = (1, 1, 1)
        where = ctypes.addressof(table)
        t.b.graph_set(graph, 1, t.function("times"), one, one, 0, where, (-8, 4))
        t.b.fill(ptr, b"\0", 4, t.s)
        t.b.graph_launch(graph, t.s)
        assert t.number(ptr) == 21
        for node in (3, -1):
            raises(
                HalError,
                "no_such_node",
                t.b.graph_set,
                *(graph, node, t.function("add"), one, one, 0, where, (-8, 4)),
            )
        t.b.graph_destroy(graph)
        raises(HalError, "no_such_graph", t.b.graph_destroy, graph)


@check
def a_graph_of_a_hundred_kernels_keeps_their_order(t: Bench) -> Any:
    with t.memory(4) as ptr:
        t.b.graph_begin(t.s)
        for i in range(100):
            t.launch("times" if i % 2 else "add", ctypes.c_uint64(ptr), ctypes.c_int(1))
        graph = t.b.graph_end(t.s)
        one = (1, 1, 1)
        for i in range(100):
            value = ctypes.c_int(-1 if i % 2 else i)
            table = pack(ctypes.c_uint64(ptr), value)
            name = "times" if i % 2 else "add"
            where = ctypes.addressof(table)
            t.b.graph_set(graph, i, t.function(name), one, one, 0, where, (-8, 4))
        t.b.fill(ptr, b"\0", 4, t.s)
        t.b.graph_launch(graph, t.s)
        expected = 0
        for i in range(100):
            expected = -expected if i % 2 else expected + i
        assert t.number(ptr) == expected
        began = time.perf_counter()
        for _ in range(100):
            t.b.graph_launch(graph, t.s)
        took = time.perf_counter() - began
        t.b.graph_destroy(graph)  # while it runs
        t.sync()
    return f"{took * 1e4:.1f} us a launch"


@check
def a_graph_over_two_streams(t: Bench) -> None:
    other = t.b.stream_create(0)
    fork, join = t.b.event_create(False), t.b.event_create(False)
    with t.memory(4) as a, t.memory(4) as c:
        for ptr in (a, c):
            t.b.fill(ptr, b"\0", 4, t.s)
        t.b.graph_begin(t.s)
        t.b.event_record(fork, t.s)
        t.b.stream_wait(other, fork)
        t.launch("add", ctypes.c_uint64(a), ctypes.c_int(1))
        t.launch("add", ctypes.c_uint64(c), ctypes.c_int(2), stream=other)
        raises(HalError, "capturing", t.b.stream_done, other)
        raises(HalError, "capturing", t.b.event_done, fork)
        t.b.event_record(join, other)
        t.b.stream_wait(t.s, join)
        t.launch("add", ctypes.c_uint64(a), ctypes.c_int(10))
        graph = t.b.graph_end(t.s)
        t.b.graph_launch(graph, t.s)
        assert (t.number(a), t.number(c)) == (11, 2)
        for node, (ptr, value) in enumerate(((a, 100), (c, 200), (a, 1000))):
            table = pack(ctypes.c_uint64(ptr), ctypes.c_int(value))
            one, where = (1, 1, 1), ctypes.addressof(table)
            t.b.graph_set(graph, node, t.function("add"), one, one, 0, where, (-8, 4))
        t.b.graph_launch(graph, t.s)
        assert (t.number(a), t.number(c)) == (1111, 202)
        t.b.graph_destroy(graph)
    for event in (fork, join):
        t.b.event_destroy(event)
    t.b.stream_destroy(other)


@check
def what_would_break_a_capture_is_refused_and_it_goes_on(t: Bench) -> None:
    old = t.b.alloc(64, Kind.DEVICE, t.s)
    pinned = t.b.alloc(64, Kind.PINNED, t.s)
    b = t.b
    with t.memory(4) as ptr:
        b.fill(ptr, b"\0", 4, t.s)
        host = ctypes.create_string_buffer(64)
        where = ctypes.addressof(host)
        b.graph_begin(t.s)
        t.launch("add", ctypes.c_uint64(ptr), ctypes.c_int(4))
        raises(HalError, "capturing", b.stream_done, t.s)
        raises(HalError, "capturing", b.stream_synchronize, t.s, 1.0)
        raises(HalError, "capturing", b.synchronize, 1.0)
        raises(HalError, "capturing", b.alloc, 64, Kind.DEVICE, t.s)
        raises(HalError, "capturing", b.copy, ptr, where, 4, Way.HOST_TO_DEVICE, t.s, True)
        raises(HalError, "capturing", b.graph_begin, t.s)
        raises(HalError, "capturing", b.stream_destroy, t.s)
        b.free(old, Kind.DEVICE, t.s)  # what a finaliser does
        b.free(pinned, Kind.PINNED, t.s)
        other = b.stream_create(0)
        b.free(b.alloc(64, Kind.DEVICE, other), Kind.DEVICE, other)
        b.free(b.alloc(64, Kind.PINNED, other), Kind.PINNED, other)
        event = b.event_create(False)
        b.event_record(event, other)
        b.event_done(event)
        b.event_destroy(event)
        b.stream_destroy(other)
        graph = b.graph_end(t.s)
        b.graph_launch(graph, t.s)
        assert t.number(ptr) == 4
        b.graph_destroy(graph)
    raises(HalError, "not_allocated", b.free, old, Kind.DEVICE, t.s)


@check
def a_copy_of_host_memory_is_noted(t: Bench) -> Any:
    said = []
    for kind in ("pinned", "pageable"):
        host = ctypes.create_string_buffer(64)
        with t.memory(64) as a, t.memory(64, Kind.PINNED) as p:
            where = p if kind == "pinned" else ctypes.addressof(host)
            t.b.graph_begin(t.s)
            failed = None
            try:
                t.b.copy(a, where, 64, Way.HOST_TO_DEVICE, t.s, False)
            except HalError as error:
                failed = error
            try:
                graph = t.b.graph_end(t.s)
            except HalError:
                assert failed
                said.append(f"{kind}: refused by the driver ({failed.native_name})")
                continue
            ctypes.memmove(where, noise(64), 64)
            t.b.graph_launch(graph, t.s)
            assert t.read(a, 64) == noise(64), kind
            t.b.graph_destroy(graph)
            said.append(f"{kind}: read at launch")
    assert said[0] == "pinned: read at launch"
    return said


@check
def after_a_broken_capture_the_stream_is_usable(t: Bench) -> Any:
    other = t.b.stream_create(0)
    event = t.b.event_create(False)
    t.b.graph_begin(t.s)
    t.b.event_record(event, t.s)
    t.b.stream_wait(other, event)  # never joined
    t.spin(0.001, other)
    error = raises(HalError, "capturing", t.b.graph_end, t.s)
    t.spin(0.001)
    t.spin(0.001, other)
    t.sync()
    assert t.b.stream_synchronize(other, 5)
    raises(HalError, "not_capturing", t.b.graph_end, t.s)
    t.b.event_destroy(event)
    t.b.stream_destroy(other)
    t.b.graph_begin(t.s)
    t.b.graph_destroy(t.b.graph_end(t.s))  # an empty one
    return str(error)


@check
def a_capture_ends_on_another_thread(t: Bench) -> None:
    found: list[int] = []
    t.function("spin")
    t.b.graph_begin(t.s)
    t.spin(0.0)
    thread = threading.Thread(target=lambda: found.append(t.b.graph_end(t.s)))
    thread.start()
    thread.join()
    assert found
    t.b.graph_launch(found[0], t.s)
    t.sync()
    t.b.graph_destroy(found[0])


# -- life ------------------------------------------------------------------------------------------


@check
def a_device_is_closed_and_opened_again(t: Bench) -> None:
    b = CudaBackend(t.info)
    stream = b.stream_create(0)
    ptr = b.alloc(MIB, Kind.DEVICE, stream)
    for kind in Kind:
        b.alloc(64, kind, stream)
    b.graph_begin(stream)
    b.graph_end(stream)
    b.event_create(True)
    b.fill(ptr, b"x", MIB, stream)
    b.close()
    b.close()
    raises(HalError, "closed", b.stream_create, 0)
    raises(HalError, "closed", b.stream_done, stream)
    t.write(ptr := t.b.alloc(64, Kind.DEVICE, t.s), b"ok")
    assert t.read(ptr, 2) == b"ok", "the other one is open still"
    t.b.free(ptr, Kind.DEVICE, t.s)


@check
def the_probe(t: Bench) -> None:
    cuda.probe(t.info)


@check
def a_device_that_is_not_visible(t: Bench) -> Any:
    info = DeviceInfo(
        driver="cuda", index=0, name="?", vendor="nvidia", uuid=f"GPU-{uuid.UUID(int=0)}"
    )
    return str(raises(HalError, "not_visible", CudaBackend, info))


LOST = """
import ctypes, sys
sys.path.insert(0, {tools!r})
import hal_gpu_try as t
bench = t.Bench(t.infos()[0])
bench.function("stray")
bench.launch("stray", ctypes.c_uint64(0x10))
error = t.raises(t.DeviceLost, "lost", bench.b.stream_synchronize, bench.s, 10.0)
assert error.native in (700, 717, 719), error.native
assert error.native_name.startswith("CUDA_ERROR_"), error.native_name
again = t.raises(t.DeviceLost, "lost", bench.b.stream_create, 0)
assert again.native == error.native
t.raises(t.DeviceLost, "lost", bench.b.alloc, 64, t.Kind.DEVICE, bench.s)
t.raises(t.DeviceLost, "lost", bench.b.event_create, False)
bench.b.close()
print(error)
"""


@check
def a_stray_kernel_loses_the_device_for_its_process_alone(t: Bench) -> Any:
    code = LOST.format(tools=os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with t.memory(4) as ptr:
        t.write(ptr, b"here")
        assert t.read(ptr, 4) == b"here"
    return done.stdout.strip().splitlines()[-1]


@check
def a_wait_for_pinned_memory_has_a_limit(t: Bench) -> None:
    with t.memory(64) as a, t.memory(64, Kind.PINNED) as p:
        os.environ["DRIVETRAIN_WAIT_LIMIT_S"] = "0.02"
        try:
            t.spin(0.2)
            raises(Timeout, "timeout", t.b.copy, a, p, 64, Way.HOST_TO_DEVICE, t.s, True)
        finally:
            del os.environ["DRIVETRAIN_WAIT_LIMIT_S"]
        t.sync()


# -- peers -----------------------------------------------------------------------------------------


def peers(a: Bench, c: Bench) -> Any:
    if not (a.b.peer_enable(c.b) and c.b.peer_enable(a.b)):
        return "these two do not reach each other"
    assert a.b.peer_enable(c.b), "again"
    n = 64 * MIB
    data = noise(n)
    with a.memory(n) as far, c.memory(n) as near:
        a.write(far, data)
        a.sync()
        c.b.copy_peer(near, far, n, a.b, c.s)
        assert c.read(near, n) == data
        # A kernel of one works on memory of the other, behind an event of the other.
        event = a.b.event_create(False)
        a.b.fill(far, b"\0" * 4, 1, a.s)
        a.spin(0.05)
        a.launch("add", ctypes.c_uint64(far), ctypes.c_int(5))
        a.b.event_record(event, a.s)
        c.b.stream_wait(c.s, event)
        c.launch("times", ctypes.c_uint64(far), ctypes.c_int(3))
        c.sync()
        assert a.number(far) == 15
        a.b.event_destroy(event)
        c.sync()
        began = time.perf_counter()
        for _ in range(10):
            c.b.copy_peer(near, far, n, a.b, c.s)
        c.sync()
        took = time.perf_counter() - began
    return f"{10 * n / took / 1e9:.0f} GB/s"


def timings(t: Bench) -> None:
    """Microseconds a call; for information."""
    event = t.b.event_create(False)
    value = pack(ctypes.c_longlong(0))
    spin, where = t.function("spin"), ctypes.addressof(value)

    def pair() -> None:
        t.b.free(t.b.alloc(MIB, Kind.DEVICE, t.s), Kind.DEVICE, t.s)

    for name, call in (
        ("event_record", lambda: t.b.event_record(event, t.s)),
        ("event_done", lambda: t.b.event_done(event)),
        ("stream_done", lambda: t.b.stream_done(t.s)),
        ("launch", lambda: t.b.launch(spin, (1, 1, 1), (1, 1, 1), 0, t.s, where, (8,))),
        ("alloc+free 1 MiB", pair),
    ):
        best = 1e9
        for _ in range(5):
            t.sync()
            began = time.perf_counter()
            for _ in range(300):
                call()
            best = min(best, (time.perf_counter() - began) / 300)
        print(f"# {name}: {best * 1e6:.2f} us")


def main() -> int:
    found = infos()
    print(f"# {len(found)} device(s); {found[0].name}, {found[0].uuid}")
    bench = Bench(found[0])
    began = time.monotonic()
    failed = 0
    wanted = sys.argv[1:]

    def run(name: str, call: Callable[[], Any]) -> None:
        nonlocal failed
        if wanted and not any(each in name for each in wanted):
            return
        start = time.monotonic()
        try:
            said = call()
        except BaseException as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"FAIL {name}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
            if isinstance(error, KeyboardInterrupt | DeviceLost):
                raise
            return
        took = time.monotonic() - start
        print(f"ok   {name} ({took:.2f} s){'' if said is None else f': {said}'}", flush=True)

    try:
        for each in CHECKS:
            run(each.__name__, lambda each=each: each(bench))  # type: ignore[misc]
        if len(found) > 1:
            other = Bench(found[1])
            run("peers", lambda: peers(bench, other))
            run("peers, the other way", lambda: peers(other, bench))
            run("close the second device", other.b.close)
        if not wanted:
            run("timings", lambda: timings(bench))
        run("close", bench.b.close)
    except DeviceLost:
        print("the device is lost; the rest was not tried")
    print(f"{len(CHECKS)} checks, {failed} failed, {time.monotonic() - began:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
