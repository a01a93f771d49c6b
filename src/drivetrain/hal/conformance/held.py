"""What a process and its device hold: memory and handles, so that a leak shows."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.hal.conformance.check import Failed
from drivetrain.hal.conformance.work import backend

if TYPE_CHECKING:
    from drivetrain.hal.device import Device

CYCLES = 1000
_WARM = 400  # more than the core keeps for later
_TRIES = 3


class _Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@cache
def _mallinfo() -> Callable[[], Any] | None:
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None  # another C library, or one from before 2021
    found.restype, found.argtypes = _Heap, ()
    return found


def _slack(cycles: int, heap_bytes: int) -> dict[str, int]:
    """What each may grow by: caches of the system and the vendor's library breathe."""
    return {
        "resident bytes": 6 << 20,
        "bytes of the C heap": (64 << 10) + heap_bytes * cycles,
        "Python objects": 500 + cycles // 100,
        "open files": 4,
        "threads": 4,
        "bytes of the device": 1 << 20,
        "handles of the driver": 8,
    }


def held(device: Device) -> dict[str, int]:
    """What is held now, as far as the system and the driver tell."""
    found = {"Python objects": sys.getallocatedblocks()}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["resident bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["open files"] = len(os.listdir("/proc/self/fd"))
        found["threads"] = len(os.listdir("/proc/self/task"))
    except (OSError, ValueError, IndexError):
        pass  # a system without /proc
    mallinfo = _mallinfo()
    if mallinfo is not None:
        heap = mallinfo()
        found["bytes of the C heap"] = heap.uordblks + heap.hblkhd
    driver: Any = backend(device)
    if not device.info.memory_domain:
        free, total = driver.memory()
        found["bytes of the device"] = total - free
    if hasattr(driver, "handles"):
        found["handles of the driver"] = sum(driver.handles().values())
    return found


def flat(
    device: Device,
    what: str,
    cycle: Callable[[], None],
    cycles: int = CYCLES,
    *,
    warm: int = _WARM,
    heap_bytes: int = 4,
) -> None:
    """Raises Failed when something grows with each of a few rounds of ``cycles``. ``heap_bytes``
    of the C heap a cycle are forgiven."""
    for _ in range(warm):
        cycle()
    slack = _slack(cycles, heap_bytes)
    grown: dict[str, int] = {}
    for _ in range(_TRIES):
        device.synchronize()
        gc.collect()
        before = held(device)
        for _ in range(cycles):
            cycle()
        device.synchronize()
        gc.collect()
        after = held(device)
        more = {name: after[name] - before[name] for name in before if name in after}
        more = {name: count for name, count in more.items() if count > slack[name]}
        grown = {name: count for name, count in more.items() if not grown or name in grown}
        if not grown:
            return
    told = " and ".join(f"{count} {name}" for name, count in grown.items())
    raise Failed(f"{cycles} cycles of {what} took {told}, again and again")
