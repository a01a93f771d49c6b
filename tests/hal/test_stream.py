"""Streams and events: order, waits with an end, time, priorities, and what is refused."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, HalError, Timeout
from drivetrain.hal.opened import opened


def test_work_of_one_stream_happens_in_order(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    store, times, add = (rig.kernel(name) for name in ("store", "times", "add"))
    expected = 1
    store(stream, 1, 1, value, 1)
    for n in random.Random(3).choices(range(2, 5), k=60):
        if n % 2:
            times(stream, 1, 1, value, n)
            expected *= n
        else:
            add(stream, 1, 1, value, n)
            expected += n
        expected = (expected + 2**31) % 2**32 - 2**31
    assert rig.number(value, stream) == expected


def test_a_stream_waits_for_another_stream_and_for_an_event(rig: Any) -> None:
    first, second = rig.device.stream(), rig.device.stream()
    value = rig.alloc(4, first)
    for turn in range(5):
        rig.kernel("store")(first, 1, 1, value, turn)
        rig.slow(first, 0.02)
        rig.kernel("add")(first, 1, 1, value, 100)
        if turn % 2:
            second.wait(first)
        else:
            second.wait(first.record())
        rig.kernel("times")(second, 1, 1, value, 2)
        first.wait(second)
        assert rig.number(value, first) == 2 * (turn + 100)


def test_without_a_wait_streams_do_not_wait(rig: Any) -> None:
    """The control of the test above."""
    first, second = rig.device.stream(), rig.device.stream()
    release = rig.hold(first)
    event = first.record()
    second.record().synchronize()
    second.synchronize()
    assert second.done
    assert not event.done
    assert not first.done
    release()
    event.synchronize()
    assert event.done


def test_an_event_stands_for_what_was_queued_before_it(rig: Any) -> None:
    stream = rig.device.stream()
    before = stream.record()
    release = rig.hold(stream)
    after = stream.record()
    before.synchronize()
    assert before.done
    assert not after.done
    release()
    stream.synchronize()
    assert after.done


def test_waits_go_between_devices(rig: Any) -> None:
    here, there = rig.device.stream(), rig.other.stream()
    rig.slow(here, 0.1)
    event = here.record()
    there.wait(here)
    there.wait(event)
    value = rig.alloc(4, there)
    rig.kernel("store", rig.other)(there, 1, 1, value, 5)
    assert rig.number(value, there) == 5
    assert event.done


def test_waits_go_between_drivers(rig_of: Callable[[str], Any]) -> None:
    cpu, simulated = rig_of("cpu"), rig_of("simulated")
    here, there = cpu.device.stream(), simulated.device.stream()
    cpu.slow(here, 0.1)
    event = here.record()
    there.wait(here)
    assert event.done  # they share no events: the caller waited
    simulated.slow(there, 0.05)
    event = there.record()
    here.wait(event)
    assert event.done


def test_every_wait_ends_at_its_limit_and_the_work_goes_on(rig: Any) -> None:
    stream = rig.device.stream()
    release = rig.hold(stream)
    event = stream.record()
    for wait, op in (
        (stream.synchronize, "stream.synchronize"),
        (event.synchronize, "event.synchronize"),
        (rig.device.synchronize, "synchronize"),
    ):
        with pytest.raises(Timeout, match=r"0\.02 s") as caught:
            wait(0.02)
        assert caught.value.op == op
        assert caught.value.device == rig.device.address
        assert isinstance(caught.value, TimeoutError)
        with pytest.raises(Timeout):
            wait(timeout=0)
    release()
    event.synchronize()
    stream.synchronize(0)
    rig.device.synchronize(1)


def test_the_default_limit_is_the_environments(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = rig.device.stream()
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.01")
    release = rig.hold(stream)
    with pytest.raises(Timeout, match=r"0\.01 s"):
        stream.synchronize()
    for wrong in ("0", "-3", "soon", "nan"):
        monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", wrong)
        with pytest.raises(BadInput, match="DRIVETRAIN_WAIT_LIMIT_S"):
            stream.synchronize()
    monkeypatch.delenv("DRIVETRAIN_WAIT_LIMIT_S")
    release()
    stream.synchronize()


def test_what_a_copy_reads_is_kept_when_a_wait_ends_early(rig: Any) -> None:
    """A wait that ends at its limit keeps the target of the copy alive."""
    stream = rig.device.stream()
    buffer = rig.alloc(1 << 12, stream, kind=hal.MemoryKind.PINNED)
    buffer.fill(b"\x21", stream=stream)
    if rig.driver == "cuda":  # copies to pageable memory hold the caller up there
        stream.synchronize()
    release = rig.hold(stream) if rig.driver != "cuda" else None
    target = bytearray(1 << 12)
    buffer.copy_to(target, stream=stream)
    if rig.driver != "cuda":
        with pytest.raises(Timeout):
            stream.synchronize(0.01)
        assert not stream.done
        assert stream._kept
        release()
    stream.synchronize()
    assert stream._kept == []
    assert target == b"\x21" * (1 << 12)


def test_one_threads_wait_lets_nothing_go_that_another_thread_queued_meanwhile(rig: Any) -> None:
    stream = rig.device.stream()
    buffer = rig.alloc(64, stream)
    rig.slow(stream, 0.1)
    waiter = threading.Thread(target=stream.synchronize)
    waiter.start()
    time.sleep(0.02)
    later = object()
    stream._keep([later])
    rig.slow(stream, 0.1)
    waiter.join()
    assert later in stream._kept or stream.done
    stream.synchronize()
    assert stream._kept == []
    buffer.close()


FORKED = """
import os, sys
from drivetrain import hal
from drivetrain.errors import HalError

