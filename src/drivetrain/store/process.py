"""Which process: a pid alone may be somebody else's by now; with start time and boot id it is not.

Processes are looked up in the caller's own pid namespace.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from drivetrain.errors import StoreError


@cache
def boot_id() -> str:
    """This boot of the machine; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """The state letter and start time (clock ticks since boot) of a process, None if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name in parentheses may hold anything
    return fields[0].decode(), int(fields[19])


@dataclass(frozen=True)
class ProcessId:
    """One process for all time: pid, start time in clock ticks since boot, and the boot's id."""

    pid: int
    start_time: int
    boot_id: str

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessId:
        """The process that has ``pid`` now (default: this one). Raises ProcessLookupError."""
        number = os.getpid() if pid is None else pid
        found = _state_and_start(number)
        if found is None:
            raise ProcessLookupError(f"There is no process {number}")
        return cls(number, found[1], boot_id())

    @property
    def alive(self) -> bool:
        """It runs (or is stopped) now; a zombie does not."""
        if self.boot_id != boot_id():
            return False
        found = _state_and_start(self.pid)
        return found is not None and found[1] == self.start_time and found[0] not in "ZXx"

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "start_time": self.start_time, "boot_id": self.boot_id}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProcessId:
        try:
            return cls(int(value["pid"]), int(value["start_time"]), str(value["boot_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"Not a process id: {value!r}") from error

    def pidfd(self) -> int:
        """A new pidfd (readable once the process ended); the caller closes it.

        Raises ProcessLookupError when the process is gone, also if its pid was reused.
        """
        if self.boot_id != boot_id():
            raise ProcessLookupError(f"Process {self.pid} was of an earlier boot")
        fd = os.pidfd_open(self.pid)
        found = _state_and_start(self.pid)  # after opening: the descriptor pins what we look at
        if found is None or found[1] != self.start_time:
            os.close(fd)
            raise ProcessLookupError(f"Process {self.pid} is gone; its pid was reused")
        return fd

    def kill(self, sig: int = signal.SIGKILL) -> bool:
        """Send a signal to exactly this process; false if it is gone already."""
        try:
            fd = self.pidfd()
        except ProcessLookupError:
            return False
        try:
            signal.pidfd_send_signal(fd, sig)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True
