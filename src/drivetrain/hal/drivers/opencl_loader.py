"""Which OpenCL platforms are registered with the loader, read from files alone.

The loader (``libOpenCL.so.1``) finds platforms in text files ``*.icd``, each with the name of a
library, in ``/etc/OpenCL/vendors`` or where ``OCL_ICD_VENDORS`` or ``OCL_ICD_FILENAMES`` say. In
containers NVIDIA's library is often there and its file is not, and the files of Intel's wheel name
a folder that no machine has: then a folder of our own registers them beside the others.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drivetrain.hal import config
from drivetrain.hal.drivers import sycl_api

ROOT = Path("/")
LOADER = "libOpenCL.so.1"
NVIDIA = "libnvidia-opencl.so.1"
INTEL = "libintelocl.so"
INTEL_NEEDS = "libimf.so"
"""Of another wheel, which Intel's does not ask for."""
VENDORS, FILENAMES = "OCL_ICD_VENDORS", "OCL_ICD_FILENAMES"
REGISTERED = "etc/OpenCL/vendors"

_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
    "usr/lib/wsl/lib",
    "usr/local/nvidia/lib64",
    "usr/local/nvidia/lib",
    "usr/local/cuda/lib64",
    "usr/local/cuda/compat",
)
_PLATFORMS_READ = (
    "OCL_ICD_",
    "OPENCL_",
    "POCL_",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "GPU_",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "RUSTICL_",
    "ZE_",
    "CL_CONFIG_",
    "LD_LIBRARY_PATH",
    "DRIVETRAIN_OPENCL_",
)
"""Beginnings of the environment variables that change what a platform lists."""


def library(name: str, root: Path = ROOT) -> str:
    """The path of a library, its bare name where only the loader's cache knows it, or ``""``."""
    folders = [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    folders += [root / folder for folder in _FOLDERS]
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    try:
        return name if name.encode() in (root / "etc/ld.so.cache").read_bytes() else ""
    except OSError:
        return ""


def icd_files(root: Path = ROOT) -> list[Path]:
    """The files that register platforms, as the environment says; what is missing is left out."""
    named = [Path(f) for f in os.environ.get(FILENAMES, "").split(":") if f]
    place = os.environ.get(VENDORS, "")
    folder = Path(place) if place else root / REGISTERED
    if place and folder.suffix == ".icd":
        found = [folder]
    else:
        try:
            found = sorted(folder.glob("*.icd"))
        except OSError:
            found = []
    return [path for path in (*named, *found) if path.exists() or path in named]


def _of_wheels(name: str) -> Path | None:
    """The folder of a library that a wheel of Intel's brought: beside the SYCL library that is
    used, or this Python's ``lib``."""
    path = sycl_api.find()
    folders = [sycl_api.libraries(path)] if path else []
    folders.append(Path(sys.prefix) / "lib")
    return next((folder for folder in folders if (folder / name).exists()), None)


def intel_folder() -> Path | None:
    """Where Intel's runtime for processors lies, when a wheel brought it."""
    return _of_wheels(INTEL)


def load_wheels_loader() -> ctypes.CDLL | None:
    """The loader that SYCL's wheels bring, for a machine that has none of its own."""
    folder = _of_wheels(LOADER)
    if folder is None:
        return None
    try:
        for name in ("libintlc.so.5", INTEL_NEEDS, "libirng.so", "libsvml.so"):
            ctypes.CDLL(str(folder / name))  # it needs them, and does not say where they are
        return ctypes.CDLL(str(folder / LOADER))
    except OSError:
        return None


def unregistered(root: Path = ROOT) -> dict[str, str]:
    """Libraries of platforms that are installed and that no file registers, by the name of the
    file that would. A machine whose user said where the files are is left as it is."""
    if os.environ.get(VENDORS) or os.environ.get(FILENAMES):
        return {}
    found = {}
    registered = [text(each) for each in icd_files(root)]
    path = library(NVIDIA, root)
    stem = NVIDIA.partition(".")[0]
    if path and not any(stem in each for each in registered):
        found["drivetrain-nvidia.icd"] = path
    folder = intel_folder()
    if (
        folder is not None
        and (folder / INTEL_NEEDS).exists()
        and not any(INTEL in each and _leads_somewhere(each) for each in registered)
    ):
        found["drivetrain-intel.icd"] = str(folder / INTEL)
    return found


def _leads_somewhere(name: str) -> bool:
    """Whether a library's name may be found: a path that does not exist is not."""
    return "/" not in name or Path(name).exists()


def text(path: Path) -> str:
    """What an ``.icd`` file says: the name of a library. Empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def absent(root: Path = ROOT) -> str:
    """Why this machine can have no OpenCL device; ``""`` when the loader is worth asking."""
    if not library(LOADER, root) and not (root == ROOT and _of_wheels(LOADER)):
        return f"no OpenCL loader ({LOADER})"
    if icd_files(root) or unregistered(root):
        return ""
    where = os.environ.get(VENDORS) or str(root / REGISTERED)
    return f"the OpenCL loader is installed, but no platform is registered in {where} (*.icd)"


# -- a vendors folder of our own -------------------------------------------------------------------


def own_folder(root: Path = ROOT) -> Path | None:
    """A folder that registers what no file does beside what is registered already, written when it
    is missing; None where it is not needed, or cannot be written."""
    more = unregistered(root)
    if not more:
        return None
    entries = {each.name: text(each) for each in icd_files(root)} | more
    digest = hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest()[:16]
    folder = config.state_folder() / "opencl" / f"vendors-{digest}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in entries.items():
            if text(folder / name) != content:
                temporary = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
                temporary.write_text(content + "\n", encoding="utf-8")
                temporary.replace(folder / name)
    except OSError:
        return None
    return folder


def environment(root: Path = ROOT) -> dict[str, str]:
    """What a process that asks the loader needs over the inherited environment."""
    folder = own_folder(root)
    return {} if folder is None else {VENDORS: str(folder)}


_lock = threading.Lock()


@contextmanager
def registered(root: Path = ROOT) -> Iterator[None]:
    """Within it, the loader finds every platform. It reads its variables once, at its first call:
    they are put back afterwards, so that what this process starts is left alone."""
    with _lock:
        wanted = environment(root)
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


# -- what a listing depends on ---------------------------------------------------------------------


def fingerprint(root: Path = ROOT) -> str:
    """Changes with whatever may change what the loader lists: the boot, the vendors' files and
    libraries, the variables that platforms read. Reads files only."""
    facts: list[object] = [config.boot_id()]
    for path in icd_files(root):
        name = text(path)
        facts += [str(path), _stamp(str(path)), name, _stamp(_found(name, root))]
    for extra in unregistered(root).values():
        facts += [extra, _stamp(extra)]
    facts.append(_stamp(_found(LOADER, root)))
    facts += sorted(
        (name, value) for name, value in os.environ.items() if name.startswith(_PLATFORMS_READ)
    )
    facts += sorted(
        str(node)
        for pattern in ("nvidia[0-9]*", "dri/renderD*", "kfd", "dxg")
        for node in (root / "dev").glob(pattern)
    )
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return hashlib.sha256(repr([facts, affinity]).encode()).hexdigest()


def _found(name: str, root: Path) -> str:
    return library(name, root) if name and "/" not in name else name


def _stamp(path: str) -> tuple[int, int] | None:
    if not path:
        return None
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_mtime_ns, facts.st_size
