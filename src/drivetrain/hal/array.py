"""A small array of n dimensions over a buffer, on any device that runs kernels.

An array has a stream. Operations are queued on the ``stream=`` that they are given, or else on
their first operand's, and their result has that stream; wherever memory passes from one stream to
another, the second waits for the first. Nothing waits on the host but what reads elements there:
``numpy``, ``tolist``, ``item``, ``__dlpack__``, ``bool(x)`` and so on.

Views (slices, transposes, most reshapes) share the memory of what they are made from. Names and
rules are those of the Python array API standard; ``ops`` is its namespace.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal import dlpack, layout, strided
from drivetrain.hal.dtype import DType

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

__all__ = ["Array", "Memory"]

_MOST_SHOWN = 1000


class Memory:
    """A buffer that arrays share, and the stream that wrote to it last."""

    __slots__ = ("buffer", "writer")

    def __init__(self, buffer: Buffer, writer: Stream) -> None:
        self.buffer = buffer
        self.writer = writer


def _behind(stream: Stream, other: Stream | None) -> None:
    """What is queued on ``stream`` from here on comes after what is queued on ``other``."""
    while other is not None and not other.handle:
        other = other._heir  # it was closed: what was queued on it goes on there
    if other is not None and other is not stream:
        stream.wait(other)


class Array:
    """Elements of one type in the memory of one device. Made by the functions of ``ops``."""

    __slots__ = ("__weakref__", "dtype", "memory", "offset", "shape", "stream", "strides")

    def __init__(
        self,
        memory: Memory,
        offset: int,
        shape: Shape,
        strides: Shape,
        dtype: DType,
        stream: Stream,
    ) -> None:
        self.memory = memory
        self.offset = offset
        """Of the first element in the memory, in elements."""
        self.shape = shape
        self.strides = strides
        """In elements."""
        self.dtype = dtype
        self.stream = stream
        """Where operations are queued that are not told where."""

    # -- what it is ----------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        return self.memory.buffer.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.nbytes

    @property
    def T(self) -> Array:
        """The transpose of a matrix, as a view."""
        if self.ndim != 2:
            raise BadInput(f"T is for 2 dimensions, this array has {self.ndim}; use mT")
        return self.mT

    @property
    def mT(self) -> Array:
        """The last two axes swapped, as a view."""
        if self.ndim < 2:
            raise BadInput(f"mT is for 2 dimensions or more, this array has {self.ndim}")
        axes = (*range(self.ndim - 2), self.ndim - 1, self.ndim - 2)
        return self._view(
            self.offset,
            tuple(self.shape[at] for at in axes),
            tuple(self.strides[at] for at in axes),
        )

    def _view(self, offset: int, shape: Shape, strides: Shape) -> Array:
        return Array(self.memory, offset, shape, strides, self.dtype, self.stream)

    @property
    def live_stream(self) -> Stream:
        """`stream`, or the device's default one where that was closed."""
        from drivetrain.hal.creation import default_stream

        return self.stream if self.stream.handle else default_stream(self.device)

    def reads(self, stream: Stream) -> Buffer:
        """The buffer, to be read by what is queued on ``stream`` next."""
        memory = self.memory
        if memory.writer is not stream:
            _behind(stream, memory.writer)
        return memory.buffer

    def writes(self, stream: Stream) -> Buffer:
        """The buffer, to be written by what is queued on ``stream`` next."""
        memory = self.memory
        buffer = memory.buffer
        if memory.writer is not stream:
            _behind(stream, memory.writer)
            memory.writer = stream
        for user in tuple(buffer._users or ()):
            if user is not stream:
                _behind(stream, user)
        if buffer._home is not stream:
            _behind(stream, buffer._home)
        return buffer

    # -- parts ---------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Array:
        """A view: ints, slices, ``...`` and None."""
        offset, shape, strides = layout.indexed(self.shape, self.strides, key)
        return self._view(self.offset + offset, shape, strides)

    def __setitem__(self, key: Any, value: Any) -> None:
        self[key].assign(value)

    def assign(self, value: Any, *, stream: Stream | None = None) -> None:
        """Write an array, which is broadcast, or a number to every element, here in its memory.

        The type of what is written must promote to this one's. Raises BadInput.
        """
        from drivetrain.hal import ops

        if any(s == 0 and n > 1 for n, s in zip(self.shape, self.strides, strict=True)):
            raise BadInput("a view that repeats elements cannot be written to; copy it first")
        if isinstance(value, Array):
            on = strided.stream_for((self, value), stream, "assign")
            if ops.result_type(self.dtype, value.dtype) != self.dtype:
                raise BadInput(
                    f"elements of {value.dtype} are not written to an array of {self.dtype}; "
                    "convert them with astype"
                )
            if value.dtype == self.dtype:
                strided.copied(value, on, self)
            else:
                strided.elementwise("astype", (value,), self.dtype, self.dtype, on, out=self)
            return
        on = strided.stream_for((self,), stream, "assign")
        single = ops.full((), value, dtype=self.dtype, stream=on)
        strided.copied(single, on, self)

    # -- elsewhere -----------------------------------------------------------------------------

    def to(self, device: Device | str, *, stream: Stream | None = None) -> Array:
        """The same elements on another device; on its own device the array itself.

        ``stream`` belongs to either device and orders the copy; without it the new array has the
        default stream of ``ops`` there. No wait on the host, where the devices can wait for each
        other.
        """
        from drivetrain.hal import ops
        from drivetrain.hal.registry import device as find

        target = find(device) if isinstance(device, str) else device
        if target == self.device:
            if stream is None or stream is self.stream:
                return self
            if stream.device != target:
                raise BadInput(f"to: the stream is on {stream.device}, the array on {target}")
            return Array(self.memory, self.offset, self.shape, self.strides, self.dtype, stream)
        ours = theirs = None
        if stream is not None and stream.device == target:
            theirs = stream
        elif stream is not None and stream.device == self.device:
            ours = stream
        elif stream is not None:
            raise BadInput(
                f"to: the stream is on {stream.device}, the copy goes from {self.device} to "
                f"{target}"
            )
        theirs = ops.default_stream(target) if theirs is None else theirs
        ours = self.live_stream if ours is None else ours
        whole = strided.compact(self, ours)
        made = strided.new(self.shape, self.dtype, theirs)
        if self.nbytes:
            start = whole.offset * self.dtype.nbytes
            source = whole.reads(ours).view(start, self.nbytes)
            _behind(theirs, ours)
            made.memory.buffer.view(0, self.nbytes).copy_from(source, stream=theirs)
        return made

    def to_device(self, device: Device | str, /, *, stream: Stream | None = None) -> Array:
        """`to`, by the standard's name."""
        return self.to(device, stream=stream)

    def _bytes(self) -> bytearray:
        """The elements on the host, in order, once all that was queued before is done."""
        host = bytearray(self.nbytes)
        on = self.live_stream
        whole = strided.compact(self, on)
        if self.nbytes:
            start = whole.offset * self.dtype.nbytes
            whole.reads(on).view(start, self.nbytes).copy_to(host, stream=on)
        on.synchronize()
        return host

    def numpy(self) -> Any:
        """A numpy array with a copy of the elements."""
        try:
            import numpy as np
        except ModuleNotFoundError as error:
            raise Unsupported(
                "numpy is not installed; install it with: pip install 'drivetrain[kernels]', or "
                "use tolist",
                code="not_installed",
                op="numpy",
            ) from error
        if self.dtype == "bfloat16":
            raise BadInput("numpy has no bfloat16; convert with astype(float32) first")
        return np.frombuffer(self._bytes(), dtype=self.dtype.name).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("the elements are copied from the device")
        found = self.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)

    def tolist(self) -> Any:
        """The elements as nested lists of Python numbers; one number where there are no axes."""
        data = memoryview(self._bytes())
        flat: list[Any]
        if self.dtype == "bfloat16":
            words = data.cast("H").tolist()
            flat = [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
        else:
            flat = [value for (value,) in struct.iter_unpack(self.dtype.format, data)]
        for extent in reversed(self.shape[1:]):
            count = len(flat) // extent if extent else prod(self.shape[:-1])
            flat = [flat[i * extent : (i + 1) * extent] for i in range(count)]
        return flat if self.shape else flat[0]

    def item(self) -> Any:
        """The one element as a Python number."""
        if self.size != 1:
            raise BadInput(f"item: an array of shape {self.shape} has {self.size} elements, not 1")
        return self[(0,) * self.ndim].tolist() if self.ndim else self.tolist()

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.device_of(self.memory.buffer)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        """The same memory for others. Waits for what is queued on it."""
        if options.get("copy"):
            fresh = strided.compact(self, self.live_stream, always=True)
            return fresh.__dlpack__(stream=stream, **{**options, "copy": None})
        buffer = self.memory.buffer
        start = self.offset * self.dtype.nbytes
        at = buffer.view(start, buffer.nbytes - start) if self.size else buffer
        if stream != -1 and self.memory.writer.handle:
            self.memory.writer.synchronize()
        return dlpack.export(
            at, self.shape, self.strides, self.dtype.name, stream=stream, **options
        )

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        from drivetrain.hal import ops

        if api_version not in (None, *ops.API_VERSIONS):
            raise BadInput(
                f"the array API of {api_version} is not known; these are: "
                f"{', '.join(ops.API_VERSIONS)}"
            )
        return ops

    # -- numbers -------------------------------------------------------------------------------

    def _scalar(self, kinds: tuple[str, ...], what: str) -> Any:
        if self.ndim:
            raise BadInput(
                f"{what} is for arrays of no dimensions; this has the shape {self.shape} (item)"
            )
        if self.dtype.kind not in kinds:
            raise BadInput(f"an array of {self.dtype} gives no {what}; convert with astype")
        return self.tolist()

    def __bool__(self) -> bool:
        return bool(self._scalar(("bool", "int", "uint", "float"), "bool"))

    def __int__(self) -> int:
        return int(self._scalar(("bool", "int", "uint", "float"), "int"))

    def __float__(self) -> float:
        return float(self._scalar(("bool", "int", "uint", "float"), "float"))

    def __index__(self) -> int:
        return int(self._scalar(("int", "uint"), "index"))

    def __repr__(self) -> str:
        facts = f"dtype={self.dtype}, device={self.device.address!r}"
        if self.size > _MOST_SHOWN or self.memory.buffer.closed:
            return f"Array(shape={self.shape}, {facts})"
        return f"Array({self.tolist()!r}, {facts})"

    __hash__ = None  # type: ignore[assignment]  # == gives an array
    __array_ufunc__ = None  # numpy's operators leave it to ours, or fail: no silent copies
    if TYPE_CHECKING:  # made below, one by one

        def __add__(self, other: Any, /) -> Array: ...
        def __radd__(self, other: Any, /) -> Array: ...
        def __sub__(self, other: Any, /) -> Array: ...
        def __rsub__(self, other: Any, /) -> Array: ...
        def __mul__(self, other: Any, /) -> Array: ...
        def __rmul__(self, other: Any, /) -> Array: ...
        def __truediv__(self, other: Any, /) -> Array: ...
        def __rtruediv__(self, other: Any, /) -> Array: ...
        def __floordiv__(self, other: Any, /) -> Array: ...
        def __mod__(self, other: Any, /) -> Array: ...
        def __pow__(self, other: Any, /) -> Array: ...
        def __matmul__(self, other: Any, /) -> Array: ...
        def __and__(self, other: Any, /) -> Array: ...
        def __or__(self, other: Any, /) -> Array: ...
        def __xor__(self, other: Any, /) -> Array: ...
        def __lshift__(self, other: Any, /) -> Array: ...
        def __rshift__(self, other: Any, /) -> Array: ...
        def __lt__(self, other: Any, /) -> Array: ...
        def __le__(self, other: Any, /) -> Array: ...
        def __gt__(self, other: Any, /) -> Array: ...
        def __ge__(self, other: Any, /) -> Array: ...
        def __eq__(self, other: Any, /) -> Array: ...  # type: ignore[override]
        def __ne__(self, other: Any, /) -> Array: ...  # type: ignore[override]
        def __neg__(self) -> Array: ...
        def __pos__(self) -> Array: ...
        def __abs__(self) -> Array: ...
        def __invert__(self) -> Array: ...


_BINARY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide",
    "floordiv": "floor_divide", "mod": "remainder", "pow": "pow", "matmul": "matmul",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
}  # fmt: skip
_COMPARED = {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
    "ne": "not_equal",
}  # fmt: skip
_UNARY = {"neg": "negative", "pos": "positive", "abs": "abs", "invert": "bitwise_invert"}


def _operator(name: str, kind: str) -> Callable[..., Any]:
    def operator(self: Array, *others: Any) -> Any:
        from drivetrain.hal import ops

        if others and not isinstance(others[0], (Array, bool, int, float)):
            return NotImplemented
        call = getattr(ops, name)
        if kind == "reflected":
            return call(others[0], self, stream=self.stream)
        if kind == "in place":
            result = call(self, others[0])
            if result.shape != self.shape:
                raise BadInput(
                    f"{name} in place: the result's shape {result.shape} is not {self.shape}"
                )
            self.assign(result)
            return self
        return call(self, *others)

    operator.__doc__ = f"``ops.{name}``"
    return operator


for _short, _name in _BINARY.items():
    setattr(Array, f"__{_short}__", _operator(_name, ""))
    setattr(Array, f"__r{_short}__", _operator(_name, "reflected"))
    setattr(Array, f"__i{_short}__", _operator(_name, "in place"))
for _short, _name in {**_COMPARED, **_UNARY}.items():
    setattr(Array, f"__{_short}__", _operator(_name, ""))
