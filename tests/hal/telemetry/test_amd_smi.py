"""AMD SMI: read where it works, left alone where its library is missing."""

from __future__ import annotations

import sys
import types
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from drivetrain.hal.telemetry import amd
from drivetrain.hal.telemetry.health import verdict


class FakeSmi(types.ModuleType):
    """The calls of amdsmi 7 that are used, with the keys and words that its source has."""

    class AmdSmiTemperatureType(IntEnum):
        EDGE = 0
        HOTSPOT = 1
        VRAM = 3

    class AmdSmiTemperatureMetric(IntEnum):
        CURRENT = 0

    class AmdSmiClkType(IntEnum):
        GFX = 1
        MEM = 4

    def __init__(self) -> None:
        super().__init__("amdsmi")

    def amdsmi_init(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[str]:
        return ["h0", "h1"]

    def amdsmi_get_gpu_device_bdf(self, handle: str) -> str:
        return {"h0": "0000:0C:00.0", "h1": "0000:c3:00.0"}[handle]

    def amdsmi_get_gpu_activity(self, handle: str) -> dict[str, Any]:
        return {"gfx_activity": 55, "umc_activity": 30, "mm_activity": "N/A"}

    def amdsmi_get_power_info(self, handle: str) -> dict[str, Any]:
        return {
            "socket_power": 410, "current_socket_power": "N/A", "average_socket_power": "N/A",
            "power_limit": 750_000_000,
        }  # fmt: skip

    def amdsmi_get_gpu_vram_usage(self, handle: str) -> dict[str, int]:
        return {"vram_total": 196592, "vram_used": 1024}

    def amdsmi_get_gpu_total_ecc_count(self, handle: str) -> dict[str, int]:
        return {"correctable_count": 3, "uncorrectable_count": 1, "deferred_count": 0}

    def amdsmi_get_clock_info(self, handle: str, kind: int) -> dict[str, Any]:
        return {"clk": 2100 if kind == 1 else "N/A", "min_clk": 132, "max_clk": 2100}

    def amdsmi_get_violation_status(self, handle: str) -> dict[str, Any]:
        return {"active_ppt_pwr": True, "active_socket_thrm": False, "active_vr_thrm": "N/A"}

    looks = 0

    def amdsmi_get_gpu_metrics_info(self, handle: str) -> dict[str, Any]:
        FakeSmi.looks += 1
        return {
            "average_mm_activity": 40, "pcie_bandwidth_inst": 12,
            "xgmi_read_data_acc": [10**9 * self.looks, 10**9 * self.looks, "N/A"],
            "xgmi_write_data_acc": ["N/A"] * 3,
        }  # fmt: skip

    def amdsmi_get_temp_metric(self, handle: str, sensor: int, metric: int) -> int:
        if sensor == 3:
            raise RuntimeError("AMDSMI_STATUS_NOT_SUPPORTED")
        return 71


@pytest.fixture
def no_smi_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amd, "_initialised_in", 0)
    monkeypatch.setattr(amd, "_smi", None)


@pytest.mark.usefixtures("no_smi_yet")
def test_amd_smi_is_read_where_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libamd_smi.so").write_bytes(b"")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    (tmp_path / "amdsmi.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    fake = FakeSmi()
    fake.__spec__ = types.SimpleNamespace(origin="")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "amdsmi", fake)
    now = amd.read("0000:c3:00.0")
    assert (now.utilisation, now.power_w, now.power_limit_w) == (0.55, 410.0, 750.0)
    assert (now.memory_total_bytes, now.memory_used_bytes) == (196592 << 20, 1 << 30)
    assert (now.temperature_c, now.memory_temperature_c) == (71.0, None)
    assert (now.clock_mhz, now.memory_clock_mhz) == (2100.0, None)
    assert (now.ecc_corrected, now.ecc_uncorrected, now.throttle) == (3, 1, ("power_cap",))
    more = dict(now.vendor_specific)
    assert more.pop("xgmi_read_gbps") > 0
    assert more == {"memory_busy_ratio": 0.3, "media_busy_ratio": 0.4, "pcie_gbps": 12.0}
    assert [reason.kind for reason in verdict(now).reasons] == ["ecc", "throttling"]


@pytest.mark.usefixtures("no_smi_yet")
@pytest.mark.parametrize("error", ["KeyError('libamd_smi.so')", "SystemError()", "OSError()"])
def test_amd_smi_that_cannot_be_imported_leaves_it_to_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: str
) -> None:
    package = tmp_path / "amdsmi"
    package.mkdir()
    (package / "__init__.py").write_text(f"print('noise')\nraise {error}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ROCM_PATH", raising=False)
    assert amd.smi() is None
    assert capfd.readouterr().out == "", "without its library it is not even imported"
    (package / "libamd_smi.so").write_bytes(b"")
    monkeypatch.setattr(amd, "_initialised_in", 0)
    assert amd.smi() is None
    assert amd.read("0000:c3:00.0").health.startswith("lost"), "this machine has no such card"
