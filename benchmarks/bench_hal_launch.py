"""Launches, events, memory and graphs of each device, against the C loop and the peers.

Start: before the call; end: after it (the work is queued, not done; queues are emptied between
rounds). Floor: the same driver call from a C loop in this process. Peers: cuda.core, CuPy and torch
on NVIDIA GPUs, pyopencl on OpenCL; those that are not installed are named.

    python -m benchmarks hal_launch [cpu opencl cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import Gate, Report
from benchmarks.hal.common import calls, difference, floor, interleaved, ratio, show
from drivetrain import hal
from drivetrain.errors import DrivetrainError

SOURCE = """
extern "C" __global__ void add(float* x, const float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += y[i];
}
"""
LAUNCHES = 1000
PLAN_US, CALL_US = 0.20, 0.35
ALLOC_BYTES = 1 << 20
GRAPH_KERNELS = 100


def _missing(name: str, error: Exception) -> None:
    print(f"    ({name} is not here: {str(error).splitlines()[0]})")


class Bench:
    """One device with the kernel and two buffers."""

    def __init__(self, device: hal.Device, report: Report) -> None:
        self.device, self.report = device, report
        self.stream = device.stream()
        self.x = device.alloc(1024, stream=self.stream)
        self.y = device.alloc(1024, stream=self.stream)
        for buffer in (self.x, self.y):
            buffer.fill(b"\0\0\0\0", stream=self.stream)
        self.kernel = device.compile(hal.Source.cuda(SOURCE)).kernel("add")
        self.plan = self.kernel.plan(self.stream, 1, 256, self.x, self.y, 256)
        self.stream.synchronize()

    def floor_launch(self) -> Callable[[], float] | None:
        """The C loop over the driver's own launch; None where C cannot call it."""
        opened = self.stream._opened
        abi, launch = opened.calls[0], opened.calls[1]
        name = {1: "cuda", 2: "plain", 3: "opencl"}.get(abi)
        if name is None:
            return None
        function = getattr(floor(), f"floor_{name}_launch")
        self.plan()  # sets what OpenCL keeps in the kernel
        table = self.plan._launch.arguments

        def measure() -> float:
            seconds: float = function(
                launch, self.kernel._function, 1, 256, self.stream.handle, table, LAUNCHES
            )
            if seconds < 0:
                raise SystemExit("the C loop's launch failed")
            return seconds

        return measure

    def launches(self, peers: dict[str, Callable[[], object]]) -> None:
        """What plan() and kernel() cost above the C loop, and the peers."""
        stream, kernel, x, y = self.stream, self.kernel, self.x, self.y
        ways: dict[str, Callable[[], float]] = {}
        base = self.floor_launch()
        if base is not None:
            ways["C loop"] = base
        ways["plan()"] = calls(self.plan, LAUNCHES)
        ways["kernel(...)"] = calls(lambda: kernel(stream, 1, 256, x, y, 256), LAUNCHES)
        ways |= {name: calls(way, LAUNCHES) for name, way in peers.items()}
        found = interleaved(ways, self.settle)
        show(f"launch on {self.device.address} ({self.device.name})", found)
        if base is None:
            return
        for name, limit in (("plan()", PLAN_US), ("kernel(...)", CALL_US)):
            above, spread = difference(found, name, "C loop")
            self.report.add(
                Gate(
                    f"{self.device.address} {name} above the C loop",
                    above,
                    limit,
                    "us",
                    spread=spread,
                    room=limit,
                )
            )

    def settle(self) -> None:
        self.device.synchronize()

    def memory(self, peers: dict[str, Callable[[], object]], gate: str) -> None:
        """One allocation and its end, from the pool's free lists."""
        device, stream = self.device, self.stream
        ways = {"pool alloc + close": lambda: device.alloc(ALLOC_BYTES, stream=stream).close()}
        found = interleaved(
            {name: calls(way, 2000) for name, way in {**ways, **peers}.items()}, self.settle
        )
        show(f"1 MiB of memory on {device.address}", found)
        if gate in found:
            share, spread = ratio(found, "pool alloc + close", gate)
            self.report.add(Gate(f"alloc + close / {gate}", share, 1.0, "x", spread, 0.0))

    def events(self, peers: dict[str, Callable[[], object]], gate: str) -> None:
        found = interleaved(
            {
                name: calls(way, 1000)
                for name, way in {"stream.record()": self.stream.record, **peers}.items()
            },
            self.settle,
        )
        show(f"events on {self.device.address}", found)
        if gate in found:
            share, spread = ratio(found, "stream.record()", gate)
            self.report.add(Gate(f"record / {gate}", share, 0.25, "x", spread, 0.25))

    def graph(self, floor_way: Callable[[Any], Callable[[], object]] | None) -> None:
        """A graph of 100 kernels, against launching them and against C."""
        with self.stream.capture() as graph:
            for _ in range(GRAPH_KERNELS):
                self.plan()
        ways = {
            f"graph of {GRAPH_KERNELS} kernels": calls(lambda: graph.launch(self.stream), 20),
            f"{GRAPH_KERNELS} launches": calls(
                lambda: [self.plan() for _ in range(GRAPH_KERNELS)], 20
            ),
        }
        if floor_way is not None:
            ways["C graph launch"] = calls(floor_way(graph), 20)
        found = interleaved(ways, self.settle)
        show(f"graphs on {self.device.address}", found)
        if "C graph launch" in found:
            share, spread = ratio(found, f"graph of {GRAPH_KERNELS} kernels", "C graph launch")
            self.report.add(Gate("graph launch / C", share, 1.2, "x", spread, 0.2))


# -- the peers -------------------------------------------------------------------------------------


