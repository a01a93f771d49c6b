"""Kernels over arrays: walks that are as short as they can be, and results that have no gaps.

Order: an operation on a stream waits for the stream that wrote each operand last. One that writes
into memory that is there already waits for all that use it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal import layout
from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import elementwise as element_kernels
from drivetrain.hal.kernels import gather as gather_kernels
from drivetrain.hal.kernels import reduction as reductions
from drivetrain.hal.kernels import softmax as softmax_kernels
from drivetrain.hal.kernels import text, transpose
from drivetrain.hal.kernels.elementwise import Operand
from drivetrain.hal.kernels.family import kernel, launch
from drivetrain.hal.opened import opened

if TYPE_CHECKING:
    from drivetrain.hal.array import Array
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.stream import Stream

_PARALLEL_ROWS = 1 << 14
"""From so many rows on, a thread or block for each keeps a GPU busy without cutting rows."""


def stream_for(arrays: tuple[Array, ...], stream: Stream | None, op: str) -> Stream:
    """Where an operation on these arrays is queued: ``stream``, or else the first one's own.
    Raises BadInput for arrays or a stream of different devices."""
    found = arrays[0].live_stream if stream is None else stream
    for each in arrays:
        if each.device != found.device:
            what = "the stream" if stream is not None else "another operand"
            raise BadInput(
                f"{op}: an operand is on {each.device} and {what} on {found.device}; move one "
                "with to(device)"
            )
    return found


def new(shape: Shape, dtype: DType, stream: Stream) -> Array:
    """An array without gaps whose elements are undefined. Raises Unsupported for a type that the
    device cannot calculate with."""
    from drivetrain.hal.array import Array, Memory

    text.require(stream.device, opened(stream.device).backend.target, dtype)
    buffer = stream.device.alloc(prod(shape) * dtype.nbytes, stream=stream)
    memory = Memory(buffer, stream)
    return Array(memory, 0, shape, layout.compact(shape), dtype, stream)


def elementwise(
    name: str,
    operands: tuple[Any, ...],
    common: DType,
    to: DType,
    stream: Stream,
    out: Array | None = None,
) -> Array:
    """One of `expressions.OPERATIONS` over arrays and numbers, calculated in ``common``. Writes to
    ``out``, or else a new array of type ``to``."""
    from drivetrain.hal.array import Array

    arrays = [each for each in operands if isinstance(each, Array)]
    text.require(stream.device, opened(stream.device).backend.target, common)
    if out is None:
        shape = layout.broadcast(*(each.shape for each in arrays), op=name)
        out = new(shape, to, stream)
    shape = out.shape
    arrays = [_apart(each, out, stream) for each in arrays]
    steps = [layout.stretched(each.shape, each.strides, shape, name) for each in arrays]
    if not out.size:
        return out
    extents, strides = layout.joined(shape, out.strides, *steps)
    offsets = (out.offset, *(each.offset for each in arrays))
    inner, rows, outer, words, packed = element_kernels.walk(extents, offsets, strides)
    kinds: list[Operand] = []
    values: list[Any] = []
    at = 0
    for each in operands:
        if isinstance(each, Array):
            kinds.append(Operand(each.dtype, words[at + 1]))
            values.append(arrays[at].reads(stream))
            at += 1
        else:
            kinds.append(Operand(common, "value"))
            values.append(each)
    found = kernel(
        stream.device,
        element_kernels.kernel_name(name, common),
        element_kernels.elementwise,
        name,
        common,
        Operand(out.dtype, words[0]),
        tuple(kinds),
        outer,
    )
    rule = element_kernels.rule(inner, rows)
    launch(found, stream, rule, out.writes(stream), *values, packed)
    return out


def _apart(array: Array, out: Array, stream: Stream) -> Array:
    """The array, or a copy of it where writing ``out`` would change elements yet to be read."""
    shared = array.memory.buffer.ptr == out.memory.buffer.ptr
    if not shared or not array.size or _same_place(array, out):
        return array
    return copied(array, stream)


def _same_place(a: Array, b: Array) -> bool:
    return (a.offset, a.shape, a.strides, a.dtype) == (b.offset, b.shape, b.strides, b.dtype)


def astype(array: Array, dtype: DType, stream: Stream) -> Array:
    """A new array of another type."""
    common = dtype if dtype.kind != "bool" else array.dtype
    if dtype.kind != "bool" and dtype.nbytes < array.dtype.nbytes:
        common = array.dtype if array.dtype.kind == dtype.kind else dtype
    if array.dtype.kind == "float" and dtype.kind in ("int", "uint"):
        common = array.dtype  # C rounds to zero where it is stored
    return elementwise("astype", (array,), common, dtype, stream)


def compact(array: Array, stream: Stream, *, always: bool = False) -> Array:
    """The same elements without gaps: the array itself where it has none, unless ``always``."""
    if not always and layout.is_compact(array.shape, array.strides):
        return array
    extents, (strides,) = layout.joined(array.shape, array.strides)
    gpu = opened(stream.device).backend.target.kind != "cpu"
    if gpu and len(extents) == 2 and strides[0] == 1 and strides[1] >= extents[0]:
        rows, columns = extents[1], extents[0]
        if rows <= transpose.MOST_ROWS and columns < 1 << 31:
            out = new(array.shape, array.dtype, stream)
            found = kernel(stream.device, "transpose", transpose.source, array.dtype.nbytes)
            where = (out.writes(stream), array.reads(stream))
            rule = transpose.rule(rows, columns)
            launch(found, stream, rule, *where, rows, columns, strides[1], array.offset)
            return out
    return copied(array, stream)


def copied(array: Array, stream: Stream, out: Array | None = None) -> Array:
    """The elements in ``out``, which has their type, or in a new array: bit for bit, so one kernel
    does for all types of a size."""
    out = new(array.shape, array.dtype, stream) if out is None else out
    bits = DTYPES[f"uint{array.dtype.bits}"]
    source, target = _seen_as(array, bits), _seen_as(out, bits)
    elementwise("astype", (source,), bits, bits, stream, target)
    return out


def _seen_as(array: Array, dtype: DType) -> Array:
    from drivetrain.hal.array import Array

    return Array(array.memory, array.offset, array.shape, array.strides, dtype, array.stream)


# -- reductions ------------------------------------------------------------------------------------


def reduce(
    name: str,
    array: Array,
    axes: Shape,
    total: DType,
    out: DType,
    stream: Stream,
    result: Array | None = None,
) -> Array:
    """One of `reductions.NAMES` over ``axes``, which go away, calculated in ``total``. ``result``
    is for it, without gaps."""
    shape, strides = array.shape, array.strides
    kept = tuple(n for at, n in enumerate(shape) if at not in axes)
    gone = tuple(shape[at] for at in axes)
    result = new(kept, out, stream) if result is None else result
    if not result.size:
        return result
    count = prod(gone)
    if not count:
        start = {"prod": 1, "all": 1, "mean": float("nan")}.get(name, 0)
        result.memory.buffer.fill(out.packed(start), stream=stream)
        return result
    rows = prod(kept)
    kept_steps = tuple(s for at, s in enumerate(strides) if at not in axes)
    gone_steps = tuple(strides[at] for at in axes)
    while True:
        keeping, over = _walked(kept, kept_steps)
        going, along = _walked(gone, gone_steps)
        form = _form(stream, rows, count, over, along)
        parts = reductions.parts(rows, count, form)
        if rows >= _PARALLEL_ROWS and form != "ranges":
            parts = min(parts, max(1, count // 1024))
        last = parts == 1
        target = result if last else new((*kept, parts), total, stream)
        found = kernel(
            stream.device,
            reductions.kernel_name(name if last else _partial(name), array.dtype),
            reductions.source,
            name if last else _partial(name),
            array.dtype,
            total,
            target.dtype,
            len(keeping),
            len(going),
            form,
        )
        size = array_count(shape, axes) if name == "mean" else count
        packed = reductions.walk(
            rows, count, parts, array.offset, size, (keeping, over), (going, along)
        )
        rule = reductions.rule(rows, parts, form)
        launch(found, stream, rule, target.writes(stream), array.reads(stream), packed)
        if last:
            return result
        array, count = target, parts
        gone, gone_steps = (parts,), (1,)
        kept_steps = target.strides[:-1]


def _walked(shape: Shape, strides: Shape) -> tuple[Shape, Shape]:
    extents, steps = layout.joined(shape, strides)
    padded, (only,) = layout.padded(extents, steps, layout.rank_class(len(extents), 1))
    return padded, only


def array_count(shape: Shape, axes: Shape) -> int:
    """Elements that one result comes from."""
    return prod(shape[at] for at in axes)


def _partial(name: str) -> str:
    return "sum" if name == "mean" else name


def _form(stream: Stream, rows: int, count: int, over: Shape, along: Shape) -> str:
    """How the threads share the work: see `reductions.source`."""
    if over and over[-1] == 1 and along and along[-1] != 1:
        return "rows"
    if opened(stream.device).backend.target.kind == "cpu":
        return "ranges"
    return "block" if count > 64 else "spread"


def position(
    name: str, array: Array, axes: Shape, stream: Stream, result: Array | None = None
) -> Array:
    """``argmax`` or ``argmin`` over ``axes``, which go away; int64. ``result`` is for it, without
    gaps."""
    shape, strides = array.shape, array.strides
    kept = tuple(n for at, n in enumerate(shape) if at not in axes)
    gone = tuple(shape[at] for at in axes)
    result = new(kept, DTYPES["int64"], stream) if result is None else result
    if not result.size:
        return result
    if not prod(gone):
        raise BadInput(f"{name} of no elements: there is no such element")
    kept_steps = tuple(s for at, s in enumerate(strides) if at not in axes)
    keeping, over = _walked(kept, kept_steps)
    going, along = _walked(gone, tuple(strides[at] for at in axes))
    found = kernel(
        stream.device,
        reductions.kernel_name(name, array.dtype),
        reductions.position,
        name,
        array.dtype,
        len(keeping),
        len(going),
    )
    rows, count = prod(kept), prod(gone)
    packed = reductions.walk(rows, count, 1, array.offset, count, (keeping, over), (going, along))
    rule = reductions.rule(rows, 1, "rows")
    launch(found, stream, rule, result.writes(stream), array.reads(stream), packed)
    return result


# -- rows ------------------------------------------------------------------------------------------


def softmax(array: Array, logarithm: bool, stream: Stream, out: Array | None = None) -> Array:
    """Softmax over the last axis, or its logarithm. ``out`` is for it, without gaps."""
    out = new(array.shape, array.dtype, stream) if out is None else out
    if not out.size:
        return out
    columns = array.shape[-1]
    extents, (strides,) = layout.joined(array.shape[:-1], array.strides[:-1])
    if len(extents) > 1:
        array = compact(array, stream)
        extents, (strides,) = layout.joined(array.shape[:-1], array.strides[:-1])
    rows, down = (extents[0], strides[0]) if extents else (1, 0)
    short = columns <= softmax_kernels.SHORT
    found = kernel(stream.device, "softmax", softmax_kernels.source, array.dtype, logarithm, short)
    packed = softmax_kernels.rows_of(rows, columns, array.offset, down, array.strides[-1])
    rule = softmax_kernels.rule(rows, short)
    launch(found, stream, rule, out.writes(stream), array.reads(stream), packed)
    return out


def take(
    array: Array, positions: Array, axis: int, stream: Stream, out: Array | None = None
) -> Array:
    """Picks along one axis by a one-dimensional array of integers. ``out`` is for them, without
    gaps."""
    array, positions = compact(array, stream), compact(positions, stream)
    outer, inner = prod(array.shape[:axis]), prod(array.shape[axis + 1 :])
    extent, count = array.shape[axis], positions.size
    if out is None:
        out = new((*array.shape[:axis], count, *array.shape[axis + 1 :]), array.dtype, stream)
    if not out.size:
        return out
    if not extent:
        raise BadInput("take: there is nothing to take from an axis of extent 0")
    found = kernel(
        stream.device, "gather", gather_kernels.source, array.dtype.nbytes, positions.dtype
    )
    where = (out.writes(stream), array.reads(stream), positions.reads(stream))
    sizes = (array.offset, positions.offset, outer, extent, count, inner)
    launch(found, stream, gather_kernels.rule(out.size), *where, *sizes)
    return out
