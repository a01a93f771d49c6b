"""Buffers: what they hold, who may use them when, and what is refused before a driver is asked."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, HalError, OutOfMemory, Timeout, Unsupported
from drivetrain.hal import MemoryKind
from drivetrain.hal.opened import opened

KINDS = list(MemoryKind)


def test_bytes_come_back_from_every_kind_of_memory(rig: Any) -> None:
    data = random.Random(1).randbytes(100_003)
    with rig.device.stream() as stream:
        for kind in KINDS:
            with rig.alloc(len(data), stream, kind=kind) as buffer:
                assert buffer.kind is kind
                assert buffer.ptr % min(opened(rig.device).backend.alignment, 512) == 0
                buffer.copy_from(data, stream=stream)
                assert rig.read(buffer, stream) == data


def test_a_source_may_be_reused_when_the_call_returns(rig: Any) -> None:
    stream = rig.device.stream()
    for nbytes in (64, 1 << 20):
        buffer = rig.alloc(nbytes, stream)
        source = bytearray(b"\x11" * nbytes)
        rig.slow(stream)
        buffer.copy_from(source, stream=stream)
        source[:] = b"\xee" * nbytes
        assert rig.read(buffer, stream) == b"\x11" * nbytes


def test_a_target_lives_until_the_copy_into_it_is_done(rig: Any) -> None:
    class Target(bytearray):
        pass

    stream = rig.device.stream()
    buffer = rig.alloc(1 << 16, stream)
    buffer.fill(b"\x42", stream=stream)
    rig.slow(stream)
    target = Target(1 << 16)
    left = weakref.ref(target)
    buffer.copy_to(target, stream=stream)
    del target
    gc.collect()
    if rig.driver != "cuda":  # there a copy to pageable memory is done when the call returns
        assert left() is not None
    stream.synchronize()
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("pattern", [b"\x01", b"\x01\x02", b"abcd", bytes(range(8)), b"fine" * 4])
def test_fill_repeats_its_pattern(rig: Any, pattern: bytes) -> None:
    stream = rig.device.stream()
    buffer = rig.alloc(160_000, stream)
    buffer.fill(pattern, stream=stream)
    assert rig.read(buffer, stream) == pattern * (160_000 // len(pattern))
    part = buffer.view(32, 160)
    part.fill(pattern[::-1], stream=stream)
    whole = rig.read(buffer, stream)
    assert whole[32:192] == pattern[::-1] * (160 // len(pattern))
    assert whole[:32] == (pattern * 32)[:32]
    assert whole[192:224] == (pattern * 32)[:32]


def test_a_view_is_a_part_and_keeps_the_whole_alive(rig: Any) -> None:
    stream = rig.device.stream()
    whole = rig.alloc(1000, stream)
    whole.copy_from(bytes(range(250)) * 4, stream=stream)
    inner = whole.view(250, 500).view(10, 20)
    assert inner.ptr == whole.ptr + 260
    assert rig.read(inner, stream) == bytes(range(10, 30))
    inner.copy_from(b"x" * 20, stream=stream)
    assert rig.read(whole, stream)[260:280] == b"x" * 20
    keeps = inner
    del whole
    gc.collect()
    assert rig.read(keeps, stream) == b"x" * 20
    inner.close()
    with pytest.raises(BadInput, match="closed"):
        inner.fill(b"\0", stream=stream)


def test_closing_the_whole_closes_its_views(rig: Any) -> None:
    stream = rig.device.stream()
    whole = rig.alloc(64, stream)
    inner = whole.view(0, 32).view(0, 16)
    assert not inner.closed
    whole.close()
    whole.close()
    assert inner.closed
    assert whole.closed
    with pytest.raises(BadInput, match="closed"):
        inner.copy_from(b"x", stream=stream)


def test_memory_is_used_again_only_after_the_work_of_every_stream_that_used_it(rig: Any) -> None:
    """The buffer's own stream is done at once, another one still reads: the next owner waits."""
    home, reader, out = rig.device.stream(), rig.device.stream(), bytearray(4096)
    buffer = rig.alloc(4096, home)
    buffer.fill(b"\x01", stream=home)
    keep = rig.alloc(4096, reader, kind=MemoryKind.PINNED)
    reader.wait(home)
    rig.slow(reader, 0.15)
    keep.copy_from(buffer, stream=reader)
    buffer.close()
    next_owner = rig.alloc(4096, home)
    next_owner.fill(b"\x02", stream=home)
    home.synchronize()
    keep.copy_to(out, stream=reader)
    reader.synchronize()
    assert bytes(out) == b"\x01" * 4096


