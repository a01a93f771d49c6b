"""A driver that is one shared library: the template in C is built, listed, used and certified."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import CompileError, DriverMissing, HalError, OutOfMemory, Unsupported
from drivetrain.hal import probe, registry, shared_library
from drivetrain.hal.driver import LaunchAbi
from drivetrain.hal.shared_library import DeviceLimits, Facts, Failure, Readings, Table

UNUSED = ("function", "const-variable")
TEMPLATE = Path(__file__).resolve().parents[3] / "examples/driver_template/c"
SOURCE = (TEMPLATE / "tinychip.c").read_text()
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
STRUCTURES = {
    "dt_failure": Failure,
    "dt_device_facts": Facts,
    "dt_readings": Readings,
    "dt_device_limits": DeviceLimits,
    "dt_driver_v1": Table,
}


def built(folder: Path, source: str = SOURCE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinychip.c").write_text(source)
    library = folder / "libtinychip.so"
    flags = ["-shared", "-fPIC", "-std=gnu11", "-O0", "-Wall", "-Wextra", "-Werror", "-pthread"]
    include = ["-I", shared_library.INCLUDE]
    command = ["cc", *flags, *include, "-o", str(library), str(folder / "tinychip.c")]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("tinychip"))


@pytest.fixture
def installed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's package with its library, on the path of this process and its children."""
    site = tmp_path / "site"
    package = site / "tinychip_drivetrain"
    shutil.copytree(TEMPLATE / "tinychip_drivetrain", package)
    shutil.copy(library, package)
    metadata = site / "tinychip_drivetrain-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tinychip\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[drivetrain.drivers]\ntinychip = tinychip_drivetrain:DRIVER\n"
    )
    monkeypatch.syspath_prepend(str(site))
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    importlib.invalidate_caches()
    registry.trust("tinychip")


# --- the table ------------------------------------------------------------------------------------


def test_structures_are_laid_out_as_in_the_header(tmp_path: Path) -> None:
    lines, ours = [], []
    for name, kind in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        ours.append(f"{name} {ctypes.sizeof(kind)}")
        for field in kind._fields_:
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
            ours.append(f"{name}.{field[0]} {getattr(kind, field[0]).offset}")
    head = "#include <stdio.h>\n#include <stddef.h>\n#include <drivetrain_hal.h>\n"
    (tmp_path / "a.c").write_text(f"{head}int main(void) {{ {' '.join(lines)} return 0; }}")
    subprocess.run(["cc", "-I", shared_library.INCLUDE, "-o", "a", "a.c"], cwd=tmp_path, check=True)
    said = subprocess.run([str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ours


def changed(old: str, new: str) -> str:
    assert old in SOURCE
    return SOURCE.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (".version = 1,", ".version = 2,", "takes version 1"),
        (".size = sizeof(dt_driver_v1),", ".size = 8,", "8 bytes"),
        ("    .alloc = alloc,\n", "", "lacks alloc"),
        ("    .launch = launch,\n", "", "lacks launch"),
        ('"compute pinned timing"', '"compute pinned timing graphs"', "graphs"),
        ('"compute pinned timing"', '"compute flying"', "flying"),
        ('.name = "tinychip"', '.name = "tiny chip"', "its name is"),
        ("{ return &table; }", "{ return NULL; }", "gave no table"),
        ("drivetrain_driver_v1(void)", "drivetrain_driver_v0(void)", "exports no drivetrain"),
    ],
)
def test_a_table_that_is_not_whole_is_refused_with_the_reason(
    tmp_path: Path, old: str, new: str, why: str
) -> None:
    # What is then unused is no error here.
    quiet = "".join(f'#pragma GCC diagnostic ignored "-Wunused-{what}"\n' for what in UNUSED)
    source = quiet + changed(old, new)
    with pytest.raises(HalError, match=why):
        shared_library.load(built(tmp_path, source))


def test_a_library_that_is_not_there_is_missing_and_not_broken(tmp_path: Path) -> None:
    with pytest.raises(DriverMissing, match="cannot be loaded"):
        shared_library.load(tmp_path / "libnone.so")


def test_an_older_and_smaller_table_is_taken_for_what_it_has(tmp_path: Path) -> None:
    source = changed(
        ".size = sizeof(dt_driver_v1),", ".size = __builtin_offsetof(dt_driver_v1, event_seconds),"
    ).replace('"compute pinned timing"', '"pinned"')
    driver = shared_library.driver(built(tmp_path, source))
    assert driver.groups == frozenset({"pinned"})
    assert driver.open is not None
    backend = driver.open(driver.discover()[0])
    assert backend.calls().abi == LaunchAbi.PYTHON
    with pytest.raises(Unsupported):
        backend.event_seconds(1, 2)
    backend.close()


