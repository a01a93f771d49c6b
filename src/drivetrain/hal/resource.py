"""Where buffers get their memory: the driver itself, and adaptors that wrap any resource.

Adaptors compose: ``Limit(Statistics(Pool(DriverMemory(device))), nbytes)`` is a resource like the
rest and can be given to ``Device.alloc(pool=...)``.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from drivetrain.errors import BadInput, OutOfMemory
from drivetrain.hal.kinds import Kind

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.opened import Opened

SMALLEST_BYTES = 16
"""No allocation is smaller, and no address is a multiple of less."""
MOST_ALIGNMENT = 1 << 30
GRAIN = 512
"""Bytes: what a pool's blocks are multiples of."""
_LARGEST_NAMED = 8


@dataclass(frozen=True)
class Stats:
    """Counts of one resource. Bytes, except ``retries``, ``failures`` and ``live``."""

    allocated: int = 0
    """In buffers now, rounded as the resource rounds."""
    requested: int = 0
    """In buffers now, as asked for."""
    reserved: int = 0
    """Taken from the resource below and not given back."""
    peak_allocated: int = 0
    peak_requested: int = 0
    peak_reserved: int = 0
    live: int = 0
    """Buffers now."""
    retries: int = 0
    """Times memory was given back to the driver because a request did not fit."""
    failures: int = 0
    """Requests that ended in OutOfMemory."""

    @property
    def fragmentation(self) -> float:
        """The share of reserved memory that is in no buffer, in [0, 1]."""
        return 1.0 - self.requested / self.reserved if self.reserved else 0.0


class MemoryResource(Protocol):
    """Memory of one kind on one open device. Safe to call from any thread."""

    opened: Opened
    kind: Kind

    def allocate(self, nbytes: int, stream: int) -> int:
        """An address, usable on ``stream`` from here on; a multiple of the driver's own alignment,
        or of 512 where that is less. Raises OutOfMemory."""

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        """Give back what `allocate` gave for ``nbytes`` on ``stream``. It is used again only after
        the work queued on ``stream`` so far and the events in ``waits``, which become the
        resource's own."""

    def stats(self) -> Stats: ...

    def trim(self, keep: int = 0) -> int:
        """Give unused memory back to the driver until at most ``keep`` bytes are reserved; the
        bytes given back."""


def _opened(device: Device | Opened) -> Opened:
    from drivetrain.hal.device import Device
    from drivetrain.hal.opened import opened

    return opened(device) if isinstance(device, Device) else device


class DriverMemory:
    """Straight from the driver of ``device``, nothing kept. Raises Unsupported for a kind of memory
    that the device lacks."""

    def __init__(self, device: Device | Opened, kind: Kind = Kind.DEVICE) -> None:
        opened = _opened(device)
        if kind is not Kind.DEVICE:
            opened.require(kind.name.lower(), "alloc")
        self.opened = opened
        self.kind = kind
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
        self._bytes = self._peak = self._failures = 0

    def allocate(self, nbytes: int, stream: int) -> int:
        size = max(nbytes, SMALLEST_BYTES)
        try:
            ptr = self.opened.backend.alloc(size, self.kind, stream)
        except OutOfMemory:
            with self._lock:
                self._failures += 1
            raise
        with self._lock:
            self._sizes[ptr] = size
            self._bytes += size
            self._peak = max(self._peak, self._bytes)
        return ptr

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        backend = self.opened.backend
        capturing = stream in self.opened.capturing
        for event in waits:
            if capturing:
                self.opened.wait_for(event, "free")
            else:
                backend.stream_wait(stream, event)
            self.opened.give_event(event)
        with self._lock:
            self._bytes -= self._sizes.pop(ptr)
        backend.free(ptr, self.kind, stream)

    def stats(self) -> Stats:
        return Stats(
            allocated=self._bytes,
            requested=self._bytes,
            reserved=self._bytes,
            peak_allocated=self._peak,
            peak_requested=self._peak,
            peak_reserved=self._peak,
            live=len(self._sizes),
            failures=self._failures,
        )

    def trim(self, keep: int = 0) -> int:
        return 0


