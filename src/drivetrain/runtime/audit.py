"""What a copy of a script does to files and sockets, seen through Python's audit events.

A copy that does not own the job must not cut a file that the owner is writing. So it is watched
until it owns the job: files opened for writing, deletions and binds are reported, and a
truncation of a file that the source process holds open is refused.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.runtime.agent import Agent

_LIMIT = 200
_DELETES = ("os.remove", "os.rmdir", "os.rename", "shutil.rmtree")
_QUIET = ("/dev/", "/proc/", "/sys/")
_ENTROPY = ((os, "urandom"), (random, "_urandom"))


def _held_open(pid: int, path: str | int) -> bool:
    """True when process ``pid`` has the file at ``path`` open."""
    try:
        wanted = os.stat(path)
        entries = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for entry in entries:
        try:
            found = os.stat(f"/proc/{pid}/fd/{entry}")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _named(path: Any, folder: Any) -> str:
    """The whole name of a path that a call was given, maybe relative to an open folder."""
    if isinstance(path, int):
        return os.path.realpath(f"/proc/self/fd/{path}")
    name = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        name = os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def _line_of(script: str, *, imports: bool = True) -> int:
    """The line of the user's script that is executing, 0 when none is.

    Without ``imports`` also 0 while it is importing something.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == script:
            return frame.f_lineno
        if not imports and name == "<frozen importlib._bootstrap>":
            return 0
        frame = frame.f_back
    return 0


def watch_files(agent: Agent) -> None:
    """Install the hook (it cannot be removed; it is idle once the copy owns the job)."""
    script = agent.spec["script"]
    told: set[tuple[str, str, int]] = set()
    thorough = bool(agent.options.get("watch"))
    private = (str(agent.directory), "/tmp/torchinductor_")

    def report(action: str, path: str, line: int) -> None:
        key = (action, path, line)
        if key in told or len(told) >= _LIMIT:
            return
        told.add(key)
        agent.event(
            "touched", action=action, path=path, line=line, role=agent.role, phase=agent.phase
        )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if agent.role == "owner" and not thorough:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if not writes or not isinstance(path, (str, bytes)):
                return
            name = os.path.abspath(os.fsdecode(path))
            if name.startswith(_QUIET) or name.startswith(private):
                return
            line = _line_of(script)
            if not line:
                return
            truncates = bool(flags & os.O_TRUNC)
            report("truncates" if truncates else "writes", name, line)
            waiting = agent.role != "owner" and agent.source_pid
            if truncates and waiting and _held_open(agent.source_pid, name):
                raise PermissionError(
                    f"{script}:{line} would truncate {name}, which the running copy of this job "
                    "holds open; open it in append mode, or only when run.owner is true"
                )
        elif event in _DELETES:
            name = _named(args[0], args[-1] if event != "os.rename" else args[2])
            if name.startswith(_QUIET) or name.startswith(private):
                return
            line = _line_of(script)
            if line:
                report("deletes", name, line)
        elif event == "socket.bind":
            line = _line_of(script)
            if line:
                report("binds", str(args[1]), line)

    sys.addaudithook(hook)


def watch_entropy(agent: Agent) -> None:
    """Report each line of the script that asks the system for randomness, seeded by nobody.

    For rehearsals only: it replaces the functions that Python's and numpy's generators draw from.
    """
    script = agent.spec["script"]
    told: set[int] = set()

    def reporting(draw: Callable[[int], bytes]) -> Callable[[int], bytes]:
        @functools.wraps(draw)
        def drawing(size: int) -> bytes:
            line = _line_of(script, imports=False)
            if line and line not in told and len(told) < _LIMIT:
                told.add(line)
                agent.event("told", kind="entropy", line=line, role=agent.role, phase=agent.phase)
            return draw(size)

        return drawing

    for module, name in _ENTROPY:
        setattr(module, name, reporting(getattr(module, name)))
