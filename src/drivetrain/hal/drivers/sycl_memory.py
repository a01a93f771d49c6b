"""Unified shared memory of a SYCL device: allocated, given back in a stream's order, copied,
filled."""

from __future__ import annotations

import ctypes

from drivetrain.errors import HalError, OutOfMemory, Timeout
from drivetrain.hal.drivers.sycl_api import NAME
from drivetrain.hal.drivers.sycl_context import Context
from drivetrain.hal.drivers.sycl_streams import Streams
from drivetrain.hal.drivers.waits import wait_until
from drivetrain.hal.kinds import Kind, Way
from drivetrain.hal.telemetry import host

ALIGNMENT = 256
_WAIT_S = 10.0
_LOOKED_AT = 32
_MOST_WAITING = 4096
_BOUNCED_BYTES = 256 << 10
"""Host memory up to this size is copied aside, so that the caller need not wait for the queue."""
_CHECKED_BYTES = 1 << 20
"""Allocations from this size on are compared with what the host has left, where the device has the
host's memory: it is taken when it is touched, and then it is too late to refuse."""
_MARGIN = 64 << 20


class Memory:
    """All that the backend has allocated, and what waits behind an event: memory to be freed, and
    host memory that a copy still reads."""

    def __init__(
        self, context: Context, streams: Streams, total: int, *, shares_host: bool
    ) -> None:
        self._context, self._api, self._streams = context, context.api, streams
        self._total, self._shares_host = total, shares_host
        self._live: dict[int, tuple[Kind, int]] = {}
        self._waiting: list[tuple[int, int, object]] = []
        """(SYCL's event, an address to free or 0, what is kept alive)."""
        self._used = 0
        context.free_and_total = self.info

    def info(self) -> tuple[int, int]:
        """(free, total) bytes, as well as they can be known: SYCL itself does not tell."""
        free = max(0, self._total - self._used)
        if self._shares_host:
            free = min(free, host.memory().free_bytes)
        return free, self._total

    # -- allocate and free -----------------------------------------------------------------------

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        kind = Kind(kind)
        with self._context.lock:
            self._context.check("alloc")
            self._collect()
            try:
                ptr = self._take(nbytes, kind)
            except OutOfMemory:
                # What waits for its last user may be just what is lacking.
                self._collect(wait=True)
                ptr = self._take(nbytes, kind)
            self._live[ptr] = kind, nbytes
            if kind is not Kind.PINNED:
                self._used += nbytes
        return ptr

    def _take(self, nbytes: int, kind: Kind) -> int:
        api = self._api
        if kind is not Kind.PINNED and self._used + nbytes > self._total:
            raise self._context.no_memory("alloc", nbytes)
        looks = (self._shares_host or kind is Kind.PINNED) and nbytes >= _CHECKED_BYTES
        if looks and nbytes + _MARGIN > host.memory().free_bytes:
            raise self._context.no_memory("alloc", nbytes)
        function = {
            Kind.DEVICE: api.DPCTLaligned_alloc_device,
            Kind.PINNED: api.DPCTLaligned_alloc_host,
            Kind.MANAGED: api.DPCTLaligned_alloc_shared,
        }[kind]
        ptr = function(ALIGNMENT, nbytes, self._context.home)
        if not ptr:
            raise self._context.no_memory("alloc", nbytes)
        return int(ptr)

    def free(self, ptr: int, kind: int, stream: int) -> None:
        context = self._context
        with context.lock:
            context.check("free")
            owned = self._live.get(ptr)
            if owned is None or owned[0] != kind:
                raise context.error(
                    "not_allocated",
                    "free",
                    f"no {Kind(kind).name.lower()} memory begins at {ptr:#x}",
                )
            event = self._streams.mark(stream)
            del self._live[ptr]
            if owned[0] is not Kind.PINNED:
                self._used -= owned[1]
            self._after(event, ptr, None)
            self._collect()

    def _after(self, event: int, ptr: int, kept: object) -> None:
        if event:
            self._waiting.append((event, ptr, kept))
        elif ptr:
            self._api.DPCTLfree_with_context(ptr, self._context.handle)

    def _collect(self, *, wait: bool = False) -> None:
        """Let go of what nobody uses any more; ``wait`` a while for the rest."""
        crowded = len(self._waiting) > _MOST_WAITING
        count = len(self._waiting) if wait or crowded else _LOOKED_AT
        looked, self._waiting = self._waiting[:count], self._waiting[count:]
        left = []
        for event, ptr, kept in looked:
            done = self._is_over(event)
            if not done and (wait or crowded):
                done = wait_until(lambda event=event: self._is_over(event), _WAIT_S)  # type: ignore[misc]
            if not done:
                left.append((event, ptr, kept))
                continue
            self._api.DPCTLEvent_Delete(event)
            self._after(0, ptr, None)
        self._waiting = left + self._waiting

    def _is_over(self, event: int) -> bool:
        """Whether an event was reached, also by work that failed: whoever waits for it is told."""
        try:
            return self._context.is_complete(event)
        except HalError:
            return True

    def close(self) -> None:
        """Free everything; nothing is running on the device any more."""
        for event, ptr, _ in self._waiting:
            self._api.DPCTLEvent_Delete(event)
            self._after(0, ptr, None)
        for ptr in self._live:
            self._after(0, ptr, None)
        self._live, self._waiting, self._used = {}, [], 0

    # -- copy and fill ---------------------------------------------------------------------------

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        if not nbytes:
            return
        host_free = host_free and way in (Way.HOST_TO_DEVICE, Way.HOST_TO_HOST)
        copy = self._api.DPCTLQueue_Memcpy
        if host_free and nbytes <= _BOUNCED_BYTES:
            aside = ctypes.create_string_buffer(nbytes)
            ctypes.memmove(aside, src, nbytes)
            with self._context.lock:
                self._streams.append(stream, copy, dst, ctypes.addressof(aside), nbytes)
                self._after(self._streams.mark(stream), 0, aside)
                self._collect()
            return
        self._streams.append(stream, copy, dst, src, nbytes)
        if host_free:
            self._wait(stream, "copy")

    def _wait(self, stream: int, op: str) -> None:
        from drivetrain.hal.opened import wait_limit_s

        limit = wait_limit_s()
        if not self._streams.stream_synchronize(stream, limit):
            raise Timeout(
                f"{op} on {self._context.address}: the stream did not come to it within {limit:g} "
                "s; it goes on, and the host memory must stay as it is",
                code="timeout",
                driver=NAME,
                op=op,
                device=self._context.address,
            )

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        if not count:
            return
        function = getattr(self._api, f"DPCTLQueue_Fill{8 * len(pattern)}")
        value: object = int.from_bytes(pattern, "little")
        if len(pattern) == 16:
            value = ctypes.create_string_buffer(pattern, 16)
        self._streams.append(stream, function, ptr, value, count)
