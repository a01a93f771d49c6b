"""New arrays: from numbers, the host's memory and others' (the creation functions of ``ops``)."""

from __future__ import annotations

import struct
from math import prod
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal import dlpack, layout, strided
from drivetrain.hal.array import Array, Memory
from drivetrain.hal.dtype import DTYPES, DType, dtype_of, scalar_dtype, scalar_for
from drivetrain.hal.opened import opened
from drivetrain.hal.registry import device as find

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

_FORMATS = {
    "?": "bool", "b": "int8", "h": "int16", "i": "int32", "l": "int64", "q": "int64",
    "B": "uint8", "H": "uint16", "I": "uint32", "L": "uint64", "Q": "uint64",
    "e": "float16", "f": "float32", "d": "float64",
}  # fmt: skip


def default_stream(device: Device | str = "") -> Stream:
    """The stream of a device's arrays where none is named; one a process."""
    found = find(device) if isinstance(device, str) else device
    return opened(found).inner_stream("arrays")


def stream_of(device: Device | str | None, stream: Stream | None, op: str) -> Stream:
    """The stream for a new array: ``stream``, or the default one of ``device`` (None: the default
    device). Raises BadInput where the two do not belong together."""
    if stream is None:
        return default_stream("" if device is None else device)
    if device is not None:
        asked = find(device) if isinstance(device, str) else device
        if asked != stream.device:
            raise BadInput(f"{op}: the stream is on {stream.device}, asked was {asked}")
    return stream