def test_used_by_makes_reuse_wait_for_work_that_others_queued(rig: Any) -> None:
    home, theirs = rig.device.stream(), rig.device.stream()
    buffer = rig.alloc(4096, home)
    buffer.fill(b"\x01", stream=home)
    home.synchronize()
    rig.slow(theirs, 0.1)
    after = theirs.record()
    buffer.used_by(theirs)
    buffer.close()
    again = rig.alloc(4096, home)
    again.fill(b"\x02", stream=home)
    home.synchronize()
    assert after.done
    other = rig.alloc(4096, home)
    rig.slow(theirs, 0.1)
    after = theirs.record()
    other.close(theirs)
    third = rig.alloc(4096, home)
    third.fill(b"\x03", stream=home)
    home.synchronize()
    assert after.done


def test_a_close_whose_wait_ends_early_can_be_done_again(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver's device still reads the memory: the caller waits for it."""
    cpu, simulated = rig_of("cpu"), rig_of("simulated")
    near, far = cpu.device.stream(), simulated.device.stream()
    pool = hal.Pool(hal.DriverMemory(cpu.device, MemoryKind.PINNED))
    buffer = cpu.device.alloc(64, stream=near, kind=MemoryKind.PINNED, pool=pool)
    target = simulated.device.alloc(64, stream=far)
    release = simulated.hold(far)
    target.copy_from(buffer, stream=far)
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.02")
    with pytest.raises(Timeout):
        buffer.close()
    assert not buffer.closed
    assert pool.stats().live == 1
    monkeypatch.delenv("DRIVETRAIN_WAIT_LIMIT_S")
    release()
    buffer.close()
    assert buffer.closed
    assert pool.stats().live == 0


def test_without_other_users_nobody_waits(rig: Any) -> None:
    """The control of the test above: an unrelated stream holds nobody up."""
    home, theirs = rig.device.stream(), rig.device.stream()
    buffer = rig.alloc(4096, home)
    buffer.close()
    release = rig.hold(theirs)
    after = theirs.record()
    again = rig.alloc(4096, home)
    again.fill(b"\x02", stream=home)
    home.synchronize()
    assert not after.done
    release()
    theirs.synchronize()


def test_a_forgotten_buffer_goes_back_to_its_pool(rig: Any) -> None:
    stream = rig.device.stream()
    pool = hal.Pool(hal.DriverMemory(rig.device))
    for _ in range(300):
        rig.alloc(1000, stream, pool=pool)
    gc.collect()
    stats = pool.stats()
    assert (stats.live, stats.requested) == (0, 0)
    assert stats.peak_requested == 1000
    assert pool.trim() == stats.reserved


def test_a_buffer_outlives_its_stream(rig: Any) -> None:
    stream = rig.device.stream()
    buffer = rig.alloc(1 << 16, stream)
    buffer.fill(b"\x07", stream=stream)
    rig.slow(stream)
    stream.close()
    with rig.device.stream() as other:
        other.wait(stream_heir(buffer))
        assert rig.read(buffer, other) == b"\x07" * (1 << 16)
        buffer.close()
        with pytest.raises(BadInput, match="closed"):
            rig.alloc(16, stream)


def stream_heir(buffer: hal.Buffer) -> hal.Event:
    """An event behind what the buffer's closed stream did."""
    heir = buffer._home._heir  # type: ignore[union-attr]
    assert heir is not None
    return heir.record()


def test_the_driver_gets_back_all_that_was_taken(rig: Any) -> None:
    stream = rig.device.stream()
    memory = {kind: hal.DriverMemory(rig.device, kind) for kind in KINDS}
    held = [
        rig.alloc(n * 1000 + 1, stream, kind=kind, pool=memory[kind])
        for n in range(20)
        for kind in KINDS
    ]
    assert all(resource.stats().live == 20 for resource in memory.values())
    random.Random(2).shuffle(held)
    for buffer in held:
        buffer.close()
    assert all(r.stats().live == r.stats().allocated == 0 for r in memory.values())
    stream.synchronize()
    hal.close_all()
    if rig.fake is not None:
        assert rig.fake.live() == 0


def test_a_device_that_is_closed_leaves_dead_objects_and_no_crash(rig: Any) -> None:
    stream = rig.device.stream()
    buffer, kernel = rig.alloc(64, stream), rig.kernel("nothing")
    plan = kernel.plan(stream, 1, 1)
    event = stream.record()
    module = next(iter(rig.modules.values()))
    rig.modules.clear()
    hal.close_all()
    for use, arguments in (
        (buffer.view, (0, 1)),
        (buffer.__dlpack__, ()),
        (buffer.memoryview, ()),
        (module.kernel, ("nothing",)),
        (partial(buffer.fill, stream=stream), (b"\0",)),
        (kernel, (stream, 1, 1)),
        (plan, ()),
        (stream.record, ()),
        (stream.synchronize, ()),
        (rig.alloc, (16, stream)),
    ):
        with pytest.raises((BadInput, HalError)):
            use(*arguments)
    with pytest.raises(BadInput, match="the stream is closed"):
        rig.alloc(16, stream)
    anew = rig.device.stream()
    with pytest.raises(BadInput, match="was closed"):
        rig.alloc(64, anew).copy_from(buffer, stream=anew)
    del use, arguments
    buffer.close()
    stream.close()
    del module, buffer, stream, kernel, plan, event
    gc.collect()
    with rig.device.stream() as stream:  # it can be opened anew
        assert rig.read(rig.alloc(16, stream), stream) is not None


# -- bad input -------------------------------------------------------------------------------------


def bad_calls(rig: Any) -> dict[str, Callable[[], object]]:
    stream, far = rig.device.stream(), rig.other.stream()
    closed_stream = rig.device.stream()
    closed_stream.close()
    buffer = rig.alloc(64, stream)
    closed = rig.alloc(64, stream)
    closed.close()
    far_buffer = rig.alloc(64, far)
    alloc = rig.device.alloc
    return {
        "negative size": lambda: alloc(-1, stream=stream),
        "size beyond any memory": lambda: alloc(1 << 60, stream=stream),
        "size of another type": lambda: alloc(1.5, stream=stream),
        "size as text": lambda: alloc("64", stream=stream),
        "stream of another device": lambda: alloc(64, stream=far),
        "closed stream": lambda: alloc(64, stream=closed_stream),
        "no stream": lambda: alloc(64, stream=None),
        "kind of another type": lambda: alloc(64, stream=stream, kind=7),
        "pool of another device": lambda: alloc(
            64, stream=stream, pool=hal.Pool(hal.DriverMemory(rig.other))
        ),
        "pool of another kind": lambda: alloc(
            64, stream=stream, pool=hal.DriverMemory(rig.device, MemoryKind.PINNED)
        ),
        "fill, freed": lambda: closed.fill(b"\0", stream=stream),
        "fill, other device's stream": lambda: buffer.fill(b"\0", stream=far),
        "fill, pattern of 3": lambda: buffer.fill(b"abc", stream=stream),
        "fill, no pattern": lambda: buffer.fill(b"", stream=stream),
        "fill, pattern of another type": lambda: buffer.fill(0, stream=stream),
        "fill, not a multiple": lambda: buffer.view(0, 30).fill(b"abcd", stream=stream),
        "fill, crooked address": lambda: buffer.view(1, 16).fill(b"abcd", stream=stream),
        "fill, closed stream": lambda: buffer.fill(b"\0", stream=closed_stream),
        "view outside": lambda: buffer.view(60, 5),
        "view before": lambda: buffer.view(-1, 5),
        "view of negative size": lambda: buffer.view(10, -5),
        "view of another type": lambda: buffer.view(0.0, 1),
        "view, freed": lambda: closed.view(0, 1),
        "copy too long": lambda: buffer.copy_from(bytes(65), stream=stream),
        "copy to too long": lambda: buffer.copy_to(bytearray(65), stream=stream),
        "copy to read-only": lambda: buffer.copy_to(bytes(4), stream=stream),
        "copy from text": lambda: buffer.copy_from("abc", stream=stream),
        "copy from strided": lambda: buffer.copy_from(memoryview(bytes(8))[::2], stream=stream),
        "copy to strided": lambda: buffer.copy_to(memoryview(bytearray(8))[::2], stream=stream),
        "copy, freed": lambda: closed.copy_from(b"x", stream=stream),
        "copy to, freed": lambda: closed.copy_to(bytearray(1), stream=stream),
        "copy, freed source": lambda: buffer.copy_from(closed, stream=stream),
        "copy, other device's stream": lambda: buffer.copy_from(b"x", stream=far),
        "copy, third device's stream": lambda: far_buffer.copy_from(far_buffer, stream=stream),
        "copy onto itself": lambda: buffer.view(0, 32).copy_from(
            buffer.view(16, 32), stream=stream
        ),
        "copy, closed stream": lambda: buffer.copy_from(b"x", stream=closed_stream),
        "used_by, other device": lambda: buffer.used_by(far),
        "used_by, freed": lambda: closed.used_by(stream),
        "used_by, no stream": lambda: buffer.used_by(None),
        "wrap negative": lambda: rig.device.wrap(4096, -1, owner=None),
        "wrap nothing's address": lambda: rig.device.wrap(0, 8, owner=None),
        "wrap text": lambda: rig.device.wrap("4096", 8, owner=None),
        "wrap_stream 0": lambda: rig.device.wrap_stream(0, owner=None),
        "wrap_stream text": lambda: rig.device.wrap_stream("1", owner=None),
        "priority of another type": lambda: rig.device.stream(priority="high"),
        "priority too large": lambda: rig.device.stream(priority=1 << 40),
        "wait of negative length": lambda: stream.synchronize(-1),
        "device, negative wait": lambda: rig.device.synchronize(float("nan")),
        "limit below zero": lambda: hal.Limit(hal.DriverMemory(rig.device), -1),
        "alignment of 24": lambda: hal.Aligned(hal.DriverMemory(rig.device), 24),
        "alignment of 8": lambda: hal.Aligned(hal.DriverMemory(rig.device), 8),
    }


def test_bad_input_is_told_and_no_driver_is_called(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = bad_calls(rig)
    seen: list[str] = []
    for device in (rig.device, rig.other):
        backend = opened(device).backend
        for name in ("alloc", "copy", "fill", "free", "event_record", "stream_create", "launch"):
            monkeypatch.setattr(
                backend, name, lambda *a, name=name: seen.append(name), raising=True
            )
    wrong: dict[str, str] = {}
    for what, call in calls.items():
        try:
            call()
        except BadInput as error:
            if len(str(error)) < 20:
                wrong[what] = f"says only {error}"
        except Exception as error:
            wrong[what] = repr(error)
        else:
            wrong[what] = "was taken"
    assert wrong == {}
    assert seen == []
    monkeypatch.undo()


def test_zero_bytes_are_a_size_like_any_other(rig: Any) -> None:
    stream = rig.device.stream()
    with rig.alloc(0, stream) as none, rig.alloc(8, stream) as some:
        assert not none.closed
        none.fill(b"abcd", stream=stream)
        none.copy_from(b"", stream=stream)
        none.copy_to(bytearray(), stream=stream)
        some.copy_from(none, stream=stream)
        assert not some.view(8, 0).closed
        assert rig.read(none, stream) == b""
    wrapped = rig.device.wrap(0, 0, owner=None)
    assert not wrapped.closed
    wrapped.copy_to(bytearray(), stream=stream)


def test_more_than_there_is_is_out_of_memory_with_its_numbers(rig: Any) -> None:
    stream = rig.device.stream()
    _, total = opened(rig.device).backend.memory()
    with pytest.raises(OutOfMemory) as caught:
        rig.alloc(2 * total, stream)
    error = caught.value
    assert error.requested == 2 * total
    assert error.total == total
    assert 0 <= error.free <= total
    assert error.op == "alloc"
    assert error.device == rig.device.address
    assert isinstance(error, MemoryError)
    rig.alloc(64, stream).close()


def test_a_kind_that_the_device_lacks_is_unsupported(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=compute")
    stream = rig.device.stream()
    for kind in (MemoryKind.PINNED, MemoryKind.MANAGED):
        with pytest.raises(Unsupported, match=kind.name.lower()):
            rig.alloc(64, stream, kind=kind)


def test_a_wrapped_memory_keeps_its_owner_and_frees_nothing(rig: Any) -> None:
    class Owner:
        pass

    stream = rig.device.stream()
    theirs = rig.alloc(256, stream)
    theirs.fill(b"\x05", stream=stream)
    owner = Owner()
    left = weakref.ref(owner)
    wrapped = rig.device.wrap(theirs.ptr, 256, owner=owner)
    del owner
    gc.collect()
    assert left() is not None
    assert rig.read(wrapped, stream) == b"\x05" * 256
    wrapped.close()
    stream.synchronize()
    gc.collect()
    assert left() is None
    assert rig.read(theirs, stream) == b"\x05" * 256


@pytest.mark.parametrize("how", ["close", "forget", "view", "event"])
def test_an_owner_lives_until_the_work_that_was_queued_on_its_memory_is_done(
    rig: Any, how: str
) -> None:
    class Owner:
        pass

    stream = rig.device.stream()
    theirs = rig.alloc(4096, stream)
    owner = Owner()
    left = weakref.ref(owner)
    wrapped = rig.device.wrap(theirs.ptr, 4096, owner=owner)
    del owner
    rig.slow(stream, 0.1)
    if how == "view":
        wrapped.view(16, 16).fill(b"\x01", stream=stream)
    elif how == "event":
        far = rig.other.stream()
        far.wait(stream)
        rig.alloc(4096, far).copy_from(wrapped, stream=far)
        stream = far
    else:
        wrapped.fill(b"\x01", stream=stream)
    if how == "close":
        wrapped.close()
        assert wrapped.closed
    del wrapped
    gc.collect()
    assert left() is not None
    stream.synchronize()
    rig.device.synchronize()
    opened(rig.device).inner_stream("heir").synchronize()
    opened(rig.device).inner_stream("copy").synchronize()
    opened(rig.other).inner_stream("heir").synchronize()
    gc.collect()
    assert left() is None
    theirs.close()


def test_owners_do_not_pile_up_where_nobody_synchronises(rig: Any) -> None:
    stream = rig.device.stream()
    memory = rig.alloc(4096, stream)
    for turn in range(500):
        rig.device.wrap(memory.ptr, 4096, owner=bytearray(8)).fill(b"\0", stream=stream)
        if turn % 50 == 0:
            stream.record().synchronize()
    assert len(stream._held) < 200
    stream.synchronize()
    assert not stream._held


def test_an_owner_that_holds_its_buffer_is_collected(rig: Any) -> None:
    class Tensor:
        def __init__(self, memory: hal.Buffer) -> None:
            self.memory = memory
            self.buffer = rig.device.wrap(memory.ptr, memory.nbytes, owner=self)

    stream = rig.device.stream()
    tensor = Tensor(rig.alloc(256, stream))
    left = weakref.ref(tensor)
    pool = rig.device.pool()
    assert pool.stats().live == 1
    del tensor
    gc.collect()
    assert left() is None
    assert pool.stats().live == 0


def test_a_wrapped_stream_is_used_and_left_alone(rig: Any) -> None:
    theirs = rig.device.stream()
    ours = rig.device.wrap_stream(theirs.handle, owner=theirs)
    buffer = rig.alloc(64, ours)
    buffer.fill(b"\x09", stream=ours)
    assert rig.read(buffer, ours) == b"\x09" * 64
    buffer.close()
    ours.close()
    theirs.synchronize()
    assert rig.read(rig.alloc(64, theirs), theirs) is not None


def test_the_host_touches_what_it_may_and_nothing_else(rig: Any) -> None:
    stream = rig.device.stream()
    buffer = rig.alloc(16, stream, kind=MemoryKind.PINNED)
    view = buffer.memoryview()
    view[:] = b"0123456789abcdef"
    assert rig.read(buffer, stream) == b"0123456789abcdef"
    device_only = rig.alloc(16, stream)
    if device_only.host_visible:
        assert len(device_only.memoryview()) == 16
    else:
        with pytest.raises(HalError, match="copy_to"):
            device_only.memoryview()
    del buffer
    gc.collect()
    view[0] = 1  # the view keeps the memory


# -- references and threads ------------------------------------------------------------------------


def test_the_usual_calls_leave_no_reference_behind(rig: Any) -> None:
    stream, kernel = rig.device.stream(), rig.kernel("add")
    buffer = rig.alloc(64, stream)
    plan = kernel.plan(stream, 1, 1, buffer, 1)

    def once() -> None:
        made = rig.device.alloc(5000, stream=stream)
        made.fill(b"\0", stream=stream)
        kernel(stream, 1, 1, made, 7)
        kernel(stream, (1, 1), (1, 1, 1), buffer, 7, shared=0)
        plan()
        plan.set(1, 3)
        made.view(0, 4).close()
        stream.record()
        made.close()
        for bad in ("x", 1 << 40, None):
            with pytest.raises(BadInput):
                kernel(stream, 1, 1, buffer, bad)
        stream.synchronize()

    things = [stream, kernel, buffer, plan, rig.device, MemoryKind.DEVICE, opened(rig.device)]
    for _ in range(20):
        once()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in things]
    alive = len(gc.get_objects())
    for _ in range(200):
        once()
    gc.collect()
    after = [sys.getrefcount(thing) for thing in things]
    assert after == before
    assert len(gc.get_objects()) - alive < 100


def test_many_threads_share_a_stream_a_pool_and_each_others_buffers(rig: Any) -> None:
    shared, kernel = rig.device.stream(), rig.kernel("add")
    total = rig.alloc(4, shared)
    total.fill(b"\0", stream=shared)
    problems: list[BaseException] = []
    handed: list[hal.Buffer] = []

    def work(number: int) -> None:
        try:
            mine = rig.device.stream()
            for turn in range(60):
                kernel(shared, 1, 1, total, 1)
                buffer = rig.alloc(64 << (turn % 6), mine)
                buffer.fill(bytes([number]), stream=mine)
                back = bytearray(8)
                buffer.view(0, 8).copy_to(back, stream=mine)
                mine.synchronize()
                assert back == bytes([number]) * 8
                handed.append(buffer)
                if turn % 2:
                    handed.pop(random.randrange(len(handed))).close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert rig.number(total, shared) == 240


def test_no_user_is_forgotten_when_many_threads_use_a_buffer_first_together(rig: Any) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        home = rig.device.stream()
        users = [rig.device.stream() for _ in range(4)]
        for _ in range(100):
            buffer = rig.alloc(64, home)
            start = threading.Barrier(len(users))

            def use(stream: hal.Stream, buffer: Any = buffer, start: Any = start) -> None:
                start.wait()
                buffer.used_by(stream)

            threads = [threading.Thread(target=use, args=(user,)) for user in users]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert buffer._users == set(users)
            buffer.close()
    finally:
        sys.setswitchinterval(before)


def test_two_threads_that_close_one_buffer_give_it_back_once(rig: Any) -> None:
    stream = rig.device.stream()
    pool = hal.Pool(hal.DriverMemory(rig.device))
    for _ in range(100):
        buffer = rig.alloc(512, stream, pool=pool)
        start = threading.Barrier(3)

        def close(buffer: hal.Buffer = buffer, start: threading.Barrier = start) -> None:
            start.wait()
            buffer.close()

        threads = [threading.Thread(target=close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert pool.stats().live == 0
    a, b = rig.alloc(512, stream, pool=pool), rig.alloc(512, stream, pool=pool)
    assert a.ptr != b.ptr
