"""A state folder of one's own, a package that offers outside drivers, devices to work on, patience.

``rig`` is two devices of one driver with the same few kernels: the cpu, the simulated device, or a
CUDA device over a fake ``libcuda``. The fake is built once; each test gets a copy of it, as if it
ran in a process of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal import registry
from drivetrain.hal.device import DeviceInfo

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeCuda, built

OUTSIDE = '''
"""Two drivers; importing them leaves a mark."""

import os
import time
from pathlib import Path

from drivetrain.errors import HalError, OutOfMemory
from drivetrain.hal.driver import Capabilities, DeviceInfo, Driver, Isolation, Telemetry

with open(Path(__file__).with_name("imported-by"), "a") as file:
    print(os.getpid(), file=file)


def _driver(name, pci):
    def discover():
        return tuple(
            DeviceInfo(
                driver=name,
                index=index,
                name=f"{name} chip",
                vendor="acme",
                uuid=f"{name}-{index}",
                pci=pci if index == 0 else "",
                memory_bytes=1 << 30,
                driver_version="7",
                isolation=Isolation({"ACME": str(index)}, None, 1, "acme:0"),
                telemetry=Telemetry(memory_used_bytes=1 << 20, health="ok"),
            )
            for index in range(2)
        )

    def telemetry(info):
        return Telemetry(utilisation=0.5, memory_used_bytes=2 << 20, health="ok")

    def probe(info):
        how = os.environ.get("ACME_PROBE", "")
        if how == "hang":
            time.sleep(3600)
        elif how == "abort":
            os.abort()
        elif how == "broken":
            raise HalError("the chip smokes", code="error")
        elif how == "full":
            raise OutOfMemory("someone else has it all", code="out_of_memory")
        elif os.environ["ACME"] != str(info.index):
            raise HalError("not isolated", code="error")

    return Driver(
        name=name,
        vendor="acme",
        absent=lambda: "",
        discover=discover,
        telemetry=telemetry,
        probe=probe,
        groups=frozenset({"compute"}),
    )


ALPHA = _driver("alpha", "0000:05:00.0")
BETA = _driver("beta", "00000000:05:00.0")
NOT_A_DRIVER = object()
'''


@pytest.fixture(autouse=True)
def _own_state(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    if "language" not in request.path.parts:  # the others want kernels, and no compiler to be tried
        monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    for name in ("DRIVETRAIN_CPU_PARTITIONS", "DRIVETRAIN_FAULT_DISCOVERY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    registry.refresh()
    yield
    registry.refresh()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path that is an installed package with drivers alpha, beta and gamma.

    ``imported-by`` in it lists the processes that imported it; gamma's entry point names no driver.
    """
    site = tmp_path / "site"
    metadata = site / "acme_drivers-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "acme_drivers.py").write_text(OUTSIDE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-drivers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        dedent(
            """
            [drivetrain.drivers]
            alpha = acme_drivers:ALPHA
            beta = acme_drivers:BETA
            gamma = acme_drivers:NOT_A_DRIVER
            """
        )
    )
    monkeypatch.syspath_prepend(str(site))
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    return site


# -- a fake libcuda --------------------------------------------------------------------------------

KERNELS = {
    "nothing": "",
    "spin": ".param .u64 ns",
    "hold": ".param .u64 unused",
    "stray": ".param .u64 unused",
    "claim": ".param .u64 unused",
    "add": ".param .u64 p, .param .u32 v",
    "times": ".param .u64 p, .param .u32 v",
    "store": ".param .u64 p, .param .u32 v",
}
PTX = ".version 6.4\n.target sm_50\n" + "".join(
    f".visible .entry {name}({parameters}) {{}}\n" for name, parameters in KERNELS.items()
)


@pytest.fixture(scope="session")
def fake_cuda_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("fake_cuda.c", tmp_path_factory.mktemp("fake_cuda"))


_number = itertools.count()


