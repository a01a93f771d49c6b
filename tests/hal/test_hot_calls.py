"""What C does by itself: graphs and events, the same as the way through Python, and never twice."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import hot
from drivetrain.hal.opened import opened

native = pytest.mark.skipif(hot.BACKEND != "native", reason="the twin has no C")


@pytest.fixture(params=["cpu", "cuda"])
def rig(request: pytest.FixtureRequest, rig_of: Callable[[str], Any]) -> Any:
    return rig_of(request.param)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that went through Python."""
    seen: list[str] = []
    for kind, name in ((hal.Graph, "_launch_from"), (hal.Stream, "_new_record")):
        real = getattr(kind, name)

        def call(self: Any, *arguments: Any, real: Any = real, name: str = name) -> Any:
            seen.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(kind, name, call)
    return seen


def captured(rig: Any, stream: hal.Stream, value: hal.Buffer) -> hal.Graph:
    with stream.capture() as graph:
        rig.kernel("add")(stream, 1, 1, value, 3)
        rig.kernel("times")(stream, 1, 1, value, 2)
    return graph


@native
def test_a_graph_is_launched_by_c(rig: Any, slow: list[str]) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    graph = captured(rig, stream, value)
    for _ in range(3):
        graph.launch(stream)
    assert slow == []
    assert rig.number(value, stream) == 42
    graph.set(0, 1, 5)
    graph.launch(stream)
    assert rig.number(value, stream) == 94
    assert slow == []


@native
def test_what_is_unusual_goes_through_python(rig: Any, slow: list[str]) -> None:
    stream, other = rig.device.stream(), rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    graph = captured(rig, stream, value)
    other.wait(stream)
    del slow[:]
    graph.launch(other)  # the buffer must be told of the stream
    graph.launch(other)
    assert slow == ["_launch_from"]
    with hal.profile():
        graph.launch(other)
    assert slow == ["_launch_from"] * 2
    assert rig.number(value, other) == 42
    with other.capture(), pytest.raises(BadInput, match="another graph"):
        graph.launch(other)
    value.close()
    with pytest.raises(BadInput, match="closed"):
        graph.launch(other)
    with pytest.raises(BadInput, match="takes a Stream"):
        graph.launch(3)  # type: ignore[arg-type]
    graph.close()
    with pytest.raises(BadInput, match="closed"):
        graph.launch(other)


@native
def test_a_new_buffer_of_a_graph_is_looked_at(rig: Any) -> None:
    stream = rig.device.stream()
    value, second = rig.alloc(4, stream), rig.alloc(4, stream)
    for each in (value, second):
        each.fill(b"\0", stream=stream)
    graph = captured(rig, stream, value)
    graph.set(0, 0, second)
    graph.set(1, 0, second)
    value.close()
    graph.launch(stream)
    assert rig.number(second, stream) == 6
    second.close()
    with pytest.raises(BadInput, match="closed"):
        graph.launch(stream)


COUNTING = """
#include <stdint.h>
static int calls, fails_at = -1;
int counted(void) { return calls; }
void fail_at(int n) { calls = 0; fails_at = n; }
int launch(void *f, const uint32_t g[3], const uint32_t b[3], uint32_t s, void *st, void **a) {
    if (calls == fails_at) return 7;
    calls++;
    return 0;
}
"""


@native
def test_a_launch_that_fails_in_the_middle_is_never_done_twice(
    rig_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "counting.c").write_text(COUNTING)
    path = tmp_path / "counting.so"
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "counting.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    rig = rig_of("cpu")
    found = opened(rig.device)
    address = ctypes.cast(library.launch, ctypes.c_void_p).value
    monkeypatch.setattr(found, "calls", (2, address, *found.calls[2:]))
    python: list[int] = []

    def launch(function: int, *_: Any) -> None:
        python.append(function)
        if len(python) == 2:
            raise HalError("told by the slow way", code="error")

    monkeypatch.setattr(found.backend, "launch", launch)
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    kernel = rig.kernel("add")
    plan = kernel.plan(stream, 1, 1, value, 1)
    with stream.capture() as graph:
        for _ in range(10):
            plan()
    library.fail_at(6)
    with pytest.raises(HalError, match="told by the slow way"):
        graph.launch(stream)
    assert library.counted() == 6  # by C, each once
    assert len(python) == 2  # the seventh, and the eighth, which failed there too


