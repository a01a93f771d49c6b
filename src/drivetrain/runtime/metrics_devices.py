"""What the exporter tells of drivers and devices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from drivetrain.hal import DriverInfo, Telemetry
from drivetrain.hal.device import Device
from drivetrain.hal.probe import Verdict
from drivetrain.hal.telemetry.health import KINDS, STATES, verdict
from drivetrain.runtime.exposition import Metric

_DRIVER_STATES = ("usable", "absent", "broken", "unchecked")
_MOST_WORDS = 16
_SENSORS = (
    ("utilisation", "utilisation_ratio", 1.0, "Share of the last period that it was busy."),
    ("memory_used_bytes", "memory_used_bytes", 1.0, "Memory in use."),
    ("memory_total_bytes", "memory_bytes", 1.0, "Memory in all."),
    ("power_w", "power_watts", 1.0, "Power drawn."),
    ("power_limit_w", "power_limit_watts", 1.0, "Power that it is held to."),
    ("temperature_c", "temperature_celsius", 1.0, "Of the chip's hottest sensor."),
    ("memory_temperature_c", "memory_temperature_celsius", 1.0, "Of the memory."),
    ("clock_mhz", "clock_hertz", 1e6, "Clock of the cores."),
    ("memory_clock_mhz", "memory_clock_hertz", 1e6, "Clock of the memory."),
)
"""Field of ``Telemetry``, metric, factor to its base unit, help."""


def drivers(states: Mapping[str, DriverInfo]) -> Iterable[Metric]:
    """Each driver's state, as one of four."""
    found = Metric("drivetrain_driver_state", "gauge", "1 for the state that the driver is in.")
    for name, driver in states.items():
        for state in _DRIVER_STATES:
            found.add(driver.state == state, driver=name, state=state)
    return (found,)


def devices(
    found: Sequence[Device], known: Mapping[Device, Verdict], now: Mapping[Device, Telemetry]
) -> Iterable[Metric]:
    """Every sensor, error count, reason and verdict. Labels: the address, which names a device of
    this machine; what else it is called is in ``drivetrain_device_info``."""
    info = Metric("drivetrain_device_info", "gauge", "1; what the device is.")
    usable = Metric("drivetrain_device_usable", "gauge", "Whether it passed its last probe.")
    read = Metric("drivetrain_device_read_timestamp_seconds", "gauge", "When it was read.")
    sensors = {
        name: Metric(f"drivetrain_device_{metric}", "gauge", told)
        for name, metric, _, told in _SENSORS
    }
    errors = Metric(
        "drivetrain_device_ecc_errors_total", "counter", "Memory errors since the last reset."
    )
    throttled = Metric(
        "drivetrain_device_throttled", "gauge", "1 for each reason that holds the clock down now."
    )
    health = Metric("drivetrain_device_health", "gauge", "1 for the state of its health.")
    reasons = Metric(
        "drivetrain_device_health_reason", "gauge", "1 for each kind of reason of that state."
    )
    vendor = Metric(
        "drivetrain_device_vendor_reading", "gauge", "What only its vendor tells, unit in the name."
    )
    for device in found:
        at = device.address
        reading = now[device]
        info.add(
            1, device=at, driver=device.driver, vendor=device.vendor, name=device.name,
            uuid=device.uuid,
        )  # fmt: skip
        usable.add(known[device].usable, device=at)
        read.add(reading.at or time.time(), device=at)
        for name, _, factor, _ in _SENSORS:
            value = getattr(reading, name)
            sensors[name].add(None if value is None else value * factor, device=at)
        errors.add(reading.ecc_corrected, device=at, kind="corrected")
        errors.add(reading.ecc_uncorrected, device=at, kind="uncorrected")
        for word in reading.throttle[:_MOST_WORDS]:
            throttled.add(1, device=at, reason=word)
        told = verdict(reading)
        for state in STATES:
            health.add(told.state == state, device=at, state=state)
        kinds = {reason.kind for reason in told.reasons}
        for kind in KINDS:
            reasons.add(kind in kinds, device=at, kind=kind)
        for name, value in reading.vendor_specific:
            vendor.add(value, device=at, reading=name)
    return (info, usable, read, *sensors.values(), errors, throttled, health, reasons, vendor)
