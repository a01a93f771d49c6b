"""Profiles: what ran is in the sums and on the timeline, whatever happens inside the block."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import watch

SOURCE = """
extern "C" __global__ void add(float* x, const float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += y[i];
}
extern "C" __global__ void twice(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= 2;
}
"""
N = 4096


@cache
def source() -> hal.Source:
    """Compiled once for all tests: each has a state folder, and so a cache, of its own."""
    from drivetrain.hal.language import compile
    from drivetrain.hal.opened import opened

    target = opened(hal.device("cpu:0")).backend.target
    made = compile(hal.Source.cuda(SOURCE), target)
    kernels = {"add": [hal.PTR, hal.PTR, hal.I32], "twice": [hal.PTR, hal.I32]}
    return hal.Source.binary(made.code, made.form, kernels)


@pytest.fixture
def device() -> Iterator[hal.Device]:
    yield hal.device("cpu:0")
    assert watch.active == ()
    hal.close_all()


def simulated(monkeypatch: pytest.MonkeyPatch, words: str = "count=1") -> hal.Device:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", words)
    return hal.devices("simulated")[0]


class Work:
    """A stream, two buffers and two kernels."""

    def __init__(self, device: hal.Device) -> None:
        self.device, self.stream = device, device.stream()
        self.x, self.y = (device.alloc(4 * N, stream=self.stream) for _ in range(2))
        for buffer in (self.x, self.y):
            buffer.fill(b"\0\0\0\0", stream=self.stream)
        module = device.compile(source())
        self.add_kernel, self.twice_kernel = module.kernel("add"), module.kernel("twice")
        self.stream.synchronize()

    def add(self, times: int = 1) -> None:
        for _ in range(times):
            self.add_kernel(self.stream, N // 256, 256, self.x, self.y, N)


def line(profile: hal.profile, kind: str, name: str) -> Any:
    (found,) = [each for each in profile.lines(kind) if each.name == name]
    return found


def wrong_events(trace: Any) -> list[str]:
    """What a viewer of Chrome traces would not take, or would show wrongly."""
    wrong = []
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        return ["no list of traceEvents"]
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = set()
    for event in trace["traceEvents"]:
        for key, kinds in (("name", str), ("ph", str), ("pid", int), ("tid", int)):
            if not isinstance(event.get(key), kinds) or isinstance(event.get(key), bool):
                wrong.append(f"{key} of {event}")
        if event.get("ph") == "M":
            named.add((event["name"], event["pid"]))
            continue
        if event.get("ph") != "X":
            wrong.append(f"ph of {event}")
            continue
        for key in ("ts", "dur"):
            if not isinstance(event.get(key), (int, float)) or event[key] < 0:
                wrong.append(f"{key} of {event}")
                break
        else:
            row = rows.setdefault((event["pid"], event["tid"]), [])
            row.append((event["ts"], event["ts"] + event["dur"]))
    for key, row in rows.items():
        if ("process_name", key[0]) not in named:
            wrong.append(f"process {key[0]} has no name")
        open_until: list[float] = []
        for begin, end in sorted(row, key=lambda r: (r[0], -r[1])):
            while open_until and open_until[-1] <= begin + 2e-3:  # nanoseconds are rounded
                open_until.pop()
            if open_until and end > open_until[-1] + 2e-3:
                wrong.append(f"events of row {key} overlap at {begin}")
            open_until.append(end)
    return wrong


def test_kernels_copies_and_fills_are_counted_with_bytes_and_times(device: hal.Device) -> None:
    work = Work(device)
    back = bytearray(4 * N)
    with hal.profile() as profile:
        work.add(5)
        work.twice_kernel(work.stream, N // 256, 256, work.x, N)
        work.y.copy_from(bytes(4 * N), stream=work.stream)
        work.x.copy_to(back, stream=work.stream)
        work.x.copy_from(work.y, stream=work.stream)
        work.x.fill(b"\1", stream=work.stream)
    add = line(profile, "kernel", "add")
    assert (add.calls, add.timed, add.device, add.clock) == (5, 5, "cpu:0", "device")
    assert add.nbytes == 5 * 2 * 4 * N  # two buffers each, counted whole
    assert add.bytes_are == "estimated"
    assert 0 < add.least_s <= add.most_s <= add.seconds
    assert add.gbps == pytest.approx(add.nbytes / add.seconds / 1e9)
    assert line(profile, "kernel", "twice").nbytes == 4 * N
    for name in ("host to device", "device to host", "device to device"):
        copy = line(profile, "copy", name)
        assert (copy.calls, copy.nbytes, copy.bytes_are) == (1, 4 * N, "exact")
    assert line(profile, "fill", "fill").nbytes == 4 * N
    assert "~" in profile.table()
    assert "add" in profile.table()


def test_declared_work_is_held_against_the_roofline(device: hal.Device) -> None:
    work = Work(device)
    seen: list[Any] = []

    def flops(grid: Any, block: Any, arguments: Any) -> float:
        seen.append((grid, block, arguments))
        return float(arguments[2])

    work.add_kernel.work(bytes=12 * N, flops=flops, dtype="float32")
    peaks = {"cpu:0": hal.Peaks(memory_gbps=100.0, flops={"float32": 1e9})}
    with hal.profile(peaks=peaks) as profile:
        work.add(2)
    assert seen[0] == ((N // 256, 1, 1), (256, 1, 1), (work.x, work.y, N))
    add = line(profile, "kernel", "add")
    assert (add.nbytes, add.bytes_are, add.flops) == (24 * N, "declared", 2 * N)
    (told,) = profile.as_json()["kernels"]
    at_peak = max(24 * N / 100e9, 2 * N / 1e9)
    assert told["roofline_share"] == pytest.approx(at_peak / add.seconds)
    assert told["bound"] == "compute"
    with hal.profile(peaks=lambda device: None) as other:
        work.add()
    assert other.as_json()["kernels"][0]["roofline_share"] is None


def test_declared_work_is_a_number(device: hal.Device, tmp_path: Path) -> None:
    work = Work(device)
    wrong: tuple[Any, ...] = (float("nan"), float("inf"), -1, "12", [3])
    for told in wrong:
        with pytest.raises(BadInput, match=r"add: .* bytes a launch"):
            work.add_kernel.work(bytes=told)
        work.add_kernel.work(flops=lambda *_, told=told: told)
        with hal.profile(), pytest.raises(BadInput, match=r"add: .* flops a launch"):
            work.add()
    work.add_kernel.work(bytes=np.int64(12 * N), flops=lambda *_: np.float32(N))
    with hal.profile() as profile:
        work.add()
    profile.write_trace(tmp_path / "trace.json")
    json.loads((tmp_path / "trace.json").read_text())
    add = line(profile, "kernel", "add")
    assert (add.nbytes, add.flops) == (12 * N, N)


def test_the_trace_is_what_viewers_take(device: hal.Device, tmp_path: Path) -> None:
    work = Work(device)
    second = device.stream()
    with hal.profile() as profile:
        with hal.profile.range("outer"), hal.profile.range("inner"):
            work.add(3)
        work.twice_kernel(second, N // 256, 256, work.y, N)
        second.synchronize()
        work.stream.synchronize()
    profile.write_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert wrong_events(trace) == []
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {
        e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"
    }
    (host,) = [pid for pid, name in names.items() if name == "host"]
    (cpu,) = [pid for pid, name in names.items() if name == "cpu:0"]
    assert len({e["tid"] for e in events if e["pid"] == cpu}) == 2  # two streams, two rows
    assert {e["name"] for e in events if e["pid"] == host} >= {"outer", "inner", "add"}
    calls = [e for e in events if e["name"] == "add" and e["pid"] == host]
    works = [e for e in events if e["name"] == "add" and e["pid"] == cpu]
    assert len(calls) == len(works) == 3
    for call, ran in zip(calls, works, strict=True):
        assert ran["ts"] >= call["ts"] - 0.002  # nothing begins before it is queued
    (outer,) = [e for e in events if e["name"] == "outer"]
    assert all(outer["ts"] <= c["ts"] <= outer["ts"] + outer["dur"] for c in calls)


def test_a_trace_that_viewers_would_not_take_is_noticed() -> None:
    good = {"name": "a", "ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 5}
    name = {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "host"}}
    assert wrong_events({"traceEvents": [name, good]}) == []
    for bad in (
        {**good, "pid": "cpu:0"},
        {**good, "ts": -1},
        {**good, "dur": None},
        {**good, "ph": "B"},
        {**good, "ts": 3, "dur": 9},
    ):
        assert wrong_events({"traceEvents": [name, good, bad]}), bad
    assert wrong_events({"traceEvents": [good]}) == ["process 1 has no name"]
    assert wrong_events([good])


def test_nothing_is_watched_outside_of_a_block(device: hal.Device) -> None:
    work = Work(device)
    profile = hal.profile()
    work.add()
    assert watch.active == ()
    with profile:
        assert watch.active != ()
        work.add()
    work.add()
    work.stream.synchronize()
    assert watch.active == ()
    assert line(profile, "kernel", "add").calls == 1


def test_profiles_nest_and_each_has_its_own_work(device: hal.Device) -> None:
    work = Work(device)
    with hal.profile() as outer:
        work.add()
        with hal.profile() as inner:
            work.add(2)
        work.add()
    assert line(inner, "kernel", "add").calls == 2
    assert line(outer, "kernel", "add").calls == line(outer, "kernel", "add").timed == 4


def test_threads_have_rows_of_their_own_and_lose_nothing(device: hal.Device) -> None:
    works = [Work(device) for _ in range(4)]
    with hal.profile() as profile:
        threads = [
            threading.Thread(target=work.add, args=(50,), name=f"worker {i}")
            for i, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    add = line(profile, "kernel", "add")
    assert (add.calls, add.timed) == (200, 200)
    trace = profile.chrome_trace()
    assert wrong_events(trace) == []
    rows = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {"worker 0", "worker 3", "stream 4"} <= rows


def test_profiles_of_two_threads_run_side_by_side(device: hal.Device) -> None:
    work = Work(device)
    inside, leave = threading.Event(), threading.Event()
    found: list[hal.profile] = []

    def other() -> None:
        with hal.profile() as mine:
            inside.set()
            leave.wait(30)
        found.append(mine)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    with hal.profile() as profile:
        work.add(3)
    leave.set()
    thread.join()
    assert line(profile, "kernel", "add").calls == 3
    assert line(found[0], "kernel", "add").calls == 3


def test_an_exception_ends_the_profile_and_keeps_what_ran(device: hal.Device) -> None:
    work = Work(device)
    profile = hal.profile()

    def fails() -> None:
        with profile, hal.profile.range("doomed"):
            work.add(2)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fails()
    assert line(profile, "kernel", "add").timed == 2
    assert line(profile, "range", "doomed").failed == 1


def test_a_call_that_fails_is_on_the_host_row_alone(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = simulated(monkeypatch, "count=1 fault=launch:2:error")
    work = Work(chip)
    with hal.profile() as profile:
        work.add()
        with pytest.raises(HalError):
            work.add()
        work.add()
    add = line(profile, "kernel", "add")
    assert (add.calls, add.timed, add.failed) == (3, 2, 1)
    assert "(1 failed)" in profile.table()


def test_streams_and_buffers_may_close_before_their_times_are_read(device: hal.Device) -> None:
    work = Work(device)
    with hal.profile() as profile:
        stream = device.stream()
        buffer = device.alloc(4 * N, stream=stream)
        work.twice_kernel(stream, N // 256, 256, buffer, N)
        buffer.close()
        stream.close()
    assert line(profile, "kernel", "twice").timed == 1


def test_a_device_may_close_inside_the_block(device: hal.Device) -> None:
    work = Work(device)
    with hal.profile() as profile:
        work.add(3)
        hal.close_all()
        work = Work(device)
        work.add()
    add = line(profile, "kernel", "add")
    assert (add.calls, add.timed) == (4, 4)


def test_a_launch_of_a_graph_is_one_span_and_its_capture_is_none(device: hal.Device) -> None:
    work = Work(device)
    with hal.profile() as profile:
        with work.stream.capture() as graph:
            work.add(3)
            work.x.fill(b"\1", stream=work.stream)
        graph.launch(work.stream)
        graph.launch(work.stream)
    assert profile.kernels == ()
    assert profile.lines("fill") == ()
    (found,) = profile.lines("graph")
    assert (found.calls, found.timed, found.name) == (2, 2, "graph of 3 kernels")


def test_a_native_graph_is_captured_unharmed(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(simulated(monkeypatch))
    with hal.profile() as profile:
        with work.stream.capture() as graph:
            work.add(2)
        assert graph.native
        graph.launch(work.stream)
    assert profile.kernels == ()
    assert profile.lines("graph")[0].timed == 1


def test_a_driver_without_timing_is_waited_for_and_the_report_says_so(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(simulated(monkeypatch, "count=1 groups=compute+pinned latency_us=2000"))
    with hal.profile() as profile:
        work.add(3)
    add = line(profile, "kernel", "add")
    assert (add.timed, add.clock) == (3, "host")
    assert add.least_s >= 2e-3  # the work itself, not the call
    assert profile.as_json()["devices"]["simulated:0"]["clock"] == "host"
    assert "each call was waited for" in profile.table()


def test_a_copy_between_devices_shows_its_parts_and_its_whole(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = simulated(monkeypatch)
    nbytes = 3 << 20
    here, there = device.stream(), chip.stream()
    a, b = device.alloc(nbytes, stream=here), chip.alloc(nbytes, stream=there)
    a.fill(b"\7", stream=here)
    with hal.profile() as profile:
        b.copy_from(a, stream=there)
        there.synchronize()
    out, into = (line(profile, "copy", n) for n in ("device to host", "host to device"))
    assert (out.device, out.nbytes) == ("cpu:0", nbytes)
    assert (into.device, into.nbytes) == ("simulated:0", nbytes)
    assert out.calls == into.calls > 1
    (whole,) = profile.lines("link")
    assert whole.name == "cpu:0 to simulated:0, staged"
    assert (whole.calls, whole.nbytes) == (1, nbytes)
    assert whole.seconds > 0


def test_the_timeline_is_bounded_and_the_sums_are_not(device: hal.Device) -> None:
    work = Work(device)
    with hal.profile(limit=10) as profile:
        work.add(1000)
    assert (len(profile.spans), profile.dropped) == (10, 990)
    assert line(profile, "kernel", "add").timed == 1000
    assert profile.as_json()["dropped"] == 990
    with hal.profile() as profile:
        for i in range(5000):
            with hal.profile.range(f"range {i}"):
                pass
    assert len(profile.lines("range")) < 4200
    assert sum(each.calls for each in profile.lines("range")) == 5000


def test_a_long_profile_gives_its_events_back(device: hal.Device) -> None:
    work = Work(device)
    opened = work.stream._opened
    made: list[int] = []
    create = opened.backend.event_create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            opened.backend, "event_create", lambda timing: made.append(1) or create(timing)
        )
        with hal.profile():
            for _ in range(30):
                work.add(100)
                work.stream.synchronize()
    assert len(made) < 1000  # of 6000 that were recorded


def test_bad_use_is_refused(device: hal.Device) -> None:
    with pytest.raises(BadInput, match="0 or more"):
        hal.profile(limit=-1)
    profile = hal.profile()
    with profile, pytest.raises(BadInput, match="after its"):
        profile.table()
    with pytest.raises(BadInput, match="has run already"):
        profile.__enter__()


def test_importing_the_module_does_not_take_the_name_away() -> None:
    code = "import drivetrain.hal.profile; from drivetrain import hal; hal.profile()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- the vendors' tools ---------------------------------------------------------------------------

TOOLS = """
#include <stdio.h>
int nvtxRangePushA(const char *name) { printf("push %s\\n", name); fflush(stdout); return 0; }
int nvtxRangePop(void) { printf("pop\\n"); fflush(stdout); return 0; }
"""
USE = """
from drivetrain import hal
device = hal.device("cpu:0")
stream = device.stream()
x = device.alloc(1024, stream=stream)
kernel = device.compile(hal.Source.cuda('''
extern "C" __global__ void twice(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= 2;
}''')).kernel("twice")
with hal.profile(), hal.profile.range("mine"):
    kernel(stream, 1, 256, x, 256)
    x.copy_from(bytes(16), stream=stream)
    stream.synchronize()
