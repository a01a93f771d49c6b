"""torch's operations as kernels of the HAL: the table for devices of every driver with kernels.

Device code is in `drivetrain.hal.kernels`; the modules ``hal_ops_*`` say which of it an operation
needs. What is not in the table runs on the CPU and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from drivetrain.hal.opened import opened
from drivetrain.pytorch.custom import (
    hal_ops_convolution,
    hal_ops_elements,
    hal_ops_layers,
    hal_ops_places,
    hal_ops_pointwise,
    hal_ops_sums,
    hal_ops_training,
)
from drivetrain.pytorch.custom.hal_backend import HalBackend
from drivetrain.pytorch.custom.hal_ops_arrays import TABLE
from drivetrain.pytorch.custom.protocol import Kernel
from drivetrain.pytorch.custom.schema import overload

MODULES = (
    hal_ops_elements,
    hal_ops_pointwise,
    hal_ops_sums,
    hal_ops_convolution,
    hal_ops_layers,
    hal_ops_places,
    hal_ops_training,
)


def kernels(backend: HalBackend) -> Mapping[str, Kernel]:
    """Those of `TABLE` that this torch knows and asks devices for; nothing for devices that run no
    kernels, or none that they are given as source."""
    found = [opened(device).backend for device in backend.devices]
    if any("compute" not in b.groups or "binary_only" in b.target.features for b in found):
        return {}
    return {name: each for name, each in TABLE.items() if _asked_for(name)}


def _asked_for(name: str) -> bool:
    """Whether torch has the overload and does not take it apart before a device is asked."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    short = name.removesuffix(".default")
    return overload(name) is not None and not has(short, "CompositeImplicitAutograd")
