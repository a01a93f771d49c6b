"""AMD's sensors: through AMD SMI where it is installed, else what the amdgpu module shows."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drivetrain.hal.telemetry import Telemetry, counters, sysfs
from drivetrain.hal.telemetry.health import uncorrected

_THROTTLE = {
    "power_cap": range(16),
    "current_limit": range(16, 32),
    "hw_thermal": (*range(32, 40), *range(40, 46)),
    "prochot": (46, 47),
    "power_management": (56,),
    "reliability": (57,),
}
"""Bits of ``indep_throttle_status``, the same for every chip (amdgpu_smu.h, SMU_THROTTLER_*)."""

_THROTTLE_AT = {(1, 3): 112, (2, 2): 120, (2, 3): 120}
"""Format and content revision of ``gpu_metrics`` -> where that status lies (kgd_pp_interface.h)."""


def read(pci: str, *, root: Path = sysfs.ROOT) -> Telemetry:
    """One reading of the AMD GPU at this PCI address. Never raises; absent sensors are None."""
    if root == sysfs.ROOT:
        found = _through_smi(pci)
        if found is None:
            found = from_sysfs(pci, root)
        return counters.added(found, "amd", pci)
    return from_sysfs(pci, root)


# --- the kernel's files --------------------------------------------------------------------------


def from_sysfs(pci: str, root: Path = sysfs.ROOT) -> Telemetry:
    """What amdgpu shows under the card's PCI folder (the kernel's amdgpu/thermal page)."""
    folder = sysfs.pci_folder(pci, root)
    gone = sysfs.gone(pci, folder)
    if folder is None or gone:
        return Telemetry(health=f"lost: {gone}", at=time.time())
    busy = sysfs.scaled(folder / "gpu_busy_percent", 100)
    monitor = sysfs.hwmon(folder, "amdgpu")
    heat = {} if monitor is None else sysfs.labelled(monitor, "temp", 1e3)
    power = limit = None
    if monitor is not None:
        names = ("power1_average", "power1_input")
        power = sysfs.first(sysfs.scaled(monitor / name, 1e6) for name in names)
        limit = sysfs.scaled(monitor / "power1_cap", 1e6)
    clocks = {} if monitor is None else sysfs.labelled(monitor, "freq", 1e6)
    wrong, right = _errors(folder)
    return Telemetry(
        utilisation=None if busy is None else min(1.0, max(0.0, busy)),
        memory_used_bytes=sysfs.number(folder / "mem_info_vram_used"),
        memory_total_bytes=sysfs.number(folder / "mem_info_vram_total"),
        power_w=power,
        power_limit_w=limit,
        temperature_c=sysfs.first(heat.get(name) for name in ("junction", "edge", "1")),
        memory_temperature_c=heat.get("mem"),
        clock_mhz=sysfs.first((clocks.get("sclk"), _current(folder / "pp_dpm_sclk"))),
        memory_clock_mhz=sysfs.first((clocks.get("mclk"), _current(folder / "pp_dpm_mclk"))),
        throttle=_throttle(sysfs.content(folder / "gpu_metrics")),
        ecc_corrected=right,
        ecc_uncorrected=wrong,
        health=_health(folder, wrong),
        at=time.time(),
        vendor_specific=_more(folder, monitor, heat),
    )


def _current(path: Path) -> float | None:
    """The level with the star in a file such as ``1: 2100Mhz *``."""
    for line in (sysfs.text(path) or "").splitlines():
        if line.endswith("*"):
            found = re.search(r":\s*(\d{1,6})\s*mhz", line.lower())
            return None if found is None else float(found[1])
    return None


def _errors(folder: Path) -> tuple[int | None, int | None]:
    """(uncorrected, corrected) errors of all blocks; (None, None) on a card without RAS."""
    sums: dict[str, int | None] = {"ue": None, "ce": None}
    for path in folder.glob("ras/*_err_count"):
        for line in (sysfs.text(path) or "").splitlines():
            word, _, count = line.partition(":")
            if word.strip() in sums and count.strip().isdigit():
                sums[word.strip()] = (sums[word.strip()] or 0) + int(count)
    return sums["ue"], sums["ce"]


def _throttle(metrics: bytes | None) -> tuple[str, ...]:
    if metrics is None or len(metrics) < 4:
        return ()
    size, form, revision = struct.unpack_from("<HBB", metrics)
    at = _THROTTLE_AT.get((form, revision))
    if at is None or size < at + 8 or len(metrics) < at + 8:
        return ()
    (bits,) = struct.unpack_from("<Q", metrics, at)
    if bits == 0xFFFF_FFFF_FFFF_FFFF:  # "not told"
        return ()
    return tuple(word for word, where in _THROTTLE.items() if any(bits >> bit & 1 for bit in where))


def _health(folder: Path, wrong: int | None) -> str:
    if wrong:
        return f"degraded: {uncorrected(wrong)}"
    retired = [
        line
        for line in (sysfs.text(folder / "ras/gpu_vram_bad_pages") or "").splitlines()
        if line.rstrip().endswith((": P", ": F"))  # pending, or could not be reserved
    ]
    if retired:
        return f"degraded: {len(retired)} memory pages are to be retired at the next start"
    return "ok"


def _more(
    folder: Path, monitor: Path | None, heat: dict[str, float]
) -> tuple[tuple[str, float], ...]:
    found: dict[str, float | None] = {
        "memory_busy_ratio": sysfs.scaled(folder / "mem_busy_percent", 100),
        "gtt_used_bytes": sysfs.number(folder / "mem_info_gtt_used"),
        "pcie_replays": sysfs.number(folder / "pcie_replay_count"),
    }
    for label, value in heat.items():
        found[f"{sysfs.reading_name(label)}_temperature_c"] = value
    if monitor is not None:
        found["fan_rpm"] = sysfs.number(monitor / "fan1_input")
        found["core_volt"] = sysfs.scaled(monitor / "in0_input", 1e3)
    return tuple((name, value) for name, value in found.items() if value is not None)


# --- AMD SMI -------------------------------------------------------------------------------------

_lock = threading.Lock()
_smi: Any = None
_initialised_in = 0


def _library_is_here(package: str) -> bool:
    """Whether the import below will find what it loads; without, it prints and raises KeyError."""
    rocm = os.environ.get("ROCM_PATH", "/opt/rocm")
    places = (Path(package).parent, Path(rocm) / "lib")
    return any((place / "libamd_smi.so").exists() for place in places)


def smi() -> Any:
    """The module ``amdsmi``, initialised in this process; None when it or its library is missing or
    does not work: the kernel's files then have to do."""
    global _smi, _initialised_in
    with _lock:
        if _initialised_in == os.getpid():
            return _smi
        _smi, _initialised_in = None, os.getpid()
        try:
            spec = importlib.util.find_spec("amdsmi")
            if spec is None or not _library_is_here(spec.origin or ""):
                return None
            module = importlib.import_module("amdsmi")
            module.amdsmi_init()
        except Exception:  # KeyError without its library, its own exceptions without a GPU
            return None
        _smi = module
        return _smi


