"""Graphs: what is noted happens when they are launched, with the arguments of that moment."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal.opened import opened


@pytest.fixture(params=["cpu", "simulated", "simulated, no graphs", "cuda"])
def rig(  # type: ignore[no-untyped-def]
    request: pytest.FixtureRequest, rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
):
    found = rig_of(request.param.partition(",")[0])
    if request.param.endswith("no graphs"):
        monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=compute+pinned+peer")
    return found


def test_a_graph_does_again_and_again_what_was_noted(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    with stream.capture() as graph:
        rig.kernel("add")(stream, 1, 1, value, 3)
        rig.kernel("times")(stream, 1, 1, value, 2)
    assert rig.number(value, stream) == 0  # it did not happen
    assert graph.kernels == 2
    assert graph.native == ("graphs" in opened(rig.device).backend.groups)
    expected = 0
    for _ in range(5):
        graph.launch(stream)
        expected = (expected + 3) * 2
    assert rig.number(value, stream) == expected


def test_copies_and_fills_are_noted_too(rig: Any) -> None:
    stream = rig.device.stream()
    a, b = rig.alloc(4096, stream), rig.alloc(4096, stream)
    source, target = bytearray(b"\x01" * 4096), bytearray(4096)
    with stream.capture() as graph:
        a.copy_from(source, stream=stream)
        b.copy_from(a, stream=stream)
        a.fill(b"\x02", stream=stream)
        b.view(0, 2048).copy_from(a.view(2048, 2048), stream=stream)
        b.copy_to(target, stream=stream)
    graph.launch(stream)
    stream.synchronize()
    assert target == b"\x02" * 2048 + b"\x01" * 2048
    source[:] = b"\x05" * 4096  # a graph reads its arrays when it is launched
    graph.launch(stream)
    stream.synchronize()
    assert target == b"\x02" * 2048 + b"\x05" * 2048


def test_arguments_change_from_one_launch_to_the_next(rig: Any) -> None:
    stream = rig.device.stream()
    one, two = rig.alloc(4, stream), rig.alloc(4, stream)
    for buffer in (one, two):
        buffer.fill(b"\0", stream=stream)
    with stream.capture() as graph:
        rig.kernel("add")(stream, 1, 1, one, 1)
        rig.kernel("add")(stream, 1, 1, one, 10)
    rig.slow(stream, 0.05)
    graph.launch(stream)
    graph.set(1, 1, 100)
    graph.launch(stream)
    graph.set(0, 0, two)
    graph.launch(stream)
    assert rig.number(one, stream) == 11 + 101 + 100
    assert rig.number(two, stream) == 1
    for node, index, value in ((2, 0, one), (-1, 0, one), (0, 2, 1), (0, 1, "x"), (0, 0, 5)):
        with pytest.raises(BadInput):
            graph.set(node, index, value)
    graph.launch(stream)
    assert rig.number(two, stream) == 2


def test_a_graph_is_launched_on_any_stream_of_its_device(rig: Any) -> None:
    stream, other, far = rig.device.stream(), rig.device.stream(), rig.other.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    other.wait(stream)
    with stream.capture() as graph:
        rig.kernel("add")(stream, 1, 1, value, 1)
    graph.launch(other)
    assert rig.number(value, other) == 1
    with pytest.raises(BadInput, match="stream of"):
        graph.launch(far)
    other.close()
    with pytest.raises(BadInput, match="closed"):
        graph.launch(other)


def test_a_plan_that_changes_later_does_not_change_what_was_noted(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    plan = rig.kernel("add").plan(stream, 1, 1, value, 1)
    with stream.capture() as graph:
        plan()
        plan.set(1, 10)
        plan()
    plan.set(1, 100)
    graph.launch(stream)
    assert rig.number(value, stream) == 11


def test_a_graph_keeps_what_it_needs(rig: Any) -> None:
    class Array(bytearray):
        pass

    stream = rig.device.stream()
    source = Array(b"\x07" * 64)
    target, back = rig.alloc(64, stream), bytearray(64)
    left = weakref.ref(source)
    with stream.capture() as graph:
        target.copy_from(source, stream=stream)
        target.copy_to(back, stream=stream)
    del source, target
    gc.collect()
    assert left() is not None
    graph.launch(stream)
    stream.synchronize()
    assert back == b"\x07" * 64
    graph.close()
    gc.collect()
    assert left() is None


def test_a_graph_that_is_closed_at_once_still_happens(rig: Any) -> None:
    stream = rig.device.stream()
    buffer = rig.alloc(1 << 16, stream)
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    source = bytearray(b"\x31" * (1 << 16))
    with stream.capture() as graph:
        buffer.copy_from(source, stream=stream)
        rig.kernel("add")(stream, 1, 1, value, 1)
    rig.slow(stream, 0.1)
    graph.launch(stream)
    graph.launch(stream)
    graph.close()
    del graph, source
    gc.collect()
    assert rig.read(buffer, stream) == b"\x31" * (1 << 16)
    assert rig.number(value, stream) == 2


def test_misuse_is_told_and_leaves_the_stream_usable(rig: Any) -> None:
    stream, other = rig.device.stream(), rig.device.stream()
    buffer, host = rig.alloc(64, stream), bytearray(64)
    far_buffer = rig.alloc(64, rig.other.stream())
    with stream.capture() as outer:
        for wrong in (
            lambda: stream.capture().__enter__(),
            lambda: rig.device.alloc(64, stream=stream),
            stream.synchronize,
            lambda: stream.done,
            stream.close,
            lambda: outer.launch(other),
            lambda: outer.set(0, 0, 0),
            lambda: buffer.copy_from(far_buffer, stream=stream),
            lambda: rig.kernel("add")(stream, 1, 1, buffer),
        ):
            with pytest.raises((BadInput, HalError)):
                wrong()
        buffer.fill(b"\x06", stream=stream)
    with stream.capture() as inner, pytest.raises(BadInput, match="another graph"):
        outer.launch(stream)
    inner.close()
    outer.launch(stream)
    buffer.copy_to(host, stream=stream)
    stream.synchronize()
    assert host == b"\x06" * 64
    outer.close()
    outer.close()
    for use in (lambda: outer.launch(stream), lambda: outer.set(0, 0, 0)):
        with pytest.raises(BadInput, match="closed"):
            use()


def test_a_capture_that_fails_makes_no_graph_and_the_stream_goes_on(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    kept: list[hal.Graph] = []

    def broken() -> None:
        with stream.capture() as graph:
            kept.append(graph)
            rig.kernel("add")(stream, 1, 1, value, 1)
            raise KeyError("the user's")

    with pytest.raises(KeyError):
        broken()
    with pytest.raises(BadInput, match="closed, or its capture failed"):
        kept[0].launch(stream)
    rig.kernel("add")(stream, 1, 1, value, 5)
    assert rig.number(value, stream) == 5


def test_a_closed_buffer_ends_a_graph(rig: Any) -> None:
    stream = rig.device.stream()
    value, keep = rig.alloc(4, stream), rig.alloc(4, stream)
    keep.fill(b"\0", stream=stream)
    with stream.capture() as graph:
        rig.kernel("add")(stream, 1, 1, keep, 1)
        value.fill(b"\0", stream=stream)
    value.close()
    with pytest.raises(BadInput, match="closed"):
        graph.launch(stream)
    assert rig.number(keep, stream) == 0


def test_memory_given_back_during_a_capture_waits_for_what_was_queued_before_it(rig: Any) -> None:
    home, stream = rig.device.stream(), rig.device.stream()
    pool = hal.Pool(hal.DriverMemory(rig.device))
    used = rig.alloc(4096, home, pool=pool)
    used.fill(b"\x01", stream=home)
    stream.wait(home)
    rig.slow(stream, 0.1)
    kept = rig.alloc(4096, stream)
    kept.copy_from(used, stream=stream)
    read = stream.record()
    mine = rig.alloc(3 << 20, stream, pool=pool)
    with stream.capture() as graph:
        used.close()
        mine.close()
        again = rig.alloc(4096, home, pool=pool)
        again.fill(b"\x02", stream=home)
        home.synchronize()
        assert read.done
        # What the capturing stream let go is nobody else's for now, and nothing breaks.
        other = rig.alloc(3 << 20, home, pool=pool)
        other.fill(b"\x03", stream=home)
        pool.trim()
        kept.view(0, 4).fill(b"\x09", stream=stream)
    graph.launch(stream)
    assert rig.read(kept, stream) == b"\x09" * 4 + b"\x01" * 4092


def test_events_in_a_capture(rig: Any) -> None:
    """A driver's own capture may fork to another stream and join; a list takes no events."""
    stream, side = rig.device.stream(), rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    stream.synchronize()
    if rig.driver == "cuda":
        with stream.capture() as graph:
            rig.kernel("add")(stream, 1, 1, value, 1)
            fork = stream.record()
            opened(rig.device).backend.stream_wait(side.handle, fork._handle)
            opened(rig.device).backend.fill(value.ptr, b"\x04", 1, side.handle)
            join = opened(rig.device).take_event()
            opened(rig.device).backend.event_record(join, side.handle)
            opened(rig.device).backend.stream_wait(stream.handle, join)
        graph.launch(stream)
        assert rig.number(value, stream) == 4
        return
    event = stream.record()
    with stream.capture() as graph:
        for wrong in (stream.record, lambda: stream.wait(event), lambda: stream.wait(side)):
            with pytest.raises(HalError) as caught:
                wrong()
            assert caught.value.code == "capturing"
        rig.kernel("add")(stream, 1, 1, value, 1)
    graph.launch(stream)
    assert rig.number(value, stream) == 1


def test_threads_launch_one_graph(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    with stream.capture() as graph:
        for _ in range(3):
            rig.kernel("add")(stream, 1, 1, value, 1)
    problems: list[BaseException] = []

    def launch() -> None:
        try:
            for _ in range(40):
                graph.launch(stream)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert rig.number(value, stream) == 3 * 3 * 40


def test_graphs_come_and_go(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    for _ in range(50):
        with stream.capture() as graph:
            rig.kernel("add")(stream, 1, 1, value, 1)
        graph.launch(stream)
    del graph
    gc.collect()
    assert rig.number(value, stream) == 50
    if rig.fake is not None:
        names = rig.fake.names()
        assert names.count("cuGraphExecDestroy") == names.count("cuStreamBeginCapture_v2") == 50