with hal.profile(nvtx=False):
    kernel(stream, 1, 256, x, 256)
"""
SAID = ["push mine", "push twice", "pop", "push copy host to device", "pop"]


def used(tmp_path: Path, **environment: str) -> list[str]:
    environment = {**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home"), **environment}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=100, check=True
    )
    return done.stdout.splitlines()


def build(folder: Path, name: str, prefix: str, said: str = "") -> None:
    """A stand-in for a vendor's library that says what it is called with."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    text = TOOLS.replace("nvtx", prefix).replace('"p', f'"{said}p')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tools.c").write_text(text)
    command = [compiler, "-shared", "-fPIC", str(folder / "tools.c"), "-o", str(folder / name)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("name", "prefix"), [("libnvToolsExt.so.1", "nvtx"), ("libroctx64.so.4", "roctx")]
)
def test_ranges_reach_the_tools_library(tmp_path: Path, name: str, prefix: str) -> None:
    build(tmp_path, name, prefix)
    said = used(tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert said[: len(SAID)] == SAID
    assert said.count("pop") == len([each for each in said if each.startswith("push")])
    assert said.count("push twice") == 1


def test_with_both_vendors_libraries_both_are_told(tmp_path: Path) -> None:
    build(tmp_path, "libnvToolsExt.so.1", "nvtx")
    build(tmp_path / "rocm/lib", "librocprofiler-sdk-roctx.so.1", "roctx", "roc ")
    build(tmp_path / "rocm/lib", "libroctx64.so.4", "roctx", "older ")
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "ROCM_PATH": str(tmp_path / "rocm")}
    said = used(tmp_path, **paths)
    assert said[::2][: len(SAID)] == SAID
    assert said[1::2][: len(SAID)] == [f"roc {line}" for line in SAID]


