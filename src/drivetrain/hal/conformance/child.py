"""The process in which checks run: a driver may crash or hang it.

``python -m drivetrain.hal.conformance.child ADDRESS`` reads names of checks, one a line, and writes
a line of JSON when a check begins and another when it ends. At the end of its input it closes the
device and says so.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from typing import Any, NoReturn

from drivetrain import hal
from drivetrain.errors import Unsupported
from drivetrain.hal import loading
from drivetrain.hal.child import own_output, settle
from drivetrain.hal.conformance.check import (
    CHECKED_ADDRESSES,
    INJECTION,
    NOT_OPENED,
    OWN_MEMORY,
    TWO_DEVICES,
    Check,
    Failed,
    checks,
)
from drivetrain.hal.conformance.report import (
    FAILED,
    NOT_DECLARED,
    NOT_HERE,
    PASSED,
    SKIPPED,
)
from drivetrain.hal.opened import close_all, opened

_LONGEST_REASON = 2000


def missing(check: Check, device: hal.Device) -> tuple[str, str]:
    """(``not declared`` or ``not here``, why) for a check that cannot run on the device; ("", "")
    for one that can."""
    if NOT_OPENED in check.needs:
        return "", ""
    if loading.load(device.driver).open is None:
        return NOT_DECLARED, "the driver opens no devices: it serves PyTorch only"
    backend = opened(device).backend
    if INJECTION in check.needs and not hasattr(backend, "inject"):
        return NOT_DECLARED, "the backend has no inject()"
    if CHECKED_ADDRESSES in check.needs and not getattr(backend, "checks_addresses", False):
        return NOT_DECLARED, "the backend does not check addresses"
    if OWN_MEMORY in check.needs and device.info.memory_domain:
        return NOT_DECLARED, "its memory is not its own: others take and free it meanwhile"
    absent = sorted(check.groups - backend.groups)
    if absent:
        return NOT_DECLARED, f"no {', '.join(absent)}"
    if "compute" in check.groups and "binary_only" in backend.target.features:
        return NOT_HERE, "the kit's kernels are CUDA C, and this device takes binaries only"
    if TWO_DEVICES in check.needs and len(hal.devices(device.driver)) < 2:
        return NOT_HERE, f"this machine has one device of driver {device.driver}"
    return "", ""


def outcome(check: Check, device: hal.Device) -> tuple[str, str]:
    """(state, reason) of one check, run here."""
    try:
        state, reason = missing(check, device)
        if state:
            return state, reason
        check.function(device)
    except Failed as error:
        return FAILED, str(error)
    except Unsupported as error:
        return SKIPPED, str(error)
    except Exception as error:  # whatever a driver raises is what came of its check
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
        return FAILED, f"{type(error).__name__}: {error} ({where})"
    return PASSED, ""


def groups_of(device: hal.Device) -> list[str] | None:
    """What the open device declares; None when it does not open."""
    try:
        if loading.load(device.driver).open is None:
            return []
        return sorted(opened(device).backend.groups)
    except Exception:  # it is the result of every check that wants the device open
        return None


def main(arguments: list[str]) -> NoReturn:
    (address,) = arguments
    pipe = own_output()
    settle()
    faulthandler.enable()

    def say(line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    known = {check.name: check for check in checks()}
    device = hal.device(address)
    version = loading.load(device.driver).api_version
    groups: list[str] | None = None
    for line in sys.stdin:
        name = line.strip()
        say({"begin": name})
        faulthandler.dump_traceback_later(known[name].limit_s * 0.95)  # where it hangs, if it does
        began = time.perf_counter()
        state, reason = outcome(known[name], device)
        seconds = round(time.perf_counter() - began, 3)
        if groups is None and NOT_OPENED not in known[name].needs:
            groups = groups_of(device)
        faulthandler.cancel_dump_traceback_later()
        said = {"state": state, "reason": reason[:_LONGEST_REASON], "seconds": seconds}
        say({"end": name, **said, "groups": groups, "api_version": version})
    say({"begin": "close"})
    close_all()
    say({"end": "close"})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
