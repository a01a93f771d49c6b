"""Modules whose parameters have no shape yet, moved before their first use.

``module.to`` of such a device makes plain parameters of them, which are then never given a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_SHAPELESS = (UninitializedParameter, UninitializedBuffer)


def register(name: str) -> None:
    """From here on lazy modules stay lazy when they move to or from the device."""
    kind: Any = LazyModuleMixin

    def apply(self: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        found: list[tuple[dict[str, Any], str, Any]] = []
        for members in (self._parameters, self._buffers):
            for key, each in list(members.items()):
                if isinstance(each, _SHAPELESS):
                    moved = fn(torch.empty(0, dtype=each.dtype, device=each.device))
                    if name in (moved.device.type, each.device.type):
                        found.append((members, key, _like(each, moved)))
                        members[key] = None
        try:
            return super(kind, self)._apply(fn, recurse)
        finally:
            for members, key, new in found:
                members[key] = new

    kind._apply = apply


def _like(old: Any, moved: torch.Tensor) -> Any:
    """One without a shape, where ``moved`` is."""
    of_parameter = isinstance(old, UninitializedParameter)
    kind: Any = UninitializedParameter if of_parameter else UninitializedBuffer
    return kind(old.requires_grad, device=moved.device, dtype=moved.dtype)
