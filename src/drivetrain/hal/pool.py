"""A caching allocator above the SPI: every vendor has the same pool.

Memory is taken from the resource below in segments, cut into blocks, and kept when buffers close.
A closed buffer's block first waits in the list of its stream and size, where the next request of
that size finds it at once. What is found nowhere there is cut from the best-fitting free block of
the stream, then of another stream (behind an event), then from a new segment. Neighbours that are
free on one stream are merged: large ones before a large block is cut, small ones when nothing else
fits.

The sizes of segments follow what PyTorch's caching allocator found to work (2 MiB for requests up
to 1 MiB, 20 MiB up to 10 MiB, else the request rounded up to 2 MiB).
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque

from drivetrain.errors import BadInput, OutOfMemory
from drivetrain.hal.hot import FreeLists
from drivetrain.hal.resource import GRAIN as _GRAIN
from drivetrain.hal.resource import MemoryResource, Stats

_SMALL = 1 << 20
_SMALL_SEGMENT = 2 << 20
_MIDDLE = 10 << 20
_MIDDLE_SEGMENT = 20 << 20
_LARGE_GRAIN = 2 << 20
_NAMED = 5


class _Segment:
    __slots__ = ("nbytes", "ptr", "small", "stream")

    def __init__(self, ptr: int, nbytes: int, stream: int, small: bool) -> None:
        self.ptr, self.nbytes, self.stream, self.small = ptr, nbytes, stream, small


class _Block:
    """A piece of a segment; ``before`` and ``after`` are its neighbours there."""

    __slots__ = ("after", "before", "free", "nbytes", "ptr", "segment", "stream", "waits")

    def __init__(self, segment: _Segment, ptr: int, nbytes: int, stream: int) -> None:
        self.segment, self.ptr, self.nbytes, self.stream = segment, ptr, nbytes, stream
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = False
        self.waits: tuple[int, ...] = ()

    def __lt__(self, other: _Block) -> bool:
        return (self.nbytes, self.ptr) < (other.nbytes, other.ptr)


def rounded(nbytes: int) -> int:
    """Bytes that a block for a request of ``nbytes`` has."""
    return (max(nbytes, 1) + _GRAIN - 1) // _GRAIN * _GRAIN


def _segment_bytes(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MIDDLE:
        return _MIDDLE_SEGMENT
    return (size + _LARGE_GRAIN - 1) // _LARGE_GRAIN * _LARGE_GRAIN


class Pool:
    """A pool over ``resource``; at most ``limit`` bytes are reserved (None: what there is)."""

    def __init__(self, resource: MemoryResource, *, limit: int | None = None) -> None:
        if limit is not None and not limit >= 0:
            raise BadInput(f"a pool of at most {limit} bytes: give 0 or more, or None")
        self.opened, self.kind = resource.opened, resource.kind
        self._below = resource
        self._limit = limit
        self._lock = threading.Lock()
        self.lists = FreeLists()
        """Blocks that were let go and wait for a request of their size; C takes from them too."""
        self._late: deque[tuple[int, int, tuple[int, ...]]] = deque()
        self._used: dict[int, _Block] = {}  # those in the lists too
        self._free: dict[tuple[int, bool], list[_Block]] = {}  # by stream and segment kind, by size
        self._segments: dict[int, _Segment] = {}
        self._reserved = self._peak_reserved = 0
        self._retries = self._failures = 0
        self.opened.tell_of_streams(self)

    # -- what buffers call ------------------------------------------------------------------

    def allocate(self, nbytes: int, stream: int) -> int:
        ptr = self.lists.take(nbytes, stream)
        if ptr:
            return ptr
        with self._lock:
            self._take_late()
            block = self._find(rounded(nbytes), nbytes, stream)
            self._used[block.ptr] = block
            self.lists.count(nbytes, True)
            return block.ptr

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        if waits:
            self.lists.count(nbytes, False)
        elif self.lists.put(ptr, nbytes, stream):
            return
        # A finaliser may run while this thread is inside the pool: it must not wait for the lock.
        self._late.append((ptr, stream, waits))
        while self._late and self._lock.acquire(blocking=False):
            try:
                self._take_late()
            finally:
                self._lock.release()

    def trim(self, keep: int = 0) -> int:
        with self._lock:
            self._take_late()
            return self._trim(keep)

    def stats(self) -> Stats:
        live, requested, allocated, peak_requested, peak_allocated, _ = self.lists.counts()
        return Stats(
            allocated=allocated,
            requested=requested,
            reserved=self._reserved,
            peak_allocated=peak_allocated,
            peak_requested=peak_requested,
            peak_reserved=self._peak_reserved,
            live=live,
            retries=self._retries,
            failures=self._failures,
        )

    def forget_stream(self, stream: int, heir: int, *, wait: bool = True) -> bool:
        """``stream`` is about to end, and ``heir`` already waits for it: its blocks are heir's.
        False when the pool is at work, which a finaliser must not ``wait`` for: it may have come
        in between that work."""
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            self._take_late()
            self._settle(stream)
            for small in (True, False):
                for block in self._free.pop((stream, small), ()):
                    block.stream = heir
                    insort(self._free.setdefault((heir, small), []), block)
            for segment in self._segments.values():
                if segment.stream == stream:
                    segment.stream = heir
        finally:
            self._lock.release()
        return True

    # -- inside, with the lock held ---------------------------------------------------------

    def _take_late(self) -> None:
        late = self._late
        while late:
            try:
                ptr, stream, waits = late.popleft()
            except IndexError:
                return
            self._let_go(ptr, stream, waits)

    def _let_go(self, ptr: int, stream: int, waits: tuple[int, ...]) -> None:
        block = self._used.pop(ptr)
        block.stream = stream
        block.waits = waits
        self._settle_block(block)

    def _settle(self, *which: int) -> None:
        """Merge what waits in the lists: all, one stream's, or one stream's from a size on."""
        for owner, _, ptr in self.lists.drain(*which):
            self._let_go(ptr, owner, ())

    def _settle_block(self, block: _Block) -> None:
        for other in (block.before, block.after):
            if other is not None and other.free and other.stream == block.stream:
                self._unlist(other)
                if other is block.before:
                    other.nbytes += block.nbytes
                    other.after = block.after
                    if block.after is not None:
                        block.after.before = other
                    other.waits += block.waits
                    block = other
                else:
                    block.nbytes += other.nbytes
                    block.after = other.after
                    if other.after is not None:
                        other.after.before = block
                    block.waits += other.waits
        block.free = True
        if len(block.waits) > 8:
            block.waits = self._pending(block.waits)
        insort(self._free.setdefault((block.stream, block.segment.small), []), block)

    def _pending(self, events: tuple[int, ...]) -> tuple[int, ...]:
        left = []
        for event in events:
            if self.opened.backend.event_done(event):
                self.opened.give_event(event)
            else:
                left.append(event)
        return tuple(left)

    def _unlist(self, block: _Block) -> None:
        listed = self._free[block.stream, block.segment.small]
        at = bisect_left(listed, block)
        assert listed[at] is block
        del listed[at]

    def _find(self, size: int, nbytes: int, stream: int) -> _Block:
        if size > _SMALL:  # what waits may be a better fit, once it is merged
            self._settle(stream, _SMALL + 1)
        block = self._fitting(size, stream)
        if block is None:
            self._settle()
            block = self._fitting(size, stream) or self._borrowed(size, stream)
        if block is None:
            block = self._grow(size, nbytes, stream)
        if block.waits:
            for event in block.waits:
                self.opened.backend.stream_wait(stream, event)
                self.opened.give_event(event)
            block.waits = ()
        return block

    def _fitting(self, size: int, stream: int) -> _Block | None:
        """The best-fitting free block of the stream, cut to size."""
        listed = self._free.get((stream, size <= _SMALL))
        if not listed:
            return None
        low, high = 0, len(listed)
        while low < high:
            middle = (low + high) // 2
            if listed[middle].nbytes < size:
                low = middle + 1
            else:
                high = middle
        if low == len(listed):
            return None
        return self._cut(listed.pop(low), size)

    def _cut(self, block: _Block, size: int) -> _Block:
        """Take ``size`` bytes off a free, unlisted block; what is left is listed again."""
        left = block.nbytes - size
        if left >= (_GRAIN if block.segment.small else _SMALL):
            rest = _Block(block.segment, block.ptr + size, left, block.stream)
            rest.before, rest.after = block, block.after
            if block.after is not None:
                block.after.before = rest
            block.after = rest
            block.nbytes = size
            rest.free = True
            if block.waits:  # one event cannot be owned twice: wait for them now
                rest.waits = ()
                for event in block.waits:
                    self.opened.backend.stream_wait(block.stream, event)
                    self.opened.give_event(event)
                block.waits = ()
            insort(self._free.setdefault((rest.stream, rest.segment.small), []), rest)
        block.free = False
        return block

    def _borrowed(self, size: int, stream: int) -> _Block | None:
        """A block that another stream let go: ``stream`` waits for that stream's work so far."""
        for other, small in list(self._free):
            if other == stream or small != (size <= _SMALL) or other in self.opened.capturing:
                continue
            block = self._fitting(size, other)
            if block is not None:
                backend = self.opened.backend
                event = self.opened.take_event()
                backend.event_record(event, other)
                block.waits = (*block.waits, event)
                block.stream = stream
                return block
        return None

    def _grow(self, size: int, nbytes: int, stream: int) -> _Block:
        wanted = _segment_bytes(size)
        if self._limit is not None and self._reserved + wanted > self._limit:
            self._trim(max(0, self._limit - wanted))
            if self._reserved + wanted > self._limit:
                wanted = size  # the last bytes below a limit need no spare room
        if self._limit is not None and self._reserved + wanted > self._limit:
            self._failures += 1
            raise self._exhausted(nbytes, f"the pool's limit is {self._limit} bytes")
        try:
            ptr = self._below.allocate(wanted, stream)
        except OutOfMemory:
            self._retries += 1
            self._settle()
            self._trim(0)
            wanted = size
            try:
                ptr = self._below.allocate(wanted, stream)
            except OutOfMemory as error:
                self._failures += 1
                raise self._exhausted(nbytes, str(error)) from error
        segment = self._segments[ptr] = _Segment(ptr, wanted, stream, size <= _SMALL)
        self._reserved += wanted
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return self._cut(_Block(segment, ptr, wanted, stream), size)

    def _exhausted(self, nbytes: int, why: str) -> OutOfMemory:
        device = self.opened.device
        free, total = self.opened.backend.memory()
        stats = self.stats()
        largest = sorted((b.nbytes for b in self._used.values()), reverse=True)[:_NAMED]
        return OutOfMemory(
            f"{nbytes} bytes of {self.kind.name.lower()} memory on {device.address} were asked "
            f"for: {why}. The device has {free} of {total} bytes free; this pool holds "
            f"{self._reserved} bytes, {stats.allocated} of them in {stats.live} buffers, the "
            f"largest {', '.join(map(str, largest)) or 'none'}. Close buffers, or ask for less",
            requested=nbytes,
            free=free,
            total=total,
            code="out_of_memory",
            driver=device.driver,
            op="alloc",
            device=device.address,
        )

    def _blocks_of(self, streams: set[int]) -> list[_Block]:
        """Free blocks of streams on which no event can be recorded now."""
        return [
            block
            for (stream, _), listed in self._free.items()
            if stream in streams
            for block in listed
        ]

    def _trim(self, keep: int) -> int:
        """Give segments back whose blocks are all free."""
        self._settle()
        given = 0
        whole: dict[int, list[_Block]] = {}
        capturing = self.opened.capturing
        busy = {id(block.segment) for block in self._used.values()}
        if capturing:
            busy |= {id(block.segment) for block in self._blocks_of(capturing)}
            busy |= {id(s) for s in self._segments.values() if s.stream in capturing}
        for listed in self._free.values():
            for block in listed:
                if id(block.segment) not in busy:
                    whole.setdefault(block.segment.ptr, []).append(block)
        for ptr, blocks in whole.items():
            if self._reserved <= keep:
                break
            segment = self._segments.pop(ptr)
            waits: list[int] = []
            for stream in {block.stream for block in blocks} - {segment.stream}:
                event = self.opened.take_event()
                self.opened.backend.event_record(event, stream)
                waits.append(event)
            for block in blocks:
                self._unlist(block)
                waits += block.waits
            self._below.deallocate(ptr, segment.nbytes, segment.stream, tuple(waits))
            self._reserved -= segment.nbytes
            given += segment.nbytes
        return given
