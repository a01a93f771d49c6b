"""Whether a device can be used, found out by using it: in a child process with a time limit.

Verdicts are kept per device, driver version and boot in ``<state folder>/probes.json``. The file is
a cache: deleting it, or two writers at once, costs another probe.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from drivetrain.hal import config, isolated, wire
from drivetrain.hal.device import Device

PROBE_LIMIT_S = 10.0
FILE = "probes.json"
_PASSING = ("out_of_memory", "busy")
"""Codes of failures that say more about the moment than about the device."""


@dataclass(frozen=True)
class Verdict:
    """``usable`` is ``None`` while it was not checked; ``checked_at`` is Unix time, seconds."""

    usable: bool | None = None
    checked_at: float | None = None
    reason: str = ""

    @property
    def checked_at_text(self) -> str | None:
        """ISO 8601, UTC."""
        if self.checked_at is None:
            return None
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.checked_at))


def _key(device: Device) -> str:
    return f"{device.driver}|{device.uuid}|{device.info.driver_version}|{config.boot_id()}"


def verdict(device: Device, *, home: Path | None = None) -> Verdict:
    """What is known, without looking again."""
    if device.info.fault:
        return Verdict(False, device.info.telemetry.at, device.info.fault)
    return _known(config.read_json((home or config.state_folder()) / FILE).get(_key(device)))


def verdicts(devices: Iterable[Device], *, home: Path | None = None) -> dict[Device, Verdict]:
    """``verdict`` of each, reading the file once."""
    kept = config.read_json((home or config.state_folder()) / FILE)
    return {
        each: Verdict(False, each.info.telemetry.at, each.info.fault)
        if each.info.fault
        else _known(kept.get(_key(each)))
        for each in devices
    }


def _known(entry: object) -> Verdict:
    match entry:
        case {"usable": bool(usable), "checked_at": int() | float() as at, "reason": str(reason)}:
            return Verdict(usable, float(at), reason)
    return Verdict()


def probe(
    devices: Iterable[Device], *, limit_s: float = PROBE_LIMIT_S, home: Path | None = None
) -> dict[Device, Verdict]:
    """Does a small operation on each device, all at once, and keeps what came of it.

    A failure that may pass (memory full, device held by another) is told but not kept.
    """
    found: dict[Device, Verdict] = {}
    requests: dict[str, isolated.Request] = {}
    by_address: dict[str, Device] = {}
    for each in devices:
        if each.info.fault:
            found[each] = Verdict(False, time.time(), each.info.fault)
            continue
        by_address[each.address] = each
        requests[each.address] = isolated.Request(
            "probe",
            each.driver,
            json.dumps(wire.info_to_json(each.info)),
            each.info.isolation.environment,
        )
    keep: dict[str, dict[str, object]] = {}
    for address, answer in isolated.run(requests, limit_s).items():
        each = by_address[address]
        usable = answer.kind == "ok" and answer.value is True
        found[each] = Verdict(usable, time.time(), "" if usable else answer.reason)
        if answer.code not in _PASSING:
            keep[_key(each)] = {
                "usable": usable,
                "checked_at": found[each].checked_at,
                "reason": found[each].reason,
            }
    if keep:
        _keep(keep, (home or config.state_folder()) / FILE)
    return found


def _keep(entries: dict[str, dict[str, object]], path: Path) -> None:
    boot = config.boot_id()

    def change(known: dict[str, object]) -> dict[str, object]:
        return {key: value for key, value in known.items() if key.endswith(boot)} | entries

    try:
        config.change_json(path, change)
    except OSError:
        return  # A state folder that cannot be written costs the next caller a probe, no more.
