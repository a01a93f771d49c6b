"""Run checks, each topic in a child process of its own, and say what came of each."""

from __future__ import annotations

import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import registry
from drivetrain.hal.conformance.check import Check, checks
from drivetrain.hal.conformance.child import FAILED, NOT_DECLARED, NOT_HERE, PASSED, SKIPPED
from drivetrain.hal.device import Device
from drivetrain.hal.isolated import python_path

_START_S = 60.0
_CLOSE_S = 20.0
_LARGEST_COMPLAINT = 4000
SIMULATED = "count=2 bandwidth_gbps=4"
"""The simulated devices that checks use as the other driver's, where none were asked for."""
_SECOND: Mapping[str, Mapping[str, str]] = {"cpu": {"DRIVETRAIN_CPU_PARTITIONS": "2"}}
"""How a driver comes to a second device for the topic ``peer``."""

EMULATED, HARDWARE, NONE = "emulated", "hardware", ""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    state: str
    """``passed``, ``failed``, ``skipped`` (Unsupported, or no compiler), ``not declared`` or
    ``not here`` (it needs a second device)."""
    reason: str
    seconds: float
    proves: str
    needs: tuple[str, ...]

    @property
    def topic(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Report:
    """What came of all of them, on one device."""

    driver: str
    device: str
    name: str
    vendor: str
    driver_version: str
    groups: tuple[str, ...]
    evidence: str
    """``hardware`` or ``emulated``; empty for a simulated device, which shows nothing."""
    date: str
    machine: dict[str, str] = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    def of(self, state: str) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.state == state)

    @property
    def unshown(self) -> tuple[str, ...]:
        """Groups that the device declares and whose checks were all skipped."""
        found = []
        for group in self.groups:
            states = {r.state for r in self.results if group in r.needs}
            if SKIPPED in states and not states & {PASSED, FAILED}:
                found.append(group)
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether all that the driver declares was shown."""
        return not self.of(FAILED) and not self.unshown and bool(self.of(PASSED))

    def as_json(self) -> dict[str, Any]:
        return {
            "driver": self.driver,
            "device": self.device,
            "name": self.name,
            "vendor": self.vendor,
            "driver_version": self.driver_version,
            "groups": list(self.groups),
            "evidence": self.evidence,
            "date": self.date,
            "machine": self.machine,
            "passed": self.passed,
            "unshown": list(self.unshown),
            "results": [
                {
                    "name": r.name,
                    "state": r.state,
                    "reason": r.reason,
                    "seconds": r.seconds,
                    "proves": r.proves,
                    "needs": list(r.needs),
                }
                for r in self.results
            ],
        }


def evidence_of(device: Device) -> str:
    """What a passed check of this device shows: see "evidence" in docs/architecture.md."""
    if device.driver == "simulated":
        return NONE
    if device.driver in ("opencl", "sycl") and not device.info.pci:
        return EMULATED  # someone else's implementation on a CPU; a GPU has a PCI address
    return HARDWARE


def target(driver: str, address: str = "") -> Device:
    """The device to check: the driver's first, or the one at ``address``. Raises BadInput."""
    if driver == "simulated":
        os.environ.setdefault("DRIVETRAIN_SIMULATED", SIMULATED)
    if address:
        device = hal.device(address)
        if device.driver != driver:
            raise BadInput(f"{address} is a device of driver {device.driver}, not of {driver}")
        return device
    found = hal.devices(driver)
    if not found:
        state = registry.drivers().get(driver)
        why = f" is {state.state}: {state.reason}" if state else " has none"
        raise BadInput(f"there is no device of driver {driver} to check; it{why}")
    return found[0]


