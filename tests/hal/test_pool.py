"""The caching pool and its adaptors, over a driver that knows what is handed out and watches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from drivetrain.errors import BadInput, OutOfMemory
from drivetrain.hal import (
    DriverMemory,
    FailureInjection,
    Limit,
    MemoryKind,
    Pool,
    Tracking,
)
from drivetrain.hal.opened import Opened
from drivetrain.hal.resource import MemoryResource

MIB = 1 << 20


@dataclass
class Watched:
    """A driver's memory: addresses that grow, a size, and every order of streams that is asked."""

    total: int = 1 << 40
    groups: frozenset[str] = frozenset()
    used: dict[int, int] = field(default_factory=dict)
    top: int = 1 << 32
    events: int = 0
    recorded: dict[int, int] = field(default_factory=dict)
    waits: list[tuple[int, int]] = field(default_factory=list)  # (stream, stream waited for)
    freed: list[tuple[int, int]] = field(default_factory=list)

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        if sum(self.used.values()) + nbytes > self.total:
            raise OutOfMemory("full", requested=nbytes, code="out_of_memory")
        ptr, self.top = self.top, self.top + -(-nbytes // 4096) * 4096
        self.used[ptr] = nbytes
        return ptr

    def free(self, ptr: int, kind: int, stream: int) -> None:
        del self.used[ptr]
        self.freed.append((ptr, stream))

    def memory(self) -> tuple[int, int]:
        return self.total - sum(self.used.values()), self.total

    def event_create(self, timing: bool) -> int:
        self.events += 1
        return self.events

    def event_destroy(self, event: int) -> None:
        self.recorded.pop(event, None)

    def event_record(self, event: int, stream: int) -> None:
        self.recorded[event] = stream

    def event_done(self, event: int) -> bool:
        return False

    def stream_wait(self, stream: int, event: int) -> None:
        self.waits.append((stream, self.recorded[event]))


def opened(total: int = 1 << 40) -> tuple[Opened, Watched]:
    driver = Watched(total)
    device: Any = SimpleNamespace(address="watched:0", driver="watched", name="watched")
    return Opened(device, driver), driver  # type: ignore[arg-type]


def pool(total: int = 1 << 40, limit: int | None = None) -> tuple[Pool, Watched]:
    found, driver = opened(total)
    return Pool(DriverMemory(found), limit=limit), driver


def test_a_freed_block_is_found_again_on_its_stream_at_once() -> None:
    memory, driver = pool()
    first = memory.allocate(MIB, 1)
    memory.deallocate(first, MIB, 1, ())
    assert memory.allocate(MIB, 1) == first
    assert len(driver.used) == 1
    assert driver.waits == []


def test_another_stream_gets_the_block_only_behind_an_event() -> None:
    memory, driver = pool()
    first = memory.allocate(8 * MIB, 1)
    memory.deallocate(first, 8 * MIB, 1, ())
    second = memory.allocate(8 * MIB, 2)
    assert second == first
    assert driver.waits == [(2, 1)]


def test_a_block_that_others_used_is_waited_for_before_it_is_used_again() -> None:
    memory, driver = pool()
    first = memory.allocate(MIB, 1)
    event = memory.opened.take_event()
    memory.opened.backend.event_record(event, 7)
    memory.deallocate(first, MIB, 1, (event,))
    assert driver.waits == []
    memory.allocate(2 * MIB - 512, 1)  # all of the segment, so the block must be part of it
    memory.allocate(MIB, 1)
    assert (1, 7) in driver.waits


def test_neighbours_are_merged_when_a_request_needs_them() -> None:
    memory, driver = pool()
    parts = [memory.allocate(512 << 10, 1) for _ in range(4)]
    for part in parts:
        memory.deallocate(part, 512 << 10, 1, ())
    memory.allocate(MIB, 1)
    memory.allocate(MIB, 1)
    assert len(driver.used) == 1


def test_trim_gives_back_only_what_is_wholly_free_and_keeps_what_was_asked() -> None:
    memory, driver = pool()
    blocks = [memory.allocate(30 * MIB, 1) for _ in range(3)]
    for block in blocks[:2]:
        memory.deallocate(block, 30 * MIB, 1, ())
    assert memory.trim(60 * MIB) == 30 * MIB
    assert memory.trim() == 30 * MIB
    assert memory.stats().reserved == 30 * MIB
    memory.deallocate(blocks[2], 30 * MIB, 1, ())
    assert memory.trim() == 30 * MIB
    assert driver.used == {}


def test_out_of_memory_trims_and_tries_once_more() -> None:
    memory, driver = pool(total=100 * MIB)
    first = memory.allocate(60 * MIB, 1)
    memory.deallocate(first, 60 * MIB, 1, ())
    memory.allocate(80 * MIB, 1)
    assert memory.stats().retries == 1
    with pytest.raises(OutOfMemory) as caught:
        memory.allocate(50 * MIB, 1)
    assert caught.value.requested == 50 * MIB
    assert (caught.value.free, caught.value.total) == (20 * MIB, 100 * MIB)
    assert str(80 * MIB) in str(caught.value)  # the largest buffer
    assert memory.stats().failures == 1
    assert sum(driver.used.values()) == 80 * MIB


def test_the_limit_holds_and_its_last_bytes_can_be_used() -> None:
    memory, _ = pool(limit=21 * MIB)
    first = memory.allocate(2 * MIB, 1)
    with pytest.raises(OutOfMemory, match="limit"):
        memory.allocate(20 * MIB, 1)
    memory.deallocate(first, 2 * MIB, 1, ())
    memory.allocate(20 * MIB + 512, 1)
    assert memory.stats().reserved <= 21 * MIB
    for limit in (-1, float("nan")):
        with pytest.raises(BadInput):
            pool(limit=limit)
        with pytest.raises(BadInput):
            Limit(memory, limit)


def test_blocks_of_a_stream_that_ends_go_to_its_heir() -> None:
    memory, driver = pool()
    first = memory.allocate(8 * MIB, 1)
    memory.deallocate(first, 8 * MIB, 1, ())
    memory.forget_stream(1, 9)
    memory.allocate(8 * MIB, 9)
    assert driver.waits == []
    memory.trim()
    assert all(stream != 1 for _, stream in driver.freed)


def test_a_finaliser_inside_the_pool_does_not_wait_for_it() -> None:
    memory, _ = pool()
    first = memory.allocate(MIB, 1)

    class Lock:
        """Gives a block back while the pool is being used by the same thread."""

        inner = threading.Lock()
        entered = False

        def __enter__(self) -> None:
            self.inner.acquire()
            if not Lock.entered:
                Lock.entered = True
                memory.deallocate(first, MIB, 1, ())

        def __exit__(self, *_: object) -> None:
            self.inner.release()

        def acquire(self, blocking: bool = True) -> bool:
            return self.inner.acquire(blocking)

        def release(self) -> None:
            self.inner.release()

    memory._lock = Lock()  # type: ignore[assignment]
    memory.allocate(512, 1)
    assert memory.stats().live == 1


def test_many_threads_share_a_pool() -> None:
    memory, driver = pool()
    problems: list[BaseException] = []

    def use(stream: int) -> None:
        try:
            for round_ in range(300):
                held = [memory.allocate(512 << (round_ + n) % 12, stream) for n in range(4)]
                for n, ptr in enumerate(held):
                    memory.deallocate(ptr, 512 << (round_ + n) % 12, stream, ())
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert memory.stats().live == memory.stats().allocated == memory.stats().requested == 0
    memory.trim()
    assert driver.used == {}


SIZES = st.one_of(st.integers(0, 4096), st.integers(0, 64 * MIB))


class PoolMachine(RuleBasedStateMachine):
    """Random requests, frees, trims and ends of streams: no two living blocks share a byte, and
    what a stream gets from another is always behind an event."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.driver = pool(total=400 * MIB)
        self.live: dict[int, tuple[int, int]] = {}
        self.last: dict[int, int] = {}  # address -> stream that let it go last

    @rule(
        nbytes=st.one_of(st.integers(0, 4096), st.integers(0, 64 * MIB)), stream=st.integers(1, 3)
    )
    def allocate(self, nbytes: int, stream: int) -> None:
        before = len(self.driver.waits)
        try:
            ptr = self.pool.allocate(nbytes, stream)
        except OutOfMemory:
            return
        assert ptr % 512 == 0
        for other, (size, _) in self.live.items():
            assert ptr + max(nbytes, 1) <= other or other + max(size, 1) <= ptr
        assert any(
            start <= ptr and ptr + nbytes <= start + size
            for start, size in self.driver.used.items()
        )
        owner = self.last.get(ptr)
        if owner is not None and owner != stream:
            assert len(self.driver.waits) > before
        self.live[ptr] = (nbytes, stream)
        for inside in self.last:  # the whole block is this stream's now, behind that event
            if ptr <= inside < ptr + nbytes:
                self.last[inside] = stream

    @precondition(lambda self: self.live)
    @rule(data=st.data(), used=st.booleans())
    def free(self, data: st.DataObject, used: bool) -> None:
        ptr = data.draw(st.sampled_from(sorted(self.live)))
        nbytes, stream = self.live.pop(ptr)
        waits: tuple[int, ...] = ()
        if used:
            event = self.pool.opened.take_event()
            self.pool.opened.backend.event_record(event, 3)
            waits = (event,)
        self.pool.deallocate(ptr, nbytes, stream, waits)
        self.last[ptr] = stream

    @rule(keep=st.integers(0, 100 * MIB))
    def trim(self, keep: int) -> None:
        self.pool.trim(keep)
        self.last.clear()

    @invariant()
    def the_numbers_are_right(self) -> None:
        stats = self.pool.stats()
        assert stats.live == len(self.live)
        assert stats.requested == sum(size for size, _ in self.live.values())
        assert stats.requested <= stats.allocated <= stats.reserved
        assert stats.reserved == sum(self.driver.used.values())
        assert 0 <= stats.fragmentation <= 1
        assert stats.peak_reserved >= stats.reserved

    def teardown(self) -> None:
        for ptr, (nbytes, stream) in self.live.items():
            self.pool.deallocate(ptr, nbytes, stream, ())
        self.pool.trim()
        assert self.driver.used == {}


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


# -- adaptors ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), max_size=20))
def test_a_limit_counts_what_is_held(sizes: list[int]) -> None:
    found, _ = opened()
    limited = Limit(DriverMemory(found), 1000)
    held: list[tuple[int, int]] = []
    for size in sizes:
        if sum(s for _, s in held) + size <= 1000:
            held.append((limited.allocate(size, 1), size))
        else:
            with pytest.raises(OutOfMemory, match="limit"):
                limited.allocate(size, 1)
            ptr, freed = held.pop(0)
            limited.deallocate(ptr, freed, 1, ())


def test_tracking_names_who_holds_the_memory() -> None:
    found, _ = opened(total=MIB)
    tracked = Tracking(DriverMemory(found))

    def a_greedy_function() -> int:
        return tracked.allocate(700 << 10, 1)

    ptr = a_greedy_function()
    assert tracked.largest()[0].nbytes == 700 << 10
    with pytest.raises(OutOfMemory, match="a_greedy_function"):
        tracked.allocate(600 << 10, 1)
    tracked.deallocate(ptr, 700 << 10, 1, ())
    assert tracked.largest() == ()


def test_adaptors_wrap_each_other_in_any_order() -> None:
    def chain(build: Callable[[MemoryResource], MemoryResource]) -> None:
        found, driver = opened()
        resource = build(DriverMemory(found, MemoryKind.DEVICE))
        ptr = resource.allocate(100, 1)
        with pytest.raises(OutOfMemory):
            resource.allocate(100, 1)
        resource.deallocate(ptr, 100, 1, ())
        resource.trim()
        assert driver.used == {}

    chain(lambda r: Limit(Tracking(Pool(r)), 150))
    chain(lambda r: Tracking(FailureInjection(Pool(r), lambda number, _: number == 2)))
    chain(lambda r: FailureInjection(Tracking(Limit(r, 1000)), lambda number, _: number == 2))
