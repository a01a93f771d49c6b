"""Element by element: arithmetic, comparisons, activations and their gradients, triangles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.hal_ops_arrays import (
    Body,
    Declined,
    broadcast,
    common_type,
    new,
    serves,
)
from drivetrain.pytorch.custom.hal_ops_elements import (
    chosen,
    counted,
    floats,
    into,
    pointwise,
)


def both(name: str, overload: str = "") -> Callable[[Body], Body]:
    """A kernel ``body(out, self, ...)`` for an overload, its in-place form, that with ``out``."""

    def note(body: Body) -> Body:
        end = f".{overload}" if overload else ""

        def fresh(*args: Any, **kwargs: Any) -> Any:
            return body(None, *args, **kwargs)

        def inside(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return body(x, x, *args, **kwargs)

        def given(*args: Any, out: Tensor, **kwargs: Any) -> Any:
            shapes = [each.shape for each in args if isinstance(each, Tensor)]
            if out.shape == broadcast(*shapes):
                return body(out, *args, **kwargs)
            found = body(None, *args, **kwargs)
            into(out, found.dtype)
            return out.resize_(found.shape).copy_(found)

        serves(f"{name}{end}")(fresh)
        serves(f"{name}_{end}")(inside)
        serves(f"{name}.{overload}_out" if overload else f"{name}.out")(given)
        if overload == "Tensor":
            serves(f"{name}.out")(given)
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


def _told(name: str) -> None:
    @serves(name)
    def body(x: Tensor) -> Tensor:
        if not x.dtype.is_floating_point:
            raise Declined
        return pointwise(name, (x,))


for _name in ("isnan", "isinf", "isposinf", "isneginf"):
    _told(_name)


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
    """``kind``: ``same`` (torch's promotion), ``real`` (calculated in floats), ``real only`` (of
    floats), ``bits`` (not of floats)."""

    @both(aten, overload)
    def body(out: Tensor | None, a: Any, b: Any) -> Tensor:
        common = floats(a, b) if kind == "real" else common_type(a, b)
        if kind == "bits" and common.is_floating_point:
            raise Declined
        if kind == "real only" and not common.is_floating_point:
            raise Declined  # the CPU refuses to divide integers by 0
        into(out, common)
        return pointwise(name, (a, b), common, out=out)


for _aten, _op, _kind, _over in (
    ("mul", "multiply", "same", "Tensor"), ("div", "divide", "real", "Tensor"),
    ("atan2", "atan2", "real", ""), ("maximum", "maximum", "same", ""),
    ("minimum", "minimum", "same", ""), ("bitwise_and", "bitwise_and", "bits", "Tensor"),
    ("bitwise_or", "bitwise_or", "bits", "Tensor"),
    ("bitwise_xor", "bitwise_xor", "bits", "Tensor"),
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


@serves("pow_.Scalar")
def _power_inside(x: Tensor, exponent: Any) -> Tensor:
    return _power(x, x, exponent)


@serves("pow_.Tensor")
def _powers_inside(x: Tensor, exponent: Any) -> Tensor:
    return _powers(x, x, exponent)


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
    return chosen(None, condition, a, b, common_type(a, b))


@serves("masked_fill_.Scalar", "masked_fill_.Tensor")
def _masked(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    if mask.dtype is not torch.bool or (isinstance(value, Tensor) and value.dim()):
        raise Declined
    return chosen(x, mask, value, x, x.dtype)


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


# -- triangles -------------------------------------------------------------------------------------


def _triangle(aten: str, name: str) -> None:
    @both(aten)
    def body(out: Tensor | None, x: Tensor, diagonal: int = 0) -> Tensor:
        if x.dim() < 2:
            raise RuntimeError(f"{aten}: input tensor must have at least 2 dimensions")
        rows = counted(new(x, (x.shape[-2],), torch.int64), diagonal, 1)[:, None]
        columns = counted(new(x, (x.shape[-1],), torch.int64), 0, 1)
        kept = pointwise(name, (columns, rows))
        out = new(x, x.shape) if out is None else out
        return chosen(out, kept, x, 0, x.dtype)


_triangle("tril", "less_equal")
_triangle("triu", "greater_equal")