def empty(
    shape: Any,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Undefined elements, float32 unless ``dtype``."""
    kind = DTYPES["float32"] if dtype is None else dtype_of(dtype)
    return strided.new(layout.shape_of(shape, "empty"), kind, stream_of(device, stream, "empty"))


def full(
    shape: Any,
    fill_value: Any,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """One number throughout; its type decides where ``dtype`` does not."""
    kind = scalar_dtype(fill_value) if dtype is None else dtype_of(dtype)
    found = empty(shape, dtype=kind, device=device, stream=stream)
    if kind.kind == "float" and not isinstance(fill_value, (bool, int, float)):
        fill_value = float(fill_value)
    value = scalar_for(kind, fill_value, "full")
    if found.size:
        found.memory.buffer.fill(_element(value, kind), stream=found.stream)
    return found


def _element(value: Any, kind: DType) -> bytes:
    if kind.kind == "float" and kind.nbytes < 8:
        from drivetrain.hal.random import rounded

        value = rounded(value, kind)
    if kind.kind == "float" and value in (float("inf"), float("-inf")) and kind.nbytes == 2:
        high = {"float16": 0x7C00, "bfloat16": 0x7F80}[kind.name]
        return struct.pack("<H", high | (0x8000 if value < 0 else 0))
    return kind.packed(value)


def zeros(
    shape: Any,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Zeros, float32 unless ``dtype``."""
    return _filled(shape, 0, dtype, device, stream)


def ones(
    shape: Any,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Ones, float32 unless ``dtype``."""
    return _filled(shape, 1, dtype, device, stream)


def _filled(shape: Any, value: int, dtype: Any, device: Any, stream: Any) -> Array:
    kind = DTYPES["float32"] if dtype is None else dtype_of(dtype)
    told = bool(value) if kind.kind == "bool" else value
    return full(shape, told, dtype=kind, device=device, stream=stream)


def _like(x: Array, dtype: Any, device: Any, stream: Any) -> dict[str, Any]:
    if device is None and stream is None:
        stream = x.stream
    return {"dtype": x.dtype if dtype is None else dtype, "device": device, "stream": stream}


def empty_like(
    x: Array,
    /,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """As large as ``x``, on its device and stream unless told otherwise; undefined."""
    return empty(x.shape, **_like(x, dtype, device, stream))


def full_like(
    x: Array,
    /,
    fill_value: Any,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """As large as ``x``, one number throughout."""
    return full(x.shape, fill_value, **_like(x, dtype, device, stream))


def zeros_like(
    x: Array,
    /,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """As large as ``x``, zeros."""
    return zeros(x.shape, **_like(x, dtype, device, stream))


def ones_like(
    x: Array,
    /,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """As large as ``x``, ones."""
    return ones(x.shape, **_like(x, dtype, device, stream))


def arange(
    start: float,
    /,
    stop: float | None = None,
    step: float = 1,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Numbers from ``start`` (0 with one argument) to before ``stop``; int64 of ints, else
    float32, unless ``dtype``."""
    if stop is None:
        start, stop = 0, start
    if not step:
        raise BadInput("arange: the step is 0")
    whole = all(isinstance(each, int) for each in (start, stop, step))
    kind = DTYPES["int64" if whole else "float32"] if dtype is None else dtype_of(dtype)
    count = max(0, int(-((start - stop) // step)))
    return asarray(
        [start + i * step for i in range(count)], dtype=kind, device=device, stream=stream
    )


def eye(
    n_rows: int,
    n_cols: int | None = None,
    /,
    *,
    k: int = 0,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Ones on the ``k``-th diagonal, else zeros; float32 unless ``dtype``."""
    from drivetrain.hal import ops

    columns = n_rows if n_cols is None else n_cols
    on = stream_of(device, stream, "eye")
    row = ops.reshape(arange(n_rows, stream=on), (n_rows, 1))
    found = ops.equal(ops.add(row, k), arange(columns, stream=on))
    return ops.astype(found, "float32" if dtype is None else dtype, copy=False)


def asarray(
    obj: Any,
    /,
    *,
    dtype: Any = None,
    device: Device | str | None = None,
    stream: Stream | None = None,
    copy: bool | None = None,
) -> Array:
    """An array from one, from numbers in nested sequences, or from an object with the buffer
    protocol (numpy's arrays) or ``__dlpack__`` (torch's tensors).

    Memory of the host is copied; with ``copy=False`` that is BadInput, and `from_dlpack` shares
    it. The type is that of the object: of Python numbers bool, int64 or float32.
    """
    kind = None if dtype is None else dtype_of(dtype)
    if isinstance(obj, Array):
        found = (
            obj
            if device is None and stream is None
            else obj.to(stream_of(device, stream, "asarray").device, stream=stream)
        )
    elif isinstance(obj, (bool, int, float, list, tuple)):
        found = _of_numbers(obj, kind, stream_of(device, stream, "asarray"), copy)
    else:
        found = _of_memory(obj, device, stream, copy)
    if kind is not None and kind != found.dtype:
        if copy is False:
            raise BadInput(f"asarray: {found.dtype} does not become {kind} without a copy")
        return strided.astype(found, kind, found.stream)
    if copy and found.memory is getattr(obj, "memory", None):
        return strided.compact(found, found.stream, always=True)
    return found


def _of_numbers(obj: Any, kind: DType | None, on: Stream, copy: bool | None) -> Array:
    if copy is False:
        raise BadInput("asarray: Python numbers do not become an array without a copy")
    shape: list[int] = []
    level = obj
    while isinstance(level, (list, tuple)):
        shape.append(len(level))
        if not level:
            break
        level = level[0]
    flat: list[Any] = []
    _flatten(obj, tuple(shape), flat)
    if kind is None:
        kinds = {bool: 0, int: 1, float: 2}
        most = max((kinds.get(type(each), 2) for each in flat), default=2)
        least = min((kinds.get(type(each), 2) for each in flat), default=2)
        if least == 0 and most > 0:
            raise BadInput("asarray: bools and numbers do not mix; name the dtype")
        kind = DTYPES[("bool", "int64", "float32")[most]]
    values = [_converted(each, kind) for each in flat]
    if kind.name in ("float16", "bfloat16", "float32"):
        data = b"".join(_element(each, kind) for each in values)
    else:
        data = struct.pack(f"{len(values)}{kind.format}", *values)
    return _uploaded(data, tuple(shape), kind, on)


def _converted(value: Any, kind: DType) -> Any:
    """A Python number as an element of ``kind``, as a cast would make it."""
    if kind.kind == "bool":
        return bool(value)
    if kind.kind == "float":
        return float(value)
    return scalar_for(kind, int(value), "asarray")


def _flatten(value: Any, shape: tuple[int, ...], flat: list[Any]) -> None:
    if not shape:
        if isinstance(value, Array):
            value = value.item()
        if isinstance(value, (list, tuple)) or not hasattr(value, "__float__"):
            raise BadInput(f"asarray: {value!r} is no number, or the rows differ in length")
        flat.append(value if isinstance(value, (bool, int, float)) else float(value))
        return
    if not isinstance(value, (list, tuple)) or len(value) != shape[0]:
        raise BadInput("asarray: the rows differ in length")
    for each in value:
        _flatten(each, shape[1:], flat)


def _uploaded(data: Any, shape: tuple[int, ...], kind: DType, on: Stream) -> Array:
    found = strided.new(shape, kind, on)
    if found.nbytes:
        found.memory.buffer.copy_from(data, stream=on)
    return found


def _of_memory(obj: Any, device: Any, stream: Stream | None, copy: bool | None) -> Array:
    try:
        view = memoryview(obj)
    except (TypeError, ValueError, BufferError):
        return _of_tensor(obj, device, stream, copy)
    name = _FORMATS.get(view.format.lstrip("@=<"))
    if name is None:
        raise BadInput(f"asarray: elements of format {view.format!r} are not known")
    if copy is False:
        raise BadInput("asarray: memory of the host is copied; from_dlpack shares it")
    data = view if view.c_contiguous and view.ndim else view.tobytes()
    return _uploaded(data, view.shape or (), DTYPES[name], stream_of(device, stream, "asarray"))


def _of_tensor(obj: Any, device: Any, stream: Stream | None, copy: bool | None) -> Array:
    if not hasattr(obj, "__dlpack__"):
        raise BadInput(f"asarray: a {type(obj).__name__} is no number, sequence or array")
    found = from_dlpack(obj, stream=stream)
    if found.device.driver != "cpu" and device is None and stream is None:
        on = found.stream
    else:
        on = stream_of(device, stream, "asarray")
    if found.device != on.device:
        if copy is False:
            raise BadInput(f"asarray: memory of {found.device} is copied to {on.device}")
        return _out_of(found, found.to(on.device, stream=on))
    return found if copy is False else _out_of(found, strided.compact(found, on, always=True))


def _out_of(source: Array, copied: Array) -> Array:
    """``copied``, done where the source is memory of the host: its owner may write it at any time,
    with no stream that such a write could wait for. In a capture the copy has yet to come."""
    if source.device.driver == "cpu" and copied.stream._graph is None:
        copied.stream.synchronize()
    return copied


def from_dlpack(
    x: Any, /, *, device: Device | str | None = None, stream: Stream | None = None
) -> Array:
    """The memory of somebody else's array or tensor, shared: what one side writes the other sees.

    It is on the device that it is on; with another ``device`` a copy. Raises BadInput for types
    that are not known here.
    """
    handle = None if stream is None else stream.handle
    tensor = dlpack.imported(x, stream=handle)
    kind = dtype_of(tensor.dtype)
    driver = dlpack.driver_of(tensor.device[0])
    where = find(f"{driver}:{0 if driver == 'cpu' else tensor.device[1]}")
    low, high = layout.span(tensor.shape, tensor.strides)
    start = tensor.ptr + low * kind.nbytes
    nbytes = (high - low + 1) * kind.nbytes
    buffer = where.wrap(start if nbytes else 0, nbytes, owner=tensor)
    on = stream if stream is not None and stream.device == where else default_stream(where)
    found = Array(Memory(buffer, on), -low, tensor.shape, tensor.strides, kind, on)
    if not prod(tensor.shape):
        found = Array(found.memory, 0, tensor.shape, layout.compact(tensor.shape), kind, on)
    asked = None if device is None else (find(device) if isinstance(device, str) else device)
    if asked is None or asked == where:
        return found
    return _out_of(found, found.to(asked, stream=stream))
