"""The host's sensors: load of some cores, memory within the control group's limit, heat."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from drivetrain.hal import cgroup
from drivetrain.hal.kinds import MemoryInfo
from drivetrain.hal.telemetry import Telemetry

_SHORTEST_SAMPLE_S = 0.05

_lock = threading.Lock()
_last: tuple[float, list[tuple[float, float]]] | None = None  # when, (busy, total) of each core
_shares: list[float] = []


def memory(root: Path = cgroup.ROOT) -> MemoryInfo:
    """The host's memory as far as this process may use it.

    A control group's limit is believed even where it is larger than the memory the system shows:
    virtual machines may start small and grow towards it.
    """
    system = psutil.virtual_memory()
    group = cgroup.memory(root)
    busy = int(system.total - system.available)
    if group.limit_bytes is None:
        return MemoryInfo(int(system.total), busy, int(system.available))
    total = group.limit_bytes
    used = busy if group.used_bytes is None else group.used_bytes
    if total > system.total:
        used = max(used, busy)
        free = total - used
    else:
        free = min(total - used, int(system.available))
    free = max(0, free)
    return MemoryInfo(total, total - free, free)


def _times() -> list[tuple[float, float]]:
    found = []
    for core in psutil.cpu_times(percpu=True):
        total = sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)
        found.append((total - core.idle - getattr(core, "iowait", 0.0), total))
    return found


def _load() -> list[float]:
    """Busy share of each core since the last look, or over 50 ms at the first."""
    global _last, _shares
    with _lock:
        if _last is None:
            _last = (time.monotonic(), _times())
            time.sleep(_SHORTEST_SAMPLE_S)
        now = time.monotonic()
        if now - _last[0] >= _SHORTEST_SAMPLE_S:
            times = _times()
            if len(times) == len(_last[1]):
                _shares = [
                    min(1.0, max(0.0, (busy - busy0) / (total - total0))) if total > total0 else 0.0
                    for (busy, total), (busy0, total0) in zip(times, _last[1], strict=True)
                ]
            _last = (now, times)
        return list(_shares)


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)
    found = read() if read is not None else {}
    for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
        values = [entry.current for entry in found.get(chip, ()) if entry.current]
        if values:
            return float(max(values))
    return None


def telemetry(cpus: Sequence[int]) -> Telemetry:
    """Load of these cores; memory and temperature are the whole host's."""
    load = _load()
    mine = [load[cpu] for cpu in cpus if cpu < len(load)]
    clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    now = memory()
    return Telemetry(
        utilisation=sum(mine) / len(mine) if mine else None,
        memory_used_bytes=now.used_bytes,
        memory_total_bytes=now.total_bytes,
        temperature_c=_temperature(),
        clock_mhz=float(clock.current) if clock and clock.current else None,
        health="ok",
        at=time.time(),
    )
