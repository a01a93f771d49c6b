"""Whole workloads: what the HAL adds to the driver's own API called from C.

Start: before the first call; end: all of it is done (the stream waited for). Floor, and what is
held against: the same kernels, arguments and stream from a C loop over the driver's own launch
function (cuLaunchKernel; on the processor the `cpu` driver's), or over cublasGemmEx. The workloads:
a stencil that goes to and fro between two arrays, plan by plan; a pipeline of four small kernels,
the four of them in one call of ``launch_all``; a chain of matrix products in half precision through
cuBLAS on memory of torch's, wrapped.

    python -m benchmarks hal_workloads
    python benchmarks/bench_hal_workloads.py [--quick] [--json] [cpu cuda]
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.hal.common import QUICK, HalReport, Measure, Span, interleaved, ratio, whole, words
from benchmarks.hal.native import Step, floor
from drivetrain import hal

LIMIT = 1.02
OURS, C, TORCH = "drivetrain", "the same in C", "torch"
ONE_BY_ONE = "drivetrain, a call for each"

SOURCE = r"""
extern "C" __global__ void stencil(int w, int h, const float* in, float* out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x;
    int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < 1 || y < 1 || x >= w - 1 || y >= h - 1) return;
    int i = y * w + x;
    out[i] = 0.5f * in[i] + 0.125f * (in[i - 1] + in[i + 1] + in[i - w] + in[i + w]);
}
extern "C" __global__ void scale(int n, float a, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i];
}
extern "C" __global__ void shift(int n, float b, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + b;
}
extern "C" __global__ void bound(int n, float most, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = fminf(fmaxf(x[i], -most), most);
}
extern "C" __global__ void mix(int n, float t, const float* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = y[i] + t * (x[i] - y[i]);
}
"""


@dataclass(frozen=True)
class Size:
    """How much of each workload."""

    side: int
    turns: int
    """Times that the stencil goes there and back."""
    small: int
    """Floats of the pipeline's arrays."""
    rounds: int
    """Times that the pipeline runs through."""


SIZES = {
    "cpu": Size(256, 4, 4096, 8) if QUICK else Size(2048, 10, 1 << 17, 100),
    "cuda": Size(512, 4, 1 << 16, 8) if QUICK else Size(4096, 200, 1 << 20, 500),
}
ORDER, PRODUCTS = (256, 4) if QUICK else (4096, 50)


class Launches:
    """A list of launches, queued many times: by plans, and from C."""

    def __init__(self, device: hal.Device, plans: list[hal.Plan], repeats: int) -> None:
        self.plans, self.repeats = plans, repeats
        self.stream = plans[0]._stream
        self.abi, self.launcher = self.stream._opened.calls[:2]
        self.steps = (Step * len(plans))()
        for step, plan in zip(self.steps, plans, strict=True):
            launch = plan._launch
            step.function, step.arguments = launch.kernel._function, launch.arguments
            step.grid[:], step.block[:] = launch.grid, launch.block

    def ours(self) -> None:
        for _ in range(self.repeats):
            for plan in self.plans:
                plan()

    def together(self) -> None:
        for _ in range(self.repeats):
            hal.launch_all(self.plans)

    def in_c(self) -> None:
        """Raises RuntimeError when C cannot call this driver, or a call failed."""
        name = {1: "cuda", 2: "plain"}.get(self.abi)
        if name is None:
            raise RuntimeError("C cannot call this driver's launch")
        run = getattr(floor(), f"floor_{name}_steps")
        if run(self.launcher, self.steps, len(self.plans), self.repeats, self.stream.handle) < 0:
            raise RuntimeError("the C loop's launch failed")


def compare(
    report: HalReport, title: str, gate: str, ways: dict[str, Measure], settle: Any
) -> None:
    found = interleaved(ways, settle)
    others = [name for name in ways if name not in (OURS, ONE_BY_ONE, C)]
    span = Span("before the first call", "all of it is done", C, next(iter(others), "none"))
    report.show(title, found, span, "ms")
    report.gate(gate, ratio(found, OURS, C), LIMIT, "x", span, room=LIMIT - 1)


