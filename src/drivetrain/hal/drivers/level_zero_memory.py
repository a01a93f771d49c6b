"""Memory of a Level Zero device: allocated, given back in a stream's order, copied, filled."""

from __future__ import annotations

import ctypes
from typing import Any

from drivetrain.errors import HalError, OutOfMemory, Timeout
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.drivers.level_zero_api import NAME, DeviceMemDesc, HostMemDesc, Ze
from drivetrain.hal.drivers.level_zero_context import Context
from drivetrain.hal.drivers.level_zero_streams import Signal, Streams
from drivetrain.hal.drivers.waits import wait_until
from drivetrain.hal.kinds import Kind, Way

ALIGNMENT = 256
_WAIT_S = 10.0
_SEED_BYTES = 64 << 10


class Memory:
    """All that the backend has allocated, and what waits for the end of its stream's work: Level
    Zero frees at once."""

    def __init__(
        self, context: Context, streams: Streams, total: int, longest_pattern: int
    ) -> None:
        self._context, self._api, self._streams = context, context.api, streams
        self._total, self._longest_pattern = total, longest_pattern
        self._live: dict[int, tuple[Kind, int]] = {}
        self._waiting: list[tuple[Signal, int]] = []
        self._used = 0
        context.free_and_total = self.info

    def info(self) -> tuple[int, int]:
        """(free, total) bytes; free is what this process has not taken: Level Zero's own interface
        does not tell what others have."""
        return max(0, self._total - self._used), self._total

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        kind = Kind(kind)
        with self._context.lock:
            self._collect()
            try:
                ptr = self._take(nbytes, kind)
            except OutOfMemory:
                self._collect(wait=True)  # what waits for its last user may be what is lacking
                ptr = self._take(nbytes, kind)
            self._live[ptr] = kind, nbytes
            if kind is not Kind.PINNED:
                self._used += nbytes
            return ptr

    def _take(self, nbytes: int, kind: Kind) -> int:
        api, context = self._api, self._context
        box = ctypes.c_void_p()
        device = ctypes.byref(DeviceMemDesc(Ze.STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC))
        host = ctypes.byref(HostMemDesc(Ze.STRUCTURE_TYPE_HOST_MEM_ALLOC_DESC))
        rest: tuple[Any, ...] = (nbytes, ALIGNMENT)
        if kind is Kind.PINNED:
            function, arguments = api.zeMemAllocHost, (host, *rest)
        elif kind is Kind.MANAGED:
            function, arguments = api.zeMemAllocShared, (device, host, *rest, context.device)
        else:
            function, arguments = api.zeMemAllocDevice, (device, *rest, context.device)
        code = context.code(function, context.handle, *arguments, ctypes.byref(box))
        if code:
            raise context.failure(function.__name__, code, requested=nbytes)
        return int(box.value or 0)

    def free(self, ptr: int, kind: int, stream: int) -> None:
        context = self._context
        with context.lock:
            owned = self._live.get(ptr)
            if owned is None or owned[0] != kind:
                raise context.error(
                    "not_allocated",
                    "free",
                    f"no {Kind(kind).name.lower()} memory begins at {ptr:#x}",
                )
            fence = self._streams.fence(stream)
            if fence is None:
                self._release(ptr)
                return
            self._waiting.append((self._streams.signals.hold(fence), ptr))
            self._collect()

    def _collect(self, *, wait: bool = False) -> None:
        """Free what nobody uses any more; ``wait`` a while for the rest."""
        signals = self._streams.signals
        left, self._waiting = self._waiting, []
        while left:
            signal, ptr = left[0]
            try:
                done = signals.is_set(signal)
                if not done and wait:
                    done = wait_until(lambda s=signal: signals.is_set(s), _WAIT_S)  # type: ignore[misc]
                if done:
                    self._release(ptr)
            except HalError:
                self._waiting += left
                raise
            left.pop(0)
            if done:
                signals.let(signal)
            else:
                self._waiting.append((signal, ptr))

    def _release(self, ptr: int) -> None:
        self._context.call(self._api.zeMemFree, self._context.handle, ptr)
        kind, nbytes = self._live.pop(ptr)
        if kind is not Kind.PINNED:
            self._used -= nbytes

    def close(self) -> None:
        """Free everything; nothing is running on the device any more."""
        for signal, _ in self._waiting:
            self._streams.signals.let(signal)
        self._waiting = []
        give = GivingBack()
        for ptr in list(self._live):
            give(self._release, ptr)
        give.end()

    # -- copy and fill ---------------------------------------------------------------------------

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        if nbytes:
            self._streams.append(stream, "zeCommandListAppendMemoryCopy", dst, src, nbytes)
        if host_free and way in (Way.HOST_TO_DEVICE, Way.HOST_TO_HOST):
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
        total = len(pattern) * count
        if len(pattern) <= self._longest_pattern:
            append = "zeCommandListAppendMemoryFill"
            self._streams.append(stream, append, ptr, pattern, len(pattern), total)
            return
        # The first of them from the host; then what is there is copied behind itself, twice as
        # much each time.
        done = min(total, max(1, _SEED_BYTES // len(pattern)) * len(pattern))
        seed = ctypes.create_string_buffer(pattern * (done // len(pattern)), done)
        self.copy(ptr, ctypes.addressof(seed), done, Way.HOST_TO_DEVICE, stream, True)
        while done < total:
            size = min(done, total - done)
            self.copy(ptr + done, ptr, size, Way.DEVICE_TO_DEVICE, stream, False)
            done += size
