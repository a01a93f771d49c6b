"""The driver: which chips there are, their sensors, a probe, and how one is opened.

Everything here is done already, for two chips made of the host's memory. Put yours in their place.
"""

import os
import time

from drivetrain.errors import HalError
from drivetrain.hal.driver import (
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    Kind,
    Telemetry,
    Way,
    hidden_from_all,
)

NAME = "minichip"
CHIPS = 2
MEMORY_BYTES = int(os.environ.get("MINICHIP_MEMORY", 256 << 20))
GROUPS = frozenset()  # what the finished backend has beyond the core; the steps add to it


def absent() -> str:
    """Why this machine cannot have the chip, from files alone; "" when it is worth asking."""
    return ""


def discover() -> tuple[DeviceInfo, ...]:
    """Every chip, by index. Opens nothing."""
    return tuple(
        DeviceInfo(
            driver=NAME,
            index=index,
            name=f"Mini chip {index}",
            vendor="mini",
            uuid=f"MINI-{index}",
            memory_bytes=MEMORY_BYTES,
            driver_version="1",
            # "fake" keeps its reports from counting as shown on hardware: leave it out for a chip.
            capabilities=Capabilities(compute="mini-1", features=("fake",)),
            isolation=Isolation(environment=hidden_from_all(MINICHIP_VISIBLE=str(index))),
            telemetry=telemetry(None),
        )
        for index in range(CHIPS)
    )


def telemetry(info: DeviceInfo | None) -> Telemetry:
    """The sensors now; an absent one is None."""
    return Telemetry(memory_total_bytes=MEMORY_BYTES, health="ok", at=time.time())


def probe(info: DeviceInfo) -> None:
    """A fill, read back. It runs in a process that sees this chip alone, and may hang or crash."""
    backend = open_chip(info)
    stream = backend.stream_create(0)
    address = backend.alloc(1 << 16, Kind.DEVICE, stream)
    backend.fill(address, b"\xa5", 1 << 16, stream)
    back = bytearray(1 << 16)
    backend.read(back, address, Way.DEVICE_TO_HOST, stream)
    backend.free(address, Kind.DEVICE, stream)
    if bytes(back) != b"\xa5" * (1 << 16):
        raise HalError("memory is not what was written", code="wrong", driver=NAME, op="probe")
    backend.close()


def open_chip(info: DeviceInfo):
    from minichip_drivetrain.backend import Chip

    return Chip(info)


DRIVER = Driver(
    name=NAME,
    vendor="mini",
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_chip,
    groups=GROUPS,
    install="what to install for this chip",
)
