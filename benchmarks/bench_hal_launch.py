"""Launches, events, memory and graphs of each device, against the C loop and the peers.

Start: before the call; end: its return (the work is queued, not done; queues are emptied between
rounds). All calls come from one core. Where the device is the processor itself, the stream is kept
busy meanwhile: its threads would else fall asleep between two calls, and waking them would be
measured. Floor: the same driver call from a C loop in this process. Peers: cuda.core, CuPy and
torch on NVIDIA GPUs, pyopencl on OpenCL, torch's and pyopencl's memory on the CPU; those that are
not installed are named. All checks of bad input are on.

    python -m benchmarks hal_launch
    python benchmarks/bench_hal_launch.py [--quick] [--json] [cpu opencl cuda]
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hal import peers
from benchmarks.hal.common import (
    QUEUED,
    QUICK,
    ROUNDS,
    Call,
    HalReport,
    Measure,
    Statement,
    Way,
    calls,
    difference,
    interleaved,
    on_one_core,
    ratio,
    words,
)
from benchmarks.hal.native import Step, floor
from benchmarks.hal.peers import Ways
from drivetrain import hal
from drivetrain.errors import DrivetrainError

LAUNCHES = 100 if QUICK else 1000
PLAN_US, CALL_US = 0.20, 0.35
ALLOC_BYTES = 1 << 20
GRAPH_KERNELS = 100
REPLAYS = 5 if QUICK else 20
HOLD_S = 0.02 if QUICK else 0.04
C_LOOP, C_GRAPH, C_RECORD = "C loop", "C graph launch", "C record"


def _seconds(value: float) -> float:
    if value < 0:
        raise RuntimeError("the C loop's call failed")
    return value


class Bench:
    """One device with the kernel and two buffers."""

    def __init__(self, device: hal.Device, report: HalReport) -> None:
        self.device, self.report = device, report
        self.stream = device.stream()
        self.x = device.alloc(1024, stream=self.stream)
        self.y = device.alloc(1024, stream=self.stream)
        for buffer in (self.x, self.y):
            buffer.fill(b"\0\0\0\0", stream=self.stream)
        self.kernel = device.compile(hal.Source.cuda(peers.SOURCE)).kernel("add")
        self.plan = self.kernel.plan(self.stream, 1, 256, self.x, self.y, 256)
        self.stream.synchronize()
        self.abi, self.launcher = self.stream._opened.calls[:2]
        self.busy = device.driver == "cpu" or device.memory_domain == "host"
        self.rounds = ROUNDS if QUICK else ROUNDS * (3 if self.busy else 9)  # holding takes long
        self.span = (
            replace(QUEUED, start="before the call, the stream busy") if self.busy else QUEUED
        )
        self.spin = device.compile(hal.Source.cuda(peers.SPIN)).kernel("spin")
        self.turns = self._turns() if self.busy else 0

    def _turns(self) -> int:
        """How long the kernel that keeps the stream busy must turn."""
        count = 1 << 20
        for _ in range(2):
            began = time.perf_counter()
            self.spin(self.stream, 1, 1, self.x, count)
            self.stream.synchronize()
            took = time.perf_counter() - began
        return int(count * HOLD_S / took)

    def hold(self) -> None:
        if self.busy:
            self.spin(self.stream, 1, 1, self.x, self.turns)

    def call(self, then: str = "") -> Statement:
        names = {"kernel": self.kernel, "stream": self.stream, "x": self.x, "y": self.y}
        return Statement(f"kernel(stream, 1, 256, x, y, 256){then}", **names)

    def timed(self, way: Way, count: int = LAUNCHES) -> Measure:
        """Calls in a row on a stream that is kept busy, where that matters."""
        return calls(way, count, self.hold)

    def in_c(
        self, function: Callable[..., float], *facts: object, first: Sequence[object] = ()
    ) -> Measure:
        """The same of a C loop; ``first``: the facts of a loop before it that is not counted."""

        def measure() -> float:
            self.hold()
            if first:
                _seconds(function(*first))
            return _seconds(function(*facts))

        return measure

    def settle(self) -> None:
        self.device.synchronize()

    def interleaved(self, ways: Mapping[str, Measure]) -> dict[str, list[float]]:
        with on_one_core():
            return interleaved(ways, self.settle, self.rounds)

    def floor_launch(self) -> dict[str, Measure]:
        """The C loop over the driver's own launch; empty where C cannot call it."""
        name = {1: "cuda", 2: "plain", 3: "opencl"}.get(self.abi)
        if name is None:
            self.report.missing("the C loop", "C cannot call this driver's launch")
            return {}
        function = getattr(floor(), f"floor_{name}_launch")
        table, handle = self.plan._launch.arguments, self.stream.handle
        facts = (self.kernel._function, 1, 256, handle, table)
        if name == "opencl":
            launch_and_set = (ctypes.c_void_p * 3)(*self.stream._opened.calls[1:4])
            sizes = (ctypes.c_int * 3)(*self.kernel._sizes)
            return {C_LOOP: self.in_c(function, launch_and_set, *facts, sizes, 3, LAUNCHES)}
        return {C_LOOP: self.in_c(function, self.launcher, *facts, LAUNCHES)}

    def launches(self, others: Ways) -> None:
        """What plan() and kernel() cost above the C loop, and the peers."""
        ways = self.floor_launch()
        ways |= {"plan()": self.timed(self.plan), "kernel(...)": self.timed(self.call())}
        ways |= {name: calls(way, LAUNCHES) for name, way in others.items()}
        found = self.interleaved(ways)
        span = replace(
            self.span,
            floor=C_LOOP if C_LOOP in ways else "none: C cannot call this driver",
            peer=next(reversed(others), "none is installed"),
        )
        self.report.show(f"launch on {self.device.address} ({self.device.name})", found, span)
        if C_LOOP not in ways:
            return
        for name, limit in (("plan()", PLAN_US), ("kernel(...)", CALL_US)):
            above = difference(found, name, C_LOOP)
            title = f"{self.device.address} {name} above the C loop"
            self.report.gate(title, above, limit, "us", span, room=limit)

    def opencl(self, others: Ways, hold: Call | None) -> None:
        """A launch without and with an event, over pyopencl's, which always makes one."""
        if not others:
            return

        ways = {
            "kernel(...)": self.timed(self.call()),
            "kernel(...) and record()": self.timed(self.call("; stream.record()")),
            "plan()": self.timed(self.plan),
            **self.floor_launch(),
            **{name: calls(way, LAUNCHES, hold) for name, way in others.items()},
        }
        found = self.interleaved(ways)
        peer = "pyopencl kernel(...)"
        span = replace(self.span, floor=C_LOOP, peer=peer)
        self.report.show(f"OpenCL launch on {self.device.address}", found, span)
        for name, what in (
            ("kernel(...)", "without an event"),
            ("kernel(...) and record()", "with an event"),
        ):
            title = f"{self.device.address} {name} / pyopencl, {what}"
            self.report.gate(title, ratio(found, name, peer), 0.6, "x", span, room=0.4)

    def memory(self, others: Ways, gate: str = "") -> None:
        """One allocation and its end, from the pool's free lists."""
        name, device, stream = "pool alloc + close", self.device, self.stream

        names = {"device": device, "stream": stream, "n": ALLOC_BYTES}
        ours = Statement("device.alloc(n, stream=stream).close()", **names)
        ways = {name: calls(ours, 2 * LAUNCHES)}
        ways |= {other: calls(way, 2 * LAUNCHES) for other, way in others.items()}
        found = self.interleaved(ways)
        peer = gate if gate in others else next(iter(others), "none is installed")
        span = replace(QUEUED, end="its return, the memory free again", peer=peer)
        span = replace(span, floor="none: no driver has free lists of its own to loop over")
        self.report.show(f"1 MiB of memory on {device.address}", found, span)
        if gate in found:
            title = f"{device.address} {name} / {gate}"
            self.report.gate(title, ratio(found, name, gate), 1.0, "x", span)
        elif gate:
            self.report.missing(f"the gate on {name}", f"its peer, {gate}, is not here")

    def events(self, others: Ways, gate: str = "", hold: Call | None = None) -> None:
        ways = {"stream.record()": self.timed(self.stream.record)}
        record = self.stream._opened.calls[4]
        if record:
            event = self.stream.record()
            facts = (record, event._handle, self.stream.handle, LAUNCHES)
            ways[C_RECORD] = self.in_c(floor().floor_record, *facts)
        ways |= {name: calls(way, LAUNCHES, hold) for name, way in others.items()}
        found = self.interleaved(ways)
        span = replace(
            self.span,
            floor=C_RECORD if record else "none: C cannot call this driver's record",
            peer=gate if gate in others else next(iter(others), "none is installed"),
        )
        self.report.show(f"events on {self.device.address}", found, span)
        if gate in found:
            title = f"{self.device.address} stream.record() / {gate}"
            self.report.gate(title, ratio(found, "stream.record()", gate), 0.25, "x", span, 0.75)
        elif gate:
            self.report.missing("the gate on record()", f"its peer, {gate}, is not here")

    def graph(self) -> None:
        """A graph of 100 kernels, against launching them and against C. The first launch after a
        wait is not counted: so few are measured in a row that finding the caches cold would be."""
        with self.stream.capture() as graph:
            for _ in range(GRAPH_KERNELS):
                self.plan()
        name = f"graph of {GRAPH_KERNELS} kernels"

        def first() -> None:
            self.hold()
            graph.launch(self.stream)

        launch = Statement("graph.launch(stream)", graph=graph, stream=self.stream)
        ways = {
            name: calls(launch, REPLAYS, first),
            f"{GRAPH_KERNELS} x plan()": self.timed(
                Statement("for _ in each: plan()", each=range(GRAPH_KERNELS), plan=self.plan),
                REPLAYS,
            ),
        }
        in_c = self._graph_floor(graph)
        if in_c is not None:
            ways[C_GRAPH] = in_c
        found = self.interleaved(ways)
        span = replace(self.span, floor=C_GRAPH if in_c else "none: C cannot call this driver's")
        span = replace(span, peer=f"{GRAPH_KERNELS} x plan()")
        self.report.show(f"graphs on {self.device.address}", found, span)
        if in_c is not None:
            share = ratio(found, name, C_GRAPH)
            title = f"{self.device.address} {name} / C"
            self.report.gate(title, share, 1.2, "x", span, room=0.2)

    def _graph_floor(self, graph: hal.Graph) -> Measure | None:
        """The driver's own graph launched from C, or the same kernels in a C loop."""
        opened, stream = self.stream._opened, self.stream.handle
        if graph.native and opened.calls[8]:
            facts = (opened.calls[8], graph._handle, stream)
            return self.in_c(floor().floor_two, *facts, REPLAYS, first=(*facts, 1))
        if graph.native or self.abi != 2:
            return None
        each = ((n.kernel._function, n.grid, n.block, n.arguments) for n in graph._launches)
        steps = (Step * GRAPH_KERNELS)(*[Step(*facts) for facts in each])
        table = (self.launcher, steps, GRAPH_KERNELS)
        measure = self.in_c(
            floor().floor_plain_steps, *table, REPLAYS, stream, first=(*table, 1, stream)
        )
        return lambda: measure() / REPLAYS


