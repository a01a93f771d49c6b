"""Streams and events of a Level Zero device.

A stream is an immediate command list, whose commands may overtake one another: a barrier goes
before each. What Level Zero calls an event is here a `Signal`: it is set once, and has to be reset
by the host before it is used again. An event of the HAL is a name for the signal of its last
recording, so that what waited for an earlier one still waits for that. Signals go round: back to
the free ones when nobody holds them and they were set.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from drivetrain.errors import HalError
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.drivers.level_zero_api import (
    EventDesc,
    EventPoolDesc,
    HostMemDesc,
    QueueDesc,
    Ze,
)
from drivetrain.hal.drivers.level_zero_context import Context
from drivetrain.hal.drivers.waits import wait_until

_IN_A_POOL = 128
_holding = threading.Lock()
"""Of the counts of holders. No call is made under it: devices do not wait for one another."""
_numbers = itertools.count(1)
_owners: WeakValueDictionary[int, Streams] = WeakValueDictionary()
"""Of the events of all open devices, by number."""


@dataclass
class Signal:
    """One of Level Zero's events, and how many hold it."""

    handle: int
    pool: Signals
    holders: int = 1
    stamp: int = 0
    """Address of the device's clock at that point, 8 bytes of host memory; 0: not written."""


@dataclass
class Line:
    """A stream: its command list, and what waits for its end."""

    handle: int
    fence: Signal | None = None
    """Set when all that was queued before it is done."""
    behind: bool = False
    """Something was queued after the fence."""
    waits_for: list[Signal] = field(default_factory=list)
    """Signals that commands behind the fence wait for."""
    passed: deque[tuple[Signal, list[Signal]]] = field(default_factory=deque)
    """(a fence, what may be let go of once it is set)."""


