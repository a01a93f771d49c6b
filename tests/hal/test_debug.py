"""DRIVETRAIN_DEBUG=1: what failed is named where it was queued, on every driver."""

from __future__ import annotations

import inspect
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, DeviceLost, HalError, OutOfMemory, Timeout
from drivetrain.hal.language import compile as compile_source
from drivetrain.hal.opened import opened

SOURCE = """
extern "C" __global__ void scale(float* x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= a;
}
"""
SECRET = b"\x5a\xa5SECRET-CONTENT\xa5\x5a"
Open = Callable[..., hal.Device]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    hal.close_all()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Open:
    def device(words: str = "count=1", debug: str = "1") -> hal.Device:
        monkeypatch.setenv("DRIVETRAIN_DEBUG", debug)
        monkeypatch.setenv("DRIVETRAIN_SIMULATED", words)
        return hal.devices("simulated")[0]

    return device


def scale(device: hal.Device) -> hal.Kernel:
    made = compile_source(hal.Source.cuda(SOURCE), opened(device).backend.target)
    binary = hal.Source.binary(made.code, made.form, {"scale": [hal.PTR, hal.F32, hal.I32]})
    return device.compile(binary).kernel("scale")


def here() -> int:
    """The caller's line."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def files() -> list[Path]:
    return sorted((Path(os.environ["DRIVETRAIN_HOME"]) / "debug").glob("*"))


def test_queued_work_that_fails_is_named_where_it_was_queued(simulated: Open) -> None:
    device = simulated("count=1 fault=work:2:error")
    stream, kernel = device.stream(), scale(device)
    x = device.alloc(1024, stream=stream)
    x.fill(b"\0\0\0\0", stream=stream)
    line = here() + 2
    with pytest.raises(HalError) as caught:
        kernel(stream, 2, (64, 2), x, 1.5, 256)
    said = str(caught.value)
    assert "launch(scale, grid=(2, 1, 1), block=(64, 2, 1), shared=0" in said
    assert f"{x.ptr:#x}, 1.5, 256)" in said
    assert f"{__file__}:{line} in {inspect.currentframe().f_code.co_name}" in said  # type: ignore[union-attr]
    assert caught.value.code == "injected"


def test_without_it_the_failure_comes_later_and_says_less(simulated: Open) -> None:
    device = simulated("count=1 fault=work:1:error", debug="0")
    stream = device.stream()
    x = device.alloc(1024, stream=stream)
    x.fill(b"\0\0\0\0", stream=stream)
    with pytest.raises(HalError) as caught:
        stream.synchronize()
    assert "called at" not in str(caught.value)
    assert files() == []


def test_each_call_is_done_when_it_returns(simulated: Open) -> None:
    device = simulated("count=1 latency_us=20000")
    stream = device.stream()
    x = device.alloc(1024, stream=stream)
    x.fill(b"\1", stream=stream)
    assert stream.done
    assert stream.record().done


def test_the_last_calls_are_told_without_anybodys_data(
    simulated: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    device = simulated("count=1 fault=fill:3:error")
    stream = device.stream()
    x = device.alloc(1024, stream=stream)
    x.copy_from(SECRET * 4, stream=stream)
    x.fill(SECRET[:16], stream=stream)
    x.fill(b"\1", stream=stream)
    with pytest.raises(HalError) as caught:
        x.fill(SECRET[:2], stream=stream)
    (file,) = files()
    assert str(file) in str(caught.value)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    told = file.read_text()
    assert told in capfd.readouterr().err
    assert "copy(" in told
    assert "<host to device>" in told
    assert "pattern=<16 bytes>" in told
    for secret in ("SECRET", SECRET.hex(), "5a a5", "\\x5a"):
        assert secret not in told + str(caught.value)
    calls = re.findall(r"^\d+ .*$", told, re.MULTILINE)
    assert re.search(r" fill\(.*pattern=<2 bytes>", calls[-1])
    assert told.count(f"{__file__}:") == len(calls)


def test_the_ring_keeps_the_last_calls_and_polling_takes_one_place(simulated: Open) -> None:
    device = simulated()
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    for _ in range(300):
        x.fill(b"\1", stream=stream)
        x.fill(b"\2\2", stream=stream)
    ring = opened(device).backend.last_calls  # type: ignore[attr-defined]
    assert len(ring) == 64
    for _ in range(500):
        stream.done
    last = opened(device).backend.last_calls  # type: ignore[attr-defined]
    assert last[-1].times == 500
    assert last[0].text == ring[1].text


def test_out_of_memory_and_missing_kernels_are_answers_not_failures(
    simulated: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    device = simulated("count=1 memory=1M")
    stream = device.stream()
    with pytest.raises(OutOfMemory):
        device.alloc(1 << 30, stream=stream)
    with pytest.raises(BadInput, match="no kernel"):
        scale(device)._module.kernel("scale_not")
    assert files() == []
    assert capfd.readouterr().err == ""


def test_a_program_that_goes_on_after_failures_does_not_fill_the_disk(simulated: Open) -> None:
    device = simulated(f"count=1 {' '.join(f'fault=fill:{n}:error' for n in range(1, 31))}")
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    for _ in range(30):
        with pytest.raises(HalError, match="called at"):
            x.fill(b"\1", stream=stream)
    assert len(files()) == 8
    folder = files()[0].parent
    for number in range(40):
        (folder / f"calls-1-{number}.txt").write_text("old")
    hal.close_all()
    device = simulated("count=1 fault=fill:1:error")
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    with pytest.raises(HalError):
        x.fill(b"\1", stream=stream)
    assert len(files()) == 20


def test_a_lost_device_says_so_once(simulated: Open) -> None:
    device = simulated("count=1 fault=fill:1:lost")
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    with pytest.raises(DeviceLost) as first:
        x.fill(b"\1", stream=stream)
    assert str(first.value).count("called at") == 1
    with pytest.raises(DeviceLost) as second:
        stream.synchronize()
    assert str(second.value).count("called at") == 1


def test_work_that_hangs_is_a_timeout_that_names_the_call(
    simulated: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.3")
    device = simulated("count=1 fault=work:1:delay:2")
    stream = device.stream()
    x = device.alloc(64, stream=stream)
    with pytest.raises(Timeout, match=r"fill\(.*(.|\n)*called at"):
        x.fill(b"\1", stream=stream)


def test_everything_else_works_as_without_it(simulated: Open) -> None:
    chip = simulated("count=2")
    other = hal.devices("simulated")[1]
    cpu = hal.device("cpu:0")
    for device in (chip, cpu):
        stream, kernel = device.stream(), scale(device)
        x = device.alloc(1024, stream=stream)
        x.fill(b"\0\0\x80\x3f", stream=stream)  # 1.0
        plan = kernel.plan(stream, 1, 256, x, 2.0, 256)
        plan()
        with stream.capture() as graph:
            plan()
        graph.launch(stream)
        back = bytearray(1024)
        x.copy_to(back, stream=stream)
        assert back == b"\0\0\x80\x40" * 256  # 4.0; there already
        y = other.alloc(1024, stream=other.stream())
        y.copy_from(x, stream=stream)
        end = stream.record()
        assert end.seconds_since(end) == 0
        y.copy_to(back, stream=y._home)
        assert back[:4] == b"\0\0\x80\x40"
        stream.close()
    assert files() == []


def test_guard_bytes_are_checked_on_the_cpu(simulated: Open) -> None:
    simulated()
    device = hal.device("cpu:0")
    memory = hal.DriverMemory(opened(device))
    stream = device.stream()
    x = device.alloc(100, stream=stream, pool=memory)
    outside = device.wrap(x.ptr, 101, owner=x)
    outside.fill(b"\7", stream=stream)
    with pytest.raises(HalError) as caught:
        x.close()
    assert caught.value.code == "guard"
    assert "free(" in str(caught.value)


def test_threads_may_fail_at_once(simulated: Open) -> None:
    device = simulated(f"count=1 {' '.join(f'fault=fill:{n}:error' for n in range(1, 9))}")
    said: list[str] = []

    def run() -> None:
        stream = device.stream()
        x = device.alloc(64, stream=stream)
        for _ in range(4):
            try:
                x.fill(b"\1", stream=stream)
            except HalError as error:
                said.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 8
    assert all("in run" in each for each in said)
