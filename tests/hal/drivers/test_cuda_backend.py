"""The cuda driver over a fake libcuda: who calls what when, faults, and drivers of 2020.

The fake shows order and errors; it shows nothing about results (see tests marked ``gpu``).
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import (
    CompileError,
    DeviceLost,
    DriverMissing,
    HalError,
    OutOfMemory,
    Timeout,
    Unsupported,
)
from drivetrain.hal.conformance.running import evidence_of
from drivetrain.hal.driver import LaunchAbi
from drivetrain.hal.drivers import cuda_api, cuda_graphs, cuda_ipc
from drivetrain.hal.drivers.cuda_api import FUNCTIONS, Api, Code
from drivetrain.hal.drivers.cuda_backend import GROUPS, CudaBackend
from drivetrain.hal.kinds import Kind, Way

PTX = b"""
.version 6.4
.target sm_50
.visible .entry add(.param .u64 p, .param .u32 v) {}
.visible .entry store(.param .u64 p, .param .u32 v) {}
.visible .entry hold(.param .u64 unused) {}
.visible .entry stray(.param .u64 unused) {}
.visible .entry claim(.param .u64 unused) {}
"""

Make = Callable[..., CudaBackend]


@pytest.fixture
def make(fake: Any, cuda_info: Any) -> Any:
    made: list[CudaBackend] = []

    def new(index: int = 0, library: Any = fake) -> CudaBackend:
        made.append(CudaBackend(cuda_info(index), Api(library)))
        return made[-1]

    yield new
    fake.release()
    for backend in made:
        backend.close()


def launch(backend: CudaBackend, name: str, stream: int, *values: int) -> None:
    function = backend.function(backend.module_load(PTX, "ptx"), name)
    boxes = [ctypes.c_uint64(value) for value in values or (0,)]
    table = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
    at = ctypes.addressof(table)
    backend.launch(function, (1, 1, 1), (1, 1, 1), 0, stream, at, [8] * len(boxes))


def read(backend: CudaBackend, ptr: int, stream: int, nbytes: int = 4) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, 10)
    return back.raw


# -- what it is ------------------------------------------------------------------------------------


def test_a_device_tells_what_it_is(make: Make) -> None:
    backend = make()
    assert backend.groups == frozenset(GROUPS)
    assert backend.target.kind == "cuda"
    assert backend.target.arch == "sm_90"
    assert backend.target.version == "13.0"
    assert {"fp64", "bf16"} <= set(backend.target.features)
    assert backend.limits.grid == (2147483647, 65535, 65535)
    assert backend.limits.shared_bytes == 232448
    assert backend.calls().abi is LaunchAbi.CUDA
    free, total = backend.memory()
    assert 0 < free <= total == 1 << 30


def test_managed_memory_needs_a_host_that_may_touch_it_meanwhile(make: Make, fake: Any) -> None:
    fake.library.fake_attribute_off(89)
    assert "managed" not in make().groups


@pytest.mark.parametrize("attribute", [97, 115])
def test_an_attribute_that_a_driver_does_not_know_is_0(
    make: Make, fake: Any, attribute: int
) -> None:
    fake.library.fake_attribute_off(attribute)
    backend = make()
    stream = backend.stream_create(0)
    backend.free(backend.alloc(64, Kind.DEVICE, stream), Kind.DEVICE, stream)
    assert backend.limits.shared_bytes == (49152 if attribute == 97 else 232448)


# -- the library and its age -----------------------------------------------------------------------


def everything(make: Make, library: Any) -> CudaBackend:
    """Uses each group once, on a backend of that library."""
    backend, other = make(0, library), make(1, library)
    stream = backend.stream_create(0)
    for kind in Kind:
        if kind is Kind.DEVICE or kind.name.lower() in backend.groups:
            ptr = backend.alloc(4096, kind, stream)
            backend.fill(ptr, bytes(range(16)), 256, stream)
            assert read(backend, ptr, stream, 16) == bytes(range(16))
            backend.free(ptr, kind, stream)
    start, end = backend.event_create(True), backend.event_create(True)
    for event in (start, end):
        backend.event_record(event, stream)
    assert backend.event_synchronize(end, 10)
    assert backend.event_seconds(start, end) >= 0
    value = backend.alloc(4, Kind.DEVICE, stream)
    function = backend.function(backend.module_load(PTX, "ptx"), "add")
    backend.function_arguments(function, (-8, 4))
    backend.fill(value, b"\0", 4, stream)
    launch(backend, "add", stream, value, 3)
    backend.graph_begin(stream)
    launch(backend, "add", stream, value, 5)
    graph = backend.graph_end(stream)
    backend.graph_launch(graph, stream)
    boxes = [ctypes.c_uint64(value), ctypes.c_uint64(100)]
    table = (ctypes.c_void_p * 2)(*(ctypes.addressof(box) for box in boxes))
    node = next(iter(backend._graphs._graphs[graph].kernels))
    assert node
    backend.graph_set(graph, 0, function, (1, 1, 1), (1, 1, 1), 0, ctypes.addressof(table), (-8, 4))
    backend.graph_launch(graph, stream)
    assert int.from_bytes(read(backend, value, stream), "little") == 108
    backend.graph_destroy(graph)
    far = other.alloc(4096, Kind.DEVICE, other.stream_create(0))
    assert backend.peer_enable(other)
    assert backend.peer_enable(other)  # it was on already
    near = backend.alloc(4096, Kind.DEVICE, stream)
    backend.copy_peer(near, far, 4096, other, stream)
    assert backend.synchronize(10)
    return backend


def test_a_driver_of_11_0_serves_every_group(make: Make, fake: Any) -> None:
    backend = everything(make, fake.older(11000))
    assert backend.groups == frozenset(GROUPS)
    assert backend.target.version == "11.0"
    used = set(fake.names())
    newer = {row.symbol for row in FUNCTIONS if row.since > 11000}
    assert newer
    assert not used & newer
    assert {"cuMemAlloc_v2", "cuMemFree_v2", "cuCtxSynchronize", "cuGraphInstantiate_v2"} <= used
    assert "cuGraphExecKernelNodeSetParams" in used


def test_a_driver_of_today_is_used_as_such(make: Make, fake: Any) -> None:
    everything(make, fake)
    used = set(fake.names())
    assert {"cuMemAllocAsync", "cuMemFreeAsync", "cuCtxRecordEvent", "cuFuncLoad"} <= used
    assert {"cuGraphInstantiateWithFlags", "cuGraphExecKernelNodeSetParams_v2"} <= used
    assert not {"cuMemAlloc_v2", "cuCtxSynchronize", "cuGraphInstantiate_v2"} & used


@pytest.mark.parametrize("version", sorted({row.since for row in FUNCTIONS if row.since > 11000}))
def test_every_age_between_serves_every_group(make: Make, fake: Any, version: int) -> None:
    assert everything(make, fake.older(version - 10)).groups == frozenset(GROUPS)


GROUP_OF = {row.name: row.group for row in FUNCTIONS}


@pytest.mark.parametrize("name", sorted(GROUP_OF))
def test_a_symbol_that_is_missing_turns_one_capability_off(
    new_fake: Callable[[], Any], cuda_info: Any, name: str
) -> None:
    library = new_fake()
    library.refused |= {row.symbol for row in FUNCTIONS if row.name == name}
    group = GROUP_OF[name]
    if not group:
        with pytest.raises(HalError, match=name) as caught:
            Api(library)
        assert caught.value.code == "broken"
        return
    api = Api(library)
    assert api.off == {group}
    with pytest.raises(Unsupported, match=name):
        getattr(api, name)
    backend = CudaBackend(cuda_info(0), api)
    assert backend.groups == frozenset(GROUPS) - {group}
    stream = backend.stream_create(0)
    ptr = backend.alloc(64, Kind.DEVICE, stream)
    backend.fill(ptr, b"\x07", 64, stream)
    assert read(backend, ptr, stream) == b"\x07" * 4
    backend.free(ptr, Kind.DEVICE, stream)
    assert backend.synchronize(10)
    backend.close()
    assert library.live() == 0


# -- which device ----------------------------------------------------------------------------------


def test_a_device_is_found_by_its_uuid_whatever_is_visible(
    fake: Any, cuda_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "4")
    order = [cuda_info(3).uuid, cuda_info(1).uuid]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(order))
    api = Api(fake)
    backend = CudaBackend(cuda_info(3), api)
    assert backend._context.device == 0
    assert CudaBackend(cuda_info(1), api)._context.device == 1
    with pytest.raises(HalError) as caught:
        CudaBackend(cuda_info(0), api)
    assert caught.value.code == "not_visible"
    assert cuda_info(0).uuid in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES" in str(caught.value)


def test_a_mig_instance_is_the_one_device_that_is_left(
    fake: Any, cuda_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers that tell the GPU's uuid for its instance."""
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "1")
    api = Api(fake)
    mig = replace(cuda_info(0), uuid="MIG-0a0b0c0d-1111-2222-3333-444455556666")
    from drivetrain.hal.drivers import cuda_backend

    cuda_backend.initialised(api)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mig.uuid)
    assert cuda_backend.device_of(api, mig) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-another")
    with pytest.raises(HalError, match="does not see"):
        cuda_backend.device_of(api, mig)