def cuda_peers(bench: Bench) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(launch, memory, event) of cuda.core, CuPy and torch, on the same GPU."""
    launch: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    event: dict[str, Any] = {}
    try:
        import torch

        x, y = torch.zeros(256, device="cuda"), torch.zeros(256, device="cuda")
        launch["torch.add(out=)"] = lambda: torch.add(x, y, out=x)
        memory["torch.empty"] = lambda: torch.empty(ALLOC_BYTES // 4, device="cuda")
        mark = torch.cuda.Event()
        event["torch event.record()"] = lambda: mark.record()
    except (ImportError, RuntimeError) as error:
        _missing("torch with CUDA", error)
    try:
        import cupy

        kernel = cupy.RawKernel(SOURCE, "add")
        cx, cy, n = cupy.zeros(256, np.float32), cupy.zeros(256, np.float32), np.int32(256)
        launch["CuPy RawKernel"] = lambda: kernel((1,), (256,), (cx, cy, n))
        pool = cupy.get_default_memory_pool()
        memory["CuPy pool.malloc + free"] = lambda: pool.malloc(ALLOC_BYTES)
    except ImportError as error:
        _missing("CuPy", error)
    try:
        from cuda import core

        if not hasattr(core, "Device"):
            from cuda.core import experimental as core
        device = core.Device(0)
        device.set_current()
        stream = device.create_stream()
        options = core.ProgramOptions(arch=bench.stream._opened.backend.target.arch)
        program = core.Program(SOURCE, code_type="c++", options=options)
        found = program.compile("cubin").get_kernel("add")
        config = core.LaunchConfig(grid=1, block=256)
        px, py, pn = bench.x.ptr, bench.y.ptr, np.int32(256)
        launch["cuda.core launch"] = lambda: core.launch(stream, config, found, px, py, pn)
        resource = device.memory_resource
        memory["cuda.core pool"] = lambda: resource.allocate(ALLOC_BYTES, stream=stream).close()
    except ImportError as error:
        _missing("cuda.core", error)
    return launch, memory, event


def cuda_graph_floor(bench: Bench) -> Callable[[Any], Callable[[], object]]:
    """cuGraphLaunch of the very same graph, called from C."""
    import ctypes

    address = ctypes.cast(ctypes.CDLL("libcuda.so.1").cuGraphLaunch, ctypes.c_void_p).value
    two = floor().floor_two

    def of(graph: Any) -> Callable[[], object]:
        backend = bench.stream._opened.backend
        handle = backend.graph_handle(graph._handle)
        return lambda: two(address, handle, bench.stream.handle, 1)

    return of


def opencl_peers(bench: Bench) -> dict[str, Any]:
    """pyopencl on the same platform, arguments given at each call, with and without an event."""
    try:
        import pyopencl as cl
    except ImportError as error:
        _missing("pyopencl", error)
        return {}
    devices = [d for p in cl.get_platforms() for d in p.get_devices()]
    same = [d for d in devices if d.name.strip() == bench.device.name.strip()] or devices
    context = cl.Context([same[0]])
    queue = cl.CommandQueue(context)
    text = """__kernel void add(__global float* x, __global const float* y, int n) {
        int i = get_global_id(0); if (i < n) x[i] += y[i]; }"""
    kernel = cl.Kernel(cl.Program(context, text).build(), "add")
    x, y = (cl.Buffer(context, cl.mem_flags.READ_WRITE, 1024) for _ in range(2))
    n = np.int32(256)
    return {"pyopencl kernel(...)": lambda: kernel(queue, (256,), (256,), x, y, n)}


def main() -> int:
    report = Report("hal_launch")
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")] or [
        "cpu",
        "opencl",
        "cuda",
    ]
    for driver in wanted:
        devices = hal.devices(driver)
        if not devices:
            print(f"  {driver}: {hal.drivers()[driver].reason}")
            continue
        for device in devices[:1] if driver != "opencl" else devices:
            try:
                bench = Bench(device, report)
            except DrivetrainError as error:
                print(f"  {device.address}: {error}")
                continue
            if driver == "cuda":
                launch, memory, event = cuda_peers(bench)
                bench.launches(launch)
                bench.memory(memory, "CuPy pool.malloc + free")
                bench.events(event, "torch event.record()")
                bench.graph(cuda_graph_floor(bench))
            elif driver == "opencl":
                peers = opencl_peers(bench)
                bench.launches(peers)
                opencl_gate(bench, peers)
                bench.memory({}, "")
                bench.events({}, "")
            else:
                bench.launches({})
                bench.memory({}, "")
                bench.events({}, "")
                bench.graph(None)
    return report.finish()


def opencl_gate(bench: Bench, peers: dict[str, Any]) -> None:
    """A launch with and without an event, over pyopencl's, which always makes one."""
    if not peers:
        return
    stream, kernel, x, y = bench.stream, bench.kernel, bench.x, bench.y

    def with_event() -> None:
        kernel(stream, 1, 256, x, y, 256)
        stream.record()

    ways = {
        "kernel(...)": calls(lambda: kernel(stream, 1, 256, x, y, 256), LAUNCHES),
        "kernel(...) and record()": calls(with_event, LAUNCHES),
        **{name: calls(way, LAUNCHES) for name, way in peers.items()},
    }
    found = interleaved(ways, bench.settle)
    show(f"OpenCL launch on {bench.device.address} against pyopencl", found)
    for name in ("kernel(...)", "kernel(...) and record()"):
        share, spread = ratio(found, name, "pyopencl kernel(...)")
        bench.report.add(
            Gate(f"{bench.device.address} {name} / pyopencl", share, 0.6, "x", spread, 0.4)
        )


if __name__ == "__main__":
    sys.exit(main())
