"""The project's own device code, and the only home of it: one file a family of kernels.

Each is CUDA C with a launch rule and a reference in numpy (extra ``kernels``), and runs on every
driver that takes kernels. ``FAMILIES`` names them all; a family's ``check(device, stream, size)``
compares the device with the reference.
"""

from __future__ import annotations

from collections.abc import Mapping

from drivetrain.hal.kernels import (
    activations,
    elementwise,
    gather,
    gemm,
    hash,
    histogram,
    indexing,
    loss,
    normalization,
    optimizers,
    philox,
    pooling,
    reduction,
    scan,
    softmax,
    stencil,
    transpose,
    unfold,
)
from drivetrain.hal.kernels.family import Family, Launch

__all__ = ["FAMILIES", "Family", "Launch"]

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for module in (
        elementwise,
        activations,
        gemm,
        reduction,
        scan,
        histogram,
        transpose,
        stencil,
        softmax,
        normalization,
        unfold,
        pooling,
        loss,
        indexing,
        optimizers,
        philox,
        hash,
        gather,
    )
    for family in module.FAMILIES
}