@pytest.fixture
def new_fake(fake_cuda_path: Path, tmp_path: Path) -> Callable[[], FakeCuda]:
    def make() -> FakeCuda:
        copy = tmp_path / f"libcuda-{next(_number)}.so"
        shutil.copy(fake_cuda_path, copy)
        return FakeCuda(copy)

    return make


@pytest.fixture
def fake(new_fake: Callable[[], FakeCuda], monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return new_fake()


@pytest.fixture
def cuda_info() -> Callable[[int], DeviceInfo]:
    def info(index: int = 0) -> DeviceInfo:
        uuid = f"GPU-00112233-4455-6677-8899-aabbccddee0{index}"
        return DeviceInfo(driver="cuda", index=index, name="fake", vendor="nvidia", uuid=uuid)

    return info


# -- devices to work on ----------------------------------------------------------------------------

KERNELS_C = """
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
typedef struct { uint32_t grid[3], block[3], shared, reserved; uint64_t first, count; } range;
static int once(const range *r) { return r->first == 0 && r->count > 0; }
int dt_cpu_nothing(const range *r, void **a) { (void)r, (void)a; return 0; }
int dt_cpu_add(const range *r, void **a) {
    if (once(r)) **(int32_t **)a[0] += *(int32_t *)a[1];
    return 0;
}
int dt_cpu_times(const range *r, void **a) {
    if (once(r)) **(int32_t **)a[0] *= *(int32_t *)a[1];
    return 0;
}
int dt_cpu_store(const range *r, void **a) {
    if (once(r)) **(int32_t **)a[0] = *(int32_t *)a[1];
    return 0;
}
int dt_cpu_spin(const range *r, void **a) {
    uint64_t ns = *(uint64_t *)a[0];
    struct timespec time = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    if (once(r)) nanosleep(&time, NULL);
    return 0;
}
int dt_cpu_hold(const range *r, void **a) {
    volatile int32_t *go = (volatile int32_t *)*(uint64_t *)a[0];
    struct timespec time = {0, 200000};
    while (once(r) && !*go) nanosleep(&time, NULL);
    return 0;
}
int dt_cpu_each(const range *r, void **a) {
    for (uint64_t i = r->first; i < r->first + r->count; i++) (*(int32_t **)a[0])[i] += 1;
    return 0;
}
/* The cores that each block's thread may run on, the first 64. */
int dt_cpu_where(const range *r, void **a) {
    cpu_set_t set;
    uint64_t found = 0;
    sched_getaffinity(0, sizeof set, &set);
    for (int i = 0; i < 64; i++) if (CPU_ISSET(i, &set)) found |= (uint64_t)1 << i;
    for (uint64_t i = r->first; i < r->first + r->count; i++) (*(uint64_t **)a[0])[i] = found;
    return 0;
}
int dt_cpu_full(const range *r, void **a) { (void)r, (void)a; return 1; }
int dt_cpu_fails(const range *r, void **a) { (void)r, (void)a; return 7; }
/* What arrived, as bytes: every type of argument. */
int dt_cpu_echo(const range *r, void **a) {
    static const int sizes[] = {1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 12};
    unsigned char *out = *(unsigned char **)a[0];
    if (!once(r)) return 0;
    for (int i = 0; i < 13; i++) memcpy(out + 16 * i, a[i + 1], (size_t)sizes[i]);
    *(uint32_t *)out = r->shared;
    return 0;
}
"""
"""The kernels of the fake libcuda for what runs shared objects, and a few more."""

ECHO = (
    *(hal.I8, hal.I16, hal.I32, hal.I64, hal.U8, hal.U16, hal.U32, hal.U64),
    *(hal.F16, hal.BF16, hal.F32, hal.F64, hal.struct_of(12)),
)
ARGUMENTS: dict[str, Sequence[hal.ArgType]] = {
    "nothing": [],
    "add": [hal.PTR, hal.I32],
    "times": [hal.PTR, hal.I32],
    "store": [hal.PTR, hal.I32],
    "spin": [hal.U64],
    "each": [hal.PTR],
    "fails": [],
    "full": [],
    "where": [hal.PTR],
    "hold": [hal.U64],
    "echo": [hal.PTR, *ECHO],
}


@pytest.fixture(scope="session")
def kernels_so(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.c").write_text(KERNELS_C)
    command = [compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [str(folder / "kernels.c"), "-o", str(folder / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return (folder / "kernels.so").read_bytes()


@dataclass
class Rig:
    """Two devices of one driver, and the same kernels on both."""

    driver: str
    device: hal.Device
    other: hal.Device
    source: hal.Source
    fake: Any = None
    """The library behind the CUDA devices."""
    modules: dict[str, hal.Module] = field(default_factory=dict)
    gates: list[ctypes.c_int32] = field(default_factory=list)

    def hold(self, stream: hal.Stream) -> Callable[[], None]:
        """Keep the stream busy until the call that comes back."""
        gate = ctypes.c_int32(0)
        self.gates.append(gate)  # it lives as long as the kernel may look at it
        self.kernel("hold", stream.device)(stream, 1, 1, ctypes.addressof(gate))

        def release() -> None:
            gate.value = 1
            if self.fake is not None:
                self.fake.release()

        return release

    def kernel(self, name: str, device: hal.Device | None = None) -> hal.Kernel:
        device = device or self.device
        module = self.modules.get(device.address)
        if module is None:
            module = self.modules[device.address] = device.compile(self.source)
        return module.kernel(name, ARGUMENTS[name])

    def slow(self, stream: hal.Stream, seconds: float = 0.05) -> None:
        """Keep the stream busy for a while."""
        spin = self.kernel("spin", stream.device)
        spin(stream, 1, 1, int(seconds * 1e9))

    def alloc(self, nbytes: int, stream: hal.Stream, **options: Any) -> hal.Buffer:
        return stream.device.alloc(nbytes, stream=stream, **options)

    def read(self, buffer: hal.Buffer, stream: hal.Stream) -> bytes:
        host = bytearray(buffer.nbytes)
        buffer.copy_to(host, stream=stream)
        stream.synchronize()
        return bytes(host)

    def number(self, buffer: hal.Buffer, stream: hal.Stream) -> int:
        return int.from_bytes(self.read(buffer, stream)[:4], "little", signed=True)


@pytest.fixture
def rig_of(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Rig]]:
    """Two devices of the driver that is named; closed when the test ends."""

    def make(driver: str) -> Rig:
        if driver == "cuda":
            from drivetrain.hal.drivers import cuda_api, cuda_backend

            library = request.getfixturevalue("fake")
            info = request.getfixturevalue("cuda_info")
            api = cuda_api.Api(library)
            monkeypatch.setattr(cuda_backend, "load", lambda: api)
            found = [hal.Device(f"cuda:{n}", info(n), info(n).uuid) for n in range(2)]
            source = hal.Source.binary(PTX.encode(), "ptx")
            return Rig(driver, found[0], found[1], source, library)
        if driver == "cpu":
            if len(os.sched_getaffinity(0)) < 2:
                pytest.skip("two cpu devices need two cores")
            monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "2")
        else:
            monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2")
        registry.refresh()
        one, two = hal.device(f"{driver}:0"), hal.device(f"{driver}:1")
        source = hal.Source.binary(request.getfixturevalue("kernels_so"), "so")
        return Rig(driver, one, two, source)

    if "opencl" not in request.fixturenames:  # it is listed in a child, anew for each state folder
        Path("drivetrain.toml").write_text('[drivers]\ndisable = ["opencl"]\n')
    made: list[Rig] = []

    def noted(driver: str) -> Rig:
        made.append(make(driver))
        return made[-1]

    hal.close_all()
    yield noted
    for rig in made:  # nothing is held up beyond its test
        for gate in rig.gates:
            gate.value = 1
        if rig.fake is not None:
            rig.fake.release()
    hal.close_all()


@pytest.fixture(params=["cpu", "simulated", "cuda"])
def rig(request: pytest.FixtureRequest, rig_of: Callable[[str], Rig]) -> Rig:
    return rig_of(request.param)
