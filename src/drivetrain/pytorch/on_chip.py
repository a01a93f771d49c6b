"""The state's bytes on a custom device: as the host reaches them, and their hashes over there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drivetrain.hal.bytes import CHUNK_BYTES, checksum

if TYPE_CHECKING:
    from drivetrain.pytorch.custom import Handle

_REGISTRATION = "drivetrain.pytorch.custom.registration"


def is_custom(device: torch.device) -> bool:
    """Whether this is a device that `register_custom_device` made."""
    handle = _handle()
    return handle is not None and device.type == handle.name


def reachable(flats: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those in memory that the host may touch as tensors of the CPU over the same
    bytes. What was queued on their devices is done then."""
    handle = _handle()
    if handle is None or not all(each.host_visible for each in handle.backends):
        return list(flats)
    from drivetrain.pytorch.custom.alias import on_host

    for index in {flat.device.index for flat in flats if flat.device.type == handle.name}:
        torch.get_device_module(handle.name).synchronize(index)
    return [on_host(flat) if flat.device.type == handle.name else flat for flat in flats]


def chunk_hashes(block: Tensor) -> list[int]:
    """The hash of each 4 MiB chunk of a block of bytes on a custom device, the first of which
    begins a chunk: by the HAL's kernel on a device of the HAL, else of a copy on the host."""
    handle = _handle()
    assert handle is not None
    from drivetrain.pytorch.custom.hal_backend import HalBackend, buffer_of, stream_of

    if isinstance(handle.backends[0], HalBackend):
        from drivetrain.hal.kernels.hash import chunk_hashes as by_kernel

        if buffer_of(block).ptr % 16:
            block = block.clone()
        return by_kernel(buffer_of(block).view(0, block.numel()), stream=stream_of(block))
    host = block.cpu()
    spans = range(0, host.numel(), CHUNK_BYTES)
    return [checksum(host.data_ptr() + at, min(CHUNK_BYTES, host.numel() - at)) for at in spans]


def peak_bytes(device: torch.device) -> int:
    """The most memory of the device that this process's tensors had; 0 where it is not counted."""
    return int(torch.get_device_module(device).max_memory_allocated(device))


def _handle() -> Handle | None:
    """What is registered; a process that never looked for it has nothing."""
    registration = sys.modules.get(_REGISTRATION)
    found: Handle | None = None if registration is None else registration.registered()
    return found
