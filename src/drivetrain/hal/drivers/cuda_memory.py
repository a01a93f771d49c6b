"""Memory of a device: allocated, given back in a stream's order, copied, filled."""

from __future__ import annotations

import ctypes
import threading
from functools import partial
from typing import Any

from drivetrain.errors import HalError, OutOfMemory, Timeout
from drivetrain.hal.drivers.cuda_api import Cu, MemAccessDesc
from drivetrain.hal.drivers.cuda_context import Context
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.kinds import Kind, Way

_KEPT_SHARE = 8
"""The driver's pool may keep one part in so many of the device's memory. Its own default is 0:
each wait would hand all free memory back, and the next allocation would map it anew."""

_LOOKED_AT = 32
_MOST_WAITING = 4096
_SEED_PATTERNS = 4096
_WAIT_S = 10.0


class Memory:
    """All that the backend has allocated, and what waits to be freed.

    Memory that has no stream-ordered free (pinned, managed, and all where the driver has no pool)
    waits behind an event and is freed by a later call. ``stages``: the driver copies pageable
    memory aside before a copy from it returns.
    """

    def __init__(self, context: Context, *, pool: bool, stages: bool) -> None:
        self._context = context
        self._api = context.api
        self._lock = threading.Lock()
        self._live: dict[int, Kind] = {}
        self._waiting: list[tuple[int, int, Kind]] = []
        self._after_capture: list[tuple[int, int, Kind]] = []
        self._events: list[int] = []
        self.pool = 0
        """The device's pool; 0 where there is none."""
        self._threshold = 0
        """The pool's own, from before it was raised."""
        self._raised = 0
        self._stages = stages
        if pool:
            self._use_pool()

    def _use_pool(self) -> None:
        api, call = self._api, self._context.call
        handle = ctypes.c_void_p()
        call(api.cuDeviceGetMemPool, ctypes.byref(handle), self._context.device)
        self.pool = int(handle.value or 0)
        _, total = self.info()
        self._threshold = self._pool_threshold()
        if self._threshold < total // _KEPT_SHARE:
            self._raised = total // _KEPT_SHARE
            self._set_pool_threshold(self._raised)

    def _pool_threshold(self) -> int:
        box = ctypes.c_uint64()
        self._context.call(
            self._api.cuMemPoolGetAttribute,
            self.pool,
            Cu.MEMPOOL_ATTR_RELEASE_THRESHOLD,
            ctypes.byref(box),
        )
        return box.value

    def _set_pool_threshold(self, nbytes: int) -> None:
        self._context.call(
            self._api.cuMemPoolSetAttribute,
            self.pool,
            Cu.MEMPOOL_ATTR_RELEASE_THRESHOLD,
            ctypes.byref(ctypes.c_uint64(nbytes)),
        )

    def info(self) -> tuple[int, int]:
        """(free, total) bytes; what the pool keeps unused counts as free."""
        api, call = self._api, self._context.call
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call(api.cuMemGetInfo, ctypes.byref(free), ctypes.byref(total))
        kept = 0
        if self.pool:
            reserved, used = ctypes.c_uint64(), ctypes.c_uint64()
            known = (
                (Cu.MEMPOOL_ATTR_RESERVED_MEM_CURRENT, reserved),
                (Cu.MEMPOOL_ATTR_USED_MEM_CURRENT, used),
            )
            codes = [  # brought by a later driver than the pool itself
                self._context.code(api.cuMemPoolGetAttribute, self.pool, name, ctypes.byref(box))
                for name, box in known
            ]
            if not any(codes):
                kept = max(0, reserved.value - used.value)
        return min(total.value, free.value + kept), total.value

    # -- allocate and free -----------------------------------------------------------------------

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        kind = Kind(kind)
        self._context.check_capture(stream, "alloc")
        self._collect()
        try:
            ptr = self._take(nbytes, kind, stream)
        except OutOfMemory:
            # What waits for its last user may be just what is lacking.
            self._collect(wait=True)
            if self.pool:
                self._context.wait_stream(stream, _WAIT_S)  # what was freed there
                self._context.call(self._api.cuMemPoolTrimTo, self.pool, 0)
            ptr = self._take(nbytes, kind, stream)
        self._live[ptr] = kind
        return ptr

    def _take(self, nbytes: int, kind: Kind, stream: int) -> int:
        api = self._api
        box = ctypes.c_uint64()
        where = ctypes.byref(box)
        function: Any
        arguments: tuple[Any, ...]
        if kind is Kind.PINNED:
            function = api.cuMemHostAlloc
            arguments = (where, nbytes, Cu.MEMHOSTALLOC_PORTABLE)
        elif kind is Kind.MANAGED:
            function = api.cuMemAllocManaged
            arguments = (where, nbytes, Cu.MEM_ATTACH_GLOBAL)
        elif self.pool:
            function, arguments = api.cuMemAllocAsync, (where, nbytes, stream)
        else:
            function, arguments = api.cuMemAlloc, (where, nbytes)
        code = self._context.code(function, *arguments)
        if code:
            raise self._context.failure(function.__name__, code, requested=nbytes)
        return box.value

    def free(self, ptr: int, kind: int, stream: int) -> None:
        context = self._context
        owned = self._live.pop(ptr, None)
        if owned is None or owned != kind:
            if owned is not None:
                self._live[ptr] = owned
            raise context.error(
                "not_allocated", "free", f"no {Kind(kind).name.lower()} memory begins at {ptr:#x}"
            )
        if context.captures and context.capturing(stream):
            # A free would become a part of the graph.
            with self._lock:
                self._after_capture.append((stream, ptr, owned))
            return
        event = 0
        try:
            if owned is Kind.DEVICE and self.pool:
                context.call(self._api.cuMemFreeAsync, ptr, stream)
                return
            event = self._event()
            context.call(self._api.cuEventRecord, event, stream)
        except HalError:  # it is not freed: `close` does it
            self._live[ptr] = owned
            if event:
                self._events.append(event)
            raise
        with self._lock:
            self._waiting.append((event, ptr, owned))
        self._collect()

    def capture_ended(self) -> None:
        """Free what was given back on streams while they were being captured."""
        with self._lock:
            left, self._after_capture = self._after_capture, []
        for stream, ptr, kind in left:
            self._live[ptr] = kind
            self.free(ptr, kind, stream)

    def _event(self) -> int:
        with self._lock:
            if self._events:
                return self._events.pop()
        box = ctypes.c_void_p()
        self._context.call(self._api.cuEventCreate, ctypes.byref(box), Cu.EVENT_DISABLE_TIMING)
        return int(box.value or 0)

    def _collect(self, *, wait: bool = False) -> None:
        """Free what nobody uses any more; ``wait`` a while for the rest."""
        if not self._waiting:
            return
        context, query = self._context, self._api.cuEventQuery
        with self._lock:
            crowded = len(self._waiting) > _MOST_WAITING
            count = len(self._waiting) if wait or crowded else _LOOKED_AT
            looked, self._waiting = self._waiting[:count], self._waiting[count:]
        left = []
        try:
            while looked:
                event, ptr, kind = looked[0]
                done = context.ready(query, event)
                if not done and (wait or crowded):
                    done = context.wait_until(partial(context.ready, query, event), _WAIT_S)
                looked.pop(0)
                if done:
                    self._events.append(event)
                    self._release(ptr, kind)
                else:
                    left.append((event, ptr, kind))
        finally:
            if looked or left:
                with self._lock:
                    self._waiting = left + looked + self._waiting

    def _release(self, ptr: int, kind: Kind) -> None:
        function = self._api.cuMemFreeHost if kind is Kind.PINNED else self._api.cuMemFree
        self._context.call(function, ptr)

    def close(self) -> None:
        """Free everything; nothing is running on the device any more."""
        with self._lock:
            left = list(self._live.items())
            left += [(ptr, kind) for _, ptr, kind in self._waiting + self._after_capture]
            events = self._events + [event for event, _, _ in self._waiting]
            self._live, self._waiting, self._after_capture, self._events = {}, [], [], []
        give = GivingBack()
        for ptr, kind in left:
            give(self._release, ptr, kind)
        for event in events:
            give(self._context.call, self._api.cuEventDestroy, event)
        if self.pool:
            give(self._lower_threshold)
            give(self._context.call, self._api.cuMemPoolTrimTo, self.pool, 0)
        give.end()

    def _lower_threshold(self) -> None:
        if self._raised and self._pool_threshold() == self._raised:  # nobody else set it
            self._set_pool_threshold(self._threshold)

    # -- host memory of others ---------------------------------------------------------------------

    def register(self, ptr: int, nbytes: int) -> None:
        """Pin host memory that somebody else allocated, so that it is copied fast."""
        self._context.call(self._api.cuMemHostRegister, ptr, nbytes, Cu.MEMHOSTREGISTER_PORTABLE)

    def unregister(self, ptr: int) -> None:
        """Undo `register`. Copies from and to the memory must be done."""
        self._context.call(self._api.cuMemHostUnregister, ptr)

    def _in_host_memory(self, ptr: int) -> bool | None:
        """True: pinned, False: a device's or managed, None: pageable."""
        return self._api.in_host_memory(self._context.code, ptr)

    # -- copy and fill -----------------------------------------------------------------------------

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        context, api = self._context, self._api
        host_free = host_free and way in (Way.HOST_TO_DEVICE, Way.HOST_TO_HOST)
        if host_free:
            context.check_capture(stream, "copy from host memory that is free on return")
        if way == Way.HOST_TO_DEVICE:
            context.call(api.cuMemcpyHtoDAsync, dst, src, nbytes, stream)
        elif way == Way.DEVICE_TO_HOST:
            context.call(api.cuMemcpyDtoHAsync, dst, src, nbytes, stream)
        elif way == Way.DEVICE_TO_DEVICE:
            context.call(api.cuMemcpyDtoDAsync, dst, src, nbytes, stream)
        else:
            context.call(api.cuMemcpyAsync, dst, src, nbytes, stream)
        if host_free and not (self._stages and self._in_host_memory(src) is None):
            self._wait(stream, "copy")

    def _wait(self, stream: int, op: str) -> None:
        from drivetrain.hal.opened import wait_limit_s

        limit = wait_limit_s()
        if not self._context.wait_stream(stream, limit):
            raise Timeout(
                f"{op} on {self._context.address}: the stream did not come to it within {limit:g} "
                "s; it goes on, and the host memory must stay as it is",
                code="timeout",
                driver=self._api.driver,
                op=op,
                device=self._context.address,
            )

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        context, api = self._context, self._api
        while len(pattern) > 4 and pattern[: len(pattern) // 2] == pattern[len(pattern) // 2 :]:
            pattern, count = pattern[: len(pattern) // 2], count * 2
        width = len(pattern)
        if width <= 4:
            function = {1: api.cuMemsetD8Async, 2: api.cuMemsetD16Async, 4: api.cuMemsetD32Async}
            context.call(function[width], ptr, int.from_bytes(pattern, "little"), count, stream)
            return
        # The first patterns word by word, as columns of a table; then what is there is copied
        # behind itself, twice as much each time. Host memory, whose copies would hold the caller
        # up, is all done as a table.
        seed = count
        if count > _SEED_PATTERNS and self._in_host_memory(ptr) is False:
            seed = _SEED_PATTERNS
        if "tables" in api.off:
            for at, byte in enumerate(pattern):
                context.call(api.cuMemsetD2D8Async, ptr + at, width, byte, 1, seed, stream)
        else:
            for at in range(0, width, 4):
                word = int.from_bytes(pattern[at : at + 4], "little")
                context.call(api.cuMemsetD2D32Async, ptr + at, width, word, 1, seed, stream)
        done, total = seed * width, count * width
        while done < total:
            size = min(done, total - done)
            context.call(api.cuMemcpyDtoDAsync, ptr + done, ptr, size, stream)
            done += size

    # -- peers -------------------------------------------------------------------------------------

    def share_with(self, device: int) -> None:
        """Let another device read and write the pool's memory."""
        if self.pool:
            access = MemAccessDesc(
                Cu.MEM_LOCATION_TYPE_DEVICE, device, Cu.MEM_ACCESS_FLAGS_PROT_READWRITE
            )
            self._context.call(self._api.cuMemPoolSetAccess, self.pool, ctypes.byref(access), 1)
