"""The project's own kernels, each against its reference, at sizes that fit the block and do not."""

from __future__ import annotations

from drivetrain.hal.conformance.check import Check, add
from drivetrain.hal.device import Device
from drivetrain.hal.kernels import FAMILIES, Family


def _check(name: str, family: Family, size: int) -> Check:
    def function(device: Device) -> None:
        family.check(device, device.stream(), size)

    return Check(
        f"families.{name}_{size}",
        f"{name} of size {size} gives what its reference gives: {family.proves}.",
        function,
        frozenset({"compute"}),
        limit_s=180.0,
    )


for _name, _family in FAMILIES.items():
    for _size in _family.sizes:
        add(_check(_name, _family, _size))
