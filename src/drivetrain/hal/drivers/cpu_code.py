"""What can be told of a shared object before the loader, which trusts it, sees it."""

from __future__ import annotations

import platform
import struct
import sys

_HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("=IIQQQQQQ")
_SHARED_OBJECT = 3


def _own_machine() -> int | None:
    """ELF's number for this processor, as this interpreter has it."""
    try:
        with open("/proc/self/exe", "rb") as file:
            head = file.read(_HEADER.size)
    except OSError:
        return None
    return int(_HEADER.unpack(head)[2]) if len(head) == _HEADER.size else None


def check_shared_object(code: bytes) -> str:
    """Why these bytes are no 64-bit shared object for this machine; empty when they may be one.

    Parts that lie beyond the end are found here: the loader maps them and the process dies of
    SIGBUS.
    """
    if not sys.platform.startswith("linux"):
        return ""
    if len(code) < _HEADER.size or code[:4] != b"\x7fELF":
        return "it is no ELF file"
    if code[4] != 2 or code[5] != (1 if sys.byteorder == "little" else 2):
        return "it is not for 64 bits in this machine's byte order"
    _, kind, machine, _, _, segments, sections, _, _, size, count, width, number, _ = (
        _HEADER.unpack_from(code)
    )
    if kind != _SHARED_OBJECT:
        return "it is no shared object (link it with -shared)"
    own = _own_machine()
    if own is not None and machine != own:
        return f"it is for ELF machine {machine}, and this is {own} ({platform.machine()})"
    if size != _SEGMENT.size or segments + size * count > len(code):
        return "its program headers are cut off"
    if sections and sections + width * number > len(code):
        return "it is cut off"
    for index in range(count):
        _, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(code, segments + size * index)
        if offset + in_file > len(code):
            return f"its segment {index} is cut off"
    return ""
