"""The C floors: compiled when a benchmark begins, loaded with ctypes, called once a measurement."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_double


class Step(ctypes.Structure):
    """One kernel launch of a workload; as in ``floor.c``."""

    _fields_ = (
        ("function", _POINTER),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("arguments", _POINTER),
    )


def compiled(name: str, *flags: str) -> Any:
    """``NAME.c`` of this folder as a library. Raises RuntimeError when there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the floors need a C compiler")
    folder = tempfile.mkdtemp(prefix="drivetrain-floor-")
    path = Path(folder) / f"{name}.so"
    command = [compiler, "-O3", *flags, "-shared", "-fPIC", str(HERE / f"{name}.c"), "-o"]
    try:
        subprocess.run([*command, str(path), "-lm"], check=True)
        return ctypes.CDLL(str(path))
    finally:
        shutil.rmtree(folder)


@cache
def floor() -> Any:
    """Loops over a driver's own functions."""
    library = compiled("floor")
    for name in ("cuda", "plain"):
        function = getattr(library, f"floor_{name}_launch")
        function.restype = _DOUBLE
        function.argtypes = (_POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER, _INT)
    library.floor_opencl_launch.restype = _DOUBLE
    library.floor_opencl_launch.argtypes = (
        _POINTER, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT,
    )  # fmt: skip
    for name in ("cuda", "plain"):
        function = getattr(library, f"floor_{name}_steps")
        function.restype = _DOUBLE
        function.argtypes = (_POINTER, ctypes.POINTER(Step), _INT, _INT, _POINTER)
    library.floor_two.restype = _DOUBLE
    library.floor_two.argtypes = (_POINTER, _POINTER, _POINTER, _INT)
    library.floor_record.restype = _DOUBLE
    library.floor_record.argtypes = (_POINTER, _POINTER, _POINTER, _INT)
    library.floor_gemm_chain.restype = _DOUBLE
    library.floor_gemm_chain.argtypes = (
        _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT,
    )  # fmt: skip
    library.floor_peer.restype = _DOUBLE
    library.floor_peer.argtypes = (
        _POINTER, _POINTER, ctypes.c_uint64, _POINTER, ctypes.c_uint64, _POINTER, ctypes.c_size_t,
    )  # fmt: skip
    return library


@cache
def threads() -> Any:
    """The same work as the kernels, in plain C over OpenMP's threads."""
    return compiled("threads", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
