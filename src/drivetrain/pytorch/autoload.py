"""A device of the HAL as torch's custom device for a program that knows nothing of Drivetrain.

torch calls `register` at the end of ``import torch`` (the entry-point group ``torch.backends``).
It does nothing unless ``DRIVETRAIN_AUTOLOAD`` names a device: a custom device is what
``torch.accelerator`` means from then on, which no program should get unasked.
"""

from __future__ import annotations

import os

VARIABLE = "DRIVETRAIN_AUTOLOAD"


def register() -> None:
    """Register the device at the address in ``DRIVETRAIN_AUTOLOAD``, such as ``opencl:0``.

    A device that torch has one for already stays torch's. Raises BadInput for an address that
    names nothing; torch then says which package's backend failed, and how to switch it off.
    """
    address = os.environ.get(VARIABLE, "")
    if address:
        from drivetrain.pytorch.devices import use

        use(address)
