"""Two sorts of memory that OpenCL gives: addresses, and objects without one.

`Addresses` are shared virtual memory (OpenCL 2.0) or Intel's unified shared memory: integers that
kernels take as they are, with any offset. `Objects` are what every device has: buffers known by a
handle. Each of those gets a range of addresses that nothing else has and nobody can touch, so that
the rest of the house counts in integers here too; a kernel is given the buffer behind an address,
or a part of it that begins where the device lets parts begin.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from drivetrain.errors import HalError
from drivetrain.hal.drivers.opencl_api import BufferRegion, Cl, Extended, address_of
from drivetrain.hal.drivers.opencl_context import Context
from drivetrain.hal.drivers.opencl_fill import Filler
from drivetrain.hal.drivers.opencl_platforms import Found
from drivetrain.hal.kinds import Kind, Way

_SCRATCH_BYTES = 4 << 20
_PAGE = 4096


class Heap(Protocol):
    """Memory of one device. Copies and fills are queued and take what they need of the host's
    memory later; nothing here waits."""

    name: str
    alignment: int
    managed: bool
    maps_pinned: bool
    """Whether pinned memory is mapped for good, so that only copies may touch it in a queue."""
    set_pointer: int
    """Address of ``int (void *kernel, unsigned index, const void *pointer)``; 0: there is none."""

    def take(self, nbytes: int, kind: Kind) -> int:
        """An address. Raises OutOfMemory."""

    def release(self, ptr: int, kind: Kind) -> None: ...

    def copy(self, queue: int, dst: int, src: int, nbytes: int, way: Way) -> None: ...

    def fill(self, queue: int, ptr: int, pattern: bytes, nbytes: int) -> None:
        """Not of pinned memory that is mapped."""

    def set_argument(self, kernel: int, index: int, ptr: int) -> int:
        """OpenCL's code. Raises HalError for an address that kernels cannot be given."""

    def close(self) -> None: ...


# -- host memory that the device copies fast -------------------------------------------------------


class Pinned:
    """Buffers that OpenCL places in host memory, mapped as long as they live."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._queue = 0

    def take(self, nbytes: int) -> int:
        context, api = self._context, self._context.api
        with self._lock:
            if not self._queue:
                self._queue = context.made(
                    api.clCreateCommandQueue, context.handle, context.device, 0
                )
        flags = Cl.MEM_READ_WRITE | Cl.MEM_ALLOC_HOST_PTR
        memory = context.made(
            api.clCreateBuffer, context.handle, flags, nbytes, None, requested=nbytes
        )
        access = Cl.MAP_READ | Cl.MAP_WRITE
        try:
            ptr = context.made(
                api.clEnqueueMapBuffer,
                *(self._queue, memory, 1, access, 0, nbytes, 0, None, None),
                requested=nbytes,
            )
        except HalError:
            api.clReleaseMemObject(memory)
            raise
        with self._lock:
            self._held[ptr] = memory
        return ptr

    def release(self, ptr: int) -> None:
        context, api = self._context, self._context.api
        with self._lock:
            memory = self._held.pop(ptr)
        context.call(api.clEnqueueUnmapMemObject, self._queue, memory, ptr, 0, None, None)
        context.call(api.clFlush, self._queue)
        context.call(api.clReleaseMemObject, memory)

    def close(self) -> None:
        if self._queue:
            self._context.api.clReleaseCommandQueue(self._queue)
            self._queue = 0


# -- addresses -------------------------------------------------------------------------------------


class Addresses:
    """Shared virtual memory, or Intel's: what differs is who allocates."""

    alignment = 128
    """Bytes; the largest type of OpenCL C, to which allocations are aligned unless asked less."""

    def __init__(self, context: Context, usm: Extended | None = None) -> None:
        api, found = context.api, context.found
        self._context = context
        self._usm = usm
        self._pinned: Pinned | None = None
        self._taking = threading.RLock()  # a finaliser may come in between
        self.filler: Filler | None = None
        self._copy: Any
        self._fill: Any
        if usm is not None:
            self.name = "usm"
            self._copy, self._fill = usm.clEnqueueMemcpyINTEL, usm.clEnqueueMemFillINTEL
            self._set: Any = usm.clSetKernelArgMemPointerINTEL
            shared = found.number(Cl.DEVICE_SINGLE_DEVICE_SHARED_MEM_CAPABILITIES_INTEL)
            both = (
                Cl.UNIFIED_SHARED_MEMORY_ACCESS_INTEL
                | Cl.UNIFIED_SHARED_MEMORY_CONCURRENT_ACCESS_INTEL
            )
            self.managed = shared & both == both
            host = found.number(Cl.DEVICE_HOST_MEM_CAPABILITIES_INTEL)
            if not host & Cl.UNIFIED_SHARED_MEMORY_ACCESS_INTEL:
                self._pinned = Pinned(context)
        else:
            self.name = "svm"
            self._copy, self._fill = api.clEnqueueSVMMemcpy, api.clEnqueueSVMMemFill
            self._set = api.clSetKernelArgSVMPointer
            # Coarse-grained memory must be mapped before the host touches it, and then the device
            # may not: that is neither pinned nor managed memory.
            capabilities = found.number(Cl.DEVICE_SVM_CAPABILITIES)
            self.managed = bool(capabilities & Cl.DEVICE_SVM_FINE_GRAIN_BUFFER)
            if not self.managed:
                self._pinned = Pinned(context)
        self.maps_pinned = self._pinned is not None
        self.set_pointer = address_of(self._set)

    def take(self, nbytes: int, kind: Kind) -> int:
        context, api = self._context, self._context.api
        if kind is Kind.PINNED and self._pinned is not None:
            return self._pinned.take(nbytes)
        if self._usm is None:
            flags = Cl.MEM_READ_WRITE
            if kind is not Kind.DEVICE:
                flags |= Cl.MEM_SVM_FINE_GRAIN_BUFFER
            context.check("clSVMAlloc")
            with self._taking:  # NVIDIA's fails now and then while another thread is in it
                ptr = api.clSVMAlloc(context.handle, flags, nbytes, 0)
            if not ptr:
                raise context.no_memory("clSVMAlloc", nbytes)
            return int(ptr)
        if kind is Kind.PINNED:
            create = self._usm.clHostMemAllocINTEL
            return context.made(create, context.handle, None, nbytes, 0, requested=nbytes)
        create = self._usm.clSharedMemAllocINTEL
        if kind is Kind.DEVICE:
            create = self._usm.clDeviceMemAllocINTEL
        return context.made(
            create, context.handle, context.device, None, nbytes, 0, requested=nbytes
        )

    def release(self, ptr: int, kind: Kind) -> None:
        context = self._context
        if kind is Kind.PINNED and self._pinned is not None:
            self._pinned.release(ptr)
        elif self._usm is not None:
            context.call(self._usm.clMemFreeINTEL, context.handle, ptr)
        else:
            context.check("clSVMFree")
            with self._taking:
                context.api.clSVMFree(context.handle, ptr)

    def copy(self, queue: int, dst: int, src: int, nbytes: int, way: Way) -> None:
        self._context.call(self._copy, queue, 0, dst, src, nbytes, 0, None, None)

    def fill(self, queue: int, ptr: int, pattern: bytes, nbytes: int) -> None:
        if self.filler is not None and self.filler.fill(queue, ptr, pattern, nbytes):
            return
        self._context.call(self._fill, queue, ptr, pattern, len(pattern), nbytes, 0, None, None)

    def set_argument(self, kernel: int, index: int, ptr: int) -> int:
        if not ptr:
            return null_argument(self._context, kernel, index)
        return self._context.code(self._set, kernel, index, ptr)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()


