"""The project's own kernels, each against its reference, at sizes that fit the block and do not."""

from __future__ import annotations

from typing import Any

from drivetrain.hal.conformance.check import Check, add
from drivetrain.hal.device import Device

SIZES = (33, 256, 1000)


def _check(name: str, family: Any, size: int) -> Check:
    def function(device: Device) -> None:
        family.check(device, device.stream(), size)

    return Check(
        f"families.{name}_{size}",
        f"{name} of size {size} gives what its reference gives.",
        function,
        frozenset({"compute"}),
        limit_s=180.0,
    )


def _add_all() -> None:
    try:
        from drivetrain.hal.kernels import FAMILIES
    except ImportError as error:
        if error.name != "drivetrain.hal.kernels":
            raise
        return
    for name, family in FAMILIES.items():
        for size in getattr(family, "sizes", SIZES):
            add(_check(name, family, size))


_add_all()
