"""A compiler in a child process: a folder of its own, limits of time, memory and output.

Whatever it does (hang, crash, fill the disk, leave children behind), the caller has an answer when
the limit is over and goes on.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drivetrain.errors import BadInput, HalError

__all__ = ["Ended", "limit_s", "private_folder", "run"]

_LIMIT = "DRIVETRAIN_COMPILE_LIMIT_S"
_DEFAULT_LIMIT_S = 60.0
LARGEST_FILE = 256 << 20
"""Bytes of one file that a compiler writes."""
LARGEST_SPEECH = 1 << 20
"""Bytes that are read of what it prints."""
MOST_MEMORY = 16 << 30
"""Bytes of address space; compilers that reserve more than they use get more."""

_MARK = "DRIVETRAIN_COMPILE_MARK"
_MOST_ROUNDS = 1000
"""Of looking for what is left: a fork bomb makes new ones meanwhile."""

# The shell sets limits and becomes the compiler; its text is fixed, all else are arguments.
_LIMITED = (
    'ulimit -c 0; ulimit -f "$1" 2>/dev/null; '
    '[ "$2" = 0 ] || ulimit -v "$2" 2>/dev/null; shift 2; exec "$@"'
)


@dataclass(frozen=True)
class Ended:
    """How a compiler ended. ``status`` is negative for a signal, None at the time limit."""

    status: int | None
    out: str
    err: str
    limit_s: float

    @property
    def reason(self) -> str:
        """Why it did not end well; empty for exit code 0."""
        if self.status == 0:
            return ""
        if self.status is None:
            return (
                f"it did not end within {self.limit_s:g} s and was ended (set {_LIMIT} for more "
                "time)"
            )
        said = (self.err.strip() or self.out.strip()).splitlines()
        tail = f": {said[-1][:300]}" if said else ""
        if self.status > 0:
            return f"it ended with exit code {self.status}{tail}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = f"signal {-self.status}"
        return f"it crashed ({name}){tail}"


def limit_s() -> float:
    """Seconds that a compiler may take: 60, or ``DRIVETRAIN_COMPILE_LIMIT_S``."""
    text = os.environ.get(_LIMIT, "")
    if not text:
        return _DEFAULT_LIMIT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise BadInput(f"{_LIMIT}={text!r} is no number of seconds from 0 to 86400")
    return seconds


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only we can read; gone afterwards."""
    try:
        folder = tempfile.mkdtemp(prefix="drivetrain-compile-")
    except OSError as error:
        raise HalError(
            f"no temporary folder for the compiler: {error}; set TMPDIR to a folder with space",
            code="temporary_folder",
            op="compile",
        ) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    command: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] = {},
    memory: int = MOST_MEMORY,
    limit: float | None = None,
) -> Ended:
    """Run ``command`` in ``folder`` and wait; all it started is gone when this returns.

    ``memory`` is the most address space in bytes, 0 for no limit. Raises HalError when it cannot
    be started.
    """
    limit = limit_s() if limit is None else limit
    mark = f"{_MARK}={secrets.token_hex(16)}"
    limited = ["/bin/sh", "-c", _LIMITED, "sh", str(LARGEST_FILE // 512), str(memory // 1024)]
    out, err = folder / "said.out", folder / "said.err"
    deadline = time.monotonic() + limit
    with open(out, "wb") as out_file, open(err, "wb") as err_file:
        try:
            process = subprocess.Popen(
                [*limited, *command],
                cwd=folder,
                env={
                    **os.environ,
                    "TMPDIR": str(folder),
                    "LC_ALL": "C",
                    _MARK: mark.partition("=")[2],
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
        except OSError as error:
            raise HalError(
                f"{command[0]} cannot be started: {error}", code="compiler", op="compile"
            ) from error
    status: int | None = None
    try:
        try:
            # Not reaped yet: its number must still mean its group when that is ended.
            status = _waited(process, deadline)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            process.wait()
            _end_strays(mark.encode())
    finally:
        said, complained = _tail(out), _tail(err)
    return Ended(status, said, complained, limit)


def _waited(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Exit code, negative signal, or None at the deadline; leaves the process unreaped."""
    pause = 0.001
    while True:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 0.05)


def _end_strays(mark: bytes) -> None:
    """End what left the compiler's group and runs on: it still has the mark in its environment."""
    for _ in range(_MOST_ROUNDS):
        found = [pid for pid in _processes() if _ended(pid, mark)]
        if not found:
            return


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return []  # another system than Linux


def _ended(pid: int, mark: bytes) -> bool:
    """Whether a process was one of the compiler's, and was sent away."""
    try:
        handle = os.pidfd_open(pid)  # from here on the number cannot come to mean another
    except (OSError, AttributeError):
        return False
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if mark not in file.read().split(b"\0"):
                return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return False  # it ended, or is somebody else's
    finally:
        os.close(handle)
    return True


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LARGEST_SPEECH))
            return file.read(LARGEST_SPEECH).decode(errors="replace")
    except OSError:
        return ""
