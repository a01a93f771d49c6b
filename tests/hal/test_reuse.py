"""Nobody sees another's bytes: memory that is given back is used again only when its work is done,
whatever streams used it. Many programs on slow devices, against what must come out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import HalError
from drivetrain.hal import MemoryKind, hot
from drivetrain.hal.opened import opened

SIZES = [512, 4096, 4096, 70_000, 600_000, 3 << 20]
STREAMS = 3


def program(device: hal.Device, pool: Any, seed: int, steps: int) -> list[str]:
    """Buffers are filled on their stream, copied away on another one and closed at once; what was
    copied away must be what was filled in."""
    rng = random.Random(seed)
    streams = [device.stream() for _ in range(STREAMS)]
    kept: list[tuple[hal.Buffer, int, hal.Stream]] = []
    wrong: list[str] = []

    def look() -> None:
        for stream in {*streams, *(reader for _, _, reader in kept)}:
            stream.synchronize()
        for buffer, value, _ in kept:
            if set(buffer.memoryview()) != {value}:
                wrong.append(f"{buffer!r} holds {set(buffer.memoryview())}, not {{{value}}}")
            buffer.close()
        kept.clear()

    for step in range(steps):
        home, reader = rng.choice(streams), rng.choice(streams)
        nbytes, value = rng.choice(SIZES), 1 + step % 255
        buffer = device.alloc(nbytes, stream=home, pool=pool)
        buffer.fill(bytes([value]), stream=home)
        reader.wait(home)
        away = device.alloc(64, stream=reader, kind=MemoryKind.PINNED)
        for _ in range(rng.randrange(3)):  # it takes a while until the reader comes to it
            away.fill(b"\0", stream=reader)
        away.copy_from(buffer.view(nbytes - 64, 64), stream=reader)
        kept.append((away, value, reader))
        if rng.random() < 0.8:
            buffer.close()
        del buffer
        if rng.random() < 0.1:
            streams[rng.randrange(STREAMS)] = device.stream()
        if rng.random() < 0.05:
            pool.trim()
        if len(kept) > 30:
            look()
    look()
    return wrong


@pytest.fixture
def slow(rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> hal.Device:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 memory=256M latency_us=150")
    return rig.device  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_sees_anothers_bytes(slow: hal.Device, seed: int) -> None:
    pool = hal.Pool(hal.DriverMemory(slow), limit=64 << 20)
    assert program(slow, pool, seed, 150) == []
    assert pool.stats().live == 0


def test_nor_on_the_cpu(rig_of: Callable[[str], Any]) -> None:
    device = rig_of("cpu").device
    pool = hal.Pool(hal.DriverMemory(device), limit=64 << 20)
    assert program(device, pool, 3, 400) == []


@pytest.mark.parametrize("native", [False, True], ids=["pool", "pool in C"])
def test_nor_over_a_slow_libcuda(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "100")
    device = rig_of("cuda").device
    if native:
        if hot.BACKEND != "native":
            pytest.skip("the C code is not used")
        from drivetrain.hal.native_pool import NativePool

        pool: Any = NativePool(device, limit=64 << 20)
    else:
        pool = hal.Pool(hal.DriverMemory(device), limit=64 << 20)
    assert program(device, pool, 4, 150) == []
    assert pool.stats().live == 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_nobody_sees_anothers_bytes_in_full(slow: hal.Device, seed: int) -> None:
    pool = hal.Pool(hal.DriverMemory(slow), limit=64 << 20)
    assert program(slow, pool, seed, 1500) == []


def test_the_control_without_waits_bytes_are_overwritten(
    slow: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that forgets who used the memory."""

    class Careless(hal.Pool):
        def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
            for event in waits:
                self.opened.give_event(event)
            super().deallocate(ptr, nbytes, stream, ())

    pool = Careless(hal.DriverMemory(slow), limit=64 << 20)
    assert any(program(slow, pool, seed, 150) for seed in range(1, 4))


def test_the_control_streams_that_do_not_wait_read_too_early(
    slow: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = hal.Pool(hal.DriverMemory(slow), limit=64 << 20)
    monkeypatch.setattr(opened(slow).backend, "stream_wait", lambda *_: None)

    def caught(seed: int) -> bool:
        try:
            return bool(program(slow, pool, seed, 150))
        except HalError as error:  # it touched what was given back
            return error.code == "bad_address"

    assert any(caught(seed) for seed in range(1, 4))
