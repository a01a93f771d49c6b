"""Operations on arrays, by the names and rules of the Python array API standard.

Only what a small network and calibration need. Every function that makes an array takes
``stream=``: where it is queued. Without it that is the first array's own stream, or for new arrays
the default stream of their device. Arrays of different devices do not mix; ``Array.to`` moves them.

``matmul`` uses the vendor's library where it finds one; `matmul_backend` says which. ``random`` are
numbers by Philox, the same on every device.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal import layout, random, strided
from drivetrain.hal.array import Array
from drivetrain.hal.creation import (
    arange,
    asarray,
    default_stream,
    empty,
    empty_like,
    eye,
    from_dlpack,
    full,
    full_like,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from drivetrain.hal.dtype import DTYPES, DType, dtype_of, isdtype, promoted, scalar_for
from drivetrain.hal.kernels.expressions import OPERATIONS
from drivetrain.hal.product import matmul, matmul_backend

if TYPE_CHECKING:
    from drivetrain.hal.stream import Stream

API_VERSIONS = ("2022.12", "2023.12", "2024.12")
__array_api_version__ = API_VERSIONS[-1]

int8, int16, int32, int64 = (DTYPES[f"int{n}"] for n in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DTYPES[f"uint{n}"] for n in (8, 16, 32, 64))
float16, float32, float64 = (DTYPES[f"float{n}"] for n in (16, 32, 64))
bfloat16 = DTYPES["bfloat16"]
e, pi, inf, nan, newaxis = math.e, math.pi, math.inf, math.nan, None


def __getattr__(name: str) -> Any:
    if name == "bool":  # not a name of this module's own: it would hide Python's
        return DTYPES["bool"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- types -----------------------------------------------------------------------------------------


def result_type(*arrays_and_types: Any) -> DType:
    """The type that a result of these arrays, types and Python numbers has."""
    types = [
        each.dtype if isinstance(each, Array) else dtype_of(each)
        for each in arrays_and_types
        if not isinstance(each, (builtins.bool, int, float))
    ]
    found = promoted(*types)
    for each in arrays_and_types:
        if isinstance(each, (builtins.bool, int, float)):
            scalar_for(found, each, "result_type")
    return found


def can_cast(from_: Any, to: Any, /) -> bool:
    """Whether the standard's promotion leads from one type to the other."""
    start = from_.dtype if isinstance(from_, Array) else dtype_of(from_)
    try:
        return promoted(start, dtype_of(to)) == dtype_of(to)
    except BadInput:
        return False


def astype(x: Array, dtype: Any, /, *, copy: bool = True, stream: Stream | None = None) -> Array:
    """The elements in another type. Floats are cut to integers; what does not fit an integer type
    is undefined."""
    to, on = dtype_of(dtype), strided.stream_for((x,), stream, "astype")
    if to == x.dtype:
        return strided.compact(x, on, always=True) if copy else x
    return strided.astype(x, to, on)


# -- elementwise -----------------------------------------------------------------------------------


def _apply(name: str, operands: tuple[Any, ...], stream: Stream | None) -> Array:
    arrays = tuple(each for each in operands if isinstance(each, Array))
    if not arrays:
        raise BadInput(f"{name} needs an array; make one with ops.asarray")
    operation = OPERATIONS[name]
    common = promoted(*(each.dtype for each in arrays))
    operation.check(name, common)
    on = strided.stream_for(arrays, stream, name)
    values = tuple(
        each if isinstance(each, Array) else scalar_for(common, each, name) for each in operands
    )
    to = DTYPES["bool"] if operation.to_bool else common
    return strided.elementwise(name, tuple(_stored(v, common) for v in values), common, to, on)


def _stored(value: Any, dtype: DType) -> Any:
    """A Python number as an element of this type would hold it."""
    if isinstance(value, Array):
        return value
    if dtype.kind == "float" and dtype.nbytes < 8:
        return random.rounded(value, dtype)
    return value


Unary = Callable[..., Array]
Binary = Callable[..., Array]


def _unary(name: str, tells: str) -> Unary:
    def call(x: Array, /, *, stream: Stream | None = None) -> Array:
        return _apply(name, (x,), stream)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{tells}, of each element."
    return call


def _binary(name: str, tells: str) -> Binary:
    def call(x1: Any, x2: Any, /, *, stream: Stream | None = None) -> Array:
        return _apply(name, (x1, x2), stream)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{tells}, element by element; shapes are broadcast, types promoted."
    return call


