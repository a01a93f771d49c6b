"""CUDA C translated for the processor, against PoCL with equal kernels in OpenCL C.

Start: before the launch; end: the work is done (the stream, the queue waited for). Both through
their natural launch, with the same sizes, blocks and number of threads; results are compared first.
Peer: PoCL through pyopencl. Floor: the same work in plain C over OpenMP's threads.

    python -m benchmarks hal_cpu
    python benchmarks/bench_hal_cpu.py [--quick] [--json] [saxpy stencil chain matmul]
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.hal import peers
from benchmarks.hal.common import QUICK, HalReport, Span, interleaved, ratio, whole, words
from benchmarks.hal.native import threads
from drivetrain import hal

FREE_OF_BARRIERS = 1 / 0.8
"""Most of PoCL's time that a kernel without barriers may take: at least 0.8 of its speed."""
TILED = 1 / 4.0
OURS, POCL, FLOOR = "drivetrain on cpu", "PoCL", "C over OpenMP"

CUDA = r"""
extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
extern "C" __global__ void stencil(int w, int h, const float* in, float* out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x;
    int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < 1 || y < 1 || x >= w - 1 || y >= h - 1) return;
    int i = y * w + x;
    out[i] = 0.5f * in[i] + 0.125f * (in[i - 1] + in[i + 1] + in[i - w] + in[i + w]);
}
extern "C" __global__ void chain(int n, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i] * 1.5f + 0.25f;
    v = v * v - x[i];
    v = sqrtf(fabsf(v) + 1.0f);
    y[i] = v / (1.0f + v);
}
#define TILE 16
extern "C" __global__ void matmul(int n, const float* a, const float* b, float* c) {
    __shared__ float as[TILE][TILE], bs[TILE][TILE];
    int col = blockIdx.x * TILE + threadIdx.x, row = blockIdx.y * TILE + threadIdx.y;
    float sum = 0;
    for (int t = 0; t < n; t += TILE) {
        as[threadIdx.y][threadIdx.x] = a[row * n + t + threadIdx.x];
        bs[threadIdx.y][threadIdx.x] = b[(t + threadIdx.y) * n + col];
        __syncthreads();
        for (int k = 0; k < TILE; k++) sum += as[threadIdx.y][k] * bs[k][threadIdx.x];
        __syncthreads();
    }
    c[row * n + col] = sum;
}
"""
OPENCL = r"""
__kernel void saxpy(int n, float a, __global const float* x, __global float* y) {
    int i = get_global_id(0);
    if (i < n) y[i] = a * x[i] + y[i];
}
__kernel void stencil(int w, int h, __global const float* in, __global float* out) {
    int x = get_global_id(0), y = get_global_id(1);
    if (x < 1 || y < 1 || x >= w - 1 || y >= h - 1) return;
    int i = y * w + x;
    out[i] = 0.5f * in[i] + 0.125f * (in[i - 1] + in[i + 1] + in[i - w] + in[i + w]);
}
__kernel void chain(int n, __global const float* x, __global float* y) {
    int i = get_global_id(0);
    if (i >= n) return;
    float v = x[i] * 1.5f + 0.25f;
    v = v * v - x[i];
    v = sqrt(fabs(v) + 1.0f);
    y[i] = v / (1.0f + v);
}
#define TILE 16
__kernel void matmul(int n, __global const float* a, __global const float* b, __global float* c) {
    __local float as[TILE][TILE], bs[TILE][TILE];
    int tx = get_local_id(0), ty = get_local_id(1);
    int col = get_group_id(0) * TILE + tx, row = get_group_id(1) * TILE + ty;
    float sum = 0;
    for (int t = 0; t < n; t += TILE) {
        as[ty][tx] = a[row * n + t + tx];
        bs[ty][tx] = b[(t + ty) * n + col];
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int k = 0; k < TILE; k++) sum += as[ty][k] * bs[k][tx];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    c[row * n + col] = sum;
}
"""


