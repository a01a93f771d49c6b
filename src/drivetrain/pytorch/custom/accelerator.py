"""``torch.accelerator`` and the device: taken over only where asked, and whole where it is.

torch gives a custom device precedence over a GPU as soon as it has a name. And with a device that
was registered from Python, several of its functions raise: the guard has no such methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from drivetrain.pytorch.custom.runtime import Runtime

api: Any = torch.accelerator
_before: torch.device | None = None
_REPLACED = {
    "synchronize": "synchronize",
    "empty_cache": "empty_cache",
    "memory_allocated": "memory_allocated",
    "max_memory_allocated": "max_memory_allocated",
    "memory_reserved": "memory_reserved",
    "max_memory_reserved": "max_memory_reserved",
    "memory_stats": "memory_stats",
    "reset_peak_memory_stats": "reset_peak_memory_stats",
    "get_memory_info": "mem_get_info",
    "get_device_capability": "get_device_capability",
}
"""Function of torch.accelerator -> of the device's module."""
_NOT_IN_SHIM = ("get_device_capability",)
"""What torch asks a C++ device as well, which does not know what the backend says."""


def remember() -> None:
    """Note which accelerator torch has, before it has another."""
    global _before
    found = torch.accelerator.current_accelerator()
    usable = found is not None and torch.accelerator.is_available()
    _before = found if usable else None


def register(runtime: Runtime, module: Any) -> None:
    taken = runtime.config.accelerator
    if taken is None:
        taken = _before is None
    if not taken:
        _leave_to_other(runtime)
        return
    for name, own in _REPLACED.items():
        if runtime.shim is not None and name not in _NOT_IN_SHIM:
            continue
        original = getattr(torch.accelerator, name, None)
        if original is not None:
            setattr(torch.accelerator, name, _ours(original, getattr(module, own), runtime))
    if runtime.shim is None:
        # They go through the C++ guard, which knows one device.
        api.current_device_index = module.current_device
        api.set_device_index = module.set_device
        api.device_index = module.device


def _ours(
    original: Callable[..., Any], own: Callable[..., Any], runtime: Runtime
) -> Callable[..., Any]:
    @wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return run


def _leave_to_other(runtime: Runtime) -> None:
    """torch.accelerator goes on meaning what it meant: a GPU, or nothing."""
    other = _before

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return other

    api.current_accelerator = current_accelerator
    if other is None:
        api.is_available = lambda: False
        api.device_count = lambda: 0
        return
    module = torch.get_device_module(other)
    api.is_available = module.is_available
    api.device_count = module.device_count
    api.current_device_index = module.current_device
    api.set_device_index = module.set_device
    api.device_index = module.device
    api.current_stream = module.current_stream
    api.set_stream = module.set_stream
    api.synchronize = module.synchronize
    api.empty_cache = module.empty_cache
    api.get_memory_info = module.mem_get_info
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "memory_stats"):
        setattr(api, name, getattr(module, name))