def null_argument(context: Context, kernel: int, index: int) -> int:
    """A null pointer, which OpenCL writes as a buffer without a handle."""
    return context.code(
        context.api.clSetKernelArg, kernel, index, ctypes.sizeof(ctypes.c_void_p), None
    )


# -- objects ---------------------------------------------------------------------------------------


@dataclass
class _Object:
    handle: int
    nbytes: int
    reserved: int
    parts: dict[int, int] = field(default_factory=dict)
    """Offset -> the part from there to the end."""


class Objects:
    """Buffers behind addresses of our own."""

    name = "buffers"
    managed = False
    maps_pinned = True
    set_pointer = 0

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pinned = Pinned(context)
        self._lock = threading.RLock()
        self._objects: dict[int, _Object] = {}
        self._starts: list[int] = []
        self.alignment = max(16, context.found.number(Cl.DEVICE_MEM_BASE_ADDR_ALIGN) // 8)

    def take(self, nbytes: int, kind: Kind) -> int:
        if kind is Kind.PINNED:
            return self._pinned.take(nbytes)
        context, api = self._context, self._context.api
        handle = context.made(
            api.clCreateBuffer, context.handle, Cl.MEM_READ_WRITE, nbytes, None, requested=nbytes
        )
        reserved = -(-nbytes // _PAGE) * _PAGE
        try:
            start = _reserve(reserved)
        except OSError:
            api.clReleaseMemObject(handle)
            raise context.no_memory("mmap", nbytes) from None
        with self._lock:
            self._objects[start] = _Object(handle, nbytes, reserved)
            insort(self._starts, start)
        return start

    def release(self, ptr: int, kind: Kind) -> None:
        if kind is Kind.PINNED:
            self._pinned.release(ptr)
            return
        with self._lock:
            found = self._objects.pop(ptr)
            self._starts.remove(ptr)
        for handle in (*found.parts.values(), found.handle):
            self._context.call(self._context.api.clReleaseMemObject, handle)
        _give_back(ptr, found.reserved)

    def _at(self, ptr: int, op: str) -> tuple[_Object, int]:
        """The object that an address lies in, and the offset. Raises HalError."""
        with self._lock:
            at = bisect_right(self._starts, ptr) - 1
            if at >= 0:
                start = self._starts[at]
                found = self._objects[start]
                if ptr < start + found.nbytes:
                    return found, ptr - start
        raise self._context.error(
            "not_allocated", op, f"{ptr:#x} lies in no memory that was allocated on the device"
        )

    def copy(self, queue: int, dst: int, src: int, nbytes: int, way: Way) -> None:
        call, api = self._context.call, self._context.api
        if way is Way.HOST_TO_DEVICE:
            to, offset = self._at(dst, "copy")
            call(api.clEnqueueWriteBuffer, queue, to.handle, 0, offset, nbytes, src, 0, None, None)
        elif way is Way.DEVICE_TO_HOST:
            of, offset = self._at(src, "copy")
            call(api.clEnqueueReadBuffer, queue, of.handle, 0, offset, nbytes, dst, 0, None, None)
        elif way is Way.DEVICE_TO_DEVICE:
            (of, start), (to, offset) = self._at(src, "copy"), self._at(dst, "copy")
            call(
                api.clEnqueueCopyBuffer,
                *(queue, of.handle, to.handle, start, offset, nbytes, 0, None, None),
            )
        else:
            self._through_the_device(queue, dst, src, nbytes)

    def _through_the_device(self, queue: int, dst: int, src: int, nbytes: int) -> None:
        """From host to host in a queue's order, which only commands on buffers keep."""
        context, api = self._context, self._context.api
        size = min(nbytes, _SCRATCH_BYTES)
        scratch = context.made(
            api.clCreateBuffer, context.handle, Cl.MEM_READ_WRITE, size, None, requested=size
        )
        try:
            for at in range(0, nbytes, size):
                count = min(size, nbytes - at)
                write, read = api.clEnqueueWriteBuffer, api.clEnqueueReadBuffer
                context.call(write, queue, scratch, 0, 0, count, src + at, 0, None, None)
                context.call(read, queue, scratch, 0, 0, count, dst + at, 0, None, None)
        finally:
            api.clReleaseMemObject(scratch)  # OpenCL keeps it until the commands are done

    def fill(self, queue: int, ptr: int, pattern: bytes, nbytes: int) -> None:
        to, offset = self._at(ptr, "fill")
        self._context.call(
            self._context.api.clEnqueueFillBuffer,
            *(queue, to.handle, pattern, len(pattern), offset, nbytes, 0, None, None),
        )

    def set_argument(self, kernel: int, index: int, ptr: int) -> int:
        context, api = self._context, self._context.api
        if not ptr:
            return null_argument(context, kernel, index)
        found, offset = self._at(ptr, "launch")
        handle = ctypes.c_void_p(self._part(found, offset) if offset else found.handle)
        return context.code(
            api.clSetKernelArg, kernel, index, ctypes.sizeof(handle), ctypes.addressof(handle)
        )

    def _part(self, found: _Object, offset: int) -> int:
        context, api = self._context, self._context.api
        if offset % self.alignment:
            raise context.error(
                "misaligned",
                "launch",
                f"this device gives kernels parts of a buffer from multiples of {self.alignment} "
                f"bytes, and argument begins {offset} bytes into one; copy it to its own buffer",
            )
        with self._lock:
            if offset not in found.parts:
                region = BufferRegion(offset, found.nbytes - offset)
                found.parts[offset] = context.made(
                    api.clCreateSubBuffer,
                    *(found.handle, Cl.MEM_READ_WRITE, Cl.BUFFER_CREATE_TYPE_REGION),
                    ctypes.byref(region),
                )
            return found.parts[offset]

    def close(self) -> None:
        self._pinned.close()


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


_FAILED = ctypes.c_void_p(-1).value


def _reserve(nbytes: int) -> int:
    """Addresses that belong to us and hold nothing: touching them is a fault. Raises OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    start = _libc().mmap(None, nbytes, 0, flags, -1, 0)
    if start in (None, _FAILED):
        raise OSError(ctypes.get_errno(), "no addresses are left")
    return int(start)


def _give_back(start: int, nbytes: int) -> None:
    _libc().munmap(start, nbytes)


def _has_svm(found: Found) -> bool:
    return bool(found.number(Cl.DEVICE_SVM_CAPABILITIES) & Cl.DEVICE_SVM_COARSE_GRAIN_BUFFER)


def heap_of(context: Context, wanted: str = "") -> Heap:
    """The device's best sort of memory, or the one that is ``wanted``: ``usm``, ``svm`` or
    ``buffers``. Raises Unsupported when the device lacks it."""
    api, found = context.api, context.found
    if wanted in ("", "usm") and "cl_intel_unified_shared_memory" in found.extensions:
        usm = api.extended(found.platform.handle, "usm")
        device = found.number(Cl.DEVICE_DEVICE_MEM_CAPABILITIES_INTEL)
        if usm is not None and device & Cl.UNIFIED_SHARED_MEMORY_ACCESS_INTEL:
            return Addresses(context, usm)
    svm = "svm" not in api.off and min(found.version, found.platform.version) >= 200
    if wanted in ("", "svm") and svm and _has_svm(found):
        return Addresses(context)
    if wanted in ("", "buffers"):
        return Objects(context)
    raise context.unsupported("open", f"it has no memory of the sort {wanted!r}")
