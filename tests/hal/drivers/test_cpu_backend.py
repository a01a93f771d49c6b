"""The cpu device, its C engine and the twin in Python alike: order, memory, faults, ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import BadInput, CompileError, HalError, OutOfMemory, Timeout, Unsupported
from drivetrain.hal import registry
from drivetrain.hal.driver import LaunchAbi
from drivetrain.hal.drivers import cpu, cpu_backend
from drivetrain.hal.drivers.cpu_backend import Cpu
from drivetrain.hal.kinds import Kind, Way

Make = Callable[..., Cpu]


@pytest.fixture(params=["native", "twin"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[Cpu] = []
    if request.param == "native":
        pytest.importorskip("drivetrain.hal._cpu")
    if request.param == "native" and os.environ.get("DRIVETRAIN_NATIVE") == "0":
        pytest.skip("the C code is not used")
    monkeypatch.setenv("DRIVETRAIN_NATIVE", "1" if request.param == "native" else "0")

    def new(index: int = 0, **options: Any) -> Cpu:
        backend = Cpu(cpu.discover()[index], **options)
        assert backend.native == (request.param == "native")
        made.append(backend)
        return backend

    yield new
    for backend in made:
        try:
            backend.close()
        except HalError:
            pass  # it was closed, or is held up on purpose


def read(backend: Cpu, ptr: int, stream: int, nbytes: int) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, 10)
    return back.raw


class Kernels:
    def __init__(self, backend: Cpu, code: bytes) -> None:
        self.backend = backend
        self.module = backend.module_load(code, "so")
        self.known: dict[str, int] = {}

    def __call__(
        self, name: str, stream: int, *values: int, grid: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        function = self.known.get(name)
        if function is None:
            function = self.known[name] = self.backend.function(self.module, name)
            self.backend.function_arguments(function, [8] * len(values))
        boxes = [ctypes.c_uint64(value) for value in values]
        table = (ctypes.c_void_p * max(len(boxes), 1))(*map(ctypes.addressof, boxes))
        self.backend.launch(
            function, grid, (1, 1, 1), 0, stream, ctypes.addressof(table), [8] * len(values)
        )


@pytest.fixture
def kernels(make: Make, kernels_so: bytes) -> Kernels:
    return Kernels(make(), kernels_so)


# -- memory ----------------------------------------------------------------------------------------


def test_memory_is_aligned_and_freed_in_its_streams_order(kernels: Kernels) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    for nbytes in (0, 1, 63, 4096, 300_000):
        for kind in Kind:
            ptr = backend.alloc(nbytes, kind, stream)
            assert ptr % backend.alignment == 0
            backend.free(ptr, kind, stream)
    ptr = backend.alloc(1 << 20, Kind.DEVICE, stream)
    kernels("spin", stream, 30_000_000)
    backend.fill(ptr, b"\x01", 1 << 20, stream)
    backend.free(ptr, Kind.DEVICE, stream)  # after the fill
    with pytest.raises(HalError, match="freed before"):
        backend.free(ptr, Kind.DEVICE, stream)
    assert backend.stream_synchronize(stream, 10)
    with pytest.raises(HalError, match="no allocation"):
        backend.free(12345, Kind.DEVICE, stream)


def test_what_does_not_fit_the_machine_is_refused_with_its_numbers(
    make: Make, tmp_path: Path
) -> None:
    """A control group of 200 MB, of which 120 are used."""
    group = tmp_path / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/self/mountinfo").write_text(
        "30 20 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
    )
    (group / "memory.max").write_text("200000000\n")
    (group / "memory.current").write_text("120000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 0\n")
    backend = make(root=tmp_path)
    stream = backend.stream_create(0)
    free, total = backend.memory()
    assert total == 200_000_000
    assert 0 < free <= 80_000_000
    with pytest.raises(OutOfMemory) as caught:
        backend.alloc(free + 1, Kind.DEVICE, stream)
    error = caught.value
    assert (error.requested, error.total) == (free + 1, total)
    assert error.free <= free
    held = backend.alloc(free * 3 // 4, Kind.DEVICE, stream)
    with pytest.raises(OutOfMemory):  # promised and not yet written counts
        backend.alloc(free // 2, Kind.DEVICE, stream)
    backend.free(held, Kind.DEVICE, stream)
    again = backend.alloc(free // 2, Kind.DEVICE, stream)  # waits for the free
    backend.free(again, Kind.DEVICE, stream)
    for wrong in (-1, 1 << 70):
        with pytest.raises(BadInput):
            backend.alloc(wrong, Kind.DEVICE, stream)


def test_guard_bytes_tell_who_wrote_outside(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_DEBUG", "1")
    backend = make()
    stream = backend.stream_create(0)
    for nbytes, at in ((100, 100), (100, 163), (100, -1), (500_000, 500_000), (64, -64)):
        ptr = backend.alloc(nbytes, Kind.DEVICE, stream)
        assert ptr % backend.alignment == 0
        backend.fill(ptr, b"\x07", nbytes, stream)
        assert backend.stream_synchronize(stream, 10)
        ctypes.memset(ptr + at, 0x55, 1)
        with pytest.raises(HalError, match=rf"first at byte {at} ") as caught:
            backend.free(ptr, Kind.DEVICE, stream)
        assert caught.value.code == "guard"
    ptr = backend.alloc(100, Kind.DEVICE, stream)
    backend.free(ptr, Kind.DEVICE, stream)


# -- copies and fills ------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 4096, 256 << 10, (256 << 10) + 1, 5 << 20])
def test_a_source_is_free_when_the_call_returns(kernels: Kernels, nbytes: int) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    target = backend.alloc(nbytes, Kind.DEVICE, stream)
    source = ctypes.create_string_buffer(b"\x21" * nbytes, nbytes)
    kernels("spin", stream, 20_000_000)
    backend.copy(target, ctypes.addressof(source), nbytes, Way.HOST_TO_DEVICE, stream, True)
    ctypes.memset(source, 0x77, nbytes)
    assert read(backend, target, stream, nbytes) == b"\x21" * nbytes


def test_a_source_that_is_not_free_in_time_is_a_timeout(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.02")
    backend = kernels.backend
    stream = backend.stream_create(0)
    nbytes = 1 << 20
    target = backend.alloc(nbytes, Kind.DEVICE, stream)
    source = ctypes.create_string_buffer(nbytes)
    kernels("spin", stream, 200_000_000)
    with pytest.raises(Timeout, match="must stay"):
        backend.copy(target, ctypes.addressof(source), nbytes, Way.HOST_TO_DEVICE, stream, True)
    assert backend.stream_synchronize(stream, 10)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [0, 1, 7, 70_001])
def test_fills_are_exact(make: Make, width: int, count: int) -> None:
    backend = make()
    stream = backend.stream_create(0)
    nbytes = width * count
    ptr = backend.alloc(nbytes + 32, Kind.DEVICE, stream)
    backend.fill(ptr, b"\xee", nbytes + 32, stream)
    pattern = bytes(range(1, width + 1))
    backend.fill(ptr + 16, pattern, count, stream)
    assert read(backend, ptr, stream, nbytes + 32) == b"\xee" * 16 + pattern * count + b"\xee" * 16


def test_fills_and_copies_that_cannot_be_meant_are_refused(make: Make) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(64, Kind.DEVICE, stream)
    for wrong in (
        lambda: backend.fill(ptr, b"abc", 1, stream),
        lambda: backend.fill(ptr + 1, b"ab", 1, stream),
        lambda: backend.fill(0, b"a", 1, stream),
        lambda: backend.copy(0, ptr, 4, Way.DEVICE_TO_DEVICE, stream, False),
        lambda: backend.copy(ptr, 0, 4, Way.DEVICE_TO_DEVICE, stream, False),
    ):
        with pytest.raises(HalError) as caught:
            wrong()
        assert caught.value.code == "invalid"


# -- streams and events ----------------------------------------------------------------------------


def test_waits_end_at_their_limit(kernels: Kernels) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    kernels("spin", stream, 300_000_000)
    event = backend.event_create(False)
    backend.event_record(event, stream)
    for limit in (0.0, 0.01, -1.0):
        assert not backend.stream_synchronize(stream, limit)
        assert not backend.event_synchronize(event, limit)
        assert not backend.synchronize(limit)
    assert not backend.stream_done(stream)
    assert backend.event_synchronize(event, 10)
    assert backend.stream_synchronize(stream, 1e12)


def test_an_event_counts_as_done_until_it_is_recorded_and_can_be_recorded_again(
    kernels: Kernels,
) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    event = backend.event_create(True)
    assert backend.event_done(event)
    backend.event_record(event, stream)
    kernels("spin", stream, 100_000_000)
    backend.event_record(event, stream)
    assert not backend.event_done(event)
    other = backend.stream_create(0)
    backend.stream_wait(other, event)
    backend.event_record(event, backend.stream_create(0))  # the wait is for the recording before
    assert not backend.stream_synchronize(other, 0.01)
    assert backend.stream_synchronize(other, 10)


def test_what_was_queued_on_a_stream_that_is_let_go_still_happens(kernels: Kernels) -> None:
    backend = kernels.backend
    stream, other = backend.stream_create(0), backend.stream_create(0)
    ptr = backend.alloc(8, Kind.DEVICE, other)
    backend.fill(ptr, b"\0", 8, stream)
    kernels("spin", stream, 50_000_000)
    backend.fill(ptr, b"\x05", 8, stream)
    event = backend.event_create(False)
    backend.event_record(event, stream)
    backend.stream_destroy(stream)
    backend.stream_wait(other, event)
    backend.event_destroy(event)
    assert read(backend, ptr, other, 8) == b"\x05" * 8


def test_handles_that_were_let_go_are_refused(make: Make) -> None:
    backend = make()
    stream, event = backend.stream_create(0), backend.event_create(False)
    live, ptr = backend.stream_create(0), backend.alloc(64, Kind.DEVICE, stream)
    backend.stream_destroy(stream)
    backend.event_destroy(event)
    for use in (
        lambda: backend.stream_done(stream),
        lambda: backend.stream_synchronize(stream, 1),
        lambda: backend.stream_destroy(stream),
        lambda: backend.fill(ptr, b"\0", 64, stream),
        lambda: backend.free(ptr, Kind.DEVICE, stream),
        lambda: backend.event_record(event, live),
        lambda: backend.event_done(event),
        lambda: backend.event_destroy(event),
        lambda: backend.stream_wait(live, event),
    ):
        with pytest.raises(HalError) as caught:
            use()
        assert caught.value.code == "closed"


def test_time_is_told_only_of_events_that_have_one(kernels: Kernels) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    start, end, plain = (backend.event_create(timing) for timing in (True, True, False))
    backend.event_record(start, stream)
    with pytest.raises(HalError):
        backend.event_seconds(start, end)  # never recorded
    kernels("spin", stream, 20_000_000)
    backend.event_record(end, stream)
    backend.event_record(plain, stream)
    with pytest.raises(HalError):
        backend.event_seconds(start, end)  # not done
    assert backend.stream_synchronize(stream, 10)
    assert 0.019 < backend.event_seconds(start, end) < 10
    with pytest.raises(HalError):
        backend.event_seconds(start, plain)


def test_more_than_a_queue_holds_can_be_queued(make: Make) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(8, Kind.DEVICE, stream)
    for _ in range(35_000):
        backend.fill(ptr, b"\x01", 8, stream)
    assert read(backend, ptr, stream, 8) == b"\x01" * 8


# -- kernels ---------------------------------------------------------------------------------------


def test_kernels_run_on_the_devices_own_cores(
    make: Make, kernels_so: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two devices need two cores")
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "2")
    registry.refresh()
    infos = cpu.discover()
    assert len(infos) == 2
    for index, info in enumerate(infos):
        backend = make(index)
        stream = backend.stream_create(0)
        out = backend.alloc(8 * 64, Kind.DEVICE, stream)
        Kernels(backend, kernels_so)("where", stream, out, grid=(64, 1, 1))
        found = memoryview(read(backend, out, stream, 8 * 64)).cast("Q")
        allowed = sum(1 << core for core in info.isolation.cpus or () if core < 64)
        assert set(found) == {allowed}


def test_a_kernel_that_fails_is_named_once_and_its_stream_goes_on(kernels: Kernels) -> None:
    backend = kernels.backend
    stream, other = backend.stream_create(0), backend.stream_create(0)
    ptr = backend.alloc(8, Kind.DEVICE, stream)
    kernels("fails", stream, grid=(5, 1, 1))
    backend.fill(ptr, b"\x03", 8, stream)
    assert backend.stream_synchronize(other, 10)
    with pytest.raises(HalError, match="fails returned 7") as caught:
        backend.stream_synchronize(stream, 10)
    assert caught.value.code == "kernel_failed"
    assert caught.value.native == 7
    assert read(backend, ptr, stream, 8) == b"\x03" * 8
    kernels("full", stream)
    with pytest.raises(HalError, match="out of memory"):
        backend.synchronize(10)
    kernels("fails", stream)
    backend.stream_destroy(stream)
    with pytest.raises(HalError, match="fails returned 7"):
        backend.synchronize(10)
    assert backend.synchronize(10)


def test_launches_that_cannot_be_meant_are_refused(make: Make, kernels_so: bytes) -> None:
    backend = make()
    stream = backend.stream_create(0)
    module = backend.module_load(kernels_so, "so")
    function = backend.function(module, "add")
    assert backend.function(module, "add") == function
    box = ctypes.c_uint64(0)
    table = (ctypes.c_void_p * 2)(*(ctypes.addressof(box),) * 2)
    at = ctypes.addressof(table)
    with pytest.raises(HalError, match="told first"):
        backend.launch(function, (1, 1, 1), (1, 1, 1), 0, stream, at, [8, 8])
    backend.function_arguments(function, [-8, 4])
    backend.function_arguments(function, [-8, 4])
    for wrong in ([-8], [-8, 8], [0, 4], [-8, 1 << 30]):
        with pytest.raises(HalError):
            backend.function_arguments(function, wrong)
    for grid, block in (((0, 1, 1), (1, 1, 1)), ((1, 70000, 1), (1, 1, 1)), ((1, 1, 1), (0, 1, 1))):
        with pytest.raises(HalError):
            backend.launch(function, grid, block, 0, stream, at, [8, 4])
    with pytest.raises(HalError) as caught:
        backend.function(module, "nothing_like_it")
    assert caught.value.code == "no_such_kernel"
    backend.module_unload(module)
    with pytest.raises(HalError):
        backend.module_unload(module)


def test_code_that_was_unloaded_still_does_what_was_queued(make: Make, kernels_so: bytes) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(8, Kind.DEVICE, stream)
    backend.fill(ptr, b"\0", 8, stream)
    loaded = Kernels(backend, kernels_so)
    loaded("spin", stream, 50_000_000)
    loaded("store", stream, ptr, 77)
    backend.module_unload(loaded.module)
    assert read(backend, ptr, stream, 4) == (77).to_bytes(4, "little")


def test_two_copies_of_one_code_are_two_modules(make: Make, kernels_so: bytes) -> None:
    """With static variables of their own, as each device's code has them."""
    backend = make()
    one, two = backend.module_load(kernels_so, "so"), backend.module_load(kernels_so, "so")
    assert one != two
    assert backend.function(one, "add") != backend.function(two, "add")
    backend.module_unload(one)
    assert backend.function(two, "store")


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: b"",
        lambda code: b"\x7fELF",
        lambda code: code[:100],
        lambda code: code[: len(code) // 2],
        lambda code: code[:18] + b"\xff\xff" + code[20:],
        lambda code: code[:4] + b"\x01" + code[5:],
        lambda code: code[:16] + b"\x02" + code[17:],
        lambda code: b"#!/bin/sh\n" + code,
    ],
)
def test_code_that_is_damaged_is_refused_before_the_loader_sees_it(
    make: Make, kernels_so: bytes, damage: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(CompileError):
        make().module_load(damage(kernels_so), "so")


def test_other_forms_and_groups_are_unsupported(make: Make) -> None:
    backend = make()
    with pytest.raises(Unsupported):
        backend.module_load(b"x", "ptx")
    stream = backend.stream_create(0)
    for call in (
        lambda: backend.graph_begin(stream),
        lambda: backend.graph_end(stream),
        lambda: backend.graph_launch(1, stream),
        lambda: backend.graph_destroy(1),
        lambda: backend.graph_set(1, 0, 1, (1, 1, 1), (1, 1, 1), 0, 0, ()),
    ):
        with pytest.raises(Unsupported):
            call()
    assert "graphs" not in backend.groups
    assert backend.calls().abi is (LaunchAbi.PLAIN if backend.native else LaunchAbi.PYTHON)


# -- ends ------------------------------------------------------------------------------------------


def test_closing_waits_for_what_is_queued_and_refuses_the_rest(kernels: Kernels) -> None:
    backend = kernels.backend
    stream = backend.stream_create(0)
    done = ctypes.create_string_buffer(8)
    kernels("spin", stream, 50_000_000)
    backend.copy(
        ctypes.addressof(done),
        backend.alloc(8, Kind.DEVICE, stream),
        8,
        Way.DEVICE_TO_HOST,
        stream,
        False,
    )
    backend.fill(ctypes.addressof(done), b"\x09", 8, stream)
    backend.close()
    assert done.raw == b"\x09" * 8
    for use in (
        backend.close,
        lambda: backend.stream_create(0),
        lambda: backend.alloc(8, Kind.DEVICE, stream),
        lambda: backend.stream_synchronize(stream, 1),
        lambda: backend.synchronize(1),
    ):
        with pytest.raises(HalError) as caught:
            use()
        assert caught.value.code == "closed"


def test_a_kernel_that_does_not_end_does_not_hold_up_the_end(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_backend, "_CLOSE_WAIT_S", 0.05)
    backend = kernels.backend
    stream = backend.stream_create(0)
    kernels("spin", stream, 1_000_000_000)
    later = ctypes.create_string_buffer(8)
    backend.fill(ctypes.addressof(later), b"\x01", 8, stream)
    began = time.monotonic()
    with pytest.raises(Timeout, match="has not ended"):
        backend.close()
    assert time.monotonic() - began < 0.9
    time.sleep(1.1)
    assert later.raw == bytes(8)  # what had not begun was dropped


def test_devices_are_opened_and_closed_many_times(make: Make) -> None:
    threads = len(os.listdir("/proc/self/task"))
    for _ in range(15):
        backend = make()
        stream = backend.stream_create(0)
        ptr = backend.alloc(64, Kind.DEVICE, stream)
        backend.fill(ptr, b"\0", 64, stream)
        backend.close()
    for _ in range(100):
        if len(os.listdir("/proc/self/task")) <= threads:
            break
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/task")) <= threads


CHILD = """
import os, signal, sys, threading, time
from drivetrain import hal
from drivetrain.errors import HalError
from drivetrain.hal.opened import opened

device = hal.device("cpu:0")
stream = device.stream()
buffer = device.alloc(64, stream=stream)
buffer.fill(b"\\x01", stream=stream)
stream.synchronize()
if sys.argv[1] == "fork":
    pid = os.fork()
    if pid == 0:
        told = []
        for use in (lambda: stream.synchronize(1), lambda: buffer.fill(b"\\0", stream=stream),
                    device.stream, lambda: device.alloc(64, stream=stream)):
            try:
                use()
            except HalError as error:
                told.append(error.code)
        del buffer, stream
        os._exit(0 if told == ["forked"] * 4 else 1)
    status = os.waitpid(pid, 0)[1]
    stream.synchronize()
    print("end", status)
else:
    module = device.compile(hal.Source.binary(open(sys.argv[2], "rb").read(), "so"))
    module.kernel("spin", [hal.U64])(stream, 1, 1, 3_000_000_000)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        stream.synchronize()
    except KeyboardInterrupt:
        print("end", int(time.monotonic() - began > 2.5))
"""


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("what", ["fork", "interrupt"])
def test_forks_are_refused_and_interrupts_are_heard(
    tmp_path: Path, kernels_so: bytes, what: str, native: str
) -> None:
    (tmp_path / "kernels.so").write_bytes(kernels_so)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what, str(tmp_path / "kernels.so")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "DRIVETRAIN_NATIVE": native},
    )
    assert done.stdout.split() == ["end", "0"], done.stderr
    assert done.returncode in (0, -signal.SIGINT)


def test_a_device_of_no_cores_of_its_own_runs_where_it_may(make: Make) -> None:
    info = cpu.discover()[0]
    backend = Cpu(replace(info, isolation=replace(info.isolation, cpus=None)))
    stream = backend.stream_create(0)
    ptr = backend.alloc(8, Kind.DEVICE, stream)
    backend.fill(ptr, b"\x02", 8, stream)
    assert read(backend, ptr, stream, 8) == b"\x02" * 8
    backend.close()
