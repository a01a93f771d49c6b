"""Elements by position (embeddings, gathers, scatters), tensors joined, and losses over classes."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from drivetrain.hal import strided
from drivetrain.hal.kernels import indexing, loss, text
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    array,
    axes_of,
    floating,
    kind_of,
    new,
    run,
    serves,
    stream,
)
from drivetrain.pytorch.custom.hal_ops_elements import copied, pointwise
from drivetrain.pytorch.custom.hal_ops_sums import reduced


def _whole(positions: Tensor) -> Tensor:
    """Positions as int64 without gaps."""
    if positions.dtype not in (torch.int64, torch.int32):
        raise Declined
    return positions.to(torch.int64).contiguous()


def _axis(dim: int, x: Tensor) -> int:
    (found,) = axes_of(dim, x.dim()) or (0,)
    return found


@serves("index_select")
def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    if not x.dim() or index.dim() > 1 or index.dtype not in (torch.int64, torch.int32):
        raise Declined
    at, index = _axis(dim, x), index.reshape(-1)
    out = new(x, (*x.shape[:at], index.numel(), *x.shape[at + 1 :]))
    if out.numel():
        strided.take(array(x), array(index), at, stream(x), array(out))
    return out


@serves("index.Tensor")
def _index(x: Tensor, indices: Any) -> Tensor:
    """By one tensor of positions along one dimension."""
    named = [at for at, each in enumerate(indices) if each is not None]
    if len(named) != 1:
        raise Declined
    at, index = named[0], indices[named[0]]
    if index.dtype not in (torch.int64, torch.int32):
        raise Declined
    index = index.to(x.device)
    found = _index_select(x, at, index.reshape(-1))
    return found.view(*x.shape[:at], *index.shape, *x.shape[at + 1 :])


def _add_rows(out: Tensor, lines: Tensor, positions: Tensor, skipped: int = -1) -> Tensor:
    """To row ``positions[j]`` of ``out`` is added line j."""
    if not out.numel() or not positions.numel():
        return out
    rows = out.shape[0]
    columns = out.numel() // rows
    facts = stream(out).device.capabilities
    units = facts.multiprocessors or facts.cores or 1
    rule = indexing.rows_rule(rows, columns, units)
    packed = text.packed([rows, columns, positions.numel()])
    run("add_rows", indexing.source, out, rule, out, lines, positions, skipped, packed)
    return out


@serves("embedding_dense_backward")
def _embedding_backward(
    slope: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool
) -> Tensor:
    floating(slope)
    if by_frequency:
        raise Declined
    width = slope.shape[-1]
    out = new(slope, (rows, width)).zero_()
    return _add_rows(out, slope.contiguous(), _whole(indices), padding)


@serves("index_add")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    if not x.dim() or index.dim() != 1 or x.dtype is torch.bool or source.dtype != x.dtype:
        raise Declined
    at = _axis(dim, x)
    if alpha != 1:
        source = pointwise("multiply", (source, alpha), x.dtype)
    lines = source.movedim(at, 0).contiguous()
    out = x.movedim(at, 0).clone(memory_format=torch.contiguous_format)
    return _add_rows(out, lines, _whole(index)).movedim(0, at).contiguous()


def _along(x: Tensor, at: int, index: Tensor) -> bytes:
    """The structure of walks along a dimension; all but that must agree."""
    outer, inner = prod(index.shape[:at]), prod(index.shape[at + 1 :])
    return text.packed([outer, x.shape[at], index.shape[at], inner])


def _cut(x: Tensor, at: int, index: Tensor) -> Tensor:
    """``x`` as long as the index in every other dimension."""
    for other in range(x.dim()):
        if other != at and x.shape[other] != index.shape[other]:
            if x.shape[other] < index.shape[other]:
                raise RuntimeError(
                    f"Size does not match at dimension {other}: expected index "
                    f"{list(index.shape)} to be no larger than self {list(x.shape)}"
                )
            x = x.narrow(other, 0, index.shape[other])
    return x.contiguous()


@serves("gather")
def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    if not x.dim() or x.dim() != index.dim():
        raise Declined
    at, index = _axis(dim, x), _whole(index)
    out = new(x, index.shape)
    if out.numel():
        x = _cut(x, at, index)
        packed = _along(x, at, index)
        run("gather_along", indexing.source, x, indexing.rule(out.numel()), out, x, index, packed)
    return out


def _scattered(x: Tensor, dim: int, index: Tensor, source: Tensor, adds: bool) -> Tensor:
    same = all(
        x.shape[at] == index.shape[at] for at in range(x.dim()) if at != dim % max(x.dim(), 1)
    )
    if not x.dim() or x.dim() != index.dim() or source.dtype != x.dtype or not same:
        raise Declined
    if adds and x.dtype is torch.bool:
        raise Declined
    at, index = _axis(dim, x), _whole(index)
    out = x.clone(memory_format=torch.contiguous_format)
    if index.numel():
        for other in range(x.dim()):
            source = source.narrow(other, 0, index.shape[other])
        packed = _along(x, at, index)
        rule = indexing.rule(index.numel() // index.shape[at])
        values = source.contiguous()
        run("scatter_along", indexing.source, x, rule, out, values, index, int(adds), packed)
    return out


@serves("scatter.src")
def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _scattered(x, dim, index, source, False)


@serves("scatter.value")
def _scatter_value(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return _scattered(x, dim, index, new(x, index.shape).fill_(value), False)


@serves("scatter_add")
def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _scattered(x, dim, index, source, True)


@serves("cat")
def _cat(tensors: Any, dim: int = 0) -> Tensor:
    parts = [each for each in tensors if each.dim() != 1 or each.numel()]
    if not parts:
        raise Declined
    first = parts[0]
    if not first.dim() or any(each.dim() != first.dim() for each in parts):
        raise Declined
    at, dtype = _axis(dim, first), first.dtype
    for each in parts[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
        if any(each.shape[i] != first.shape[i] for i in range(first.dim()) if i != at):
            raise RuntimeError(
                "Sizes of tensors must match except in dimension "
                f"{at}. Got {list(each.shape)} and {list(first.shape)}"
            )
    kind_of(dtype)
    total = sum(each.shape[at] for each in parts)
    out = new(first, (*first.shape[:at], total, *first.shape[at + 1 :]), dtype)
    start = 0
    for each in parts:
        copied(each, out.narrow(at, start, each.shape[at]))
        start += each.shape[at]
    return out


# -- losses over classes ---------------------------------------------------------------------------


def _classes(x: Tensor, target: Tensor) -> tuple[int, int, int]:
    """(outer, classes, inner) of scores whose second dimension, or only one, is the classes'."""
    if x.dim() == 1:
        return 1, x.shape[0], 1
    if target.shape != torch.Size((x.shape[0], *x.shape[2:])):
        raise Declined
    return x.shape[0], x.shape[1], prod(x.shape[2:])


