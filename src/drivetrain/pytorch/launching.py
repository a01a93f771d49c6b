"""Kernels of the HAL over the memory of torch tensors, on torch's own stream; nothing is copied."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.kernel import Dim, Kernel

__all__ = ["Launcher"]

_LEGACY_STREAM = 1
"""CUDA's handle for the default stream, which torch calls 0."""
_here = threading.local()


class Launcher:
    """A kernel on the device of the tensors that one call is about.

    ``launch(grid, block, *arguments, shared=0)`` queues it where torch queues its own work: results
    are there for torch's next operation. Tensors stand for pointers and must be contiguous; numbers
    are packed as the kernel declares them. A grid with a 0 (no elements) is nothing to do. Raises
    BadInput.
    """

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self._kernel = kernel
        self._device = device

    @property
    def kernel(self) -> Kernel:
        return self._kernel

    def __call__(self, grid: Dim, block: Dim, *arguments: Any, shared: int = 0) -> None:
        if 0 in (grid if isinstance(grid, tuple) else (grid,)):
            return
        values = [
            self._buffer(index, each) if isinstance(each, Tensor) else each
            for index, each in enumerate(arguments)
        ]
        stream = self._stream(next((a for a in arguments if isinstance(a, Tensor)), None))
        self._kernel(stream, grid, block, *values, shared=shared)
        if self._device.type == "cpu":  # torch's operations on the processor are done on return
            stream.synchronize()

    def _buffer(self, index: int, tensor: Tensor) -> hal.Buffer | None:
        name = self._kernel.name
        if tensor.device.type != self._device.type:
            raise BadInput(
                f"{name}, argument {index}: the tensor is on {tensor.device}, the kernel on "
                f"{self._device}; move it there"
            )
        if not tensor.is_contiguous():
            raise BadInput(
                f"{name}, argument {index}: a tensor of shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()} is not contiguous; pass tensor.contiguous()"
            )
        if tensor.device.type not in ("cpu", "cuda"):
            from drivetrain.pytorch.custom import hal_backend

            return hal_backend.buffer_of(tensor) if tensor.numel() else None
        nbytes = tensor.numel() * tensor.element_size()
        return self._kernel.device.wrap(tensor.data_ptr(), nbytes, owner=tensor)

    def _stream(self, tensor: Tensor | None) -> hal.Stream:
        known: dict[tuple[str, int], hal.Stream] = _here.__dict__.setdefault("streams", {})
        device = self._kernel.device
        if self._device.type == "cuda":
            theirs = torch.cuda.current_stream(self._device)
            handle = theirs.cuda_stream or _LEGACY_STREAM
            found = known.get((device.address, handle))
            if found is None:
                found = known[device.address, handle] = device.wrap_stream(handle, owner=theirs)
            return found
        if self._device.type != "cpu":
            from drivetrain.pytorch.custom import hal_backend

            if tensor is None:
                raise BadInput(f"{self._kernel.name}: a launch without any tensor has no device")
            return hal_backend.stream_of(tensor)
        found = known.get((device.address, 0))
        if found is None:
            found = known[device.address, 0] = device.stream()
        return found
