"""Where NVRTC and hiprtc are: in a toolkit, in a wheel, or among the system's libraries.

Nothing is loaded here: the version is read from the names of the files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from drivetrain.errors import Unsupported

__all__ = ["Library", "library"]

_LIMIT_S = 10.0
_NUMBERS = re.compile(r"\.so((?:\.\d+)+)$")


@dataclass(frozen=True)
class Library:
    """A run-time compiler on this machine."""

    name: str
    """``nvrtc`` or ``hiprtc``: also what its functions start with."""
    path: Path
    version: tuple[int, ...]
    """As its files are called; may be empty."""
    preload: tuple[Path, ...]
    """What it loads by name, where it may not find it."""
    include: tuple[Path, ...]
    """Folders of the toolkit's headers, where they lie beside it."""

    @property
    def title(self) -> str:
        word = "NVRTC" if self.name == "nvrtc" else "hiprtc"
        return " ".join([word, ".".join(map(str, self.version))]).strip()

    def identity(self) -> str:
        """Changes when the library or its headers do."""
        words = [self.title]
        headers = [folder / name for folder in self.include for name in _HEADERS]
        for path in (self.path, *self.preload, *headers):
            try:
                facts = path.stat()
            except OSError:
                continue
            words.append(f"{path} {facts.st_size} {facts.st_mtime_ns}")
        return "\n".join(words)


@dataclass(frozen=True)
class _Kind:
    name: str
    files: tuple[str, ...]
    builtins: str
    variables: tuple[str, ...]
    wheels: tuple[str, ...]
    """Folders in site-packages."""
    folders: tuple[str, ...]
    install: str
    selected: str = ""
    """The variable that names another implementation of the API, which may bring its own."""


_HEADERS = ("cuda_fp16.h", "hip/hip_runtime.h")
_KINDS = {
    "cuda": _Kind(
        "nvrtc",
        ("libnvrtc.so*",),
        "libnvrtc-builtins.so*",
        ("CUDA_HOME", "CUDA_PATH"),
        ("nvidia/*",),
        ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda"),
        "NVRTC compiles kernels for CUDA, and there is none on this machine: pip install "
        "nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for a driver of CUDA 12), or name a CUDA "
        "toolkit's folder in CUDA_HOME",
        "DRIVETRAIN_CUDA_LIBRARY",
    ),
    "hip": _Kind(
        "hiprtc",
        # Before ROCm 5.5 or so its functions are in the runtime's own library.
        ("libhiprtc.so*", "libamdhip64.so*"),
        "libhiprtc-builtins.so*",
        ("ROCM_PATH", "ROCM_HOME", "HIP_PATH"),
        ("_rocm_sdk_core",),
        ("/opt/rocm", "/opt/rocm-*"),
        "hiprtc compiles kernels for HIP, and there is none on this machine: install ROCm's "
        "package hiprtc (Debian's libamdhip64-5), or name ROCm's folder in ROCM_PATH",
        "DRIVETRAIN_HIP_LIBRARY",
    ),
}


def library(kind: str, driver: str = "") -> Library:
    """The compiler for a kind of target; the first that is no newer than the driver, if any is.

    ``driver`` is the version that the driver takes code of: ``12.4``. Raises Unsupported.
    """
    wanted = _KINDS[kind]
    most = int(driver.partition(".")[0]) if re.match(r"\d+(\.|$)", driver) else 0
    first: Library | None = None
    for path in _candidates(wanted):
        found = _described(wanted, path)
        # What a newer major version makes, an older driver does not load.
        if not most or not found.version or found.version[0] <= most or kind != "cuda":
            return found
        first = first or found
    if first is not None:
        return first
    raise Unsupported(
        wanted.install, code="unsupported", driver=kind, op="compile", native_name=wanted.name
    )


