"""Durable writes: every write, fsync and rename that must survive a crash goes through here.

Faults for tests: ``DRIVETRAIN_FAULT_WRITE="enospc:NAME:N"`` (or ``eio:``) fails the N-th operation
called NAME in this process, ``N+`` that one and all later ones; ``ROLE@NAME`` limits it to the
processes with that ``DRIVETRAIN_ROLE``. Names are those given as ``name=`` by the callers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from drivetrain.errors import BadInput, DiskFull, StoreError
from drivetrain.store.crash import crash_point

Bytes = bytes | bytearray | memoryview

_FAULTS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
FULL = (errno.ENOSPC, errno.EDQUOT)
_IOV_MAX = 1024
_lock = threading.Lock()
_passes: Counter[tuple[str, str]] = Counter()


def _fault(name: str) -> int:
    """The errno to fail with here, or 0."""
    text = os.environ.get("DRIVETRAIN_FAULT_WRITE", "")
    if not text:
        return 0
    kind, _, rest = text.partition(":")
    target, _, count = rest.rpartition(":")
    role, at, target = target.rpartition("@")
    onwards = count.endswith("+")
    if kind not in _FAULTS or not target or not count.rstrip("+").isdigit():
        raise BadInput(
            f"DRIVETRAIN_FAULT_WRITE={text!r} is not 'enospc|eio:[role@]name:n[+]'; unset it"
        )
    if name != target or (at and role != os.environ.get("DRIVETRAIN_ROLE", "")):
        return 0
    with _lock:
        _passes[text, name] += 1
        seen = _passes[text, name]
    due = int(count.rstrip("+"))
    return _FAULTS[kind] if seen == due or (onwards and seen > due) else 0


def explain(error: OSError, what: str, path: Path | str) -> StoreError:
    """A StoreError that says what was being done, what happened and what to do."""
    if error.errno in FULL:
        return DiskFull(
            f"{what}: the disk (or quota) that holds {path} is full; free some space there, or "
            "set DRIVETRAIN_HOME to a folder on another disk. What was there before still counts"
        )
    return StoreError(f"{what} at {path} failed: {error.strerror} ({_name_of(error)})")


def _name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def write_at(fd: int, parts: Sequence[Bytes], offset: int, *, name: str) -> int:
    """Write all of ``parts`` one after the other from ``offset``; returns the number of bytes.

    Raises OSError, possibly after a part of it was written.
    """
    views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    total = sum(view.nbytes for view in views)
    fault = _fault(name)
    if fault:  # as a full disk does it: some of it arrives
        half = b"".join(views)[: total // 2]
        os.pwrite(fd, half, offset)
        raise OSError(fault, os.strerror(fault))
    done = 0
    while views:
        wrote = os.pwritev(fd, views[:_IOV_MAX], offset + done)
        done += wrote
        while views and wrote >= views[0].nbytes:
            wrote -= views[0].nbytes
            del views[0]
        if wrote:
            views[0] = views[0][wrote:]
    return total


def sync(fd: int, *, name: str) -> None:
    """fsync. Raises OSError; never try it again on the same file (pages are marked clean)."""
    fault = _fault(name)
    if fault:
        raise OSError(fault, os.strerror(fault))
    os.fsync(fd)


def sync_directory(path: Path, *, name: str) -> None:
    """fsync of a directory: makes creations, renames and removals in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd, name=name)
    finally:
        os.close(fd)


def write_durably(
    path: Path, parts: Iterable[Bytes], *, name: str = "files", mode: int = 0o600
) -> None:
    """Replace ``path`` by ``parts`` so that after any crash it is the old file or the new one.

    Temporary file, fsync, rename, directory fsync; the temporary file is removed on an error.
    Raises StoreError. Faults are called ``NAME.write``, ``NAME.sync``, ``NAME.dirsync``.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        fd = os.open(temporary, flags, mode)
        try:
            offset = 0
            for part in parts:
                offset += write_at(fd, [part], offset, name=f"{name}.write")
            crash_point("files.sync")
            sync(fd, name=f"{name}.sync")
        finally:
            os.close(fd)
        crash_point("files.rename")
        os.rename(temporary, path)
        crash_point("files.dirsync")
        sync_directory(path.parent, name=f"{name}.dirsync")
        crash_point("files.done")
    except OSError as error:
        raise explain(error, "Writing a file", path) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
