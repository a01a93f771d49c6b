"""The opencl driver over a platform of the tests' own, which is strict about versions, flushes and
lifetimes and fails on demand. It stands behind the machine's own loader; what it shows is the order
of calls and what becomes of faults, never results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from drivetrain.hal import registry
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.isolated import python_path

SOURCE = Path(__file__).with_name("fake_opencl.c")
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(not loader.library(loader.LOADER), reason="there is no OpenCL loader"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
    pytest.mark.skipif(
        not Path("/usr/include/CL/cl_icd.h").is_file(),
        reason="there is no CL/cl_icd.h (Debian: opencl-headers)",
    ),
]

START = """
import ctypes, json, os, sys
from drivetrain import hal
from drivetrain.errors import *
fake = ctypes.CDLL(os.environ["FAKE_LIB"])
ADD = "__kernel void add(__global int *out, int by){}"

def tell(**facts):
    print(json.dumps(facts))

def refused(call, kind):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{call} was accepted")

def words(buffer, stream):
    out = bytearray(buffer.nbytes)
    buffer.copy_to(out, stream=stream)
    stream.synchronize(20)
    return list(memoryview(out).cast("i"))

def opened():
    device = hal.device("opencl:0")
    return device, device.stream()

def kernel(device, name="add", text=ADD):
    types = {"add": [hal.PTR, hal.I32]}.get(name, [hal.PTR])
    return device.compile(hal.Source.opencl(text)).kernel(name, types)
"""

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def fake_opencl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake_opencl") / "libfakeopencl.so"
    assert COMPILER is not None
    command = [COMPILER, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-pthread", str(SOURCE), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def vendors(fake_opencl: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "vendors"
    folder.mkdir()
    (folder / "fake.icd").write_text(f"{fake_opencl}\n")
    return folder


def _told(script: str, fake: Path, vendors: Path, environment: dict[str, object]) -> Any:
    """What a script told that ran in a process of its own, with the fake platform."""
    variables = {
        **os.environ,
        "OCL_ICD_VENDORS": str(vendors),
        "FAKE_LIB": str(fake),
        "PYTHONPATH": python_path(),
        "DRIVETRAIN_OPENCL_FILL": "command",  # the fake runs no kernels of that size
        "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",  # the machines that run tests are shared
        **{name: str(value) for name, value in environment.items()},
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", START + dedent(script)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else None


@pytest.fixture
def fresh(fake_opencl: Path, vendors: Path) -> Run:
    """Runs a script on a machine that nothing is known of."""

    def go(script: str, **environment: object) -> Any:
        return _told(script, fake_opencl, vendors, environment)

    return go


@pytest.fixture
def run(fake_opencl: Path, tmp_path: Path) -> Run:
    """Runs a script on a machine whose devices were listed before, by a test with the same."""

    def go(script: str, **environment: object) -> Any:
        facts = repr(sorted(environment.items())).encode()
        home = fake_opencl.parent / hashlib.sha256(facts).hexdigest()[:16]
        vendors = home / "vendors"
        vendors.mkdir(parents=True, exist_ok=True)
        if not (vendors / "fake.icd").exists():
            (vendors / "fake.icd").write_text(f"{fake_opencl}\n")
        own = {"DRIVETRAIN_HOME": home, "DRIVETRAIN_CACHE": tmp_path / "cache", **environment}
        return _told(script, fake_opencl, vendors, own)

    return go


LISTED = """
state = hal.drivers()["opencl"]
tell(state=state.state, reason=state.reason, version=state.version,
     devices=[[d.address, d.name, d.vendor, d.uuid, d.info.pci, d.info.by_name_only,
               d.info.memory_domain] for d in hal.devices("opencl")],
     all=[d.address for d in hal.devices()], default=hal.device().address)
