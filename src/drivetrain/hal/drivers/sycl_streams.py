"""Streams and events of a SYCL device.

A stream is an in-order queue, and what is kept of it is the event of its last command: when that is
complete, all is. SYCL makes a new event with each command; an event of the HAL is a name for the
one of its last recording.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import HalError
from drivetrain.hal.drivers.sycl_context import Context
from drivetrain.hal.drivers.waits import wait_until

_MOST_FAILURES = 64


@dataclass
class Line:
    """A stream: its queue, and what is left to wait for."""

    queue: int
    last: int = 0
    """The event of the last command; 0 when all is done."""


class Streams:
    """The streams and events that a backend made."""

    def __init__(self, context: Context, *, timing: bool) -> None:
        self._context, self._api, self._timing = context, context.api, timing
        self._lines: dict[int, Line] = {}
        self._spare: list[int] = []
        """Queues that were let go of and are empty, for the next stream that is wanted."""
        self._ending: list[Line] = []
        self._events: dict[int, tuple[bool, int]] = {}
        """Number -> (made for timing, SYCL's event of the last recording; 0: none)."""
        self._numbers = itertools.count(1)

    # -- streams ---------------------------------------------------------------------------------

    def stream_create(self, priority: int) -> int:
        context = self._context
        with context.lock:
            context.check("stream_create")
            self._end_lines()
            queue = self._spare.pop() if self._spare else context.queue(timing=self._timing)
            self._lines[queue] = Line(queue)
        return queue

    def _line(self, stream: int) -> Line:
        found = self._lines.get(stream)
        if found is None:
            self._context.check("stream")
            raise self._context.error("no_such_stream", "stream", f"there is no stream {stream:#x}")
        return found

    def append(self, stream: int, function: Any, *arguments: Any, what: str = "") -> None:
        """Queue a command: a function that takes the queue first and gives an event."""
        with self._context.lock:
            line = self._line(stream)
            event = self._context.made(function, line.queue, *arguments, what=what)
            self.follow(line, event)

    def launch(self, stream: int, kernel: int, *arguments: Any, what: str) -> None:
        """Queue a kernel; the one command that does not take its queue first."""
        with self._context.lock:
            line = self._line(stream)
            function = self._api.DPCTLQueue_SubmitNDRange
            event = self._context.made(function, kernel, line.queue, *arguments, what=what)
            self.follow(line, event)

    def follow(self, line: Line, event: int) -> None:
        before, line.last = line.last, event
        if before:
            self._api.DPCTLEvent_Delete(before)

    def mark(self, stream: int) -> int:
        """An event that is complete when all that was queued so far is; 0 when it is already. Who
        takes it deletes it."""
        with self._context.lock:
            line = self._line(stream)
            if not line.last:
                return 0
            return self._context.made(self._api.DPCTLEvent_Copy, line.last)

    def _is_over(self, line: Line) -> bool:
        if not line.last:
            return True
        try:
            if not self._context.is_complete(line.last):
                return False
        except HalError:
            self.follow(line, 0)  # a failure is told once
            raise
        self.follow(line, 0)
        return True

    def stream_done(self, stream: int) -> bool:
        with self._context.lock:
            return self._is_over(self._line(stream))

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        return wait_until(lambda: self.stream_done(stream), timeout_s)

    def synchronize(self, timeout_s: float) -> bool:
        self._context.check("synchronize")
        return wait_until(self._all_over, timeout_s)

    def _all_over(self) -> bool:
        with self._context.lock:
            return all(self._is_over(line) for line in self._lines.values()) and self._end_lines()

    def stream_wait(self, stream: int, event: int) -> None:
        with self._context.lock:
            line, found = self._line(stream), self._event(event)[1]
            if not found:
                return
            wanted = ctypes.byref(ctypes.c_void_p(found))
            barrier = self._api.DPCTLQueue_SubmitBarrierForEvents
            self.follow(line, self._context.made(barrier, line.queue, wanted, 1))

    def stream_destroy(self, stream: int) -> None:
        """The queue goes once its work is done."""
        with self._context.lock:
            self._ending.append(self._line(stream))
            del self._lines[stream]
            self._end_lines()

    def _end_lines(self) -> bool:
        """Keep the queues of streams that ended and are done; whether none is left."""
        left, self._ending = self._ending, []
        for line in left:
            try:
                if self._is_over(line):
                    self._spare.append(line.queue)
                else:
                    self._ending.append(line)
            except HalError:
                self._api.DPCTLQueue_Delete(line.queue)  # nobody is left to be told
        return not self._ending

    # -- events ------------------------------------------------------------------------------------

    def _event(self, event: int) -> tuple[bool, int]:
        found = self._events.get(event)
        if found is None:
            self._context.check("event")
            raise self._context.error("no_such_event", "event", f"there is no event {event}")
        return found

    def event_create(self, timing: bool) -> int:
        self._context.check("event_create")
        number = next(self._numbers)
        self._events[number] = timing and self._timing, 0
        return number

    def event_destroy(self, event: int) -> None:
        with self._context.lock:
            found = self._event(event)[1]
            del self._events[event]
            if found:
                self._api.DPCTLEvent_Delete(found)

    def event_record(self, event: int, stream: int) -> None:
        with self._context.lock:
            timing, before = self._event(event)
            line = self._line(stream)
            if timing:  # a time of its own: the last command may have ended long ago
                marker = self._context.made(self._api.DPCTLQueue_SubmitBarrier, line.queue)
                self.follow(line, marker)
            self._events[event] = timing, self.mark(stream)
            if before:
                self._api.DPCTLEvent_Delete(before)

    def event_done(self, event: int) -> bool:
        with self._context.lock:
            found = self._event(event)[1]
            return not found or self._context.is_complete(found)

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return wait_until(lambda: self.event_done(event), timeout_s)

    def event_seconds(self, start: int, end: int) -> float:
        times = []
        with self._context.lock:
            for event in (start, end):
                timing, found = self._event(event)
                if not timing or not found or not self._context.is_complete(found):
                    raise self._context.error(
                        "invalid", "event_seconds", "both events must be timed, recorded and done"
                    )
                time = self._api.DPCTLEvent_GetProfilingInfoEnd(found)
                if not time:
                    raise self._context.failure("DPCTLEvent_GetProfilingInfoEnd", "it has no time")
                times.append(time)
        return float(times[1] - times[0]) * 1e-9

    def tells_time(self) -> bool:
        """Whether an event knows when it was reached: found out by asking one."""
        stream, event = self.stream_create(0), self.event_create(True)
        try:
            self.event_record(event, stream)
            if not self.event_synchronize(event, 2.0):
                return False
            return bool(self._api.DPCTLEvent_GetProfilingInfoEnd(self._event(event)[1]))
        finally:
            self.event_destroy(event)
            self.stream_destroy(stream)

    # -- end -------------------------------------------------------------------------------------

    def comes_to_rest(self, timeout_s: float) -> bool:
        """Whether all that was queued is done, well or not: nobody is left to be told."""
        for _ in range(_MOST_FAILURES):
            try:
                return self.synchronize(timeout_s)
            except HalError:
                continue  # each failure is told once
        return False

    def close(self) -> None:
        """Let go of all that is left; nothing is running on the device any more."""
        for event in list(self._events):
            self.event_destroy(event)
        for stream in list(self._lines):
            self.stream_destroy(stream)
        wait_until(self._end_lines, 1.0)
        for queue in self._spare:
            self._api.DPCTLQueue_Delete(queue)
        self._spare = []
