"""CLBlast on OpenCL devices. Functions and values are those of ``clblast_c.h``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from drivetrain.errors import HalError
from drivetrain.hal.blas import Product, Unusable
from drivetrain.hal.blas.finding import Library

if TYPE_CHECKING:
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream

ROW_MAJOR, PLAIN, TURNED = 101, 111, 112
_P, _I, _N = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


def _types(number: Any) -> tuple[Any, ...]:
    """``CLBlastSgemmStridedBatched`` and its double."""
    matrix = (_P, _N, _N, _N)  # buffer, offset, leading dimension, stride
    return (_I, _I, _I, _N, _N, _N, number, *matrix, *matrix, number, *matrix, _N, _P, _P)


class Clblast:
    """CLBlast for one device. It takes OpenCL's own buffers, not addresses."""

    def __init__(self, opened: Opened, library: Library) -> None:
        try:
            handle = ctypes.CDLL(library.path)
        except OSError as error:
            raise Unusable(str(error)) from error
        self._opened = opened
        self._parts = getattr(opened.backend, "memory_object", None)
        if self._parts is None:
            raise Unusable("it takes OpenCL buffers, and this device's memory are addresses (SVM)")
        self._gemms: dict[str, Any] = {}
        for name, letter, number in (
            ("float32", "S", ctypes.c_float), ("float64", "D", ctypes.c_double),
        ):  # fmt: skip
            found = getattr(handle, f"CLBlast{letter}gemmStridedBatched", None)
            if found is None:
                raise Unusable(f"it has no CLBlast{letter}gemmStridedBatched")
            found.argtypes, found.restype = _types(number), ctypes.c_int
            self._gemms[name] = found
        known = {"float32"}
        if "fp64" in opened.backend.target.features:
            known.add("float64")
        self.dtypes = frozenset(known)
        self.name = f"CLBlast ({library.path})"

    def multiply(self, product: Product, out: Buffer, a: Buffer, b: Buffer, on: Stream) -> None:
        p = product
        assert self._parts is not None
        matrices = []
        for buffer, offset, step, leading in (
            (a, p.offsets[1], p.steps[1], p.lda),
            (b, p.offsets[2], p.steps[2], p.ldb),
            (out, p.offsets[0], p.steps[0], p.ldc),
        ):
            handle, start = self._parts(buffer.ptr)
            if start % p.dtype.nbytes:
                raise Unusable("a buffer does not start at a multiple of an element")
            matrices.append((handle, start // p.dtype.nbytes + offset, leading, step))
            buffer.used_by(on)
        queue = ctypes.c_void_p(on.handle)
        code = self._gemms[p.dtype.name](
            ROW_MAJOR,
            TURNED if p.turned_a else PLAIN,
            TURNED if p.turned_b else PLAIN,
            *(p.m, p.n, p.k, 1.0, *matrices[0], *matrices[1], 0.0, *matrices[2], p.count),
            ctypes.byref(queue),
            None,
        )
        if code:
            raise HalError(
                f"CLBlast failed on {self._opened.device.address} with {code}",
                code="blas",
                driver="opencl",
                native=code,
                native_name=f"CLBlastStatusCode {code}",
                op="matmul",
                device=self._opened.device.address,
            )
