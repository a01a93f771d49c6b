"""Adaptors over memory resources: each does one thing, and they compose."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, OutOfMemory
from drivetrain.hal.opened import opened

MIB = 1 << 20


@pytest.fixture
def device(rig_of: Callable[[str], Any]) -> hal.Device:
    found: hal.Device = rig_of("simulated").device
    return found


def test_statistics_count_what_one_user_of_a_shared_pool_takes(device: hal.Device) -> None:
    stream = device.stream()
    pool = hal.Pool(hal.DriverMemory(device))
    mine, theirs = hal.Statistics(pool), hal.Statistics(pool)
    with device.alloc(1000, stream=stream, pool=mine):
        held = [device.alloc(5 * MIB, stream=stream, pool=theirs) for _ in range(2)]
        assert (mine.stats().requested, mine.stats().live) == (1000, 1)
        assert (theirs.stats().requested, theirs.stats().live) == (10 * MIB, 2)
        assert mine.stats().reserved == theirs.stats().reserved == pool.stats().reserved
        assert pool.stats().requested == 1000 + 10 * MIB
        for buffer in held:
            buffer.close()
    assert mine.stats().requested == theirs.stats().requested == 0
    assert (mine.stats().peak_requested, theirs.stats().peak_requested) == (1000, 10 * MIB)
    theirs.reset_peak()
    assert theirs.stats().peak_requested == 0
    assert (mine.requests, theirs.requests) == (1, 2)
    with pytest.raises(OutOfMemory):
        device.alloc(1 << 40, stream=stream, pool=theirs)
    assert (theirs.requests, theirs.stats().failures, mine.stats().failures) == (3, 1, 0)
    device.alloc(64, stream=stream, pool=mine).close()
    assert mine.trim() == 2 * MIB
    assert pool.stats().reserved == 0


@pytest.mark.parametrize("alignment", [16, 64, 512, 4096, 1 << 16, 2 * MIB])
def test_alignment_is_what_was_asked_for(device: hal.Device, alignment: int) -> None:
    stream = device.stream()
    for below in (hal.DriverMemory(device), hal.Pool(hal.DriverMemory(device))):
        aligned = hal.Aligned(below, alignment)
        held = [device.alloc(n, stream=stream, pool=aligned) for n in (0, 1, 17, 4096, 70_000)]
        for buffer in held:
            assert buffer.ptr % alignment == 0
            buffer.fill(b"\x01", stream=stream)
        for buffer in held:
            buffer.close()
        stream.synchronize()
        assert aligned.stats().live == 0
        aligned.trim()


def test_alignment_that_is_there_anyway_costs_nothing(device: hal.Device) -> None:
    stream = device.stream()
    pool = hal.Pool(hal.DriverMemory(device))
    aligned = hal.Aligned(pool, opened(device).backend.alignment)
    with device.alloc(512, stream=stream, pool=aligned):
        assert pool.stats().requested == 512
    with device.alloc(512, stream=stream, pool=hal.Aligned(pool, 4096)):
        assert pool.stats().requested > 512


@pytest.mark.parametrize("wrong", [0, 8, 15, 24, 100, -16, 1 << 31, 16.0, "16"])
def test_what_is_no_alignment_is_refused(device: hal.Device, wrong: Any) -> None:
    with pytest.raises(BadInput, match="power of two"):
        hal.Aligned(hal.DriverMemory(device), wrong)


def test_sixteen_bytes_are_the_least_that_a_driver_is_asked_for(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    backend = opened(device).backend
    real = backend.alloc

    def alloc(nbytes: int, kind: int, stream: int) -> int:
        asked.append(nbytes)
        return real(nbytes, kind, stream)

    monkeypatch.setattr(backend, "alloc", alloc)
    stream = device.stream()
    for nbytes in (0, 1, 15, 16, 17):
        device.alloc(nbytes, stream=stream, pool=hal.DriverMemory(device)).close()
    assert asked == [16, 16, 16, 16, 17]


def test_a_limit_tells_its_numbers(device: hal.Device) -> None:
    stream = device.stream()
    limited = hal.Limit(hal.Pool(hal.DriverMemory(device)), 1000)
    with device.alloc(600, stream=stream, pool=limited):
        with pytest.raises(OutOfMemory, match="600 of 1000") as caught:
            device.alloc(500, stream=stream, pool=limited)
        error = caught.value
        assert (error.requested, error.free, error.total) == (500, 400, 1000)
        assert error.code == "limit"
        device.alloc(400, stream=stream, pool=limited).close()
    device.alloc(1000, stream=stream, pool=limited).close()


def test_a_request_that_fails_below_does_not_count(device: hal.Device) -> None:
    stream = device.stream()
    failing = hal.FailureInjection(hal.DriverMemory(device), lambda number, _: number == 1)
    limited = hal.Limit(failing, 100)
    with pytest.raises(OutOfMemory, match="made to fail"):
        device.alloc(100, stream=stream, pool=limited)
    device.alloc(100, stream=stream, pool=limited).close()


def test_tracking_names_the_line_that_holds_the_memory(device: hal.Device) -> None:
    stream = device.stream()
    tracked = hal.Tracking(hal.Pool(hal.DriverMemory(device)))

    def a_greedy_function() -> hal.Buffer:
        return device.alloc(3 * MIB, stream=stream, pool=tracked)

    held = [a_greedy_function(), device.alloc(10, stream=stream, pool=tracked)]
    largest = tracked.largest()
    assert [holder.nbytes for holder in largest] == [3 * MIB, 10]
    assert "a_greedy_function" in "".join(largest[0].stack)
    assert __file__ in "".join(largest[0].stack)
    with pytest.raises(OutOfMemory, match="a_greedy_function") as caught:
        device.alloc(1 << 40, stream=stream, pool=tracked)
    assert caught.value.requested == 1 << 40
    assert caught.value.total == device.info.memory_bytes
    held.clear()
    assert tracked.largest() == ()
    shallow = hal.Tracking(hal.Pool(hal.DriverMemory(device)), depth=0)
    with device.alloc(10, stream=stream, pool=shallow):
        assert shallow.largest()[0].stack == ()


def test_failures_are_injected_where_asked(device: hal.Device) -> None:
    stream = device.stream()
    odd = hal.FailureInjection(hal.DriverMemory(device), lambda number, nbytes: number % 2 == 1)
    for _ in range(3):
        with pytest.raises(OutOfMemory, match="made to fail") as caught:
            device.alloc(64, stream=stream, pool=odd)
        assert caught.value.code == "injected"
        assert caught.value.total == device.info.memory_bytes
        device.alloc(64, stream=stream, pool=odd).close()


def test_a_pool_over_memory_that_fails_once_retries(device: hal.Device) -> None:
    stream = device.stream()
    flaky = hal.FailureInjection(hal.DriverMemory(device), lambda number, _: number == 1)
    pool = hal.Pool(flaky)
    device.alloc(64, stream=stream, pool=pool).close()
    assert pool.stats().retries == 1
    assert pool.stats().failures == 0
    pool.trim()
    always = hal.Pool(hal.FailureInjection(hal.DriverMemory(device), lambda *_: True))
    with pytest.raises(OutOfMemory, match="asked for"):
        device.alloc(64, stream=stream, pool=always)
    assert (always.stats().retries, always.stats().failures) == (1, 1)


ADAPTORS: dict[str, Callable[[Any], Any]] = {
    "limit": lambda r: hal.Limit(r, 1 << 40),
    "statistics": hal.Statistics,
    "tracking": hal.Tracking,
    "failures": lambda r: hal.FailureInjection(r, lambda *_: False),
    "aligned": lambda r: hal.Aligned(r, 1024),
    "pool": hal.Pool,
}


@given(
    names=st.lists(st.sampled_from(sorted(ADAPTORS)), max_size=5),
    sizes=st.lists(st.integers(0, 3 * MIB), max_size=8),
)
def test_adaptors_compose_in_any_order(names: list[str], sizes: list[int]) -> None:
    device = hal.device("cpu:0")
    bottom = hal.DriverMemory(device)
    resource: Any = bottom
    for name in names:
        resource = ADAPTORS[name](resource)
    stream = device.stream()
    held = [device.alloc(nbytes, stream=stream, pool=resource) for nbytes in sizes]
    spans = sorted((buffer.ptr, buffer.nbytes) for buffer in held)
    for (one, nbytes), (two, _) in itertools.pairwise(spans):
        assert one + max(nbytes, 1) <= two
    for buffer in held:
        buffer.close()
    resource.trim()
    while hasattr(resource, "_inner") or hasattr(resource, "_below"):
        resource.trim()
        resource = getattr(resource, "_inner", None) or resource._below
    assert bottom.stats().live == 0


def test_threads_share_a_stack_of_adaptors(device: hal.Device) -> None:
    stack = hal.Limit(hal.Statistics(hal.Tracking(hal.Pool(hal.DriverMemory(device)))), 64 * MIB)
    problems: list[BaseException] = []

    def work() -> None:
        try:
            stream = device.stream()
            for n in range(100):
                device.alloc(n * 1000, stream=stream, pool=stack).close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert (stack.stats().live, stack.stats().requested) == (0, 0)


def test_the_devices_own_pools_can_be_looked_at(device: hal.Device) -> None:
    stream = device.stream()
    with device.alloc(1000, stream=stream):
        stats = device.pool().stats()
        assert (stats.live, stats.requested, stats.allocated) == (1, 1000, 1024)
        assert stats.reserved == 2 * MIB
        assert 0.99 < stats.fragmentation < 1
        assert device.pool(hal.MemoryKind.PINNED).stats().live == 0
    assert device.pool().trim() == 2 * MIB
    assert device.pool().stats().fragmentation == 0


def test_a_device_takes_the_pool_that_it_is_given(rig_of: Callable[[str], Any]) -> None:
    rig = rig_of("simulated")
    device = rig.device
    limited = hal.Pool(hal.DriverMemory(device), limit=4 * MIB)
    device.use_pool(limited)
    device.use_pool(limited)
    stream = device.stream()
    for _ in range(2):  # found in C the second time
        with device.alloc(1000, stream=stream):
            assert limited.stats().live == 1
    with pytest.raises(OutOfMemory, match="limit is 4194304"):
        device.alloc(5 * MIB, stream=stream)
    with pytest.raises(BadInput, match="already"):
        device.use_pool(hal.Pool(hal.DriverMemory(device)))
    with pytest.raises(BadInput, match="simulated:1"):
        device.use_pool(hal.Pool(hal.DriverMemory(rig.other)))
    around = hal.Tracking(hal.Pool(hal.DriverMemory(rig.other)))
    rig.other.use_pool(around)
    with rig.other.alloc(77, stream=rig.other.stream()):
        assert around.largest()[0].nbytes == 77
