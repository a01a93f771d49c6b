"""Run checks on a device and say what came of each: each topic in a process of its own."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from drivetrain import __version__, hal
from drivetrain.errors import BadInput
from drivetrain.hal import registry
from drivetrain.hal.conformance.check import TOPICS, Check, checks
from drivetrain.hal.conformance.process import Process
from drivetrain.hal.conformance.report import (
    EMULATED,
    FAILED,
    FAKE,
    HARDWARE,
    NONE,
    Report,
    Result,
)
from drivetrain.hal.device import Device

SIMULATED = "count=2 bandwidth_gbps=4"
"""The simulated devices that checks use as the other driver's, where none were asked for."""
_SECOND: Mapping[str, Mapping[str, str]] = {"cpu": {"DRIVETRAIN_CPU_PARTITIONS": "2"}}
"""How a driver comes to a second device for the topic ``peer``."""


class Examination:
    """Checks of one device, as they are asked for: each topic in a process of its own, anew after
    a failure, so that one check's ruins are not another's ground."""

    def __init__(self, address: str, environment: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._environment = dict(environment or {})
        self._process: Process | None = None
        self._topic = ""
        self.groups: tuple[str, ...] = ()
        self.api_version = 0

    def of(self, check: Check) -> Result:
        """What came of one check. Ask for the checks of one topic together: it saves processes."""
        if self._process is not None and (self._process.ended or self._topic != check.topic):
            self.close()
        if self._process is None:
            driver = self.address.partition(":")[0]
            more = _SECOND.get(driver, {}) if check.topic == "peer" else {}
            environment = {"DRIVETRAIN_SIMULATED": SIMULATED, **os.environ, **more}
            self._process = Process(self.address, {**environment, **self._environment})
            self._topic = check.topic
        result = self._process.result(check)
        self.groups = self._process.groups or self.groups
        self.api_version = self._process.api_version or self.api_version
        if result.state == FAILED:
            self._process.end()
        return result

    def close(self) -> str:
        """End the process, if there is one; what was wrong with closing its device, or ``""``."""
        process, self._process = self._process, None
        return process.close() if process is not None else ""

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.end()


def evidence_of(device: Device) -> str:
    """What a passed check of this device shows: see "evidence" in docs/architecture.md."""
    if device.driver == "simulated":
        return NONE
    if "fake" in device.capabilities.features:
        return FAKE
    if device.driver in ("opencl", "sycl", "hip", "level_zero") and not device.info.pci:
        return EMULATED  # someone else's implementation on a CPU; a GPU has a PCI address
    if device.driver == "cuda" and os.environ.get("DRIVETRAIN_CUDA_LIBRARY"):
        return EMULATED  # somebody else's implementation, whatever card it shows
    return HARDWARE


def target(driver: str, address: str = "") -> Device:
    """The device to check: the driver's first, or the one at ``address``. Raises BadInput."""
    if driver == "simulated":
        os.environ.setdefault("DRIVETRAIN_SIMULATED", SIMULATED)
        registry.refresh()
    if address:
        device = hal.device(address)
        if device.driver != driver:
            raise BadInput(f"{address} is a device of driver {device.driver}, not of {driver}")
        return device
    states = registry.drivers()
    if driver not in states:
        raise BadInput(f"there is no driver {driver!r}; there are {', '.join(states)}")
    found = hal.devices(driver, all_routes=True)
    if not found:
        state = states[driver]
        raise BadInput(
            f"there is no device of driver {driver} to check; it is {state.state}: {state.reason}"
        )
    return found[0]


def chosen(only: Sequence[str] = (), *, long: bool = False) -> tuple[Check, ...]:
    """The checks of these names and topics, or all; the long ones with ``long``, or by name.
    Raises BadInput for a name that there is not."""
    known = {check.name for check in checks()} | set(TOPICS)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise BadInput(f"there is no check or topic {', '.join(unknown)}; --list tells all of them")
    return tuple(
        check
        for check in checks()
        if check.name in only or ((long or not check.long) and (not only or check.topic in only))
    )


def run(
    device: Device,
    *,
    long: bool = False,
    only: Sequence[str] = (),
    tell: Callable[[Result], None] = lambda result: None,
    starts: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Run all checks (or those of the names and topics in ``only``) on a device. ``starts`` hears
    of each before it runs, ``tell`` once it ended."""
    began = time.monotonic()
    todo = chosen(only, long=long)
    results: list[Result] = []
    with Examination(device.address) as examination:
        for at, check in enumerate(todo):
            starts(check)
            result = examination.of(check)
            if at + 1 == len(todo) or todo[at + 1].topic != check.topic:
                complaint = examination.close()
                if complaint:
                    result = replace(result, state=FAILED, reason=f"after it, {complaint}")
            results.append(result)
            tell(result)
    return Report(
        driver=device.driver,
        device=device.address,
        name=device.name,
        vendor=device.vendor,
        driver_version=device.info.driver_version,
        api_version=examination.api_version,
        groups=examination.groups,
        evidence=evidence_of(device),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        seconds=round(time.monotonic() - began, 1),
        whole=not only,
        long=long,
        machine=machine(),
        results=tuple(results),
    )


def machine() -> dict[str, str]:
    """Where a report was made."""
    cpu = next((d.name for d in hal.devices("cpu")), platform.machine())
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": cpu,
        "python": platform.python_version(),
        "drivetrain": __version__,
    }


__all__ = ["Examination", "chosen", "evidence_of", "machine", "run", "target"]