def test_no_device_and_a_driver_that_fails_are_two_answers(
    new_fake: Callable[[], Any], cuda_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with pytest.raises(DriverMissing) as caught:
        CudaBackend(cuda_info(0), Api(new_fake()))
    assert caught.value.native == Code.ERROR_NO_DEVICE
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "1")
    library = new_fake()
    library.fail("cuInit", 3)
    with pytest.raises(HalError) as broken:
        CudaBackend(cuda_info(0), Api(library))
    assert not isinstance(broken.value, DriverMissing)
    assert broken.value.code == "broken"


def test_a_library_that_is_not_there_is_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_api.SELECTED, raising=False)
    monkeypatch.setattr(cuda_api, "LIBRARY", "libcuda-nowhere.so.1")
    cuda_api.load.cache_clear()
    try:
        with pytest.raises(DriverMissing, match="libcuda-nowhere"):
            cuda_api.load()
    finally:
        cuda_api.load.cache_clear()


def test_what_another_library_shows_is_not_hardware(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = rig_of("cuda").device
    monkeypatch.delenv(cuda_api.SELECTED, raising=False)
    assert evidence_of(device) == "hardware"
    monkeypatch.setenv(cuda_api.SELECTED, "/some/libcuda.so")
    assert evidence_of(device) == "emulated"


@pytest.mark.parametrize("symbol", ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2"])
def test_why_cuda_does_not_tell_its_devices_is_kept(fake: Any, cuda_info: Any, symbol: str) -> None:
    fake.fail(symbol, 999, 0)
    with pytest.raises(HalError, match=f"{symbol} failed") as caught:
        CudaBackend(cuda_info(0), Api(fake))
    error = caught.value
    assert (error.code, error.native, error.op) == ("broken", 999, symbol)
    assert error.native_name


# -- contexts --------------------------------------------------------------------------------------


def test_the_context_that_somebody_made_current_is_found_as_it_was(make: Make, fake: Any) -> None:
    backend, other = make(0), make(1)
    theirs = other._context.handle
    assert fake.library.cuCtxSetCurrent(ctypes.c_void_p(theirs)) == 0
    everything(lambda index=0, library=None: (backend, other)[index], fake)
    assert fake.current() == theirs
    assert fake.library.fake_depth() == 1
    with pytest.raises(HalError):
        backend.free(12345, Kind.DEVICE, backend.stream_create(0))
    fake.fail("cuStreamCreateWithPriority", Code.ERROR_NOT_SUPPORTED)
    with pytest.raises(Unsupported):
        backend.stream_create(0)
    assert fake.current() == theirs
    assert fake.library.fake_depth() == 1
    fake.library.cuCtxSetCurrent(None)


def test_a_thread_without_a_context_keeps_ours(make: Make, fake: Any) -> None:
    backend = make()
    found: list[int] = []

    def work() -> None:
        assert fake.current() == 0
        stream = backend.stream_create(0)
        backend.free(backend.alloc(64, Kind.DEVICE, stream), Kind.DEVICE, stream)
        found.append(fake.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [backend._context.handle]


def test_the_primary_context_is_retained_and_released_once(make: Make, fake: Any) -> None:
    backend, second = make(), make()
    assert fake.library.fake_retained(0) == 2
    backend.close()
    backend.close()
    assert fake.library.fake_retained(0) == 1
    for use in (backend.memory, lambda: backend.stream_create(0), lambda: backend.synchronize(1)):
        with pytest.raises(HalError) as caught:
            use()
        assert caught.value.code == "closed"
    second.close()
    assert fake.library.fake_retained(0) == 0


def test_a_device_that_cannot_be_described_is_let_go(fake: Any, cuda_info: Any) -> None:
    fake.fail("cuCtxGetStreamPriorityRange", Code.ERROR_NOT_SUPPORTED)
    with pytest.raises(Unsupported):
        CudaBackend(cuda_info(0), Api(fake))
    assert fake.library.fake_retained(0) == 0


# -- memory ----------------------------------------------------------------------------------------


def test_the_drivers_pool_keeps_memory_while_the_device_is_open(make: Make, fake: Any) -> None:
    """Its own threshold is 0: every wait would give all back."""
    backend = make()
    pool = backend._memory.pool
    assert backend._memory._pool_threshold() == (1 << 30) // 8
    stream = backend.stream_create(0)
    backend.free(backend.alloc(1 << 20, Kind.DEVICE, stream), Kind.DEVICE, stream)
    assert backend.stream_synchronize(stream, 10)
    box = ctypes.c_uint64()
    fake.library.cuMemPoolGetAttribute(ctypes.c_void_p(pool), 5, ctypes.byref(box))
    assert box.value >= 1 << 20  # reserved still
    assert backend.memory()[0] == 1 << 30  # and free for us
    backend.close()
    fake.library.cuMemPoolGetAttribute(ctypes.c_void_p(pool), 4, ctypes.byref(box))
    assert box.value == 0


def test_a_threshold_that_somebody_else_set_is_left_alone(make: Make, fake: Any) -> None:
    backend = make()
    theirs = ctypes.c_uint64(123 << 20)
    pool = ctypes.c_void_p(backend._memory.pool)
    fake.library.cuMemPoolSetAttribute(pool, 4, ctypes.byref(theirs))
    backend.close()
    fake.library.cuMemPoolGetAttribute(pool, 4, ctypes.byref(theirs))
    assert theirs.value == 123 << 20


@pytest.mark.parametrize("version", [11000, 13000])
def test_memory_is_given_back_after_the_work_of_its_stream(
    make: Make, fake: Any, version: int
) -> None:
    backend = make(0, fake.older(version))
    stream = backend.stream_create(0)
    for kind in Kind:
        fake.release(False)
        ptr = backend.alloc(4096, kind, stream)
        before = fake.live()
        launch(backend, "hold", stream)
        backend.fill(ptr, b"\x05", 4096, stream)
        backend.free(ptr, kind, stream)
        backend.memory()
        assert fake.live() == before  # in use still
        fake.release()
        assert backend.stream_synchronize(stream, 10)
        backend.free(backend.alloc(64, Kind.PINNED, stream), Kind.PINNED, stream)
        backend.alloc(64, Kind.DEVICE, stream)
        assert backend.synchronize(10)


@pytest.mark.parametrize("version", [11000, 13000])
def test_out_of_memory_waits_for_what_is_being_given_back(
    make: Make, fake: Any, version: int
) -> None:
    backend = make(0, fake.older(version))
    stream = backend.stream_create(0)
    ptr = backend.alloc(700 << 20, Kind.DEVICE, stream)
    backend.free(ptr, Kind.DEVICE, stream)
    if version == 13000:
        assert backend.stream_synchronize(stream, 10)
    again = backend.alloc(800 << 20, Kind.DEVICE, stream)
    with pytest.raises(OutOfMemory) as caught:
        backend.alloc(500 << 20, Kind.DEVICE, stream)
    error = caught.value
    assert (error.requested, error.total) == (500 << 20, 1 << 30)
    assert error.free <= (1 << 30) - (800 << 20)
    assert error.native == 2
    assert error.native_name == "CUDA_ERROR_OUT_OF_MEMORY"
    backend.free(again, Kind.DEVICE, stream)


def test_out_of_memory_once_is_tried_again(make: Make, fake: Any) -> None:
    backend = make()
    stream = backend.stream_create(0)
    fake.fail("cuMemAllocAsync", Code.ERROR_OUT_OF_MEMORY, 1)
    assert backend.alloc(64, Kind.DEVICE, stream)
    assert "cuMemPoolTrimTo" in fake.names()


def test_what_is_not_allocated_is_not_freed(make: Make, fake: Any) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(64, Kind.PINNED, stream)
    for wrong, kind in ((ptr, Kind.DEVICE), (ptr + 16, Kind.PINNED), (0, Kind.DEVICE)):
        with pytest.raises(HalError) as caught:
            backend.free(wrong, kind, stream)
        assert caught.value.code == "not_allocated"
    backend.free(ptr, Kind.PINNED, stream)
    with pytest.raises(HalError):
        backend.free(ptr, Kind.PINNED, stream)
    backend.close()
    assert fake.live() == 0


PATTERNS = st.binary(min_size=1, max_size=16).filter(lambda p: len(p) in (1, 2, 4, 8, 16))


@pytest.mark.parametrize("kind", [Kind.DEVICE, Kind.PINNED])
@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (b"\x01", 5),
        (b"ab", 3),
        (b"abcd", 1),
        (b"abababab", 7),
        (bytes(range(8)), 5000),
        (bytes(range(16)), 1),
        (bytes(range(16)), 9999),
        (b"0123456789abcdef", 4096),
    ],
)
def test_fills_of_every_width_are_exact(make: Make, kind: Kind, pattern: bytes, count: int) -> None:
    backend = make()
    stream = backend.stream_create(0)
    nbytes = len(pattern) * count
    ptr = backend.alloc(nbytes + 64, kind, stream)
    backend.fill(ptr, b"\xcc", nbytes + 64, stream)
    backend.fill(ptr, pattern, count, stream)
    assert read(backend, ptr, stream, nbytes + 64) == pattern * count + b"\xcc" * 64


def test_pinned_sources_are_waited_for_and_pageable_ones_are_staged(make: Make, fake: Any) -> None:
    """Both may be reused on return: the driver copies pageable memory aside, pinned memory not."""
    backend = make()
    stream = backend.stream_create(0)
    target = backend.alloc(4096, Kind.DEVICE, stream)
    pinned = backend.alloc(4096, Kind.PINNED, stream)
    ctypes.memset(pinned, 0x11, 4096)
    backend.copy(target, pinned, 4096, Way.HOST_TO_DEVICE, stream, True)
    assert backend.stream_done(stream)
    pageable = ctypes.create_string_buffer(b"\x22" * 4096, 4096)
    launch(backend, "hold", stream)
    backend.copy(target, ctypes.addressof(pageable), 4096, Way.HOST_TO_DEVICE, stream, True)
    assert not backend.stream_done(stream)
    ctypes.memset(pageable, 0x33, 4096)
    fake.release()
    assert read(backend, target, stream, 4096) == b"\x22" * 4096


def test_host_memory_of_others_can_be_pinned_for_a_while(make: Make) -> None:
    backend = make()
    memory = ctypes.create_string_buffer(1 << 16)
    at = ctypes.addressof(memory)
    backend.register(at, 1 << 16)
    with pytest.raises(HalError):
        backend.register(at, 1 << 16)
    backend.unregister(at)
    with pytest.raises(HalError):
        backend.unregister(at)


# -- streams and events ----------------------------------------------------------------------------


def test_waits_end_at_their_limit(make: Make, fake: Any) -> None:
    for version in (13000, 11000):
        fake.release(False)
        backend = make(0, fake.older(version))
        stream = backend.stream_create(0)
        launch(backend, "hold", stream)
        event = backend.event_create(False)
        backend.event_record(event, stream)
        assert not backend.stream_synchronize(stream, 0.02)
        assert not backend.event_synchronize(event, 0.02)
        assert not backend.synchronize(0.02)
        assert not backend.stream_done(stream)
        assert not backend.event_done(event)
        fake.release()
        assert backend.synchronize(10)
        assert backend.event_done(event)


def test_priorities_are_brought_into_the_drivers_range(make: Make, fake: Any) -> None:
    backend = make()
    fake.forget()
    for priority in (-100, -5, -1, 0, 7):
        backend.stream_create(priority)
    given = [two for name, _, two in fake.calls() if name == "cuStreamCreateWithPriority"]
    assert [ctypes.c_int32(n).value for n in given] == [-5, -5, -1, 0, 0]


def test_an_event_of_another_device_is_waited_for(make: Make, fake: Any) -> None:
    one, two = make(0), make(1)
    near, far = one.stream_create(0), two.stream_create(0)
    launch(one, "hold", near)
    event = one.event_create(False)
    one.event_record(event, near)
    two.stream_wait(far, event)
    assert not two.stream_synchronize(far, 0.03)
    fake.release()
    assert two.stream_synchronize(far, 10)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "form", "error", "text"),
    [
        (b"nonsense", "ptx", CompileError, "no PTX"),
        (b".version 7\0.target x", "ptx", CompileError, "no PTX"),
        (b".version 7\n.target sm_90\n", "ptx", CompileError, "line 3"),
        (b".version 7\n.target sm_99\n", "ptx", CompileError, "does not take this ptx for sm_90"),
        (b"nonsense", "cubin", CompileError, "no cubin"),
        (b"\x7fELF....", "cubin", CompileError, "does not take"),
        (b"\x7fELF", "so", Unsupported, "ptx and cubin"),
    ],
)
def test_code_that_the_driver_does_not_take(
    make: Make, code: bytes, form: str, error: type[HalError], text: str
) -> None:
    backend = make()
    with pytest.raises(error, match=text) as caught:
        backend.module_load(code, form)
    if isinstance(caught.value, CompileError):
        assert caught.value.log
        assert caught.value.code == "not_taken"