device = hal.device(sys.argv[1])
stream = device.stream()
buffer = device.alloc(64, stream=stream)
buffer.fill(b"\\x01", stream=stream)
event = stream.record()
stream.synchronize()
pid = os.fork()
if pid == 0:
    told = []
    for use in (lambda: buffer.fill(b"\\0", stream=stream), lambda: stream.synchronize(5),
                lambda: event.synchronize(5), lambda: buffer.copy_to(bytearray(64), stream=stream),
                device.stream):
        try:
            use()
        except HalError as error:
            told.append(error.code)
    del buffer, event, stream
    os._exit(0 if told == ["forked"] * 5 else 1)
status = os.waitpid(pid, 0)[1]
found = bytearray(64)
buffer.copy_to(found, stream=stream)
stream.synchronize()
print("end", status, set(found))
"""


@pytest.mark.parametrize("driver", ["cpu", "opencl", "simulated"])
def test_in_a_forked_child_nothing_waits_for_the_parents_threads(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    if not hal.devices(driver):
        pytest.skip(f"there is no device of {driver}")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, f"{driver}:0"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "end 0 {1}\n", done.stderr


def test_time_between_events(rig: Any) -> None:
    stream = rig.device.stream()
    start = stream.record()
    rig.slow(stream, 0.05)
    end = stream.record()
    with pytest.raises(BadInput, match="not done"):
        end.seconds_since(start)
    stream.synchronize()
    seconds = end.seconds_since(start)
    assert 0.045 < seconds < 5
    assert start.seconds_since(end) == pytest.approx(-seconds)
    with pytest.raises(BadInput, match="events are of"):
        end.seconds_since(rig.other.stream().record())
    with pytest.raises(BadInput, match="takes an Event, not Stream"):
        end.seconds_since(stream)


def test_a_lower_priority_goes_first_where_there_is_a_choice(rig_of: Callable[[str], Any]) -> None:
    """On the cpu: of many streams that become ready together, those of lower number are done
    first (each kernel takes all threads, so the order shows)."""
    rig = rig_of("cpu")
    if not opened(rig.device).backend.native:  # type: ignore[attr-defined]
        pytest.skip("the twin has a thread for each stream, and the system's order")
    gate = rig.device.stream()
    streams = [rig.device.stream(priority=p) for p in (5, 0, -5) for _ in range(3)]
    rig.slow(gate, 0.1)
    opening = gate.record()
    ends = []
    for stream in streams:
        stream.wait(opening)
        rig.slow(stream, 0.01)
        ends.append(stream.record())
    for stream in streams:
        stream.synchronize()
    first = ends[-1]
    late = sum(end.seconds_since(first) > 0 for end in ends[:3])
    assert late >= 2  # the last three were queued last and went first


def test_priorities_beyond_what_the_device_knows_are_its_nearest(rig: Any) -> None:
    for priority in (-(1 << 31), -100, 0, 100, (1 << 31) - 1):
        with rig.device.stream(priority=priority) as stream:
            stream.synchronize()


def test_closing_a_stream_loses_no_work(rig: Any) -> None:
    stream, reader = rig.device.stream(), rig.device.stream()
    value = rig.alloc(4, reader)
    rig.kernel("store")(stream, 1, 1, value, 1)
    rig.slow(stream, 0.05)
    rig.kernel("add")(stream, 1, 1, value, 41)
    event = stream.record()
    stream.close()
    stream.close()
    reader.wait(event)
    assert rig.number(value, reader) == 42
    for use in (stream.record, stream.synchronize, lambda: stream.wait(reader)):
        with pytest.raises(BadInput, match="closed"):
            use()
    with pytest.raises(BadInput, match="closed"):
        stream.done
    with pytest.raises(BadInput, match="closed"):
        reader.wait(stream)


def test_a_forgotten_stream_is_closed_and_its_events_live_on(rig: Any) -> None:
    stream = rig.device.stream()
    rig.slow(stream, 0.05)
    event = stream.record()
    before = len(opened(rig.device).streams)
    del stream
    gc.collect()
    assert len(opened(rig.device).streams) <= before
    event.synchronize()
    assert event.done


def test_a_wait_takes_only_events_and_streams(rig: Any) -> None:
    stream = rig.device.stream()
    stream.wait(stream)
    for wrong in (None, 7, "event"):
        with pytest.raises(BadInput, match="Event or a Stream"):
            stream.wait(wrong)


def test_a_failure_of_queued_work_is_told_by_the_next_wait_once(
    rig_of: Callable[[str], Any],
) -> None:
    for driver in ("cpu", "simulated"):
        rig = rig_of(driver)
        stream = rig.device.stream()
        rig.kernel("fails")(stream, 1, 1)
        with pytest.raises(HalError, match="7"):
            stream.synchronize()
        stream.synchronize()


def test_many_events_and_streams_come_and_go(rig: Any) -> None:
    """Handles are used again, also while they are waited for."""
    keep = rig.device.stream()
    value = rig.alloc(4, keep)
    rig.kernel("store")(keep, 1, 1, value, 0)
    for turn in range(300):
        stream = rig.device.stream() if turn % 10 == 0 else stream  # noqa: F821
        stream.wait(keep)
        rig.kernel("add")(stream, 1, 1, value, 1)
        keep.wait(stream)
    assert rig.number(value, keep) == 300
    assert len(opened(rig.device)._events[True]) <= 300


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "add", "times", "wait", "pause"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(1, 9),
    ),
    max_size=40,
)


@given(actions=ACTIONS)
def test_any_program_whose_streams_wait_for_each_other_has_one_result(
    actions: list[tuple[str, int, int, int]],
) -> None:
    """Three streams work on one number; each waits for the one before, so the order is ours."""
    device = hal.device("cpu:0")
    streams = [device.stream() for _ in range(3)]
    value = device.alloc(1024, stream=streams[0])
    expected = bytearray(1024)
    value.fill(b"\0", stream=streams[0])
    last = streams[0]
    for what, on, size, number in actions:
        stream = streams[on]
        stream.wait(last)
        last = stream
        first, length = 64 * number, 64 << size
        part = value.view(first, min(length, 1024 - first))
        if what == "wait":
            streams[size].wait(stream)
        elif what == "pause":
            continue
        else:
            part.fill(bytes([number]), stream=stream)
            expected[first : first + part.nbytes] = bytes([number]) * part.nbytes
    back = bytearray(1024)
    value.copy_to(back, stream=last)
    last.synchronize()
    assert back == expected
