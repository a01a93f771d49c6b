"""The small operation by which a driver's probe sees that a device works."""

from __future__ import annotations

import ctypes
from typing import Any

from drivetrain.errors import HalError, Timeout
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.driver import Backend
from drivetrain.hal.kinds import Kind, Way

_PATTERN, _BYTES = bytes.fromhex("dec0175a"), 1 << 20
_WAIT_S = 30.0


def fill_and_read(backend: Backend, info: DeviceInfo) -> None:
    """1 MiB allocated, filled, copied back and compared; closes the backend. Raises HalError."""
    facts: dict[str, Any] = {"driver": info.driver, "op": "probe", "device": info.uuid}
    stream = backend.stream_create(0)
    memory = backend.alloc(_BYTES, Kind.DEVICE, stream)
    backend.fill(memory, _PATTERN, _BYTES // len(_PATTERN), stream)
    back = ctypes.create_string_buffer(_BYTES)
    backend.copy(ctypes.addressof(back), memory, _BYTES, Way.DEVICE_TO_HOST, stream, False)
    backend.free(memory, Kind.DEVICE, stream)
    if not backend.stream_synchronize(stream, _WAIT_S):
        raise Timeout(
            f"a fill and a copy of 1 MiB were not done within {_WAIT_S:g} s",
            code="timeout",
            **facts,
        )
    if back.raw != _PATTERN * (_BYTES // len(_PATTERN)):
        raise HalError(
            "memory read back from the device is not what was written", code="wrong", **facts
        )
    backend.close()
