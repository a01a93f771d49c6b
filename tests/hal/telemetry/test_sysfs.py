"""AMD's and Intel's sensors from trees of files in the kernel's layout."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.hal import wire
from drivetrain.hal.telemetry import amd, intel, sysfs
from drivetrain.hal.telemetry.health import verdict

# The trees are written by hand in the layout that the kernel documents (amdgpu/thermal,
# sysfs-driver-intel-i915-hwmon, sysfs-driver-intel-xe-hwmon, the gt and freq0 folders), for a card
# of each kind. They are no recordings of a machine.

Tree = dict[str, str | bytes]

AMD = "0000:c3:00.0"
ARC = "0000:03:00.0"
BATTLEMAGE = "0000:04:00.0"


def write(root: Path, pci: str, files: Tree) -> Path:
    folder = root / "sys/bus/pci/devices" / pci
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())
    return root


def gpu_metrics(indep_throttle_status: int) -> bytes:
    """gpu_metrics 1.3: 120 bytes, the status at their end."""
    return struct.pack("<HBB", 120, 1, 3) + bytes(108) + struct.pack("<Q", indep_throttle_status)


def radeon() -> Tree:
    """A Radeon RX 7900 XTX under load."""
    return {
        "config": bytes.fromhex("02104c74"),
        "vendor": "0x1002",
        "gpu_busy_percent": "97",
        "mem_busy_percent": "41",
        "mem_info_vram_total": "25753026560",
        "mem_info_vram_used": "20401094656",
        "mem_info_gtt_used": "52428800",
        "pcie_replay_count": "2",
        "pp_dpm_sclk": "0: 500Mhz \n1: 2371Mhz *\n2: 2526Mhz ",
        "pp_dpm_mclk": "0: 96Mhz \n1: 456Mhz \n2: 1249Mhz *",
        "gpu_metrics": gpu_metrics(0),
        "hwmon/hwmon4/name": "amdgpu",
        "hwmon/hwmon4/temp1_input": "61000",
        "hwmon/hwmon4/temp1_label": "edge",
        "hwmon/hwmon4/temp1_crit": "100000",
        "hwmon/hwmon4/temp2_input": "84000",
        "hwmon/hwmon4/temp2_label": "junction",
        "hwmon/hwmon4/temp3_input": "78000",
        "hwmon/hwmon4/temp3_label": "mem",
        "hwmon/hwmon4/power1_average": "331000000",
        "hwmon/hwmon4/power1_cap": "339000000",
        "hwmon/hwmon4/freq1_input": "2371000000",
        "hwmon/hwmon4/freq1_label": "sclk",
        "hwmon/hwmon4/freq2_input": "1249000000",
        "hwmon/hwmon4/freq2_label": "mclk",
        "hwmon/hwmon4/fan1_input": "1712",
        "hwmon/hwmon4/in0_input": "906",
        "hwmon/hwmon4/in0_label": "vddgfx",
    }


def instinct() -> Tree:
    """An Instinct MI210: RAS counters, an input instead of an average, no fan."""
    return {
        "config": bytes.fromhex("02100f74"),
        "gpu_busy_percent": "3",
        "mem_info_vram_total": "68702699520",
        "mem_info_vram_used": "11010048",
        "ras/umc_err_count": "ue: 0\nce: 4",
        "ras/sdma_err_count": "ue: 0\nce: 1",
        "ras/gpu_vram_bad_pages": "0x00000010 : 0x00001000 : R",
        "hwmon/hwmon2/name": "amdgpu",
        "hwmon/hwmon2/temp2_input": "44000",
        "hwmon/hwmon2/temp2_label": "junction",
        "hwmon/hwmon2/power1_input": "40000000",
    }


def arc() -> Tree:
    """An Arc A770 under i915."""
    gt = "drm/card1/gt/gt0"
    return {
        "config": bytes.fromhex("8680a056"),
        "hwmon/hwmon5/name": "i915",
        "hwmon/hwmon5/energy1_input": "1000000000",
        "hwmon/hwmon5/power1_max": "190000000",
        "hwmon/hwmon5/temp1_input": "58000",
        "hwmon/hwmon5/in0_input": "980",
        "hwmon/hwmon5/fan1_input": "1100",
        "hwmon/hwmon6/name": "i915_gt0",
        "hwmon/hwmon6/energy1_input": "7",
        f"{gt}/rps_act_freq_mhz": "2350",
        f"{gt}/rc6_residency_ms": "100000",
        f"{gt}/throttle_reason_status": "0",
        f"{gt}/throttle_reason_pl1": "0",
        f"{gt}/throttle_reason_thermal": "0",
    }


def battlemage() -> Tree:
    """An Arc B580 under xe: two tiles' worth of names, labels, two GTs."""
    gt = "tile0/gt0"
    return {
        "config": bytes.fromhex("86800be2"),
        "hwmon/hwmon3/name": "xe",
        "hwmon/hwmon3/energy1_input": "5000000",
        "hwmon/hwmon3/energy1_label": "card",
        "hwmon/hwmon3/energy2_input": "4000000",
        "hwmon/hwmon3/energy2_label": "pkg",
        "hwmon/hwmon3/power1_max": "190000000",
        "hwmon/hwmon3/power1_label": "card",
        "hwmon/hwmon3/temp2_input": "66000",
        "hwmon/hwmon3/temp2_label": "pkg",
        "hwmon/hwmon3/temp3_input": "72000",
        "hwmon/hwmon3/temp3_label": "vram",
        f"{gt}/freq0/act_freq": "2850",
        f"{gt}/gtidle/idle_residency_ms": "500",
        f"{gt}/freq0/throttle/status": "1",
        f"{gt}/freq0/throttle/reason_pl1": "1",
        f"{gt}/freq0/throttle/reason_thermal": "1",
        f"{gt}/freq0/throttle/reason_vr_tdc": "0",
        "tile0/gt1/freq0/act_freq": "0",
    }


