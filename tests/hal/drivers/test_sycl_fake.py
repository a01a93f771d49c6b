"""The sycl driver over a fake of dpctl's library: routes to one device, every fault at every call
of a script, and what is left. The fake shows order and errors; it shows nothing about results, and
it runs no kernels."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Fake

from drivetrain.errors import HalError, OutOfMemory
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.drivers import opencl_platforms
from drivetrain.hal.drivers.sycl_api import FUNCTIONS, Api, Aspect
from drivetrain.hal.drivers.sycl_backend import SyclBackend
from drivetrain.hal.drivers.sycl_memory import Memory
from drivetrain.hal.isolated import python_path
from drivetrain.hal.kinds import Kind, Way

GROUPS = {"managed", "pinned", "timing"}
Make = Callable[..., SyclBackend]
_number = itertools.count()
_new: list[Fake] = []


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without OpenCL and Level Zero, which SYCL's devices would be looked for in. OpenCL's loader
    reads its variables once in a process, so here it is not asked at all."""
    monkeypatch.setenv(loader.VENDORS, str(tmp_path))
    monkeypatch.setattr(opencl_platforms, "devices", lambda *_: [])
    monkeypatch.setenv("DRIVETRAIN_LEVEL_ZERO_LIBRARY", str(tmp_path / "none.so"))
    yield
    while _new:
        _new.pop().library.fake_end()


def info(index: int = 0) -> DeviceInfo:
    return DeviceInfo("sycl", index, "fake", "intel", f"SYCL-fake-fake-arc-{index}-0")


def new(path: Path, folder: Path) -> Fake:
    """A copy of the library, as if it were in a process of its own."""
    copy = folder / f"{next(_number)}-{path.name}"  # the loader goes by its name
    copy.write_bytes(path.read_bytes())
    _new.append(Fake(copy))
    return _new[-1]


@pytest.fixture
def fake(fake_library: Any, tmp_path: Path) -> Fake:
    return new(fake_library("fake_sycl.c"), tmp_path)


@pytest.fixture
def make(fake: Fake) -> Iterator[Make]:
    made: list[SyclBackend] = []

    def build(index: int = 0) -> SyclBackend:
        made.append(SyclBackend(info(index), Api(fake)))
        return made[-1]

    yield build
    fake.forgive()
    for backend in made:
        backend.close()


def read(backend: SyclBackend, ptr: int, stream: int, nbytes: int = 4) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, 10)
    return back.raw