add = _binary("add", "x1 + x2")
subtract = _binary("subtract", "x1 - x2")
multiply = _binary("multiply", "x1 * x2")
divide = _binary("divide", "x1 / x2 of floats")
floor_divide = _binary("floor_divide", "x1 / x2 rounded down; integers by 0 give 0")
remainder = _binary("remainder", "What floor_divide leaves, with the sign of x2")
pow = _binary("pow", "x1 to the power of x2")
maximum = _binary("maximum", "The larger one, NaN where one is")
minimum = _binary("minimum", "The smaller one, NaN where one is")
equal = _binary("equal", "x1 == x2")
not_equal = _binary("not_equal", "x1 != x2")
less = _binary("less", "x1 < x2")
less_equal = _binary("less_equal", "x1 <= x2")
greater = _binary("greater", "x1 > x2")
greater_equal = _binary("greater_equal", "x1 >= x2")
logical_and = _binary("logical_and", "Both, of bools")
logical_or = _binary("logical_or", "Either, of bools")
logical_xor = _binary("logical_xor", "One but not both, of bools")
bitwise_and = _binary("bitwise_and", "x1 & x2")
bitwise_or = _binary("bitwise_or", "x1 | x2")
bitwise_xor = _binary("bitwise_xor", "x1 ^ x2")
bitwise_left_shift = _binary("bitwise_left_shift", "x1 << x2")
bitwise_right_shift = _binary("bitwise_right_shift", "x1 >> x2")
positive = _unary("positive", "The element itself")
negative = _unary("negative", "The negative")
abs = _unary("abs", "The magnitude")
sign = _unary("sign", "-1, 0 or 1, NaN of NaN")
square = _unary("square", "x * x")
reciprocal = _unary("reciprocal", "1 / x")
sqrt = _unary("sqrt", "The square root")
exp = _unary("exp", "e to that power")
expm1 = _unary("expm1", "exp(x) - 1, exact near 0")
log = _unary("log", "The natural logarithm")
log1p = _unary("log1p", "log(1 + x), exact near 0")
log2 = _unary("log2", "The logarithm to base 2")
log10 = _unary("log10", "The logarithm to base 10")
sin = _unary("sin", "The sine")
cos = _unary("cos", "The cosine")
tan = _unary("tan", "The tangent")
sinh = _unary("sinh", "The hyperbolic sine")
cosh = _unary("cosh", "The hyperbolic cosine")
tanh = _unary("tanh", "The hyperbolic tangent")
floor = _unary("floor", "The greatest integer that is not above")
ceil = _unary("ceil", "The least integer that is not below")
trunc = _unary("trunc", "The integer towards 0")
round = _unary("round", "The nearest integer, ties to even")
isnan = _unary("isnan", "Whether it is no number")
isinf = _unary("isinf", "Whether it is infinite")
isfinite = _unary("isfinite", "Whether it is a finite number")
logical_not = _unary("logical_not", "The opposite of a bool")
bitwise_invert = _unary("bitwise_invert", "All bits turned; of bools the opposite")


def where(condition: Array, x1: Any, x2: Any, /, *, stream: Stream | None = None) -> Array:
    """x1 where the condition, an array of bool, holds, else x2; one of them may be a number."""
    if not isinstance(condition, Array) or condition.dtype.kind != "bool":
        raise BadInput("where: the condition must be an array of bool")
    arrays = tuple(each for each in (x1, x2) if isinstance(each, Array))
    if not arrays:
        raise BadInput("where needs an array besides its condition; make one with ops.asarray")
    common = promoted(*(each.dtype for each in arrays))
    on = strided.stream_for((condition, *arrays), stream, "where")
    values = (
        each if isinstance(each, Array) else _stored(scalar_for(common, each, "where"), common)
        for each in (x1, x2)
    )
    return strided.elementwise("where", (condition, *values), common, common, on)


def clip(x: Array, /, min: Any = None, max: Any = None, *, stream: Stream | None = None) -> Array:
    """Each element, but not below ``min`` nor above ``max``, which are broadcast; the result has
    the type of ``x``."""
    for bound in (min, max):
        if isinstance(bound, Array) and promoted(x.dtype, bound.dtype) != x.dtype:
            raise BadInput(f"clip: a bound of {bound.dtype} does not fit an array of {x.dtype}")
    found = x if min is None else maximum(x, min, stream=stream)
    found = found if max is None else minimum(found, max, stream=stream)
    return positive(found, stream=stream) if found is x else found


# -- over axes -------------------------------------------------------------------------------------

Axis = int | Sequence[int] | None


