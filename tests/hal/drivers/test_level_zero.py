"""The level_zero driver over a fake loader, and the driver as a whole. The fake shows order and
errors; it shows nothing about results. Faults: see `test_every_fault`."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Fake

from drivetrain.errors import CompileError, DriverMissing, HalError, OutOfMemory, Unsupported
from drivetrain.hal import registry
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.drivers import level_zero, level_zero_backend
from drivetrain.hal.drivers.level_zero_api import FUNCTIONS, Api, Ze
from drivetrain.hal.drivers.level_zero_backend import GROUPS, LevelZeroBackend
from drivetrain.hal.kinds import Kind, Way

Make = Callable[..., LevelZeroBackend]
_number = itertools.count()


@pytest.fixture(autouse=True)
def _all_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZE_AFFINITY_MASK", raising=False)


def info(index: int = 0) -> DeviceInfo:
    uuid = "ZE-" + bytes([*range(0xF0, 0xFF), index]).hex()
    return DeviceInfo("level_zero", index, "fake", "intel", uuid)


def new(path: Path, folder: Path) -> Fake:
    """A copy of the library, as if it were in a process of its own."""
    copy = folder / f"{next(_number)}-{path.name}"  # the loader goes by its name
    copy.write_bytes(path.read_bytes())
    return Fake(copy)


@pytest.fixture
def fake(fake_library: Any, tmp_path: Path) -> Fake:
    return new(fake_library("fake_ze.c"), tmp_path)


@pytest.fixture
def make(fake: Fake) -> Iterator[Make]:
    made: list[LevelZeroBackend] = []

    def build(index: int = 0) -> LevelZeroBackend:
        made.append(LevelZeroBackend(info(index), Api(fake)))
        return made[-1]

    yield build
    fake.forgive()
    for backend in made:
        backend.close()


def read(backend: LevelZeroBackend, ptr: int, stream: int, nbytes: int = 4) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, 10)
    return back.raw


def script(backend: LevelZeroBackend) -> Iterator[str]:
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


def test_a_device_tells_what_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()
    assert backend.groups == GROUPS
    assert backend.target.features == ("binary_only",)
    assert backend.memory() == (1 << 30, 1 << 30)
    monkeypatch.setenv("FAKE_ZE_SLOW_SHARED", "1")
    assert make(1).groups == GROUPS - {"managed"}


@pytest.mark.parametrize("longest", ["128", "4", "1"])
def test_all_groups_work_whatever_a_fill_may_be(
    make: Make, monkeypatch: pytest.MonkeyPatch, longest: str
) -> None:
    monkeypatch.setenv("FAKE_ZE_PATTERN", longest)
    assert [*script(make())][-1] == "end"


def test_signals_go_round(make: Make, fake: Fake) -> None:
    """A thousand events take no more of Level Zero's than a few."""
    backend = make()
    stream = backend.stream_create(0)
    event = backend.event_create(False)
    for _ in range(1000):
        backend.event_record(event, stream)
        backend.stream_wait(stream, event)
        assert backend.stream_synchronize(stream, 10)
    assert fake.things() < 300


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)
def test_a_symbol_that_is_missing_is_said(fake: Fake, row: Any) -> None:
    fake.refused.add(row.name)
    if not row.optional:
        with pytest.raises(HalError, match=row.name) as caught:
            Api(fake)
        assert caught.value.code == "broken"
        return
    api = Api(fake)
    with pytest.raises(Unsupported, match=row.name):
        getattr(api, row.name)
    devices = level_zero_backend.seen(api)
    assert api.off == ({row.group} if row.group else set())
    assert level_zero_backend.groups_of(api, devices[0], devices) == GROUPS - {row.group}
    if not row.group:
        assert [each.pci for each in devices] == ["", ""]


# -- devices of one driver -------------------------------------------------------------------------