def script(backend: SyclBackend) -> Iterator[str]:
    """Uses each group once; nothing is left over at its end."""
    stream, other = backend.stream_create(0), backend.stream_create(-1)
    for kind in Kind:
        if kind is Kind.DEVICE or kind.name.lower() in backend.groups:
            ptr = backend.alloc(4096, kind, stream)
            for pattern in (b"\1", b"ab", b"abcd", bytes(range(8)), bytes(range(16))):
                backend.fill(ptr, pattern, 4096 // len(pattern), stream)
            assert read(backend, ptr, stream, 4096) == bytes(range(16)) * 256
            source = ctypes.create_string_buffer(b"\x22" * 16, 16)
            at = ctypes.addressof(source)
            backend.copy(ptr, at, 16, Way.HOST_TO_DEVICE, stream, True)
            ctypes.memset(at, 0, 16)  # it may be used again at once
            backend.copy(ptr + 64, ptr, 16, Way.DEVICE_TO_DEVICE, stream, False)
            assert read(backend, ptr + 64, stream, 16) == b"\x22" * 16
            backend.free(ptr, kind, stream)
            yield kind.name
    assert backend.memory()[1] == 1 << 30
    start, end = backend.event_create(True), backend.event_create(True)
    backend.event_record(start, stream)
    backend.stream_wait(other, start)
    backend.event_record(end, other)
    assert backend.event_synchronize(end, 10)
    if "timing" in backend.groups:
        assert 0 <= backend.event_seconds(start, end) < 60
        assert backend.event_seconds(end, start) <= 0
    backend.event_record(start, other)
    for event in (start, end):
        assert backend.event_synchronize(event, 10)
        backend.event_destroy(event)
    yield "events"
    for each in (other, stream):
        backend.stream_destroy(each)
    assert backend.synchronize(10)
    yield "end"


# -- what it is ------------------------------------------------------------------------------------


def test_a_device_tells_what_it_is(make: Make) -> None:
    backend = make()
    assert backend.groups == GROUPS  # no OpenCL device stands behind it: no kernels
    assert backend.memory() == (1 << 30, 1 << 30)
    assert backend.limits.block == (1024, 512, 64)


@pytest.mark.parametrize(
    ("aspect", "lacking"),
    [
        (0, set()),
        (Aspect.queue_profiling, {"timing"}),
        (Aspect.usm_host_allocations, {"pinned"}),
        (Aspect.usm_atomic_shared_allocations, {"managed"}),
    ],
)
def test_all_groups_work_and_one_that_the_device_lacks_is_not_declared(
    make: Make, fake: Fake, monkeypatch: pytest.MonkeyPatch, aspect: int, lacking: set[str]
) -> None:
    monkeypatch.setenv("FAKE_SYCL_WITHOUT", str(aspect or -1))
    backend = make()
    assert backend.groups == GROUPS - lacking
    assert [*script(backend)][-1] == "end"
    backend.close()
    assert (fake.live(), fake.things()) == (0, 0)


def test_a_thousand_events_streams_and_buffers_leave_nothing(make: Make, fake: Fake) -> None:
    backend = make()
    stream = backend.stream_create(0)
    event = backend.event_create(True)
    before = fake.things()
    for _ in range(1000):
        other = backend.stream_create(0)
        ptr = backend.alloc(64, Kind.DEVICE, other)
        backend.fill(ptr, b"\1", 64, other)
        backend.event_record(event, other)
        backend.stream_wait(stream, event)
        backend.free(ptr, Kind.DEVICE, stream)
        backend.stream_destroy(other)
        assert backend.stream_synchronize(stream, 10)
    backend.event_destroy(event)
    assert backend.synchronize(10)
    assert fake.things() < before + 100


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)
def test_a_symbol_that_is_missing_is_said(fake: Fake, row: Any) -> None:
    fake.refused.add(row.name)
    if row.optional:
        assert Api(fake).takes_structures is False
        return
    with pytest.raises(HalError, match=row.name) as caught:
        Api(fake)
    assert caught.value.code == "broken"


def test_out_of_memory_waits_for_what_is_being_given_back(make: Make) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(700 << 20, Kind.DEVICE, stream)
    backend.fill(ptr, b"\1", 64 << 20, stream)
    backend.free(ptr, Kind.DEVICE, stream)
    again = backend.alloc(800 << 20, Kind.DEVICE, stream)
    with pytest.raises(OutOfMemory) as caught:
        backend.alloc(500 << 20, Kind.DEVICE, stream)
    assert (caught.value.requested, caught.value.total) == (500 << 20, 1 << 30)
    backend.free(again, Kind.DEVICE, stream)


def test_a_device_that_is_not_shown_is_said(fake: Fake) -> None:
    with pytest.raises(HalError, match="ONEAPI_DEVICE_SELECTOR") as caught:
        SyclBackend(info(7), Api(fake))
    assert caught.value.code == "not_visible"
    assert fake.things() == 0


# -- faults: a call gives null, or says that what was queued failed --------------------------------