def _over(
    name: str,
    x: Array,
    axis: Axis,
    keepdims: bool,
    total: DType,
    out: DType,
    stream: Stream | None,
) -> Array:
    axes = layout.axes_of(axis, x.ndim, name)
    on = strided.stream_for((x,), stream, name)
    if name in ("max", "min") and not strided.array_count(x.shape, axes):
        raise BadInput(f"{name} of no elements: there is no such element")
    return _kept(strided.reduce(name, x, axes, total, out, on), x, axes, keepdims)


def _kept(found: Array, x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    if not keepdims:
        return found
    shape = tuple(1 if at in axes else n for at, n in enumerate(x.shape))
    return reshape(found, shape)


def _wide(dtype: DType) -> DType:
    """What is added up in: float32 for halves, else the type of the result."""
    return float32 if dtype.kind == "float" and dtype.nbytes == 2 else dtype


def _summed(name: str, x: Array, dtype: Any) -> DType:
    if x.dtype.kind == "bool":
        raise BadInput(f"{name} is for numbers, not for bool; convert with astype")
    if dtype is not None:
        return dtype_of(dtype)
    if x.dtype.kind == "float":
        return x.dtype
    return int64 if x.dtype.kind == "int" else uint64


def _sum(name: str, x: Array, axis: Axis, dtype: Any, keepdims: bool, on: Any) -> Array:
    to = _summed(name, x, dtype)
    if to.kind != x.dtype.kind or to.nbytes < x.dtype.nbytes:
        x = astype(x, to, stream=on)
    return _over(name, x, axis, keepdims, _wide(to), to, on)


def sum(
    x: Array,
    /,
    *,
    axis: Axis = None,
    dtype: Any = None,
    keepdims: bool = False,
    stream: Stream | None = None,
) -> Array:
    """The sum over axes (None: all). Integers are summed in int64 or uint64, unless ``dtype``."""
    return _sum("sum", x, axis, dtype, keepdims, stream)


def prod(
    x: Array,
    /,
    *,
    axis: Axis = None,
    dtype: Any = None,
    keepdims: bool = False,
    stream: Stream | None = None,
) -> Array:
    """The product over axes; types as in `sum`."""
    return _sum("prod", x, axis, dtype, keepdims, stream)


def mean(
    x: Array, /, *, axis: Axis = None, keepdims: bool = False, stream: Stream | None = None
) -> Array:
    """The mean over axes, of floats; NaN of no elements."""
    if x.dtype.kind != "float":
        raise BadInput(f"mean is for floating-point arrays, not for {x.dtype}; use astype")
    return _over("mean", x, axis, keepdims, _wide(x.dtype), x.dtype, stream)


def _extreme(name: str) -> Callable[..., Array]:
    def call(
        x: Array, /, *, axis: Axis = None, keepdims: bool = False, stream: Stream | None = None
    ) -> Array:
        if x.dtype.kind == "bool":
            raise BadInput(f"{name} is for numbers, not for bool; use any or all")
        return _over(name, x, axis, keepdims, x.dtype, x.dtype, stream)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"The {name}imum over axes (None: all), NaN where one is; BadInput of none."
    return call


max, min = _extreme("max"), _extreme("min")


def _truth(name: str, tells: str) -> Callable[..., Array]:
    def call(
        x: Array, /, *, axis: Axis = None, keepdims: bool = False, stream: Stream | None = None
    ) -> Array:
        truth = DTYPES["bool"]
        return _over(name, x, axis, keepdims, truth, truth, stream)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Whether {tells} over axes (None: all) is not 0."
    return call


any, all = _truth("any", "any element"), _truth("all", "every element")


def _position(name: str, tells: str) -> Callable[..., Array]:
    def call(
        x: Array,
        /,
        *,
        axis: int | None = None,
        keepdims: bool = False,
        stream: Stream | None = None,
    ) -> Array:
        if x.dtype.kind == "bool":
            raise BadInput(f"{name} is for numbers, not for bool; convert with astype")
        on = strided.stream_for((x,), stream, name)
        axes = layout.axes_of(axis, x.ndim, name)
        return _kept(strided.position(name, x, axes, on), x, axes, keepdims)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Where the first {tells} lies along an axis (None: in all, flattened); int64."
    return call


argmax, argmin = _position("argmax", "largest element"), _position("argmin", "smallest element")


def softmax(x: Array, /, *, axis: int = -1, stream: Stream | None = None) -> Array:
    """exp(x) over its sum along an axis, of floats."""
    return _softmax("softmax", x, axis, stream)


def log_softmax(x: Array, /, *, axis: int = -1, stream: Stream | None = None) -> Array:
    """The logarithm of `softmax`, exact where that is near 0."""
    return _softmax("log_softmax", x, axis, stream)


def _softmax(name: str, x: Array, axis: int, stream: Stream | None) -> Array:
    if x.dtype.kind != "float":
        raise BadInput(f"{name} is for floating-point arrays, not for {x.dtype}; use astype")
    at, on = layout.axis_of(axis, x.ndim, name), strided.stream_for((x,), stream, name)
    order = (*(i for i in range(x.ndim) if i != at), at)
    found = strided.softmax(permute_dims(x, order), name == "log_softmax", on)
    return permute_dims(found, tuple(order.index(i) for i in range(x.ndim)))


# -- shapes ----------------------------------------------------------------------------------------


def permute_dims(x: Array, /, axes: Sequence[int]) -> Array:
    """The axes in another order, as a view."""
    order = [layout.axis_of(axis, x.ndim, "permute_dims") for axis in axes]
    if len(order) != x.ndim or len(set(order)) != x.ndim:
        raise BadInput(f"permute_dims: {tuple(axes)} is no order of {x.ndim} axes")
    shape, strides = tuple(x.shape[i] for i in order), tuple(x.strides[i] for i in order)
    return x._view(x.offset, shape, strides)


def matrix_transpose(x: Array, /) -> Array:
    """The last two axes swapped, as a view."""
    return x.mT


def reshape(
    x: Array,
    /,
    shape: int | Sequence[int],
    *,
    copy: bool | None = None,
    stream: Stream | None = None,
) -> Array:
    """The elements, in order, in another shape; one extent may be -1. A view where that is
    possible, unless ``copy``; with ``copy=False`` what is not possible is BadInput."""
    asked = (shape,) if isinstance(shape, int) else shape
    to = layout.reshape_to(x.shape, asked)
    strides = layout.reshaped(x.shape, x.strides, to)
    if strides is not None and not copy:
        return x._view(x.offset, to, strides)
    if copy is False:
        raise BadInput(f"reshape: {x.shape} does not become {to} without a copy")
    whole = strided.compact(x, strided.stream_for((x,), stream, "reshape"), always=True)
    return whole._view(whole.offset, to, layout.compact(to))


def expand_dims(x: Array, /, *, axis: int = 0) -> Array:
    """A new axis of extent 1 at ``axis``, as a view."""
    at = layout.axis_of(axis, x.ndim + 1, "expand_dims")
    return x[(*(slice(None),) * at, None)]


def squeeze(x: Array, /, axis: int | Sequence[int]) -> Array:
    """Without axes of extent 1, as a view."""
    axes = layout.axes_of(axis, x.ndim, "squeeze")
    for at in axes:
        if x.shape[at] != 1:
            raise BadInput(f"squeeze: axis {at} has the extent {x.shape[at]}, not 1")
    return x[tuple(0 if at in axes else slice(None) for at in range(x.ndim))]


def broadcast_to(x: Array, /, shape: Sequence[int]) -> Array:
    """A view that repeats the elements; it cannot be written to."""
    to = layout.shape_of(shape, "broadcast_to")
    return x._view(x.offset, to, layout.stretched(x.shape, x.strides, to))


def take(
    x: Array, indices: Array, /, *, axis: int | None = None, stream: Stream | None = None
) -> Array:
    """Elements along ``axis`` by a one-dimensional array of integers; -1 is the last. Positions
    beyond either end, which the standard leaves open, give the nearest."""
    if axis is None and x.ndim != 1:
        raise BadInput("take: name the axis of an array of more than one dimension")
    at = layout.axis_of(-1 if axis is None else axis, x.ndim, "take")
    if not isinstance(indices, Array) or indices.dtype.kind not in ("int", "uint"):
        raise BadInput("take: the indices must be an array of integers")
    if indices.ndim != 1:
        raise BadInput(f"take: the indices have {indices.ndim} dimensions, not 1")
    return strided.take(x, indices, at, strided.stream_for((x, indices), stream, "take"))


__all__ = [
    "API_VERSIONS",
    "arange",
    "asarray",
    "default_stream",
    "empty",
    "empty_like",
    "eye",
    "from_dlpack",
    "full",
    "full_like",
    "isdtype",
    "matmul",
    "matmul_backend",
    "ones",
    "ones_like",
    "random",
    "zeros",
    "zeros_like",
]
