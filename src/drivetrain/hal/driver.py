"""What a driver author writes: one ``Driver`` object over one vendor API.

Start from ``drivetrain/hal/drivers/cpu.py``. A driver that lives outside Drivetrain registers under
the entry-point group ``drivetrain.drivers``; the entry point names a ``Driver``::

    [project.entry-points."drivetrain.drivers"]
    mychip = "mychip_drivetrain:DRIVER"

It is listed from its metadata and imported only after ``drivetrain drivers trust mychip``, and then
only in child processes with a time limit: whatever it does, the others are listed.

The rules of the required core:

* ``absent()`` looks at files only, in the caller's process: a sentence why this machine cannot have
  the device, or ``""`` when ``discover()`` is worth a child process.
* ``discover()`` is passive: it initialises no runtime and opens no context. It returns every device
  it sees, raises ``DriverMissing`` when the vendor's software is not there (the driver is then
  *absent*) and any other ``HalError`` when it is there and does not work (*broken*).
* ``telemetry(info)`` reads sensors without a context.
* ``probe(info)`` does a small operation on the device and compares the result; it raises a
  ``HalError`` otherwise. It runs in a child of its own under ``info.isolation``, may hang, and may
  crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drivetrain.errors import Unsupported
from drivetrain.hal.device import Capabilities, DeviceInfo, Isolation
from drivetrain.hal.telemetry import Telemetry

__all__ = [
    "API_VERSION",
    "GROUPS",
    "OLDEST_API_VERSION",
    "Capabilities",
    "DeviceInfo",
    "Driver",
    "Isolation",
    "Telemetry",
    "hidden_from_all",
]

API_VERSION = 1
OLDEST_API_VERSION = 1

ENTRY_POINT_GROUP = "drivetrain.drivers"

GROUPS = {
    "memory": "open, alloc, free, copy, fill",
    "stream": "streams and events",
    "compute": "module and launch; a driver without it serves torch only",
    "graphs": "captured work, launched again",
    "peer": "one device reads another's memory",
    "ipc": "memory shared between processes",
    "managed": "memory that moves by itself",
    "pinned": "host memory that the device reads fast",
    "timing": "elapsed time between events",
    "collectives": "all-reduce and its kin",
    "triton": "a Triton target",
    "compile_graph": "a back end for torch.compile",
}
"""Optional groups: what each holds. A driver declares those it has in ``Driver.groups``."""


@dataclass(frozen=True)
class Driver:
    """The service provider interface: plain functions over plain facts."""

    name: str
    vendor: str
    absent: Callable[[], str]
    discover: Callable[[], tuple[DeviceInfo, ...]]
    telemetry: Callable[[DeviceInfo], Telemetry]
    probe: Callable[[DeviceInfo], None]
    api_version: int = API_VERSION
    in_process: bool = False
    """Discovery and telemetry read only files of the system: they need no child."""
    groups: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Name of an optional group -> its functions."""
    install: str = ""
    """What ``drivetrain doctor`` says to install when the driver is absent."""

    def group(self, name: str) -> Any:
        """The functions of an optional group; ``Unsupported`` when the driver has none."""
        if name in self.groups:
            return self.groups[name]
        raise Unsupported(
            f"driver {self.name} has no {name} ({GROUPS.get(name, 'unknown group')}); "
            f"it has {', '.join(sorted(self.groups)) or 'no optional group yet'}",
            code="unsupported",
            driver=self.name,
            op=name,
        )


_HIDING = {
    "CUDA_VISIBLE_DEVICES": "",
    # Some runtimes read an empty value as unset; a number that no machine has hides all.
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "",
    "ZE_AFFINITY_MASK": "9999",
    "ONEAPI_DEVICE_SELECTOR": "*:cpu",
}


def hidden_from_all(**shown: str) -> dict[str, str]:
    """Environment in which no vendor shows a device, except as ``shown`` says.

    A GPU reached by two drivers is hidden under both names; the worker's driver sets its own.
    """
    return {**_HIDING, **shown}
