"""What torch gets from an OpenCL device through the HAL: a matrix product, and memory's bandwidth.

Start: before a call; end: once the device is synchronised; peers and floors: torch on the CPU of
the same cores for the product, and for additions a kernel in OpenCL C over the same bytes, queued
without torch. All interleaved in one process. A device of OpenCL on the processor (PoCL) is meant;
without any OpenCL device the benchmark says so and ends 0.

    python -m benchmarks hal_torch
    python benchmarks/bench_hal_torch.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import ROUNDS, Gate, Report, spread
from drivetrain import hal
from drivetrain.pytorch.custom import Config, register_custom_device

SIDE = 1024
COUNT = 1 << 24
"""Floats of each operand of the addition: far beyond any cache."""
ADD = """
__kernel void add(__global float *out, __global const float *a, __global const float *b) {
    size_t i = get_global_id(0);
    out[i] = a[i] + b[i];
}
"""


def ratio(
    call: Callable[[], object], control: Callable[[], object], rounds: int
) -> tuple[float, list[float], list[float]]:
    """(median of call / control, seconds of each), in turns; the first turn warms up."""
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        call()
        middle = time.perf_counter()
        control()
        ended = time.perf_counter()
        if number:
            ours.append(middle - began)
            theirs.append(ended - middle)
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), ours, theirs


def product(there: torch.device, wait: Callable[[], object], report: Report, rounds: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    x, y = a.to(there), b.to(there)

    def call() -> None:
        x @ y
        wait()

    found, ours, theirs = ratio(call, lambda: a @ b, rounds)
    speed = [2e-9 * SIDE**3 / statistics.median(each) for each in (ours, theirs)]
    report.add(
        Gate(
            f"torch on OpenCL, {SIDE}^2 float32 product",
            found,
            4.0,
            "x the CPU's time",
            spread=spread(theirs),
            room=3.0,
            detail=f"{speed[0]:.1f} GFLOP/s, torch on the CPU {speed[1]:.1f}; by "
            f"{hal.ops.matmul_backend('opencl:0')}",
        )
    )


def addition(there: torch.device, wait: Callable[[], object], report: Report, rounds: int) -> None:
    x, y = torch.ones(COUNT, device=there), torch.ones(COUNT, device=there)
    device = hal.device("opencl:0")
    stream = device.stream()
    buffers = [device.alloc(4 * COUNT, stream=stream) for _ in range(3)]
    for each in buffers:
        each.fill(b"\0\0\x80\x3f", stream=stream)
    pointers = [hal.PTR] * 3
    kernel = device.compile(hal.Source.opencl(ADD)).kernel("add", args=pointers)
    plan = kernel.plan(stream, COUNT // 256, 256, *buffers)
    stream.synchronize()

    def call() -> None:
        x + y
        wait()

    def control() -> None:
        plan()
        stream.synchronize()

    found, ours, theirs = ratio(call, control, rounds)
    speed = [12e-9 * COUNT / statistics.median(each) for each in (ours, theirs)]
    report.add(
        Gate(
            "torch on OpenCL, addition",
            found,
            1.25,
            "x the time of a kernel of its own",
            spread=spread(theirs),
            room=0.25,
            detail=f"{speed[0]:.1f} GB/s, the kernel {speed[1]:.1f}",
        )
    )


def main() -> int:
    report = Report("hal_torch")
    if not hal.devices("opencl", all_routes=True):
        print("  no OpenCL device here: nothing measured")
        return report.finish()
    handle = register_custom_device("opencl:0", Config(fallback="error"))
    print(f"  {handle!r}")
    rounds = 5 if "--quick" in sys.argv else 2 * ROUNDS + 1

    def wait() -> object:
        return getattr(torch, handle.name).synchronize()

    product(handle.device, wait, report, rounds)
    addition(handle.device, wait, report, rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