def test_devices_copy_from_one_another(make: Make, fake: Fake) -> None:
    """They share a context: a copy from another one's memory is refused by the fake."""
    api = Api(fake)
    one, two = (LevelZeroBackend(info(index), api) for index in range(2))
    stream, beyond = one.stream_create(0), two.stream_create(0)
    near, far = one.alloc(4096, Kind.DEVICE, stream), two.alloc(4096, Kind.DEVICE, beyond)
    two.fill(far, b"\x06", 4096, beyond)
    assert two.synchronize(10)
    assert one.peer_enable(one)
    assert one.peer_enable(two)
    assert not one.peer_enable(object())
    done = two.event_create(False)
    two.event_record(done, beyond)
    one.stream_wait(stream, done)
    two.event_destroy(done)  # what waits for it still does
    one.copy_peer(near, far, 4096, two, stream)
    assert read(one, near, stream, 4096) == b"\x06" * 4096
    with pytest.raises(HalError, match="no device of this driver"):
        one.copy_peer(near, far, 4096, object(), stream)
    two.close()
    assert read(one, near, stream) == b"\x06" * 4  # the context is there while one is open
    one.close()
    assert (fake.live(), fake.things()) == (0, 0)
    alone = make()  # over functions of its own, and so in a context of its own
    stranger = make(1)
    assert not alone.peer_enable(stranger)
    stream = alone.stream_create(0)
    there = stranger.alloc(64, Kind.DEVICE, stranger.stream_create(0))
    with pytest.raises(HalError, match="zeCommandListAppendMemoryCopy on level_zero:0 failed"):
        alone.copy_peer(alone.alloc(64, Kind.DEVICE, stream), there, 64, stranger, stream)


def test_a_device_that_is_closed_leaves_what_others_wait_for(
    fake: Fake, fake_object: bytes
) -> None:
    api = Api(fake)
    one, two = (LevelZeroBackend(info(index), api) for index in range(2))
    stream, beyond = one.stream_create(0), two.stream_create(0)
    gate = ctypes.c_int32(0)
    hold = one.function(one.module_load(spirv(fake_object), "spirv"), "hold")
    launch(one, hold, stream, ctypes.addressof(gate))
    done = two.event_create(False)
    two.event_record(done, beyond)
    one.stream_wait(stream, done)  # it has not come to it when the other device goes
    two.close()
    assert not one.stream_done(stream)
    gate.value = 1
    assert one.stream_synchronize(stream, 10)
    one.close()
    assert (fake.live(), fake.things()) == (0, 0)


def test_peers_are_declared_only_where_the_driver_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ZE_NO_PEERS", "1")
    one, two = make(0), make(1)
    assert "peer" not in one.groups
    assert not one.peer_enable(two)


# -- kernels ---------------------------------------------------------------------------------------


def spirv(code: bytes) -> bytes:
    """As the fake takes it."""
    return struct.pack("<5I", 0x07230203, 0x00010000, 0, 1, 0) + code


def launch(backend: LevelZeroBackend, function: int, stream: int, *values: int) -> None:
    boxes = [ctypes.c_uint64(value) for value in values]
    table = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
    at, one = ctypes.addressof(table), (1, 1, 1)
    backend.launch(function, one, one, 0, stream, at, [-8, 4][: len(boxes)])


def test_spirv_is_loaded_launched_and_let_go_of(make: Make, fake: Fake, fake_object: bytes) -> None:
    backend = make()
    assert backend.limits.threads == 1024
    assert backend.limits.shared_bytes == 65536
    stream = backend.stream_create(0)
    value = backend.alloc(4, Kind.DEVICE, stream)
    backend.fill(value, b"\0", 4, stream)
    assert read(backend, value, stream) == b"\0" * 4
    before = fake.things()
    module = backend.module_load(spirv(fake_object), "spirv")
    function = backend.function(module, "add")
    assert backend.function_facts(function).threads == 1024
    for number in range(1, 5):  # each has its own arguments, though they are the kernel's
        launch(backend, function, stream, value, number)
    backend.module_unload(module)  # what was queued runs all the same
    assert int.from_bytes(read(backend, value, stream), "little") == 10
    backend.module_unload(backend.module_load(spirv(fake_object), "spirv"))
    assert backend.synchronize(10)
    backend.module_unload(backend.module_load(spirv(fake_object), "spirv"))
    assert fake.things() == before