def test_kernels_are_found_loaded_and_checked_before_their_first_launch(
    make: Make, fake: Any
) -> None:
    backend = make()
    module = backend.module_load(PTX, "ptx")
    with pytest.raises(HalError) as caught:
        backend.function(module, "nothing_like_it")
    assert caught.value.code == "no_such_kernel"
    fake.forget()
    function = backend.function(module, "add")
    assert "cuFuncLoad" in fake.names()
    backend.function_arguments(function, (-8, 4))
    for wrong in ((-8,), (-8, 8), (-8, 4, 4), ()):
        with pytest.raises(HalError, match="arguments"):
            backend.function_arguments(function, wrong)
    facts = backend.function_facts(function)
    assert (facts.threads, facts.registers) == (1024, 16)
    backend.module_unload(module)


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [0, 1])
def test_kernels_of_a_graph_are_counted_in_the_order_noted(
    make: Make, fake: Any, reverse: int
) -> None:
    """Whatever order the driver lists its nodes in."""
    fake.library.fake_reverse(reverse)
    backend = make()
    stream = backend.stream_create(0)
    cells = [backend.alloc(4, Kind.DEVICE, stream) for _ in range(3)]
    for cell in cells:
        backend.fill(cell, b"\0", 4, stream)
    backend.graph_begin(stream)
    for number, cell in enumerate(cells):
        launch(backend, "store", stream, cell, number + 1)
        backend.fill(cells[2], b"\0", 4, stream)
    graph = backend.graph_end(stream)
    function = backend.function(backend.module_load(PTX, "ptx"), "store")
    boxes = [ctypes.c_uint64(cells[1]), ctypes.c_uint64(77)]
    table = (ctypes.c_void_p * 2)(*(ctypes.addressof(box) for box in boxes))
    at = ctypes.addressof(table)
    backend.graph_set(graph, 1, function, (1, 1, 1), (1, 1, 1), 0, at, (-8, 4))
    backend.graph_launch(graph, stream)
    found = [int.from_bytes(read(backend, cell, stream), "little") for cell in cells]
    assert found == [1, 77, 0]
    for node in (3, -1):
        with pytest.raises(HalError) as caught:
            backend.graph_set(graph, node, function, (1, 1, 1), (1, 1, 1), 0, at, (-8, 4))
        assert caught.value.code == "no_such_node"
    backend.graph_destroy(graph)
    with pytest.raises(HalError):
        backend.graph_destroy(graph)


