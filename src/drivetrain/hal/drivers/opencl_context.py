"""A context of one device, and the queues in it: results turned into errors, waits with limits.

Nothing waits inside OpenCL, whose own waits know no limit: a marker is queued and asked for.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from drivetrain.errors import DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.drivers.opencl_api import NAME, Api, Cl, Code, Nv, name_of
from drivetrain.hal.drivers.opencl_events import Boxes, boxes
from drivetrain.hal.drivers.opencl_platforms import Found

LOST = frozenset({Nv.ILLEGAL_ACCESS, Code.DEVICE_NOT_AVAILABLE, Code.CONTEXT_TERMINATED_KHR})
"""After one of these nothing works any more in this process."""

_GONE = frozenset({Code.INVALID_CONTEXT, Code.INVALID_COMMAND_QUEUE})
"""What is said of a handle that we know is alive, once its device was lost."""

_NO_MEMORY = frozenset(
    {Code.MEM_OBJECT_ALLOCATION_FAILURE, Code.OUT_OF_HOST_MEMORY, Code.OUT_OF_RESOURCES}
)
_UNSUPPORTED = frozenset(
    {Code.COMPILER_NOT_AVAILABLE, Code.LINKER_NOT_AVAILABLE, Code.PROFILING_INFO_NOT_AVAILABLE}
)
_WORDS = {
    Code.INVALID_VALUE: "invalid",
    Code.INVALID_WORK_GROUP_SIZE: "launch_resources",
    Code.INVALID_KERNEL_NAME: "no_such_kernel",
    Code.INVALID_BINARY: "not_taken",
    Code.BUILD_PROGRAM_FAILURE: "compile",
}
_LAUNCH = "clEnqueueNDRangeKernel"
_SPIN_S = 100e-6
_LONGEST_SLEEP_S = 1e-3
_TIMED_WAIT_S = 2.0
_IDLE_S = 0.02
"""How long `Queues.done` waits for a marker of its own: a queue without work comes to it at once,
or nearly so."""


class Context:
    """The context of one device. Every call goes through `call` or `made`, which raise."""

    def __init__(self, api: Api, found: Found, address: str) -> None:
        self.api = api
        self.found = found
        self.device = found.handle
        self.address = address
        self.closed = False
        self.memory: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """(free, total) bytes, for what OutOfMemory tells."""
        self._over: Callable[[str], HalError] | None = None
        properties = (ctypes.c_void_p * 3)(Cl.CONTEXT_PLATFORM, found.platform.handle, None)
        device = ctypes.c_void_p(found.handle)
        self.handle = self.made(
            api.clCreateContext, properties, 1, ctypes.byref(device), None, None
        )

    # -- calls -----------------------------------------------------------------------------------

    def call(self, function: Any, *arguments: Any) -> None:
        """A call that must succeed. Raises HalError."""
        if self._over is not None:
            raise self._over(function.__name__)
        code = function(*arguments)
        if code:
            raise self.failure(function.__name__, code)

    def code(self, function: Any, *arguments: Any) -> int:
        """The result of a call. Raises what ended the context before."""
        if self._over is not None:
            raise self._over(function.__name__)
        return int(function(*arguments))

    def made(self, function: Any, *arguments: Any, requested: int = 0) -> int:
        """The handle from a function that takes the address for its result last. Raises."""
        if self._over is not None:
            raise self._over(function.__name__)
        code = ctypes.c_int()
        handle = function(*arguments, ctypes.byref(code))
        if code.value or not handle:
            raise self.failure(
                function.__name__, code.value or Code.OUT_OF_RESOURCES, requested=requested
            )
        return int(handle)

    # -- errors ----------------------------------------------------------------------------------

    def failure(
        self, op: str, code: int, *, requested: int = 0, what: str = "", queued: bool = False
    ) -> HalError:
        """The error that a result stands for; ``queued``: the status of work that was queued.
        One that ended the context is kept for good."""
        name = name_of(code)
        asked = f"{op} on {self.address}{f' ({what})' if what else ''}"
        message = f"{asked} failed: {name}"
        facts: dict[str, Any] = {
            "driver": NAME,
            "native": code,
            "native_name": name,
            "op": op,
            "device": self.address,
        }
        crashed = queued and self.found.vendor == "nvidia" and code == Code.OUT_OF_RESOURCES
        if code in LOST or code in _GONE or crashed:
            return self._lose(message, facts)
        if queued:
            return HalError(f"{message}; work that was queued before failed", code="work", **facts)
        if code == Code.OUT_OF_RESOURCES and op == _LAUNCH:
            advice = "the block needs more registers or local memory than there are: take fewer"
            return HalError(f"{message}; {advice} threads", code="launch_resources", **facts)
        if code in _NO_MEMORY:
            free, total = self.memory()
            if requested:
                message = (
                    f"{asked}: {requested} bytes do not fit ({name}); {free} of {total} bytes are "
                    "free. Free buffers, or take a smaller size"
                )
            return OutOfMemory(
                message, requested=requested, free=free, total=total, code="out_of_memory", **facts
            )
        if code in _UNSUPPORTED:
            return Unsupported(message, code="unsupported", **facts)
        return HalError(message, code=_WORDS.get(code, "error"), **facts)

    def check(self, op: str) -> None:
        """Raises when the context is over."""
        if self._over is not None:
            raise self._over(op)

    def no_memory(self, op: str, nbytes: int) -> HalError:
        """For a request that does not fit, where OpenCL has no word for why."""
        most = self.found.number(Cl.DEVICE_MAX_MEM_ALLOC_SIZE)
        error = self.failure(op, Code.MEM_OBJECT_ALLOCATION_FAILURE, requested=nbytes)
        if isinstance(error, OutOfMemory) and nbytes > most:
            error.args = (f"{error}. One allocation has at most {most} bytes on this device",)
        return error

    def _lose(self, message: str, facts: dict[str, Any]) -> HalError:
        def again(op: str) -> HalError:
            return DeviceLost(
                f"{op} on {self.address}: the device was lost to this process earlier: {message}. "
                "Only a new process can use it again",
                code="lost",
                **{**facts, "op": op},
            )

        if self._over is None:
            self._over = again
        return DeviceLost(
            f"{message}; the device is lost to this process. Only a new process can use it again",
            code="lost",
            **facts,
        )

    def error(self, code: str, op: str, message: str) -> HalError:
        """An error of this driver's own, found before OpenCL was asked."""
        return HalError(
            f"{op} on {self.address}: {message}",
            code=code,
            driver=NAME,
            op=op,
            device=self.address,
        )

    def unsupported(self, op: str, message: str) -> Unsupported:
        return Unsupported(
            f"{op} on {self.address}: {message}",
            code="unsupported",
            driver=NAME,
            op=op,
            device=self.address,
        )

    @property
    def lost(self) -> bool:
        return self._over is not None

    # -- waits -----------------------------------------------------------------------------------

    def complete(self, event: int) -> bool:
        """Whether an OpenCL event is. Raises what failed of its work."""
        status = ctypes.c_int()
        self.call(
            self.api.clGetEventInfo,
            event,
            Cl.EVENT_COMMAND_EXECUTION_STATUS,
            ctypes.sizeof(status),
            ctypes.addressof(status),
            None,
        )
        if status.value < 0:
            raise self.failure("queued work", status.value, queued=True)
        return status.value == Cl.COMPLETE

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Ask until it is so: at once for short work, then with sleeps of an eighth of the time
        waited so far, 1 ms at most. False when ``timeout_s`` passed."""
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited >= timeout_s:
                return False
            if waited > _SPIN_S:
                time.sleep(min(waited / 8, _LONGEST_SLEEP_S, timeout_s - waited))
        return True

    # -- end -------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the context. Every later call raises."""
        lost, self.closed = self.lost, True
        self._over = lambda op: self.error("closed", op, "the device was closed; open it again")
        code = self.api.clReleaseContext(self.handle)
        if code and not lost:
            raise self.failure("clReleaseContext", code)


