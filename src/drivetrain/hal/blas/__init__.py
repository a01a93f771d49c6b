"""Matrix products by the vendor's library: which one a device has, and why not where it has none.

`backend` finds the library once for each device that is open: cuBLAS, hipBLAS, CLBlast, and on the
cpu OpenBLAS or oneMKL. A library that is not there, or that does not do a small product right, is
passed over; the reason is kept. ``DRIVETRAIN_BLAS=own`` takes none, a path takes that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from drivetrain.errors import DrivetrainError, HalError
from drivetrain.hal.blas import finding
from drivetrain.hal.blas.finding import Library

if TYPE_CHECKING:
    from drivetrain.hal.dtype import DType
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream

__all__ = ["Blas", "Choice", "Product", "Unusable", "backend"]


@dataclass(frozen=True)
class Product:
    """C = A B in row-major order, ``count`` times; everything counts elements.

    A has m rows and k columns, and ``lda`` elements from one row to the next; turned, it lies in
    memory as k rows and m columns. B likewise with k and n. ``steps`` lead from one product's C, A
    and B to the next's.
    """

    dtype: DType
    m: int
    n: int
    k: int
    turned_a: bool
    turned_b: bool
    lda: int
    ldb: int
    ldc: int
    offsets: tuple[int, int, int] = (0, 0, 0)
    """Of C, A and B."""
    count: int = 1
    steps: tuple[int, int, int] = (0, 0, 0)
    tf32: bool = False
    """float32 may be rounded to TF32 first, where the device has it."""


class Blas(Protocol):
    """One library for one device."""

    name: str
    """With version and path, for people."""
    dtypes: frozenset[str]

    def multiply(self, product: Product, out: Buffer, a: Buffer, b: Buffer, on: Stream) -> None:
        """Queue it on the stream. Raises HalError."""


class Unusable(DrivetrainError):
    """Why a library is passed over."""


@dataclass(frozen=True)
class Choice:
    """What multiplies matrices on a device."""

    blas: Blas | None
    """None: our own kernels."""
    passed_over: tuple[str, ...] = ()
    """``library: reason`` for each that was found, or looked for, and not taken."""

    @property
    def name(self) -> str:
        return "own" if self.blas is None else self.blas.name

    @property
    def reason(self) -> str:
        """Why it is not the vendor's, or what came before it was passed over."""
        return "; ".join(self.passed_over)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.blas is None and self.reason else self.name


_KEY = "blas"


def backend(opened: Opened) -> Choice:
    """The device's choice, made at its first matrix product."""
    found = opened.kernels.get(_KEY)
    if not isinstance(found, Choice):
        with opened.lock:
            found = opened.kernels.get(_KEY)
            if not isinstance(found, Choice):
                found = opened.kernels[_KEY] = _choose(opened)
    return found


def _choose(opened: Opened) -> Choice:
    asked = finding.asked()
    if asked == "own":
        return Choice(None, (f"{finding.ASKED}=own",))
    kind = opened.backend.target.kind
    if opened.device.driver == "simulated":
        return Choice(None, ("a simulated device has no vendor's library",))
    if kind == "opencl" and opened.device.driver != "opencl":
        kind = opened.device.driver  # it takes OpenCL C, and its handles are not OpenCL's
    if kind not in _KINDS:
        return Choice(None, (f"no library is known for {kind} devices",))
    look, make, named = _KINDS[kind]
    candidates: Iterable[Library] = [Library(named, asked)] if asked else look()
    reasons: list[str] = []
    for library in candidates:
        try:
            blas = make(opened, library)
            _try(opened, blas)
        except (Unusable, HalError) as error:
            reasons.append(f"{library.path}: {error}")
        else:
            return Choice(blas, tuple(reasons))
    return Choice(None, tuple(reasons) or (f"no {named} library was found",))


def _try(opened: Opened, blas: Blas) -> None:
    """A small product of known numbers. Raises Unusable when it comes out wrong."""
    import struct

    from drivetrain.hal.dtype import DTYPES

    on = opened.inner_stream("blas")
    a, b = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (7.0, -1.0, 8.0, 0.5, 9.0, 2.0)
    wanted = (50.0, 6.0, 122.0, 10.5)  # (2 x 3) (3 x 2)
    with (
        opened.device.alloc(24, stream=on) as left,
        opened.device.alloc(24, stream=on) as right,
        opened.device.alloc(16, stream=on) as out,
    ):
        left.copy_from(struct.pack("6f", *a), stream=on)
        right.copy_from(struct.pack("6f", *b), stream=on)
        out.fill(b"\xff", stream=on)
        product = Product(DTYPES["float32"], 2, 2, 3, False, False, 3, 2, 2)
        blas.multiply(product, out, left, right, on)
        host = bytearray(16)
        out.copy_to(host, stream=on)
        on.synchronize()
    found = struct.unpack("4f", host)
    if any(abs(x - y) > 1e-5 * abs(y) for x, y in zip(found, wanted, strict=True)) or not all(
        x == x for x in found
    ):
        raise Unusable(f"a product gave {found}, not {wanted}")


def _cpu(opened: Opened, library: Library) -> Blas:
    from drivetrain.hal.blas.cblas import Cblas

    return Cblas(opened, library)


def _cuda(opened: Opened, library: Library) -> Blas:
    from drivetrain.hal.blas.cublas import Cublas

    return Cublas(opened, library)


def _hip(opened: Opened, library: Library) -> Blas:
    from drivetrain.hal.blas.cublas import Hipblas

    return Hipblas(opened, library)


def _opencl(opened: Opened, library: Library) -> Blas:
    from drivetrain.hal.blas.clblast import Clblast

    return Clblast(opened, library)


Look = Callable[[], Iterable[Library]]
Make = Callable[["Opened", Library], Blas]

_KINDS: dict[str, tuple[Look, Make, str]] = {
    "cpu": (finding.host, _cpu, "openblas"),
    "cuda": (finding.cuda, _cuda, "cublas"),
    "hip": (finding.hip, _hip, "hipblas"),
    "opencl": (finding.opencl, _opencl, "clblast"),
}
