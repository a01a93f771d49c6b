"""Building the C++ shim with the machine's own compiler, once for a torch and a Python.

A build is one file, ``NAME-SHA256.so``: ``NAME`` says what it was built from (source, torch,
Python, flags, compiler), the rest is the hash of what is inside, looked at before it is loaded. The
folder must be ours alone (mode 0700): loading code that others can write is running it. Of several
processes that want a build, one compiles and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from drivetrain.hal.config import state_folder

SOURCE = Path(__file__).with_name("shim.cpp")
MODULE = "_drivetrain_shim"
_FOLDER = "DRIVETRAIN_CACHE"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_TIME_S = 600.0
_SUFFIX = ".so"
_UNFINISHED = ".new-"
_TRIAL = """
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location(sys.argv[1], sys.argv[2])
spec.loader.exec_module(module_from_spec(spec))
"""


class CannotBuild(Exception):
    """The shim cannot be had here; the message says why and what would help."""


def folder() -> Path:
    """``shim`` in ``DRIVETRAIN_CACHE``, else ``cache/shim`` in the state folder."""
    asked = os.environ.get(_FOLDER)
    return Path(asked) / "shim" if asked else state_folder() / "cache" / "shim"


def ready() -> Path | None:
    """A build that can be loaded now, checked; None where there is none. Raises CannotBuild for a
    folder that others can write to."""
    directory = _open(make=False)
    if directory is None:
        return None
    compiler = find_compiler()
    # Without a compiler, whoever built it: it fits this torch and this Python.
    prefix = _name() if compiler is None else f"{_name()}-{_of_compiler(compiler)}"
    return _checked(directory, prefix)


def built() -> Path:
    """A build that can be loaded, made now unless there is one: about half a minute, with a line on
    standard error. Raises CannotBuild."""
    found = ready()
    if found is not None:
        return found
    compiler = check()
    directory = _open(make=True)
    assert directory is not None
    name = f"{_name()}-{_of_compiler(compiler)}"
    try:
        with _locked(directory / f".{name}.lock"):
            found = _checked(directory, name)
            return _compiled(compiler, directory, name) if found is None else found
    except OSError as error:
        raise CannotBuild(f"{directory} cannot hold a build: {error}") from error


def check() -> tuple[str, ...]:
    """The compiler. Raises CannotBuild where something is missing for a build."""
    compiler = find_compiler()
    if compiler is None:
        raise CannotBuild(
            "there is no C++ compiler (looked for CXX, or else c++, g++ and clang++, on PATH); "
            "install one, as with apt-get install g++"
        )
    _check_headers()
    return compiler


def find_compiler() -> tuple[str, ...] | None:
    """``CXX``, else the first of c++, g++ and clang++ that is on PATH."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for words in [asked] if asked else [[each] for each in _COMPILERS]:
        found = shutil.which(words[0])
        if found is not None:
            return (found, *words[1:])
    return None


# -- what a build is called ------------------------------------------------------------------------


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(each).digest() for each in parts)).hexdigest()


def _name() -> str:
    """By what is compiled and for what."""
    facts = (
        torch.__version__,
        str(torch.version.git_version),
        str(sysconfig.get_config_var("SOABI")),
        sys.version,
        platform.machine(),
        *_FLAGS,
        *_defines(),
    )
    return _digest(SOURCE.read_bytes(), *(each.encode() for each in facts))[:24]


def _of_compiler(compiler: tuple[str, ...]) -> str:
    try:
        told = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=False, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = b""
    return _digest(told, *(os.fsencode(each) for each in compiler))[:12]


def _defines() -> tuple[str, ...]:
    private = getattr(torch._C, "_GLIBCXX_USE_CXX11_ABI", True)
    return (f"-D_GLIBCXX_USE_CXX11_ABI={int(private)}",)


# -- the folder ------------------------------------------------------------------------------------


