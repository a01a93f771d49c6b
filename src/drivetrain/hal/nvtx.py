"""Ranges for NVIDIA's tools (Nsight Systems), where a library for them is present.

The package ``nvtx`` if it is installed, else ``libnvToolsExt.so.1`` of the toolkit or of a wheel.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

Push = Callable[[str], object]
Pop = Callable[[], object]

_LIBRARY = "libnvToolsExt.so.1"


def _from_package() -> tuple[Push, Pop] | None:
    if importlib.util.find_spec("nvtx") is None:
        return None
    found = importlib.import_module("nvtx")
    return found.push_range, found.pop_range


def _library() -> ctypes.CDLL | None:
    in_wheels = (Path(p) / "nvidia" / "nvtx" / "lib" / _LIBRARY for p in sys.path if p)
    for name in (_LIBRARY, *(str(path) for path in in_wheels if path.exists())):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _from_library() -> tuple[Push, Pop] | None:
    found = _library()
    if found is None:
        return None
    try:
        push, pop = found.nvtxRangePushA, found.nvtxRangePop
    except AttributeError:
        return None
    push.argtypes, push.restype = (ctypes.c_char_p,), ctypes.c_int
    pop.argtypes, pop.restype = (), ctypes.c_int
    return (lambda name: push(name.encode(errors="replace"))), pop


@cache
def calls() -> tuple[Push, Pop] | None:
    """What begins a range and what ends the innermost of this thread; None: neither is here."""
    return _from_package() or _from_library()
