"""AMD's counters: in a child, over a rocprofiler-sdk of the tests' own. Where ROCm's headers are
installed, what is declared is compared with them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain.hal.telemetry import rocprofiler

PCI = "0000:c3:00.0"
NAMES = {
    rocprofiler.Agent: "rocprofiler_agent_v0_t",
    rocprofiler.CounterInfo: "rocprofiler_counter_info_v0_t",
    rocprofiler.Record: "rocprofiler_counter_record_t",
    rocprofiler.ClientId: "rocprofiler_client_id_t",
    rocprofiler.ConfigureResult: "rocprofiler_tool_configure_result_t",
}
RATIOS = {"gpu_busy_ratio": 0.35, "occupancy_ratio": 0.45, "vector_busy_ratio": 0.55}
"""Averages over the fake's two parts; it has no matrix units."""

Run = Callable[..., str]


def test_structures_and_values_are_as_in_rocms_headers(tmp_path: Path) -> None:
    include = Path(os.environ.get("ROCM_PATH") or "/opt/rocm") / "include"
    if not (include / "rocprofiler-sdk/rocprofiler.h").is_file():
        pytest.skip("there are no headers of rocprofiler-sdk (ROCm 6.4 or newer)")
    lines = [f"#include <rocprofiler-sdk/{name}.h>" for name in ("rocprofiler", "registration")]
    for kind, name in NAMES.items():
        for field, *_ in kind._fields_:
            if field != "flags":
                at = getattr(kind, field).offset
                lines.append(f'_Static_assert(__builtin_offsetof({name}, {field}) == {at}, "");')
    for name in ("AGENT_INFO_VERSION_0", "AGENT_TYPE_GPU", "COUNTER_INFO_VERSION_0"):
        value = getattr(rocprofiler, name)
        lines.append(f'_Static_assert(ROCPROFILER_{name} == {value}, "{name}");')
    for name in rocprofiler.FUNCTIONS:
        lines.append(f"void *at_{name} = (void *)&{name};")
    source = tmp_path / "check.c"
    source.write_text("\n".join(lines))
    command = ["cc", "-std=gnu11", "-fsyntax-only", "-I", str(include), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def rocm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("rocm") / "lib"
    folder.mkdir()
    path = folder / "librocprofiler-sdk.so.1"
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-o", str(path), str(Path(__file__).with_name("fake_rocprofiler.c"))]
    subprocess.run(command, check=True, timeout=60)
    (folder / "libhsa-runtime64.so.1").symlink_to(path.name)
    return folder.parent


@pytest.fixture
def run(rocm: Path) -> Run:
    def run(code: str, pci: str = PCI, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"PCI = {pci!r}\n{code}"],
            env={**os.environ, "ROCM_PATH": str(rocm), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()

    return run


ADDED = """
from drivetrain.hal.telemetry import Telemetry, counters
before = Telemetry(vendor_specific=(("fan_rpm", 9.0),))
print(dict(counters.added(before, "amd", PCI).vendor_specific))
assert "rocprofiler-sdk" not in open("/proc/self/maps").read()
"""
HERE = """
from drivetrain.errors import HalError
from drivetrain.hal.telemetry import rocprofiler
try:
    print(dict(rocprofiler.read(PCI)))
except HalError as error:
    print(error)
"""


def checked(told: str) -> None:
    found = eval(told)
    rates = [found.pop("read_gbps"), found.pop("write_gbps")]
    assert found == {name: pytest.approx(value) for name, value in RATIOS.items()}
    # 2 GB in at least the window: no more than the rate of that, and no less than in the limit.
    assert all(0.1 < rate <= 2.048 / 0.05 for rate in rates), rates


def test_counters_are_read_in_a_child_when_they_are_asked_for(run: Run) -> None:
    told = run(ADDED, DRIVETRAIN_COUNTERS="1")
    assert told.startswith("{'fan_rpm': 9.0, ")
    checked(told.replace("'fan_rpm': 9.0, ", ""))
    assert run(ADDED) == "{'fan_rpm': 9.0}", "unasked, nothing is read"


def test_a_reading_of_the_card_has_them(run: Run, rocm: Path, tmp_path: Path) -> None:
    """The whole way, behind an AMD SMI that knows the card and no sensor."""
    (rocm / "lib/libamd_smi.so").touch()
    (tmp_path / "amdsmi.py").write_text(
        "class AmdSmiClkType: GFX = MEM = 0\n"
        "class AmdSmiTemperatureType: pass\n"
        "class AmdSmiTemperatureMetric: pass\n"
        "def amdsmi_init(): pass\n"
        "def amdsmi_get_processor_handles(): return [1]\n"
        f"def amdsmi_get_gpu_device_bdf(handle): return {PCI!r}\n"
        "def none(*_): raise RuntimeError\n"
        "amdsmi_get_gpu_activity = amdsmi_get_power_info = amdsmi_get_gpu_vram_usage = none\n"
        "amdsmi_get_gpu_total_ecc_count = amdsmi_get_clock_info = none\n"
        "amdsmi_get_violation_status = amdsmi_get_temp_metric = none\n"
    )
    code = """
from drivetrain.hal.telemetry import amd
now = amd.read(PCI)
assert now.health == "ok", now
print(dict(now.vendor_specific))
"""
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    checked(run(code, DRIVETRAIN_COUNTERS="1", PYTHONPATH=path))
    assert run(code, PYTHONPATH=path) == "{}"


def test_hardware_that_counts_one_thing_at_a_time_is_asked_one_by_one(run: Run) -> None:
    checked(run(HERE, FAKE_ROCP_FEW="1"))


@pytest.mark.parametrize(
    "fault",
    [
        {"FAKE_ROCP_FAULT": "rocprofiler_force_configure"},
        pytest.param({"ROCM_PATH": "/nowhere"}, marks=pytest.mark.soak),
    ],
)
def test_what_cannot_be_counted_is_absent_without_a_word(run: Run, fault: dict[str, str]) -> None:
    assert run(ADDED, DRIVETRAIN_COUNTERS="1", **fault) == "{'fan_rpm': 9.0}"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"FAKE_ROCP_FAULT": "rocprofiler_create_context"}, "create_context failed: 1"),
        pytest.param(
            *({"FAKE_ROCP_FAULT": "rocprofiler_query_available_agents"}, "agents failed"),
            marks=pytest.mark.soak,
        ),
        pytest.param({"FAKE_ROCP_FAULT": "hsa_init"}, "hsa_init failed", marks=pytest.mark.soak),
        pytest.param(
            {"FAKE_ROCP_FAULT": "rocprofiler_create_counter_config"}, "{}", marks=pytest.mark.soak
        ),
        ({"FAKE_ROCP_FAULT": "rocprofiler_sample_device_counting_service"}, "{}"),
        ({"FAKE_ROCP_VERSION": "500"}, "rocprofiler-sdk 500 is too old"),
    ],
)
def test_the_counters_are_given_back_whatever_fails(
    run: Run, tmp_path: Path, fault: dict[str, str], said: str
) -> None:
    left = tmp_path / "left"
    assert said in run(HERE, FAKE_ROCP_LEFT=str(left), **fault)
    assert left.read_text() == "0"


def test_another_card_is_said(run: Run) -> None:
    assert "shows no GPU at 0000:01:00.0" in run(HERE, "0000:01:00.0")


def test_an_agents_place_is_read_where_the_header_has_it() -> None:
    """Eight bytes of size and id each, the type, 21 numbers, two of 16 bits."""
    assert rocprofiler.Agent.location_id.offset == 8 + 8 + 4 + 21 * 4 + 4
    assert ctypes.sizeof(rocprofiler.Record) == 40