@native
def test_events_are_recorded_by_c_once_some_were_used(rig: Any, slow: list[str]) -> None:
    stream = rig.device.stream()
    if not opened(rig.device).calls[4]:
        pytest.skip("C cannot call this driver's record")
    stream.record()
    del slow[:]
    events = [stream.record() for _ in range(3)]
    assert len(slow) == 2  # two new ones had to be made
    del events
    del slow[:]
    for _ in range(1000):
        stream.record()
    assert slow == []
    event = stream.record()
    assert event.device is rig.device or event.device == rig.device
    event.synchronize()
    assert event.done
    stream.close()
    with pytest.raises(BadInput, match="closed"):
        stream.record()


def test_a_thousand_events_at_once_are_given_back(rig: Any) -> None:
    found = opened(rig.device)
    stream = rig.device.stream()
    events = [stream.record() for _ in range(1000)]
    assert len({event._handle for event in events}) == 1000
    stream.synchronize()
    del events
    gc.collect()
    free = found.free_events("timing" in found.backend.groups)
    assert 0 < len(free) <= 256
    assert len(set(free)) == len(free)


def test_an_event_outlives_its_device(rig: Any) -> None:
    stream = rig.device.stream()
    event = stream.record()
    hal.close_all()
    del stream
    del event
    gc.collect()


def test_a_structure_goes_as_bytes_or_as_any_buffer_of_its_length() -> None:
    """By C where it is bytes, through Python where it is not; never one of another length."""
    source = hal.Source.cuda(
        "struct Two { long long n[2]; };\n"
        'extern "C" __global__ void put(long long *out, Two w, int i) { out[i] = w.n[0] - w.n[1]; }'
    )
    device = hal.device("cpu:0")
    stream = device.stream()
    out = device.alloc(24, stream=stream)
    kernel = device.compile(source).kernel("put")
    packed = (7).to_bytes(8, "little") + (2).to_bytes(8, "little")
    for place, given in enumerate((packed, bytearray(packed), memoryview(packed))):
        kernel(stream, 1, 1, out, given, place)
    for wrong in (packed[:8], packed + b"\0", "text", 3):
        with pytest.raises(BadInput, match="argument 1"):
            kernel(stream, 1, 1, out, wrong, 0)
    found = bytearray(24)
    out.copy_to(found, stream=stream)
    stream.synchronize(60)
    assert list(memoryview(found).cast("q")) == [5, 5, 5]


def test_plans_queued_together_do_what_they_do_one_by_one(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    add = rig.kernel("add").plan(stream, 1, 1, value, 3)
    times = rig.kernel("times").plan(stream, 1, 1, value, 2)
    for plans in ([add, times, add], (add, times, add), iter((add, times, add))):
        value.fill(b"\0", stream=stream)
        hal.launch_all(plans)
        assert rig.number(value, stream) == 9
    hal.launch_all([])
    add.set(1, 5)
    hal.launch_all([add])
    assert rig.number(value, stream) == 14


def test_what_is_no_plan_is_refused_before_anything_is_queued(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    add = rig.kernel("add").plan(stream, 1, 1, value, 3)
    wrong: tuple[Any, ...] = ([add, None], [add, rig.kernel("add")], add, 7, None, "ab")
    for plans in wrong:
        with pytest.raises(BadInput, match="launch_all takes plans"):
            hal.launch_all(plans)
    assert rig.number(value, stream) == 0

    def broken() -> Any:
        yield add
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hal.launch_all(broken())
    assert rig.number(value, stream) == 0


def test_a_plan_of_a_closed_buffer_ends_what_is_queued_together(rig: Any) -> None:
    stream = rig.device.stream()
    value, gone = rig.alloc(4, stream), rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    add = rig.kernel("add").plan(stream, 1, 1, value, 3)
    of_gone = rig.kernel("add").plan(stream, 1, 1, gone, 3)
    gone.close()
    with pytest.raises(BadInput, match="closed"):
        hal.launch_all([add, of_gone, add])
    assert rig.number(value, stream) == 3