def test_kernels_are_checked_before_their_launch(make: Make, fake_object: bytes) -> None:
    backend = make()
    stream = backend.stream_create(0)
    module = backend.module_load(spirv(fake_object), "spirv")
    with pytest.raises(HalError, match="nothing_like_it") as caught:
        backend.function(module, "nothing_like_it")
    assert caught.value.code == "no_such_kernel"
    function = backend.function(module, "add")
    backend.function_arguments(function, (-8, 4))
    with pytest.raises(HalError, match="the kernel has 2") as caught:
        backend.function_arguments(function, (-8, 4, 4))
    assert caught.value.code == "wrong_arguments"
    box = ctypes.c_uint64()
    table = (ctypes.c_void_p * 2)(*[ctypes.addressof(box)] * 2)
    one = (1, 1, 1)
    with pytest.raises(HalError, match="pointer to local memory"):
        backend.launch(function, one, one, 64, stream, ctypes.addressof(table), (-8, 4))


def test_code_that_the_driver_does_not_take_comes_with_its_build_log(
    make: Make, fake: Fake
) -> None:
    backend = make()
    before = fake.things()
    with pytest.raises(CompileError) as caught:
        backend.module_load(spirv(b"?" * 100), "spirv")
    error = caught.value
    assert error.log == "line 3: a word that the fake does not know"
    assert error.log in str(error)
    assert (error.code, error.op) == ("not_taken", "zeModuleCreate")
    assert error.native == Ze.RESULT_ERROR_MODULE_BUILD_FAILURE
    assert error.native_name == "ZE_RESULT_ERROR_MODULE_BUILD_FAILURE"
    with pytest.raises(CompileError, match="magic number"):
        backend.module_load(b"nonsense", "spirv")
    with pytest.raises(Unsupported, match="takes spirv"):
        backend.module_load(b"__kernel void f() {}", "cl")
    assert fake.things() == before  # the log was given back


def test_out_of_memory_waits_for_what_is_being_given_back(make: Make) -> None:
    backend = make()
    stream = backend.stream_create(0)
    ptr = backend.alloc(700 << 20, Kind.DEVICE, stream)
    backend.fill(ptr, b"\1", 64 << 20, stream)
    backend.free(ptr, Kind.DEVICE, stream)
    again = backend.alloc(800 << 20, Kind.DEVICE, stream)
    with pytest.raises(OutOfMemory) as caught:
        backend.alloc(500 << 20, Kind.DEVICE, stream)
    error = caught.value
    assert (error.requested, error.total) == (500 << 20, 1 << 30)
    assert error.native == Ze.RESULT_ERROR_OUT_OF_DEVICE_MEMORY
    assert error.native_name == "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"
    backend.free(again, Kind.DEVICE, stream)


def test_a_device_that_is_not_shown_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZE_AFFINITY_MASK", "1")
    with pytest.raises(HalError, match="ZE_AFFINITY_MASK") as caught:
        LevelZeroBackend(info(0), Api(fake))
    assert caught.value.code == "not_visible"
    LevelZeroBackend(info(1), Api(fake)).close()


# -- the driver as a whole, in processes of its own ------------------------------------------------

WHOLE = """
import json, sys
from drivetrain import hal
from drivetrain.hal.conformance.running import evidence_of
state = hal.drivers()["level_zero"]
devices = hal.devices("level_zero")
out = dict(state=state.state, reason=state.reason,
           devices=[[d.address, d.uuid, d.name, d.vendor, d.info.pci, d.info.memory_bytes,
                     d.capabilities.cores, evidence_of(d)] for d in devices],
           others=sorted(n for n, d in hal.drivers().items() if d.state == "usable"))
if "kernel" in sys.argv:
    import pathlib
    device = devices[0]
    code = pathlib.Path(sys.argv[sys.argv.index("kernel") + 1]).read_bytes()
    source = hal.Source.binary(code, "spirv", {"add": ["ptr", "i32"]})
    stream = device.stream()
    buffer = device.alloc(4, stream=stream)
    buffer.copy_from((5).to_bytes(4, "little"), stream=stream)
    device.compile(source).kernel("add")(stream, 1, 1, buffer, 7)
    back = bytearray(4)
    buffer.copy_to(back, stream=stream)
    stream.synchronize()
    out["sum"] = int.from_bytes(back, "little")
    try:
        device.compile(hal.Source.cuda('extern "C" __global__ void f() {}'))
    except Exception as error:
        out["refused"] = f"{type(error).__name__}: {error}"
if "probe" in sys.argv:
    from drivetrain.hal.probe import probe
    out["verdicts"] = [[v.usable, v.reason] for v in probe(list(devices)).values()]
print(json.dumps(out))
"""


