"""Memory of an OpenCL device: allocated, given back in a stream's order, copied, filled."""

from __future__ import annotations

import ctypes
import threading
from functools import partial

from drivetrain.errors import HalError, OutOfMemory, Timeout
from drivetrain.hal.drivers.opencl_api import NAME, Cl
from drivetrain.hal.drivers.opencl_context import Context
from drivetrain.hal.drivers.opencl_heaps import Heap
from drivetrain.hal.drivers.opencl_queues import Queues
from drivetrain.hal.kinds import Kind, Way
from drivetrain.hal.telemetry import host, nvml

_LOOKED_AT = 32
_MOST_WAITING = 4096
_WAIT_S = 10.0
_BOUNCED_BYTES = 256 << 10
"""Host memory up to this size is copied aside, so that the caller need not wait for the queue."""
_PATTERN_BYTES = 1 << 20
_CHECKED_BYTES = 1 << 20
"""Allocations from this size on are compared with what the host has left, where the device has the
host's memory: it is taken when it is touched, and then it is too late to refuse."""
_MARGIN = 64 << 20


class Memory:
    """All that the backend has allocated, and what waits behind an event: memory to be freed, and
    host memory that a copy still reads."""

    def __init__(self, context: Context, queues: Queues, heap: Heap, *, shares_host: bool) -> None:
        self._context = context
        self._queues = queues
        self._heap = heap
        self._shares_host = shares_host
        self._lock = threading.RLock()  # a finaliser may come in between
        self._live: dict[int, tuple[Kind, int]] = {}
        self._pinned: dict[int, int] = {}
        self._bytes = 0
        self._waiting: list[tuple[int, int, Kind, object]] = []
        self._total = context.found.number(Cl.DEVICE_GLOBAL_MEM_SIZE)
        context.memory = self.info

    def info(self) -> tuple[int, int]:
        """(free, total) bytes, as well as they can be known: OpenCL itself does not tell."""
        ours = max(0, self._total - self._bytes)
        found = self._context.found
        if self._shares_host:
            return min(ours, host.memory().free_bytes), self._total
        if "cl_amd_device_attribute_query" in found.extensions:
            free = found.number(Cl.DEVICE_GLOBAL_FREE_MEMORY_AMD) & 0xFFFFFFFF
            return min(ours, free << 10), self._total
        if found.uuid.startswith("GPU-"):
            now = nvml.telemetry(found.uuid)
            if now.memory_total_bytes and now.memory_used_bytes is not None:
                # What was never touched may not be taken from the device yet.
                free = now.memory_total_bytes - now.memory_used_bytes
                return min(ours, free), now.memory_total_bytes
        return ours, self._total

    # -- allocate and free -----------------------------------------------------------------------

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        kind = Kind(kind)
        self._collect()
        try:
            ptr = self._take(nbytes, kind)
        except OutOfMemory:
            # What waits for its last user may be just what is lacking.
            self._collect(wait=True)
            ptr = self._take(nbytes, kind)
        with self._lock:
            self._live[ptr] = kind, nbytes
            if kind is Kind.PINNED:
                self._pinned[ptr] = nbytes
            self._bytes += nbytes
        return ptr

    def _take(self, nbytes: int, kind: Kind) -> int:
        if kind is Kind.DEVICE and self._bytes + nbytes > self._total:
            raise self._context.no_memory("alloc", nbytes)
        looks = self._shares_host and nbytes >= _CHECKED_BYTES
        if looks and nbytes + _MARGIN > host.memory().free_bytes:
            raise self._context.no_memory("alloc", nbytes)
        return self._heap.take(nbytes, kind)

    def free(self, ptr: int, kind: int, stream: int) -> None:
        self._context.check("free")
        with self._lock:
            owned = self._live.get(ptr)
            if owned is not None and owned[0] == kind:
                del self._live[ptr]
                self._pinned.pop(ptr, None)
                self._bytes -= owned[1]
        if owned is None or owned[0] != kind:
            raise self._context.error(
                "not_allocated", "free", f"no {Kind(kind).name.lower()} memory begins at {ptr:#x}"
            )
        self._after(stream, ptr, owned[0], None)
        self._collect()

    def _after(self, stream: int, ptr: int, kind: Kind, kept: object) -> None:
        event = self._queues.marker(stream)
        with self._lock:
            self._waiting.append((event, ptr, kind, kept))

    def _collect(self, *, wait: bool = False) -> None:
        """Let go of what nobody uses any more; ``wait`` a while for the rest."""
        if not self._waiting:
            return
        context = self._context
        with self._lock:
            crowded = len(self._waiting) > _MOST_WAITING
            count = len(self._waiting) if wait or crowded else _LOOKED_AT
            looked, self._waiting = self._waiting[:count], self._waiting[count:]
        left = []
        try:
            while looked:
                event, ptr, kind, kept = looked[0]
                done = self._over(event)
                if not done and (wait or crowded):
                    done = context.wait_until(partial(self._over, event), _WAIT_S)
                looked.pop(0)
                if not done:
                    left.append((event, ptr, kind, kept))
                    continue
                context.api.clReleaseEvent(event)
                if ptr:
                    self._heap.release(ptr, kind)
        finally:
            if looked or left:
                with self._lock:
                    self._waiting = left + looked + self._waiting

    def _over(self, event: int) -> bool:
        """Whether a marker was reached, also by work that failed: whoever waits for it is told."""
        try:
            return self._context.complete(event)
        except HalError:
            if self._context.lost:
                raise
            return True

    def close(self) -> None:
        """Free everything; nothing is running on the device any more."""
        with self._lock:
            left = [(ptr, kind) for ptr, (kind, _) in self._live.items()]
            left += [(ptr, kind) for _, ptr, kind, _ in self._waiting if ptr]
            events = [event for event, *_ in self._waiting]
            self._live, self._waiting, self._bytes = {}, [], 0
            self._pinned = {}
        for ptr, kind in left:
            self._heap.release(ptr, kind)
        for event in events:
            self._context.api.clReleaseEvent(event)
        self._heap.close()

    # -- copy and fill ---------------------------------------------------------------------------

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        host_free = host_free and way in (Way.HOST_TO_DEVICE, Way.HOST_TO_HOST)
        way = self._way(dst, src, Way(way))
        if host_free and nbytes <= _BOUNCED_BYTES:
            aside = ctypes.create_string_buffer(nbytes)
            ctypes.memmove(aside, src, nbytes)
            self._heap.copy(stream, dst, ctypes.addressof(aside), nbytes, way)
            self._queues.queued()
            self._after(stream, 0, Kind.DEVICE, aside)
            self._collect()
            return
        self._heap.copy(stream, dst, src, nbytes, way)
        self._queues.queued()
        if host_free:
            self._wait(stream, "copy")

    def _wait(self, stream: int, op: str) -> None:
        from drivetrain.hal.opened import wait_limit_s

        limit = wait_limit_s()
        if not self._queues.wait(stream, limit):
            raise Timeout(
                f"{op} on {self._context.address}: the stream did not come to it within {limit:g} "
                "s; it goes on, and the host memory must stay as it is",
                code="timeout",
                driver=NAME,
                op=op,
                device=self._context.address,
            )

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        nbytes = len(pattern) * count
        if self._heap.maps_pinned and self._is_pinned(ptr):
            # Mapped for as long as it lives, it may be filled by copies only.
            repeated = pattern * (min(nbytes, _PATTERN_BYTES) // len(pattern))
            block = ctypes.create_string_buffer(repeated, len(repeated))
            for at in range(0, nbytes, len(repeated)):
                size = min(len(repeated), nbytes - at)
                start = ctypes.addressof(block)
                self._heap.copy(stream, ptr + at, start, size, Way.HOST_TO_HOST)
            self._after(stream, 0, Kind.PINNED, block)
        else:
            self._heap.fill(stream, ptr, pattern, nbytes)
        self._queues.queued()

    def _way(self, dst: int, src: int, way: Way) -> Way:
        """The way with pinned memory as what it is for commands here: the host's."""
        if not self._pinned or not self._heap.maps_pinned:
            return way
        reads_host = way in (Way.HOST_TO_DEVICE, Way.HOST_TO_HOST) or self._is_pinned(src)
        writes_host = way in (Way.DEVICE_TO_HOST, Way.HOST_TO_HOST) or self._is_pinned(dst)
        if reads_host:
            return Way.HOST_TO_HOST if writes_host else Way.HOST_TO_DEVICE
        return Way.DEVICE_TO_HOST if writes_host else Way.DEVICE_TO_DEVICE

    def _is_pinned(self, ptr: int) -> bool:
        with self._lock:
            return any(start <= ptr < start + nbytes for start, nbytes in self._pinned.items())
