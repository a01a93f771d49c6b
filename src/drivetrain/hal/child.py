"""The process in which a driver may hang or crash.

``python -m drivetrain.hal.child ACTION DRIVER [FACTS]``. Actions: ``discover``, ``examine``;
``telemetry`` and ``probe`` with a device's facts as JSON; ``counters`` with a vendor for the driver
and a PCI address.
It writes one line of JSON to standard output: ``{"ok": ...}`` or
``{"missing" | "failed": message, "code": word}``, with ``"install"``, what to install, behind
``"missing"``. What a vendor's library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.driver import API_VERSION, OLDEST_API_VERSION, Driver
from drivetrain.hal.loading import load
from drivetrain.hal.wire import info_from_json, info_to_json

FAULTS = "DRIVETRAIN_FAULT_DISCOVERY"


def own_output() -> int:
    """The parent's pipe; whatever else writes to standard output now writes to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


_PR_SET_PDEATHSIG = 1


def settle() -> None:
    """No core file when a library crashes, and no life after the parent's."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _inject(name: str, pipe: int) -> None:
    """Faults for tests: ``cuda=hang,other=abort``. Honoured nowhere but in this process."""
    for part in os.environ.get(FAULTS, "").split(","):
        driver, _, fault = part.strip().partition("=")
        if driver != name or not fault:
            continue
        if fault == "hang":
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        elif fault == "abort":
            os.abort()
        elif fault == "missing":
            raise DriverMissing(f"fault injected: {name}'s library is missing", driver=name)
        elif fault == "garbage":
            os.write(pipe, b'\xff\x00{"ok": [{"driver": 7}]\n')
            os._exit(0)
        elif fault == "wrong":
            os.write(pipe, b'{"ok": [{"driver": 7}]}\n')
            os._exit(0)
        elif fault == "flood":
            while True:
                os.write(pipe, b"x" * 65536)
        elif fault == "silent":
            os._exit(0)
        elif fault == "orphan":
            if os.fork() == 0:  # holds the pipe open after its parent's death
                time.sleep(3600)
            os._exit(3)
        elif fault == "raise":
            raise RuntimeError("fault injected: an exception that no driver may raise")


def _act(action: str, driver: Driver, facts: str) -> Any:
    if not OLDEST_API_VERSION <= driver.api_version <= API_VERSION:
        raise HalError(
            f"driver {driver.name} speaks version {driver.api_version} of the driver interface; "
            f"this Drivetrain takes {OLDEST_API_VERSION} to {API_VERSION}: install one that fits",
            code="api_version",
            driver=driver.name,
        )
    if action == "discover":
        reason = driver.absent()
        if reason:
            raise DriverMissing(reason, code="absent", driver=driver.name)
        groups = tuple(sorted(driver.groups))
        return [
            info_to_json(replace(i, capabilities=replace(i.capabilities, groups=groups)))
            for i in driver.discover()
        ]
    if action == "examine":
        return [str(each) for each in driver.examine()] if driver.examine is not None else []
    info = info_from_json(json.loads(facts))
    if action == "telemetry":
        return driver.telemetry(info).as_json()
    if action == "probe":
        driver.probe(info)
        return True
    raise SystemExit(f"unknown action {action!r}")


def main(arguments: list[str]) -> NoReturn:
    action, name, *rest = arguments
    pipe = own_output()
    settle()
    answer: dict[str, Any]
    install = ""
    try:
        _inject(name, pipe)
        if action == "counters":
            from drivetrain.hal.telemetry import counters

            answer = {"ok": counters.in_child(name, *rest)}
        else:
            driver = load(name)
            install = driver.install
            answer = {"ok": _act(action, driver, rest[0] if rest else "")}
    except DriverMissing as error:
        answer = {"missing": str(error), "code": error.code, "install": str(install)}
    except HalError as error:
        answer = {"failed": str(error), "code": error.code}
    except Exception as error:  # The border of the process: a driver's bug is its reason.
        answer = {"failed": f"{type(error).__name__}: {error}", "code": "exception"}
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]
    # Vendors' libraries may hang or crash in their exit handlers; the answer is already out.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