class Limit:
    """Refuses what would put more than ``nbytes`` into buffers at once."""

    def __init__(self, resource: MemoryResource, nbytes: int) -> None:
        if not nbytes >= 0:
            raise BadInput(f"a limit of {nbytes} bytes: give 0 or more")
        self.opened, self.kind = resource.opened, resource.kind
        self._inner = resource
        self._limit = nbytes
        self._used = 0
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, stream: int) -> int:
        with self._lock:
            if self._used + nbytes > self._limit:
                raise OutOfMemory(
                    f"{nbytes} bytes on {self.opened.device.address} would pass the limit: "
                    f"{self._used} of {self._limit} bytes are in use. Free buffers or raise it",
                    requested=nbytes,
                    free=self._limit - self._used,
                    total=self._limit,
                    code="limit",
                    driver=self.opened.device.driver,
                    op="alloc",
                    device=self.opened.device.address,
                )
            self._used += nbytes
        try:
            return self._inner.allocate(nbytes, stream)
        except BaseException:
            with self._lock:
                self._used -= nbytes
            raise

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        self._inner.deallocate(ptr, nbytes, stream, waits)
        with self._lock:
            self._used -= nbytes

    def stats(self) -> Stats:
        return self._inner.stats()

    def trim(self, keep: int = 0) -> int:
        return self._inner.trim(keep)


class Statistics:
    """Counts what goes through it, as asked for: of several users of one pool, each can have its
    own. ``reserved`` and ``retries`` are of the resource below."""

    def __init__(self, resource: MemoryResource) -> None:
        self.opened, self.kind = resource.opened, resource.kind
        self._inner = resource
        self._lock = threading.Lock()
        self._bytes = self._peak = self._live = self._failures = 0
        self.requests = 0
        """Buffers ever asked for, those that failed too."""

    def allocate(self, nbytes: int, stream: int) -> int:
        with self._lock:
            self.requests += 1
        try:
            ptr = self._inner.allocate(nbytes, stream)
        except OutOfMemory:
            with self._lock:
                self._failures += 1
            raise
        with self._lock:
            self._live += 1
            self._bytes += nbytes
            self._peak = max(self._peak, self._bytes)
        return ptr

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        self._inner.deallocate(ptr, nbytes, stream, waits)
        with self._lock:
            self._live -= 1
            self._bytes -= nbytes

    def stats(self) -> Stats:
        below = self._inner.stats()
        with self._lock:
            return Stats(
                allocated=self._bytes,
                requested=self._bytes,
                reserved=below.reserved,
                peak_allocated=self._peak,
                peak_requested=self._peak,
                peak_reserved=below.peak_reserved,
                live=self._live,
                retries=below.retries,
                failures=self._failures,
            )

    def reset_peak(self) -> None:
        """From here on the peak is counted anew, from what is held now."""
        with self._lock:
            self._peak = self._bytes

    def trim(self, keep: int = 0) -> int:
        return self._inner.trim(keep)