@dataclass(frozen=True)
class Case:
    """One kernel at one size: scalars first, then arrays; the last one is written."""

    name: str
    scalars: tuple[Any, ...]
    arrays: tuple[Any, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    limit: float
    times: int
    """Launches of one measurement."""


def cases() -> dict[str, Case]:
    random = np.random.default_rng(1)

    def floats(*shape: int) -> Any:
        return random.random(shape, np.float32)

    n = 1 << (16 if QUICK else 22)
    side = 256 if QUICK else 2048
    order = 64 if QUICK else 512
    i32, f32 = np.int32, np.float32
    square = (floats(side, side), np.zeros((side, side), np.float32))
    matrices = (floats(order, order), floats(order, order), np.zeros((order, order), np.float32))
    free, tiled = FREE_OF_BARRIERS, TILED
    found = [
        Case("saxpy", (i32(n), f32(1e-3)), (floats(n), floats(n)), (n // 256,), (256,), free, 8),
        Case("stencil", (i32(side), i32(side)), square, (side // 16,) * 2, (16, 16), free, 8),
        Case("chain", (i32(n),), (floats(n), floats(n)), (n // 256,), (256,), free, 8),
        Case("matmul", (i32(order),), matrices, (order // 16,) * 2, (16, 16), tiled, 2),
    ]
    return {case.name: case for case in found}


Run = Callable[[], None]
Ready = tuple[Run, Run, Callable[[], Any]]
"""(launch, wait, the array that was written)."""


def ours(device: hal.Device, module: hal.Module, case: Case) -> Ready:
    stream, kernel = device.stream(), module.kernel(case.name)
    buffers = [device.alloc(array.nbytes, stream=stream) for array in case.arrays]
    for buffer, array in zip(buffers, case.arrays, strict=True):
        buffer.copy_from(array, stream=stream)
    stream.synchronize()
    arguments = (*case.scalars, *buffers)

    def read() -> Any:
        found = np.empty_like(case.arrays[-1])
        buffers[-1].copy_to(found, stream=stream)
        stream.synchronize()
        return found

    return lambda: kernel(stream, case.grid, case.block, *arguments), stream.synchronize, read


def pocl(peer: peers.OpenCL, case: Case) -> Ready:
    kernel = peer.cl.Kernel(peer.program, case.name)
    buffers = [peer.buffer(array) for array in case.arrays]
    whole_grid = tuple(g * b for g, b in zip(case.grid, case.block, strict=True))
    arguments, queue = (*case.scalars, *buffers), peer.queue
    return (
        lambda: kernel(queue, whole_grid, case.block, *arguments),
        queue.finish,
        lambda: peer.read(buffers[-1], case.arrays[-1]),
    )


def in_c(case: Case) -> Ready:
    function = getattr(threads(), f"threads_{case.name}")
    arrays = [array.copy() for array in case.arrays]
    kinds = {np.int32: ctypes.c_int, np.float32: ctypes.c_float}
    scalars = [kinds[type(value)](value) for value in case.scalars]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    return lambda: function(*scalars, *pointers), lambda: None, lambda: arrays[-1].copy()


def run(report: HalReport, case: Case, ways: dict[str, Ready], floor: str) -> None:
    results = {}
    for name, (launch, wait, read) in ways.items():
        launch()
        wait()
        results[name] = read()
    for name, result in results.items():
        if not np.allclose(result, results[OURS], rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"{case.name}: {name} and {OURS} give different results")
    measures = {name: whole(launch, wait, case.times) for name, (launch, wait, _) in ways.items()}
    found = interleaved(measures, lambda: None)
    peer = POCL if POCL in ways else "PoCL is not here"
    span = Span("before the launch", "the work is done", floor, peer)
    size = " x ".join(map(str, case.arrays[-1].shape))
    report.show(f"{case.name}, {size} floats, blocks of {case.block}", found, span, "ms")
    if POCL in found:
        title = f"{case.name}: time over PoCL's"
        room = abs(1 - case.limit)
        report.gate(title, ratio(found, OURS, POCL), case.limit, "x", span, room)


def main() -> int:
    report = HalReport("hal_cpu")
    device = hal.device("cpu:0")
    count = max(2, device.info.isolation.threads)
    os.environ["POCL_MAX_PTHREAD_COUNT"] = str(count)  # read when PoCL is first asked
    print(f"  {count} threads each")
    chosen, known = words(), cases()
    if set(chosen) - set(known):
        print(f"there are: {', '.join(known)}", file=sys.stderr)
        return 2
    module = device.compile(hal.Source.cuda(CUDA))
    peer: peers.OpenCL | None = None
    try:
        processors = [d for d in hal.devices("opencl", all_routes=True) if _is_pocl(d)]
        if not processors:
            raise LookupError("no OpenCL platform of PoCL on this machine")
        peer = peers.OpenCL(processors[0], OPENCL)
    except (ImportError, LookupError) as error:
        report.missing("PoCL through pyopencl", error)
    floor = FLOOR
    try:
        threads().threads_use(count)
    except (RuntimeError, OSError) as error:
        report.missing(FLOOR, error)
        floor = "none: no C compiler with OpenMP"
    for name in chosen or known:
        case = known[name]

        def part(case: Case = case) -> None:
            ways = {OURS: ours(device, module, case)}
            if peer is not None:
                ways[POCL] = pocl(peer, case)
            if floor == FLOOR:
                ways[FLOOR] = in_c(case)
            run(report, case, ways, floor)

        report.part(name, part)
    return report.finish()


def _is_pocl(device: hal.Device) -> bool:
    return "pocl" in f"{device.vendor} {device.name} {device.info.driver_version}".lower() or (
        "Portable Computing Language" in device.info.driver_version
    )


if __name__ == "__main__":
    sys.exit(main())