SENSORS = (
    "utilisation", "memory_used_bytes", "memory_total_bytes", "power_w", "power_limit_w",
    "temperature_c", "memory_temperature_c", "clock_mhz", "memory_clock_mhz",
    "ecc_corrected", "ecc_uncorrected",
)  # fmt: skip


def test_a_radeon_is_read_in_its_units(tmp_path: Path) -> None:
    now = amd.read(AMD, root=write(tmp_path, AMD, radeon()))
    assert (now.utilisation, now.memory_used_bytes) == (0.97, 20401094656)
    assert (now.power_w, now.power_limit_w) == (331.0, 339.0)
    assert (now.temperature_c, now.memory_temperature_c) == (84.0, 78.0)
    assert (now.clock_mhz, now.memory_clock_mhz) == (2371.0, 1249.0)
    assert (now.ecc_corrected, now.ecc_uncorrected) == (None, None), "no RAS on this card"
    assert (now.throttle, now.health) == ((), "ok")
    more = dict(now.vendor_specific)
    assert more["memory_busy_ratio"] == 0.41
    assert more["edge_temperature_c"] == 61.0
    assert (more["fan_rpm"], more["core_volt"]) == (1712, 0.906)
    assert wire.telemetry_from_json(now.as_json()) == now


def test_an_instinct_sums_its_ras_counters_and_lacks_what_it_lacks(tmp_path: Path) -> None:
    now = amd.read("c3:00.0", root=write(tmp_path, AMD, instinct()))
    assert (now.ecc_corrected, now.ecc_uncorrected) == (5, 0)
    assert (now.power_w, now.power_limit_w) == (40.0, None)
    assert (now.clock_mhz, now.memory_temperature_c, now.temperature_c) == (None, None, 44.0)
    assert verdict(now).state == "ok"
    write(tmp_path, AMD, {"ras/umc_err_count": "ue: 2\nce: 4"})
    told = verdict(amd.read(AMD, root=tmp_path))
    assert (told.state, [reason.kind for reason in told.reasons]) == ("degraded", ["ecc"])
    write(tmp_path, AMD, {"ras/umc_err_count": "ue: 0\nce: 4"})
    write(tmp_path, AMD, {"ras/gpu_vram_bad_pages": "0x10 : 0x1000 : R\n0x11 : 0x1000 : P"})
    told = verdict(amd.read(AMD, root=tmp_path))
    assert [reason.kind for reason in told.reasons] == ["service"]


def test_clocks_come_from_the_starred_level_without_hwmon(tmp_path: Path) -> None:
    files = {name: text for name, text in radeon().items() if not name.startswith("hwmon")}
    now = amd.read(AMD, root=write(tmp_path, AMD, files))
    assert (now.clock_mhz, now.memory_clock_mhz, now.temperature_c) == (2371.0, 1249.0, None)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, ()),
        (1 << 0, ("power_cap",)),
        (1 << 16, ("current_limit",)),
        (1 << 36 | 1 << 34, ("hw_thermal",)),
        (1 << 46 | 1 << 7, ("power_cap", "prochot")),
        (0xFFFF_FFFF_FFFF_FFFF, ()),
    ],
)
def test_amd_throttling_is_read_from_its_table(
    tmp_path: Path, bits: int, words: tuple[str, ...]
) -> None:
    files = {**radeon(), "gpu_metrics": gpu_metrics(bits)}
    assert amd.read(AMD, root=write(tmp_path, AMD, files)).throttle == words


