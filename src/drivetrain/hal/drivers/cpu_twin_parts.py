"""What the twin of the cpu device is made of: memory, loaded code, a kernel's range."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from _ctypes import dlclose  # what ctypes itself has no public name for
from collections.abc import Callable
from functools import cache
from typing import Any

ALIGNMENT = 64
GUARD = 64
_GUARD_BYTES = b"\xa7" * GUARD
_MAPPED_FROM = 256 << 10


class Range(ctypes.Structure):
    """``dt_cpu_range``."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("first", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )

    def __init__(self, grid: Any, block: Any, shared: int, first: int = 0, count: int = 0) -> None:
        super().__init__(tuple(grid), tuple(block), shared, 0, first, count)


@cache
def _mincore() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None).mincore
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    call: Callable[..., int] = found
    return call


class Allocation:
    """Memory at an aligned ``address``, between guard bytes when they are wanted."""

    def __init__(self, nbytes: int, guards: bool) -> None:
        before = GUARD if guards else 0
        whole = max(nbytes, 1) + 2 * before
        self.nbytes = nbytes
        self._map: mmap.mmap | None = None
        self._block: Any = None
        if whole >= _MAPPED_FROM:
            self._map = mmap.mmap(-1, whole)
            base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        else:
            self._block = (ctypes.c_char * (whole + ALIGNMENT))()
            base = ctypes.addressof(self._block)
            base += -base % ALIGNMENT
        self.address = base + before
        if guards:
            ctypes.memmove(base, _GUARD_BYTES, GUARD)
            ctypes.memmove(self.address + nbytes, _GUARD_BYTES, GUARD)

    def damaged(self) -> int | None:
        """Where the first guard byte lies that changed, counted from the address."""
        for start in (-GUARD, self.nbytes):
            found = ctypes.string_at(self.address + start, GUARD)
            for index, (is_now, was) in enumerate(zip(found, _GUARD_BYTES, strict=True)):
                if is_now != was:
                    return start + index
        return None

    def untouched(self) -> int:
        """Bytes of whole pages that were never written."""
        look = _mincore()
        if self._map is None or look is None:
            return 0
        pages = -(-len(self._map) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        start = self.address & -mmap.PAGESIZE
        if look(start, pages * mmap.PAGESIZE, resident):
            return 0
        return sum(1 - (each & 1) for each in resident) * mmap.PAGESIZE

    def give_back(self) -> None:
        if self._map is not None:
            self._map.close()
        self._map = self._block = None


def _unique_path(descriptor: int, number: int) -> str:
    """The loader takes two files of one path for the same library, and descriptors come again: the
    path gets a part of its own, ``number`` in steps of ``./`` and ``.//``."""
    steps = "".join(".//" if number >> bit & 1 else "./" for bit in range(32))
    return f"/proc/self/fd/{steps}{descriptor}"


class Library:
    """A loaded shared object, unloaded when nothing uses it any more."""

    _loaded = 0

    def __init__(self, code: bytes) -> None:
        self.functions: dict[str, int] = {}
        self._library: ctypes.CDLL | None = None
        with contextlib.ExitStack() as stack:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("drivetrain-kernels")
                stack.callback(os.close, descriptor)
                Library._loaded += 1
                path = _unique_path(descriptor, Library._loaded)
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(code)
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="drivetrain-"))
                path = os.path.join(folder, "kernels.so")
                with open(path, "wb") as file:
                    file.write(code)
            self._library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)

    def symbol(self, name: str) -> int | None:
        try:
            found = getattr(self._library, name)
        except AttributeError:
            return None
        return ctypes.cast(found, ctypes.c_void_p).value

    def __del__(self) -> None:
        library, self._library = getattr(self, "_library", None), None
        if library is not None and not sys.is_finalizing():
            dlclose(library._handle)


_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Function:
    """A kernel: its entry, and the bytes of its arguments once they were told."""

    def __init__(self, library: Library, symbol: str, entry: int) -> None:
        self.library = library  # keeps it loaded
        self.symbol = symbol
        self.sizes: tuple[int, ...] | None = None
        self.call = _ENTRY(entry)

    def values_at(self, arguments: int) -> ctypes.Array[ctypes.c_void_p]:
        """A table of pointers to copies of the arguments, which the table keeps."""
        sizes = self.sizes or ()
        count = len(sizes)
        given = (ctypes.c_void_p * count).from_address(arguments) if count else ()
        offsets, at = [], 0
        for size in sizes:
            at = -(-at // 16) * 16
            offsets.append(at)
            at += size
        block = (ctypes.c_char * (at + 16))()
        base = ctypes.addressof(block)
        base += -base % 16
        for source, offset, size in zip(given, offsets, sizes, strict=True):
            ctypes.memmove(base + offset, source, size)
        table = (ctypes.c_void_p * max(count, 1))(*(base + offset for offset in offsets))
        table._block = block  # type: ignore[attr-defined]
        return table