@given(st.integers(0, 7).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(n)))))
def test_a_chain_has_one_order_however_it_is_listed(chain: tuple[int, list[int]]) -> None:
    count, listed = chain
    edges = list(itertools.pairwise(range(count)))
    assert cuda_graphs.order(listed, edges) == list(range(count))


def test_a_capture_refuses_what_would_break_it_and_goes_on(make: Make, fake: Any) -> None:
    backend = make()
    stream, other = backend.stream_create(0), backend.stream_create(0)
    held = backend.alloc(4096, Kind.DEVICE, stream)
    target = backend.alloc(64, Kind.DEVICE, other)
    source = ctypes.create_string_buffer(64)
    event = backend.event_create(False)
    backend.graph_begin(stream)
    backend.event_record(event, stream)
    for wrong in (
        lambda: backend.event_done(event),
        lambda: backend.event_synchronize(event, 1),
        lambda: backend.alloc(64, Kind.DEVICE, stream),
        lambda: backend.stream_synchronize(stream, 1),
        lambda: backend.stream_done(stream),
        lambda: backend.stream_destroy(stream),
        lambda: backend.graph_begin(stream),
        lambda: backend.synchronize(1),
        lambda: backend.copy(
            target, ctypes.addressof(source), 64, Way.HOST_TO_DEVICE, stream, True
        ),
    ):
        with pytest.raises(HalError) as caught:
            wrong()
        assert caught.value.code == "capturing", caught.value
    backend.free(held, Kind.DEVICE, stream)  # put off until the capture ends
    live = fake.live()
    backend.fill(target, b"\x01", 64, stream)
    graph = backend.graph_end(stream)
    assert backend.stream_synchronize(stream, 10)
    assert fake.live() == live - 1
    backend.graph_launch(graph, stream)
    assert read(backend, target, stream) == b"\x01" * 4
    with pytest.raises(HalError) as caught:
        backend.graph_end(stream)
    assert caught.value.code == "not_capturing"
    with pytest.raises(HalError, match="recorded in a capture"):
        backend.event_done(event)
    backend.event_record(event, stream)
    assert backend.event_synchronize(event, 10)


