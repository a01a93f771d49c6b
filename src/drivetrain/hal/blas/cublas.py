"""cuBLAS and hipBLAS: on the stream, on the buffers as they are.

Both count columns first. A row-major product is theirs of the two operands in the other order.
Functions and values are those of ``cublas_api.h`` (11.0 and later) and ``hipblas.h``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drivetrain.errors import HalError
from drivetrain.hal.blas import Product, Unusable
from drivetrain.hal.blas.finding import Library

if TYPE_CHECKING:
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong

_SETUP: dict[str, tuple[Any, ...]] = {
    "Create": (_P,),
    "Destroy": (_P,),
    "SetStream": (_P, _P),
}
GEMM_EX: tuple[Any, ...] = (
    *(_P, _I, _I, _I, _I, _I, _P),  # handle, operations, m, n, k, alpha
    *(_P, _I, _I, _L, _P, _I, _I, _L),  # A, its type, lda, stride; B
    *(_P, _P, _I, _I, _L, _I, _I, _I),  # beta, C, its type, ldc, stride; count, compute, algorithm
)
"""``cublasGemmStridedBatchedEx``."""
GEMM: tuple[Any, ...] = (
    *(_P, _I, _I, _I, _I, _I, _P),
    *(_P, _I, _L, _P, _I, _L, _P, _P, _I, _L, _I),
)
"""``hipblasSgemmStridedBatched`` and its double."""

CUDA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
"""``cudaDataType``: CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF."""
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
"""``cublasComputeType_t``."""

_CUBLAS = {
    0: "SUCCESS", 1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE",
    8: "ARCH_MISMATCH", 11: "MAPPING_ERROR", 13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
}  # fmt: skip


class _Handled:
    """What both have in common: a handle that one thread uses at a time, in the device's
    context."""

    prefix = ""
    suffix = ""

    def __init__(self, opened: Opened, library: Library) -> None:
        try:
            for path in library.before:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(library.path)
        except OSError as error:
            raise Unusable(str(error)) from error
        self._opened = opened
        self._call: Callable[..., int] = getattr(opened.backend, "in_context", _plain)
        self._lock = threading.Lock()
        for name, types in _SETUP.items():
            self._function(name + self.suffix, types)
        self._destroy = self._function("Destroy" + self.suffix, (_P,))
        self._handle = ctypes.c_void_p()
        self._do(self._function("Create" + self.suffix, (_P,)), ctypes.byref(self._handle))

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            try:
                self._call(self._destroy, handle)
            except HalError:
                pass  # the device is lost, and the handle with it

    def _function(self, name: str, types: tuple[Any, ...]) -> Any:
        try:
            found = getattr(self._library, self.prefix + name)
        except AttributeError:
            raise Unusable(f"it has no {self.prefix}{name}") from None
        found.argtypes, found.restype = types, ctypes.c_int
        return found

    def _do(self, function: Any, *arguments: Any) -> None:
        code = self._call(function, *arguments)
        if code:
            word = f"{self.prefix.upper()}_STATUS_{_CUBLAS.get(code, code)}"
            raise HalError(
                f"{function.__name__} failed on {self._opened.device.address}: {word} ({code})",
                code="blas",
                driver=self._opened.device.driver,
                native=code,
                native_name=word,
                op="matmul",
                device=self._opened.device.address,
            )

    def _on(self, stream: Stream, function: Any, *arguments: Any) -> None:
        with self._lock:
            self._do(
                self._function("SetStream" + self.suffix, (_P, _P)), self._handle, stream.handle
            )
            self._do(function, self._handle, *arguments)


def _plain(function: Any, *arguments: Any) -> int:
    return int(function(*arguments))


def _numbers(double: bool) -> tuple[Any, Any]:
    kind = ctypes.c_double if double else ctypes.c_float
    return kind(1.0), kind(0.0)


def _addresses(p: Product, out: Buffer, a: Buffer, b: Buffer) -> tuple[int, int, int]:
    at = [
        buffer.ptr + offset * p.dtype.nbytes
        for buffer, offset in zip((out, a, b), p.offsets, strict=True)
    ]
    return at[0], at[1], at[2]


class Cublas(_Handled):
    """cuBLAS for one device. float16 and bfloat16 are summed in float32."""

    prefix, suffix = "cublas", "_v2"
    dtypes = frozenset(CUDA_TYPES)

    def __init__(self, opened: Opened, library: Library) -> None:
        super().__init__(opened, library)
        self._gemm = self._function("GemmStridedBatchedEx", GEMM_EX)
        version = ctypes.c_int()
        get = self._function("GetVersion_v2", (_P, _P))
        self._do(get, self._handle, ctypes.byref(version))
        number = version.value
        if number < 11000:
            raise Unusable(f"version {number} is older than 11.0")
        parts = (number // 10000, number // 100 % 100) if number >= 100000 else (
            number // 1000, number // 100 % 10
        )  # fmt: skip
        self.name = f"cuBLAS {parts[0]}.{parts[1]} ({library.path})"

    def multiply(self, product: Product, out: Buffer, a: Buffer, b: Buffer, on: Stream) -> None:
        p, double = product, product.dtype.name == "float64"
        to, left, right = _addresses(p, out, a, b)
        kind = CUDA_TYPES[p.dtype.name]
        compute = COMPUTE_64F if double else COMPUTE_32F
        if p.tf32 and p.dtype.name == "float32":
            compute = COMPUTE_32F_FAST_TF32
        alpha, beta = _numbers(double)
        for buffer in (out, a, b):
            buffer.used_by(on)
        self._on(
            on,
            self._gemm,
            *(int(p.turned_b), int(p.turned_a), p.n, p.m, p.k, ctypes.byref(alpha)),
            *(right, kind, p.ldb, p.steps[2], left, kind, p.lda, p.steps[1]),
            *(ctypes.byref(beta), to, kind, p.ldc, p.steps[0], p.count, compute, -1),
        )


class Hipblas(_Handled):
    """hipBLAS for one device, in float32 and float64."""

    prefix = "hipblas"
    dtypes = frozenset({"float32", "float64"})
    PLAIN, TURNED = 111, 112

    def __init__(self, opened: Opened, library: Library) -> None:
        super().__init__(opened, library)
        self._gemms = {
            "float32": self._function("SgemmStridedBatched", GEMM),
            "float64": self._function("DgemmStridedBatched", GEMM),
        }
        self.name = f"hipBLAS ({library.path})"

    def multiply(self, product: Product, out: Buffer, a: Buffer, b: Buffer, on: Stream) -> None:
        p = product
        to, left, right = _addresses(p, out, a, b)
        alpha, beta = _numbers(p.dtype.name == "float64")
        words = [self.TURNED if each else self.PLAIN for each in (p.turned_b, p.turned_a)]
        for buffer in (out, a, b):
            buffer.used_by(on)
        self._on(
            on,
            self._gemms[p.dtype.name],
            *(*words, p.n, p.m, p.k, ctypes.byref(alpha)),
            *(right, p.ldb, p.steps[2], left, p.lda, p.steps[1]),
            *(ctypes.byref(beta), to, p.ldc, p.steps[0], p.count),
        )
