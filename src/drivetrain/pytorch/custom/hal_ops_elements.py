"""What all operations element by element are made with; copies and fills."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain.hal import strided
from drivetrain.hal.dtype import DType
from drivetrain.hal.kernels import indexing, text
from drivetrain.hal.kernels.elementwise import OPERATIONS
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    array,
    broadcast,
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
    shape = broadcast(*(each.shape for each in tensors))
    if out is None:
        out = _like(tensors, shape, to)
    elif out.shape != shape and (len(tensors) > 1 or tensors[0].shape != out.shape):
        whole = broadcast(out.shape, shape)
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


def _like(tensors: list[Tensor], shape: tuple[int, ...], to: torch.dtype) -> Tensor:
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


def chosen(out: Tensor | None, condition: Tensor, a: Any, b: Any, common: torch.dtype) -> Tensor:
    kind = kind_of(common)
    values = [each for each in (a, b) if isinstance(each, Tensor) and not each.is_cpu]
    if out is None:
        shape = broadcast(condition.shape, *(each.shape for each in values))
        out = new(condition, shape, common)
    if out.numel():
        operands = (array(condition), _operand(a, kind), _operand(b, kind))
        strided.elementwise("where", operands, kind, kind, stream(out), array(out))
    return out


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
    if source._is_zerotensor():
        return _zero(out)
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
