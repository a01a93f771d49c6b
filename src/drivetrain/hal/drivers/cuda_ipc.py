"""Device memory of one process, copied into another's by a third that sees both devices.

Two workers see one GPU each, so neither can open the other's memory. Each exports handles of its
allocations (``export``); a mover process, which sees both GPUs and imports nothing heavy, opens
them and copies from peer to peer. Run as ``python -m drivetrain.hal.drivers.cuda_ipc`` with both
devices in ``CUDA_VISIBLE_DEVICES``, source first; it speaks JSON lines on stdin and stdout.

Memory that was not made by cuMemAlloc (torch's ``expandable_segments``) has no such handle:
``export`` then raises Unsupported, and the caller stages through host memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import DriverMissing, HalError, Unsupported

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


_u64 = ctypes.c_uint64
_ptr = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_ptr, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_ptr, ctypes.c_int),
    "cuCtxSetCurrent": (_ptr,),
    "cuMemGetAddressRange_v2": (_ptr, _ptr, _u64),
    "cuIpcGetMemHandle": (_ptr, _u64),
    "cuIpcOpenMemHandle_v2": (_ptr, _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_u64,),
    "cuStreamCreate": (_ptr, ctypes.c_uint),
    "cuStreamSynchronize": (_ptr,),
    "cuMemcpyDtoDAsync_v2": (_u64, _u64, ctypes.c_size_t, _ptr),
}


class _Driver:
    """The few calls of the CUDA driver API that this needs, checked."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverMissing(f"libcuda.so.1 cannot be loaded: {error}", driver="cuda") from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise HalError(
                f"{name} failed with CUDA driver error {code}",
                driver="cuda",
                native=code,
                op=name,
            )


def export(pointers: Sequence[int]) -> list[tuple[str, int]]:
    """(handle in hex, offset in the allocation) for each device pointer of this process.

    Raises Unsupported for memory that cannot be shared so.
    """
    driver = _Driver()
    found = []
    for pointer in pointers:
        base, size = _u64(), ctypes.c_size_t()
        driver.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        handle = _Handle()
        try:
            driver.call("cuIpcGetMemHandle", ctypes.byref(handle), base.value)
        except HalError as error:
            raise Unsupported(
                "this device memory cannot be shared between processes (torch's "
                "expandable_segments, for example): it is staged through host memory",
                driver="cuda",
                native=error.native,
                op=error.op,
            ) from error
        found.append((bytes(handle.reserved).hex(), pointer - base.value))
    return found


class Mover:
    """Device 0 is the source, 1 the target; all memory is opened and copied in the target's
    context, where the source's is mapped over the link between the two."""

    def __init__(self) -> None:
        self._driver = driver = _Driver()
        driver.call("cuInit", 0)
        device = ctypes.c_int()
        driver.call("cuDeviceGet", ctypes.byref(device), 1)
        context = _ptr()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.value)
        driver.call("cuCtxSetCurrent", context)
        self._stream = _ptr()
        driver.call("cuStreamCreate", ctypes.byref(self._stream), 1)
        self._opened: dict[str, int] = {}

    def open(self, handles: Sequence[str]) -> None:
        """Map allocations of either side; those open already stay."""
        for text in handles:
            if text in self._opened:
                continue
            handle = _Handle.from_buffer_copy(bytes.fromhex(text))
            pointer = _u64()
            self._driver.call(
                "cuIpcOpenMemHandle_v2", ctypes.byref(pointer), handle, _LAZY_PEER_ACCESS
            )
            self._opened[text] = pointer.value

    def copy(self, pieces: Sequence[Sequence[Any]]) -> float:
        """Copy [source handle, offset, target handle, offset, bytes] each; the seconds it took."""
        began = time.monotonic()
        for from_handle, from_offset, to_handle, to_offset, nbytes in pieces:
            self._driver.call(
                "cuMemcpyDtoDAsync_v2",
                self._opened[to_handle] + to_offset,
                self._opened[from_handle] + from_offset,
                nbytes,
                self._stream,
            )
        self._driver.call("cuStreamSynchronize", self._stream)
        return time.monotonic() - began


def main() -> None:
    """Serve requests, one JSON object a line, until stdin ends."""
    mover: Mover | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"ok": True}
        try:
            if mover is None:
                mover = Mover()
            if request["op"] == "open":
                mover.open(request["handles"])
            elif request["op"] == "copy":
                answer["seconds"] = mover.copy(request["pieces"])
        except HalError as error:
            answer = {"ok": False, "error": str(error), "native": error.native}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
