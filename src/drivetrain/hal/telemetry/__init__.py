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
    temperature_c: float | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle: tuple[str, ...] = ()
    """Why the clock is held down now: ``power_cap``, ``hw_thermal``, ... Idle is no reason."""
    health: str = "unknown"
    """``ok``, ``degraded``, ``lost`` or ``unknown``, then perhaps ``: `` and why."""
    at: float | None = None
    """Unix time of the reading, seconds."""

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**facts, "throttle": list(self.throttle)}