def test_ranges_reach_the_tools_package(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "nvtx.py").write_text(
        dedent(
            """
            def push_range(message):
                print("push", message, flush=True)

            def pop_range():
                print("pop", flush=True)
            """
        )
    )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    assert used(tmp_path, PYTHONPATH=path)[: len(SAID)] == SAID


def test_a_librarys_product_is_a_kernel_with_its_operations(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivetrain.hal import ops, product
    from drivetrain.hal.blas import Choice

    class Library:
        name, dtypes = "A library 1.0 (somewhere)", frozenset({"float32"})

        def multiply(self, product: Any, out: Any, a: Any, b: Any, on: hal.Stream) -> None:
            out.fill(b"\0\0\0\0", stream=on)

    chip = simulated(monkeypatch)
    a = ops.ones((8, 16), dtype=ops.float32, device=chip)
    b = ops.ones((16, 4), dtype=ops.float32, device=chip)
    monkeypatch.setattr(product.blas, "backend", lambda opened: Choice(Library()))  # type: ignore[attr-defined]
    on_gpu = type("Target", (), {"kind": "cuda"})()
    opened = a.live_stream._opened
    monkeypatch.setattr(opened.backend, "target", on_gpu)
    with hal.profile(peaks={"simulated:0": hal.Peaks(flops={"float32": 1e12})}) as profile:
        ops.matmul(a, b)
    found = line(profile, "kernel", "matrix product by A library 1.0")
    assert (found.flops, found.nbytes) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))
    assert profile.as_json()["kernels"][0]["bound"] == "compute"


