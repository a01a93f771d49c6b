"""Element by element: arithmetic, comparisons, activations and their gradients, copies, fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.hal import strided
from drivetrain.hal.array import Array
from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import indexing, text
from drivetrain.hal.kernels.elementwise import OPERATIONS
from drivetrain.pytorch.custom.hal_ops_arrays import (
    KINDS,
    Declined,
    array,
    common_type,
    kind_of,
    new,
    number,
    run,
    serves,
    stream,
)


def pointwise(
    name: str,
    operands: tuple[Any, ...],
    common: torch.dtype | None = None,
    to: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One of `elementwise.OPERATIONS` over tensors and numbers, calculated in ``common`` (torch's
    promotion, without): into ``out``, or a new tensor of type ``to``."""
    tensors = [each for each in operands if isinstance(each, Tensor) and not each.is_cpu]
    common = common_type(*operands) if common is None else common
    kind = kind_of(common)
    if to is None:
        to = torch.bool if OPERATIONS[name].to_bool else common
    shape = torch.broadcast_shapes(*(each.shape for each in tensors))
    if out is None:
        out = _like(tensors, shape, to)
    elif out.shape != shape and (len(tensors) > 1 or tensors[0].shape != out.shape):
        whole = torch.broadcast_shapes(out.shape, shape)
        if whole != out.shape:
            raise RuntimeError(
                f"output with shape {list(out.shape)} doesn't match the broadcast shape "
                f"{list(whole)}"
            )
    if not out.numel():
        return out
    values = tuple(_operand(each, kind) for each in operands)
    if any(not s and n > 1 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location; clone the tensor first"
        )
    strided.elementwise(name, values, kind, kind_of(out.dtype), stream(out), array(out))
    return out


def _operand(value: Any, kind: DType) -> Any:
    if isinstance(value, Tensor):
        return number(value.item(), kind) if value.is_cpu else array(value)
    return number(value, kind)


def _like(tensors: list[Tensor], shape: torch.Size, to: torch.dtype) -> Tensor:
    """Undefined, in the order of memory that the first whole operand has."""
    for each in tensors:
        if each.shape == shape:
            if each.is_contiguous():
                break
            return torch.empty_like(each, dtype=to)
    return new(tensors[0], shape, to)


def into(out: Tensor | None, common: torch.dtype) -> None:
    """Raises RuntimeError where a result of this type may not be written to ``out``."""
    if out is not None and not torch.can_cast(common, out.dtype):
        raise RuntimeError(f"result type {common} can't be cast to the desired type {out.dtype}")


def floats(*operands: Any) -> torch.dtype:
    """What functions of real numbers calculate in."""
    found = common_type(*operands)
    return found if found.is_floating_point else torch.get_default_dtype()


Body = Callable[..., Any]


