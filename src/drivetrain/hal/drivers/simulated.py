"""A device that is made up: it works, and fails in any way that is asked for.

It is there only when ``DRIVETRAIN_SIMULATED`` says so, is never chosen by default, and shows
nothing about hardware. The variable holds JSON, or words ``key=value`` with commas or spaces
between them::

    DRIVETRAIN_SIMULATED="count=2 memory=64M bandwidth_gbps=4 fault=alloc:3:out_of_memory"

Keys: ``count`` of devices, ``vendor``, ``name``, ``memory`` of each (``64M``, ``1G``), ``groups``
(``peer+pinned``; ``none``), ``bandwidth_gbps`` of copies and fills and ``latency_us`` of each
command (0: as fast as the host), ``mutant`` (a named defect, see ``simulated_mutants``) and
``fault`` (any number): ``METHOD:NTH:WHAT`` or ``METHOD:NTH:WHAT:SECONDS``, where METHOD is one of
the driver interface or ``work`` (a queued command when its turn comes), NTH counts from 1, and WHAT
is ``out_of_memory``, ``error``, ``lost`` (sticky), ``delay`` or ``hang``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, HalError
from drivetrain.hal.driver import (
    Backend,
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    hidden_from_all,
)
from drivetrain.hal.telemetry import Telemetry

if TYPE_CHECKING:
    from drivetrain.hal.drivers.simulated_backend import Simulated

# --- names ---------------------------------------------------------------------------------------

NAME = "simulated"
VARIABLE = "DRIVETRAIN_SIMULATED"
HAS = frozenset({"compute", "graphs", "peer", "managed", "pinned", "timing"})
FAULTS = ("out_of_memory", "error", "lost", "delay", "hang")
_MOST_DEVICES = 16
_MOST_BYTES = 64 << 30
_MOST_FAULTS = 64


@dataclass(frozen=True)
class Fault:
    """The ``nth`` call of ``method`` fails, is late or never returns."""

    method: str
    nth: int
    what: str
    seconds: float = 0.0
    """How late, for ``delay``."""


@dataclass(frozen=True)
class Configuration:
    """What the made-up machine has."""

    count: int = 1
    vendor: str = "simulated"
    name: str = "Simulated device"
    memory_bytes: int = 256 << 20
    groups: frozenset[str] = HAS
    bandwidth_gbps: float = 0.0
    latency_us: float = 0.0
    mutant: str = ""
    faults: tuple[Fault, ...] = ()


# --- the variable --------------------------------------------------------------------------------


def configuration(text: str | None = None) -> Configuration | None:
    """What ``text`` (default: the variable) asks for; None when it is empty. Raises BadInput."""
    text = os.environ.get(VARIABLE, "") if text is None else text
    return _parsed(text.strip()) if text.strip() else None


@cache
def _parsed(text: str) -> Configuration:
    given = _from_json(text) if text.startswith("{") else _from_words(text)
    known = {field.name for field in fields(Configuration)} - {"faults", "memory_bytes"}
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key == "memory":
            found["memory_bytes"] = _bytes(value)
        elif key == "fault":
            listed = value if isinstance(value, list) else [value]
            if len(listed) > _MOST_FAULTS:
                raise _bad(f"{len(listed)} faults; at most {_MOST_FAULTS}")
            found["faults"] = tuple(fault(str(each)) for each in listed)
        elif key == "groups":
            found["groups"] = _groups(value)
        elif key == "count":
            found["count"] = int(_number(key, value, 1, _MOST_DEVICES))
        elif key == "bandwidth_gbps":
            found[key] = _number(key, value, 0, 1e6)
        elif key == "latency_us":
            found[key] = _number(key, value, 0, 6e7)
        elif key in known:
            found[key] = str(value)
        else:
            raise _bad(f"{key!r} is no key; there are {', '.join(sorted(known))}, memory, fault")
    return Configuration(**found)


def _bad(what: str) -> BadInput:
    return BadInput(f"{VARIABLE}: {what}")


def _from_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _bad(f"this is no JSON: {error}") from error
    assert isinstance(found, dict)  # it starts with a brace
    return found


def _from_words(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in re.split(r"[\s,]+", text):
        key, separator, value = word.partition("=")
        if not separator and word in ("1", "on"):
            continue
        if not separator or not key:
            raise _bad(f"{word!r} is no key=value")
        if key == "fault":
            found.setdefault("fault", []).append(value)
        else:
            found[key] = value
    return found


def _number(key: str, value: Any, least: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= most:
        raise _bad(f"{key}={value!r}; give a number from {least:g} to {most:g}")
    return number


def _bytes(value: Any) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", str(value))
    size = int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0
    if not 1 << 20 <= size <= _MOST_BYTES:
        raise _bad(f"memory={value!r}; give 1M to 64G")
    return size


def _groups(value: Any) -> frozenset[str]:
    words = value if isinstance(value, list) else str(value).split("+")
    found = frozenset(str(word) for word in words if word not in ("", "none"))
    if found - HAS:
        raise _bad(f"groups={value!r}; there are {', '.join(sorted(HAS))}")
    return found


def fault(text: str) -> Fault:
    """``METHOD:NTH:WHAT[:SECONDS]``. Raises BadInput."""
    method, nth, what, seconds = (*text.split(":"), "", "", "", "")[:4]
    if not method.isidentifier() or not nth.isdigit() or int(nth) < 1 or what not in FAULTS:
        raise _bad(f"fault {text!r}; give METHOD:NTH:WHAT, where WHAT is {', '.join(FAULTS)}")
    return Fault(method, int(nth), what, _number("delay", seconds or 0.0, 0, 3600))


# --- discovery -----------------------------------------------------------------------------------


def absent() -> str:
    if configuration() is None:
        return f"{VARIABLE} is not set: a simulated device is there only when it is asked for"
    return ""


def discover() -> tuple[DeviceInfo, ...]:
    asked = configuration()
    if asked is None:
        return ()
    changed = _defect(asked.mutant)
    return tuple(
        changed(
            DeviceInfo(
                driver=NAME,
                index=index,
                name=asked.name,
                vendor=asked.vendor,
                uuid=f"SIMULATED-{index}",
                memory_bytes=asked.memory_bytes,
                driver_version="1",
                capabilities=Capabilities(groups=tuple(sorted(asked.groups))),
                isolation=Isolation(hidden_from_all(), None, 1, "cpu"),
                telemetry=Telemetry(health="ok", at=time.time()),
            )
        )
        for index in range(asked.count)
    )


def _defect(mutant: str) -> Callable[[DeviceInfo], DeviceInfo]:
    """What a mutant does to the facts that discovery tells; mostly nothing."""
    if mutant:
        from drivetrain.hal.drivers.simulated_mutants import FACTS

        if mutant in FACTS:
            return FACTS[mutant]
    return lambda info: info


# --- telemetry, probe ----------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    from drivetrain.hal.drivers.simulated_chip import used_bytes

    return Telemetry(
        memory_total_bytes=info.memory_bytes,
        memory_used_bytes=used_bytes(info.index),
        health="ok",
        at=time.time(),
    )


def probe(info: DeviceInfo) -> None:
    backend = open_device(info)
    try:
        stream = backend.stream_create(0)
        ptr = backend.alloc(64, 0, stream)
        backend.fill(ptr, b"\x5a", 64, stream)
        host = bytearray(64)
        into = (ctypes.c_char * 64).from_buffer(host)
        backend.copy(ctypes.addressof(into), ptr, 64, 2, stream, False)
        backend.stream_synchronize(stream, 10.0)
        if bytes(host) != b"\x5a" * 64:
            raise HalError("a fill wrote something else", code="wrong", driver=NAME, op="probe")
    finally:
        backend.close()


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """A device of the configuration that the variable holds now."""
    from drivetrain.hal.drivers.simulated_backend import Simulated
    from drivetrain.hal.drivers.simulated_mutants import MUTANTS

    asked = configuration() or Configuration()
    if not asked.mutant:
        return Simulated(info, asked)
    kind: type[Simulated] | None = MUTANTS.get(asked.mutant)
    if kind is None:
        raise _bad(f"there is no mutant {asked.mutant!r}; there are {', '.join(MUTANTS)}")
    return kind(info, asked)


DRIVER = Driver(
    name=NAME,
    vendor="simulated",
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    in_process=True,
    groups=HAS,
    install=f"set {VARIABLE}, for example to count=2",
)