def run(
    device: Device,
    *,
    long: bool = False,
    only: Sequence[str] = (),
    tell: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Run all checks (or those named) on a device; ``tell`` hears of each as it ends."""
    chosen = [c for c in checks() if (c.name in only) or (not only and (long or not c.long))]
    unknown = set(only) - {c.name for c in chosen}
    if unknown:
        raise BadInput(f"there is no check {', '.join(sorted(unknown))}")
    results: list[Result] = []
    for topic, group in groupby(chosen, key=lambda c: c.topic):
        more = dict(_SECOND.get(device.driver, {})) if topic == "peer" else {}
        left = list(group)
        while left:
            ended = _child(device, left, more, results, tell)
            left = left[ended:]
    groups = {n for r in results if r.state != NOT_DECLARED for n in r.needs}
    return Report(
        driver=device.driver,
        device=device.address,
        name=device.name,
        vendor=device.vendor,
        driver_version=device.info.driver_version,
        groups=tuple(sorted(groups & set(_all_groups()))),
        evidence=evidence_of(device),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=_machine(),
        results=tuple(results),
    )


def _all_groups() -> tuple[str, ...]:
    from drivetrain.hal.driver import GROUPS

    return tuple(GROUPS)


def _machine() -> dict[str, str]:
    from drivetrain import __version__

    cpu = next((d.name for d in hal.devices("cpu")), platform.machine())
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": cpu,
        "python": platform.python_version(),
        "drivetrain": __version__,
    }


def _child(
    device: Device,
    todo: Sequence[Check],
    environment: Mapping[str, str],
    results: list[Result],
    tell: Callable[[Result], None],
) -> int:
    """Run checks in one child until they are through, or one of them ends or stops it; how many
    have a result now."""
    variables = {
        "DRIVETRAIN_SIMULATED": SIMULATED,
        **os.environ,
        **environment,
        "PYTHONPATH": python_path(),
    }
    command = [sys.executable, "-P", "-m", "drivetrain.hal.conformance.child", device.address]
    process = subprocess.Popen(
        [*command, *(check.name for check in todo)],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    ended = 0
    at = -1  # the check that is running; -1 before the first, len(todo) at the end
    said, lines = bytearray(), bytearray()
    until = time.monotonic() + _START_S
    began = time.monotonic()
    stopped = ""

    def note(state: str, reason: str, seconds: float) -> None:
        nonlocal ended
        check = todo[ended]
        needs = tuple(sorted(check.needs))
        results.append(Result(check.name, state, reason, seconds, check.proves, needs))
        tell(results[-1])
        ended += 1

    try:
        with selectors.DefaultSelector() as selector:
            assert process.stdout is not None
            assert process.stderr is not None
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while process.stdout in selector.get_map():
                left = until - time.monotonic()
                if left <= 0:
                    stopped = f"it did not end within {until - began:.0f} s"
                    break
                for key, _ in selector.select(min(left, 1.0)):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        said = (said + chunk)[-_LARGEST_COMPLAINT:]
                    else:
                        lines += chunk
                while b"\n" in lines:
                    line, _, rest = bytes(lines).partition(b"\n")
                    lines = bytearray(rest)
                    word = json.loads(line)
                    if "begin" in word:
                        at = ended if ended < len(todo) else len(todo)
                        limit = todo[at].limit_s if at < len(todo) else _CLOSE_S
                        began = time.monotonic()
                        until = began + limit
                    elif word["end"] != "close":
                        note(word["state"], word["reason"], word["seconds"])
                    else:
                        at = len(todo) + 1
    finally:
        _end(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if at > len(todo):
        return ended
    code = process.returncode
    how = stopped or _how(code)
    words = said.decode(errors="replace").strip().splitlines()
    reason = f"{how}: {words[-1][:300]}" if words else how
    if ended < len(todo):
        note(FAILED, reason, round(time.monotonic() - began, 3))
    elif ended:  # every check ended; closing the device did not
        last = results.pop()
        told = f"after it, closing the device failed: {reason}"
        results.append(Result(last.name, FAILED, told, last.seconds, last.proves, last.needs))
        tell(results[-1])
    return ended


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"its process was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"its process was ended by signal {-code}"
    return f"its process ended with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The child and what it started are gone when this returns."""
    if process.poll() is None:
        try:
            process.wait(1.0 if process.stdout is None else 0.5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


__all__ = [
    "FAILED",
    "NOT_DECLARED",
    "NOT_HERE",
    "PASSED",
    "SKIPPED",
    "Report",
    "Result",
    "evidence_of",
    "run",
    "target",
]
