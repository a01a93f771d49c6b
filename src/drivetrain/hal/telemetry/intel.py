"""Intel's sensors: through Level Zero's Sysman where it is installed, else what the i915 and xe
modules show.

The kernel's files tell no utilisation and, upstream, no memory in use: those stay None there. How
long a part of the GPU was awake is in ``vendor_specific``: the share of time not spent in RC6,
which is more than the share it was busy.
"""

from __future__ import annotations

import time
from pathlib import Path

from drivetrain.hal.telemetry import Telemetry, counters, sysfs, sysman

_THROTTLE = {
    "pl1": "power_cap",
    "pl2": "power_cap",
    "psys_pl1": "power_cap",
    "psys_pl2": "power_cap",
    "pl4": "current_limit",
    "psys_crit": "current_limit",
    "iccmax": "current_limit",
    "fastvmode": "current_limit",
    "vr_tdc": "current_limit",
    "thermal": "hw_thermal",
    "soc_thermal": "hw_thermal",
    "soc_avg_thermal": "hw_thermal",
    "mem_thermal": "memory_thermal",
    "vr_thermal": "vr_thermal",
    "vr_thermalert": "vr_thermal",
    "prochot": "prochot",
    "ratl": "hw_thermal",
}
"""The kernel's names of what holds the clock (i915 and xe, ``reason_*``) -> ours."""

_XE_CLOCK = "freq0/act_freq"

_rates = sysfs.Rates()


def read(pci: str, *, root: Path = sysfs.ROOT) -> Telemetry:
    """One reading of the Intel GPU at this PCI address. Never raises; absent sensors are None."""
    if root == sysfs.ROOT:
        found = sysman.read(pci)
        if found is None:
            found = from_sysfs(pci, root)
        return counters.added(found, "intel", pci)
    return from_sysfs(pci, root)


def from_sysfs(pci: str, root: Path = sysfs.ROOT) -> Telemetry:
    """What i915 or xe shows under the card's PCI folder (see sysfs-driver-intel-*)."""
    folder = sysfs.pci_folder(pci, root)
    gone = sysfs.gone(pci, folder)
    if folder is None or gone:
        return Telemetry(health=f"lost: {gone}", at=time.time())
    monitor = sysfs.hwmon(folder, "xe") or sysfs.hwmon(folder, "i915")
    heat = {} if monitor is None else sysfs.labelled(monitor, "temp", 1e3)
    limits = {} if monitor is None else sysfs.labelled(monitor, "power", 1e6, "max")
    parts = _parts(folder)
    rates = _rates.over(lambda: _counters(str(folder), monitor, parts))
    power = {key[2]: value for key, value in rates.items() if key[1] == "energy"}
    idle = {key[2]: value for key, value in rates.items() if key[1] == "idle"}
    used, total = _memory(folder)
    return Telemetry(
        memory_used_bytes=used,
        memory_total_bytes=total,
        power_w=sysfs.first(power.get(name) for name in ("card", "1", "pkg")),
        power_limit_w=sysfs.first(limits.get(name) for name in ("card", "1", "pkg")),
        temperature_c=sysfs.first(heat.get(name) for name in ("pkg", "1")),
        memory_temperature_c=heat.get("vram"),
        clock_mhz=_clock(parts),
        throttle=_throttle(parts),
        health="ok",
        at=time.time(),
        vendor_specific=_more(monitor, heat, idle),
    )


def _parts(folder: Path) -> dict[str, Path]:
    """The GPU's parts (a "GT" each) by name: ``gt0`` of i915, ``tile0_gt0`` of xe."""
    found = {path.name: path for path in sorted(folder.glob("drm/card*/gt/gt[0-9]*"))}
    for path in sorted(folder.glob("tile[0-9]*/gt[0-9]*")):
        found[f"{path.parent.name}_{path.name}"] = path
    return found


def _counters(card: str, monitor: Path | None, parts: dict[str, Path]) -> sysfs.Counters:
    """Joules, and seconds asleep, with the time they were read at."""
    energy = {} if monitor is None else sysfs.labelled(monitor, "energy", 1e6)
    at = time.monotonic()
    found: sysfs.Counters = {
        (card, "energy", label): (joules, at) for label, joules in energy.items()
    }
    for name, part in parts.items():
        files = (part / "rc6_residency_ms", part / "gtidle/idle_residency_ms")
        asleep = sysfs.first(sysfs.scaled(path, 1e3) for path in files)
        if asleep is not None:
            found[card, "idle", name] = (asleep, time.monotonic())
    return found


def _memory(folder: Path) -> tuple[int | None, int | None]:
    """(bytes in use, bytes) of the card's own memory, where the module tells them."""
    for card in sorted(folder.glob("drm/card*")):
        total = sysfs.number(card / "lmem_total_bytes")
        free = sysfs.number(card / "lmem_avail_bytes")
        if total:
            return None if free is None else max(0, total - free), total
    return None, None


def _clock(parts: dict[str, Path]) -> float | None:
    """Of the fastest part; a part that sleeps says 0."""
    files = [part / name for part in parts.values() for name in ("rps_act_freq_mhz", _XE_CLOCK)]
    found = [value for value in map(sysfs.number, files) if value is not None]
    return float(max(found)) if found else None


def _throttle(parts: dict[str, Path]) -> tuple[str, ...]:
    held = set()
    for part in parts.values():
        files = [*part.glob("throttle_reason_*"), *part.glob("freq0/throttle/reason_*")]
        for path in files:
            name = path.name.removeprefix("throttle_").removeprefix("reason_")
            if name != "status" and sysfs.number(path):
                held.add(_THROTTLE.get(name, sysfs.reading_name(name)))
    return tuple(sorted(held))


def _more(
    monitor: Path | None, heat: dict[str, float], idle: dict[str, float]
) -> tuple[tuple[str, float], ...]:
    found = {f"{name}_awake_ratio": min(1.0, max(0.0, 1 - rate)) for name, rate in idle.items()}
    for label, value in heat.items():
        if label != "1":
            found[f"{sysfs.reading_name(label)}_temperature_c"] = value
    if monitor is not None:
        for label, value in sysfs.labelled(monitor, "fan", 1).items():
            found[f"fan_{label}_rpm" if label.isdigit() else "fan_rpm"] = value
        volt = sysfs.scaled(monitor / "in0_input", 1e3)
        if volt is not None:
            found["core_volt"] = volt
    return tuple(found.items())
