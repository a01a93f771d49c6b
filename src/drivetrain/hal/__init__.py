"""Floor 1: devices in one process, over the vendors' driver libraries. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.hal.device import Capabilities, Device, DeviceInfo, Isolation
from drivetrain.hal.kinds import Kind as MemoryKind
from drivetrain.hal.kinds import MemoryInfo

# Last: ``profile`` and the functions ``device`` and ``drivers`` take those names from the
# submodules, which stay reachable as ``from drivetrain.hal.device import ...``.
from drivetrain.hal.profile import Peaks, profile
from drivetrain.hal.registry import DriverInfo, device, devices, drivers
from drivetrain.hal.telemetry import Telemetry

if TYPE_CHECKING:
    from drivetrain.hal import ops
    from drivetrain.hal.array import Array
    from drivetrain.hal.dlpack import from_dlpack
    from drivetrain.hal.graph import Graph
    from drivetrain.hal.hot import launch_all
    from drivetrain.hal.kernel import (
        BF16,
        F16,
        F32,
        F64,
        I8,
        I16,
        I32,
        I64,
        PTR,
        U8,
        U16,
        U32,
        U64,
        ArgType,
        Kernel,
        Module,
        Plan,
        struct_of,
    )
    from drivetrain.hal.language.source import Source
    from drivetrain.hal.language.variants import Variant, Variants
    from drivetrain.hal.link import Link, LinkKind
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.native_pool import NativePool
    from drivetrain.hal.opened import close_all
    from drivetrain.hal.pool import Pool
    from drivetrain.hal.recording import record
    from drivetrain.hal.replaying import replay
    from drivetrain.hal.resource import (
        Aligned,
        DriverMemory,
        FailureInjection,
        Limit,
        MemoryResource,
        Statistics,
        Stats,
        Tracking,
    )
    from drivetrain.hal.stream import Event, Stream
    from drivetrain.hal.telemetry.health import Health

_TYPES = "PTR I8 I16 I32 I64 U8 U16 U32 U64 F16 BF16 F32 F64"
_LATE = {
    **dict.fromkeys(
        [*_TYPES.split(), "ArgType", "Kernel", "Module", "Plan", "struct_of"], "kernel"
    ),
    **dict.fromkeys(["DriverMemory", "FailureInjection", "Limit", "MemoryResource"], "resource"),
    **dict.fromkeys(["Aligned", "Statistics", "Stats", "Tracking"], "resource"),
    **dict.fromkeys(["Event", "Stream"], "stream"),
    **dict.fromkeys(["Link", "LinkKind"], "link"),
    "Array": "array",
    "Buffer": "memory",
    "from_dlpack": "dlpack",
    "Graph": "graph",
    "Health": "telemetry.health",
    "NativePool": "native_pool",
    "Pool": "pool",
    "Source": "language.source",
    "Variant": "language.variants",
    "Variants": "language.variants",
    "close_all": "opened",
    "launch_all": "hot",
    "record": "recording",
    "replay": "replaying",
}
"""What is imported when it is first asked for: listing devices needs none of it."""


def __getattr__(name: str) -> Any:
    if name != "ops" and name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "ops":
        return import_module(f"{__name__}.ops")
    value = getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "PTR",
    "U8",
    "U16",
    "U32",
    "U64",
    "Aligned",
    "ArgType",
    "Array",
    "Buffer",
    "Capabilities",
    "Device",
    "DeviceInfo",
    "DriverInfo",
    "DriverMemory",
    "Event",
    "FailureInjection",
    "Graph",
    "Health",
    "Isolation",
    "Kernel",
    "Limit",
    "Link",
    "LinkKind",
    "MemoryInfo",
    "MemoryKind",
    "MemoryResource",
    "Module",
    "NativePool",
    "Peaks",
    "Plan",
    "Pool",
    "Source",
    "Statistics",
    "Stats",
    "Stream",
    "Telemetry",
    "Tracking",
    "Variant",
    "Variants",
    "close_all",
    "device",
    "devices",
    "drivers",
    "from_dlpack",
    "launch_all",
    "ops",
    "profile",
    "record",
    "replay",
    "struct_of",
]