def test_a_newer_and_larger_table_is_taken_too(tmp_path: Path) -> None:
    source = changed(
        "static const dt_driver_v1 table = {",
        "static const struct { dt_driver_v1 now; void *more[4]; } newer = { .now = {",
    )
    source = source.replace("    .launch = launch,\n};", "    .launch = launch,\n}};")
    source = source.replace("sizeof(dt_driver_v1),", "sizeof(dt_driver_v1) + 32,")
    source = source.replace("return &table;", "return &newer.now;")
    assert len(shared_library.driver(built(tmp_path, source)).discover()) == 2


# --- calls ----------------------------------------------------------------------------------------


@pytest.fixture
def backend(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TINYCHIP_MEMORY", str(1 << 20))
    driver = shared_library.driver(library)
    assert driver.open is not None
    found = driver.open(driver.discover()[0])
    yield found
    found.close()


def test_failures_come_with_the_library_s_words(backend: Any) -> None:
    with pytest.raises(OutOfMemory, match="the chip is full") as full:
        backend.alloc(1 << 21, 0, 0)
    assert (full.value.requested, full.value.free, full.value.total) == (1 << 21, 1 << 20, 1 << 20)
    assert (full.value.native, full.value.op, full.value.device) == (3, "alloc", "tinychip:0")
    with pytest.raises(HalError, match="no allocation at this address") as wrong:
        backend.free(12345, 0, 0)
    assert wrong.value.code == "invalid"
    with pytest.raises(CompileError) as code:
        backend.module_load(b"no library", "so")
    assert code.value.log
    with pytest.raises(Unsupported):
        backend.module_load(b"", "ptx")
    with pytest.raises(Unsupported, match="graphs"):
        backend.graph_begin(0)
    event = backend.event_create(False)
    backend.close()
    with pytest.raises(HalError, match="is closed"):
        backend.event_done(event)


def test_launches_and_records_are_called_by_address_without_python(backend: Any) -> None:
    calls = backend.calls()
    assert calls.abi == LaunchAbi.PLAIN
    assert calls.launch
    assert calls.record


@pytest.mark.usefixtures("installed")
def test_it_is_listed_probed_and_read_like_any_driver() -> None:
    first, second = hal.devices("tinychip")
    assert (first.name, first.uuid, first.info.memory_bytes) == ("Tiny chip 0", "TINY-0", 256 << 20)
    assert first.capabilities.groups == ("compute", "pinned", "timing")
    assert probe.probe([second])[second].usable is True
    now = second.telemetry()
    assert (now.temperature_c, now.power_w, now.ecc_corrected, now.health) == (
        41.0,
        None,
        None,
        "ok",
    )
    assert first.isolation().environment["TINYCHIP_VISIBLE"] == "0"


USE = dedent(
    """
    from drivetrain import hal
    device = hal.device("tinychip:0")
    stream = device.stream()
    x = device.alloc(4 * 1000, stream=stream)
    x.fill(b"\\x01\\0\\0\\0", stream=stream)
    source = hal.Source.cuda('''
    extern "C" __global__ void add(int* x, int v, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) x[i] += v;
    }''')
    kernel = device.compile(source).kernel("add")
    for _ in range(100):
        kernel(stream, 8, 128, x, 3, 1000)
    out = bytearray(4000)
    x.copy_to(out, stream=stream)
    stream.synchronize(60)
    print(set(memoryview(out).cast("i")))
    """
)


@pytest.mark.usefixtures("installed")
def test_a_kernel_in_cuda_c_runs_on_it() -> None:
    pytest.importorskip("tree_sitter_cuda")
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("{301}\n", 0), done.stderr


def kit(driver: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "drivetrain", "conformance", driver, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.usefixtures("installed")
def test_it_passes_a_sample_of_the_kit() -> None:
    done = kit("tinychip")("--only", "events")
    assert done.returncode == 0, done.stdout


@pytest.mark.soak
@pytest.mark.usefixtures("installed")
def test_it_passes_the_whole_kit(tmp_path: Path) -> None:
    report = tmp_path / "tinychip.json"
    done = kit("tinychip")("--report", str(report))
    assert done.returncode == 0, done.stdout
    assert '"evidence": "fake"' in report.read_text()


@pytest.mark.usefixtures("installed")
def test_the_kit_sees_a_driver_that_copies_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one byte fewer in each copy."""
    wrong = changed(
        "memmove(command->dst, command->src, command->nbytes);",
        "memmove(command->dst, command->src, command->nbytes - (command->nbytes > 1));",
    )
    shutil.copy(built(tmp_path / "wrong", wrong), tmp_path / "site/tinychip_drivetrain")
    done = kit("tinychip")("--only", "copies.round_trip")
    assert done.returncode == 1, done.stdout
