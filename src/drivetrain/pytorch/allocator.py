"""Drivetrain's pool as torch's allocator on CUDA.

torch then takes its memory where HAL buffers take theirs: one cache, one limit, one set of numbers,
and handles that another process can open. torch asks on threads of its own, without Python's lock.

What torch's own allocator has beyond that is off while another one is in place: CUDA graphs
(`torch.cuda.graph`), `torch.cuda.memory_stats` and expandable segments.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from drivetrain import hal
from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal.native_pool import NativePool, library_path

_installed: Any = None
_pools: dict[str, NativePool] = {}


def use_pool(device: hal.Device | str = "cuda:0", *, limit: int | None = None) -> NativePool:
    """From here on torch takes its memory on ``device`` from a pool of Drivetrain, of at most
    ``limit`` bytes, which buffers of the device share; ``pool.stats()`` counts both.

    Call it before torch uses CUDA, once for each device that torch will use. Raises BadInput when
    it is too late, Unsupported where this torch has no CUDA or Drivetrain no C code.
    """
    found = hal.device(device) if isinstance(device, str) else device
    known = _pools.get(found.address)
    if known is not None:
        if limit is not None:
            raise BadInput(f"{found.address} has its pool; its limit was said when it was made")
        return known
    _check_torch(found)
    pool = NativePool(found, limit=limit)
    found.use_pool(pool)
    pool.serve_torch()
    _install()
    _pools[found.address] = pool
    return pool


def _check_torch(device: hal.Device) -> None:
    if device.driver != "cuda":
        raise BadInput(f"torch takes another allocator on CUDA only, not on {device.address}")
    if not hasattr(torch._C, "_cuda_customAllocator"):
        raise Unsupported(
            f"this torch ({torch.__version__}) was built without CUDA; install one with it",
            code="unsupported",
            driver="cuda",
            op="use_pool",
            device=device.address,
        )
    if _installed is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise BadInput("torch has used CUDA already; call use_pool before the first CUDA tensor")


def _install() -> None:
    """Make the C functions torch's allocator, once in a process."""
    global _installed
    if _installed is not None:
        return
    path = library_path()
    allocator = torch.cuda.memory.CUDAPluggableAllocator(path, "dt_torch_alloc", "dt_torch_free")
    library = ctypes.CDLL(path)
    inner: Any = allocator._allocator
    for install, name in (
        # Without it torch drops what Tensor.record_stream says, and memory is used again too early.
        (inner.set_record_stream_fn, "dt_torch_record_stream"),
        (inner.set_reset_fn, "dt_torch_empty_cache"),
    ):
        install(ctypes.cast(library[name], ctypes.c_void_p).value)
    torch.cuda.memory.change_current_allocator(allocator)
    _installed = allocator
