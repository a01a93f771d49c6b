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

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal.drivers.cuda_api import NAME, Api, Code, Cu, IpcHandle, load

_u64 = ctypes.c_uint64
_ptr = ctypes.c_void_p
_PAUSE_S = 20e-6


def _call(api: Api, name: str, *arguments: Any) -> None:
    code = getattr(api, name)(*arguments)
    if code:
        word, sentence = api.words(code)
        raise HalError(
            f"{name} failed: {word} ({sentence})",
            driver=NAME,
            native=code,
            native_name=word,
            op=name,
        )


def export(pointers: Sequence[int]) -> list[tuple[str, int]]:
    """(handle in hex, offset in the allocation) for each device pointer of this process.

    Raises Unsupported for memory that cannot be shared so.
    """
    api = load()
    found = []
    for pointer in pointers:
        base, size = _u64(), ctypes.c_size_t()
        _call(api, "cuMemGetAddressRange", ctypes.byref(base), ctypes.byref(size), pointer)
        handle = IpcHandle()
        try:
            _call(api, "cuIpcGetMemHandle", ctypes.byref(handle), base.value)
        except HalError as error:
            raise Unsupported(
                "this device memory cannot be shared between processes (torch's "
                "expandable_segments, for example): it is staged through host memory",
                code="unsupported",
                driver=NAME,
                native=error.native,
                native_name=error.native_name,
                op=error.op,
            ) from error
        found.append((bytes(handle.reserved).hex(), pointer - base.value))
    return found


class Mover:
    """Device 0 is the source, 1 the target; all memory is opened and copied in the target's
    context, where the source's is mapped over the link between the two."""

    def __init__(self) -> None:
        self._api = api = load()
        _call(api, "cuInit", 0)
        device = ctypes.c_int()
        _call(api, "cuDeviceGet", ctypes.byref(device), 1)
        context = _ptr()
        _call(api, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device.value)
        _call(api, "cuCtxSetCurrent", context)
        stream = _ptr()
        _call(api, "cuStreamCreateWithPriority", ctypes.byref(stream), Cu.STREAM_NON_BLOCKING, 0)
        self._stream = stream
        self._opened: dict[str, int] = {}

    def open(self, handles: Sequence[str]) -> None:
        """Map allocations of either side; those open already stay."""
        for text in handles:
            if text in self._opened:
                continue
            handle = IpcHandle.from_buffer_copy(bytes.fromhex(text))
            pointer = _u64()
            _call(
                self._api,
                "cuIpcOpenMemHandle",
                ctypes.byref(pointer),
                handle,
                Cu.IPC_MEM_LAZY_ENABLE_PEER_ACCESS,
            )
            self._opened[text] = pointer.value

    def copy(self, pieces: Sequence[Sequence[Any]]) -> float:
        """Copy [source handle, offset, target handle, offset, bytes] each; the seconds it took."""
        began = time.monotonic()
        for from_handle, from_offset, to_handle, to_offset, nbytes in pieces:
            _call(
                self._api,
                "cuMemcpyDtoDAsync",
                self._opened[to_handle] + to_offset,
                self._opened[from_handle] + from_offset,
                nbytes,
                self._stream,
            )
        while (code := self._api.cuStreamQuery(self._stream)) == Code.ERROR_NOT_READY:
            time.sleep(_PAUSE_S)
        if code:
            _call(self._api, "cuStreamQuery", self._stream)
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