class Workloads:
    """The kernels of one device, and arrays for them."""

    def __init__(self, report: HalReport, device: hal.Device) -> None:
        self.report, self.device, self.stream = report, device, device.stream()
        self.module = device.compile(hal.Source.cuda(SOURCE))
        self.size = SIZES[device.driver]

    def floats(self, count: int) -> hal.Buffer:
        made = self.device.alloc(4 * count, stream=self.stream)
        made.copy_from(np.random.default_rng(1).random(count, np.float32), stream=self.stream)
        return made

    def run(
        self, name: str, launches: Launches, *arrays: hal.Buffer, together: bool = False
    ) -> None:
        """``together``: all of a round in one call; plan by plan is shown beside it."""
        self.same(launches, arrays)
        settle = self.stream.synchronize
        ways = {OURS: whole(launches.ours, settle), C: whole(launches.in_c, settle)}
        if together:
            ways = {OURS: whole(launches.together, settle), C: ways[C], ONE_BY_ONE: ways[OURS]}
        count = len(launches.plans) * launches.repeats
        title = f"{name} on {self.device.address}, {count} launches"
        compare(self.report, title, f"{name} on {self.device.address} / C", ways, settle)

    def contents(self, arrays: tuple[hal.Buffer, ...]) -> list[Any]:
        found = [np.empty(buffer.nbytes // 4, np.float32) for buffer in arrays]
        for array, buffer in zip(found, arrays, strict=True):
            buffer.copy_to(array, stream=self.stream)
        self.stream.synchronize()
        return found

    def same(self, launches: Launches, arrays: tuple[hal.Buffer, ...]) -> None:
        """Both ways do the same, and something. Raises RuntimeError."""
        seen, before = [], self.contents(arrays)
        for way in (launches.ours, launches.together, launches.in_c):
            for buffer, content in zip(arrays, before, strict=True):
                buffer.copy_from(content, stream=self.stream)
            way()
            seen.append(self.contents(arrays))
        if all(np.array_equal(a, b) for a, b in zip(seen[0], before, strict=True)):
            raise RuntimeError("the launches changed nothing")
        for other in seen[1:]:
            if not all(np.array_equal(a, b) for a, b in zip(seen[0], other, strict=True)):
                raise RuntimeError("the C loop and the plans give different results")

    def stencil(self) -> None:
        side, kernel = self.size.side, self.module.kernel("stencil")
        a, b = self.floats(side * side), self.floats(side * side)
        grid = (-(-side // 32), -(-side // 8))
        plans = [
            kernel.plan(self.stream, grid, (32, 8), side, side, *pair) for pair in ((a, b), (b, a))
        ]
        self.run("stencil", Launches(self.device, plans, self.size.turns), a, b)

    def pipeline(self) -> None:
        n = self.size.small
        x, y, z = (self.floats(n) for _ in range(3))
        chain = (
            ("scale", 1.01, x, y),
            ("shift", 0.25, y, z),
            ("bound", 2.0, z, y),
            ("mix", 0.5, y, z),
        )
        plans = [
            self.module.kernel(name).plan(self.stream, -(-n // 256), 256, n, value, source, target)
            for name, value, source, target in chain
        ]
        launches = Launches(self.device, plans, self.size.rounds)
        self.run("pipeline of small kernels", launches, x, y, z, together=True)

    def products(self) -> None:
        """c = a b, a = c b, ... with torch's matrices."""
        import torch

        from drivetrain.hal import ops

        if not torch.cuda.is_available():
            raise RuntimeError("this torch has no CUDA")
        where = f"cuda:{self.device.index}"
        # Spread by 1 and by 1 / sqrt(n): each product is spread as its left operand is.
        a, b = (
            (torch.rand(ORDER, ORDER, device=where) * 2 - 1).mul_(scale).half()
            for scale in (3.0**0.5, (3.0 / ORDER) ** 0.5)
        )
        c = torch.empty_like(a)
        torch.cuda.synchronize(where)
        left, right = ops.from_dlpack(a), ops.from_dlpack(b)  # the memory is torch's
        stream = self.stream

        def ours() -> None:
            x = left
            for _ in range(PRODUCTS):
                x = ops.matmul(x, right, stream=stream)

        first = ops.matmul(left, right, stream=stream)
        if not np.allclose(first.numpy(), torch.matmul(a, b).cpu().numpy(), rtol=1e-2, atol=3e-2):
            raise RuntimeError("the product is not torch's")
        print(f"    matmul by {ops.matmul_backend(self.device)}")
        in_c = self._products_in_c(a.clone(), b, c)

        def torchs() -> None:
            x = a
            for _ in range(PRODUCTS):
                x = torch.matmul(x, b)

        settle = stream.synchronize
        ways = {OURS: whole(ours, settle), C: whole(in_c, settle)}
        ways[TORCH] = whole(torchs, lambda: torch.cuda.synchronize(where))
        title = f"{PRODUCTS} products of {ORDER} x {ORDER} float16 on {self.device.address}"
        gate = f"matrix products on {self.device.address} / C"
        compare(self.report, title, gate, ways, self.device.synchronize)

    def _products_in_c(self, a: Any, b: Any, c: Any) -> Any:
        """cublasGemmEx of the library that is loaded already, on our stream, from C."""
        library = ctypes.CDLL(loaded("libcublas"))
        handle = ctypes.c_void_p()
        if library.cublasCreate_v2(ctypes.byref(handle)):
            raise RuntimeError("cublasCreate failed")
        if library.cublasSetStream_v2(handle, ctypes.c_void_p(self.stream.handle)):
            raise RuntimeError("cublasSetStream failed")
        address = ctypes.cast(library.cublasGemmEx, ctypes.c_void_p).value
        pointers = (a.data_ptr(), b.data_ptr(), c.data_ptr())
        run = floor().floor_gemm_chain

        def in_c() -> None:
            if run(address, handle, ORDER, *pointers, PRODUCTS) < 0:
                raise RuntimeError("cublasGemmEx failed")

        return in_c


def loaded(name: str) -> str:
    """The path of a library that this process has loaded. Raises RuntimeError."""
    text = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = re.search(rf"\S*/{name}\.so\S*", text)
    if found is None:
        raise RuntimeError(f"{name} is not loaded")
    return found.group()


def main() -> int:
    report = HalReport("hal_workloads")
    chosen = words() or ["cpu", "cuda"]
    if set(chosen) - set(SIZES):
        print(f"there are: {', '.join(SIZES)}", file=sys.stderr)
        return 2
    for driver in chosen:
        devices = hal.devices(driver)
        if not devices:
            report.missing(driver, hal.drivers()[driver].reason)
            continue
        made: list[Workloads] = []
        device = devices[0]
        report.part(
            f"kernels of {device}",
            lambda device=device, made=made: made.append(Workloads(report, device)),
        )
        for each in made:
            report.part(f"stencil, {device}", each.stencil)
            report.part(f"pipeline, {device}", each.pipeline)
            if driver == "cuda":
                report.part(f"matrix products, {device}", each.products)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
