"""Tensors of the device for others: ``__dlpack__`` and ``torch.from_dlpack``.

torch's own ``Tensor.__dlpack_device__`` knows such a device only by the name that it had before it
was given one, so it raises for every custom device.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from drivetrain.pytorch.custom.alias import EXTENSION
from drivetrain.pytorch.custom.runtime import Runtime


def register(runtime: Runtime) -> None:
    """``kDLExtDev`` and the index, for tensors of the device."""
    kind: Any = torch.Tensor
    original = kind.__dlpack_device__

    @wraps(original)
    def device_of(self: torch.Tensor) -> tuple[Any, int]:
        if self.device.type == runtime.name:
            return EXTENSION, self.device.index or 0
        found: tuple[Any, int] = original(self)
        return found

    kind.__dlpack_device__ = device_of
