"""``copy_`` to, from and within the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drivetrain.pytorch.custom.memory import Memory, is_dense
from drivetrain.pytorch.custom.protocol import Kernel
from drivetrain.pytorch.custom.runtime import Runtime

NAME = "aten::_copy_from.default"


def copier(runtime: Runtime, kernel: Kernel | None) -> Callable[..., Tensor]:
    """torch's ``_copy_from``. The backend's kernel, where there is one, serves copies within one
    device that are more than bytes: other types, other strides."""

    def copy(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
        here, there = runtime.is_here(source), runtime.is_here(into)
        if here and there and source.device == into.device:
            _within(runtime, kernel, source, into, non_blocking)
            return into
        if here:
            runtime.synchronize(source.device.index)
        if there:
            runtime.synchronize(into.device.index)
        if here and there and _bytes_across(runtime, source, into):
            return into
        (host,) = _memory(runtime, source).on_host([source]) if here else (source,)
        if not there:
            into.copy_(host)
            return into
        _from_host(_memory(runtime, into), host, into)
        return into

    return copy


def _memory(runtime: Runtime, tensor: Tensor) -> Memory:
    return runtime.memories[tensor.device.index]


def _from_host(memory: Memory, host: Tensor, into: Tensor) -> None:
    if not into.numel():
        return
    if memory.visible or not _overwritten(into):
        (inside,) = memory.on_host([into])
        inside.copy_(host)
        memory.written([into], [inside])
        return
    made = host.new_empty(0, dtype=into.dtype)
    inside = made.new_empty_strided(into.shape, into.stride())
    inside.copy_(host)
    memory.written([into], [inside])


def _overwritten(into: Tensor) -> bool:
    """A copy into it leaves nothing of the bytes that it reaches over."""
    return is_dense(into) and not (into.is_conj() or into.is_neg())


def _within(
    runtime: Runtime, kernel: Kernel | None, source: Tensor, into: Tensor, non_blocking: bool
) -> None:
    memory = _memory(runtime, source)
    if memory.visible and kernel is None:
        source_host, host = memory.on_host([source, into])
        host.copy_(source_host)
        return
    if not memory.visible and _same_bytes(source, into):
        backend, local = runtime.places[memory.index]
        nbytes = source.numel() * source.element_size()
        if nbytes and source.data_ptr() != into.data_ptr():
            backend.copy_within(into.data_ptr(), source.data_ptr(), nbytes, local)
        return
    if kernel is not None and kernel(source, into, non_blocking) is not NotImplemented:
        return
    if not source.numel():
        return
    runtime.fallbacks.note(NAME, "no kernel" if kernel is None else "declined")
    source_host, host = memory.on_host([source, into])
    host.copy_(source_host)
    memory.written([into], [host])


def _same_bytes(source: Tensor, into: Tensor) -> bool:
    plain = not (source.is_conj() or source.is_neg() or into.is_conj() or into.is_neg())
    if source._is_zerotensor() or not plain or source.dtype != into.dtype:
        return False
    if source.shape != into.shape or source.stride() != into.stride() or not is_dense(source):
        return False
    first, second = source.data_ptr(), into.data_ptr()
    nbytes = source.numel() * source.element_size()
    return first == second or first + nbytes <= second or second + nbytes <= first


def _bytes_across(runtime: Runtime, source: Tensor, into: Tensor) -> bool:
    """Between two devices of one backend that has a way of its own."""
    backend, local = runtime.places[source.device.index]
    other, its = runtime.places[into.device.index]
    across: Any = getattr(backend, "copy_across", None)
    if other is not backend or across is None or not _same_bytes_elsewhere(source, into):
        return False
    nbytes = source.numel() * source.element_size()
    if nbytes:
        across(into.data_ptr(), its, source.data_ptr(), local, nbytes)
    return True


def _same_bytes_elsewhere(source: Tensor, into: Tensor) -> bool:
    plain = not (source.is_conj() or source.is_neg() or into.is_conj() or into.is_neg())
    return (
        plain
        and not source._is_zerotensor()
        and source.dtype == into.dtype
        and source.shape == into.shape
        and source.stride() == into.stride()
        and is_dense(source)
    )
