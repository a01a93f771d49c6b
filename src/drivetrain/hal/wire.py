"""Facts about devices as JSON, for the way between a discovery child and its parent.

What arrives was written by a process that may have gone wrong: every field's type is checked, and
whatever does not fit raises ValueError.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

from drivetrain.hal.device import Capabilities, DeviceInfo, Isolation
from drivetrain.hal.telemetry import Telemetry

_LARGEST_LIST = 4096
_MOST_READINGS = 64
_READING = re.compile(r"[a-z][a-z0-9_]{0,63}")


def info_to_json(info: DeviceInfo) -> dict[str, Any]:
    return asdict(info)


def info_from_json(value: Any) -> DeviceInfo:
    """Raises ValueError when ``value`` is not what ``info_to_json`` makes."""
    facts = _fields(value, DeviceInfo)
    return DeviceInfo(
        driver=_a(str, facts, "driver"),
        index=_count(facts, "index"),
        name=_a(str, facts, "name"),
        vendor=_a(str, facts, "vendor"),
        uuid=_a(str, facts, "uuid"),
        pci=_a(str, facts, "pci"),
        memory_bytes=_count(facts, "memory_bytes"),
        memory_domain=_a(str, facts, "memory_domain"),
        driver_version=_a(str, facts, "driver_version"),
        numa_node=_maybe(int, facts, "numa_node"),
        parent_uuid=_a(str, facts, "parent_uuid"),
        fault=_a(str, facts, "fault"),
        by_name_only=_truth(facts, "by_name_only"),
        capabilities=_capabilities(facts["capabilities"]),
        isolation=_isolation(facts["isolation"]),
        telemetry=telemetry_from_json(facts["telemetry"]),
    )


def telemetry_from_json(value: Any) -> Telemetry:
    """Raises ValueError."""
    facts = _fields(value, Telemetry)
    utilisation = _number(facts, "utilisation")
    if utilisation is not None and not 0 <= utilisation <= 1:
        raise ValueError(f"utilisation {utilisation} is not in [0, 1]")
    return Telemetry(
        utilisation=utilisation,
        memory_used_bytes=_maybe(int, facts, "memory_used_bytes"),
        memory_total_bytes=_maybe(int, facts, "memory_total_bytes"),
        power_w=_number(facts, "power_w"),
        power_limit_w=_number(facts, "power_limit_w"),
        temperature_c=_number(facts, "temperature_c"),
        memory_temperature_c=_number(facts, "memory_temperature_c"),
        clock_mhz=_number(facts, "clock_mhz"),
        memory_clock_mhz=_number(facts, "memory_clock_mhz"),
        throttle=_words(facts, "throttle"),
        ecc_corrected=_maybe(int, facts, "ecc_corrected"),
        ecc_uncorrected=_maybe(int, facts, "ecc_uncorrected"),
        health=_a(str, facts, "health"),
        at=_number(facts, "at"),
        vendor_specific=_readings(facts["vendor_specific"]),
    )


def _readings(value: Any) -> tuple[tuple[str, float], ...]:
    """From an object, or from the pairs that ``info_to_json`` leaves."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or len(pairs) > _MOST_READINGS:
        raise ValueError("vendor_specific is no list of readings")
    found = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a reading is a name and a number")
        name, number = _is(str, pair[0], "reading"), _number({"reading": pair[1]}, "reading")
        if number is None or not _READING.fullmatch(name):
            raise ValueError("a reading is a name in small letters and a number")
        found.append((name, number))
    return tuple(found)


def _capabilities(value: Any) -> Capabilities:
    facts = _fields(value, Capabilities)
    caches = facts["caches"]
    if not isinstance(caches, list) or len(caches) > _LARGEST_LIST:
        raise ValueError("caches is no list")
    pairs = []
    for pair in caches:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("a cache is a name and a size")
        pairs.append((_is(str, pair[0], "cache"), _is(int, pair[1], "cache")))
    return Capabilities(
        compute=_a(str, facts, "compute"),
        cores=_maybe(int, facts, "cores"),
        physical_cores=_maybe(int, facts, "physical_cores"),
        multiprocessors=_maybe(int, facts, "multiprocessors"),
        features=_words(facts, "features"),
        caches=tuple(pairs),
        clock_mhz=_maybe(int, facts, "clock_mhz"),
        memory_clock_mhz=_maybe(int, facts, "memory_clock_mhz"),
        nvlinks=_maybe(int, facts, "nvlinks"),
        peers=_words(facts, "peers"),
        peer_uuids=_words(facts, "peer_uuids"),
        groups=_words(facts, "groups"),
    )


def _isolation(value: Any) -> Isolation:
    facts = _fields(value, Isolation)
    environment, cpus = facts["environment"], facts["cpus"]
    if not isinstance(environment, dict):
        raise ValueError("environment is no object")
    if cpus is not None and not (isinstance(cpus, list) and len(cpus) <= _LARGEST_LIST):
        raise ValueError("cpus is no list")
    return Isolation(
        environment={
            _is(str, name, "environment"): _is(str, text, "environment")
            for name, text in environment.items()
        },
        cpus=None if cpus is None else tuple(_is(int, cpu, "cpus") for cpu in cpus),
        threads=_count(facts, "threads"),
        torch_device=_a(str, facts, "torch_device"),
    )


def _fields(value: Any, kind: Any) -> dict[str, Any]:
    names = set(kind.__dataclass_fields__)
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"this is no {kind.__name__}")
    return value


def _is(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is no {kind.__name__}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
    return value


def _a(kind: type, facts: dict[str, Any], name: str) -> Any:
    return _is(kind, facts[name], name)


def _maybe(kind: type, facts: dict[str, Any], name: str) -> Any:
    return None if facts[name] is None else _is(kind, facts[name], name)


def _truth(facts: dict[str, Any], name: str) -> bool:
    value = facts[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def _count(facts: dict[str, Any], name: str) -> int:
    value: int = _a(int, facts, name)
    if value < 0:
        raise ValueError(f"{name} is negative")
    return value


def _number(facts: dict[str, Any], name: str) -> float | None:
    value = facts[name]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is not finite")
    return value


def _words(facts: dict[str, Any], name: str) -> tuple[str, ...]:
    value = facts[name]
    if not isinstance(value, list) or len(value) > _LARGEST_LIST:
        raise ValueError(f"{name} is no list")
    return tuple(_is(str, word, name) for word in value)