def test_a_product_of_our_own_tells_its_operations(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivetrain.hal import ops

    monkeypatch.setenv("DRIVETRAIN_BLAS", "own")
    a = ops.ones((3, 8, 16), dtype=ops.float32, device=device)
    b = ops.ones((3, 16, 4), dtype=ops.float32, device=device)
    with hal.profile() as profile:
        ops.matmul(a, b)
    found = line(profile, "kernel", "gemm")
    assert (found.flops, found.dtype) == (3 * 2 * 8 * 16 * 4, "float32")
    assert (found.nbytes, found.bytes_are) == (3 * 4 * (8 * 16 + 16 * 4 + 8 * 4), "declared")


@pytest.mark.parametrize("driver", ["cuda", "simulated"])
def test_other_drivers_are_timed_by_their_events(driver: str, rig_of: Any) -> None:
    rig = rig_of(driver)
    stream = rig.device.stream()
    value = rig.alloc(4096, stream)
    with hal.profile() as profile:
        value.fill(b"\0", stream=stream)
        rig.kernel("add")(stream, 1, 1, value, 3)
        value.copy_to(bytearray(4096), stream=stream)
        with stream.capture() as graph:
            rig.kernel("add")(stream, 1, 1, value, 3)
        graph.launch(stream)
        stream.synchronize()
    assert line(profile, "kernel", "add").timed == 1
    assert line(profile, "copy", "device to host").nbytes == 4096
    assert [each.timed for each in profile.lines("graph")] == [1]
    assert profile.as_json()["devices"][rig.device.address]["clock"] == "device"
    assert wrong_events(profile.chrome_trace()) == []


def test_more_work_than_can_be_timed_is_counted_without_times(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivetrain.hal import timeline

    monkeypatch.setattr(timeline, "_MOST_PENDING", 50)
    work = Work(simulated(monkeypatch, "count=1 latency_us=1000"))
    with hal.profile() as profile:
        work.add(200)
    add = line(profile, "kernel", "add")
    assert add.calls == 200
    assert 50 <= add.timed < 200
    assert "calls without times" in profile.table()
    assert f"{add.timed} of 200" in profile.table()
