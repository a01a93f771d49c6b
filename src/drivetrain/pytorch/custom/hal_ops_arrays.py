"""Tensors of a HAL device as HAL arrays: what all its kernels begin and end with.

A kernel that does not serve its arguments raises `Declined`; torch's CPU then does it, counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal import Stream, layout, random
from drivetrain.hal.array import Array, Memory
from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels.family import kernel, launch
from drivetrain.pytorch.custom.hal_backend import serving
from drivetrain.pytorch.custom.protocol import Kernel

KINDS: dict[torch.dtype, DType] = {getattr(torch, name): kind for name, kind in DTYPES.items()}
TABLE: dict[str, Kernel] = {}
"""Every kernel by its overload (``aten::add.Tensor``); filled by the modules ``hal_ops_*``."""


class Declined(Exception):
    """These arguments are for the CPU."""


Body = TypeVar("Body", bound=Callable[..., Any])


def serves(*names: str) -> Callable[[Body], Body]:
    """Put a kernel into the table under overloads of aten (``add.Tensor``, ``relu``)."""

    def note(function: Body) -> Body:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (Declined, Unsupported):
                return NotImplemented

        for name in names:
            TABLE[f"aten::{name}" if "." in name else f"aten::{name}.default"] = call
        return function

    return note


def kind_of(dtype: torch.dtype) -> DType:
    """Raises Declined for complex numbers and other types that arrays do not have."""
    found = KINDS.get(dtype)
    if found is None:
        raise Declined
    return found


def floating(*tensors: Tensor | None) -> None:
    """Raises Declined where one is not of floating point."""
    for each in tensors:
        if each is not None and kind_of(each.dtype).kind != "float":
            raise Declined


def stream(tensor: Tensor) -> Stream:
    return serving().stream(tensor.device.index)


def array(tensor: Tensor) -> Array:
    """The tensor's own memory. It must have elements. Raises Declined for autograd's zeros, which
    have none."""
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    if not base:
        raise Declined
    backend = serving()
    on = backend.stream(tensor.device.index)
    memory = Memory(backend.buffer(base, storage.nbytes(), base), on)
    offset, shape, strides = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    return Array(memory, offset, shape, strides, kind_of(tensor.dtype), on)


def shaped(tensor: Tensor, *shape: int) -> Array:
    """A tensor without gaps as an array of another shape."""
    found = array(tensor)
    return Array(
        found.memory, found.offset, shape, layout.compact(shape), found.dtype, found.stream
    )


def new(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An undefined tensor without gaps, on the device of ``like`` and of its type unless told."""
    return torch.empty(shape, dtype=like.dtype if dtype is None else dtype, device=like.device)


def pointer(tensor: Tensor | None, other: Tensor) -> Any:
    """For a kernel of a family: the buffer from the tensor's first element on; ``other``'s where
    there is none and the kernel does not look."""
    found = other if tensor is None else tensor
    storage = found.untyped_storage()
    base, offset = storage.data_ptr(), int(found.storage_offset()) * found.element_size()
    if not base:
        raise Declined
    return serving().buffer(base + offset, storage.nbytes() - offset, base)


def run(name: str, source: Callable[..., Any], like: Tensor, rule: Any, *arguments: Any) -> None:
    """Queue the kernel ``name`` of ``source(dtype)``. Tensors among the arguments are without gaps
    and have elements."""
    on = stream(like)
    values = [pointer(each, each) if isinstance(each, Tensor) else each for each in arguments]
    launch(kernel(on.device, name, source, kind_of(like.dtype)), on, rule, *values)


def number(value: Any, common: DType) -> Any:
    """A Python number as an element of type ``common`` holds it."""
    if common.kind == "float":
        return float(value) if common.nbytes == 8 else random.rounded(value, common)
    if common.kind == "bool":
        return int(bool(value))
    found = int(value)
    least, most = common.limits
    if least <= found <= most:
        return found
    return (found - least) % (most - least + 1) + least


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that all of them broadcast to. Raises RuntimeError, as torch does."""
    first = tuple(shapes[0])
    if all(tuple(each) == first for each in shapes[1:]):
        return first
    try:
        return layout.broadcast(*(tuple(each) for each in shapes))
    except BadInput:
        told = " and ".join(str(list(each)) for each in shapes)
        raise RuntimeError(
            f"The sizes of the tensors must match at every dimension that is not 1: {told}"
        ) from None


def common_type(*operands: Any) -> torch.dtype:
    """The type that torch calculates in: tensors with dimensions count before those without, and
    both before Python's numbers, unless these are of a higher kind."""
    found: list[torch.dtype | None] = [None, None, None]
    for each in operands:
        if isinstance(each, Tensor):
            place, dtype = (0 if each.dim() else 1), each.dtype
        elif isinstance(each, bool):
            place, dtype = 2, torch.bool
        elif isinstance(each, int):
            place, dtype = 2, torch.int64
        elif isinstance(each, float):
            place, dtype = 2, torch.get_default_dtype()
        else:
            raise Declined
        known = found[place]
        found[place] = dtype if known is None else torch.promote_types(known, dtype)
    result = _joined(found[0], _joined(found[1], found[2]))
    assert result is not None
    return result


def _joined(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return lower if higher is None else higher
    if higher.is_complex or lower.is_complex:
        raise Declined
    if not higher.is_floating_point and (lower.is_floating_point or higher is torch.bool):
        return torch.promote_types(higher, lower)
    return higher


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """Dimensions in order; None and none at all mean every one."""
    if dim is None:
        return tuple(range(rank))
    given = [dim] if isinstance(dim, int) else list(dim)
    if not given:
        return tuple(range(rank))
    least = max(rank, 1)
    for each in given:
        if not -least <= each < least:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-least}, {least - 1}], "
                f"but got {each})"
            )
    found = tuple(sorted(each % least for each in given)) if rank else ()
    if len(set(found)) != len(found):
        raise RuntimeError(f"a dimension appears multiple times in {tuple(given)}")
    return found