def test_a_device_that_is_closed_in_the_middle_of_a_capture_lets_everything_go(
    make: Make, fake: Any
) -> None:
    backend = make()
    before = fake.live()
    stream = backend.stream_create(0)
    held = backend.alloc(4096, Kind.DEVICE, stream)
    backend.graph_begin(stream)
    backend.free(held, Kind.DEVICE, stream)
    backend.close()
    assert fake.live() == before


def test_a_capture_that_the_driver_calls_broken_leaves_a_usable_stream(
    make: Make, fake: Any
) -> None:
    backend = make()
    stream = backend.stream_create(0)
    backend.graph_begin(stream)
    fake.library.cuStreamQuery(ctypes.c_void_p(stream))  # somebody else breaks it
    with pytest.raises(HalError) as caught:
        backend.graph_end(stream)
    assert caught.value.code == "capturing"
    assert backend.stream_synchronize(stream, 10)
    backend.graph_begin(stream)
    backend.graph_destroy(backend.graph_end(stream))


# -- peers -----------------------------------------------------------------------------------------


def test_peers(make: Make, fake: Any, cuda_info: Any) -> None:
    one, two = make(0), make(1)
    assert one.peer_enable(one)
    assert not one.peer_enable(object())  # type: ignore[arg-type]
    far = two.alloc(4096, Kind.DEVICE, two.stream_create(0))
    stream = one.stream_create(0)
    near = one.alloc(4096, Kind.DEVICE, stream)
    two.fill(far, b"\x06", 4096, two.stream_create(0))
    assert two.synchronize(10)
    assert one.peer_enable(two)
    shared = [call for call in fake.calls() if call[0] == "cuMemPoolSetAccess"]
    assert shared == [("cuMemPoolSetAccess", 0, 3)]  # its pool is opened to us
    one.copy_peer(near, far, 4096, two, stream)
    assert read(one, near, stream) == b"\x06" * 4
    for code in (Code.ERROR_PEER_ACCESS_UNSUPPORTED, Code.ERROR_TOO_MANY_PEERS):
        fake.fail("cuCtxEnablePeerAccess", code, 1)
        assert not two.peer_enable(one)
    with pytest.raises(HalError):
        one.copy_peer(near, far, 16, object(), stream)  # type: ignore[arg-type]


