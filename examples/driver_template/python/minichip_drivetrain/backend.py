"""An open chip: memory, streams and kernels, each in a file of its own."""

import ctypes

from drivetrain.hal.driver import DeviceInfo, Limits, Target
from minichip_drivetrain import GROUPS, NAME
from minichip_drivetrain.errors import failed
from minichip_drivetrain.kernels import Kernels
from minichip_drivetrain.memory import Memory
from minichip_drivetrain.streams import Streams


class Chip(Memory, Streams, Kernels):
    """What `drivetrain.hal.driver.Backend` says, call by call."""

    groups = GROUPS
    alignment = 64
    limits = Limits(
        grid=(2**31 - 1, 65535, 65535), block=(1024, 1024, 64), threads=1024, shared_bytes=1 << 20
    )

    def __init__(self, info: DeviceInfo) -> None:
        self.name = f"{NAME}:{info.index}"
        self.target = Target("cpu", "", ("fp64",), info.driver_version)
        self.total = info.memory_bytes
        for part in (Memory, Streams, Kernels):
            part.begin(self)

    def read(self, out: bytearray, address: int, way: int, stream: int) -> None:
        """Memory of the chip, copied to the host and waited for."""
        host = (ctypes.c_char * len(out)).from_buffer(out)
        self.copy(ctypes.addressof(host), address, len(out), way, stream, False)
        if not self.stream_synchronize(stream, 30.0):
            raise failed("read", "the chip does not come to an end")
