"""The state folder: where journals, checkpoints, the database and sockets live.

``DRIVETRAIN_HOME`` or the platform's state folder. Locks, shared mappings and fsync must mean what
they say there, so it has to be a local file system; a default folder that is not falls back to
a private one, said once, while an explicit one is refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import secrets
import stat
import sys
import tempfile
from pathlib import Path

import platformdirs
import xxhash

from drivetrain.errors import BadInput, StoreError
from drivetrain.store.crash import crash_point
from drivetrain.store.files import FULL

# f_type of statfs(2), from linux/magic.h and the file systems' own headers
_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x564C: "NCP",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x01021997: "9P",
    0x65735546: "FUSE",
    0x19830326: "BeeGFS",
    0xAAD7AAEA: "PanFS",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x20030528: "OrangeFS",
}
_SOCKET_PATH_MAX = 107  # sun_path holds 108 bytes, one of them the final zero
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_known: dict[tuple[object, ...], Path] = {}


class _Unfit(Exception):
    """A folder cannot be the state folder, with the reason."""


def network_file_system(path: Path) -> str | None:
    """The name of the network (or FUSE) file system that holds ``path``; None if it is local."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_ulong * 64)()  # larger than any struct statfs; f_type comes first
    if libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise _Unfit(f"statfs failed: {os.strerror(code)}")
    return _NETWORK.get(buffer[0] & 0xFFFFFFFF)


def _claim(path: Path) -> None:
    """Make it a directory of ours that nobody else can write to; raises _Unfit."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
        if facts.st_uid != os.geteuid():
            raise _Unfit(f"it belongs to user {facts.st_uid}, not to you ({os.geteuid()})")
        if facts.st_mode & 0o022:
            if any(path.iterdir()):
                raise _Unfit(f"others can write to it; run: chmod go-w {path}")
            path.chmod(0o700)
    except OSError as error:
        raise _Unfit(error.strerror or str(error)) from error


def _probe(path: Path) -> None:
    """Create, sync, lock and map a file there; raises _Unfit with what does not work.

    A full disk is no reason against a folder: what is in it can be read, its jobs can be stopped,
    and what cannot be written says so itself.
    """
    doing = "creating a file"
    probe = path / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        for old in path.glob(".probe-*"):  # left by a process that was killed just here
            if not _may_be_alive(old.name.split("-")[1]):
                old.unlink(missing_ok=True)
        fd = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            crash_point("home.probe")
            os.unlink(probe)
            doing = "writing and fsync"
            os.write(fd, b"\0" * 4096)
            os.fsync(fd)
            doing = "locking (flock)"
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doing = "mapping (mmap)"
            with mmap.mmap(fd, 4096) as mapping:
                mapping[0] = 1
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in FULL:
            raise _Unfit(f"{doing} does not work there: {error.strerror}") from error


def _may_be_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        pass
    return True


def _check(path: Path, *, override: str | None = None) -> None:
    _claim(path)
    kind = _NETWORK.get(int(override, 0)) if override else network_file_system(path)
    if kind is not None:
        raise _Unfit(
            f"it is on a network file system ({kind}), where locks and crash safety do not hold"
        )
    _probe(path)


def home() -> Path:
    """The state folder, created 0700 and checked once per process.

    Raises BadInput when ``DRIVETRAIN_HOME`` names a folder that cannot be it, StoreError when
    neither the default nor a private fallback folder can.
    """
    explicit = os.environ.get("DRIVETRAIN_HOME")
    surroundings = (
        "XDG_STATE_HOME",
        "XDG_RUNTIME_DIR",
        "HOME",
        "TMPDIR",
        "DRIVETRAIN_FAULT_STATFS",
    )
    key = (explicit, os.geteuid(), *map(os.environ.get, surroundings))
    found = _known.get(key)
    if found is None or not found.is_dir():
        found = _explicit(explicit) if explicit else _default()
        _known[key] = found
    return found


def _explicit(text: str) -> Path:
    path = Path(os.path.abspath(Path(text).expanduser()))
    try:
        _check(path, override=os.environ.get("DRIVETRAIN_FAULT_STATFS"))
    except _Unfit as unfit:
        raise BadInput(
            f"DRIVETRAIN_HOME={text} cannot hold Drivetrain's state: {unfit}. "
            "Set it to a folder of yours on a local disk, or unset it"
        ) from None
    return path


def _default() -> Path:
    path = Path(platformdirs.user_state_path("drivetrain"))
    try:
        _check(path, override=os.environ.get("DRIVETRAIN_FAULT_STATFS"))
        return path
    except _Unfit as unfit:
        reason = str(unfit)
    tried = [f"{path}: {reason}"]
    for other in _fallbacks():
        try:
            _check_private(other)
            _check(other)  # never overridden: the fault speaks of the first choice
        except _Unfit as unfit:
            tried.append(f"{other}: {unfit}")
            continue
        print(
            f"drivetrain: state goes to {other}, because {path} cannot hold it: {reason}. "
            "Set DRIVETRAIN_HOME to choose another place.",
            file=sys.stderr,
            flush=True,
        )
        return other
    raise StoreError(
        "No folder can hold Drivetrain's state; set DRIVETRAIN_HOME to one of yours on a local "
        "disk. Tried: " + "; ".join(tried)
    )


def _fallbacks() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folders = [Path(runtime) / "drivetrain"] if runtime and Path(runtime).is_dir() else []
    return [*folders, Path(tempfile.gettempdir()) / f"drivetrain-{os.geteuid()}"]


def _check_private(path: Path) -> None:
    """Create it 0700, or accept it if it is a real directory, ours alone; raises _Unfit."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise _Unfit(error.strerror or str(error)) from error
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise _Unfit("it exists and is not a folder of yours with mode 0700")


def _inside(name: str) -> Path:
    path = home() / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def jobs_dir() -> Path:
    """The folder that holds one folder per job."""
    return _inside("jobs")


def job_dir(job: str, *, create: bool = False) -> Path:
    """The folder of a job. Raises BadInput for an id that could not be a file name."""
    if not _ID.fullmatch(job):
        raise BadInput(f"{job!r} is not a job id: letters, digits, '.', '_' and '-', 64 at most")
    path = jobs_dir() / job
    if create:
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def sockets_dir() -> Path:
    """The folder for sockets under the state folder; use `socket_path` for a path that fits."""
    return _inside("sockets")


def private_sockets_dir() -> Path:
    """The short folder that takes the sockets of a state folder whose path is too long."""
    key = xxhash.xxh3_64_hexdigest(os.fsencode(home()) + b"\0" + str(os.geteuid()).encode())[:12]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    wanted = [Path(runtime) / f"drivetrain-{key}"] if runtime and len(runtime) < 50 else []
    wanted.append(Path("/tmp") / f"drivetrain-{os.geteuid()}-{key}")
    tried = []
    for path in wanted:
        try:
            _check_private(path)
            return path
        except _Unfit as unfit:
            tried.append(f"{path}: {unfit}")
    raise StoreError("No folder can hold sockets. Tried: " + "; ".join(tried))


def socket_path(name: str) -> str:
    """Where the socket called ``name`` lives: at most 107 bytes, the same answer every time."""
    if not _ID.fullmatch(name):
        raise BadInput(f"{name!r} is not a socket name: letters, digits, '.', '_' and '-'")
    path = sockets_dir() / name
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        return str(path)
    path = private_sockets_dir() / name
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        path = path.with_name(xxhash.xxh3_64_hexdigest(name.encode()))
    return str(path)
