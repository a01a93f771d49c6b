"""Floor 1: devices in one process, over the vendors' driver libraries. Never imports torch."""

from drivetrain.hal.device import Capabilities, Device, DeviceInfo, Isolation
from drivetrain.hal.memory import MemoryInfo

# Last: the functions ``device`` and ``drivers`` take those names from the submodules, which stay
# reachable as ``from drivetrain.hal.device import ...``.
from drivetrain.hal.registry import DriverInfo, device, devices, drivers
from drivetrain.hal.telemetry import Telemetry

__all__ = [
    "Capabilities",
    "Device",
    "DeviceInfo",
    "DriverInfo",
    "Isolation",
    "MemoryInfo",
    "Telemetry",
    "device",
    "devices",
    "drivers",
]
