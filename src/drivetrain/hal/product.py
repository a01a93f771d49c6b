"""Matrix products of arrays: by the vendor's BLAS where there is one, else by our own kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal import blas, layout, strided, watch
from drivetrain.hal.array import Array
from drivetrain.hal.blas import Product
from drivetrain.hal.dtype import promoted
from drivetrain.hal.kernels import gemm, gemm_panels
from drivetrain.hal.kernels.family import kernel, launch
from drivetrain.hal.opened import opened
from drivetrain.hal.registry import device as find

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.stream import Stream

_MOST_BATCHES = 65535
_INT32 = (1 << 31) - 1


def matmul(x1: Any, x2: Any, /, *, stream: Stream | None = None) -> Array:
    """The matrix product over the last two axes; others are broadcast. One dimension is a row on
    the left and a column on the right, and goes away."""
    if not isinstance(x1, Array) or not isinstance(x2, Array):
        raise BadInput("matmul takes two arrays; make them with ops.asarray")
    if not x1.ndim or not x2.ndim:
        raise BadInput("matmul: an array of no dimensions is no matrix; use multiply")
    common = promoted(x1.dtype, x2.dtype)
    if common.kind == "bool":
        raise BadInput("matmul is for numbers, not for bool; convert with astype")
    on = strided.stream_for((x1, x2), stream, "matmul")
    a, b = (x if x.dtype == common else strided.astype(x, common, on) for x in (x1, x2))
    a = a[None, :] if x1.ndim == 1 else a
    b = b[:, None] if x2.ndim == 1 else b
    if a.shape[-1] != b.shape[-2]:
        raise BadInput(
            f"matmul: the shapes {x1.shape} and {x2.shape} do not fit: "
            f"{a.shape[-1]} columns meet {b.shape[-2]} rows"
        )
    batch = layout.broadcast(a.shape[:-2], b.shape[:-2], op="matmul")
    out = strided.new((*batch, a.shape[-2], b.shape[-1]), common, on)
    if out.size and not a.shape[-1]:
        out.memory.buffer.fill(bytes(common.nbytes), stream=on)
    elif out.size:
        _multiply(out, a, b, batch, on)
    if x1.ndim == 1:
        out = out[..., 0, :]
    return out[..., 0] if x2.ndim == 1 else out


def multiply(
    out: Array, a: Array, b: Array, *, stream: Stream | None = None, tf32: bool = False
) -> None:
    """Write the product over the last two axes to ``out``, all three of one type; batches of ``a``
    and ``b`` are broadcast to that of ``out``. ``tf32``: float32 may be rounded to TF32 first,
    where the library and the device have it. Raises BadInput."""
    on = strided.stream_for((out, a, b), stream, "multiply")
    if not out.dtype == a.dtype == b.dtype or out.dtype.kind == "bool":
        raise BadInput(f"multiply: the types {out.dtype}, {a.dtype} and {b.dtype} must be one")
    fits = min(out.ndim, a.ndim, b.ndim) >= 2 and a.shape[-1] == b.shape[-2]
    if not fits or out.shape[-2:] != (a.shape[-2], b.shape[-1]):
        raise BadInput(f"multiply: {a.shape} times {b.shape} does not give {out.shape}")
    batch = out.shape[:-2]
    if layout.broadcast(batch, a.shape[:-2], b.shape[:-2], op="multiply") != batch:
        raise BadInput(f"multiply: {a.shape} times {b.shape} does not give {out.shape}")
    shared = out.memory.buffer.ptr in (a.memory.buffer.ptr, b.memory.buffer.ptr)
    if not layout.is_compact(out.shape, out.strides) or (shared and out.size):
        raise BadInput("multiply: the result needs memory of its own, without gaps")
    if out.size and a.shape[-1]:
        _multiply(out, a, b, batch, on, tf32)
    elif out.size:
        out.assign(0.0 if out.dtype.kind == "float" else 0, stream=on)


def _multiply(out: Array, a: Array, b: Array, batch: Shape, on: Stream, tf32: bool = False) -> None:
    choice = blas.backend(opened(on.device))
    if choice.blas is not None and a.dtype.name in choice.blas.dtypes:
        fitted = _fitted(out, a, b, batch, on, tf32)
        if fitted is not None:
            product, a, b = fitted
            used = out.writes(on), a.reads(on), b.reads(on)
            with _told(choice, product, on) if watch.active else watch.NOBODY:
                choice.blas.multiply(product, *used, on)
            return
    own(out, a, b, batch, on)


def _told(choice: blas.Choice, p: Product, on: Stream) -> AbstractContextManager[None]:
    """Tell those who watch of a library's product, as of a kernel; the cpu's is a kernel anyway."""
    if opened(on.device).backend.target.kind == "cpu":
        return watch.NOBODY
    name = f"matrix product by {choice.name.partition(' (')[0]}"
    work = watch.Work("kernel", name, on._opened, on.handle, captured=on._graph is not None)
    work.nbytes = p.dtype.nbytes * p.count * (p.m * p.k + p.k * p.n + p.m * p.n)
    work.flops, work.dtype = 2.0 * p.m * p.n * p.k * p.count, p.dtype.name
    return watch.around(work)


def _fitted(
    out: Array, a: Array, b: Array, batch: Shape, on: Stream, tf32: bool
) -> tuple[Product, Array, Array] | None:
    """The product as a BLAS takes it, with operands that it can read; None where it cannot."""
    a, b = _lined(a, on), _lined(b, on)
    steps = [layout.stretched(x.shape[:-2], x.strides[:-2], batch, "matmul") for x in (out, a, b)]
    extents, walks = layout.joined(batch, *steps)
    (m, k), n = a.shape[-2:], b.shape[-1]
    if len(extents) > 1 or max(m, n, k, *a.strides, *b.strides) > _INT32:
        return None
    if extents and extents[0] > _MOST_BATCHES:
        return None
    turned_a, lda = _leading(a)
    turned_b, ldb = _leading(b)
    product = Product(
        a.dtype,
        *(m, n, k, turned_a, turned_b, lda, ldb, max(n, 1)),
        offsets=(out.offset, a.offset, b.offset),
        count=extents[0] if extents else 1,
        steps=(walks[0][0], walks[1][0], walks[2][0]) if extents else (0, 0, 0),
        tf32=tf32,
    )
    return product, a, b


def _lined(x: Array, on: Stream) -> Array:
    """The array, or a copy whose rows lie one after the other."""
    (rows, columns), (down, along) = x.shape[-2:], x.strides[-2:]
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return x
    if (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return x
    return strided.compact(x, on, always=True)


def _leading(x: Array) -> tuple[bool, int]:
    """(whether its columns are what lies together, elements from one line to the next)."""
    (rows, columns), (down, along) = x.shape[-2:], x.strides[-2:]
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return False, max(down if rows > 1 else columns, 1)
    return True, max(along if columns > 1 else rows, 1)


def matmul_backend(device: Device | str = "") -> str:
    """What multiplies matrices on a device: the library's name, version and path, or ``own`` and
    why it is not a library."""
    found = find(device) if isinstance(device, str) else device
    return str(blas.backend(opened(found)))


def own(out: Array, a: Array, b: Array, batch: Shape, on: Stream) -> None:
    """By our own kernels."""
    dtype, (m, k), n = a.dtype, a.shape[-2:], b.shape[-1]
    if n > gemm.MOST_COLUMNS:
        for part in (slice(None, n // 2), slice(n // 2, None)):
            own(out[..., part], a, b[..., part], batch, on)
        return
    panels = gemm_panels.serves(on.device)
    strips = opened(on.device).backend.target.kind == "cpu"
    if strips and n > 1 and b.strides[-1] != 1:
        b = strided.compact(b, on)
    steps = [layout.stretched(x.shape[:-2], x.strides[:-2], batch, "matmul") for x in (out, a, b)]
    extents, walks = layout.joined(batch, *steps)
    count = prod(extents)
    extents, walks = layout.padded(extents, walks, layout.rank_class(len(extents)))
    if count > _MOST_BATCHES:
        half = batch[0] // 2 or 1
        for part in (slice(None, half), slice(half, None)) if batch[0] > 1 else ():
            _part(out, a, b, batch, part, on)
        if batch[0] == 1:
            own(out[0], _first(a, len(batch)), _first(b, len(batch)), batch[1:], on)
        return
    if panels:
        found = gemm_panels.kernel_for(on.device, dtype, len(extents))
    else:
        turned_b = not strips and b.strides[-1] != 1
        along_k = a.strides[-1] == 1
        found = kernel(
            on.device, "gemm", gemm.chosen, dtype, len(extents), strips, along_k, turned_b
        )
    if found._work is None:
        gemm.declared(found, dtype)
    packed = gemm.product(
        (m, n, k),
        (out.offset, a.offset, b.offset),
        (*a.strides[-2:], *b.strides[-2:], *out.strides[-2:]),
        extents,
        (walks[0], walks[1], walks[2]),
    )
    arguments = out.writes(on), a.reads(on), b.reads(on), packed
    if panels:
        rule, tile = gemm_panels.rule(m, n, count)
        launch(found, on, rule, *arguments, tile)
    else:
        launch(found, on, gemm.rule(m, n, count, strips=strips), *arguments)


def _first(x: Array, rank: int) -> Array:
    return x[0] if x.ndim - 2 == rank else x


def _part(out: Array, a: Array, b: Array, batch: Shape, part: slice, on: Stream) -> None:
    """A part of the outermost batch dimension."""
    cut = [x[part] if x.ndim - 2 == len(batch) and x.shape[0] > 1 else x for x in (out, a, b)]
    own(cut[0], cut[1], cut[2], cut[0].shape[:-2], on)
