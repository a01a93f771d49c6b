"""Waiting for what can only be asked for."""

from __future__ import annotations

import time
from collections.abc import Callable

_SPIN_S = 100e-6
_LONGEST_SLEEP_S = 1e-3


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Ask until it is so: at once for short work, then with sleeps of an eighth of the time waited
    so far, 1 ms at most. False when ``timeout_s`` passed."""
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited >= timeout_s:
            return False
        if waited > _SPIN_S:
            time.sleep(min(waited / 8, _LONGEST_SLEEP_S, timeout_s - waited))
    return True
