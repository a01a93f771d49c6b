"""The vendors' own counters of how a GPU is used, for those who ask for them with
``DRIVETRAIN_COUNTERS=1``: Intel's through Level Zero's metrics, AMD's through rocprofiler-sdk.

Both count on hardware that one program at a time may have, and want the compute runtime loaded. So
they are not read unless asked for, and are read in a child process, which takes `WINDOW_S` and then
lets go of the hardware. What the child cannot read, for whatever reason, is absent.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

from drivetrain.hal import isolated
from drivetrain.hal.telemetry import Telemetry

ASKED = "DRIVETRAIN_COUNTERS"
WINDOW_S = 0.05
"""How long the child counts."""
LIMIT_S = 1.5
"""Less than a reading of all sensors may take."""
_FRESH_S = 1.0
_AGAIN_S = 60.0
"""After a child that told nothing: whatever stood in its way mostly stays."""
_MOST = 64

Readings = tuple[tuple[str, float], ...]

_lock = threading.Lock()
_known: dict[str, tuple[float, Readings]] = {}
"""PCI address -> until when (monotonic seconds) the readings count."""


def added(now: Telemetry, vendor: str, pci: str) -> Telemetry:
    """``now`` with the counters of the vendor's GPU behind what it tells already."""
    if os.environ.get(ASKED, "") in ("", "0") or now.health.startswith("lost"):
        return now
    told = {name for name, _ in now.vendor_specific}
    more = tuple(each for each in _read(vendor, pci) if each[0] not in told)
    return replace(now, vendor_specific=now.vendor_specific + more)


def _read(vendor: str, pci: str) -> Readings:
    with _lock:
        now = time.monotonic()
        until, found = _known.get(pci, (0.0, ()))
        if now < until:
            return found
        if len(_known) > _MOST:
            _known.clear()
        _known[pci] = (now + 2 * LIMIT_S, found)  # who asks meanwhile gets those of before
    request = isolated.Request("counters", vendor, pci, {"ZET_ENABLE_METRICS": "1"})
    answer = isolated.run({"": request}, LIMIT_S)[""]
    found = _checked(answer.value) if answer.kind == "ok" else ()
    with _lock:
        _known[pci] = (time.monotonic() + (_FRESH_S if found else _AGAIN_S), found)
    return found


def _checked(answer: object) -> Readings:
    if not isinstance(answer, list):
        return ()
    return tuple(
        (str(each[0]), float(each[1]))
        for each in answer[:_MOST]
        if isinstance(each, list) and len(each) == 2 and isinstance(each[1], int | float)
    )


def in_child(vendor: str, pci: str) -> Readings:
    """The counters, read here: loads the vendor's runtime, which may hang or crash. Raises HalError
    where they cannot be read."""
    if vendor == "intel":
        from drivetrain.hal.telemetry.level_zero_metrics import read as read_intel

        return read_intel(pci)
    from drivetrain.hal.telemetry.rocprofiler import read as read_amd

    return read_amd(pci)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
