"""The process in which checks run: a driver may crash or hang it.

``python -m drivetrain.hal.conformance.child ADDRESS CHECK...`` writes a line of JSON when a check
begins and another when it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, NoReturn

from drivetrain import hal
from drivetrain.errors import Unsupported
from drivetrain.hal.child import own_output, settle
from drivetrain.hal.conformance.check import (
    CHECKED_ADDRESSES,
    INJECTION,
    OWN_MEMORY,
    TWO_DEVICES,
    Check,
    Failed,
    checks,
)
from drivetrain.hal.opened import close_all, opened

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NOT_DECLARED, NOT_HERE = "not declared", "not here"
_LONGEST_REASON = 2000


def missing(check: Check, device: hal.Device) -> tuple[str, str]:
    """(``not declared`` or ``not here``, why) for a check that cannot run on the device; ("", "")
    for one that can."""
    backend = opened(device).backend
    if INJECTION in check.needs and not hasattr(backend, "inject"):
        return NOT_DECLARED, "the backend has no inject()"
    if CHECKED_ADDRESSES in check.needs and not getattr(backend, "checks_addresses", False):
        return NOT_DECLARED, "the backend does not check addresses"
    if OWN_MEMORY in check.needs and device.info.memory_domain:
        return NOT_DECLARED, "its memory is not its own: others take and free it meanwhile"
    groups = check.needs - {INJECTION, CHECKED_ADDRESSES, OWN_MEMORY, TWO_DEVICES}
    absent = sorted(groups - backend.groups)
    if absent:
        return NOT_DECLARED, f"no {', '.join(absent)}"
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


def main(arguments: list[str]) -> NoReturn:
    address, *names = arguments
    pipe = own_output()
    settle()

    def say(line: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(line).encode() + b"\n")

    known = {check.name: check for check in checks()}
    device = hal.device(address)
    for name in names:
        say({"begin": name})
        began = time.perf_counter()
        state, reason = outcome(known[name], device)
        seconds = round(time.perf_counter() - began, 3)
        say({"end": name, "state": state, "reason": reason[:_LONGEST_REASON], "seconds": seconds})
    say({"begin": "close"})
    close_all()
    say({"end": "close", "state": PASSED, "reason": "", "seconds": 0.0})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