"""


# -- discovery -------------------------------------------------------------------------------------


def test_devices_are_known_by_their_platforms_name_not_by_a_vendors_number(fresh: Run) -> None:
    found = fresh(LISTED, FAKE_CL_DEVICES=2)
    assert (found["state"], found["version"]) == ("usable", "Fake 1.2.3")
    assert [each[:3] for each in found["devices"]] == [
        ["opencl:0", "Fake device", "nvidia"],
        ["opencl:1", "Fake device", "nvidia"],
    ]
    assert len({each[3] for each in found["devices"]}) == 2
    assert found["all"] == ["opencl:0", "opencl:1", "cpu:0"]
    assert found["default"] == "opencl:0"


def test_another_runtime_on_the_processor_is_listed_last_and_never_the_default(fresh: Run) -> None:
    found = fresh(LISTED, FAKE_CL_TYPE="cpu")
    assert found["all"] == ["cpu:0", "opencl:0"]
    assert found["default"] == "cpu:0"
    [device] = found["devices"]
    assert device[5:] == [True, "host"]


@pytest.mark.parametrize(
    ("extension", "pci"),
    [
        ("cl_khr_pci_bus_info", "00000001:18:00.0"),
        ("cl_nv_device_attribute_query", "00000000:3b:00.0"),
        ("cl_amd_device_attribute_query", "00000000:41:00.0"),
        ("", ""),
    ],
)
def test_the_place_on_the_bus_is_read_as_the_vendor_tells_it(
    fresh: Run, extension: str, pci: str
) -> None:
    [device] = fresh(LISTED, FAKE_CL_EXTENSIONS=extension)["devices"]
    assert device[4] == pci


def test_a_gpu_that_cuda_sees_too_is_one_device_with_two_routes(fresh: Run) -> None:
    [device] = fresh(
        LISTED,
        FAKE_CL_NAME="NVIDIA CUDA",
        FAKE_CL_EXTENSIONS="cl_nv_device_attribute_query cl_khr_device_uuid",
    )["devices"]
    assert device[3] == "GPU-11223344-5566-7788-090a-0b0c0d0e0f00"
    for pci in ("", "00000000:3b:00.0"):
        cuda = DeviceInfo("cuda", 0, "H", "nvidia", device[3], pci=pci)
        opencl = DeviceInfo("opencl", 0, device[1], "nvidia", device[3], pci=pci)
        found = registry._arranged({}, [cuda, opencl])
        assert [each.address for each in found.listed] == ["cuda:0"]
        assert found.listed[0].routes == ("cuda:0", "opencl:0")


@pytest.mark.parametrize(
    ("environment", "state", "reason"),
    [
        ({"FAKE_CL_PLATFORMS": 0}, "broken", "CL_PLATFORM_NOT_FOUND_KHR"),
        ({"FAKE_CL_DEVICES": 0}, "absent", "no OpenCL 1.2 device on any platform"),
        ({"FAKE_CL_VERSION": 110}, "absent", "OpenCL 1.1 fake"),
        ({"FAKE_CL_FAULT": "clGetDeviceIDs:0:-6"}, "broken", "CL_OUT_OF_HOST_MEMORY"),
        ({"FAKE_CL_ABORT": "devices"}, "broken", "SIGABRT"),
        ({"FAKE_CL_ABORT": "load"}, "broken", "SIGABRT"),
        (
            {"FAKE_CL_HANG": "devices", "DRIVETRAIN_DISCOVERY_LIMIT_S": "2"},
            "broken",
            "did not answer within 2 s",
        ),
    ],
)
def test_a_platform_that_lists_nothing_is_absent_or_broken_with_the_reason(
    fresh: Run, environment: dict[str, object], state: str, reason: str
) -> None:
    found = fresh(LISTED, **environment)
    assert found["state"] == state, found
    assert reason in found["reason"]
    assert found["all"] == ["cpu:0"]


def test_a_registered_library_that_does_not_load_is_broken_and_named(
    fresh: Run, vendors: Path
) -> None:
    (vendors / "fake.icd").write_text("libnot-installed-anywhere.so.7\n")
    found = fresh(LISTED)
    assert found["state"] == "broken"
    assert "fake.icd: libnot-installed-anywhere.so.7: cannot open" in found["reason"]


def test_nothing_registered_is_absent_without_a_child(fresh: Run, vendors: Path) -> None:
    (vendors / "fake.icd").unlink()
    found = fresh(LISTED)
    assert found["state"] == "absent"
    assert str(vendors) in found["reason"]


def test_a_listing_is_remembered_until_what_it_depends_on_changes(
    fresh: Run, vendors: Path
) -> None:
    assert fresh(LISTED)["state"] == "usable"
    assert fresh(LISTED, FAKE_CL_ABORT="devices")["state"] == "usable", "the loader was asked again"
    icd = vendors / "fake.icd"
    (vendors / "more.icd").write_text(icd.read_text())
    assert fresh(LISTED, FAKE_CL_ABORT="devices")["state"] == "broken"
    assert fresh(LISTED)["state"] == "usable"
    assert fresh(LISTED, FAKE_CL_ABORT="devices", OCL_ICD_FILENAMES="x")["state"] == "broken"


def test_a_damaged_memory_of_a_listing_is_not_believed(fresh: Run) -> None:
    fresh(LISTED)
    file = Path(os.environ["DRIVETRAIN_HOME"]) / "opencl-devices.json"
    kept = json.loads(file.read_text())
    [listing] = kept.values()
    listing["found"][0]["index"] = "0"
    file.write_text(json.dumps(kept))
    assert fresh(LISTED)["devices"][0][0] == "opencl:0"
    file.write_text("{")
    assert fresh(LISTED)["state"] == "usable"


def test_a_device_that_its_platform_calls_unavailable_has_that_as_its_fault(fresh: Run) -> None:
    found = fresh(
        """
        from drivetrain.hal.probe import verdict
        told = verdict(hal.device("opencl:0"))
        tell(usable=told.usable, reason=told.reason, default=hal.device().address)
        """,
        FAKE_CL_AVAILABLE=0,
    )
    assert found["usable"] is False
    assert "not available" in found["reason"]
    assert found["default"] == "cpu:0"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, ""),
        ({"FAKE_CL_FAULT": "clCreateContext:0:-6"}, "CL_OUT_OF_HOST_MEMORY"),
        ({"FAKE_CL_FAULT": "status:0:-9999"}, "NVIDIA -9999"),
        ({"FAKE_CL_VERSION": 120}, ""),
    ],
)
def test_the_probe_does_a_small_operation(
    fresh: Run, environment: dict[str, object], reason: str
) -> None:
    found = fresh(
        """
        from drivetrain.hal.probe import probe
        [told] = probe([hal.device("opencl:0")]).values()
        tell(usable=told.usable, reason=told.reason)
        """,
        **environment,
    )
    assert found["usable"] is (reason == "")
    assert reason in found["reason"]


# -- which platforms are registered ----------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder with a loader, PoCL registered, and NVIDIA's library without a file."""
    for name in (loader.VENDORS, loader.FILENAMES, "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "root"
    folder = root / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    (folder / loader.LOADER).touch()
    (folder / loader.NVIDIA).touch()
    (root / loader.REGISTERED).mkdir(parents=True)
    (root / loader.REGISTERED / "pocl.icd").write_text("libpocl.so.2\n")
    return root


def test_nvidias_library_without_a_file_is_registered_beside_the_others(machine: Path) -> None:
    folder = loader.own_folder(machine)
    assert folder is not None
    assert {path.name: path.read_text().strip() for path in folder.glob("*.icd")} == {
        "pocl.icd": "libpocl.so.2",
        "drivetrain-nvidia.icd": str(machine / "usr/lib/x86_64-linux-gnu" / loader.NVIDIA),
    }
    assert loader.environment(machine) == {"OCL_ICD_VENDORS": str(folder)}
    assert loader.own_folder(machine) == folder
    (folder / "pocl.icd").unlink()
    assert loader.own_folder(machine) == folder
    assert (folder / "pocl.icd").read_text() == "libpocl.so.2\n"


def test_what_is_registered_or_chosen_by_the_user_is_left_as_it_is(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / loader.REGISTERED / "nvidia.icd").write_text("libnvidia-opencl.so.1\n")
    assert loader.own_folder(machine) is None
    (machine / loader.REGISTERED / "nvidia.icd").unlink()
    monkeypatch.setenv("OCL_ICD_VENDORS", str(machine / "elsewhere"))
    assert loader.own_folder(machine) is None
    assert loader.environment(machine) == {}


def test_a_machine_without_loader_or_platform_is_told_apart_by_files(machine: Path) -> None:
    assert loader.absent(machine) == ""
    (machine / loader.REGISTERED / "pocl.icd").unlink()
    assert loader.absent(machine) == ""
    folder = machine / "usr/lib/x86_64-linux-gnu"
    (folder / loader.NVIDIA).unlink()
    assert "no platform is registered" in loader.absent(machine)
    (folder / loader.LOADER).unlink()
    assert loader.absent(machine) == "no OpenCL loader (libOpenCL.so.1)"


def test_an_unregistered_platform_of_nvidias_is_used_together_with_the_registered_ones(
    fresh: Run, fake_opencl: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "nvidia"
    folder.mkdir()
    shutil.copy(fake_opencl, folder / loader.NVIDIA)
    found = fresh(
        """
        del os.environ["OCL_ICD_VENDORS"]
        before = dict(os.environ)
        listed = [(d.vendor, d.name) for d in hal.devices("opencl")]
        device = next(d for d in hal.devices("opencl") if d.vendor == "nvidia")
        stream = device.stream()
        buffer = device.alloc(16, stream=stream)
        buffer.fill(b"\\7\\0\\0\\0", stream=stream)
        code = kernel(device)
        code(stream, 1, 4, buffer, 3)
        tell(listed=listed, words=words(buffer, stream), same=before == dict(os.environ))
        """,
        OCL_ICD_VENDORS="",
        LD_LIBRARY_PATH=folder,
        FAKE_CL_NAME="NVIDIA CUDA",
        DRIVETRAIN_DISCOVERY_LIMIT_S=8,
    )
    assert ["nvidia", "Fake device"] in found["listed"]
    registered = len(list(Path("/etc/OpenCL/vendors").glob("*.icd")))
    assert len(found["listed"]) >= 1 + bool(registered)
    assert found["words"] == [10] * 4
    assert found["same"], "the environment was left changed"


# -- memory ----------------------------------------------------------------------------------------

SORTS = {
    "svm": {"FAKE_CL_VERSION": 300, "FAKE_CL_SVM": 1},
    "fine svm": {"FAKE_CL_VERSION": 200, "FAKE_CL_SVM": 3},
    "usm": {"FAKE_CL_USM": 1, "FAKE_CL_VERSION": 300},
    "buffers of 1.2": {"FAKE_CL_VERSION": 120, "FAKE_CL_SVM": 1},  # it claims what 2.0 brought
    "3.0 without svm": {"FAKE_CL_VERSION": 300, "FAKE_CL_SVM": 0},
}
TWINS = [{}, {"DRIVETRAIN_NATIVE": "0"}]


@pytest.mark.parametrize(
    ("sort", "twin"),
    [*((sort, TWINS[0]) for sort in SORTS), ("svm", TWINS[1]), ("buffers of 1.2", TWINS[1])],
)
def test_every_sort_of_memory_is_filled_copied_computed_with_and_given_back(
    run: Run, sort: str, twin: dict[str, str]
) -> None:
    found = run(
        """
        from drivetrain.hal.opened import close_all, opened as open_of
        device, stream = opened()
        backend = open_of(device).backend
        for width in (1, 2, 4, 8, 16):
            pattern = bytes(range(1, width + 1))
            with device.alloc(width * 37, stream=stream) as buffer:
                buffer.fill(pattern, stream=stream)
                out = bytearray(width * 37)
                buffer.copy_to(out, stream=stream)
                stream.synchronize(20)
                assert bytes(out) == pattern * 37, width
        content = bytes(range(256)) * 4
        buffer, other = device.alloc(1024, stream=stream), device.alloc(1024, stream=stream)
        host = bytearray(content)
        buffer.copy_from(host, stream=stream)
        host[:] = bytes(1024)
        other.copy_from(buffer.view(3, 1000), stream=stream)
        out = bytearray(1000)
        other.copy_to(out, stream=stream)
        stream.synchronize(20)
        assert bytes(out) == content[3:1003]
        large = device.alloc(1 << 20, stream=stream)
        big = bytearray(b"z" * (1 << 20))
        large.copy_from(big, stream=stream)
        big[:] = bytes(1 << 20)
        assert words(large, stream)[-1] == 0x7A7A7A7A
        add = kernel(device)
        other.fill(b"\\1\\0\\0\\0", stream=stream)
        add(stream, (2, 2), (16, 4), other, 4)
        add.plan(stream, 1, 32, other, 5)()
        add(stream, 1, 1, None, 5)
        assert words(other, stream)[:33] == [10] * 32 + [5]
        add(stream, 1, 32, large.view(512, 128), 1)
        assert words(large.view(512, 128), stream) == [0x7A7A7A7B] * 32
        for kind in (hal.MemoryKind.PINNED, hal.MemoryKind.MANAGED):
            if kind.name.lower() not in backend.groups:
                continue
            with device.alloc(4096, stream=stream, kind=kind) as pinned:
                view = pinned.memoryview()
                view[:] = b"q" * 4096
                other.copy_from(pinned.view(8, 1024), stream=stream)
                other.copy_to(pinned.view(0, 1024), stream=stream)
                pinned.view(2048, 2048).fill(b"abcdefgh", stream=stream)
                stream.synchronize(20)
                assert bytes(view) == b"q" * 2048 + b"abcdefgh" * 256
                view.release()
                with device.alloc(1024, stream=stream, kind=kind) as second:
                    second.copy_from(content, stream=stream)
                    pinned.copy_from(second, stream=stream)
                    out = bytearray(4096)
                    pinned.copy_to(out, stream=stream)
                    stream.synchronize(20)
                    assert bytes(out) == content + b"q" * 1024 + b"abcdefgh" * 256
        with stream.capture() as graph:
            other.fill(b"\\2\\0\\0\\0", stream=stream)
            add(stream, 1, 32, other, 4)
        graph.launch(stream)
        assert words(other, stream)[:33] == [6] * 32 + [2]
        heap = backend._heap.name
        groups = sorted(backend.groups)
        del graph, add, buffer, other, large
        close_all()
        tell(heap=heap, groups=groups, live=[fake.fake_cl_live(kind) for kind in range(6)],
             spans=fake.fake_cl_spans())
        """,
        **SORTS[sort],
        **twin,
    )
    assert found["heap"] == {"buffers of 1.2": "buffers", "3.0 without svm": "buffers"}.get(
        sort, sort.split()[-1]
    )
    managed = ["managed"] if sort in ("fine svm", "usm") else []
    assert found["groups"] == ["compute", *managed, "pinned", "timing"]
    assert found["live"] == [0] * 6, "contexts, queues, events, buffers, programs, kernels are left"
    assert found["spans"] == 0


def test_a_loader_of_1_2_serves_what_it_can_and_an_older_one_is_broken(run: Run) -> None:
    run(
        """
        from drivetrain.hal.drivers import opencl_api
        from drivetrain.hal.drivers.opencl_backend import OpenclBackend
        library = ctypes.CDLL("libOpenCL.so.1")
        since = {row.name: row.since for row in opencl_api.FUNCTIONS}

        class Older:
            def __init__(self, version): self.version = version
            def __getitem__(self, symbol):
                if since[symbol] > self.version: raise AttributeError(symbol)
                return library[symbol]

        api = opencl_api.Api(Older(120))
        assert api.off == {"queue_properties", "svm", "il"}
        error = refused(lambda: api.clSVMAlloc, Unsupported)
        assert error.op == "clSVMAlloc"
        backend = OpenclBackend(hal.device("opencl:0").info, api)
        assert backend._heap.name == "buffers"
        stream = backend.stream_create(-1)
        ptr = backend.alloc(64, 0, stream)
        backend.fill(ptr, b"ab", 32, stream)
        out = ctypes.create_string_buffer(64)
        backend.copy(ctypes.addressof(out), ptr, 64, 2, stream, False)
        assert backend.stream_synchronize(stream, 20.0) and out.raw == b"ab" * 32
        backend.close()
        error = refused(lambda: opencl_api.Api(Older(110)), HalError)
        assert error.code == "broken" and "clEnqueueFillBuffer" in str(error)
        """,
        FAKE_CL_EXTENSIONS="cl_khr_priority_hints",
    )


def test_a_part_that_a_kernel_cannot_be_given_is_refused_and_named(run: Run) -> None:
    run(
        """
        device, stream = opened()
        buffer = device.alloc(1024, stream=stream)
        error = refused(lambda: kernel(device)(stream, 1, 1, buffer.view(4, 8), 1), HalError)
        assert error.code == "misaligned" and "multiples of 128 bytes" in str(error), error
        """,
        FAKE_CL_VERSION=120,
    )


@pytest.mark.parametrize("sort", SORTS)
def test_memory_that_runs_out_is_told_with_requested_free_and_total(run: Run, sort: str) -> None:
    run(
        """
        from drivetrain.hal.opened import opened as open_of
        device, stream = opened()
        driver = open_of(device).backend
        free, total = driver.memory()
        assert total == 8 << 20
        ptr = driver.alloc(3 << 20, 0, stream.handle)
        assert driver.memory()[0] == free - (3 << 20)
        for nbytes in (6 << 20, (4 << 20) + 4096, 1 << 40):
            error = refused(lambda: driver.alloc(nbytes, 0, stream.handle), OutOfMemory)
            assert (error.requested, error.total) == (nbytes, total), vars(error)
            assert error.free == free - (3 << 20)
        for _ in range(20):  # what is freed can be had again, though nobody waited
            driver.free(ptr, 0, stream.handle)
            ptr = driver.alloc(4 << 20, 0, stream.handle)
        error = refused(lambda: driver.free(ptr + 16, 0, stream.handle), HalError)
        assert error.code == "not_allocated"
        """,
        FAKE_CL_MEMORY=8 << 20,
        **SORTS[sort],
    )


def test_a_request_waits_for_memory_that_is_about_to_come_back(run: Run) -> None:
    run(
        """
        import threading
        from drivetrain.hal.opened import opened as open_of
        device, stream = opened()
        driver = open_of(device).backend
        hold = kernel(device, "hold", "__kernel void hold(__global int *out){}")
        ptr, _ = (driver.alloc(3 << 20, 0, stream.handle) for _ in range(2))
        hold(stream, 1, 1, None)
        driver.free(ptr, 0, stream.handle)
        threading.Timer(0.3, lambda: fake.fake_cl_release(1)).start()
        driver.alloc(3 << 20, 0, stream.handle)
        """,
        FAKE_CL_MEMORY=8 << 20,
    )


def test_free_memory_and_sensors_are_told_where_somebody_knows_them(fresh: Run) -> None:
    script = """
        from drivetrain.hal.opened import opened as open_of
        device = hal.device("opencl:0")
        now = device.telemetry()
        tell(memory=open_of(device).backend.memory(), used=now.memory_used_bytes,
             total=now.memory_total_bytes, power=now.power_w, health=now.health)
        """
    found = fresh(script)
    assert found == {
        "memory": [1 << 30, 1 << 30],
        "used": None,
        "total": 1 << 30,
        "power": None,
        "health": "unknown",
    }
    # Each is another machine to the listing that is remembered.
    amd = fresh(script, FAKE_CL_EXTENSIONS="cl_amd_device_attribute_query", POCL_ANY="amd")
    assert amd["memory"] == [4096 << 10, 1 << 30]
    processor = fresh(script, FAKE_CL_TYPE="cpu", POCL_ANY="processor")
    assert processor["health"] == "ok"
    assert 0 < processor["used"] < processor["total"]
    nvidia = {"FAKE_CL_NAME": "NVIDIA CUDA", "FAKE_CL_EXTENSIONS": "cl_khr_device_uuid"}
    assert fresh(script, **nvidia, POCL_ANY="nvidia")["health"].startswith("unknown: ")


def test_memory_is_given_back_only_after_the_work_before(run: Run) -> None:
    run(
        """
        from drivetrain.hal.opened import opened as open_of
        device, stream = opened()
        driver = open_of(device).backend
        hold = kernel(device, "hold", "__kernel void hold(__global int *out){}")
        ptr = driver.alloc(4096, 0, stream.handle)
        out = bytearray(4096)
        hold(stream, 1, 1, None)
        driver.fill(ptr, b"x", 4096, stream.handle)
        address = ctypes.addressof(ctypes.c_char.from_buffer(out))
        driver.copy(address, ptr, 4096, 2, stream.handle, False)
        spans = fake.fake_cl_spans()
        driver.free(ptr, 0, stream.handle)
        other = driver.alloc(16, 0, stream.handle)
        assert fake.fake_cl_spans() == spans + 1  # the fake aborts on a use after the free
        fake.fake_cl_release(1)
        stream.synchronize(20)
        assert bytes(out) == b"x" * 4096
        driver.free(other, 0, stream.handle)
        driver.alloc(16, 0, stream.handle)
        assert fake.fake_cl_spans() <= spans
        """
    )


# -- order and waits -------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS, ids=["native", "twin"])
def test_whatever_is_waited_for_was_flushed(run: Run, twin: dict[str, str]) -> None:
    run(
        """
        device, stream = opened()
        other, third = device.stream(), device.stream()
        add = kernel(device)
        buffer = device.alloc(128, stream=stream)
        buffer.fill(b"\\0", stream=stream)
        add(stream, 1, 32, buffer, 1)
        event = stream.record()
        while not event.done: pass
        add(stream, 1, 32, buffer, 1)
        other.wait(stream)
        add(other, 1, 32, buffer, 1)
        third.wait(other)
        assert words(buffer, third) == [3] * 32
        add(stream, 1, 32, buffer, 1)
        while not stream.done: pass
        assert stream.done
        add(stream, 1, 32, buffer, 1)
        event = stream.record()
        stream.close()
        event.synchronize(20)
        assert words(buffer, other) == [5] * 32
        add(other, 1, 32, buffer, 1)
        device.synchronize(20)
        start = other.record()
        end = other.record()
        end.synchronize(20)
        assert 0 <= end.seconds_since(start) < 20
        """,
        **twin,
    )


def test_waits_end_at_their_limits_and_the_work_goes_on(run: Run) -> None:
    run(
        """
        device, stream = opened()
        other = device.stream()
        hold = kernel(device, "hold", "__kernel void hold(__global int *out){}")
        hold(stream, 1, 1, None)
        event = stream.record()
        for wait in (stream.synchronize, event.synchronize, device.synchronize):
            error = refused(lambda: wait(0.05), Timeout)
            assert error.driver == "opencl"
        assert not stream.done and not event.done and not stream.done
        other.wait(event)
        buffer = device.alloc(16, stream=other)
        buffer.fill(b"\\1\\0\\0\\0", stream=other)
        assert not other.done
        fake.fake_cl_release(1)
        stream.synchronize(20)
        assert stream.done and event.done
        assert words(buffer, other) == [1] * 4
        """
    )


def test_a_copy_from_the_host_that_must_wait_does_so_with_a_limit(run: Run) -> None:
    run(
        """
        device, stream = opened()
        hold = kernel(device, "hold", "__kernel void hold(__global int *out){}")
        buffer = device.alloc(1 << 20, stream=stream)
        hold(stream, 1, 1, None)
        small = device.alloc(1000, stream=stream)
        host = bytearray(b"a" * 1000)
        small.copy_from(host, stream=stream)  # copied aside: nothing is waited for
        host[:] = b"b" * 1000
        os.environ["DRIVETRAIN_WAIT_LIMIT_S"] = "0.05"
        content = bytearray(1 << 20)
        refused(lambda: buffer.copy_from(content, stream=stream), Timeout)
        fake.fake_cl_release(1)
        del os.environ["DRIVETRAIN_WAIT_LIMIT_S"]
        assert set(words(small, stream)) == {0x61616161}
        """
    )


def test_priorities_are_hints_where_the_device_takes_them(run: Run) -> None:
    script = """
        device = hal.device("opencl:0")
        streams = [device.stream(priority=p) for p in (-5, 0, 7)]
        # The first told the time, and is the one of usual priority from then on.
        tell(found=[fake.fake_cl_priority(n) for n in range(3)])
        """
    hints = "cl_khr_priority_hints"
    assert run(script, FAKE_CL_EXTENSIONS=hints)["found"] == [2, 1, 4]
    assert run(script)["found"] == [0, 0, 0]
    assert run(script, FAKE_CL_EXTENSIONS=hints, FAKE_CL_VERSION=120)["found"] == [0, 0, 0]


def test_times_are_declared_only_where_an_event_knows_one(run: Run) -> None:
    script = """
        from drivetrain.hal.opened import opened as open_of
        device, stream = opened()
        first, last = stream.record(), stream.record()
        last.synchronize(20)
        timed = "timing" in open_of(device).backend.groups
        if timed:
            assert 0 <= last.seconds_since(first) < 20
        else:
            refused(lambda: last.seconds_since(first), Unsupported)
        tell(timed=timed)
        """
    assert run(script)["timed"]
    fault = "clGetEventProfilingInfo:0:-7"
    assert not run(script, FAKE_CL_FAULT=fault)["timed"]
    assert not run(script, DRIVETRAIN_OPENCL_PROFILING=0)["timed"]


def test_two_devices_wait_for_each_other_and_copy_through_the_host(run: Run) -> None:
    run(
        """
        one, two = hal.devices("opencl")
        here, there = one.stream(), two.stream()
        a, b = one.alloc(3 << 20, stream=here), two.alloc(3 << 20, stream=there)
        a.fill(b"\\5\\0\\0\\0", stream=here)
        there.wait(here)
        b.copy_from(a, stream=there)
        assert set(words(b, there)) == {5}
        assert one.link(two).kind.value == "staged"
        """,
        FAKE_CL_DEVICES=2,
    )


# -- faults ----------------------------------------------------------------------------------------


def test_failures_have_the_headers_names_and_our_kinds(run: Run) -> None:
    run(
        """
        device, stream = opened()
        buffer = device.alloc(128, stream=stream)
        add = kernel(device)
        def failing(name, code, call, kind, word):
            fake.fake_cl_fail(name.encode(), 1, code)
            error = refused(call, kind)
            facts = (error.code, error.native, error.op, error.driver, error.device)
            assert facts == (word, code, name, "opencl", "opencl:0"), facts
            assert type(error) is kind and error.native_name in str(error)
            return error
        launch = lambda: add(stream, 1, 32, buffer, 1)
        add(stream, 1, 32, buffer, 1)
        # The call from C fails, and again from Python, which says why.
        fake.fake_cl_fail(b"clEnqueueNDRangeKernel", 0, -54)
        error = refused(launch, HalError)
        assert (error.native_name, error.code) == ("CL_INVALID_WORK_GROUP_SIZE", "launch_resources")
        """
    )
    run(
        """
        device, stream = opened()
        add = kernel(device)
        buffer = device.alloc(128, stream=stream)
        fake.fake_cl_fail(b"clEnqueueNDRangeKernel", 0, -5)
        error = refused(lambda: add(stream, 1, 32, buffer, 1), HalError)
        assert (error.native_name, error.code) == ("CL_OUT_OF_RESOURCES", "launch_resources")
        assert not isinstance(error, OutOfMemory)
        """
    )
    run(
        """
        device, stream = opened()
        buffer = device.alloc(128, stream=stream)
        for code, kind, name in ((-4, OutOfMemory, "CL_MEM_OBJECT_ALLOCATION_FAILURE"),
                                 (-5, OutOfMemory, "CL_OUT_OF_RESOURCES"),
                                 (-30, HalError, "CL_INVALID_VALUE"),
                                 (-59, HalError, "CL_INVALID_OPERATION"),
                                 (-777, HalError, "OpenCL error -777")):
            fake.fake_cl_fail(b"clEnqueueSVMMemFill", 1, code)
            error = refused(lambda: buffer.fill(b"a", stream=stream), HalError)
            assert type(error) is kind and error.native_name == name and error.native == code
            assert error.op == "clEnqueueSVMMemFill" and error.device == "opencl:0"
            buffer.fill(b"a", stream=stream)
        """
    )


@pytest.mark.parametrize("code", [-9999, -2, -34, -36, -1121])
def test_a_device_that_is_lost_stays_lost(run: Run, code: int) -> None:
    run(
        f"""
        from drivetrain.hal.opened import close_all
        device, stream = opened()
        buffer = device.alloc(128, stream=stream)
        fake.fake_cl_fail(b"clEnqueueSVMMemFill", 1, {code})
        refused(lambda: buffer.fill(b"a", stream=stream), DeviceLost)
        for call in (lambda: buffer.fill(b"a", stream=stream), device.stream, stream.synchronize,
                     lambda: buffer.copy_to(bytearray(9), stream=stream), stream.record,
                     lambda: device.compile(hal.Source.opencl(ADD))):
            error = refused(call, DeviceLost)
            assert "lost to this process" in str(error)
        buffer.close()
        stream.close()
        close_all()
        """
    )


def test_work_that_fails_is_told_once_where_it_is_waited_for(run: Run) -> None:
    run(
        """
        device, stream = opened()
        other = device.stream()
        fail = kernel(device, "fail", "__kernel void fail(__global int *out){}")
        fail(stream, 1, 1, None)
        error = refused(lambda: stream.synchronize(20), HalError)
        assert (error.code, error.native_name) == ("work", "CL_OUT_OF_RESOURCES"), error
        stream.synchronize(20)
        other.synchronize(20)
        fail(stream, 1, 1, None)
        def until():
            while not stream.done: pass
        refused(until, HalError)
        assert stream.done
        from drivetrain.hal.opened import close_all
        fail(stream, 1, 1, None)
        fail(other, 1, 1, None)
        close_all()
        assert [fake.fake_cl_live(kind) for kind in range(6)] == [0] * 6
        """,
        FAKE_CL_NAME="Other",
        FAKE_CL_TYPE="cpu",
    )


def test_a_kernel_that_went_astray_on_nvidia_is_a_lost_device(run: Run) -> None:
    for name in ("stray", "fail"):
        run(
            f"""
            device, stream = opened()
            bad = kernel(device, "{name}", "__kernel void {name}(__global int *out){{}}")
            bad(stream, 1, 1, None)
            refused(lambda: stream.synchronize(20), DeviceLost)
            refused(lambda: stream.synchronize(20), DeviceLost)
            """,
            FAKE_CL_NAME="NVIDIA CUDA",
        )


# -- programs --------------------------------------------------------------------------------------


def test_a_compiler_that_crashes_or_hangs_is_a_compile_error(run: Run) -> None:
    for what, how in (("crash", "crashed (SIGABRT)"), ("hang", "did not end within 2 s")):
        run(
            f"""
            device, stream = opened()
            bad = hal.Source.opencl("/* {what} the compiler */" + ADD)
            if {what == "hang"}:
                os.environ["DRIVETRAIN_COMPILE_LIMIT_S"] = "2"
            error = refused(lambda: device.compile(bad), CompileError)
            os.environ.pop("DRIVETRAIN_COMPILE_LIMIT_S", None)
            assert {how!r} in str(error), error
            buffer = device.alloc(16, stream=stream)
            buffer.fill(b"\\0", stream=stream)
            kernel(device)(stream, 1, 4, buffer, 2)
            assert words(buffer, stream) == [2] * 4
            """
        )


def test_compile_errors_are_in_the_users_lines(run: Run) -> None:
    run(
        """
        device, stream = opened()
        text = "#if SCALE == 3\\n\\n" + ADD + "\\nwrong here\\n#endif"
        bad = hal.Source.opencl(text, name="mine.cl", defines={"SCALE": 3})
        error = refused(lambda: device.compile(bad), CompileError)
        assert error.log == "mine.cl:4: error: something is wrong here", error.log
        assert str(error) == error.log and error.native_name == "CL_BUILD_PROGRAM_FAILURE"
        """
    )


@pytest.mark.parametrize("how", ["FAKE_CL_NO_BINARY", "FAKE_CL_REFUSE_BINARY"])
def test_a_platform_without_binaries_compiles_once_more_in_the_process(run: Run, how: str) -> None:
    script = """
        device, stream = opened()
        buffer = device.alloc(16, stream=stream)
        buffer.fill(b"\\0", stream=stream)
        kernel(device)(stream, 1, 4, buffer, 2)
        assert words(buffer, stream) == [2] * 4
        """
    run(script, **{how: 1})


def test_what_was_compiled_is_kept_on_disk_for_the_same_platform(fresh: Run) -> None:
    script = """
        device, stream = opened()
        kernel(device)
        """
    fresh(script)
    fresh(script, FAKE_CL_ABORT="build")
    with pytest.raises(AssertionError, match="SIGABRT"):
        fresh(script, FAKE_CL_ABORT="build", FAKE_CL_NAME="Another", POCL_ANY="changed")


def test_a_device_without_a_compiler_takes_binaries_only(run: Run) -> None:
    run(
        """
        device, stream = opened()
        error = refused(lambda: device.compile(hal.Source.opencl(ADD)), BadInput)
        assert "takes binaries only" in str(error)
        refused(lambda: device.compile(hal.Source.cuda("__global__ void k(int *p) {}")), BadInput)
        error = refused(lambda: device.compile(hal.Source.binary(ADD.encode(), "cl")), Unsupported)
        assert "binaries only" in str(error)
        data = b"FAKECL01" + ADD.encode()
        module = device.compile(hal.Source.binary(data, "clbin", {"add": [hal.PTR, hal.I32]}))
        buffer = device.alloc(16, stream=stream)
        buffer.fill(b"\\0", stream=stream)
        module.kernel("add")(stream, 1, 4, buffer, 2)
        assert words(buffer, stream) == [2] * 4
        nonsense = hal.Source.binary(b"nonsense", "clbin")
        error = refused(lambda: device.compile(nonsense), CompileError)
        assert error.code == "not_taken" and error.native_name == "CL_INVALID_BINARY", vars(error)
        """,
        FAKE_CL_COMPILER=0,
    )


def test_other_forms_are_refused_with_those_that_are_taken(run: Run) -> None:
    run(
        """
        from drivetrain.hal.opened import opened as open_of
        device, stream = opened()
        driver = open_of(device).backend
        error = refused(lambda: driver.module_load(b"x", "ptx"), Unsupported)
        assert "cl, spirv and clbin" in str(error)
        spirv = bytes.fromhex("03022307") + bytes(16)
        refused(lambda: device.compile(hal.Source.binary(spirv, "spirv")), Unsupported)
        """
    )


@pytest.mark.parametrize("version", [120, 300])
def test_spirv_is_taken_where_the_device_says_so(run: Run, version: int) -> None:
    run(
        """
        device, stream = opened()
        data = bytes.fromhex("03022307") + ADD.encode()
        source = hal.Source.binary(data, "spirv", {"add": [hal.PTR, hal.I32]})
        buffer = device.alloc(16, stream=stream)
        buffer.fill(b"\\0", stream=stream)
        device.compile(source).kernel("add")(stream, 1, 4, buffer, 2)
        assert words(buffer, stream) == [2] * 4
        """,
        FAKE_CL_IL=1,
        FAKE_CL_VERSION=version,
    )


def test_kernels_are_bound_to_the_arguments_that_they_have(run: Run) -> None:
    run(
        """
        device, stream = opened()
        text = ADD + "\\n__kernel void two(__global int *a, int n, __local int *room){}"
        module = device.compile(hal.Source.opencl(text))
        refused(lambda: module.kernel("none", [hal.PTR]), BadInput)
        for types in ([hal.PTR], [hal.PTR, hal.I64], [hal.I32, hal.I32], [hal.PTR] * 2, []):
            error = refused(lambda: module.kernel("add", types), HalError)
            assert error.code == "wrong_arguments", error
        two = module.kernel("two", [hal.PTR, hal.I32])
        buffer = device.alloc(16, stream=stream)
        for shared in (0, 64, 0):
            two(stream, 1, 4, buffer, 1, shared=shared)
            two.plan(stream, 1, 4, buffer, 1, shared=shared)()
        add = module.kernel("add", [hal.PTR, hal.I32])
        add(stream, 1, 4, buffer, 1, shared=64)  # as CUDA: more than it uses
        stream.synchronize(20)
        assert module.kernel("add", [hal.PTR, hal.I32])._function == add._function
        refused(lambda: add(stream, 1, 129, buffer, 1), BadInput)
        refused(lambda: add(stream, 1, 4, buffer, 1, shared=32769), BadInput)
        """
    )
