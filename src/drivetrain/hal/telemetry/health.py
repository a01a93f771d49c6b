"""A verdict on a device's health, with reasons, from one reading of its sensors.

The states, the worst that any reason asks for:

* ``ok``: nothing is wrong as far as the sensors tell;
* ``strained``: it works and its results are right, but slower, or with little memory left. Passes
  by itself when the load or the heat does;
* ``degraded``: it works and needs service: memory errors, rows that await a remap;
* ``lost``: it does not answer until it is reset;
* ``unknown``: its sensors cannot be read, which says nothing about the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drivetrain.hal.telemetry import Telemetry

STATES = ("ok", "strained", "degraded", "lost", "unknown")
KINDS = ("throttling", "ecc", "service", "memory_pressure", "lost", "unreadable")

FULL = 0.95
"""From this share of its memory in use on, a device is short of it."""

SETTINGS = frozenset({"application_clocks", "sync_boost", "display_clocks"})
"""Clocks that are held down because somebody asked for it: no fault of the device."""


@dataclass(frozen=True)
class Reason:
    kind: str
    """One of ``KINDS``."""
    text: str
    """A clause for people."""


@dataclass(frozen=True)
class Health:
    """``state`` is one of ``STATES``; ``ok`` has no reasons."""

    state: str
    reasons: tuple[Reason, ...] = ()

    def as_json(self) -> dict[str, Any]:
        reasons = [{"kind": reason.kind, "text": reason.text} for reason in self.reasons]
        return {"state": self.state, "reasons": reasons}

    def __str__(self) -> str:
        told = "; ".join(reason.text for reason in self.reasons)
        return f"{self.state}: {told}" if told else self.state


def uncorrected(count: int) -> str:
    """The words for ``count`` memory errors that were not put right."""
    errors = "error" if count == 1 else "errors"
    return f"{count} uncorrected memory {errors} since the last reset"


def verdict(now: Telemetry) -> Health:
    """What one reading says about the device."""
    word, _, told = now.health.partition(": ")
    if word == "lost":
        return Health("lost", (Reason("lost", told or "it does not answer"),))
    service: list[Reason] = []
    strain: list[Reason] = []
    if now.ecc_uncorrected:
        service.append(Reason("ecc", uncorrected(now.ecc_uncorrected)))
    if word == "degraded" and told not in {reason.text for reason in service}:
        service.append(Reason("service", told or "its driver calls it degraded"))
    held = [why for why in now.throttle if why not in SETTINGS]
    if held:
        strain.append(Reason("throttling", f"the clock is held down: {', '.join(held)}"))
    used, total = now.memory_used_bytes, now.memory_total_bytes
    if used is not None and total and used >= FULL * total:
        strain.append(Reason("memory_pressure", f"{used / total:.0%} of the memory is in use"))
    reasons = (*service, *strain)
    if reasons:
        return Health("degraded" if service else "strained", reasons)
    if word == "unknown":
        return Health("unknown", (Reason("unreadable", told),) if told else ())
    return Health("ok")
