"""Layers of networks: pooling and normalisation."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from drivetrain.hal.kernels import normalization, pooling
from drivetrain.hal.kernels.normalization import Sets
from drivetrain.hal.kernels.pooling import Pool
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    floating,
    new,
    run,
    serves,
)
from drivetrain.pytorch.custom.hal_ops_convolution import pair
from drivetrain.pytorch.custom.hal_ops_elements import pointwise

# -- pooling ---------------------------------------------------------------------------------------


def _places(size: int, window: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    reach = size + 2 * padding - dilation * (window - 1) - 1
    count = (reach + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def _pool(
    x: Tensor, window: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, **more: Any
) -> Pool:
    floating(x)
    if x.dim() not in (3, 4) or not x.numel():
        raise Declined
    held, step = pair(window), pair(stride or window)
    around, apart = pair(padding), pair(dilation)
    size = (x.shape[-2], x.shape[-1])
    down, across = (
        _places(size[at], held[at], step[at], around[at], apart[at], ceil) for at in (0, 1)
    )
    if min(down, across) <= 0 or any(2 * around[at] > held[at] for at in (0, 1)):
        raise Declined  # the CPU says what is wrong
    planes = prod(x.shape[:-2])
    return Pool(planes, size, (down, across), held, step, around, apart, **more)


def _adaptive(x: Tensor, places: Any) -> Pool:
    floating(x)
    wanted = pair(places)
    if x.dim() not in (3, 4) or not x.numel() or min(wanted) <= 0:
        raise Declined
    return Pool(prod(x.shape[:-2]), (x.shape[-2], x.shape[-1]), wanted, adaptive=True)


def _pooled(name: str, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = new(x, (*x.shape[:-2], *pool.places))
    rule, packed = pooling.rule(out.numel()), pool.packed()
    if name == "mean":
        run(name, pooling.source, x, rule, out, x, packed)
        return out, out
    where = new(x, out.shape, torch.int64)
    run(name, pooling.source, x, rule, out, where, x, packed)
    return out, where


def _pool_slope(name: str, x: Tensor, slope: Tensor, pool: Pool, *where: Tensor) -> Tensor:
    out = new(x, x.shape)
    rule = pooling.rule(out.numel())
    run(name, pooling.source, x, rule, out, slope.contiguous(), *where, pool.packed())
    return out


@serves("max_pool2d_with_indices")
def _max_pool(
    x: Tensor,
    window: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    return _pooled("largest", x, _pool(x, window, stride, padding, dilation, ceil_mode))


@serves("max_pool2d_with_indices_backward")
def _max_pool_backward(
    slope: Tensor,
    x: Tensor,
    window: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    where: Tensor,
) -> Tensor:
    pool = _pool(x, window, stride, padding, dilation, ceil_mode)
    return _pool_slope("largest_slope", x, slope, pool, where.contiguous())


@serves("avg_pool2d")
def _avg_pool(
    x: Tensor,
    window: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    more = {"counts_padding": count_include_pad, "divisor": divisor_override or 0}
    return _pooled("mean", x, _pool(x, window, stride, padding, 1, ceil_mode, **more))[0]


@serves("avg_pool2d_backward")
def _avg_pool_backward(
    slope: Tensor,
    x: Tensor,
    window: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    more = {"counts_padding": count_include_pad, "divisor": divisor_override or 0}
    pool = _pool(x, window, stride, padding, 1, ceil_mode, **more)
    return _pool_slope("mean_slope", x, slope, pool)


@serves("_adaptive_avg_pool2d")
def _adaptive_avg(x: Tensor, places: Any) -> Tensor:
    return _pooled("mean", x, _adaptive(x, places))[0]


@serves("_adaptive_avg_pool2d_backward")
def _adaptive_avg_backward(slope: Tensor, x: Tensor) -> Tensor:
    return _pool_slope("mean_slope", x, slope, _adaptive(x, slope.shape[-2:]))


@serves("adaptive_max_pool2d")
def _adaptive_max(x: Tensor, places: Any) -> tuple[Tensor, Tensor]:
    return _pooled("largest", x, _adaptive(x, places))


@serves("adaptive_max_pool2d_backward")
def _adaptive_max_backward(slope: Tensor, x: Tensor, where: Tensor) -> Tensor:
    pool = _adaptive(x, slope.shape[-2:])
    return _pool_slope("largest_slope", x, slope, pool, where.contiguous())


# -- normalisation ---------------------------------------------------------------------------------


def _run(name: str, sets: Sets, like: Tensor, *arguments: Any) -> None:
    rule = normalization.rule(name, sets)
    values = [like if each is None else each for each in arguments]
    run(name, normalization.source, like, rule, *values)


def _moments(x: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    mean, variance = (new(x, (sets.sets,), _wide(x)) for _ in range(2))
    _run("moments", sets, x, mean, variance, x, sets.packed())
    return mean, variance


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _scale(x: Tensor, variance: Tensor, least: float, sets: Sets) -> Tensor:
    scale = new(x, (sets.sets,), _wide(x))
    _run("scale", sets, x, scale, variance, float(least), sets.sets)
    return scale


def _apply(x: Tensor, mean: Tensor, scale: Tensor, weight: Any, bias: Any, sets: Sets) -> Tensor:
    out = new(x, x.shape)
    parts = (weight is not None) + 2 * (bias is not None)
    _run("normalize", sets, x, out, x, mean, scale, weight, bias, parts, sets.packed())
    return out


def _slopes(
    slope: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    sets: Sets,
    mask: Any,
    constant: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias that ``mask`` asks for."""
    found: list[Tensor | None] = [None, None, None]
    slope, x, weight = slope.contiguous(), x.contiguous(), _lined(x, weight)
    mean, scale = mean.contiguous(), scale.contiguous()
    parts = int(weight is not None)
    if mask[0]:
        plain, along = (new(x, (sets.sets,), _wide(x)) for _ in range(2))
        packed = sets.packed()
        if not constant:
            _run("slopes", sets, x, plain, along, slope, x, mean, scale, weight, parts, packed)
        out = found[0] = new(x, x.shape)
        parts += 0 if constant else 2
        _run(
            "input_slope", sets, x,
            out, slope, x, mean, scale, weight, plain, along, parts, packed,
        )  # fmt: skip
    if mask[1] or mask[2]:
        of_weight, of_bias = (new(x, (sets.channels,)) for _ in range(2))
        packed = sets.packed()
        _run("weight_slope", sets, x, of_weight, of_bias, slope, x, mean, scale, packed)
        found[1], found[2] = (of_weight if mask[1] else None), (of_bias if mask[2] else None)
    return tuple(found)


