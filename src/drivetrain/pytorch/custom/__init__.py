"""Chips that torch does not know, as torch devices: one call, no C++ needed.

See docs/custom_devices.md.
"""

from __future__ import annotations

from drivetrain.pytorch.custom.config import Config
from drivetrain.pytorch.custom.protocol import Backend, Kernel, OpaqueBackend
from drivetrain.pytorch.custom.registration import Handle, register_custom_device, registered
from drivetrain.pytorch.custom.table import Fallbacks, FallbackWarning

__all__ = [
    "Backend",
    "Config",
    "FallbackWarning",
    "Fallbacks",
    "Handle",
    "Kernel",
    "OpaqueBackend",
    "register_custom_device",
    "registered",
]
