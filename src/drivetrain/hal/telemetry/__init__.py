"""Sensors: power, temperature, utilisation, clocks, memory, health. Never a compute context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Telemetry:
    """One reading. An absent sensor is ``None``: absence is normal, and never an error."""

    utilisation: float | None = None
    """Share of the last sampling period that the device was busy, in [0, 1]."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    """What the card is held to now."""
    temperature_c: float | None = None
    """Of the hottest sensor of the chip."""
    memory_temperature_c: float | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle: tuple[str, ...] = ()
    """Why the clock is held down now: ``power_cap``, ``hw_thermal``, ... Idle is no reason."""
    ecc_corrected: int | None = None
    """Memory errors that were put right, since the last reset or the driver's start."""
    ecc_uncorrected: int | None = None
    """Those that were not: data was lost."""
    health: str = "unknown"
    """``ok``, ``degraded``, ``lost`` or ``unknown``, then perhaps ``: `` and why."""
    at: float | None = None
    """Unix time of the reading, seconds."""
    vendor_specific: tuple[tuple[str, float], ...] = ()
    """What only this vendor tells, by the vendor's names with the unit at the end:
    ``sm_occupancy_ratio``, ``junction_temperature_c``, ``energy_j``."""

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        more = {"throttle": list(self.throttle), "vendor_specific": dict(self.vendor_specific)}
        return {**facts, **more}
