"""Intel's counters: in a child, over a loader of the tests' own; what is declared is as in the
vendor's header."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import built

from drivetrain.hal.telemetry.level_zero_metrics import FUNCTIONS, STRUCTURES, Zet

PCI = "0000:f9:00.0"
"""Of the fake's second device."""

# -- the vendor's header ---------------------------------------------------------------------------

CONSTANTS = {f"ZET_{name}": number for name, number in vars(Zet).items() if name.isupper()}


def program(
    functions: dict[str, str] = FUNCTIONS,
    structures: dict[str, type[ctypes.Structure]] = STRUCTURES,
    constants: dict[str, int] = CONSTANTS,
) -> str:
    lines = ["#include <stddef.h>", "#include <level_zero/zet_api.h>"]
    for name, types in functions.items():
        lines += [
            f"typedef ze_result_t (*row_{name})({types});",
            f"_Static_assert(__builtin_types_compatible_p(row_{name}, __typeof__(&{name})), "
            f'"{name}");',
        ]
    for name, kind in structures.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}: size");')
        for field, *_ in kind._fields_:
            here = getattr(kind, field)
            lines += [
                f'_Static_assert(offsetof({name}, {field}) == {here.offset}, "{name}.{field}");',
                f"_Static_assert(sizeof((({name} *)0)->{field}) == {here.size}, "
                f'"{name}.{field}: size");',
            ]
    lines += [f'_Static_assert({n} == {number}, "{n}");' for n, number in constants.items()]
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(text: str) -> list[str]:
    """What the compiler says against the program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-w", "-xc", "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )
    if "zet_api.h: No such file" in done.stderr:
        pytest.skip("there is no zet_api.h (Debian's package libze-dev)")
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def test_every_declared_function_structure_and_value_is_the_headers() -> None:
    assert wrong(program()) == []


def test_a_wrong_signature_offset_or_value_is_caught() -> None:
    swapped = {**FUNCTIONS, "zetMetricStreamerClose": "uint32_t"}
    assert any("zetMetricStreamerClose" in line for line in wrong(program(functions=swapped)))
    other = {"zet_metric_properties_t": STRUCTURES["zet_metric_group_properties_t"]}
    assert wrong(program(structures=other))
    assert wrong(program(constants={"ZET_METRIC_TYPE_RATIO": 5}))


# -- the counters ----------------------------------------------------------------------------------

ADDED = """
import dataclasses
from drivetrain.hal.telemetry import Telemetry, counters
before = Telemetry(power_w=3.0, vendor_specific=(("core_volt", 1.0),))
now = counters.added(before, "intel", PCI)
assert dataclasses.replace(now, vendor_specific=before.vendor_specific) == before
print(dict(now.vendor_specific), flush=True)
assert "libze_loader" not in open("/proc/self/maps").read()
assert counters.added(before, "intel", PCI) is not None
"""
HERE = """
from drivetrain.errors import HalError
from drivetrain.hal.telemetry import level_zero_metrics
try:
    print(dict(level_zero_metrics.read(PCI)))
except HalError as error:
    print(error)
"""
COUNTED = {
    "gpu_busy_ratio": 0.65,
    "xve_active_ratio": 0.25,
    "gpu_memory_byte_read_rate_gbps": 250.0,
    "gti_write_throughput_bytes_per_s": 7e9,
}
"""Averages of the fake's four reports; no duration, and no value of a type that is not known."""


@dataclass
class Machine:
    """A machine with the fake loader."""

    loader: Path
    home: Path

    def run(self, code: str, pci: str = PCI, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"PCI = {pci!r}\n{code}"],
            env={
                **os.environ,
                "DRIVETRAIN_LEVEL_ZERO_LIBRARY": str(self.loader),
                "DRIVETRAIN_HOME": str(self.home),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("zet")
    metrics = Path(__file__).with_name("fake_zet.c")
    return Machine(built("fake_ze.c", folder, defines=str(metrics)), folder / "home")


def test_counters_are_read_in_a_child_when_they_are_asked_for(machine: Machine) -> None:
    told = machine.run(ADDED, DRIVETRAIN_COUNTERS="1")
    assert eval(told) == {"core_volt": 1.0, **{n: pytest.approx(v) for n, v in COUNTED.items()}}
    assert machine.run(ADDED) == "{'core_volt': 1.0}", "unasked, nothing is read"


def test_a_reading_of_the_card_has_them(machine: Machine, tmp_path: Path) -> None:
    """The whole way, with the loader where the system's is looked for."""
    (tmp_path / "libze_loader.so.1").symlink_to(machine.loader)
    code = """
from drivetrain.hal.telemetry import intel
now = intel.read(PCI)
assert now.health == "ok", now
print(dict(now.vendor_specific))
"""
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "DRIVETRAIN_LEVEL_ZERO_LIBRARY": ""}
    told = machine.run(code, DRIVETRAIN_COUNTERS="1", **environment)
    assert eval(told) == {name: pytest.approx(value) for name, value in COUNTED.items()}
    assert machine.run(code, **environment) == "{}"


@pytest.mark.parametrize(
    "fault",
    [
        {"FAKE_ZET_FAULT": "hang"},
        *(
            pytest.param(each, marks=pytest.mark.soak)
            for each in (
                {"FAKE_ZET_FAULT": "zetMetricStreamerOpen"},
                {"FAKE_ZE_NO_DRIVER": "1"},
                {"DRIVETRAIN_LEVEL_ZERO_LIBRARY": "/nowhere/libze_loader.so.1"},
            )
        ),
    ],
)
def test_what_cannot_be_counted_is_absent_without_a_word(
    machine: Machine, fault: dict[str, str]
) -> None:
    assert machine.run(ADDED, DRIVETRAIN_COUNTERS="1", **fault) == "{'core_volt': 1.0}"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, str(COUNTED)),
        ({"FAKE_ZET_FAULT": "zetMetricStreamerReadData"}, "zetMetricStreamerReadData failed: ZE_"),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (
                ({"FAKE_ZET_EMPTY": "1"}, "{}"),
                ({"FAKE_ZET_FAULT": "zetMetricStreamerOpen"}, "zetMetricStreamerOpen failed"),
                (
                    {"FAKE_ZET_FAULT": "zetMetricGroupCalculateMetricValues"},
                    "CalculateMetricValues failed",
                ),
                ({"ZET_ENABLE_METRICS": "0"}, "zetMetricGroupGet failed"),
            )
        ),
    ],
)
def test_the_hardware_is_given_back_whatever_fails(
    machine: Machine, tmp_path: Path, fault: dict[str, str], said: str
) -> None:
    left = tmp_path / "left"
    environment = {"ZET_ENABLE_METRICS": "1", "FAKE_ZET_LEFT": str(left), **fault}
    assert said in machine.run(HERE, **environment)
    assert left.read_text() == "0 0"


def test_another_card_or_a_loader_without_metrics_is_said(machine: Machine, tmp_path: Path) -> None:
    assert "no device at 0000:01:00.0" in machine.run(HERE, "0000:01:00.0", ZET_ENABLE_METRICS="1")
    bare = Machine(built("fake_ze.c", tmp_path), machine.home)
    assert "this Level Zero loader has no zetMetricGroupGet" in bare.run(HERE)
