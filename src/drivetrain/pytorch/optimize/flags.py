"""torch's global switches and random states, put back whatever happened in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["kept", "tf32"]

_Restore = Callable[[], None]


def _attribute(owner: Any, name: str) -> list[_Restore]:
    try:
        value = getattr(owner, name)
    except (RuntimeError, AttributeError):  # torch refuses to tell when two styles were mixed
        return []
    return [lambda: setattr(owner, name, value)]


def _called(get: Callable[[], Any], put: Callable[[Any], Any]) -> list[_Restore]:
    value = get()
    return [lambda: put(value)]


def _switches(device: torch.device) -> list[_Restore]:
    """What puts each switch back that a step might turn."""
    cuda = torch.backends.cuda
    found = [
        *_called(torch.is_grad_enabled, lambda on: torch._C._set_grad_enabled(on)),
        *_called(torch.get_default_dtype, torch.set_default_dtype),
        *_called(torch.get_num_threads, torch.set_num_threads),
        *_called(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        *_called(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        *_called(cuda.math_sdp_enabled, cuda.enable_math_sdp),
        *_called(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        *_called(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        *_called(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda found: torch.use_deterministic_algorithms(found[0], warn_only=found[1]),
        ),
        *_attribute(cuda.matmul, "allow_tf32"),
        *_attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        *_attribute(cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        *_attribute(torch.backends.cudnn, "allow_tf32"),
        *_attribute(torch.backends.cudnn, "benchmark"),
        *_attribute(torch.backends.cudnn, "enabled"),
        *_attribute(torch.backends.cudnn, "deterministic"),
    ]
    for kind in sorted({"cpu", device.type}):
        try:
            state = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        except RuntimeError:  # a device without autocast
            continue

        def put(kind: str = kind, state: tuple[bool, torch.dtype] = state) -> None:
            torch.set_autocast_enabled(kind, state[0])
            torch.set_autocast_dtype(kind, state[1])

        found.append(put)
    return found


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Global switches of torch, and the random states of the processor and of ``device``, are as
    they were when the block ends, also by an exception or Ctrl-C."""
    restore = _switches(device)
    generator = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        for each in restore:
            each()
        torch.set_rng_state(generator)
        if on_device is not None:
            try:
                torch.cuda.set_rng_state(on_device, device)
            except RuntimeError:
                pass  # the device is lost, which is on its way out as an exception already


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 on NVIDIA's tensor cores, or not, in the block.

    Where somebody set torch's newer ``fp32_precision`` as well, torch refuses to tell the older
    switch; theirs then stays as it is.
    """
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        before = [part.allow_tf32 for part in parts]
    except RuntimeError:
        yield
        return
    try:
        for part in parts:
            part.allow_tf32 = on
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value
