"""Waiting for what can only be asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_SPIN_S = 16e-3
"""So long a wait costs no more than the work took; the vendors' own waits spin to their end."""
_SHARE = 64
_LONGEST_SLEEP_S = 1e-3


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Ask until it is so: at once for short work, giving way to other threads, then with sleeps of
    a 64th of the time waited so far, 1 ms at most. False when ``timeout_s`` passed."""
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited >= timeout_s:
            return False
        if waited <= _SPIN_S:
            os.sched_yield()
        else:
            time.sleep(min(waited / _SHARE, _LONGEST_SLEEP_S, timeout_s - waited))
    return True
