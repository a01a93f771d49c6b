"""Shapes and strides: plain tuples of ints, strides counted in elements."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from drivetrain.errors import BadInput

Shape = tuple[int, ...]


def shape_of(value: Any, op: str) -> Shape:
    """A shape from an int or ints. Raises BadInput for what is none."""
    try:
        if isinstance(value, Iterable):
            found = tuple(operator.index(n) for n in value)
        else:
            found = (operator.index(value),)
    except TypeError:
        raise BadInput(f"{op}: {value!r} is no shape; give an int or a tuple of ints") from None
    if any(n < 0 for n in found):
        raise BadInput(f"{op}: the shape {found} has a negative extent")
    return found


def compact(shape: Shape) -> Shape:
    """Row-major strides."""
    steps, step = [], 1
    for extent in reversed(shape):
        steps.append(step)
        step *= max(extent, 1)
    return tuple(reversed(steps))


def is_compact(shape: Shape, strides: Shape) -> bool:
    """Whether the elements lie in order without gaps; strides of extents below 2 do not matter."""
    if 0 in shape:
        return True
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


def broadcast(*shapes: Shape, op: str = "broadcast") -> Shape:
    """The shape that all of them broadcast to. Raises BadInput."""
    rank = max((len(shape) for shape in shapes), default=0)
    found = [1] * rank
    for shape in shapes:
        for at, extent in enumerate(shape, rank - len(shape)):
            if extent != 1:
                if found[at] not in (1, extent):
                    told = " and ".join(map(str, shapes))
                    raise BadInput(f"{op}: the shapes {told} do not broadcast together")
                found[at] = extent
    return tuple(found)


def stretched(shape: Shape, strides: Shape, to: Shape, op: str = "broadcast_to") -> Shape:
    """Strides of an array of ``shape`` seen as one of shape ``to``. Raises BadInput."""
    pad = len(to) - len(shape)
    if pad < 0 or any(n not in (1, m) for n, m in zip(shape, to[pad:], strict=True)):
        raise BadInput(f"{op}: the shape {shape} does not broadcast to {to}")
    kept = (s if n == m else 0 for n, m, s in zip(shape, to[pad:], strides, strict=True))
    return (0,) * pad + tuple(kept)


def axis_of(axis: Any, rank: int, op: str) -> int:
    """One axis, counted from the end where it is negative. Raises BadInput."""
    try:
        found = operator.index(axis)
    except TypeError:
        raise BadInput(f"{op}: the axis {axis!r} is no int") from None
    if not -rank <= found < rank:
        raise BadInput(f"{op}: there is no axis {found} in an array of {rank} dimensions")
    return found % rank


def axes_of(axis: Any, rank: int, op: str) -> Shape:
    """Axes in order; None means all. Raises BadInput for one named twice."""
    if axis is None:
        return tuple(range(rank))
    given = axis if isinstance(axis, Iterable) else (axis,)
    found = [axis_of(each, rank, op) for each in given]
    if len(set(found)) != len(found):
        raise BadInput(f"{op}: the axes {axis} name one twice")
    return tuple(sorted(found))


def joined(shape: Shape, *operands: Shape) -> tuple[Shape, list[Shape]]:
    """The same walk over fewer dimensions: those that lie in step in every operand become one.

    ``operands`` are strides over ``shape``. Extents of 1 go away; an empty shape stays empty.
    """
    extents: list[int] = []
    kept: list[list[int]] = [[] for _ in operands]
    for at, extent in enumerate(shape):
        if extent == 1:
            continue
        steps = [strides[at] for strides in operands]
        if extents and all(
            mine[-1] == step * extent for mine, step in zip(kept, steps, strict=True)
        ):
            extents[-1] *= extent
            for mine, step in zip(kept, steps, strict=True):
                mine[-1] = step
            continue
        extents.append(extent)
        for mine, step in zip(kept, steps, strict=True):
            mine.append(step)
    return tuple(extents), [tuple(mine) for mine in kept]


_RANKS = (0, 1, 3)


def rank_class(rank: int, least: int = 0) -> int:
    """The rank that kernels are made for: few, so that few are compiled."""
    for each in _RANKS:
        if each >= max(rank, least):
            return each
    return rank


def padded(shape: Shape, strides: Sequence[Shape], rank: int) -> tuple[Shape, list[Shape]]:
    """The same walk over ``rank`` dimensions: extents of 1 come first."""
    pad = rank - len(shape)
    return (1,) * pad + tuple(shape), [(0,) * pad + tuple(each) for each in strides]


def reshaped(shape: Shape, strides: Shape, to: Shape) -> Shape | None:
    """Strides of the same elements in the shape ``to`` (as many elements), where no copy is
    needed; else None."""
    if 0 in shape:
        return compact(to)
    extents, (steps,) = joined(shape, strides)
    found: list[int] = []
    at, left = 0, 1
    step = 1
    for extent in to:
        if extent == 1:
            found.append(0)
            continue
        if left == 1:
            left, step = extents[at], steps[at]
            at += 1
        if left % extent:
            return None
        left //= extent
        found.append(step * left)
    return tuple(found)


def reshape_to(shape: Shape, to: Sequence[int], op: str = "reshape") -> Shape:
    """``to`` with its one -1 worked out. Raises BadInput when the elements do not fit."""
    asked = [operator.index(n) for n in to]
    size = prod(shape)
    holes = asked.count(-1)
    if holes > 1 or any(n < -1 for n in asked):
        raise BadInput(f"{op}: {tuple(asked)} is no shape; at most one extent may be -1")
    if holes:
        rest = prod(n for n in asked if n != -1)
        if not rest or size % rest:
            raise BadInput(f"{op}: {size} elements do not fit the shape {tuple(asked)}")
        asked[asked.index(-1)] = size // rest
    if prod(asked) != size:
        raise BadInput(f"{op}: {size} elements do not fit the shape {tuple(asked)}")
    return tuple(asked)


def indexed(shape: Shape, strides: Shape, key: Any) -> tuple[int, Shape, Shape]:
    """(offset in elements, shape, strides) of a basic index: ints, slices, one ``...``, None.

    Raises BadInput for other kinds of index and IndexError for an int that is out of bounds.
    """
    parts = list(key) if isinstance(key, tuple) else [key]
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    dots = sum(1 for part in parts if part is Ellipsis)
    if dots > 1:
        raise BadInput("an index has one ellipsis at most")
    if used > len(shape):
        raise IndexError(f"{used} indices for an array of {len(shape)} dimensions")
    rest = [slice(None)] * (len(shape) - used)
    if dots:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = rest
    else:
        parts += rest
    offset, axis = 0, 0
    extents: list[int] = []
    steps: list[int] = []
    for part in parts:
        if part is None:
            extents.append(1)
            steps.append(0)
            continue
        extent, stride = shape[axis], strides[axis]
        if isinstance(part, slice):
            start, stop, step = part.indices(extent)
            count = len(range(start, stop, step))
            offset += start * stride if count else 0
            extents.append(count)
            steps.append(stride * step)
        else:
            offset += _position(part, extent, axis) * stride
        axis += 1
    return offset, tuple(extents), tuple(steps)


def _position(part: Any, extent: int, axis: int) -> int:
    if isinstance(part, bool) or not hasattr(part, "__index__"):
        raise BadInput(
            f"an array is indexed by ints, slices, ... and None, not by {type(part).__name__}; "
            "ops.take picks by an array of positions, ops.where by a mask"
        )
    try:
        position = operator.index(part)
    except TypeError as error:
        raise BadInput(f"{error}; ops.take picks by an array of positions") from None
    if not -extent <= position < extent:
        raise IndexError(f"index {position} is out of bounds for axis {axis} of extent {extent}")
    return position % extent


def span(shape: Shape, strides: Shape) -> tuple[int, int]:
    """(lowest, highest) offset of any element, both inclusive; (0, -1) when there is none."""
    if 0 in shape:
        return 0, -1
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