VOID = {row.name for row in FUNCTIONS if row.result == "void"}
"""There is nothing to tell of these, and what they do not give back is left."""
UNNOTICED = {
    *(row.name for row in FUNCTIONS if row.name.startswith(("DPCTLDevice", "DPCTLPlatform"))),
    *(row.name for row in FUNCTIONS if row.name.startswith("DPCTLaligned_alloc")),
    "DPCTLEvent_GetProfilingInfoEnd",  # then it does not declare timing
    "DPCTLEvent_GetCommandExecutionStatus",  # of a buffer's end, which is nobody's failure
}
"""Of these a failure may be an answer: the fact is not known, or it is asked once more."""


def problem(library: Fake, symbol: str, nth: int) -> str:
    """What is wrong with how the driver took one fault; "" when nothing is."""
    raised: list[HalError] = []
    backend = None
    library.fail(symbol, 1, nth)
    try:
        backend = SyclBackend(info(0), Api(library))
        for _ in script(backend):
            pass
    except HalError as error:
        raised.append(error)
    if backend is not None:
        try:
            backend.close()
        except HalError as error:
            raised.append(error)
    if not library.library.fake_fired() or symbol in VOID:
        return ""  # a query more or less: it depends on time
    for error in raised:
        if error.driver != "sycl" or not (error.code and error.op):
            return repr(error)
    if not raised and symbol not in UNNOTICED:
        return "it went unnoticed"
    library.forgive()
    left = library.live(), library.things()
    return f"{left} are left of memory and things" if max(left) else ""


def every_fault(path: Path, folder: Path, step: int) -> tuple[int, list[str]]:
    """Each ``step``-th fault at each call: how many there are in all, and what is wrong."""
    library = new(path, folder)
    library.log()
    backend = SyclBackend(info(0), Api(library))
    assert [*script(backend)][-1] == "end"
    backend.close()
    assert (library.live(), library.things()) == (0, 0)
    places: dict[str, int] = {}
    asked, wrong = 0, []
    for name in library.names():
        places[name] = places.get(name, 0) + 1
        if name == "DPCTLEvent_GetCommandExecutionStatus" and places[name] > 12:
            continue  # how often it is asked depends on time
        asked += 1
        if asked % step:
            continue
        library = new(path, folder)
        found = problem(library, name, places[name])
        if found:
            wrong.append(f"call {places[name]} of {name}: {found}")
        library.library.fake_end()
        _new.remove(library)
        library.path.unlink()
    return asked, wrong


def test_every_fault_at_every_call(fake_library: Any, tmp_path: Path) -> None:
    asked, wrong = every_fault(fake_library("fake_sycl.c"), tmp_path, 1)
    assert wrong == []
    assert asked > 100