def both(name: str, overload: str = "") -> Callable[[Body], Body]:
    """A kernel ``body(out, self, ...)`` for an overload and its in-place form."""

    def note(body: Body) -> Body:
        end = f".{overload}" if overload else ""

        def fresh(*args: Any, **kwargs: Any) -> Any:
            return body(None, *args, **kwargs)

        def inside(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return body(x, x, *args, **kwargs)

        serves(f"{name}{end}")(fresh)
        serves(f"{name}_{end}")(inside)
        return body

    return note


# -- one operand -----------------------------------------------------------------------------------

_REAL = [
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "asin",
    "acos",
    "atan",
    "asinh",
    "acosh",
    "atanh",
    "erf",
    "erfc",
    "sigmoid",
    "reciprocal",
]
_SAME = {"neg": "negative", "abs": "abs", "sign": "sign", "relu": "relu"}
_ROUND = ("floor", "ceil", "trunc", "round")
_PLAIN = {"silu": "silu", "mish": "mish", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid"}


def _real(name: str) -> None:
    @both(name)
    def body(out: Tensor | None, x: Tensor) -> Tensor:
        common = floats(x)
        into(out, common)
        return pointwise(name, (x,), common, out=out)


def _same(aten: str, name: str) -> None:
    @both(aten)
    def body(out: Tensor | None, x: Tensor) -> Tensor:
        if x.dtype is torch.bool:
            raise Declined
        return pointwise(name, (x,), out=out)


def _of_floats(aten: str, name: str) -> None:
    @both(aten)
    def body(out: Tensor | None, x: Tensor) -> Tensor:
        if not x.dtype.is_floating_point:
            raise Declined
        return pointwise(name, (x,), out=out)


for _name in _REAL:
    _real(_name)
for _name in _ROUND:
    _of_floats(_name, _name)
for _name, _to in _SAME.items():
    _same(_name, _to)
for _name, _to in _PLAIN.items():
    _of_floats(_name, _to)


@both("bitwise_not")
def _not(out: Tensor | None, x: Tensor) -> Tensor:
    if x.dtype.is_floating_point:
        raise Declined
    return pointwise("bitwise_invert", (x,), out=out)


@both("logical_not")
def _logical_not(out: Tensor | None, x: Tensor) -> Tensor:
    return pointwise("equal", (x, 0), x.dtype, out=out)


@serves("isnan", "isinf", "isfinite")
def _unused(x: Tensor) -> Any:
    raise Declined


@serves("isnan")
def _isnan(x: Tensor) -> Tensor:
    return pointwise("isnan", (x,))


@serves("isinf")
def _isinf(x: Tensor) -> Tensor:
    return pointwise("isinf", (x,))


@both("gelu")
def _gelu(out: Tensor | None, x: Tensor, *, approximate: str = "none") -> Tensor:
    return pointwise("gelu_tanh" if approximate == "tanh" else "gelu", (x,), floats(x), out=out)


@both("leaky_relu")
def _leaky(out: Tensor | None, x: Tensor, slope: float = 0.01) -> Tensor:
    return pointwise("leaky_relu", (x, slope), x.dtype, out=out)


@both("elu")
def _elu(
    out: Tensor | None, x: Tensor, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0
) -> Tensor:
    return pointwise("elu", (x, alpha, scale, inner), x.dtype, out=out)


@serves("softplus")
def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return pointwise("softplus", (x, beta, threshold), x.dtype)


@serves("log_sigmoid_forward")
def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    return pointwise("log_sigmoid", (x,), x.dtype), new(x, (0,))


@both("hardtanh")
def _hardtanh(out: Tensor | None, x: Tensor, low: float = -1, high: float = 1) -> Tensor:
    return pointwise("clamp", (x, low, high), x.dtype, out=out)


# -- two operands and more -------------------------------------------------------------------------


def _added(out: Tensor | None, a: Any, b: Any, alpha: Any) -> Tensor:
    common = common_type(a, b)
    into(out, common)
    if alpha == 1:
        return pointwise("add", (a, b), common, out=out)
    if alpha == -1:
        return pointwise("subtract", (a, b), common, out=out)
    return pointwise("add_scaled", (a, b, alpha), common, out=out)


@both("add", "Tensor")
def _add(out: Tensor | None, a: Any, b: Any, *, alpha: Any = 1) -> Tensor:
    return _added(out, a, b, alpha)


@both("sub", "Tensor")
def _sub(out: Tensor | None, a: Any, b: Any, *, alpha: Any = 1) -> Tensor:
    if common_type(a, b) is torch.bool:
        raise Declined
    return _added(out, a, b, -alpha)


@serves("rsub.Tensor", "rsub.Scalar")
def _rsub(a: Any, b: Any, alpha: Any = 1) -> Tensor:
    return _added(None, b, a, -alpha)


def _binary(aten: str, name: str, kind: str = "same", overload: str = "Tensor") -> None:
    """``kind``: ``same`` (torch's promotion), ``real`` (calculated in floats), ``bits`` (not of
    floats)."""

    @both(aten, overload)
    def body(out: Tensor | None, a: Any, b: Any) -> Tensor:
        common = floats(a, b) if kind == "real" else common_type(a, b)
        if kind == "bits" and common.is_floating_point:
            raise Declined
        if kind == "numbers" and common is torch.bool:
            raise Declined
        into(out, common)
        return pointwise(name, (a, b), common, out=out)


for _aten, _op, _kind, _over in (
    ("mul", "multiply", "same", "Tensor"), ("div", "divide", "real", "Tensor"),
    ("atan2", "atan2", "real", ""), ("maximum", "maximum", "same", ""),
    ("minimum", "minimum", "same", ""), ("bitwise_and", "bitwise_and", "bits", "Tensor"),
    ("bitwise_or", "bitwise_or", "bits", "Tensor"), ("bitwise_xor", "bitwise_xor", "bits", "Tensor"),
    ("remainder", "remainder", "real only", "Tensor"), ("fmod", "fmod", "real only", "Tensor"),
):  # fmt: skip
    _binary(_aten, _op, _kind, _over)


@both("div", "Tensor_mode")
def _divided(out: Tensor | None, a: Any, b: Any, *, rounding_mode: str | None) -> Tensor:
    if rounding_mode is None:
        common = floats(a, b)
        into(out, common)
        return pointwise("divide", (a, b), common, out=out)
    common = common_type(a, b)
    if not common.is_floating_point:
        raise Declined  # the CPU refuses to divide integers by 0
    into(out, common)
    name = "floor_divide" if rounding_mode == "floor" else "trunc_divide"
    return pointwise(name, (a, b), common, out=out)


def _compared(aten: str, name: str) -> None:
    for overload in ("Tensor", "Scalar"):

        @both(aten, overload)
        def body(out: Tensor | None, a: Any, b: Any) -> Tensor:
            return pointwise(name, (a, b), out=out)


for _aten, _op in (
    ("eq", "equal"), ("ne", "not_equal"), ("lt", "less"), ("le", "less_equal"),
    ("gt", "greater"), ("ge", "greater_equal"),
):  # fmt: skip
    _compared(_aten, _op)


def _logical(aten: str) -> None:
    @both(aten)
    def body(out: Tensor | None, a: Any, b: Any) -> Tensor:
        return pointwise(aten, (a, b), out=out)


for _name in ("logical_and", "logical_or", "logical_xor"):
    _logical(_name)


@both("pow", "Tensor_Scalar")
def _power(out: Tensor | None, x: Tensor, exponent: Any) -> Tensor:
    common = common_type(x, exponent)
    into(out, common)
    if exponent == 2 and common is not torch.bool:
        return pointwise("square", (x,), common, out=out)
    if exponent in (0.5, -0.5) and common.is_floating_point:
        return pointwise("sqrt" if exponent > 0 else "rsqrt", (x,), common, out=out)
    if not common.is_floating_point:
        raise Declined
    return pointwise("pow", (x, exponent), common, out=out)


@both("pow", "Tensor_Tensor")
def _powers(out: Tensor | None, a: Any, b: Any) -> Tensor:
    common = common_type(a, b)
    if not common.is_floating_point:
        raise Declined
    into(out, common)
    return pointwise("pow", (a, b), common, out=out)


@serves("pow.Scalar")
def _power_of(a: Any, b: Tensor) -> Tensor:
    return _powers(None, a, b)


@both("clamp")
def _clamp(out: Tensor | None, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    common = common_type(x, *(each for each in (low, high) if each is not None))
    into(out, common)
    if low is None or high is None:
        name, bound = ("minimum", high) if low is None else ("maximum", low)
        return pointwise(name, (x, bound), common, out=out)
    return pointwise("clamp", (x, low, high), common, out=out)


@both("clamp_min")
def _at_least(out: Tensor | None, x: Tensor, low: Any) -> Tensor:
    return _clamp(out, x, low, None)


@both("clamp_max")
def _at_most(out: Tensor | None, x: Tensor, high: Any) -> Tensor:
    return _clamp(out, x, None, high)


@both("addcmul")
def _addcmul(out: Tensor | None, x: Any, a: Any, b: Any, *, value: Any = 1) -> Tensor:
    common = common_type(x, a, b)
    into(out, common)
    return pointwise("addcmul", (x, a, b, value), common, out=out)


@both("addcdiv")
def _addcdiv(out: Tensor | None, x: Any, a: Any, b: Any, *, value: Any = 1) -> Tensor:
    common = floats(x, a, b)
    into(out, common)
    return pointwise("addcdiv", (x, a, b, value), common, out=out)


@both("lerp", "Scalar")
def _lerp(out: Tensor | None, a: Any, b: Any, weight: Any) -> Tensor:
    return pointwise("lerp", (a, b, weight), floats(a, b), out=out)


@both("lerp", "Tensor")
def _lerps(out: Tensor | None, a: Any, b: Any, weight: Any) -> Tensor:
    return pointwise("lerp", (a, b, weight), floats(a, b), out=out)


@serves("where.self")
def _where(condition: Tensor, a: Any, b: Any) -> Tensor:
    if condition.dtype is not torch.bool or condition.is_cpu:
        raise Declined
    return _chosen(None, condition, a, b, common_type(a, b))


def _chosen(out: Tensor | None, condition: Tensor, a: Any, b: Any, common: torch.dtype) -> Tensor:
    kind = kind_of(common)
    values = [each for each in (a, b) if isinstance(each, Tensor) and not each.is_cpu]
    if out is None:
        shape = torch.broadcast_shapes(condition.shape, *(each.shape for each in values))
        out = new(condition, shape, common)
    if out.numel():
        operands = (array(condition), _operand(a, kind), _operand(b, kind))
        strided.elementwise("where", operands, kind, kind, stream(out), array(out))
    return out


@serves("masked_fill_.Scalar", "masked_fill_.Tensor")
def _masked(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    if mask.dtype is not torch.bool or (isinstance(value, Tensor) and value.dim()):
        raise Declined
    return _chosen(x, mask, value, x, x.dtype)


# -- gradients -------------------------------------------------------------------------------------


def _gradient(aten: str, name: str) -> None:
    @serves(aten)
    def body(slope: Tensor, x: Tensor, *values: Any) -> Tensor:
        return pointwise(name, (slope, x, *values), x.dtype)


for _aten, _op in (
    ("sigmoid_backward", "sigmoid_gradient"), ("tanh_backward", "tanh_gradient"),
    ("threshold_backward", "threshold_gradient"), ("silu_backward", "silu_gradient"),
    ("mish_backward", "mish_gradient"), ("hardtanh_backward", "hardtanh_gradient"),
    ("softplus_backward", "softplus_gradient"),
):  # fmt: skip
    _gradient(_aten, _op)


@serves("gelu_backward")
def _gelu_backward(slope: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    name = "gelu_tanh_gradient" if approximate == "tanh" else "gelu_gradient"
    return pointwise(name, (slope, x), x.dtype)


@serves("log_sigmoid_backward")
def _log_sigmoid_backward(slope: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return pointwise("log_sigmoid_gradient", (slope, x), x.dtype)


@serves("leaky_relu_backward")
def _leaky_backward(slope: Tensor, x: Tensor, by: float, is_result: bool) -> Tensor:
    return pointwise("leaky_relu_gradient", (slope, x, by), x.dtype)


# -- copies and fills ------------------------------------------------------------------------------


def copied(source: Tensor, out: Tensor) -> Tensor:
    """The elements in another tensor of the device, which they are broadcast to."""
    if not out.numel():
        return out
    here, there, on = array(source), array(out), stream(out)
    if here.dtype == there.dtype:
        strided.copied(here, on, there)
        return out
    text.require(on.device, on._opened.backend.target, here.dtype, there.dtype)
    strided.elementwise("astype", (here,), cast_in(here.dtype, there.dtype), there.dtype, on, there)
    return out


def cast_in(source: DType, to: DType) -> DType:
    """The type that a conversion calculates in."""
    if to.kind == "bool" or (source.kind == "float" and to.kind in ("int", "uint")):
        return source
    if to.nbytes < source.nbytes and source.kind == to.kind:
        return source
    return to


@serves("_copy_from")
def _copy_from(source: Tensor, out: Tensor, non_blocking: bool = False) -> Tensor:
    if source.device != out.device:
        raise Declined
    if source.is_neg() or out.is_neg():
        raise Declined
    return copied(source, out)


@serves("fill_.Scalar")
def _fill(x: Tensor, value: Any) -> Tensor:
    if x.numel():
        kind = kind_of(x.dtype)
        strided.elementwise("astype", (number(value, kind),), kind, kind, stream(x), array(x))
    return x


@serves("fill_.Tensor")
def _fill_from(x: Tensor, value: Tensor) -> Tensor:
    return _fill(x, value.item()) if value.is_cpu else copied(value.expand(x.shape), x)


@serves("zero_")
def _zero(x: Tensor) -> Tensor:
    return _fill(x, 0)


@serves("arange.start_out")
def _arange(start: Any, end: Any, step: Any = 1, *, out: Tensor) -> Tensor:
    if isinstance(start, int) and isinstance(step, int) and isinstance(end, int):
        count = max(0, -((start - end) // step))
    else:
        count = max(0, int(-((start - end) // step)))
    if out.numel() != count:
        out.resize_(count)
    return counted(out, start, step)


def counted(out: Tensor, start: Any, step: Any) -> Tensor:
    """``start + i step`` at each element ``i`` of a tensor without gaps."""
    if not out.is_contiguous() or out.dtype is torch.bool:
        raise Declined
    if out.numel():
        kind = kind_of(out.dtype)
        first, by = number(start, kind), number(step, kind)
        run("count", indexing.source, out, indexing.rule(out.numel()), out, first, by, out.numel())
    return out


def _triangle(aten: str, name: str) -> None:
    @both(aten)
    def body(out: Tensor | None, x: Tensor, diagonal: int = 0) -> Tensor:
        if x.dim() < 2:
            raise RuntimeError(f"{aten}: input tensor must have at least 2 dimensions")
        rows = counted(new(x, (x.shape[-2],), torch.int64), diagonal, 1)[:, None]
        columns = counted(new(x, (x.shape[-1],), torch.int64), 0, 1)
        kept = pointwise(name, (columns, rows))
        out = new(x, x.shape) if out is None else out
        return _chosen(out, kept, x, 0, x.dtype)


_triangle("tril", "less_equal")
_triangle("triu", "greater_equal")

__all__ = ["DTYPES", "KINDS", "Array", "cast_in", "copied", "counted", "pointwise"]