def _lined(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """Weights without gaps and of the elements' type."""
    return None if weight is None else weight.to(x.dtype).contiguous()


@serves("native_layer_norm")
def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    floating(x, weight, bias)
    if not x.numel() or tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        raise Declined
    x, weight, bias = x.contiguous(), _lined(x, weight), _lined(x, bias)
    columns = prod(shape)
    sets = normalization.layer(x.numel() // columns, columns)
    mean, variance = _moments(x, sets)
    scale = _scale(x, variance, eps, sets)
    kept = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    return _apply(x, mean, scale, weight, bias, sets), mean.view(kept), scale.view(kept)


@serves("native_layer_norm_backward")
def _layer_norm_backward(
    slope: Tensor,
    x: Tensor,
    shape: Any,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Any,
) -> tuple[Tensor | None, ...]:
    floating(slope, x, weight)
    if not x.numel():
        raise Declined
    columns = prod(shape)
    sets = normalization.layer(x.numel() // columns, columns)
    found = list(_slopes(slope, x, mean, scale, weight, sets, mask))
    found[1:] = [None if each is None else each.view(tuple(shape)) for each in found[1:]]
    return tuple(found)


def _batch(x: Tensor) -> Sets:
    if x.dim() < 2 or not x.numel():
        raise Declined
    return normalization.batch(x.shape[0], x.shape[1], prod(x.shape[2:]))


@serves("native_batch_norm")
def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    floating(x, weight, bias, running_mean, running_var)
    sets, x = _batch(x), x.contiguous()
    weight, bias = _lined(x, weight), _lined(x, bias)
    if not training:
        if running_mean is None or running_var is None:
            raise Declined
        mean = running_mean.to(_wide(x)).contiguous()
        scale = _scale(x, running_var.to(_wide(x)).contiguous(), eps, sets)
        nothing = new(x, (0,), _wide(x))
        return _apply(x, mean, scale, weight, bias, sets), nothing, nothing.clone()
    mean, variance = _moments(x, sets)
    scale = _scale(x, variance, eps, sets)
    for running, now, by in (
        (running_mean, mean, 1.0),
        (running_var, variance, sets.count / max(sets.count - 1, 1)),
    ):
        if running is not None:
            pointwise("multiply", (running, 1 - momentum), running.dtype, out=running)
            pointwise("add_scaled", (running, now, momentum * by), running.dtype, out=running)
    return _apply(x, mean, scale, weight, bias, sets), mean, scale


@serves("_native_batch_norm_legit")
def _batch_norm_legit(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, *rest)


@serves("_native_batch_norm_legit.no_stats")
def _batch_norm_bare(
    x: Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, weight, bias, None, None, training, momentum, eps)


@serves("native_batch_norm_backward")
def _batch_norm_backward(
    slope: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    train: bool,
    eps: float,
    mask: Any,
) -> tuple[Tensor | None, ...]:
    floating(slope, x, weight)
    sets = _batch(x)
    if not train:
        if running_mean is None or running_var is None:
            raise Declined
        mean = running_mean.to(_wide(x))
        scale = _scale(x, running_var.to(_wide(x)).contiguous(), eps, sets)
    if mean is None or scale is None:
        raise Declined
    return _slopes(slope, x, mean, scale, weight, sets, mask, constant=not train)


@serves("native_group_norm")
def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, c: int, inner: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    floating(x, weight, bias)
    if not x.numel():
        raise Declined
    x, weight, bias = x.contiguous(), _lined(x, weight), _lined(x, bias)
    sets = normalization.group(n, c, inner, groups)
    mean, variance = _moments(x, sets)
    scale = _scale(x, variance, eps, sets)
    out = _apply(x, mean, scale, weight, bias, sets)
    return out, mean.view(n, groups), scale.view(n, groups)


@serves("native_group_norm_backward")
def _group_norm_backward(
    slope: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    inner: int,
    groups: int,
    mask: Any,
) -> tuple[Tensor | None, ...]:
    floating(slope, x, weight)
    if not x.numel():
        raise Declined
    sets = normalization.group(n, c, inner, groups)
    return _slopes(slope, x, mean, scale, weight, sets, mask)