class Queues:
    """In-order queues, and events on them."""

    def __init__(self, context: Context, *, timing: bool) -> None:
        self._context = context
        self._api = context.api
        self._timing = timing
        self._hints = "cl_khr_priority_hints" in context.found.extensions
        self._lock = threading.RLock()  # a finaliser may come in between
        self._queues: set[int] = set()
        self._gone: set[int] = set()
        """Handles of queues that were let go of, which flushed them."""
        self._idle: dict[int, int] = {}
        """How much had been queued anywhere when a queue was last known to be empty."""
        self._asked: dict[int, tuple[int, int]] = {}
        """The marker that `done` waits for in a queue, and how much had been queued by then."""
        self._left: list[int] = []
        """Markers at the end of queues that were let go of."""
        self._events: set[int] = set()
        self._boxes: Boxes = boxes(context.api)
        self._queued = 0
        self.record_address = self._boxes.record_address

    # -- queues ----------------------------------------------------------------------------------

    def new(self, priority: int) -> int:
        context, api = self._context, self._api
        properties = Cl.QUEUE_PROFILING_ENABLE if self._timing else 0
        if self._hints and "queue_properties" not in api.off and context.found.version >= 200:
            hint = Cl.QUEUE_PRIORITY_MED_KHR
            if priority:
                hint = Cl.QUEUE_PRIORITY_HIGH_KHR if priority < 0 else Cl.QUEUE_PRIORITY_LOW_KHR
            table = (ctypes.c_uint64 * 5)(
                Cl.QUEUE_PROPERTIES, properties, Cl.QUEUE_PRIORITY_KHR, hint, 0
            )
            create = api.clCreateCommandQueueWithProperties
            queue = context.made(create, context.handle, context.device, table)
        else:
            create = api.clCreateCommandQueue
            queue = context.made(create, context.handle, context.device, properties)
        with self._lock:
            self._queues.add(queue)
            self._gone.discard(queue)
        return queue

    def free(self, queue: int) -> None:
        """Let go of a queue; `synchronize` still waits for what was queued on it."""
        left = self.marker(queue)
        with self._lock:
            self._queues.discard(queue)
            self._gone.add(queue)
            self._idle.pop(queue, None)
            asked = self._asked.pop(queue, None)
            self._left.append(left)
        if asked is not None:
            self._api.clReleaseEvent(asked[0])
        self._context.call(self._api.clReleaseCommandQueue, queue)
        self._collect()

    def _collect(self) -> bool:
        """Let go of markers that were reached; whether none is left."""
        with self._lock:
            looked, self._left = self._left, []
        for event in looked:
            try:
                reached = self._context.complete(event)
            except HalError:
                reached = not self._context.lost  # nobody is left to be told
            if reached:
                self._api.clReleaseEvent(event)
            else:
                with self._lock:
                    self._left.append(event)
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
                with self._lock:
                    if queue not in self._gone:
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
            queues, self._queues = self._queues, set()
            left, self._left = self._left, []
            left += [event for event, _ in self._asked.values()]
            self._asked, self._idle = {}, {}
        for event in events:
            self._boxes.free(event)
        for event in left:
            self._api.clReleaseEvent(event)
        for queue in queues:
            self._context.call(self._api.clReleaseCommandQueue, queue)