def _through_smi(pci: str) -> Telemetry | None:
    module = smi()
    if module is None:
        return None
    with _lock:
        wanted = pci.lower()[-12:]
        for handle in _asked(module.amdsmi_get_processor_handles) or ():
            address = _asked(module.amdsmi_get_gpu_device_bdf, handle)
            if isinstance(address, str) and address.lower()[-12:] == wanted:
                return from_smi(module, handle)
    return None


def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None: any sensor may be missing, and each release has its own exceptions."""
    try:
        return function(*arguments)
    except Exception:
        return None


def _a(answer: Any, *names: str) -> float | None:
    """The first number under these names; AMD SMI writes ``N/A`` for what it cannot read."""
    if not isinstance(answer, dict):
        return None
    for name in names:
        value = answer.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _whole(value: float | None, factor: int = 1) -> int | None:
    return None if value is None else int(value) * factor


def from_smi(module: Any, handle: Any) -> Telemetry:
    """One reading by AMD SMI's handle."""
    busy = _asked(module.amdsmi_get_gpu_activity, handle)
    power = _asked(module.amdsmi_get_power_info, handle)
    memory = _asked(module.amdsmi_get_gpu_vram_usage, handle)
    errors = _asked(module.amdsmi_get_gpu_total_ecc_count, handle)
    core = _asked(module.amdsmi_get_clock_info, handle, module.AmdSmiClkType.GFX)
    bus = _asked(module.amdsmi_get_clock_info, handle, module.AmdSmiClkType.MEM)
    held = _asked(module.amdsmi_get_violation_status, handle)
    limit = _a(power, "power_limit")
    share = _a(busy, "gfx_activity")
    wrong = _whole(_a(errors, "uncorrectable_count"))
    return Telemetry(
        utilisation=None if share is None else min(1.0, share / 100),
        memory_used_bytes=_whole(_a(memory, "vram_used"), 1 << 20),
        memory_total_bytes=_whole(_a(memory, "vram_total"), 1 << 20),
        power_w=_a(power, "current_socket_power", "average_socket_power", "socket_power"),
        # Some releases tell microwatts.
        power_limit_w=limit / 1e6 if limit is not None and limit > 100_000 else limit,
        temperature_c=_heat(module, handle, "HOTSPOT", "JUNCTION", "EDGE"),
        memory_temperature_c=_heat(module, handle, "VRAM"),
        clock_mhz=_a(core, "clk", "cur_clk"),
        memory_clock_mhz=_a(bus, "clk", "cur_clk"),
        throttle=_violations(held),
        ecc_corrected=_whole(_a(errors, "correctable_count")),
        ecc_uncorrected=wrong,
        health=f"degraded: {uncorrected(wrong)}" if wrong else "ok",
        at=time.time(),
        vendor_specific=_use(module, handle, busy),
    )


