"""Sysman through ctypes: against a loader of ours that is built from the vendor's header."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from drivetrain.hal.telemetry import intel, sysman
from drivetrain.hal.telemetry.health import verdict

HEADER = Path("/usr/include/level_zero/zes_api.h")
NAMES = {
    sysman.PciAddress: "zes_pci_address_t",
    sysman.PciProperties: "zes_pci_properties_t",
    sysman.EnergyCounter: "zes_power_energy_counter_t",
    sysman.MemState: "zes_mem_state_t",
    sysman.MemBandwidth: "zes_mem_bandwidth_t",
    sysman.FreqState: "zes_freq_state_t",
    sysman.FreqProperties: "zes_freq_properties_t",
    sysman.TempProperties: "zes_temp_properties_t",
    sysman.EngineProperties: "zes_engine_properties_t",
    sysman.EngineStats: "zes_engine_stats_t",
    sysman.RasProperties: "zes_ras_properties_t",
    sysman.RasState: "zes_ras_state_t",
}
needs_header = pytest.mark.skipif(not HEADER.exists(), reason="needs Debian's libze-dev")
PCI = "0000:3a:00.0"


def run(source: str, folder: Path) -> str:
    (folder / "probe.c").write_text(source)
    subprocess.run(["cc", "-o", "probe", "probe.c"], cwd=folder, check=True)
    return subprocess.run(
        ["./probe"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@needs_header
def test_every_structure_is_laid_out_as_in_the_vendors_header(tmp_path: Path) -> None:
    lines = ["#include <level_zero/zes_api.h>", "#include <stdio.h>", "#include <stddef.h>"]
    lines.append("int main(void) {")
    ours = []
    for kind, name in NAMES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        ours.append(f"{name} {ctypes.sizeof(kind)}")
        for field in kind._fields_:
            at = getattr(kind, field[0]).offset
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
            ours.append(f"{name}.{field[0]} {at}")
    theirs = run("\n".join([*lines, "return 0; }"]), tmp_path).splitlines()
    assert theirs == ours


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not HEADER.exists():
        pytest.skip("needs Debian's libze-dev")
    path = tmp_path_factory.mktemp("sysman") / "libze_loader.so.1"
    source = Path(__file__).with_name("fake_sysman.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", path, source], check=True)
    return str(path)


def test_a_gpu_is_read_through_sysman(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysman.sysfs.time, "sleep", lambda _: None)
    now = sysman.read(f"0000{PCI}", library)
    assert now is not None
    assert now.power_w == pytest.approx(250.0)
    assert now.utilisation == pytest.approx(0.8)
    assert (now.memory_used_bytes, now.memory_total_bytes) == (10 << 30, 16 << 30)
    assert (now.clock_mhz, now.memory_clock_mhz) == (1550.0, 3200.0)
    assert (now.temperature_c, now.memory_temperature_c) == (61.5, 62.5)
    assert now.throttle == ("hw_thermal",)
    assert (now.ecc_corrected, now.ecc_uncorrected) == (7, 0)
    more = dict(now.vendor_specific)
    assert more["read_gbps"] == pytest.approx(300.0)
    assert more["write_gbps"] == pytest.approx(100.0)
    assert more["copy_busy_ratio"] == pytest.approx(0.1)
    assert verdict(now).state == "strained"
    monkeypatch.setenv("FAKE_SYSMAN_SICK", "1")
    sick = sysman.read(PCI, library)
    assert sick is not None
    assert str(verdict(sick)).startswith("degraded: its memory is to be replaced")


def test_a_gpu_without_sensors_and_a_lost_one_are_told_apart(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SYSMAN_BARE", "1")
    bare = sysman.read(PCI, library)
    assert bare is not None
    assert (bare.power_w, bare.memory_total_bytes, bare.ecc_corrected) == (None, None, None)
    assert verdict(bare).state == "ok"
    monkeypatch.setenv("FAKE_SYSMAN_LOST", "1")
    gone = sysman.read(PCI, library)
    assert gone is not None
    assert verdict(gone).state == "lost"


def test_without_the_library_or_for_another_card_the_kernels_files_have_to_do(library: str) -> None:
    assert sysman.read(PCI, "/nowhere/libze_loader.so.1") is None
    assert sysman.read("0000:99:00.0", library) is None
    assert intel.read("0000:99:00.0").health.startswith("lost"), "this machine has no such card"
