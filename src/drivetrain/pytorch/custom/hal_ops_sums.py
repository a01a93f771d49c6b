"""Over dimensions and products: sums, means, extremes, norms, matrix products, softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain.hal import layout, product, strided
from drivetrain.hal.array import Array
from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import loss
from drivetrain.hal.kernels.family import kernel, launch
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    array,
    axes_of,
    broadcast,
    floating,
    kind_of,
    new,
    pointer,
    serves,
    stream,
)
from drivetrain.pytorch.custom.hal_ops_elements import copied, pointwise


def _kept(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> tuple[list[int], tuple[int, ...]]:
    """(the result's shape, the same without the dimensions that go away)."""
    short = tuple(n for at, n in enumerate(x.shape) if at not in axes)
    if not keepdim:
        return list(short), short
    return [1 if at in axes else n for at, n in enumerate(x.shape)], short


def _seen(out: Tensor, shape: tuple[int, ...]) -> Array:
    found = array(out)
    return Array(
        found.memory, found.offset, shape, layout.compact(shape), found.dtype, found.stream
    )


def wide(kind: DType) -> DType:
    """What is added up in."""
    return DTYPES["float32"] if kind.kind == "float" and kind.nbytes == 2 else kind


def reduced(
    name: str, x: Tensor, dim: Any, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """One of the reductions of the HAL over dimensions (None: all)."""
    axes = axes_of(dim, x.dim())
    shape, short = _kept(x, axes, keepdim)
    to = x.dtype if dtype is None else dtype
    out = new(x, shape, to)
    if not out.numel():
        return out
    kind = kind_of(to)
    if not x.numel():
        if name in ("max", "min"):
            raise IndexError(f"{name}(): Expected reduction dim to have non-zero size")
        fill = {"prod": 1, "all": 1, "mean": float("nan")}.get(name, 0)
        return out.fill_(fill)
    if name in ("any", "all"):
        total = DTYPES["bool"]
    else:
        total = wide(kind)
    strided.reduce(name, array(x), axes, total, kind, stream(x), _seen(out, short))
    return out


def _summed(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return x.dtype if x.dtype.is_floating_point else torch.int64


@serves("sum.dim_IntList")
def _sum(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return reduced("sum", x, dim, keepdim, _summed(x, dtype))


@serves("sum")
def _sum_all(x: Tensor, *, dtype: Any = None) -> Tensor:
    return reduced("sum", x, None, False, _summed(x, dtype))


@serves("mean.dim")
def _mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if not (x.dtype if dtype is None else dtype).is_floating_point:
        raise Declined
    return reduced("mean", x, dim, keepdim, dtype)


@serves("mean")
def _mean_all(x: Tensor, *, dtype: Any = None) -> Tensor:
    return _mean(x, None, dtype=dtype)


@serves("prod.dim_int")
def _prod(x: Tensor, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return reduced("prod", x, dim, keepdim, _summed(x, dtype))


@serves("prod")
def _prod_all(x: Tensor, *, dtype: Any = None) -> Tensor:
    return reduced("prod", x, None, False, _summed(x, dtype))


@serves("amax")
def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return reduced("max", x, dim, keepdim)


@serves("amin")
def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return reduced("min", x, dim, keepdim)


@serves("max")
def _max(x: Tensor) -> Tensor:
    return reduced("max", x, None)


@serves("min")
def _min(x: Tensor) -> Tensor:
    return reduced("min", x, None)


def position(name: str, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    if x.dtype is torch.bool:
        raise Declined
    axes = axes_of(dim, x.dim())
    shape, short = _kept(x, axes, keepdim)
    out = new(x, shape, torch.int64)
    if not x.numel():
        raise Declined
    strided.position(name, array(x), axes, stream(x), _seen(out, short))
    return out


@serves("argmax")
def _argmax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return position("argmax", x, dim, keepdim)


@serves("argmin")
def _argmin(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return position("argmin", x, dim, keepdim)


@serves("max.dim")
def _max_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return reduced("max", x, dim, keepdim), position("argmax", x, dim, keepdim)


@serves("min.dim")
def _min_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return reduced("min", x, dim, keepdim), position("argmin", x, dim, keepdim)


def _truth(name: str) -> None:
    def result(x: Tensor) -> torch.dtype:
        return torch.uint8 if x.dtype is torch.uint8 else torch.bool

    @serves(f"{name}.dim")
    def along(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
        return reduced(name, x, dim, keepdim, result(x))

    @serves(f"{name}.dims")
    def over(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        return reduced(name, x, dim, keepdim, result(x))

    @serves(name)
    def whole(x: Tensor) -> Tensor:
        return reduced(name, x, None, False, result(x))


_truth("any")
_truth("all")


@serves("linalg_vector_norm")
def _norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    floating(x)
    to = x.dtype if dtype is None else dtype
    if ord == 2:
        squares = pointwise("square", (x,), to)
        return pointwise("sqrt", (reduced("sum", squares, dim, keepdim),))
    if ord == 1:
        return reduced("sum", pointwise("abs", (x,), to), dim, keepdim)
    if ord == float("inf") and x.numel():
        return reduced("max", pointwise("abs", (x,), to), dim, keepdim)
    raise Declined


def _spread(x: Tensor, dim: Any, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    """(variance, mean), in two passes."""
    floating(x)
    if not x.numel():
        raise Declined
    axes = axes_of(dim, x.dim())
    count = 1
    for at in axes:
        count *= x.shape[at]
    mean = reduced("mean", x, axes, True)
    squares = pointwise("square", (pointwise("subtract", (x, mean)),))
    freedom = max(count - (1 if correction is None else correction), 0)
    total = reduced("sum", squares, axes, keepdim)
    variance = pointwise("divide", (total, float(freedom)))
    shape, _ = _kept(x, axes, keepdim)
    return variance, mean.view(shape)


@serves("var_mean.correction")
def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _spread(x, dim, correction, keepdim)


@serves("var.correction")
def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _spread(x, dim, correction, keepdim)[0]


@serves("std.correction")
def _std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return pointwise("sqrt", (_spread(x, dim, correction, keepdim)[0],))


@serves("mse_loss")
def _mse(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    floating(x, y)
    squares = pointwise("square", (pointwise("subtract", (x, y)),))
    return squares if not reduction else reduced("mean" if reduction == 1 else "sum", squares, None)


@serves("mse_loss_backward")
def _mse_backward(slope: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    by = 2.0 / max(x.numel(), 1) if reduction == 1 else 2.0
    return pointwise("mse_gradient", (slope, x, y, by))


# -- matrix products -------------------------------------------------------------------------------


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """The product over the last two dimensions; others are the same in both."""
    if a.dtype != b.dtype:
        raise RuntimeError(
            f"expected m1 and m2 to have the same dtype, but got: {a.dtype} != {b.dtype}"
        )
    if a.dtype is torch.bool:
        raise Declined
    if a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({a.shape[-2]}x{a.shape[-1]} and "
            f"{b.shape[-2]}x{b.shape[-1]})"
        )
    out = new(a, (*a.shape[:-1], b.shape[-1]))
    if not out.numel():
        return out
    if not a.numel():
        return out.zero_()
    product.multiply(array(out), array(a), array(b), stream=stream(out))
    return out


@serves("mm")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 2 or b.dim() != 2:
        raise RuntimeError("self must be a matrix" if a.dim() != 2 else "mat2 must be a matrix")
    return multiplied(a, b)


@serves("bmm")
def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
        raise RuntimeError("batch1 and batch2 must be 3D tensors of one batch size")
    return multiplied(a, b)


def _onto(found: Tensor, base: Any, beta: Any, alpha: Any) -> Tensor:
    """beta base + alpha found, in the memory of ``found``."""
    if alpha != 1:
        pointwise("multiply", (found, alpha), found.dtype, out=found)
    if beta == 1:
        return pointwise("add", (found, base), found.dtype, out=found)
    if beta != 0:
        pointwise("add_scaled", (found, base, beta), found.dtype, out=found)
    return found


def _checked(base: Any, *shape: int) -> None:
    if isinstance(base, Tensor) and broadcast(base.shape, shape) != shape:
        raise RuntimeError(
            f"The expanded size of the tensor must match the product's shape {list(shape)}, but "
            f"self has the shape {list(base.shape)}"
        )


@serves("addmm")
def _addmm(base: Any, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    _checked(base, a.shape[0], b.shape[1])
    return _onto(_mm(a, b), base, beta, alpha)


@serves("baddbmm")
def _baddbmm(base: Any, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    _checked(base, a.shape[0], a.shape[1], b.shape[2])
    return _onto(_bmm(a, b), base, beta, alpha)


@serves("mv")
def _mv(a: Tensor, x: Tensor) -> Tensor:
    if a.dim() != 2 or x.dim() != 1:
        raise RuntimeError("vector + matrix @ vector expected")
    return multiplied(a, x[:, None])[:, 0]


@serves("dot")
def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 1 or b.dim() != 1:
        raise RuntimeError("1D tensors expected")
    return multiplied(a[None, :], b[:, None]).view(())


# -- softmax ---------------------------------------------------------------------------------------


def _rows(x: Tensor, dim: int) -> Tensor:
    """With the dimension ``dim`` as the last."""
    return x if not x.dim() or dim in (-1, x.dim() - 1) else x.transpose(dim, -1)


def _softmax(x: Tensor, dim: int, to_float: bool, logarithm: bool) -> Tensor:
    floating(x)
    if to_float:
        raise Declined
    if not x.dim():
        return pointwise("multiply", (x, 0.0), x.dtype) + (0.0 if logarithm else 1.0)
    lines = _rows(x, dim)
    out = new(x, lines.shape)
    if x.numel():
        strided.softmax(array(lines), logarithm, stream(x), array(out))
    return out if lines is x else _settled(out, dim)


def _settled(lines: Tensor, dim: int) -> Tensor:
    """The dimension back in its place, without gaps."""
    turned = lines.transpose(dim, -1)
    return copied(turned, new(turned, turned.shape))


@serves("_softmax")
def _softmax_forward(x: Tensor, dim: int, to_float: bool) -> Tensor:
    return _softmax(x, dim, to_float, False)


@serves("_log_softmax")
def _log_softmax(x: Tensor, dim: int, to_float: bool) -> Tensor:
    return _softmax(x, dim, to_float, True)


def _softmax_slope(slope: Tensor, result: Tensor, dim: int, to: torch.dtype, log: bool) -> Tensor:
    floating(slope, result)
    if to != slope.dtype or not slope.dim():
        raise Declined
    g, y = _rows(slope, dim).contiguous(), _rows(result, dim).contiguous()
    out = new(g, g.shape)
    if out.numel():
        columns = g.shape[-1]
        rows = g.numel() // columns
        rule = loss.rule("softmax_slope", rows, columns)
        found = kernel(stream(out).device, "softmax_slope", loss.slope_source, kind_of(to), log)
        where = (pointer(each, each) for each in (out, g, y))
        launch(found, stream(out), rule, *where, rows, columns)
    return out if dim in (-1, slope.dim() - 1) else _settled(out, dim)


@serves("_softmax_backward_data")
def _softmax_backward(slope: Tensor, result: Tensor, dim: int, dtype: Any) -> Tensor:
    return _softmax_slope(slope, result, dim, dtype, False)


@serves("_log_softmax_backward_data")
def _log_softmax_backward(slope: Tensor, result: Tensor, dim: int, dtype: Any) -> Tensor:
    return _softmax_slope(slope, result, dim, dtype, True)