def _candidates(kind: _Kind) -> Iterator[Path]:
    selected = Path(os.environ.get(kind.selected, "")) if kind.selected else Path()
    if selected.is_file():
        beside = sorted(selected.parent.glob(kind.files[0]), key=lambda p: -len(p.name))
        found = [each for each in beside if each.is_file()]
        if kind.name.encode() + b"CompileProgram" in selected.read_bytes():
            found.append(selected)
        if found:
            yield found[0].resolve()
            return
    seen: set[Path] = set()
    for folder in _folders(kind):
        for pattern in kind.files:
            # The longest name is the library itself; shorter ones are links to it.
            for path in sorted(folder.glob(pattern), key=lambda p: -len(p.name)):
                real = path.resolve()
                if real not in seen and real.is_file():
                    seen.add(real)
                    yield real


def _folders(kind: _Kind) -> Iterator[Path]:
    for variable in kind.variables:
        if os.environ.get(variable):
            yield from _library_folders(Path(os.environ[variable]))
    for site in _sites():
        for pattern in kind.wheels:
            for folder in sorted(site.glob(pattern), reverse=True):
                yield from _library_folders(folder)
    yield from _library_folders(Path(sys.prefix))
    for path in _system_libraries():
        if any(Path(path).match(pattern) for pattern in kind.files):
            yield Path(path).parent
    for name in kind.folders:
        root = Path(name)
        found = sorted(root.parent.glob(root.name), key=_version_of_folder, reverse=True)
        for folder in found:
            yield from _library_folders(folder)


def _library_folders(folder: Path) -> Iterator[Path]:
    yield from (folder / "lib64", folder / "lib", folder / "targets" / "x86_64-linux" / "lib")
    yield from (folder / "lib" / "x86_64-linux-gnu", folder / "targets" / "sbsa-linux" / "lib")


def _sites() -> Iterator[Path]:
    """Folders that may hold wheels; no package is imported."""
    spec = find_spec("nvidia")
    places = [Path(p).parent for p in (spec.submodule_search_locations or ())] if spec else []
    places += [Path(p) for p in (sysconfig.get_paths()["purelib"], *sys.path) if p]
    yield from dict.fromkeys(place for place in places if place.is_dir())


def _version_of_folder(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.name))


@lru_cache(maxsize=1)
def _system_libraries() -> tuple[str, ...]:
    """What the loader knows; empty where it cannot tell."""
    for tool in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        try:
            said = subprocess.run(
                [tool, "-p"], capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            continue
        return tuple(
            line.rpartition("=> ")[2].strip()
            for line in said.stdout.splitlines()
            if "nvrtc.so" in line or "hiprtc.so" in line or "amdhip64.so" in line
        )
    return ()


def _described(kind: _Kind, path: Path) -> Library:
    version = _numbers(path)
    builtins = sorted(path.parent.glob(kind.builtins), key=lambda p: -len(p.name))
    fitting = [b for b in builtins if not version or _numbers(b)[:1] == version[:1]]
    if fitting and (len(_numbers(fitting[0])) > len(version) or version == (11, 2)):
        # Since 11.2 all libraries of CUDA 11 are called 11.2; the built-ins tell the version.
        version = _numbers(fitting[0])
    preload = tuple(fitting[:1]) if kind.name == "nvrtc" else ()
    return Library(kind.name, path, version, preload, tuple(_include(kind, path)))


def _numbers(path: Path) -> tuple[int, ...]:
    match = _NUMBERS.search(path.name)
    return tuple(int(n) for n in match[1].split(".")[1:]) if match else ()


def _include(kind: _Kind, path: Path) -> Iterator[Path]:
    if kind.name != "nvrtc":
        return  # hiprtc has its headers in itself
    beside = [parent / "include" for parent in list(path.parents)[1:3]]
    wheels = path.parents[2] if path.parents[1].name == "cuda_nvrtc" else None
    if wheels is not None:
        beside += [wheels / n / "include" for n in ("cuda_runtime", "cuda_cccl", "curand")]
    if any((folder / "cuda_fp16.h").is_file() for folder in beside):
        for folder in beside:
            if folder.is_dir():
                yield folder
                if (folder / "cccl").is_dir():
                    yield folder / "cccl"