# -- devices ---------------------------------------------------------------------------------------


def on_cuda(device: hal.Device, report: HalReport) -> None:
    bench = Bench(device, report)
    launch, memory, event = peers.cuda(report, bench, ALLOC_BYTES)
    _parts(
        report,
        {
            "launch": lambda: bench.launches(launch),
            "memory": lambda: bench.memory(memory, "CuPy pool.malloc + free"),
            "events": lambda: bench.events(event, "torch event.record()"),
            "graphs": bench.graph,
        },
        device,
    )


def on_opencl(device: hal.Device, report: HalReport) -> None:
    bench = Bench(device, report)
    launch: Ways = {}
    memory: Ways = {}
    event: Ways = {}
    hold: Call | None = None
    try:
        peer = peers.OpenCL(device)
        launch, memory, event = peer.launches(), peer.memory(ALLOC_BYTES), peer.events()
        hold = peer.spin(bench.turns) if bench.busy else None
    except (ImportError, LookupError) as error:
        report.missing("pyopencl", error)
    _parts(
        report,
        {
            "launch": lambda: bench.launches({}),
            "launch against pyopencl": lambda: bench.opencl(launch, hold),
            "memory": lambda: bench.memory(memory),
            "events": lambda: bench.events(event, hold=hold),
            "graphs": bench.graph,
        },
        device,
    )


