"""In-order queues of an OpenCL device, and events on them, recorded again and again.

Work may stay in a queue until it is flushed: whatever is asked or waited for is flushed first.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal.drivers.opencl_api import Cl
from drivetrain.hal.drivers.opencl_context import Context
from drivetrain.hal.drivers.opencl_events import Boxes, boxes

_TIMED_WAIT_S = 2.0
_IDLE_S = 0.02
"""How long `Queues.done` waits for a marker of its own: a queue without work comes to it at once,
or nearly so."""


class _Sort(NamedTuple):
    """Which queues may stand for each other."""

    priority: int
    """-1 high, 0, 1 low."""
    timing: bool


class Queues:
    """In-order queues, and events on them."""

    def __init__(self, context: Context, *, timing: bool) -> None:
        self._context = context
        self._api = context.api
        self._timing = timing
        self._hints = "cl_khr_priority_hints" in context.found.extensions
        self._lock = threading.RLock()  # a finaliser may come in between
        self._queues: dict[int, _Sort] = {}
        self._spare: dict[_Sort, list[int]] = {}
        """Queues that were let go of and are empty, for the next that is wanted: some platforms
        (NVIDIA's: half a MiB each) never give back what a queue took."""
        self._idle: dict[int, int] = {}
        """How much had been queued anywhere when a queue was last known to be empty."""
        self._asked: dict[int, tuple[int, int]] = {}
        """The marker that `done` waits for in a queue, and how much had been queued by then."""
        self._left: list[tuple[int, int, _Sort]] = []
        """Queues that were let go of before their end was reached: the marker there, the queue."""
        self._failed: list[int] = []
        """Queues that were let go of and whose work failed: not used again."""
        self._events: set[int] = set()
        self._boxes: Boxes = boxes(context.api)
        self._queued = 0
        self.record_address = self._boxes.record_address

    # -- queues ----------------------------------------------------------------------------------

    def new(self, priority: int) -> int:
        sort = _Sort((priority > 0) - (priority < 0), self._timing)
        with self._lock:
            self._collect()
            spare = self._spare.get(sort)
            queue = spare.pop() if spare else 0
            if queue:
                self._queues[queue] = sort
        if not queue:
            queue = self._made(sort)
            with self._lock:
                self._queues[queue] = sort
        return queue

    def _made(self, sort: _Sort) -> int:
        context, api = self._context, self._api
        properties = Cl.QUEUE_PROFILING_ENABLE if sort.timing else 0
        if self._hints and "queue_properties" not in api.off and context.found.version >= 200:
            hint = {
                -1: Cl.QUEUE_PRIORITY_HIGH_KHR,
                0: Cl.QUEUE_PRIORITY_MED_KHR,
                1: Cl.QUEUE_PRIORITY_LOW_KHR,
            }[sort.priority]
            table = (ctypes.c_uint64 * 5)(
                Cl.QUEUE_PROPERTIES, properties, Cl.QUEUE_PRIORITY_KHR, hint, 0
            )
            create = api.clCreateCommandQueueWithProperties
            return context.made(create, context.handle, context.device, table)
        return context.made(api.clCreateCommandQueue, context.handle, context.device, properties)

    def free(self, queue: int) -> None:
        """Let go of a queue; `synchronize` still waits for what was queued on it."""
        left = self.marker(queue)
        with self._lock:
            sort = self._queues.pop(queue)
            self._idle.pop(queue, None)
            asked = self._asked.pop(queue, None)
            self._left.append((left, queue, sort))
        if asked is not None:
            self._api.clReleaseEvent(asked[0])
        self._collect()

    def _collect(self) -> bool:
        """Keep queues that were let go of and came to their end; whether none is left."""
        with self._lock:
            looked, self._left = self._left, []
        for event, queue, sort in looked:
            failed = False
            try:
                reached = self._context.complete(event)
            except HalError:
                reached = failed = not self._context.lost  # nobody is left to be told
            if reached:
                self._api.clReleaseEvent(event)
            with self._lock:
                if not reached:
                    self._left.append((event, queue, sort))
                elif failed:
                    self._failed.append(queue)
                else:
                    self._spare.setdefault(sort, []).append(queue)
        return not self._left

    def tells_time(self) -> bool:
        """Whether an event knows when it was reached: found out by asking one. Queues that are made
        from then on keep times only if it does."""
        event, queue = self.event(), self.new(0)
        try:
            self.event_record(event, queue)
            self._timing = self.event_wait(event, _TIMED_WAIT_S) and self.end_ns(event) > 0
        except Unsupported:
            self._timing = False
        finally:
            self.event_free(event)
            self.free(queue)
        return self._timing

    def queued(self) -> None:
        """Something was queued, on any queue."""
        self._queued += 1

    def _count(self) -> int:
        return self._queued + self._boxes.launches()

    def marker(self, queue: int) -> int:
        """An OpenCL event at the end of a queue that is on its way to the device."""
        box = ctypes.c_void_p()
        self._context.call(self._api.clEnqueueMarkerWithWaitList, queue, 0, None, ctypes.byref(box))
        self._context.call(self._api.clFlush, queue)
        return int(box.value or 0)

    @contextmanager
    def marked(self, queue: int) -> Iterator[int]:
        """A marker for as long as the block takes."""
        event = self.marker(queue)
        try:
            yield event
        finally:
            self._api.clReleaseEvent(event)

    # -- waiting for a queue ---------------------------------------------------------------------

    def wait(self, queue: int, timeout_s: float) -> bool:
        count = self._count()
        with self.marked(queue) as event:
            reached = self._context.wait_until(lambda: self._context.complete(event), timeout_s)
        if reached and queue in self._queues:
            self._idle[queue] = count
        return reached

    def done(self, queue: int) -> bool:
        """Whether all is done. While a marker is outstanding, something is not; what C queues is
        counted, so that a queue that is known to be empty needs no new marker."""
        with self._lock:
            if queue in self._asked and not self._answered(queue):
                return False
            if self._idle.get(queue) == self._count():
                return True
            count = self._count()
            self._asked[queue] = self.marker(queue), count
        return self._context.wait_until(lambda: self._answered(queue), _IDLE_S)

    def _answered(self, queue: int) -> bool:
        """Whether the queue came to the marker that `done` left. Raises, once, what failed."""
        with self._lock:
            asked = self._asked.get(queue)
            if asked is None:
                return True
            event, count = asked
            try:
                if not self._context.complete(event):
                    return False
            except HalError:
                del self._asked[queue]
                self._api.clReleaseEvent(event)
                raise
            del self._asked[queue]
            self._api.clReleaseEvent(event)
            if queue in self._queues:
                self._idle[queue] = count
            return True

    def synchronize(self, timeout_s: float) -> bool:
        began = time.monotonic()
        with ExitStack() as held:
            events = [held.enter_context(self.marked(queue)) for queue in list(self._queues)]
            for event in events:
                left = max(0.0, timeout_s - (time.monotonic() - began))
                done = partial(self._context.complete, event)
                if not self._context.wait_until(done, left):
                    return False
        left = max(0.0, timeout_s - (time.monotonic() - began))
        return self._context.wait_until(self._collect, left)

    # -- events ----------------------------------------------------------------------------------

    def event(self) -> int:
        self._context.check("event_create")
        made = self._boxes.new()
        self._events.add(made)
        return made

    def event_free(self, event: int) -> None:
        self._alive(event, "event_destroy")
        self._events.discard(event)
        self._boxes.free(event)

    def event_record(self, event: int, queue: int) -> None:
        self._alive(event, "event_record")
        code = self._boxes.record(event, queue)
        if code:
            raise self._context.failure("clEnqueueMarkerWithWaitList", code)

    def _alive(self, event: int, op: str) -> None:
        self._context.check(op)
        if event not in self._events:
            raise self._context.error("no_such_event", op, f"there is no event {event:#x}")

    @contextmanager
    def recorded(self, event: int) -> Iterator[int]:
        """The OpenCL event of the last recording, on its way to the device; 0: never recorded."""
        self._alive(event, "event")
        found, queue = self._boxes.take(event)
        try:
            if queue:
                self._context.call(self._api.clFlush, queue)
            yield found
        finally:
            if found:
                self._api.clReleaseEvent(found)

    def event_done(self, event: int) -> bool:
        with self.recorded(event) as found:
            return not found or self._context.complete(found)

    def event_wait(self, event: int, timeout_s: float) -> bool:
        with self.recorded(event) as found:
            if not found:
                return True
            return self._context.wait_until(lambda: self._context.complete(found), timeout_s)

    def wait_event(self, queue: int, event: int) -> None:
        """What is queued from here on waits for the event as last recorded."""
        with self.recorded(event) as found:
            if found:
                waits = ctypes.byref(ctypes.c_void_p(found))
                self._context.call(self._api.clEnqueueBarrierWithWaitList, queue, 1, waits, None)
                self.queued()

    def end_ns(self, event: int) -> int:
        """When the event was reached, on the device's clock."""
        with self.recorded(event) as found:
            if not found:
                raise self._context.error("not_recorded", "event_seconds", "it was never recorded")
            box = ctypes.c_uint64()
            self._context.call(
                self._api.clGetEventProfilingInfo,
                found,
                Cl.PROFILING_COMMAND_END,
                ctypes.sizeof(box),
                ctypes.addressof(box),
                None,
            )
            return box.value

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back every queue and event; nothing is running any more."""
        with self._lock:
            events, self._events = self._events, set()
            queues, self._queues = list(self._queues), {}
            queues += [queue for _, queue, _ in self._left] + self._failed
            queues += [queue for spare in self._spare.values() for queue in spare]
            left = [event for event, _, _ in self._left]
            left += [event for event, _ in self._asked.values()]
            self._left, self._failed, self._spare = [], [], {}
            self._asked, self._idle = {}, {}
        for event in events:
            self._boxes.free(event)
        for event in left:
            self._api.clReleaseEvent(event)
        for queue in queues:
            self._context.call(self._api.clReleaseCommandQueue, queue)