def test_memory_goes_to_another_process_by_handle(
    fake: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source and mover in one process here: device 0 exports, device 1's context copies."""
    api = Api(fake)
    monkeypatch.setattr(cuda_ipc, "load", lambda: api)
    library = fake.older(11000)  # plain memory, which has handles
    one, two = make(0, library), make(1, library)
    near, far = one.stream_create(0), two.stream_create(0)
    source = one.alloc(8192, Kind.DEVICE, near)
    target = two.alloc(8192, Kind.DEVICE, far)
    one.fill(source, b"\x0c", 8192, near)
    two.fill(target, b"\x01", 8192, far)
    assert one.synchronize(10)
    assert two.synchronize(10)
    one._context.call(api.cuStreamQuery, near)  # its context is current
    ((there, offset),) = cuda_ipc.export([source + 4096])
    assert offset == 4096
    ((here, _),) = cuda_ipc.export([target])
    fake.library.cuCtxSetCurrent(None)
    mover = cuda_ipc.Mover()
    mover.open([there, here])
    mover.open([there])
    assert mover.copy([[there, 4096, here, 0, 4096]]) >= 0
    assert read(two, target, far, 8192) == b"\x0c" * 4096 + b"\x01" * 4096
    with pytest.raises(HalError, match="cuIpcOpenMemHandle failed"):
        mover.open(["00" * 64])


def test_memory_of_the_drivers_pool_has_no_handle(
    fake: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "load", lambda: Api(fake))
    backend = make()
    ptr = backend.alloc(4096, Kind.DEVICE, backend.stream_create(0))
    with pytest.raises(Unsupported, match="staged"):
        cuda_ipc.export([ptr])
    with pytest.raises(HalError):
        cuda_ipc.export([12345])


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "code"), [("stray", 700), ("claim", 710)])
def test_a_lost_device_stays_lost_and_tells_why(make: Make, kernel: str, code: int) -> None:
    backend = make()
    stream = backend.stream_create(0)
    event = backend.event_create(False)
    ptr = backend.alloc(64, Kind.DEVICE, stream)
    launch(backend, kernel, stream)
    with pytest.raises(DeviceLost) as caught:
        backend.stream_synchronize(stream, 10)
    assert caught.value.native == code
    assert caught.value.code == "lost"
    for use in (
        backend.memory,
        lambda: backend.alloc(64, Kind.DEVICE, stream),
        lambda: backend.free(ptr, Kind.DEVICE, stream),
        lambda: backend.fill(ptr, b"\0", 4, stream),
        lambda: backend.stream_create(0),
        lambda: backend.event_done(event),
        lambda: backend.synchronize(1),
        lambda: backend.module_load(PTX, "ptx"),
        lambda: backend.graph_begin(stream),
    ):
        with pytest.raises(DeviceLost, match="lost to this process earlier") as again:
            use()
        assert again.value.native == code
        assert kernel or again.value.native_name
    backend.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.ERROR_OUT_OF_MEMORY, OutOfMemory),
        (Code.ERROR_NOT_SUPPORTED, Unsupported),
        (Code.ERROR_LAUNCH_FAILED, DeviceLost),
        (Code.ERROR_ECC_UNCORRECTABLE, DeviceLost),
        (999, HalError),
    ],
)
def test_a_result_is_an_error_with_its_facts(
    make: Make, fake: Any, code: int, kind: type[HalError]
) -> None:
    """One call here; `test_every_fault` takes all of them."""
    backend = make()
    fake.fail("cuStreamCreateWithPriority", code, 0)
    with pytest.raises(HalError) as caught:
        backend.stream_create(0)
    error = caught.value
    assert type(error) is kind, error
    facts = (code, "cuda", "cuda:0", "cuStreamCreateWithPriority")
    assert (error.native, error.driver, error.device, error.op) == facts
    assert error.native_name
    if kind is DeviceLost:
        with pytest.raises(DeviceLost):
            backend.memory()


