"""What a simulated device is made of: memory, streams that work in threads, points in their order.

Memory is strict, as a real device is only under a checker: what is freed is overwritten, and a
command that touches bytes that are in no allocation fails.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from _thread import start_new_thread
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from drivetrain.errors import HalError

ALIGNMENT = 256
FREED = 0xDB
_MOST_OVERWRITTEN = 4 << 20

_used: dict[int, int] = {}
_lock = threading.Lock()


def used_bytes(index: int) -> int:
    """Bytes that backends of this process hold of device ``index``."""
    return _used.get(index, 0)


def charge(index: int, nbytes: int, total: int) -> bool:
    """Take (or give back, below 0) bytes of a device; whether there were so many."""
    with _lock:
        after = _used.get(index, 0) + nbytes
        if nbytes > 0 and after > total:
            return False
        _used[index] = after
        return True


class Arena:
    """Bytes of the host that stand for memory of one kind; first fit, strict."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes + ALIGNMENT)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.start = -(-start // ALIGNMENT) * ALIGNMENT
        self.nbytes = nbytes
        self._free = [(self.start, nbytes)]
        self._starts: list[int] = []
        self.sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> int:
        """An address, 0 when there is no room."""
        size = room(nbytes)
        with self._lock:
            for at, (start, length) in enumerate(self._free):
                if length >= size:
                    if length == size:
                        del self._free[at]
                    else:
                        self._free[at] = (start + size, length - size)
                    self.sizes[start] = nbytes
                    insort(self._starts, start)
                    return start
        return 0

    def release(self, ptr: int) -> None:
        with self._lock:
            nbytes = self.sizes.pop(ptr)
            del self._starts[bisect_right(self._starts, ptr) - 1]
            ctypes.memset(ptr, FREED, min(nbytes, _MOST_OVERWRITTEN))
            insort(self._free, (ptr, room(nbytes)))
            at = bisect_right(self._free, (ptr, room(nbytes))) - 1
            for left in (at, at - 1):
                if 0 <= left < len(self._free) - 1:
                    start, length = self._free[left]
                    if start + length == self._free[left + 1][0]:
                        self._free[left] = (start, length + self._free[left + 1][1])
                        del self._free[left + 1]

    def holds(self, ptr: int, nbytes: int) -> bool:
        """Whether these bytes lie in one allocation."""
        with self._lock:
            at = bisect_right(self._starts, ptr) - 1
            if at < 0:
                return False
            start = self._starts[at]
            return ptr + nbytes <= start + self.sizes[start]


def room(nbytes: int) -> int:
    """Bytes that an allocation of ``nbytes`` takes."""
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT


class Point:
    """One recording of an event."""

    __slots__ = ("at", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.at = 0.0

    def reach(self) -> None:
        self.at = time.perf_counter()
        self.done.set()


@dataclass(frozen=True)
class Reach:
    """The command that an event is recorded by."""

    point: Point

    def __call__(self) -> None:
        self.point.reach()


Command = Callable[[], None]


class Queue:
    """A stream: its commands happen one after another in a thread of its own."""

    def __init__(self, handle: int, guarded: Callable[[Command], None]) -> None:
        self.handle = handle
        self._guarded = guarded
        self._waiting: deque[Command] = deque()
        self._changed = threading.Condition()
        self._queued = self._finished = 0
        self._ending = False
        self.failure: HalError | None = None
        """The first failure of queued work that nobody was told of."""
        self.noted: list[Command] | None = None
        """What was queued since a graph was begun; None when none is."""
        self._over = threading.Event()
        # threading's own start waits for the thread, which may collect garbage first; and what it
        # closes may want a lock that whoever makes a stream holds.
        start_new_thread(self._run, ())

    def put(self, command: Command) -> None:
        with self._changed:
            self._waiting.append(command)
            self._queued += 1
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                command = self._waiting.popleft()
            try:
                self._guarded(command)
            except HalError as error:
                self.failure = self.failure or error
            del command  # what it holds must not live until the next one
            with self._changed:
                self._finished += 1
                self._changed.notify_all()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._finished == self._queued

    def wait(self, timeout_s: float) -> bool:
        """Until all that was queued so far is done; False when the time is over before."""
        with self._changed:
            target = self._queued
            return self._changed.wait_for(lambda: self._finished >= target, timeout_s)

    def end(self, *, drop: bool = False) -> None:
        """The thread ends once its work is done; ``drop`` forgets what has not begun."""
        with self._changed:
            if drop:
                self._finished += len(self._waiting)
                self._waiting.clear()
            self._ending = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        return self._over.wait(timeout_s)