def test_a_driver_that_keeps_memory_is_caught(
    fake_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the proof before it."""
    monkeypatch.setattr(Memory, "_after", lambda self, *_: None)
    with pytest.raises(AssertionError):
        every_fault(fake_library("fake_sycl.c"), tmp_path, 1)


# -- routes, in processes of their own -------------------------------------------------------------

WHOLE = """
import json
from drivetrain import hal
from drivetrain.hal.conformance.running import evidence_of
states = {name: state.state for name, state in hal.drivers().items()}
reason = hal.drivers()["sycl"].reason
devices = [[d.address, list(d.routes), d.info.pci, evidence_of(d)]
           for d in hal.devices(all_routes=True) if d.driver != "cpu"]
listed = [d.address for d in hal.devices() if d.driver != "cpu"]
print(json.dumps(dict(states=states, reason=reason, devices=devices, listed=listed)))
"""


@pytest.fixture
def machine(fake_library: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``machine(sycl=LIST, opencl=PCI, level_zero=PCI)``: what a process sees there."""

    def go(*, sycl: str, opencl: str = "", level_zero: str = "", **more: str) -> dict[str, Any]:
        vendors = tmp_path / "vendors"
        vendors.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",
            "DRIVETRAIN_HOME": str(tmp_path / f"home-{next(_number)}"),
            "DRIVETRAIN_SYCL_LIBRARY": str(fake_library("fake_sycl.c")),
            "FAKE_SYCL_LIST": sycl,
            loader.VENDORS: str(vendors),
            **more,
        }
        if opencl:
            (vendors / "fake.icd").write_text(f"{fake_library('fake_opencl.c')}\n")
            environment |= {"FAKE_CL_EXTENSIONS": "cl_khr_pci_bus_info", "FAKE_CL_PCI": opencl}
        if level_zero:
            environment["DRIVETRAIN_LEVEL_ZERO_LIBRARY"] = str(fake_library("fake_ze.c"))
            environment |= {"FAKE_ZE_DEVICES": "1", "FAKE_ZE_PCI": level_zero}
        done = subprocess.run(
            [sys.executable, "-P", "-c", WHOLE],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return go


NEEDS_OPENCL = pytest.mark.skipif(
    not loader.library(loader.LOADER) or not Path("/usr/include/CL/cl_icd.h").is_file(),
    reason="there is no OpenCL loader, or no header of it",
)
BOTH = "opencl/Fake/Fake device,level_zero/Fake Zero/Fake Arc 0"
PLACES = sorted(path.name for path in Path("/sys/bus/pci/devices").glob("*"))


def test_a_gpu_by_level_zero_and_by_sycl_is_one_device(machine: Any) -> None:
    found = machine(sycl="level_zero/Fake Zero/Fake Arc 0", level_zero="f0:1:0.0")
    routes = ["sycl:0", "level_zero:0"]
    assert found["devices"] == [[address, routes, "", "fake"] for address in routes]
    assert found["listed"] == ["sycl:0"]


@NEEDS_OPENCL
def test_a_gpu_by_opencl_and_by_sycl_is_one_device_and_its_second_backend_is_left_out(
    machine: Any,
) -> None:
    found = machine(sycl="opencl/Fake/Fake device", opencl="1:18:0.0")
    routes = ["opencl:0", "sycl:0"]
    assert [each[:3] for each in found["devices"]] == [
        [address, routes, "00000001:18:00.0"] for address in routes
    ]
    assert found["listed"] == ["opencl:0"]
    # The control: another name is another device.
    other = machine(sycl="opencl/Fake/Another device", opencl="1:18:0.0")
    assert other["listed"] == ["opencl:0", "sycl:0"]


@NEEDS_OPENCL
@pytest.mark.skipif(not PLACES, reason="the machine has no PCI bus, where Level Zero's GPUs are")
def test_a_gpu_by_level_zero_opencl_and_sycl_is_one_device_with_three_routes(machine: Any) -> None:
    found = machine(sycl=BOTH, opencl=PLACES[0], level_zero=PLACES[0])
    routes = ["opencl:0", "sycl:0", "level_zero:0"]
    assert [each[:2] for each in found["devices"]] == [[address, routes] for address in routes]
    assert found["listed"] == ["opencl:0"]
    apart = machine(sycl=BOTH, opencl="1:18:0.0", level_zero=PLACES[0])
    assert sorted(apart["listed"]) == ["opencl:0", "sycl:1"]


def test_devices_without_unified_shared_memory_are_named_and_left_out(machine: Any) -> None:
    found = machine(
        sycl="cpu/Another/Some processor", FAKE_SYCL_WITHOUT=str(Aspect.usm_device_allocations)
    )
    assert found["states"]["sycl"] == "absent"
    assert "no device with unified shared memory (it shows Some processor)" in found["reason"]


def test_a_library_that_hangs_leaves_the_other_drivers(machine: Any) -> None:
    found = machine(
        sycl="level_zero/Fake/Fake Arc 0",
        FAKE_SYCL_FAULT="DPCTLDeviceMgr_GetDevices:1:hang",
        DRIVETRAIN_DISCOVERY_LIMIT_S="2",
    )
    assert found["states"]["sycl"] == "broken"
    assert "did not answer within 2 s" in found["reason"]
    assert found["states"]["cpu"] == "usable"
