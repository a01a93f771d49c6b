"""One call copies between any two devices: peers, host memory, staged; also between drivers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, HalError, Timeout
from drivetrain.hal import MemoryKind, copies
from drivetrain.hal.opened import opened

PAIRS = [
    ("cpu", "cpu"),
    ("simulated", "simulated"),
    ("cuda", "cuda"),
    ("cpu", "simulated"),
    ("simulated", "cpu"),
    ("cpu", "cuda"),
    ("cuda", "cpu"),
    ("cuda", "simulated"),
]
SIZES = [1, 300_001, copies.CHUNK_BYTES + 7]


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(pair))
def pair(request: pytest.FixtureRequest, rig_of: Callable[[str], Any]) -> Any:
    """(rig of the source, its device, rig of the target, its device)"""
    one, two = request.param
    first = rig_of(one)
    if one == two:
        return first, first.device, first, first.other
    second = rig_of(two)
    return first, first.device, second, second.device


@pytest.mark.parametrize("stream_of", ["source", "target"])
def test_one_line_copies_between_any_two_devices(pair: Any, stream_of: str) -> None:
    here, source, _, target = pair
    near, far = source.stream(), target.stream()
    stream = near if stream_of == "source" else far
    for nbytes in SIZES:
        data = random.Random(nbytes).randbytes(nbytes)
        a = source.alloc(nbytes, stream=near)
        b = target.alloc(nbytes + 100, stream=far)
        b.fill(b"\xee", stream=far)
        a.copy_from(data, stream=near)
        near.synchronize() if stream is far else far.synchronize()
        b.copy_from(a, stream=stream)
        stream.synchronize()
        assert here.read(b, far) == data + b"\xee" * 100
        a.copy_to(b.view(0, nbytes), stream=stream)
        stream.synchronize()
        a.close()
        b.close()


def test_a_copy_is_in_the_order_of_its_stream(pair: Any) -> None:
    here, source, there, target = pair
    near, far = source.stream(), target.stream()
    a, b = source.alloc(1 << 16, stream=near), target.alloc(1 << 16, stream=far)
    b.fill(b"\0", stream=far)
    far.synchronize()
    here.slow(near, 0.05)
    a.fill(b"\x11", stream=near)
    b.copy_from(a, stream=near)
    a.fill(b"\x22", stream=near)
    near.synchronize()
    assert there.read(b, far) == b"\x11" * (1 << 16)
    assert here.read(a, near) == b"\x22" * (1 << 16)


def test_both_memories_wait_for_the_copy_before_they_are_used_again(pair: Any) -> None:
    here, source, there, target = pair
    near, far = source.stream(), target.stream()
    nbytes = 3 << 20
    for _ in range(3):
        a, b = source.alloc(nbytes, stream=near), target.alloc(nbytes, stream=far)
        a.fill(b"\x33", stream=near)
        far.wait(near)
        there.slow(far, 0.03)
        b.copy_from(a, stream=far)
        a.close()
        again = source.alloc(nbytes, stream=near)
        again.fill(b"\x44", stream=near)
        near.synchronize()
        assert here.read(b, far) == b"\x33" * nbytes
        b.close()
        again.close()


def test_host_memory_of_one_device_is_copied_straight_to_the_other(pair: Any) -> None:
    here, source, there, target = pair
    near, far = source.stream(), target.stream()
    for kind in (MemoryKind.PINNED, MemoryKind.MANAGED):
        a = source.alloc(100_000, stream=near, kind=kind)
        b = target.alloc(100_000, stream=far)
        a.fill(b"\x55", stream=near)
        far.wait(near)
        b.copy_from(a, stream=far)
        a.close()
        assert there.read(b, far) == b"\x55" * 100_000
        c = source.alloc(100_000, stream=near, kind=kind)
        b.copy_to(c, stream=far)
        b.close()
        far.synchronize()
        assert here.read(c, near) == b"\x55" * 100_000


def test_within_a_device_every_pair_of_kinds_is_copied(rig: Any) -> None:
    stream = rig.device.stream()
    for one in MemoryKind:
        for two in MemoryKind:
            a, b = rig.alloc(5000, stream, kind=one), rig.alloc(5000, stream, kind=two)
            a.fill(b"\x66", stream=stream)
            b.copy_from(a, stream=stream)
            assert rig.read(b, stream) == b"\x66" * 5000


def test_the_calls_that_are_refused(pair: Any) -> None:
    _, source, _, target = pair
    near, far = source.stream(), target.stream()
    a, b = source.alloc(64, stream=near), target.alloc(32, stream=far)
    closed = source.alloc(64, stream=near)
    closed.close()
    third = hal.device("cpu:0").stream() if source.driver != "cpu" else None
    with pytest.raises(BadInput, match="do not fit"):
        b.copy_from(a, stream=near)
    with pytest.raises(BadInput, match="closed"):
        b.copy_from(closed, stream=near)
    with pytest.raises(BadInput, match="closed"):
        closed.copy_from(b, stream=far)
    with pytest.raises(BadInput):
        a.copy_from(b, stream=None)
    if third is not None and target.driver != "cpu":
        with pytest.raises(BadInput, match="stream is on cpu:0"):
            a.copy_from(b, stream=third)


@given(
    nbytes=st.integers(1, 3 * copies.CHUNK_BYTES),
    offset=st.integers(0, 5000),
    seed=st.integers(0, 9),
)
@settings(max_examples=8)
def test_any_range_arrives_whole_through_the_staging(nbytes: int, offset: int, seed: int) -> None:
    """cpu -> simulated -> cpu."""
    import os

    os.environ["DRIVETRAIN_SIMULATED"] = "count=1"
    hal.registry.refresh()
    try:
        cpu, simulated = hal.device("cpu:0"), hal.device("simulated:0")
        near, far = cpu.stream(), simulated.stream()
        data = random.Random(seed).randbytes(nbytes)
        a = cpu.alloc(nbytes + offset, stream=near)
        b = simulated.alloc(nbytes + offset, stream=far)
        c = cpu.alloc(nbytes, stream=near)
        a.view(offset, nbytes).copy_from(data, stream=near)
        near.synchronize()
        b.view(offset, nbytes).copy_from(a.view(offset, nbytes), stream=far)
        far.synchronize()
        c.copy_from(b.view(offset, nbytes), stream=near)
        back = bytearray(nbytes)
        c.copy_to(back, stream=near)
        near.synchronize()
        assert back == data
    finally:
        del os.environ["DRIVETRAIN_SIMULATED"]
        hal.registry.refresh()


def test_both_legs_of_a_staged_copy_overlap(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk enters the target before the last one has left the source: told by the order of the
    commands, not by a clock."""
    cpu, simulated = rig_of("cpu"), rig_of("simulated")
    near, far = cpu.device.stream(), simulated.device.stream()
    nbytes = 8 * copies.CHUNK_BYTES
    a, b = cpu.device.alloc(nbytes, stream=near), simulated.device.alloc(nbytes, stream=far)
    order: list[str] = []
    sizes: dict[str, list[int]] = {"out": [], "in": []}
    for name, device in (("out", cpu.device), ("in", simulated.device)):
        backend = opened(device).backend
        real = backend.copy

        def copy(*arguments: Any, name: str = name, real: Any = real) -> None:
            order.append(name)
            sizes[name].append(arguments[2])
            real(*arguments)

        monkeypatch.setattr(backend, "copy", copy)
    b.copy_from(a, stream=far)
    far.synchronize()
    assert sizes["out"] == sizes["in"] == [copies.CHUNK_BYTES] * 8
    assert order.index("in") < len(order) - 1 - order[::-1].index("out")
    assert order[:2] == ["out", "out"]  # the second chunk leaves while the first one enters