class Signals:
    """Level Zero's events, in pools that grow and are given back at the end."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pools: list[int] = []
        self._stamps: list[int] = []
        self._all: list[int] = []
        self._free: list[int] = []
        self._unset: deque[Signal] = deque()
        self._stamp_of: dict[int, int] = {}

    def take(self) -> Signal:
        """A signal that is not set."""
        with self._context.lock:
            self.collect()
            if not self._free:
                self._grow()
            handle = self._free.pop()
            try:
                self._context.call(self._context.api.zeEventHostReset, handle)
            except HalError:
                self._free.append(handle)
                raise
            return Signal(handle, self, stamp=self._stamp_of[handle])

    def hold(self, signal: Signal) -> Signal:
        with _holding:
            signal.holders += 1
            return signal

    def let(self, signal: Signal | None) -> None:
        """One holder less; the last one's goes back, to the device that it is of, once it is
        set."""
        if signal is None:
            return
        with _holding:
            signal.holders -= 1
            if not signal.holders:
                signal.pool._unset.append(signal)

    def give_back(self, signal: Signal) -> None:
        """It was taken and never queued."""
        with self._context.lock:
            self._free.append(signal.handle)

    def is_set(self, signal: Signal) -> bool:
        return self._context.ready(self._context.api.zeEventQueryStatus, signal.handle)

    def collect(self) -> None:
        for _ in range(min(8, len(self._unset))):
            signal = self._unset.popleft()
            if self.is_set(signal):
                self._free.append(signal.handle)
            else:
                self._unset.append(signal)

    def _grow(self) -> None:
        context, api = self._context, self._context.api
        box = ctypes.c_void_p()
        host = HostMemDesc(Ze.STRUCTURE_TYPE_HOST_MEM_ALLOC_DESC)
        context.call(
            api.zeMemAllocHost, context.handle, ctypes.byref(host), 8 * _IN_A_POOL, 64,
            ctypes.byref(box),
        )  # fmt: skip
        stamps = int(box.value or 0)
        self._stamps.append(stamps)
        desc = EventPoolDesc(
            Ze.STRUCTURE_TYPE_EVENT_POOL_DESC, None, Ze.EVENT_POOL_FLAG_HOST_VISIBLE, _IN_A_POOL
        )
        # For every device of the driver: one waits for the work of another.
        context.call(
            api.zeEventPoolCreate, context.handle, ctypes.byref(desc), 0, None, ctypes.byref(box)
        )
        pool = int(box.value or 0)
        self._pools.append(pool)
        for index in range(_IN_A_POOL):
            one = EventDesc(
                Ze.STRUCTURE_TYPE_EVENT_DESC,
                None,
                index,
                Ze.EVENT_SCOPE_FLAG_HOST,
                Ze.EVENT_SCOPE_FLAG_DEVICE,
            )
            context.call(api.zeEventCreate, pool, ctypes.byref(one), ctypes.byref(box))
            handle = int(box.value or 0)
            self._all.append(handle)
            self._free.append(handle)
            self._stamp_of[handle] = stamps + 8 * index

    def close(self) -> None:
        """Give all of them back; later, if a stream of another device may still wait for one."""
        context, api = self._context, self._context.api
        calls: list[tuple[Any, ...]] = [(api.zeEventDestroy, handle) for handle in self._all]
        calls += [(api.zeEventPoolDestroy, pool) for pool in self._pools]
        calls += [(api.zeMemFree, context.handle, stamps) for stamps in self._stamps]
        lent = len(self._all) > len(self._free) + len(self._unset)
        self._all, self._pools, self._stamps, self._free = [], [], [], []
        if lent:
            context.at_end(partial(_each, calls))
            return
        give = GivingBack()
        for call in calls:
            give(context.call, *call)
        give.end()


def _each(calls: list[tuple[Any, ...]]) -> None:
    for function, *arguments in calls:
        function(*arguments)


class Streams:
    """The streams and events that a backend made."""

    def __init__(self, context: Context, ordinal: int, tick_s: float, valid_bits: int) -> None:
        self._context, self._ordinal = context, ordinal
        self._tick_s, self._mask = tick_s, (1 << valid_bits) - 1
        self.signals = Signals(context)
        self._lines: dict[int, Line] = {}
        self._ending: list[Line] = []
        self._events: dict[int, tuple[bool, Signal | None]] = {}
        """Number -> (made for timing, the signal of the last recording)."""

    # -- streams ---------------------------------------------------------------------------------

    def stream_create(self, priority: int) -> int:
        context = self._context
        self._end_lines()
        word = Ze.COMMAND_QUEUE_PRIORITY_NORMAL
        if priority:
            low, high = (
                Ze.COMMAND_QUEUE_PRIORITY_PRIORITY_LOW,
                Ze.COMMAND_QUEUE_PRIORITY_PRIORITY_HIGH,
            )
            word = low if priority > 0 else high
        desc = QueueDesc(
            Ze.STRUCTURE_TYPE_COMMAND_QUEUE_DESC,
            None,
            self._ordinal,
            0,
            0,
            Ze.COMMAND_QUEUE_MODE_ASYNCHRONOUS,
            word,
        )
        box = ctypes.c_void_p()
        context.call(
            context.api.zeCommandListCreateImmediate,
            context.handle,
            context.device,
            ctypes.byref(desc),
            ctypes.byref(box),
        )
        stream = int(box.value or 0)
        with context.lock:
            self._lines[stream] = Line(stream)
        return stream

    def _line(self, stream: int) -> Line:
        found = self._lines.get(stream)
        if found is None:
            raise self._context.error("no_such_stream", "stream", f"there is no stream {stream:#x}")
        return found

    def append(self, stream: int, name: str, *arguments: object) -> None:
        """Queue a command behind all that was queued on the stream so far."""
        context = self._context
        with context.lock:
            line = self._line(stream)
            barrier = context.api.zeCommandListAppendBarrier
            context.call(barrier, line.handle, None, 0, None)
            line.behind = True
            context.call(getattr(context.api, name), line.handle, *arguments, None, 0, None)

    def fence(self, stream: int) -> Signal | None:
        """A signal that is set when all that was queued so far is done; None: nothing ever was.
        Who keeps it holds it."""
        context = self._context
        with context.lock:
            line = self._line(stream)
            if not line.behind:
                return line.fence
            signal = self.signals.take()
            try:
                context.call(
                    context.api.zeCommandListAppendBarrier, line.handle, signal.handle, 0, None
                )
            except HalError:
                self.signals.give_back(signal)
                raise
            self.signals.let(line.fence)
            line.passed.append((self.signals.hold(signal), line.waits_for))
            line.fence, line.behind, line.waits_for = signal, False, []
            return signal

    def fences(self) -> list[Signal]:
        """Signals that are set when all that was queued on any stream so far is done; who asks
        holds them."""
        with self._context.lock:
            found = [self.fence(stream) for stream in self._lines]
            found += [line.fence for line in self._ending]
            return [self.signals.hold(signal) for signal in found if signal is not None]

    def _tidy(self, line: Line) -> None:
        while line.passed and self.signals.is_set(line.passed[0][0]):
            fence, others = line.passed.popleft()
            for signal in (fence, *others):
                self.signals.let(signal)

    def stream_done(self, stream: int) -> bool:
        with self._context.lock:
            fence = self.fence(stream)
            if fence is not None and not self.signals.is_set(fence):
                return False
            if fence is None and self._context.lost:
                self._context.code(self._context.api.zeEventQueryStatus, 0)
            self._tidy(self._line(stream))
            return True

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        return wait_until(lambda: self.stream_done(stream), timeout_s)

    def synchronize(self, timeout_s: float) -> bool:
        with self._context.lock:
            streams = list(self._lines)
        done = wait_until(lambda: all(self.stream_done(s) for s in streams), timeout_s)
        return done and wait_until(self._end_lines, timeout_s)

    def stream_wait(self, stream: int, event: int) -> None:
        context = self._context
        with context.lock:
            line = self._line(stream)
            signal = self._held(event)
            if signal is None:
                return
            one = ctypes.c_void_p(signal.handle)
            line.behind = True
            try:
                context.call(
                    context.api.zeCommandListAppendBarrier, line.handle, None, 1, ctypes.byref(one)
                )
            except HalError:
                self.signals.let(signal)
                raise
            line.waits_for.append(signal)

    def _held(self, event: int) -> Signal | None:
        """The signal of an event's last recording, this device's or another's, held."""
        while True:
            owner = _owners.get(event, self)
            signal = owner._event(event)[1]
            if signal is None:
                return None
            with _holding:
                if signal.holders:
                    signal.holders += 1
                    return signal
            # It was recorded anew in between.

    def stream_destroy(self, stream: int) -> None:
        """The list goes once its work is done: a list in use must not be destroyed."""
        with self._context.lock:
            self.fence(stream)
            self._ending.append(self._lines.pop(stream))
            self._end_lines()

    def _end_lines(self) -> bool:
        """Destroy the lists of streams that ended and are done; whether none is left."""
        context = self._context
        with context.lock:
            left, self._ending = self._ending, []
            for at, line in enumerate(left):
                try:
                    if line.fence is not None and not self.signals.is_set(line.fence):
                        self._ending.append(line)
                        continue
                    self._tidy(line)
                    context.call(context.api.zeCommandListDestroy, line.handle)
                except HalError:
                    self._ending += left[at:]
                    raise
                self.signals.let(line.fence)
            return not self._ending

    # -- events ------------------------------------------------------------------------------------

    def _event(self, event: int) -> tuple[bool, Signal | None]:
        found = self._events.get(event)
        if found is None:
            raise self._context.error("no_such_event", "event", f"there is no event {event}")
        return found

    def event_create(self, timing: bool) -> int:
        if self._context.lost:
            self._context.code(self._context.api.zeEventCreate)
        number = next(_numbers)
        self._events[number] = timing, None
        _owners[number] = self
        return number

    def event_destroy(self, event: int) -> None:
        self._event(event)
        _owners.pop(event, None)
        self.signals.let(self._events.pop(event)[1])

    def event_record(self, event: int, stream: int) -> None:
        context = self._context
        with context.lock:
            timing, before = self._event(event)
            line = self._line(stream)
            signal = self.signals.take()
            barrier = context.api.zeCommandListAppendBarrier
            try:
                if timing:
                    context.call(barrier, line.handle, None, 0, None)
                    context.call(
                        context.api.zeCommandListAppendWriteGlobalTimestamp,
                        line.handle,
                        signal.stamp,
                        signal.handle,
                        0,
                        None,
                    )
                else:
                    context.call(barrier, line.handle, signal.handle, 0, None)
            except HalError:
                self.signals.give_back(signal)
                raise
            line.behind = True
            self._events[event] = timing, signal
            self.signals.let(before)

    def event_done(self, event: int) -> bool:
        with self._context.lock:
            signal = self._event(event)[1]
            return signal is None or self.signals.is_set(signal)

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return wait_until(lambda: self.event_done(event), timeout_s)

    def event_seconds(self, start: int, end: int) -> float:
        stamps = []
        for event in (start, end):
            timing, signal = self._event(event)
            if not timing or signal is None or not self.signals.is_set(signal):
                raise self._context.error(
                    "invalid", "event_seconds", "both events must be timed, recorded and done"
                )
            stamps.append(ctypes.c_uint64.from_address(signal.stamp).value)
        ticks = (stamps[1] - stamps[0]) & self._mask
        if ticks > self._mask // 2:  # the later event was recorded first
            ticks -= self._mask + 1
        return ticks * self._tick_s

    def close(self) -> None:
        """Let go of all that is left; nothing is running on the device any more."""
        give = GivingBack()
        for event in list(self._events):
            give(self.event_destroy, event)
        for stream in list(self._lines):
            give(self.stream_destroy, stream)
        for _ in range(2):  # once more, if something was in the way
            give(wait_until, self._end_lines, 1.0)
        give(self.signals.close)
        give.end()