def test_a_query_that_says_not_ready_is_no_error(make: Make, fake: Any) -> None:
    backend = make()
    stream = backend.stream_create(0)
    fake.fail("cuStreamQuery", Code.ERROR_NOT_READY, 1)
    assert not backend.stream_done(stream)
    assert backend.stream_done(stream)


def test_work_that_never_ends_does_not_hold_up_the_end(
    make: Make, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivetrain.hal.drivers import cuda_like

    monkeypatch.setattr(cuda_like, "_CLOSE_WAIT_S", 0.05)
    backend = make()
    launch(backend, "hold", backend.stream_create(0))
    backend.close()
    assert fake.library.fake_retained(0) == 0


def test_closing_gives_everything_back(make: Make, fake: Any) -> None:
    backend = make()
    stream = backend.stream_create(0)
    for kind in Kind:
        backend.alloc(4096, kind, stream)
        backend.free(backend.alloc(64, kind, stream), kind, stream)
    backend.module_load(PTX, "ptx")
    backend.graph_begin(stream)
    graph = backend.graph_end(stream)
    backend.graph_launch(graph, stream)
    events = [backend.event_create(False) for _ in range(3)]
    fake.forget()
    backend.close()
    assert fake.live() == 0
    assert fake.library.fake_streams() == 0
    names = fake.names()
    assert names.count("cuEventDestroy_v2") >= len(events)
    assert names.count("cuModuleUnload") == 1
    assert names.count("cuGraphExecDestroy") == names.count("cuGraphDestroy") == 1


def test_threads_share_a_device(make: Make, fake: Any) -> None:
    backend = make()
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            stream = backend.stream_create(0)
            for _ in range(50):
                ptr = backend.alloc(4096, Kind(number % 3), stream)
                backend.fill(ptr, bytes([number]), 4096, stream)
                assert read(backend, ptr, stream) == bytes([number]) * 4
                backend.free(ptr, Kind(number % 3), stream)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert fake.current() in (0, backend._context.handle)


def test_a_timeout_of_a_copy_says_that_the_source_must_stay(
    make: Make, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_WAIT_LIMIT_S", "0.02")
    backend = make()
    stream = backend.stream_create(0)
    target = backend.alloc(64, Kind.DEVICE, stream)
    pinned = backend.alloc(64, Kind.PINNED, stream)
    launch(backend, "hold", stream)
    with pytest.raises(Timeout, match="must stay"):
        backend.copy(target, pinned, 64, Way.HOST_TO_DEVICE, stream, True)