def test_a_table_of_another_revision_or_a_short_one_tells_nothing(tmp_path: Path) -> None:
    for table in (b"", b"\x78", gpu_metrics(1)[:100], b"\x78\x00\x01\x08" + gpu_metrics(1)[4:]):
        root = write(tmp_path, AMD, {**radeon(), "gpu_metrics": table})
        assert amd.read(AMD, root=root).throttle == ()


def test_an_arc_has_power_from_energy_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(sysfs.time, "monotonic", lambda: clock[0])
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += 0.1
        write(tmp_path, ARC, {"hwmon/hwmon5/energy1_input": "1012000000"})
        write(tmp_path, ARC, {"drm/card1/gt/gt0/rc6_residency_ms": "100025"})

    monkeypatch.setattr(sysfs.time, "sleep", pause)
    now = intel.read(ARC, root=write(tmp_path, ARC, arc()))
    assert now.power_w == pytest.approx(120.0)
    assert (now.power_limit_w, now.temperature_c, now.clock_mhz) == (190.0, 58.0, 2350.0)
    assert (now.utilisation, now.memory_used_bytes, now.throttle) == (None, None, ())
    more = dict(now.vendor_specific)
    assert more["gt0_awake_ratio"] == pytest.approx(0.75)
    assert (more["core_volt"], more["fan_1_rpm"]) == (0.98, 1100.0)
    # The next reading needs no pause; a counter that went back has no rate.
    clock[0] += 2.0
    write(tmp_path, ARC, {"hwmon/hwmon5/energy1_input": "1112000000"})
    assert intel.read(ARC, root=tmp_path).power_w == pytest.approx(50.0)
    clock[0] += 2.0
    write(tmp_path, ARC, {"hwmon/hwmon5/energy1_input": "5"})
    assert intel.read(ARC, root=tmp_path).power_w is None
    assert len(pauses) == 1


def test_a_battlemage_is_read_by_its_labels(tmp_path: Path) -> None:
    now = intel.read(BATTLEMAGE, root=write(tmp_path, BATTLEMAGE, battlemage()))
    assert (now.temperature_c, now.memory_temperature_c) == (66.0, 72.0)
    assert (now.clock_mhz, now.power_limit_w) == (2850.0, 190.0)
    assert now.throttle == ("hw_thermal", "power_cap")
    assert verdict(now).state == "strained"
    assert now.power_w == 0.0, "the files do not change: no energy was used"


def test_local_memory_is_told_where_the_module_tells_it(tmp_path: Path) -> None:
    more = {"drm/card1/lmem_total_bytes": "16000", "drm/card1/lmem_avail_bytes": "4000"}
    now = intel.read(ARC, root=write(tmp_path, ARC, {**arc(), **more}))
    assert (now.memory_used_bytes, now.memory_total_bytes) == (12000, 16000)


@pytest.mark.parametrize("read", [amd.read, intel.read])
def test_a_card_that_is_not_there_or_fell_off_the_bus_is_lost(read: Any, tmp_path: Path) -> None:
    for pci in (AMD, "nonsense", ""):
        assert verdict(read(pci, root=tmp_path)).state == "lost"
    write(tmp_path, AMD, {"config": b"\xff" * 64})
    now = read(AMD, root=tmp_path)
    assert "fell off the bus" in str(verdict(now))
    assert all(getattr(now, name) is None for name in SENSORS)


@pytest.mark.parametrize("read", [amd.read, intel.read])
def test_a_card_that_shows_nothing_has_no_sensors_and_no_fault(read: Any, tmp_path: Path) -> None:
    now = read(AMD, root=write(tmp_path, AMD, {"vendor": "0x1002"}))
    assert all(getattr(now, name) is None for name in SENSORS)
    assert (now.health, now.throttle, now.vendor_specific) == ("ok", (), ())


@given(st.data())
def test_no_content_of_a_file_makes_a_reading_raise(data: Any) -> None:
    """Whatever the files hold, what comes out is a reading that the wire takes."""
    with tempfile.TemporaryDirectory() as folder, patch.object(sysfs.time, "sleep"):
        files = {**radeon(), **instinct(), **arc(), **battlemage()}
        names = data.draw(st.lists(st.sampled_from(sorted(files)), max_size=6, unique=True))
        for name in names:
            files[name] = data.draw(st.binary(max_size=24))
        root = write(Path(folder), AMD, files)
        for read in (amd.read, intel.read):
            now = read(AMD, root=root)
            assert wire.telemetry_from_json(now.as_json()) == now
