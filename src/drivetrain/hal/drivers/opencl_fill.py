"""Filling memory by a kernel, for platforms whose own fill of shared virtual memory leaks.

NVIDIA's keeps about 900 bytes of the host's memory a call (seen with driver 580.159)."""

from __future__ import annotations

import ctypes
import threading
from typing import Protocol

from drivetrain.errors import CompileError, HalError
from drivetrain.hal.drivers.opencl_context import Context

WIDTH = 16
"""Bytes of the pattern that the kernels repeat; a shorter one is repeated up to that."""
_SOURCE = b"""
__kernel void wide(__global uint4 *out, ulong count, uint4 pattern) {
    for (ulong i = get_global_id(0); i < count; i += get_global_size(0)) out[i] = pattern;
}
__kernel void bytes(__global uchar *out, ulong count, uint4 pattern) {
    uint word[4] = {pattern.x, pattern.y, pattern.z, pattern.w};
    for (ulong i = get_global_id(0); i < count; i += get_global_size(0))
        out[i] = (uchar)(word[(i & 15) >> 2] >> (8 * (i & 3)));
}
"""
_MOST_ITEMS = 1 << 20


class Programs(Protocol):
    def load(self, code: bytes, form: str) -> int: ...
    def function(self, module: int, name: str) -> int: ...


class Filler:
    """Two kernels: 16 bytes at a time where the memory is aligned, and single bytes."""

    def __init__(self, context: Context, programs: Programs) -> None:
        self._context = context
        self._programs = programs
        self._lock = threading.RLock()  # a kernel's arguments are set and launched as one
        self._kernels: dict[str, int] = {}
        self._without = False

    def fill(self, queue: int, ptr: int, pattern: bytes, nbytes: int) -> bool:
        """Queue it. False when the kernels cannot be had: fill in another way."""
        with self._lock:
            if self._without or WIDTH % len(pattern) or not self._ready():
                return False
            repeated = pattern * (WIDTH // len(pattern))
            wide = 0 if ptr % WIDTH else nbytes // WIDTH
            if wide:
                self._launch("wide", queue, ptr, wide, repeated)
            if nbytes > wide * WIDTH:
                self._launch("bytes", queue, ptr + wide * WIDTH, nbytes - wide * WIDTH, repeated)
            return True

    def _ready(self) -> bool:
        if not self._kernels:
            try:
                module = self._programs.load(_SOURCE, "cl")
                self._kernels = {n: self._programs.function(module, n) for n in ("wide", "bytes")}
            except (CompileError, HalError):
                if self._context.lost:
                    raise
                self._without = True
        return not self._without

    def _launch(self, name: str, queue: int, ptr: int, count: int, pattern: bytes) -> None:
        context, api, kernel = self._context, self._context.api, self._kernels[name]
        context.call(api.clSetKernelArgSVMPointer, kernel, 0, ptr)
        number = ctypes.c_uint64(count)
        for index, value in (1, number), (2, ctypes.create_string_buffer(pattern, WIDTH)):
            where = ctypes.addressof(value)
            context.call(api.clSetKernelArg, kernel, index, ctypes.sizeof(value), where)
        size = (ctypes.c_size_t * 1)(min(count, _MOST_ITEMS))
        context.call(api.clEnqueueNDRangeKernel, queue, kernel, 1, None, size, None, 0, None, None)