class Aligned:
    """Addresses that are multiples of ``alignment``, a power of two of at least 16 bytes. What the
    resource below aligns anyway costs nothing."""

    def __init__(self, resource: MemoryResource, alignment: int) -> None:
        right = isinstance(alignment, int) and SMALLEST_BYTES <= alignment <= MOST_ALIGNMENT
        if not right or alignment & (alignment - 1):
            raise BadInput(
                f"an alignment of {alignment!r} bytes: give a power of two from {SMALLEST_BYTES} "
                f"to {MOST_ALIGNMENT}"
            )
        self.opened, self.kind = resource.opened, resource.kind
        self._inner = resource
        self._alignment = alignment
        known = min(self.opened.backend.alignment, GRAIN)
        self._spare = 0 if alignment <= known else alignment - SMALLEST_BYTES
        self._lock = threading.Lock()
        self._bases: dict[int, int] = {}

    def allocate(self, nbytes: int, stream: int) -> int:
        base = self._inner.allocate(nbytes + self._spare, stream)
        ptr = -(-base // self._alignment) * self._alignment
        if self._spare:
            with self._lock:
                self._bases[ptr] = base
        return ptr

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        if self._spare:
            with self._lock:
                ptr = self._bases.pop(ptr)
        self._inner.deallocate(ptr, nbytes + self._spare, stream, waits)

    def stats(self) -> Stats:
        return self._inner.stats()

    def trim(self, keep: int = 0) -> int:
        return self._inner.trim(keep)


@dataclass(frozen=True)
class Holder:
    """A buffer that is alive, and where it was made."""

    ptr: int
    nbytes: int
    stack: tuple[str, ...]
    """``file:line in function``, the innermost last; empty where the depth is 0."""


_HERE = str(Path(__file__).parent)


def _callers(depth: int) -> tuple[str, ...]:
    """The ``depth`` innermost frames outside of this room, the innermost last."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    found: list[str] = []
    at: FrameType | None = frame
    while at is not None and len(found) < depth:
        found.append(f"{at.f_code.co_filename}:{at.f_lineno} in {at.f_code.co_name}")
        at = at.f_back
    return tuple(reversed(found))


class Tracking:
    """Knows each living buffer and the call stack that made it; names the largest when memory
    runs out."""

    def __init__(self, resource: MemoryResource, *, depth: int = 8) -> None:
        self.opened, self.kind = resource.opened, resource.kind
        self._inner = resource
        self._depth = depth
        self._lock = threading.Lock()
        self._holders: dict[int, Holder] = {}

    def allocate(self, nbytes: int, stream: int) -> int:
        try:
            ptr = self._inner.allocate(nbytes, stream)
        except OutOfMemory as error:
            raise _with_holders(error, self.largest()) from error
        stack = _callers(self._depth)
        with self._lock:
            self._holders[ptr] = Holder(ptr, nbytes, stack)
        return ptr

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        with self._lock:
            self._holders.pop(ptr, None)
        self._inner.deallocate(ptr, nbytes, stream, waits)

    def largest(self, count: int = _LARGEST_NAMED) -> tuple[Holder, ...]:
        """The living buffers of most bytes, largest first."""
        with self._lock:
            return tuple(sorted(self._holders.values(), key=lambda h: -h.nbytes)[:count])

    def stats(self) -> Stats:
        return self._inner.stats()

    def trim(self, keep: int = 0) -> int:
        return self._inner.trim(keep)


def _with_holders(error: OutOfMemory, holders: tuple[Holder, ...]) -> OutOfMemory:
    lines = [f"  {h.nbytes} bytes from {h.stack[-1] if h.stack else '?'}" for h in holders]
    return OutOfMemory(
        "\n".join([f"{error}; the largest buffers:", *lines]) if lines else str(error),
        requested=error.requested,
        free=error.free,
        total=error.total,
        code=error.code,
        driver=error.driver,
        native=error.native,
        native_name=error.native_name,
        op=error.op,
        device=error.device,
    )


class FailureInjection:
    """Fails on purpose: each request that ``fails(number, nbytes)``, numbered from 1."""

    def __init__(self, resource: MemoryResource, fails: Callable[[int, int], bool]) -> None:
        self.opened, self.kind = resource.opened, resource.kind
        self._inner = resource
        self._fails = fails
        self._numbers = itertools.count(1)

    def allocate(self, nbytes: int, stream: int) -> int:
        number = next(self._numbers)
        if self._fails(number, nbytes):
            free, total = self.opened.backend.memory()
            raise OutOfMemory(
                f"request {number} for {nbytes} bytes was made to fail",
                requested=nbytes,
                free=free,
                total=total,
                code="injected",
                driver=self.opened.device.driver,
                op="alloc",
                device=self.opened.device.address,
            )
        return self._inner.allocate(nbytes, stream)

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        self._inner.deallocate(ptr, nbytes, stream, waits)

    def stats(self) -> Stats:
        return self._inner.stats()

    def trim(self, keep: int = 0) -> int:
        return self._inner.trim(keep)
