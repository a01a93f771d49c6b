"""The hip driver over a fake libamdhip64: who calls what when, and ROCm of several ages. The fake
shows order and errors; it shows nothing about results. Faults: see `test_every_fault`."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import HANG, Fake

from drivetrain.errors import (
    CompileError,
    DeviceLost,
    DriverMissing,
    HalError,
    OutOfMemory,
    Unsupported,
)
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.driver import LaunchAbi
from drivetrain.hal.drivers import cuda_like, hip_backend
from drivetrain.hal.drivers.hip_api import FUNCTIONS, HipApi
from drivetrain.hal.drivers.hip_backend import GROUPS, HipBackend
from drivetrain.hal.kinds import Kind, Way

Make = Callable[..., HipBackend]
GROUP_OF = {row.name: row.group for row in FUNCTIONS}


def info(index: int = 0) -> DeviceInfo:
    return DeviceInfo("hip", index, "fake", "amd", f"GPU-fa4e{index:012x}")


@pytest.fixture
def fake(fake_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return new(fake_library("fake_hip.c"), tmp_path)


_number = itertools.count()


def new(path: Path, folder: Path) -> Fake:
    """A copy of the library, as if it were in a process of its own."""
    copy = folder / f"{next(_number)}-{path.name}"  # the loader goes by its name
    copy.write_bytes(path.read_bytes())
    return Fake(copy)


@pytest.fixture
def make(fake: Fake) -> Iterator[Make]:
    made: list[tuple[Fake, HipBackend]] = []

    def build(index: int = 0, library: Fake = fake) -> HipBackend:
        made.append((library, HipBackend(info(index), HipApi(library))))
        return made[-1][1]

    yield build
    for library, backend in made:
        library.forgive()
        backend.close()


def launch(backend: HipBackend, code: bytes, name: str, stream: int, *values: int) -> None:
    function = backend.function(backend.module_load(code, "hsaco"), name)
    boxes = [ctypes.c_uint64(value) for value in values]
    table = (ctypes.c_void_p * max(1, len(boxes)))(*(ctypes.addressof(box) for box in boxes))
    at = ctypes.addressof(table)
    backend.launch(function, (1, 1, 1), (1, 1, 1), 0, stream, at, [8] * len(boxes))


def read(backend: HipBackend, ptr: int, stream: int, nbytes: int = 4) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, 10)
    return back.raw


def script(backend: HipBackend, other: HipBackend, code: bytes) -> Iterator[str]:
    """Uses each group once, a step at a time; nothing is left over at its end."""
    stream = backend.stream_create(0)
    yield "stream"
    for kind in Kind:
        if kind is Kind.DEVICE or kind.name.lower() in backend.groups:
            ptr = backend.alloc(4096, kind, stream)
            for pattern in (b"\1", b"ab", b"abcd", bytes(range(16))):
                backend.fill(ptr, pattern, 4096 // len(pattern), stream)
            assert read(backend, ptr, stream, 16) == bytes(range(16))
            source = ctypes.create_string_buffer(b"\x22" * 16, 16)
            at = ctypes.addressof(source)
            backend.copy(ptr, at, 16, Way.HOST_TO_DEVICE, stream, True)
            backend.copy(ptr + 64, ptr, 16, Way.DEVICE_TO_DEVICE, stream, False)
            assert read(backend, ptr + 64, stream, 16) == b"\x22" * 16
            backend.free(ptr, kind, stream)
            yield kind.name
    assert backend.memory()[1] == 1 << 30
    start, end = backend.event_create(True), backend.event_create(True)
    for event in (start, end):
        backend.event_record(event, stream)
    backend.stream_wait(stream, end)
    assert backend.event_synchronize(end, 10)
    if "timing" in backend.groups:
        assert backend.event_seconds(start, end) >= 0
    for event in (start, end):
        assert backend.event_synchronize(event, 10)
        backend.event_destroy(event)
    yield "events"
    if "compute" in backend.groups:
        value = backend.alloc(4, Kind.DEVICE, stream)
        backend.fill(value, b"\0", 4, stream)
        module = backend.module_load(code, "hsaco")
        function = backend.function(module, "add")
        assert backend.function_facts(function).threads == 1024
        boxes = [ctypes.c_uint64(value), ctypes.c_uint64(3)]
        table = (ctypes.c_void_p * 2)(*(ctypes.addressof(box) for box in boxes))
        at, one = ctypes.addressof(table), (1, 1, 1)
        backend.launch(function, one, one, 0, stream, at, (-8, 4))
        assert int.from_bytes(read(backend, value, stream), "little") == 3
        yield "compute"
        if "graphs" in backend.groups:
            backend.graph_begin(stream)
            backend.launch(function, one, one, 0, stream, at, (-8, 4))
            graph = backend.graph_end(stream)
            backend.graph_launch(graph, stream)
            boxes[1].value = 100
            backend.graph_set(graph, 0, function, one, one, 0, at, (-8, 4))
            backend.graph_launch(graph, stream)
            assert int.from_bytes(read(backend, value, stream), "little") == 106
            backend.graph_destroy(graph)
            yield "graphs"
        backend.module_unload(module)
        backend.free(value, Kind.DEVICE, stream)
    if "peer" in backend.groups:
        beyond = other.stream_create(0)
        far = other.alloc(4096, Kind.DEVICE, beyond)
        assert backend.peer_enable(other)
        near = backend.alloc(4096, Kind.DEVICE, stream)
        backend.copy_peer(near, far, 4096, other, stream)
        assert backend.stream_synchronize(stream, 10)
        backend.free(near, Kind.DEVICE, stream)
        other.free(far, Kind.DEVICE, beyond)
        assert other.synchronize(10)
        other.stream_destroy(beyond)
        yield "peer"
    assert backend.synchronize(10)
    assert backend.stream_synchronize(stream, 10)
    backend.stream_destroy(stream)
    yield "end"


# -- what it is, and the age of ROCm ---------------------------------------------------------------


def test_a_device_tells_what_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()
    assert backend.groups == GROUPS
    assert backend.target.kind == "hip"
    assert backend.target.arch == "gfx90a:sramecc+:xnack-"
    assert backend.target.version == "7.1.25424"
    assert "wave64" in backend.target.features
    assert backend.limits.shared_bytes == 65536
    # HIP counts a side of a grid in threads, with 32 bits.
    assert backend.limits.grid[0] * backend.limits.threads < 1 << 32
    assert backend.calls().abi is LaunchAbi.CUDA
    monkeypatch.setenv("FAKE_HIP_WAVE", "32")
    assert "wave32" in make(1).target.features


def test_all_groups_work_in_rocm_7(make: Make, fake: Fake, fake_object: bytes) -> None:
    fake.log()
    assert [*script(make(0), make(1), fake_object)][-1] == "end"
    used = set(fake.names())
    assert {"hipGetDevicePropertiesR0600", "hipMemsetD2D32Async", "hipMallocAsync"} <= used
    assert not {"hipGetDeviceProperties", "hipMemset2DAsync"} & used
    assert not any("Ctx" in name for name in used - {"hipCtxSetCurrent"})


def test_all_groups_work_in_rocm_5_7(
    make: Make, fake_library: Any, tmp_path: Path, fake_object: bytes
) -> None:
    """No R0600 symbols, and the smaller hipDeviceProp_t."""
    library = new(fake_library("fake_hip.c", defines="-DR0000"), tmp_path)
    library.log()
    backend = make(0, library)
    assert backend.groups == GROUPS
    assert backend.target.arch == "gfx90a:sramecc+:xnack-"
    assert [*script(backend, make(1, library), fake_object)][-1] == "end"
    used = set(library.names())
    assert {"hipGetDeviceProperties", "hipMemset2DAsync"} <= used


@pytest.mark.parametrize("name", sorted(GROUP_OF))
def test_a_symbol_that_is_missing_turns_one_capability_off(
    fake: Fake, fake_object: bytes, name: str
) -> None:
    fake.refused |= {row.symbol for row in FUNCTIONS if row.name == name}
    group = GROUP_OF[name]
    if not group:
        with pytest.raises(HalError, match="libamdhip64 has no hip") as caught:
            HipApi(fake)
        assert caught.value.code == "broken"
        return
    api = HipApi(fake)
    assert api.off == {group, "context_event"}
    with pytest.raises(Unsupported):
        getattr(api, name)
    backend, other = HipBackend(info(0), api), HipBackend(info(1), api)
    assert backend.groups == GROUPS - {group}
    assert [*script(backend, other, fake_object)][-1] == "end"
    backend.calls()
    other.close()
    backend.close()
    assert (fake.live(), fake.things()) == (0, 0)


def test_a_structure_that_is_not_known_is_searched(make: Make, fake: Fake) -> None:
    api = HipApi(fake)
    hip_backend.initialised(api)
    fake.refused.add("hipGetDevicePropertiesR0600")
    mixed = HipApi(fake)
    mixed.symbols["cudaGetDeviceProperties"] = "hipGetDevicePropertiesR0600"  # it is the other one
    assert mixed.architecture(0) == api.architecture(0) == "gfx90a:sramecc+:xnack-"


# -- which device ----------------------------------------------------------------------------------


def test_a_device_is_found_by_its_uuid_or_its_place(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HIP_DEVICES", "4")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", f"{info(3).uuid},{info(1).uuid}")
    api = HipApi(fake)
    hip_backend.initialised(api)
    assert hip_backend.device_of(api, info(3)) == 0
    assert hip_backend.device_of(api, info(1)) == 1
    place = DeviceInfo("hip", 1, "old card", "amd", "PCI-0000:f1:00.0")
    assert hip_backend.device_of(api, place) == 1
    with pytest.raises(HalError, match="ROCR_VISIBLE_DEVICES") as caught:
        hip_backend.device_of(api, info(0))
    assert caught.value.code == "not_visible"


def test_no_device_and_a_library_that_fails_are_two_answers(
    fake_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_library("fake_hip.c")
    library = new(path, tmp_path)
    library.fail("hipInit", 3)
    with pytest.raises(HalError) as broken:
        HipBackend(info(0), HipApi(library))
    assert not isinstance(broken.value, DriverMissing)
    assert (broken.value.code, broken.value.native, broken.value.op) == ("broken", 3, "hipInit")
    monkeypatch.setenv("FAKE_HIP_DEVICES", "0")
    with pytest.raises(DriverMissing) as caught:
        HipBackend(info(0), HipApi(new(path, tmp_path)))
    assert caught.value.code == "no_device"


def test_the_device_that_somebody_selected_is_found_as_it_was(
    make: Make, fake: Fake, fake_object: bytes
) -> None:
    backend, other = make(0), make(1)
    current = ctypes.c_int()
    for theirs in (1, 0):
        assert fake.library.hipSetDevice(theirs) == 0
        for _ in script(backend, other, fake_object):
            fake.library.hipGetDevice(ctypes.byref(current))
            assert current.value == theirs
    fake.library.hipSetDevice(1)
    fake.fail("hipMalloc", 801, 0)
    fake.fail("hipMallocAsync", 801, 0)
    stream = backend.stream_create(0)
    with pytest.raises(Unsupported):
        backend.alloc(64, Kind.DEVICE, stream)
    fake.library.hipGetDevice(ctypes.byref(current))
    assert current.value == 1


def test_our_failures_are_not_left_as_the_threads_last_error(
    make: Make, fake: Fake, fake_object: bytes
) -> None:
    """torch looks at it after launches of its own."""
    backend = make()
    stream = backend.stream_create(0)
    gate = ctypes.c_int32(0)
    launch(backend, fake_object, "hold", stream, ctypes.addressof(gate))
    assert not backend.stream_done(stream)
    gate.value = 1
    with pytest.raises(OutOfMemory):
        backend.alloc(2 << 30, Kind.DEVICE, stream)
    with pytest.raises(CompileError):
        backend.module_load(b"\x7fELF" + b"\0" * 100, "hsaco")
    assert fake.library.fake_last_error() == 0


# -- memory ----------------------------------------------------------------------------------------


def test_a_source_that_may_be_reused_is_waited_for(
    make: Make, fake: Fake, fake_object: bytes
) -> None:
    """HIP does not promise to copy pageable memory aside, and the fake does not."""
    backend = make()
    stream = backend.stream_create(0)
    target = backend.alloc(4096, Kind.DEVICE, stream)
    gate = ctypes.c_int32(0)
    launch(backend, fake_object, "hold", stream, ctypes.addressof(gate))
    source = ctypes.create_string_buffer(b"\x22" * 4096, 4096)
    timer = threading.Timer(0.1, lambda: setattr(gate, "value", 1))
    timer.start()
    backend.copy(target, ctypes.addressof(source), 4096, Way.HOST_TO_DEVICE, stream, True)
    ctypes.memset(source, 0x33, 4096)
    assert gate.value == 1
    assert read(backend, target, stream, 4096) == b"\x22" * 4096


def test_code_that_the_library_does_not_take(make: Make) -> None:
    backend = make()
    for code, form, error in (
        (b"nonsense", "hsaco", CompileError),
        (b"\x7fELF" + b"\0" * 80, "hsaco", CompileError),
        (b".version 7", "ptx", Unsupported),
    ):
        with pytest.raises(error):
            backend.module_load(code, form)


# -- faults ----------------------------------------------------------------------------------------


def test_a_wait_for_a_device_that_hangs_ends_at_its_limit(
    make: Make, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_like, "_CLOSE_WAIT_S", 0.05)
    backend = make()
    backend.stream_create(0)
    fake.fail("hipDeviceSynchronize", HANG, 0)
    assert not backend.synchronize(0.05)
    backend.close()  # nor does the end wait
    fake.forgive()


def test_a_lost_device_stays_lost_and_tells_why(make: Make, fake: Fake, fake_object: bytes) -> None:
    backend = make()
    stream = backend.stream_create(0)
    launch(backend, fake_object, "fails", stream)
    with pytest.raises(DeviceLost) as caught:
        backend.stream_synchronize(stream, 10)
    assert (caught.value.native, caught.value.code) == (700, "lost")
    for use in (
        backend.memory,
        lambda: backend.alloc(64, Kind.DEVICE, stream),
        lambda: backend.synchronize(1),
        lambda: backend.graph_begin(stream),
    ):
        with pytest.raises(DeviceLost, match="lost to this process earlier") as again:
            use()
        assert again.value.native == 700