_rates = sysfs.Rates()


def _use(module: Any, handle: Any, busy: Any) -> tuple[tuple[str, float], ...]:
    """How busy the memory and the media engine are, and what goes over the links (GB/s)."""
    table = _asked(lambda: module.amdsmi_get_gpu_metrics_info(handle))
    memory, media = _a(busy, "umc_activity"), _a(table, "average_mm_activity")
    found = {
        "memory_busy_ratio": None if memory is None else min(1.0, memory / 100),
        "media_busy_ratio": None if media is None else min(1.0, media / 100),
        "pcie_gbps": _a(table, "pcie_bandwidth_inst"),
    }
    if _links("", table):
        card = str(_asked(module.amdsmi_get_gpu_device_bdf, handle))
        rates = _rates.over(
            lambda: _links(card, _asked(module.amdsmi_get_gpu_metrics_info, handle))
        )
        found |= {name: rate for (_, name), rate in rates.items()}
    return tuple((name, value) for name, value in found.items() if value is not None)


def _links(card: str, table: Any) -> sysfs.Counters:
    """GB that went over all XGMI links, with the time; nothing on a card without."""
    found: sysfs.Counters = {}
    for name, key in (
        ("xgmi_read_gbps", "xgmi_read_data_acc"),
        ("xgmi_write_gbps", "xgmi_write_data_acc"),
    ):
        sizes = table.get(key) if isinstance(table, dict) else None
        told = [each for each in sizes or () if isinstance(each, int)]
        if any(told):
            found[card, name] = (sum(told) / 1e6, time.monotonic())  # they are in KB
    return found


def _heat(module: Any, handle: Any, *sensors: str) -> float | None:
    now = getattr(module.AmdSmiTemperatureMetric, "CURRENT", None)
    for name in sensors:
        sensor = getattr(module.AmdSmiTemperatureType, name, None)
        value = (
            None if sensor is None else _asked(module.amdsmi_get_temp_metric, handle, sensor, now)
        )
        if isinstance(value, int | float) and value:
            return float(value)
    return None


def _violations(held: Any) -> tuple[str, ...]:
    """What holds the clock now, as ``amdsmi_get_violation_status`` tells it."""
    if not isinstance(held, dict):
        return ()
    words = {
        "active_ppt_pwr": "power_cap",
        "active_socket_thrm": "hw_thermal",
        "active_vr_thrm": "vr_thermal",
        "active_hbm_thrm": "memory_thermal",
        "active_prochot_thrm": "prochot",
    }
    return tuple(word for name, word in words.items() if held.get(name) in (True, 1))


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