@serves("nll_loss_forward", "nll_loss2d_forward")
def _likelihood(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    floating(x, weight)
    if not x.numel() or x.dtype.itemsize == 2:
        raise Declined
    outer, classes, inner = _classes(x, target)
    x, target = x.contiguous(), _whole(target)
    by_class = x if weight is None else weight.contiguous()
    each, weights = new(x, target.shape), new(x, target.shape)
    packed = text.packed([outer, classes, inner])
    run(
        "likelihood", loss.source, x, loss.rule("likelihood", outer, classes, inner),
        each, weights, x, target, by_class, int(weight is not None), ignored, packed,
    )  # fmt: skip
    if not reduction:
        return each, new(x, ()).zero_()
    total, found = reduced("sum", weights, None), reduced("sum", each, None)
    if reduction == 1:
        found = pointwise("divide", (found, total))
    return found, total


@serves("nll_loss_backward", "nll_loss2d_backward")
def _likelihood_backward(
    slope: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    total: Tensor,
) -> Tensor:
    floating(slope, x, weight)
    if not x.numel() or slope.dtype != x.dtype:
        raise Declined
    outer, classes, inner = _classes(x, target)
    target, out = _whole(target), new(x, x.shape)
    by_class = out if weight is None else weight.contiguous()
    rule = loss.rule("likelihood_slope", outer, classes, inner)
    run(
        "likelihood_slope", loss.source, x, rule,
        out, slope.contiguous(), target, by_class, total, int(weight is not None),
        int(not reduction), int(reduction == 1), ignored, text.packed([outer, classes, inner]),
    )  # fmt: skip
    return out