def test_a_copy_that_fails_midway_leaves_the_staging_right(rig_of: Callable[[str], Any]) -> None:
    cpu, simulated = rig_of("cpu"), rig_of("simulated")
    near, far = cpu.device.stream(), simulated.device.stream()
    nbytes = 6 * copies.CHUNK_BYTES
    a, b = cpu.device.alloc(nbytes, stream=near), simulated.device.alloc(nbytes, stream=far)
    a.fill(b"\x01", stream=near)
    near.synchronize()
    for nth in (1, 2, 4):
        opened(simulated.device).backend.inject(f"copy:{nth}:error")  # type: ignore[attr-defined]
        with pytest.raises(HalError, match="injected"):
            b.copy_from(a, stream=far)
    data = random.Random(7).randbytes(nbytes)
    a.copy_from(data, stream=near)
    near.synchronize()
    b.copy_from(a, stream=far)
    assert simulated.read(b, far) == data


def test_a_copy_whose_wait_ends_early_is_a_timeout(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, simulated = rig_of("cpu"), rig_of("simulated")
    near, far = cpu.device.stream(), simulated.device.stream()
    a = cpu.device.alloc(1 << 16, stream=near)
    b = simulated.device.alloc(1 << 16, stream=far)
    release = simulated.hold(far)
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.05")
    with pytest.raises(Timeout):
        b.copy_from(a, stream=far)
    monkeypatch.delenv("DRIVETRAIN_WAIT_LIMIT_S")
    release()
    a.fill(b"\x09", stream=near)
    near.synchronize()
    b.copy_from(a, stream=far)
    assert simulated.read(b, far) == b"\x09" * (1 << 16)


def test_peers_are_asked_once_and_copied_without_the_host(rig_of: Callable[[str], Any]) -> None:
    rig = rig_of("cuda")
    near, far = rig.device.stream(), rig.other.stream()
    a, b = rig.alloc(1 << 20, near), rig.alloc(1 << 20, far)
    a.fill(b"\x0a", stream=near)
    near.synchronize()
    rig.fake.forget()
    b.copy_from(a, stream=far)
    b.copy_from(a, stream=far)
    far.synchronize()
    names = rig.fake.names()
    assert names.count("cuCtxEnablePeerAccess") == 2  # read by one, written by the other
    assert names.count("cuMemcpyPeerAsync") == 2
    assert not any("toH" in name or "Hto" in name for name in names)
    assert rig.read(b, far) == b"\x0a" * (1 << 20)


@pytest.mark.parametrize("nbytes", [1 << 12, 1 << 21])
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_peers_copy_comes_in_the_order_of_the_callers_stream(
    rig_of: Callable[[str], Any], nbytes: int, side: str
) -> None:
    """Short ones are read by the target, long ones written by the source."""
    rig = rig_of("cuda")
    near, far = rig.device.stream(), rig.other.stream()
    a, b = rig.alloc(nbytes, near), rig.alloc(nbytes, far)
    stream, held = (near, near) if side == "near" else (far, far)
    a.fill(b"\x01", stream=near)
    near.synchronize()
    release = rig.hold(held)
    if side == "near":
        a.fill(b"\x02", stream=near)  # before the copy
    b.copy_from(a, stream=stream)
    if side == "far":
        b.fill(b"\x03", stream=far)  # after the copy
    release()
    stream.synchronize()
    wanted = b"\x02" if side == "near" else b"\x03"
    assert rig.read(b, stream if side == "far" else rig.other.stream()) == wanted * nbytes


def test_devices_that_are_no_peers_are_staged(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=pinned+compute")
    near, far = rig.device.stream(), rig.other.stream()
    assert not copies.direct(opened(rig.device), opened(rig.other))
    a, b = rig.alloc(3 << 20, near), rig.alloc(3 << 20, far)
    a.fill(b"\x0b", stream=near)
    b.copy_from(a, stream=near)
    near.synchronize()
    assert rig.read(b, far) == b"\x0b" * (3 << 20)


def test_without_pinned_memory_on_either_side_there_is_no_way_and_it_is_said(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=none")
    near, far = rig.device.stream(), rig.other.stream()
    a, b = rig.alloc(64, near), rig.alloc(64, far)
    with pytest.raises(BadInput, match="pinned"):
        b.copy_from(a, stream=far)


@pytest.fixture
def opencl() -> hal.Device:
    found = hal.devices("opencl", all_routes=True)
    if not found:
        pytest.skip("there is no OpenCL device")
    return found[0]


def test_copies_go_to_and_from_opencl(opencl: hal.Device, rig_of: Callable[[str], Any]) -> None:
    for driver in ("cpu", "simulated", "cuda"):
        other = rig_of(driver).device
        near, far = other.stream(), opencl.stream()
        for nbytes in SIZES:
            data = random.Random(nbytes).randbytes(nbytes)
            a, b = other.alloc(nbytes, stream=near), opencl.alloc(nbytes, stream=far)
            c = other.alloc(nbytes, stream=near)
            a.copy_from(data, stream=near)
            far.wait(near)
            b.copy_from(a, stream=far)
            near.wait(far)
            c.copy_from(b, stream=near)
            back = bytearray(nbytes)
            c.copy_to(back, stream=near)
            near.synchronize()
            assert back == data
        hal.close_all()
