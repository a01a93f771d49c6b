"""OpenBLAS and oneMKL on cpu devices, in the order of a stream and on the device's own threads.

The product is cut into tiles, and each is one call of the library on one thread of the device: so
it keeps to the device's cores and takes its turn in the stream, like any kernel. OpenBLAS has one
number of threads a process, and numpy may use the same library; so ours is loaded a second time,
from a copy in memory, and told to use one thread. oneMKL is told so for each thread.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
import sys
import threading
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.hal.blas import Product, Unusable
from drivetrain.hal.blas.finding import Library
from drivetrain.hal.kernel import PTR, struct_of
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream

_RECORD = struct.Struct("QQ19q")
_LEAST_TILE = 64
_SMALL = 1 << 18
"""Multiplications up to which one thread does it all."""

_NAMES = [(prefix, suffix) for suffix in ("64_", "_64", "") for prefix in ("scipy_", "")]
"""How builds rename their symbols; those with 64 count in 64 bits."""

_MFD_EXEC = 0x10

_lock = threading.Lock()
_loaded: dict[str, Any] = {}
_files: list[int] = []
"""Copies in memory, open as long as the process lives: a path must not name another one later."""


def _copied(library: Library) -> Any:
    """The library, loaded from a copy of its own."""
    try:
        for path in library.before:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        data = Path(library.path).read_bytes()
        file = _memory_file()
        with os.fdopen(os.dup(file), "wb") as copy:
            copy.write(data)
        _files.append(file)
        return _quietly(f"/proc/self/fd/{file}")
    except OSError as error:
        raise Unusable(str(error)) from error


def _memory_file() -> int:
    """A file in memory that may be executed; kernels before 6.3 do not know the flag."""
    try:
        return os.memfd_create("drivetrain-blas", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:
        return os.memfd_create("drivetrain-blas", os.MFD_CLOEXEC)


def _quietly(path: str) -> Any:
    """Load OpenBLAS so that it starts no threads."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _symbol(library: Any, name: str) -> int:
    found = getattr(library, name, None)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


class Functions:
    """What is called of a library: addresses."""

    def __init__(self, library: Library) -> None:
        if not sys.platform.startswith("linux"):
            raise Unusable("a library of the host is used on Linux only")
        if library.name == "mkl":
            try:
                handle = ctypes.CDLL(library.path)
            except OSError as error:
                raise Unusable(str(error)) from error
            self.threads = _symbol(handle, "MKL_Set_Num_Threads_Local")
            if not self.threads:
                raise Unusable("it has no MKL_Set_Num_Threads_Local")
            found = [("", "", handle)]
        else:
            handle, self.threads = _copied(library), 0
            found = [(prefix, suffix, handle) for prefix, suffix in _NAMES]
        for prefix, suffix, handle in found:
            self.single = _symbol(handle, f"{prefix}cblas_sgemm{suffix}")
            self.double = _symbol(handle, f"{prefix}cblas_dgemm{suffix}")
            if self.single and self.double:
                break
        else:
            raise Unusable("it has no cblas_sgemm under any name that is known")
        self.wide = "64" in suffix
        self.handle = handle
        self.version = library.name
        if library.name != "mkl":
            one = getattr(handle, f"{prefix}openblas_set_num_threads{suffix}", None)
            if one is None:
                raise Unusable("it cannot be told to use one thread")
            one.argtypes, one.restype = (ctypes.c_int,), None
            one(1)
            tell = getattr(handle, f"{prefix}openblas_get_config{suffix}", None)
            if tell is not None:
                tell.argtypes, tell.restype = (), ctypes.c_char_p
                words = (tell() or b"").decode(errors="replace").split()
                self.version = " ".join(words[:2]) or library.name


def _functions(library: Library) -> Functions:
    with _lock:
        found = _loaded.get(library.path)
        if found is None:
            found = _loaded[library.path] = Functions(library)
        assert isinstance(found, Functions)
        return found


def _caller() -> bytes:
    """The shared object that calls the library; see ``_blas.c``."""
    spec = importlib.util.find_spec("drivetrain.hal._blas")
    if spec is None or spec.origin is None or os.environ.get("DRIVETRAIN_NATIVE", "1") == "0":
        raise Unusable("drivetrain.hal._blas, which calls it in a stream's order, is not built")
    return Path(spec.origin).read_bytes()


class Cblas:
    """A library of the host for one cpu device."""

    dtypes = frozenset({"float32", "float64"})

    def __init__(self, opened: Opened, library: Library) -> None:
        self._functions = functions = _functions(library)
        self.name = f"{functions.version} ({library.path})"
        types = [PTR, PTR, PTR, struct_of(_RECORD.size)]
        source = Source.binary(_caller(), "so", {"blas_gemm": types}, name="blas.so")
        module = opened.device.compile(source)
        module._made_of = None  # its arguments are addresses of this process: never recorded
        self._kernel = module.kernel("blas_gemm")
        self._threads = max(1, opened.device.info.isolation.threads)

    def multiply(self, product: Product, out: Buffer, a: Buffer, b: Buffer, on: Stream) -> None:
        p, functions = product, self._functions
        high, wide = self._tiles(p)
        doubles = p.dtype.name == "float64"
        packed = _RECORD.pack(
            functions.double if doubles else functions.single,
            functions.threads,
            *(functions.wide, doubles, p.m, p.n, p.k, p.turned_a, p.turned_b),
            *(p.lda, p.ldb, p.ldc, p.offsets[1], p.offsets[2], p.offsets[0]),
            *(p.steps[1], p.steps[2], p.steps[0], high, wide, 0),
        )
        grid = (-(-p.n // wide), -(-p.m // high), p.count)
        self._kernel(on, grid, 1, out, a, b, packed)

    def _tiles(self, p: Product) -> tuple[int, int]:
        """Rows and columns of a tile, so that there is one for each thread and none is thin."""
        threads = max(1, self._threads // p.count)
        if threads == 1 or p.m * p.n * p.k <= _SMALL:
            return p.m, p.n
        down = max(1, min(threads, isqrt(threads * p.m // max(p.n, 1)) or 1))
        along = -(-threads // down)
        high = max(_LEAST_TILE, -(-p.m // down))
        wide = max(_LEAST_TILE, -(-p.n // along))
        return -(-high // 8) * 8, -(-wide // 16) * 16
