"""Ranges for vendors' tools, where a library for them is present: NVIDIA's NVTX (Nsight Systems),
AMD's rocTX (rocprof, Omnitrace). A process that has both tells both.

NVTX is the package ``nvtx`` if it is installed, else ``libnvToolsExt.so.1`` of the toolkit or of a
wheel; rocTX is ROCm's library, of rocprofiler-sdk or the older roctracer.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

Push = Callable[[str], object]
Pop = Callable[[], object]

_NVTX = "libnvToolsExt.so.1"
# The newer library first: with both, a profiler listens to that one.
_ROCTX = ("librocprofiler-sdk-roctx.so.1", "libroctx64.so.4", "libroctx64.so")


def _from_package() -> tuple[Push, Pop] | None:
    if importlib.util.find_spec("nvtx") is None:
        return None
    found = importlib.import_module("nvtx")
    return found.push_range, found.pop_range


def _from_library(names: Iterable[str], prefix: str) -> tuple[Push, Pop] | None:
    """The calls of the first library that loads and has them."""
    for name in names:
        try:
            library = ctypes.CDLL(name)
            push, pop = library[f"{prefix}RangePushA"], library[f"{prefix}RangePop"]
        except (OSError, AttributeError):
            continue
        push.argtypes, push.restype = (ctypes.c_char_p,), ctypes.c_int
        pop.argtypes, pop.restype = (), ctypes.c_int
        return _pusher(push), pop
    return None


def _pusher(push: Callable[[bytes], object]) -> Push:
    return lambda name: push(name.encode(errors="replace"))


def _nvtx() -> tuple[Push, Pop] | None:
    in_wheels = (Path(p) / "nvidia" / "nvtx" / "lib" / _NVTX for p in sys.path if p)
    names = (_NVTX, *(str(path) for path in in_wheels if path.exists()))
    return _from_package() or _from_library(names, "nvtx")


def _roctx() -> tuple[Push, Pop] | None:
    folder = Path(os.environ.get("ROCM_PATH", "/opt/rocm")) / "lib"
    in_rocm = (folder / name for name in _ROCTX)
    return _from_library((*_ROCTX, *(str(path) for path in in_rocm if path.exists())), "roctx")


@cache
def calls() -> tuple[Push, Pop] | None:
    """What begins a range and what ends the innermost of this thread; None: none is here."""
    found = [each for each in (_nvtx(), _roctx()) if each is not None]
    if len(found) < 2:
        return found[0] if found else None
    (push, pop), (other_push, other_pop) = found

    def both_push(name: str) -> None:
        push(name)
        other_push(name)

    def both_pop() -> None:
        pop()
        other_pop()

    return both_push, both_pop