def _open(*, make: bool) -> Path | None:
    """The folder if it is ours alone, None if it is not there. Raises CannotBuild."""
    where = folder()
    try:
        if make:  # the one above it is the kernels', which must be ours alone as well
            for each in (where.parent, where):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = os.lstat(where)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotBuild(f"{where} cannot hold builds: {error}") from error
    why = ""
    if not stat.S_ISDIR(facts.st_mode):
        why = "it is no folder"
    elif facts.st_uid != os.geteuid():
        why = f"it belongs to user {facts.st_uid}"
    elif stat.S_IMODE(facts.st_mode) & 0o077:
        why = f"others may use it (mode {stat.S_IMODE(facts.st_mode):04o})"
    if why:
        raise CannotBuild(
            f"builds are not kept in {where}: {why}. Make it yours with mode 0700, or set "
            f"{_FOLDER} to another folder"
        )
    return where


def _checked(directory: Path, prefix: str) -> Path | None:
    """A build whose name begins so and whose content is what its name says. Others go."""
    for path in sorted(directory.glob(f"{prefix}-*{_SUFFIX}")):
        wanted = path.name.removesuffix(_SUFFIX).rpartition("-")[2]
        try:
            facts = os.lstat(path)
            ours = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid()
            if ours and hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
                return path
            path.unlink()
        except OSError:
            continue
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for another process that builds the same. Raises CannotBuild after a while."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        end = time.monotonic() + _TIME_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CannotBuild(
                        f"another process has been building for {_TIME_S:.0f} seconds ({path}); "
                        "end it and try again"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(file)


# -- the compiler ----------------------------------------------------------------------------------


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _check_headers() -> None:
    python = Path(sysconfig.get_path("include")) / "Python.h"
    if not python.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CannotBuild(
            f"Python's headers are not installed ({python}); install them, as with "
            f"apt-get install python{version}-dev"
        )
    header = _torch_folder() / "include" / "torch" / "library.h"
    if not header.is_file():
        raise CannotBuild(f"this torch comes without its headers ({header}); install torch's wheel")


def _command(compiler: tuple[str, ...], target: Path) -> list[str]:
    include, library = _torch_folder() / "include", _torch_folder() / "lib"
    folders = (include, include / "torch" / "csrc" / "api" / "include")
    return [
        *compiler,
        *_FLAGS,
        *_defines(),
        *(f"-I{each}" for each in (*folders, sysconfig.get_path("include"))),
        str(SOURCE),
        f"-L{library}",
        *("-lc10", "-ltorch_cpu", "-ltorch_python"),
        "-o",
        str(target),
    ]


def _compiled(compiler: tuple[str, ...], directory: Path, name: str) -> Path:
    print(
        f"drivetrain: building the C++ shim for torch {torch.__version__} with {compiler[0]}; "
        "this happens once and takes about half a minute",
        file=sys.stderr,
        flush=True,
    )
    for left in directory.glob(f"{_UNFINISHED}*"):  # by a builder that was killed
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 2 * _TIME_S:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=directory) as made:
        target = Path(made) / (MODULE + _SUFFIX)
        _run(_command(compiler, target), "the compiler")
        # Code that cannot be loaded may end the process: another one is the first to try.
        _run([sys.executable, "-c", _TRIAL, MODULE, str(target)], "loading what was built")
        final = directory / f"{name}-{hashlib.sha256(target.read_bytes()).hexdigest()}{_SUFFIX}"
        target.chmod(0o500)
        os.replace(target, final)
    return final


def _run(command: list[str], what: str) -> None:
    """Raises CannotBuild with the end of what the command said."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # with its own children, at the time limit
        env={**os.environ, "LC_ALL": "C", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    ) as process:
        try:
            said, _ = process.communicate(timeout=_TIME_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CannotBuild(f"{what} took more than {_TIME_S:.0f} seconds") from None
            raise
    if process.returncode:
        text = said.decode(errors="replace")
        lines = [line for line in text.splitlines() if "error" in line.lower()] or [text[-500:]]
        raise CannotBuild(
            f"{what} failed (exit {process.returncode}): {' | '.join(lines[:3])[:1000]}. The "
            f"command was: {shlex.join(command)}"
        )