def whole(path: Path | str, *words: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, *words],
        env={
            **os.environ,
            "DRIVETRAIN_LEVEL_ZERO_LIBRARY": str(path),
            "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_another_loader_is_selected_listed_probed_and_used(
    fake_library: Any, fake_object: bytes, tmp_path: Path
) -> None:
    (tmp_path / "kernels").write_bytes(spirv(fake_object))
    found = whole(fake_library("fake_ze.c"), "probe", "kernel", str(tmp_path / "kernels"))
    assert found["state"] == "usable"
    assert found["sum"] == 12
    assert "BadInput" in found["refused"]
    assert "level_zero" in found["refused"]
    assert found["devices"] == [
        [f"level_zero:{n}", info(n).uuid, f"Fake Arc {n}", "intel", "", 1 << 30, 512, "fake"]
        for n in range(2)
    ]
    assert found["verdicts"] == [[True, ""]] * 2


@pytest.mark.parametrize(
    ("environment", "state", "reason"),
    [
        ({"FAKE_ZE_FAULT": "zeInit:1:hang", "DRIVETRAIN_DISCOVERY_LIMIT_S": "2"}, "broken", "2 s"),
        ({"FAKE_ZE_FAULT": "zeDeviceGet:1:0x7ffffffe"}, "broken", "zeDeviceGet failed"),
        ({"FAKE_ZE_NO_DRIVER": "1"}, "absent", "no driver stands behind the loader"),
        ({"FAKE_ZE_DEVICES": "0"}, "absent", "show no device"),
    ],
)
def test_a_loader_that_hangs_fails_or_has_nothing_leaves_the_other_drivers(
    fake_library: Any, environment: dict[str, str], state: str, reason: str
) -> None:
    found = whole(fake_library("fake_ze.c"), **environment)
    assert found["state"] == state, found
    assert reason in found["reason"]
    assert found["devices"] == []
    assert "cpu" in found["others"]


def test_debians_loader_without_a_driver_is_absent_when_it_is_asked() -> None:
    path = Path("/usr/lib/x86_64-linux-gnu/libze_loader.so.1")
    if not path.is_file():
        pytest.skip("there is no Level Zero loader (Debian's package libze1)")
    if any(Path("/dev").glob("dri/renderD*")):
        pytest.skip("this machine may have a device")
    found = whole(path)
    assert found["state"] == "absent", found
    assert found["reason"]


def test_why_there_is_no_device_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DRIVETRAIN_LEVEL_ZERO_LIBRARY", "ZE_ENABLE_ALT_DRIVERS", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "no Level Zero loader" in level_zero.absent(tmp_path)
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libze_loader.so.1").touch()
    assert "is installed, but no driver" in level_zero.absent(tmp_path)
    card = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x8086\n")
    (card / "class").write_text("0x030000\n")
    assert "an Intel GPU is on the PCI bus" in level_zero.absent(tmp_path)
    (tmp_path / "usr/lib/libze_intel_gpu.so.1").touch()
    assert "no /dev/dri/renderD*" in level_zero.absent(tmp_path)
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    assert level_zero.absent(tmp_path) == ""
    with monkeypatch.context() as patch:
        patch.setenv("DRIVETRAIN_LEVEL_ZERO_LIBRARY", "/nowhere/loader.so")
        assert "names no file" in level_zero.absent(tmp_path)


def test_no_driver_behind_the_loader_is_a_missing_driver(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ZE_NO_DRIVER", "1")
    with pytest.raises(DriverMissing) as caught:
        level_zero_backend.seen(Api(fake))
    assert caught.value.native == Ze.RESULT_ERROR_UNINITIALIZED


def test_one_card_seen_by_two_drivers_is_one_device_with_two_routes() -> None:
    """OpenCL is listed: it runs kernels there."""
    routes = [
        DeviceInfo("opencl", 0, "Arc", "intel", "opencl-arc", pci="0000:03:00.0"),
        DeviceInfo("level_zero", 0, "Arc", "intel", info(0).uuid, pci="0000:03:00.0"),
        DeviceInfo("level_zero", 1, "Arc", "intel", info(1).uuid, pci="0000:04:00.0"),
    ]
    found = registry._arranged({}, routes)
    assert [(d.address, d.routes) for d in found.listed] == [
        ("opencl:0", ("opencl:0", "level_zero:0")),
        ("level_zero:1", ("level_zero:1",)),
    ]