def on_cpu(device: hal.Device, report: HalReport) -> None:
    bench = Bench(device, report)
    memory: Ways = {}
    try:
        import torch

        names = {"empty": torch.empty, "n": ALLOC_BYTES // 4}
        memory["torch.empty on the CPU"] = Statement("empty(n)", **names)
    except ImportError as error:
        report.missing("torch", error)
    _parts(
        report,
        {
            "launch": lambda: bench.launches({}),
            "memory": lambda: bench.memory(memory),
            "events": lambda: bench.events({}),
            "graphs": bench.graph,
        },
        device,
    )


def _parts(report: HalReport, parts: dict[str, Callable[[], None]], device: hal.Device) -> None:
    for name, run in parts.items():
        report.part(f"{name}, {device.address}", run)


ON = {"cpu": on_cpu, "opencl": on_opencl, "cuda": on_cuda}


def main() -> int:
    report = HalReport("hal_launch")
    peers.vendors()
    for driver in words() or list(ON):
        if driver not in ON:
            print(f"no part {driver!r}; there are: {', '.join(ON)}", file=sys.stderr)
            return 2
        devices = hal.devices(driver, all_routes=driver == "opencl")
        if not devices:
            report.missing(driver, hal.drivers()[driver].reason)
        for device in devices if driver == "opencl" else devices[:1]:
            try:
                ON[driver](device, report)
            except (DrivetrainError, OSError, ctypes.ArgumentError) as error:
                report.failed.append(f"{device.address}: {error}")
                print(f"  FAILED    {device.address}: {error}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
