"""Recordings: the same calls again, here or elsewhere, give the same contents."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, HalError, IntegrityError
from drivetrain.hal import watch
from drivetrain.hal.record_file import Reader

SOURCE = """
extern "C" __global__ void mad(float* x, const float* y, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = a * x[i] + y[i];
}
"""
N = 512
ONES, TWOS = b"\0\0\x80\x3f" * N, b"\0\0\0\x40" * N


@cache
def source() -> hal.Source:
    """Compiled once: each test has a state folder, and so a cache, of its own."""
    from drivetrain.hal.language import compile
    from drivetrain.hal.opened import opened

    made = compile(hal.Source.cuda(SOURCE), opened(hal.device("cpu:0")).backend.target)
    kernels = {"mad": [hal.PTR, hal.PTR, hal.F32, hal.I32]}
    return hal.Source.binary(made.code, made.form, kernels)


@pytest.fixture
def device() -> Iterator[hal.Device]:
    yield hal.device("cpu:0")
    assert watch.active == ()
    hal.close_all()


def work(device: hal.Device, a: float = 3.0) -> bytes:
    """Something of everything; what was read back."""
    stream, other = device.stream(), device.stream()
    kernel = device.compile(source()).kernel("mad")
    x, y = (device.alloc(4 * N, stream=stream) for _ in range(2))
    x.copy_from(ONES, stream=stream)
    y.fill(b"\0\0\0\x40", stream=stream)
    kernel(stream, 2, 256, x, y, a, N)
    event = stream.record()
    other.wait(event)
    z = device.alloc(4 * N, stream=other)
    z.copy_from(x, stream=other)
    z.view(64, 64).fill(b"\7", stream=other)
    plan = kernel.plan(other, 2, 256, z.view(0, 1024), y, 0.5, 256)
    with other.capture() as graph:
        plan()
        plan()
    graph.launch(other)
    graph.set(0, 2, 0.25)
    graph.launch(other)
    back = bytearray(4 * N)
    z.copy_to(back, stream=other)
    other.synchronize()
    x.close()
    stream.close()
    return bytes(back)


def test_a_recording_replays_with_the_same_contents(device: hal.Device, tmp_path: Path) -> None:
    plain = work(device)
    with hal.record(tmp_path / "calls") as recording:
        assert work(device) == plain  # recording changes nothing
    assert (recording.complete, recording.reason) == (True, "")
    found = hal.replay(tmp_path / "calls")
    assert (found.same, found.differences, found.complete) == (True, (), True)
    assert found.checks >= 2  # what was read, and z (y closed with the function)
    assert stat.S_IMODE((tmp_path / "calls").stat().st_mode) == 0o600
    assert list(tmp_path.glob(".calls*")) == []


def test_it_replays_on_another_device(
    device: hal.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    with hal.record(tmp_path / "calls"):
        work(device)
    for on in ("simulated:0", {"cpu:0": "simulated:0"}):
        found = hal.replay(tmp_path / "calls", on=on)
        assert found.same
        assert found.checks


def test_it_replays_with_another_driver_from_the_source(device: hal.Device, tmp_path: Path) -> None:
    other = next(iter(hal.devices("opencl", all_routes=True)), None)
    if other is None:
        pytest.skip("no OpenCL device")
    stream = device.stream()
    x = device.alloc(4 * N, stream=stream)
    with hal.record(tmp_path / "calls"):
        x.copy_from(ONES, stream=stream)
        kernel = device.compile(hal.Source.cuda(SOURCE)).kernel("mad")
        kernel(stream, 2, 256, x, x, 2.0, N)
        stream.synchronize()
    found = hal.replay(tmp_path / "calls", on=other.address)
    assert found.same
    assert found.checks == 1


def test_a_device_that_does_it_wrongly_is_found_out(
    device: hal.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1 mutant=" + mutant())
    with hal.record(tmp_path / "calls"):
        work(device)
    found = hal.replay(tmp_path / "calls", on="simulated:0")
    assert not found.same
    assert any("read" in each.what or "buffer" in each.what for each in found.differences)


def mutant() -> str:
    """A named defect of copies."""
    from drivetrain.hal.drivers import simulated_mutants

    names = [name for name in simulated_mutants.MUTANTS if "copy" in name and "short" in name]
    return names[0]


def test_what_was_there_before_is_taken_along(device: hal.Device, tmp_path: Path) -> None:
    stream = device.stream()
    kernel = device.compile(source()).kernel("mad")
    x, y = (device.alloc(4 * N, stream=stream) for _ in range(2))
    x.copy_from(ONES, stream=stream)
    y.copy_from(TWOS, stream=stream)
    outside = bytearray(TWOS)
    wrapped = device.wrap(_address(outside), 4 * N, owner=outside)
    with hal.record(tmp_path / "calls"):
        kernel(stream, 2, 256, x, y, 2.0, N)
        kernel(stream, 2, 256, wrapped, x, 1.0, N)
        stream.synchronize()
    found = hal.replay(tmp_path / "calls")
    assert found.same
    assert found.checks == 3


def _address(data: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def test_copies_between_devices_are_one_call(
    device: hal.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    chip = hal.devices("simulated")[0]
    here, there = device.stream(), chip.stream()
    a, b = device.alloc(3 << 20, stream=here), chip.alloc(3 << 20, stream=there)
    a.fill(b"\5", stream=here)
    with hal.record(tmp_path / "calls"):
        b.copy_from(a, stream=there)
        there.synchronize()
    with Reader(tmp_path / "calls") as file:
        ops = [entry["op"] for entry in file.entries]
    assert ops.count("copy") == 1
    assert not {"read", "write"} & set(ops)
    assert hal.replay(tmp_path / "calls").same
    assert hal.replay(tmp_path / "calls", on="cpu:0").same


def test_it_stops_at_its_limit_and_the_program_goes_on(device: hal.Device, tmp_path: Path) -> None:
    stream = device.stream()
    x = device.alloc(1 << 16, stream=stream)
    recording = hal.record(tmp_path / "calls", limit=100_000)

    def much() -> None:
        with recording:
            for number in range(10):
                x.copy_from(os.urandom(1 << 15), stream=stream)
                x.fill(bytes([number]), stream=stream)

    with pytest.warns(RuntimeWarning, match="more than 100000 bytes"):
        much()
    assert not recording.complete
    assert (tmp_path / "calls").stat().st_size < 120_000
    found = hal.replay(tmp_path / "calls")
    assert not found.complete
    assert "more than 100000 bytes" in found.reason


def test_what_cannot_be_recorded_is_named(device: hal.Device, tmp_path: Path) -> None:
    stream = device.stream()
    kernel = device.compile(source()).kernel("mad")
    x = device.alloc(4 * N, stream=stream)
    plan = kernel.plan(stream, 2, 256, x, x, 2.0, N)
    with stream.capture() as graph:
        plan()
    with (
        pytest.warns(RuntimeWarning, match="captured before"),
        hal.record(tmp_path / "calls") as recording,
    ):
        graph.launch(stream)
    assert "captured before" in recording.reason


def test_one_recording_at_a_time_into_a_file_that_can_be_written(
    device: hal.Device, tmp_path: Path
) -> None:
    with hal.record(tmp_path / "calls"):
        with pytest.raises(BadInput, match="another recording"):
            hal.record(tmp_path / "other").__enter__()
        with hal.profile():  # which may run beside it
            device.stream().synchronize()
    with pytest.raises(BadInput, match="cannot be written"):
        hal.record(tmp_path / "nowhere" / "calls").__enter__()
    with pytest.raises(BadInput, match="limit"):
        hal.record(tmp_path / "calls", limit=1)


def test_a_program_that_fails_leaves_what_it_did(device: hal.Device, tmp_path: Path) -> None:
    stream = device.stream()
    x = device.alloc(64, stream=stream)

    def fails() -> None:
        with hal.record(tmp_path / "calls"):
            x.fill(b"\1", stream=stream)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fails()
    assert hal.replay(tmp_path / "calls").same


# -- files that are not what was written -----------------------------------------------------------


@pytest.fixture
def small(device: hal.Device, tmp_path: Path) -> Path:
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    with hal.record(tmp_path / "small"):
        x.copy_from(b"abcd" * 16, stream=stream)
        x.fill(b"\1\2", stream=stream)
    return tmp_path / "small"


def test_what_is_no_recording_is_refused(small: Path, tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"hello, world of files"), ("zip", b"PK\3\4")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadInput, match="no recording"):
            hal.replay(path)
    with pytest.raises(BadInput, match="cannot be read"):
        hal.replay(tmp_path / "missing")


def test_every_cut_and_every_changed_byte_is_noticed(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(16, len(whole), 7):
        small.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="damaged"):
            hal.replay(small)
    for at in range(16, len(whole), 11):
        changed = bytearray(whole)
        changed[at] ^= 0x20
        small.write_bytes(changed)
        with pytest.raises((IntegrityError, BadInput), match=r"damaged|not known"):
            hal.replay(small)
    small.write_bytes(whole + b"x" * 40)
    with pytest.raises(IntegrityError, match="damaged"):
        hal.replay(small)
    small.write_bytes(whole)
    assert hal.replay(small).same


def written(path: Path, entries: list[Any], version: int = 1) -> Path:
    """A file whose frames are right, whatever they say."""
    from drivetrain.hal.record_file import Writer

    file = Writer(path, 1 << 20, {"version": version})
    for entry in entries:
        file._frame(b"E", json.dumps(entry).encode())
        file.entries += 1
    file.end(complete=True, reason="")
    return path


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_entries_that_cannot_be_meant_are_errors_not_crashes(
    device: hal.Device, small: Path, data: st.DataObject
) -> None:
    with Reader(small) as file:
        entries = [dict(entry) for entry in file.entries]
    entry = data.draw(st.sampled_from(entries))
    key = data.draw(st.sampled_from(sorted(entry)))
    entry[key] = data.draw(
        st.one_of(
            st.none(),
            st.sampled_from([-3, -1, 0, 1, 2, 7, 64, 1 << 20, 1 << 62]),
            st.text(max_size=4),
            st.lists(st.integers()),
        )
    )
    path = written(small.with_name("bad"), entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            hal.replay(path)
        except (BadInput, IntegrityError, HalError):
            pass  # said so, as it should


def test_another_format_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "newer", [], version=2)
    with pytest.raises(BadInput, match="format 2"):
        hal.replay(path)


def test_a_product_by_a_library_of_this_process_is_not_recorded(
    device: hal.Device, tmp_path: Path
) -> None:
    from drivetrain.hal import ops

    if ops.matmul_backend(device).startswith("own"):
        pytest.skip("the processor's products are our own here")
    a = ops.ones((64, 64), dtype=ops.float32, device=device)
    recording = hal.record(tmp_path / "calls")

    def product() -> None:
        with recording:
            ops.matmul(a, a)

    with pytest.warns(RuntimeWarning, match="without its source"):
        product()


def test_a_recording_of_another_driver_replays_on_the_processor(
    rig_of: Any, tmp_path: Path
) -> None:
    rig = rig_of("cuda")
    stream = rig.device.stream()
    value = rig.alloc(4096, stream)
    with hal.record(tmp_path / "calls") as recording:
        value.fill(b"\3", stream=stream)
        value.copy_to(bytearray(4096), stream=stream)
        stream.synchronize()
    assert recording.complete
    found = hal.replay(tmp_path / "calls", on="cpu:0")
    assert (found.same, found.checks) == (True, 2)


def test_a_capture_that_failed_fails_again(device: hal.Device, tmp_path: Path) -> None:
    stream = device.stream()
    x = device.alloc(64, stream=stream)

    def fails() -> None:
        with stream.capture():
            x.fill(b"\1", stream=stream)
            raise KeyError("mine")

    with hal.record(tmp_path / "calls"):
        with pytest.raises(KeyError):
            fails()
        x.fill(b"\2", stream=stream)
    found = hal.replay(tmp_path / "calls")
    assert (found.same, found.checks) == (True, 1)


def test_threads_may_work_while_a_recording_begins_and_ends(
    device: hal.Device, tmp_path: Path
) -> None:
    kernel = device.compile(source()).kernel("mad")
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        stream = device.stream()
        try:
            while not stop.is_set():
                x = device.alloc(4 * N, stream=stream)
                x.copy_from(ONES, stream=stream)
                kernel(stream, 2, 256, x, x, 2.0, N)
                back = bytearray(4 * N)
                x.copy_to(back, stream=stream)
                stream.synchronize()
                assert back == b"\0\0\x40\x40" * N  # 3.0
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(5):
        with hal.record(tmp_path / f"calls {number}"):
            time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(5):
        found = hal.replay(tmp_path / f"calls {number}")
        assert (found.same, found.complete) == (True, True)


def test_a_place_that_is_no_address_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(BadInput, match="give an address"):
        hal.replay(tmp_path / "none", on=wrong)
